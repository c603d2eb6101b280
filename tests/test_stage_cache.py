"""The cache of finished stages: what is taken from it, and what is not."""

import datetime
import logging

import pytest

from rlhfjax import recipe, stage_cache, template_date, trackers
from rlhfjax.stage_cache import Cache
from tests.test_recipe import jobs, two


def contents(folder):
    return {
        file.relative_to(folder): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    stages: list[str] = []
    jobs(monkeypatch, stages)
    monkeypatch.setattr(recipe.references, "validate", lambda *_: None)
    return stages


def test_a_stage_that_was_computed_is_copied_bit_for_bit(tmp_path, ran, caplog):
    cache = tmp_path / "cache"
    first = recipe.run(two(), tmp_path / "x", cache=cache)
    with caplog.at_level(logging.INFO, logger="rlhfjax"):
        again = recipe.run(two(vocab_size=301), tmp_path / "y", cache=cache)
    assert ran == ["00_a", "01_b", "01_b"]
    assert first["00_a/x"] == again["00_a/x"] == 300.0
    assert contents(tmp_path / "x/00_a") == contents(tmp_path / "y/00_a")
    assert any("[1/2] a: taken from the cache" in text for text in caplog.messages)
    recipe.run(two(vocab_size=301), tmp_path / "z", cache=cache)
    assert ran == ["00_a", "01_b", "01_b"]


def test_without_a_cache_everything_is_computed(tmp_path, ran):
    recipe.run(two(), tmp_path / "x", cache=tmp_path / "cache")
    recipe.run(two(), tmp_path / "y")
    assert ran == ["00_a", "01_b"] * 2


def test_a_result_that_was_not_copied_whole_is_computed_again(tmp_path, ran):
    cache = tmp_path / "cache"
    recipe.run(two(), tmp_path / "x", cache=cache)
    for file in cache.glob("*/key.json"):
        file.unlink()  # it is written last
    recipe.run(two(), tmp_path / "y", cache=cache)
    assert ran == ["00_a", "01_b"] * 2


def sources(tmp_path, **changes) -> dict:
    """A recipe whose stage b reads a file and what a has made."""
    data = tmp_path / "data.txt"
    specs = [{"spec": f"text:{data}"}, {"spec": "text:stage:a/*.txt"}]
    return two(sources=specs) | changes


def test_inputs_count_by_their_content(tmp_path, ran):
    cache = tmp_path / "cache"
    (tmp_path / "data.txt").write_text("one")
    recipe.run(sources(tmp_path), tmp_path / "x", cache=cache)
    (tmp_path / "data.txt").write_text("one")
    recipe.run(sources(tmp_path), tmp_path / "y", cache=cache)
    assert ran == ["00_a", "01_b"]
    (tmp_path / "data.txt").write_text("two")
    recipe.run(sources(tmp_path), tmp_path / "z", cache=cache)
    assert ran == ["00_a", "01_b", "01_b"]


@pytest.mark.parametrize(
    "spec", ["jsonl:{}/{{split}}.jsonl", "{}/*.csv", "csv:{}/x.csv"]
)
def test_files_of_every_format_count_by_their_content(tmp_path, spec):
    spec = spec.format(tmp_path)
    keys = []
    for content in ("a", "b", "a"):
        for name in ("train.jsonl", "x.csv"):
            (tmp_path / name).write_text(content)
        keys.append(stage_cache._identified({"spec": spec}, {}))
    assert keys[0] != keys[1] and keys[0] == keys[2]
    with pytest.raises(stage_cache.NoKey, match="what the hub has may change"):
        stage_cache._identified({"spec": "hf-dataset:a/b"}, {})


def test_the_cache_keeps_no_wandb_run(tmp_path):
    (tmp_path / "w" / "wandb").mkdir(parents=True)
    for name in (trackers.ID, "wandb/run.log", "metrics.jsonl"):
        (tmp_path / "w" / name).write_text("")
    Cache(tmp_path / "cache").store({}, tmp_path / "w")
    kept = tmp_path / "cache" / stage_cache.digest({}) / stage_cache.STAGE_FOLDER
    assert [file.name for file in kept.iterdir()] == ["metrics.jsonl"]


def test_a_changed_stage_changes_the_keys_of_those_that_read_from_it(tmp_path, ran):
    cache = tmp_path / "cache"
    (tmp_path / "data.txt").write_text("one")
    recipe.run(sources(tmp_path), tmp_path / "x", cache=cache)
    changed = sources(tmp_path, a={"stage": "tokenizer", "vocab_size": 301})
    recipe.run(changed, tmp_path / "y", cache=cache)
    assert ran == ["00_a", "01_b"] * 2


@pytest.mark.parametrize("part", ["code_digest", "versions", "machine"])
def test_code_versions_and_hardware_are_part_of_the_key(
    tmp_path, ran, monkeypatch, part
):
    cache = tmp_path / "cache"
    recipe.run(two(), tmp_path / "x", cache=cache)
    monkeypatch.setattr(stage_cache, part, lambda *_: {"other": 1})
    recipe.run(two(), tmp_path / "y", cache=cache)
    assert ran == ["00_a", "01_b"] * 2


def test_jax_s_flags_are_part_of_the_machine(monkeypatch):
    before = stage_cache.machine()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/tmp/x")
    assert stage_cache.machine() == before
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert stage_cache.machine() != before


def test_the_cores_that_the_process_may_use_are_part_of_the_machine(monkeypatch):
    """XLA divides loops by them, so a run under `taskset` rounds differently."""
    before = stage_cache.machine()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(1000)))
    assert stage_cache.machine() == before | {"cores": 1000}


def test_the_code_of_other_stages_is_not_part_of_the_key():
    modules = stage_cache.imported(*stage_cache.ROOTS, "rlhfjax.stages.pretrain")
    assert "rlhfjax.models.transformer" in modules and "rlhfjax.optim" in modules
    assert "rlhfjax.data.loader" in modules and "rlhfjax.algos.masked" in modules
    for other in ("stages.ppo", "rl.rollout", "algos.policy", "report.page"):
        assert f"rlhfjax.{other}" not in modules
    assert "rlhfjax.algos.policy" in stage_cache.imported("rlhfjax.stages.ppo")


@pytest.mark.parametrize(
    "config",
    [
        {"stage": "collect", "labeler": "rule:mine:f"},
        {"stage": "collect", "labeler": {"kind": "rule", "function": "mine:f"}},
        {"stage": "mine:Config"},
    ],
)
def test_code_from_outside_has_no_key_nor_has_what_reads_from_it(tmp_path, config):
    cache = Cache(tmp_path)
    assert cache.key(config, tmp_path / "00_a") is None
    config = {"stage": "tokenizer", "sources": [{"spec": f"text:{tmp_path}/00_a/x"}]}
    assert cache.key(config, tmp_path / "01_b") is None
    config = {"stage": "tokenizer", "vocab_size": 300}
    assert cache.key(config, tmp_path / "02_c") is not None


def test_a_stage_whose_template_writes_the_date_is_of_its_day(tmp_path, monkeypatch):
    """On another day it is computed again, and so is the stage that reads from it."""
    ran = []

    def dated(config, workdir, layout):
        ran.append(workdir.name)
        if workdir.name == "00_a":
            template_date.written(template_date.now(), "%d %b %Y")
        return {"x": 1.0}

    jobs(monkeypatch, [])
    monkeypatch.setattr(recipe.references, "validate", lambda *_: None)
    monkeypatch.setattr(recipe.stages.find("tokenizer"), "run", dated)
    values = sources(tmp_path)
    (tmp_path / "data.txt").write_text("text")

    def run(day, name):
        ran.clear()
        with template_date.pinned(datetime.datetime(2026, 11, day)):
            recipe.run(values, tmp_path / name, cache=tmp_path / "cache")
        return ran

    assert run(1, "x") == ["00_a", "01_b"]
    assert run(1, "y") == []
    assert run(2, "z") == ["00_a", "01_b"]
    assert run(2, "w") == []
