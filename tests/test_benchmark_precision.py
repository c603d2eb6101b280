"""The arithmetic of `benchmarks.precision`, on recorded metrics."""

import math

import pytest

from benchmarks import precision
from rlhfjax import recipe

# Student's quantile of 97.5 % with 2 degrees of freedom.
T_2 = 4.302652729911275


def runs(differences):
    first = [2.5, 2.75, 3.0]
    return [
        ({"sft/val_loss": x}, {"sft/val_loss": x + d})
        for x, d in zip(first, differences, strict=True)
    ]


def test_the_interval_is_that_of_paired_differences():
    """0.01, 0.02 and 0.03: mean 0.02, standard deviation 0.01, however far apart the seeds are."""
    (row,) = precision.compare(runs([0.01, 0.02, 0.03]))
    half = T_2 * 0.01 / math.sqrt(3)
    assert row.difference.value == pytest.approx(0.02)
    assert row.difference.high - row.difference.value == pytest.approx(half)
    assert row.difference.value - row.difference.low == pytest.approx(half)
    assert row.is_within(0.02 + half + 1e-9)
    assert not row.is_within(0.02 + half - 1e-9)


def test_both_ends_count():
    (row,) = precision.compare(runs([-0.03, -0.02, -0.01]))
    assert row.difference.low < -0.02 < row.difference.high < 0.02
    assert not row.is_within(precision.BOUND)
    (row,) = precision.compare(runs([0.001, -0.001, 0.0]))
    assert row.is_within(precision.BOUND)


def test_the_table_says_which_losses_are_within():
    table = precision.table(precision.compare(runs([0.01, 0.02, 0.03])))
    assert "| held-out loss of fine-tuning, nats per token | 2.7500 | 2.7700 |" in table
    assert "sft/val_loss by seed: 2.5000 2.5100, 2.7500 2.7700, 3.0000 3.0300" in table
    assert table.endswith("sft/val_loss: the interval is NOT within +- 0.02")


def test_a_metric_that_a_run_lacks_has_no_row():
    pair = ({"evaluate/kl": 1.0, "sft/val_loss": 2.0}, {"sft/val_loss": 2.0})
    rows = precision.compare([pair, pair])
    assert [row.name for row in rows] == ["sft/val_loss"]


def test_a_run_whose_row_is_kept_is_not_run_again(monkeypatch, tmp_path):
    started = []

    def run(seed, dtype, size, _workdir, until):
        started.append((seed, dtype, until) if until else (seed, dtype))
        loss = 2.0 + seed + 0.001 * (dtype != "float32")
        return {
            "size": size,
            "seed": seed,
            "dtype": dtype,
            "metrics": {"sft/val_loss": loss},
            "machine": precision.machine.describe(),
        }

    monkeypatch.setattr(precision, "run", run)
    file = tmp_path / "rows.jsonl"
    precision.run_or_read([(1, "float32")], "full", tmp_path, file)
    precision.run_or_read([(0, "float32")], "smoke", tmp_path, file)
    words = ["--seeds=2", f"--rows={file}", f"--workdir={tmp_path}"]
    assert precision.main(words) == 0
    assert precision.main(words) == 0
    kept, other_size, *rest = started
    assert (kept, other_size) == ((1, "float32"), (0, "float32"))
    assert rest == [
        (0, "float32"),
        (0, "bfloat16_products"),
        (1, "bfloat16_products"),
    ]
    started.clear()
    assert precision.main([*words, "--loss_seeds=3"]) == 0
    assert started == [(2, dtype, "sft") for dtype in precision.DTYPES]


def test_a_recipe_until_fine_tuning_is_one_and_computes_the_same():
    whole = precision.quickstart(3, "float32", "smoke")
    short = precision.quickstart(3, "float32", "smoke", "sft")
    recipe.validate(short)
    assert short.stages == ("tokenizer", "pretrain", "sft")
    assert all(short[name] == whole[name] for name in short.stages)


def test_a_metric_has_the_seeds_that_measured_it():
    whole = {"sft/val_loss": 2.0, "evaluate/kl": 1.0}
    loss = {"sft/val_loss": 3.0}
    rows = precision.compare([(whole, whole), (whole, whole), (loss, loss)])
    assert {row.name: len(row.values[0]) for row in rows} == {
        "sft/val_loss": 3,
        "evaluate/kl": 2,
    }
