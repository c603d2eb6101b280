"""Workdirs whose config.json lacks options that came later: these count as their defaults."""

import json
import runpy
import shutil
from pathlib import Path

import pytest

from rlhfjax import claims, recipe, stages
from rlhfjax.chat import Chat
from rlhfjax.config import to_dict
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import make_layout
from rlhfjax.report.workdir import read_run
from rlhfjax.sweep.expand import expand
from tests import expansion, half_run, tiny
from tests.test_chat import settings

ROOT = Path(__file__).parents[1]


def part_of(values: dict, place: str) -> tuple[dict, str]:
    """Returns the part of a config that has an option (`sources.1.limit`), and its name there."""
    *path, last = place.split(".")
    part = values
    for name in path:
        part = part[int(name) if isinstance(part, list) else name]
    return part, last


def drop(values: dict, *places: str) -> None:
    """Deletes options that are there."""
    for place in places:
        part, name = part_of(values, place)
        del part[name]


def edit(file: Path, *places: str) -> None:
    """Deletes options of a JSON file."""
    values = json.loads(file.read_text())
    drop(values, *places)
    file.write_text(json.dumps(values))


# ------------------------------------------------------------------ the same config or another


SOURCE = {"spec": "text:a", "limit": 0, "columns": {"text": "body"}}
STAGE = stages.stage_config(
    "pretrain",
    sources=({"spec": "text:b"}, SOURCE),
    model={
        "vocab_size": 9,
        "d_model": 8,
        "n_layers": 1,
        "n_heads": 2,
        "d_ff": 8,
        "max_length": 8,
    },
    overrides={"dropout": 0.1},
    mesh={"rules": {"vocab": []}},
    length=8,
    batch_size=2,
    steps=1,
)


def started(workdir: Path, config: dict) -> Path:
    """A workdir in which something was computed."""
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "metrics.jsonl").write_text("")
    return workdir


ABSENT = [
    ("seed", "absent (0)", 3),
    ("init_from", "absent (None)", "there"),
    ("optim.b2", "absent (0.95)", 0.9),
    ("model.rope_theta", "absent (10000.0)", 5.0),
    ("sources.1.limit", "absent (0)", 4),
]


@pytest.mark.parametrize(("place", "before", "other"), ABSENT)
@pytest.mark.parametrize("nested", [False, True], ids=["stage", "recipe"])
def test_an_absent_option_is_its_default_and_no_other_value(
    nested, place, before, other, tmp_path
):
    config, now, changed = (to_dict(STAGE) for _ in range(3))
    drop(config, place)
    part, name = part_of(changed, place)
    part[name] = other
    shown = place.replace(".1.", "[1].")
    if nested:
        config, now, changed = (
            {"stages": ["a"], "a": one} for one in (config, now, changed)
        )
        shown = f"a.{shown}"
    workdir = started(tmp_path / "run", config)
    written = (workdir / "config.json").read_bytes()
    claims.claim(workdir, now)
    claims.claim(workdir, config)
    with pytest.raises(ConfigError) as caught:
        claims.claim(workdir, changed)
    said = f"{workdir} was started with another config ({shown}: {before} -> {other})"
    advice = ", or --from=a, which runs a and the stages after it again"
    said = f"{said}; use a new --workdir{advice if nested else ''}"
    assert str(caught.value) == said
    assert (workdir / "config.json").read_bytes() == written


def test_a_part_and_a_section_that_are_absent_are_their_defaults(tmp_path):
    config, changed = to_dict(STAGE), to_dict(STAGE)
    drop(config, "lora", "checkpoint")
    workdir = started(tmp_path / "run", config)
    claims.claim(workdir, to_dict(STAGE))
    changed["lora"]["rank"] = 2
    with pytest.raises(ConfigError, match=r"\(lora.rank: absent \(0\) -> 2\)"):
        claims.claim(workdir, changed)


def test_an_option_that_is_left_out_now_is_its_default_too(tmp_path):
    now = to_dict(STAGE)
    drop(now, "optim.b2", "seed")
    claims.claim(started(tmp_path / "a", to_dict(STAGE)), now)
    with pytest.raises(ConfigError, match=r"\(seed: 1 -> absent \(0\)\)"):
        claims.claim(started(tmp_path / "b", to_dict(STAGE) | {"seed": 1}), now)


GONE = [
    ({"gone": 3}, r"\(gone: 3 -> absent\)"),
    ({"gone": {}}, r"\(gone: {} -> absent\)"),
    ({"gone": None}, r"\(gone: None -> absent\)"),
    (
        {"eval_sources": [{"spec": "text:c", "a_gone": 3}]},
        r"eval_sources\[0\].a_gone: 3 -> absent",
    ),
]


@pytest.mark.parametrize(("more", "said"), GONE)
def test_an_option_that_there_no_longer_is_is_named(more, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        claims.claim(started(tmp_path / "run", to_dict(STAGE) | more), to_dict(STAGE))


def test_an_option_without_a_default_has_none(tmp_path):
    config = to_dict(STAGE)
    drop(config, "length", "sources.0.spec")
    said = r"\(length: absent -> 8; sources\[0\].spec: absent -> text:b\)"
    with pytest.raises(ConfigError, match=said):
        claims.claim(started(tmp_path / "run", config), to_dict(STAGE))


FREE = [
    ("overrides.dropout", r"overrides.dropout: absent -> 0.1"),
    ("sources.1.columns.text", r"sources\[1\].columns.text: absent -> body"),
]


@pytest.mark.parametrize(("place", "said"), FREE)
def test_free_form_dicts_are_compared_as_they_are(place, said, tmp_path):
    """`dropout` has a default in a model; in `overrides` an absent one is the model's own."""
    config = to_dict(STAGE)
    drop(config, place)
    with pytest.raises(ConfigError, match=said):
        claims.claim(started(tmp_path / "run", config), to_dict(STAGE))


def test_the_config_of_a_stage_that_there_no_longer_is_is_compared_as_it_is(tmp_path):
    config = {"stages": ["a"], "a": {"stage": "bogus", "x": 1}}
    workdir = started(tmp_path / "run", config)
    claims.compare(workdir, config)
    with pytest.raises(ConfigError, match=r"\(a.x: 1 -> 2\)"):
        claims.compare(workdir, {"stages": ["a"], "a": {"stage": "bogus", "x": 2}})


@pytest.mark.parametrize("stage", stages.names())
def test_every_option_with_a_default_is_filled(stage):
    """Against the golden form; there `x?.y` and `x[].y` are options of parts that are not there."""
    options = expansion.default_options(stage)
    there = {
        k: v for k, v in options.items() if v != "required" and not {"?", "["} & set(k)
    }
    given = {"stage": stage} | (
        {"judge": {}} if "judge.model" in options else {}
    )  # it is required
    assert dict(expansion.flatten(claims.with_defaults(given))) == there


# ------------------------------------------------------------------ a run, and what reads its
# config


def test_a_half_run_recipe_that_lacks_options_goes_on(tmp_path, monkeypatch):
    """Here an option is also absent from the elements of `sources`, as the config file has them."""
    half_run.unpack(tmp_path)
    monkeypatch.chdir(tmp_path)
    lacking = (
        "cross_document",
        "optim.moments",
        "checkpoint.minutes",
        "mesh.strategy",
        "lora",
    )
    edit(Path("pretrain/config.json"), *(f"pretrain.{place}" for place in lacking))
    edit(Path("pretrain/01_pretrain/config.json"), *lacking)
    files = [Path("pretrain/config.json"), Path("pretrain/01_pretrain/config.json")]
    written = [file.read_bytes() for file in files]
    config = half_run.variants()["pretrain"]
    with config.unlocked():
        config.pretrain.optim.moments = "bfloat16"
    with pytest.raises(
        ConfigError, match=r"optim.moments: absent \(float32\) -> bfloat16"
    ):
        recipe.run(config, Path("pretrain"))
    metrics = recipe.run(half_run.variants()["pretrain"], Path("pretrain"))
    expected = json.loads(half_run.ENDS.read_text())["pretrain"]["metrics"]
    assert metrics["pretrain/val_loss"] == pytest.approx(
        expected["pretrain/val_loss"], rel=1e-3
    )
    assert [file.read_bytes() for file in files] == written


LACKING = {
    "tokenizer": ("model_type", "mesh.replica"),
    "pretrain": ("seed", "mesh.replica", "optim.b2", "lora", "checkpoint.keep_every"),
    "sft": ("seed", "model", "overrides", "optim.schedule"),
    "collect": ("seed", "mesh", "others", "truncate.after"),
    "reward": ("seed", "loss", "eval_batches"),
    "ppo": (
        "seed",
        "decode_batch",
        "gamma",
        "kl.place",
        "prompts.per_conversation",
        "human",
    ),
    "evaluate": ("seed", "decode_batch"),
}


@pytest.fixture(scope="module")
def older(finished, tmp_path_factory) -> Path:
    """The workdir of the tiny recipe as a version without some of today's options left it."""
    workdir = tmp_path_factory.mktemp("older") / "run"
    shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns("tb"))
    config = json.loads((workdir / "config.json").read_text())
    for number, name in enumerate(config["stages"]):
        drop(config[name], *LACKING[name])
        edit(workdir / f"{number:02d}_{name}" / "config.json", *LACKING[name])
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


def test_a_finished_recipe_only_answers_and_keeps_its_configs(
    older, finished, conversations
):
    config = to_dict(tiny.get_config(f"data={conversations}"))
    files = [older / "config.json", *sorted(older.glob("*/config.json"))]
    written = [file.read_bytes() for file in files]
    assert recipe.run(config, older) == recipe.run(config, finished)
    assert len(files) == 1 + len(tiny.STAGES)
    assert [file.read_bytes() for file in files] == written
    config["ppo"]["gamma"] = 0.5
    with pytest.raises(ConfigError, match=r"\(ppo.gamma: absent \(1.0\) -> 0.5\)"):
        recipe.run(config, older)


def test_eval_takes_absent_options_at_their_defaults(older, finished):
    ours, theirs = (
        recipe.evaluate(None, run / "01_pretrain") for run in (older, finished)
    )
    assert ours == theirs


def test_the_report_is_of_the_same_run(older, finished):
    ours, theirs = (read_run(run).stages for run in (older, finished))
    assert len(ours) == len(tiny.STAGES)
    for name in ("name", "kind", "total", "last"):
        assert [getattr(x, name) for x in ours] == [getattr(x, name) for x in theirs]


def test_every_stage_on_a_finished_quickstart_takes_absent_options_at_their_defaults(
    older, finished, tmp_path
):
    file = ROOT / "experiments" / "quickstart" / "stages.py"
    get_config = runpy.run_path(str(file))["get_config"]
    ours, theirs = (
        json.dumps(to_dict(get_config(f"run={run}"))) for run in (older, finished)
    )
    assert ours.replace(str(older), str(finished)) == theirs
    large = shutil.ignore_patterns("checkpoints", "model")
    shutil.copytree(older, tmp_path / "run", ignore=large)
    edit(tmp_path / "run" / "config.json", "collect.temperature")
    assert get_config(f"stage=group,run={tmp_path / 'run'}").temperature == 1.0


def test_a_model_is_read_and_talks(older, finished):
    edit(
        older / "02_sft/model/config.json",
        "transformer.remat",
        "transformer.rope_theta",
    )
    ours, theirs = (
        store.load(run / "02_sft", make_layout()) for run in (older, finished)
    )
    assert ours.model == theirs.model
    one, other = (
        Chat(saved, settings(saved, max_new_tokens=2), seed=0)
        for saved in (ours, theirs)
    )
    assert list(one.respond("hello")) == list(other.respond("hello"))


SWEPT = """
from rlhfjax.stages import stage_config

def get_config():
    return stage_config("tokenizer", sources=({"spec": "text:a"},), vocab_size=270)

def sweep(add):
    add({"vocab_size": 280})
"""


def test_a_sweep_goes_on_with_its_runs(tmp_path):
    (tmp_path / "swept.py").write_text(SWEPT)
    file = str(tmp_path / "swept.py")
    (run,) = expand(file, tmp_path / "runs")
    config = json.loads(json.dumps(run.config))
    drop(config, "model_type")
    run.workdir.parent.mkdir()
    started(run.workdir, config)
    assert not expand(file, tmp_path / "runs")[0].finished
    (run.workdir / "done.json").write_text('{"metrics": {}}')
    assert expand(file, tmp_path / "runs")[0].finished
    with pytest.raises(ConfigError, match=r"\(model_type: absent \(bpe\) -> unigram\)"):
        expand(file, tmp_path / "runs", {"model_type": "unigram"})
