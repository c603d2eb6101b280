"""The arithmetic of `benchmarks.compare` and of its rooflines, without running a benchmark."""

import itertools
import sys
import types
from collections import Counter

import pytest

from benchmarks import compare, compare_table, machine, products
from benchmarks.peers import common
from benchmarks.products import Product
from rlhfjax.models.presets import preset

SIZES = compare.SPEC["workloads"]
TINY = preset("tiny")
# Numbers of tiny's matrices, by hand: 4 layers of 4 x 128 x 128 and 3 x 128 x 352; the output.
TRUNK, OUTPUT = 4 * (4 * 128**2 + 3 * 128 * 352), 4096 * 128


def flops(workload):
    return products.flops(products.products(workload, TINY, SIZES[workload]))


def test_products_take_two_flops_per_parameter_and_token_and_six_in_training():
    sampled = 64 * 128 * 2 * TRUNK + 64 * 64 * 2 * OUTPUT
    scored = 64 * 128 * 2 * TRUNK
    assert flops("pretrain") == 32 * 256 * 6 * (TRUNK + OUTPUT)
    assert flops("rm") == 64 * 128 * 6 * TRUNK
    assert flops("generate") == sampled
    assert flops("grpo") == sampled + sampled + 3 * sampled
    # Policy, reference and sampler; reward and value; 4 epochs of forward and backward passes.
    updates = 4 * 3 * (sampled + scored)
    assert flops("ppo") == 3 * sampled + 2 * scored + updates


def test_the_backward_pass_has_two_products_of_the_same_size():
    forward = Counter({Product(m=8, k=2, n=3): 5})
    trained = products.trained(forward)
    expected = {Product(8, 2, 3): 5, Product(8, 3, 2): 5, Product(2, 8, 3): 5}
    assert trained == expected


def test_a_roofline_is_flops_over_the_rate_of_each_shape():
    counts = Counter({Product(1, 2, 3): 10, Product(4, 5, 6): 1})
    rates = {Product(1, 2, 3): 60.0, Product(4, 5, 6): 120.0}
    assert products.roofline_seconds(counts, rates) == 10 * 12 / 60 + 240 / 120


def test_a_measured_rate_is_the_flops_of_one_call_per_second(monkeypatch):
    """10 products of 2 x 8 x 8 x 8 FLOPs, by a clock that advances 2 s in each call."""
    clock = itertools.count(0, 2)
    ticking = types.SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(products, "time", ticking)
    monkeypatch.setattr(products, "_FLOPS", 10 * 1024)
    assert products.measure_rate(Product(8, 8, 8), "bfloat16") == 10 * 1024 / 2


def run(side, setting, number, tokens_per_s, **fields):
    return {
        "kind": "run",
        "phase": "round",
        "side": side,
        "setting": setting,
        "workload": "pretrain",
        "shape": "tiny",
        "round": number,
        "load_before": 0.5,
        "tokens_per_s": tokens_per_s,
        "median": 100 / tokens_per_s,
        "peak_rss_mb": 700 + number,
        **fields,
    }


def records():
    pilot = {"phase": "pilot"}
    roofline = {"kind": "roofline", "workload": "pretrain", "shape": "tiny"}
    product = {"m": 1, "k": 2, "n": 3, "count": 10, "gflop": 12e-9}
    product["gflops_per_s"] = {"float32": 1.5, "bfloat16_products": 3.0}
    roofline |= {"gflop": 120e-9, "products": [product]}
    roofline["seconds"] = {"float32": 0.25, "bfloat16_products": 0.05}
    failed = run("trl", "bf16+compile", 0, 1.0, **pilot) | {"error": "no compiler"}
    return [
        {"kind": "machine", **machine.describe()},
        roofline,
        run("rlhfjax", "float32", 0, 200.0, **pilot),
        run("rlhfjax", "bfloat16_products", 0, 400.0, **pilot),
        run("trl", "float32", 0, 90.0, **pilot),
        run("trl", "medium", 0, 95.0, **pilot),
        failed,
        *(run("rlhfjax", "float32", i, rate) for i, rate in enumerate((200, 210, 190))),
        *(run("rlhfjax", "auto", i, rate) for i, rate in enumerate((380, 390, 400))),
        *(run("trl", "float32", i, rate) for i, rate in enumerate((100, 84, 95))),
        *(run("trl", "bf16", i, 200.0) for i in range(3)),
    ]


def test_the_pilot_chooses_the_fastest_setting_that_ran():
    best = compare_table.best_settings(records(), "pretrain", "tiny")
    assert best == {"rlhfjax": "bfloat16_products", "trl": "medium"}


def test_the_table_has_paired_ratios_spreads_failures_and_missing_sides():
    text = compare_table.markdown(records())
    assert (
        "| pretrain | tiny | float32 | 200 (190–210), float32 | 95.0 (84.0–100), float32 | — "
        "| 2.00 (2.00–2.50) | 702, 702, — | 50 %, 10 % |"
    ) in text
    assert "| default | 390 (380–400), auto | 200 (200–200), bf16 | — | 1.95 (" in text
    assert "Tunix was not run on pretrain tiny." in text
    assert "- pilot trl bf16+compile pretrain tiny: no compiler" in text
    assert "| [1, 2] x [2, 3] | 10 | 1.2e-08 | 1.5 | 3.0 |" in text


def test_a_default_that_stands_for_the_best_setting_is_that_of_the_best_pairing():
    auto = {"dtype": "bfloat16_products"}
    runs = [run("rlhfjax", "auto", 0, 400.0, **auto), run("trl", "medium", 0, 100.0)]
    text = compare_table.markdown([*records()[:7], *runs])
    assert "| best | 400 (400–400), auto | 100 (100–100), medium | — | 4.00 (" in text
    assert "| pretrain | tiny | float32 | — | — | — |" in text


def test_the_same_command_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """In any order of failures: each run of each round is measured once."""
    measured = []

    def measure(command, limit):
        if len(measured) == 7:
            raise KeyboardInterrupt
        measured.append(command)
        if "setting=bf16" in command:
            return {"error": "no"}
        return {"tokens_per_s": 1.0 + len(measured), "dtype": "float32"}

    monkeypatch.setattr(compare, "measured", measure)
    monkeypatch.setattr(compare.precision, "here", lambda: "float32")
    out = tmp_path / "compare.jsonl"

    def go():
        comparison = compare.Comparison(compare.Sides(tunix="t"), out, 1, {"steps": 2})
        comparison.pilot(["pretrain:tiny"])
        for number in range(2):
            comparison.round(number, ["pretrain:tiny"])
        return comparison

    with pytest.raises(KeyboardInterrupt):
        go()
    measured.append("the interruption")
    records = go().records
    about = [
        tuple(r[k] for k in ("phase", "round", "side", "setting")) for r in records
    ]
    assert len(set(about)) == len(about)
    of_pilot = [each for each in about if each[0] == "pilot"]
    assert len(of_pilot) == 4  # two settings of each side
    assert len(measured) == len(about) + 1
    assert {"steps=2", "--steps=2"} & set(measured[-1])
    assert go().records == records


def test_a_pairing_that_was_not_run_is_an_empty_row_and_not_another_setting():
    text = compare_table.markdown(records())
    assert "| pretrain | tiny | best | — | — | — | — | —, —, — | — |" in text


def test_a_peer_reads_the_task_that_it_is_given():
    words = compare.peer_task(compare.Run("trl", "bf16", "ppo", "tiny"), {"steps": 7})
    task = common.read_task(words)
    assert (task.workload, task.setting, task.steps, task.warmup) == (
        "ppo",
        "bf16",
        7,
        1,
    )
    assert (task.model.d_model, task.model.vocab_size) == (128, 4096)
    assert (task.batch, task.kl, task.optimizer.learning_rate) == (64, 0.05, 1e-4)


def test_a_process_gives_its_last_json_line_or_an_error():
    def python(code, limit=60):
        return compare.measured([sys.executable, "-c", code], limit)

    assert python("print('x'); print('{\"a\": 1}')") == {"a": 1}
    failed = python("import sys; sys.exit('no such trainer')")
    assert failed == {"error": "exit code 1: no such trainer"}
    assert "within" in python("import time; time.sleep(9)", limit=0.2)["error"]


@pytest.mark.parametrize(
    ("sides", "workload", "present"),
    [
        (compare.Sides(trl="a"), "ppo", ["rlhfjax"]),
        (compare.Sides(trl="a"), "rm", ["rlhfjax", "trl"]),
        (compare.Sides(trl_ppo="b", tunix="c"), "ppo", ["rlhfjax", "trl", "tunix"]),
    ],
)
def test_a_side_takes_part_if_its_interpreter_is_given(sides, workload, present):
    assert sides.present(workload) == present
