"""Estimates by hand, and what is kept of a stage."""

import json

import pytest

from rlhfjax import pace, progress, recipe
from rlhfjax.pace import Work
from rlhfjax.stages import stage_config
from tests.test_recipe import jobs, two

SFT = {
    "kind": "sft",
    "device": "here",
    "parameters": 1000,
    "flops": 6e6,
    "decoded": 0.0,
    "programs": 1,
    "trains": True,
    "steps": 40,
    "seconds": 3.0,
    "fixed": 10.0,
}
# Its passes take 3e6 / 2e6 = 1.5 s at SFT's FLOP/s, its 500 tokens the other 5 s.
COLLECT = SFT | {
    "kind": "collect",
    "flops": 3e6,
    "decoded": 500.0,
    "programs": 2,
    "trains": False,
    "steps": 6,
    "seconds": 6.5,
    "fixed": 4.0,
}


def test_a_stage_of_the_same_kind_scales_by_its_flops():
    work = Work(parameters=1500, flops=12e6, decoded=0.0, programs=1, trains=True)
    assert pace.seconds("sft", work, [SFT]) == 2 * 3.0 + 10.0


def test_another_kind_takes_its_flops_at_the_measured_rate():
    work = Work(parameters=9000, flops=4e6, decoded=0.0, programs=3, trains=True)
    # 2 s of work; four programs' worth of fixed time instead of two.
    assert pace.seconds("reward", work, [SFT]) == 2.0 + 10.0 * 4 / 2


def test_decoded_tokens_take_longer_than_their_flops():
    work = Work(parameters=9000, flops=2e6, decoded=1000.0, programs=1, trains=True)
    assert pace.seconds("ppo", work, [SFT, COLLECT]) == pytest.approx(1 + 10 + 10)
    assert pace.seconds("ppo", work, [SFT]) is None


def test_a_job_takes_the_fixed_seconds_of_a_job():
    work = Work(parameters=9000, flops=0.0, decoded=100.0, programs=1, trains=False)
    assert pace.seconds("evaluate", work, [SFT, COLLECT]) == 1.0 + 4.0 * 2 / 3


def test_the_closest_model_counts_and_of_several_the_last():
    big = SFT | {"parameters": 10**6, "seconds": 6e6 / 1e9}
    work = Work(parameters=400_000, flops=6e6, decoded=0.0, programs=1, trains=True)
    assert pace.seconds("reward", work, [big, SFT]) == pytest.approx(0.006 + 10)
    twice = [SFT, SFT | {"seconds": 4.0}]
    small = Work(parameters=1000, flops=6e6, decoded=0.0, programs=1, trains=True)
    assert pace.seconds("sft", small, twice) == 14.0


def test_a_stage_without_a_model_takes_what_it_took_before():
    nothing = pace._NOTHING
    before = {"kind": "tokenizer", "device": "here", **nothing._asdict()}
    before |= {"seconds": 0.0, "fixed": 20.0}
    assert pace.seconds("tokenizer", nothing, [before, SFT]) == 20.0
    assert pace.seconds("tasks", nothing, [before, SFT]) is None


def test_the_work_of_a_recipes_stages(tmp_path):
    """Counted by hand from PaLM's 6 N + 12 L H Q T per trained token."""
    model = {"vocab_size": 64, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 16}
    model["max_length"] = 16
    sampled = {"prompt_length": 6, "max_new_tokens": 4, "batch_size": 5}
    limit = {"source": {"spec": "jsonl:a", "kind": "messages"}, "limit": 10}
    values = {
        "pretrain": stage_config(
            "pretrain", model=model, length=16, batch_size=2, steps=3
        ),
        "collect": stage_config(
            "collect",
            init_from="stage:pretrain",
            labeler="gold:sentiment",
            samples_per_prompt=3,
            prompts=limit,
            eval_prompts=limit | {"limit": 1},
            **sampled,
        ),
        "reward": stage_config(
            "reward",
            init_from="stage:pretrain",
            preferences=("stage:collect/preferences",),
            length=10,
            batch_size=2,
            steps=1,
        ),
    }
    configs = recipe.validate({"stages": tuple(values), **values})
    folders = {name: f"0{i}_{name}" for i, name in enumerate(values)}
    works, earlier = {}, {}
    for name, config in configs.items():
        nets = pace.announce.models(config, pace.Origins(earlier))
        completions = pace._completions(config, earlier)
        works[name] = pace.work(config, nets, completions)
        earlier[folders[name]] = config
    n = works["pretrain"].parameters
    per_token = 6 * n + 12 * 1 * 2 * 4 * 16
    assert works["pretrain"] == Work(n, 3 * 2 * 16 * per_token, 0.0, 1, True)
    # 10 prompts in two batches of five and one in a third, three responses of 4 tokens each.
    assert works["collect"] == Work(n, 0.0, 3 * 5 * 3 * 4, 1, False)
    trained = works["reward"]
    per_token = 6 * trained.parameters + 12 * 1 * 2 * 4 * 10
    assert trained.flops == 1 * 2 * 3 * 10 * per_token


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file of this test's rates."""
    monkeypatch.setenv("RLHFJAX_RATES", str(tmp_path / "cache" / "rates.json"))
    return tmp_path / "cache" / "rates.json"


def test_what_a_stage_took_is_kept_and_announced(tmp_path, file, monkeypatch, caplog):
    jobs(monkeypatch, [])
    caplog.set_level("INFO", "rlhfjax")
    recipe.run(two(), tmp_path / "first")
    assert [row["device"] for row in json.loads(file.read_text())] == [
        pace.device_name()
    ]
    caplog.clear()
    recipe.run(two(), tmp_path / "second")
    assert "time left: about 5s (a 5s, b 5s)" in caplog.text


@pytest.mark.parametrize("text", ["", "[{}]", "[1", '{"a": 1}'])
def test_a_damaged_file_of_rates_is_none(file, text):
    file.parent.mkdir()
    file.write_text(text)
    assert pace.kept() == []


def test_a_folder_that_cannot_be_written_loses_the_rates_alone(
    tmp_path, file, monkeypatch
):
    file.parent.write_text("no folder")
    jobs(monkeypatch, [])
    recipe.run(two(), tmp_path / "w")
    assert not file.exists()


def test_the_file_is_in_the_home_or_nowhere(monkeypatch):
    monkeypatch.delenv("RLHFJAX_RATES")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(pace._file()) == "/home/me/.cache/rlhfjax/rates.json"
    monkeypatch.setenv("RLHFJAX_RATES", "off")
    assert pace._file() is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1, "5s"),
        (42, "40s"),
        (58, "1m"),
        (91, "1m30s"),
        (119, "2m"),
        (500, "8m"),
        (3590, "1h00m"),
        (3600, "1h00m"),
        (2 * 3600 + 500, "2h10m"),
    ],
)
def test_an_estimate_is_rounded(seconds, text):
    assert progress.about(seconds) == text


@pytest.mark.parametrize(
    "changes, tells",
    [
        ({}, True),
        ({"seconds": 2.9}, False),
        ({"steps": 2, "seconds": 60.0}, False),  # the first steps were slow
        ({"steps": 2, "seconds": 60.0, "decoded": 100.0}, True),
        # A smoke run's six seconds are not all decoding; its rate made a recipe take hours.
        ({"steps": 5, "seconds": 6.3, "decoded": 100.0, "trains": False}, False),
        ({"steps": 0, "seconds": 0.0, "flops": 0.0, "decoded": 0.0}, True),
    ],
)
def test_a_stage_that_was_too_short_tells_no_rate(changes, tells):
    assert pace._tells(SFT | changes) == tells
