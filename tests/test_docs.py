"""docs/algorithms.md against the code.

What its tables name exists, each function is entered when the stage beside it is traced, the
defaults are in force, and no loss is missing.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import pkgutil
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhfjax import algos, recipe
from rlhfjax.config import to_dict
from rlhfjax.stages import stage_config
from rlhfjax.types import Loss
from tests import sources, traced

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhfjax"
PAGE = ROOT / "docs" / "algorithms.md"
COLUMNS = (
    "algorithm",
    "equation",
    "paper",
    "function",
    "config",
    "traced in",
    "test",
    "defaults and their source",
)


def rows() -> list[dict[str, str]]:
    tables = [
        line.strip("| ").split(" | ")
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ")
    ]
    assert all(len(cells) == len(COLUMNS) for cells in tables)
    return [
        dict(zip(COLUMNS, cells, strict=True))
        for cells in tables
        if tuple(cells) != COLUMNS
    ]


ROWS = rows()


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_cell_says_something():
    for row in ROWS:
        assert all(row.values()), row
        assert all(named(row[column]) for column in ("function", "config", "test")), row


def test_every_function_exists():
    for name in (name for row in ROWS for name in named(row["function"])):
        assert callable(find(name)), name


def find(name: str):
    """rlhfjax.MODULE.NAME of its dotted name without the package's."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"rlhfjax.{module}"), attribute)


# ------------------------------------------------------------------ functions are entered


NOT_TRACED = "not traced: "


def traced_in() -> dict[str, list[str]]:
    """Returns the functions that each stage enters, by the stage: `ppo kl.estimator=k2`.

    A row has one stage for all of its functions, or one beside each of them.
    """
    functions: dict[str, list[str]] = {}
    for row in ROWS:
        names = named(row["function"])
        cells = row["traced in"].split("<br>")
        cells = cells if len(cells) > 1 else cells * len(names)
        for name, cell in zip(names, cells, strict=True):
            if not cell.startswith(NOT_TRACED):
                (stage,) = named(cell)
                functions.setdefault(stage, []).append(name)
    return functions


TRACED_IN = traced_in()


# One stage per kind in every run; the rest, which takes most of a minute, is nightly.
QUICK = (
    "ppo",
    "group estimator=dr_grpo",
    "direct loss.name=kto",
    "reward",
    "tamer",
    "sft",
    "pretrain",
)


def stage_params() -> list[Any]:
    marks = {
        stage: () if stage in QUICK else (pytest.mark.nightly,) for stage in TRACED_IN
    }
    return [pytest.param(stage, marks=mark) for stage, mark in marks.items()]


@pytest.mark.parametrize("stage", stage_params())
def test_functions_are_entered_when_their_stage_is_traced(stage):
    """The stage's own step runs on shapes, and enters each function that stands beside it."""
    codes = traced.entered(stage)
    names = TRACED_IN[stage]
    # Without the type checks that wrap every function in tests.
    own_code = {name: inspect.unwrap(find(name)).__code__ for name in names}
    assert [name for name in names if own_code[name] not in codes] == []


def test_every_loss_is_traced():
    """Only functions that return no loss may be "not traced"."""
    names = {name for functions in TRACED_IN.values() for name in functions}
    assert losses() - COMBINE <= names


# ------------------------------------------------------------------ tests, configs, defaults


def test_every_test_exists():
    for name in (name for row in ROWS for name in named(row["test"])):
        file, _, function = name.partition("::")
        assert function in functions_in(file), name


@functools.cache
def functions_in(file: str) -> set[str]:
    return {
        node.name
        for node in sources.tree(ROOT / file).body
        if isinstance(node, ast.FunctionDef)
    }


def test_every_config_is_of_what_it_is_named_for(finished):
    """Stages, estimator, loss and overrides of the command are in force in what the stages are
    given.
    """
    for command in {command for row in ROWS for command in named(row["config"])}:
        file, *overrides = command.split()
        path, _, arg = file.partition(":")
        asked = dict(one.split("=") for one in filter(None, arg.split(",")))
        if path.endswith("quickstart/stages.py"):
            arg += f",run={finished}"
        config = runpy.run_path(str(ROOT / path))["get_config"](arg)
        options = dict(one.removeprefix("--config.").split("=") for one in overrides)
        config.update_from_flattened_dict(
            {name: traced.literal(value) for name, value in options.items()}
        )
        config = to_dict(config)
        stages = (
            {name: config[name] for name in config["stages"]}
            if "stages" in config
            else {"": config}
        )
        typed = {
            name: dataclasses.asdict(recipe.check(one, name or one["stage"]))
            for name, one in stages.items()
        }
        in_force = {
            f"{name}.{key}".removeprefix("."): value
            for name, one in typed.items()
            for key, value in flat(one)
        }
        assert {name: in_force[name] for name in options} == {
            name: traced.literal(value) for name, value in options.items()
        }
        named_for = {
            asked[name] for name in ("stage", "estimator", "loss") if name in asked
        }
        assert named_for <= set(
            filter(lambda value: isinstance(value, str), in_force.values())
        ), command


def flat(tree: dict, at: str = "") -> Iterator[tuple[str, Any]]:
    """(`a.b.c`, value) of a nested dict."""
    for name, value in tree.items():
        yield from (
            flat(value, f"{at}{name}.")
            if isinstance(value, dict)
            else [(f"{at}{name}", value)]
        )


def test_every_default_is_in_force():
    """`stage.option=value` is what the stage's config has when nothing is said."""
    said = [
        re.findall(r"`([\w.]+)=([^`]+)`", row["defaults and their source"])
        for row in ROWS
    ]
    assert sum(map(len, said)) > 40
    for name, value in itertools.chain(*said):
        stage, _, option = name.partition(".")
        now = to_dict(stage_config(stage))
        for part in option.split("."):
            now = now[part]
        assert (tuple(now) if isinstance(now, list) else now) == traced.literal(
            value
        ), name


def test_every_function_of_algos_is_reached_from_a_stage():
    """Named by a module outside of algos/, or by a function of algos/ that is reached itself."""
    functions = dict(functions_of_algos())
    package = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "algos"]
    seen = {name for path in package for name in names_in(sources.tree(path))}
    reached: set[str] = set()
    while (
        new := {name for name in functions if name.rpartition(".")[2] in seen} - reached
    ):
        reached |= new
        seen |= {name for function in new for name in names_in(functions[function])}
    public = {name for name in functions if not name.rpartition(".")[2].startswith("_")}
    assert public - reached == set()
    on_page = {
        name
        for row in ROWS
        for name in named(row["function"])
        if name.startswith("algos.")
    }
    assert len(on_page) > 50 and on_page <= reached


def functions_of_algos() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in (PACKAGE / "algos").glob("*.py"):
        for node in sources.tree(path).body:
            if isinstance(node, ast.FunctionDef):
                yield f"algos.{path.stem}.{node.name}", node


def names_in(tree: ast.AST) -> set[str]:
    """Names and attributes of code, imports, and texts: `getattr(kl, estimator)` has one."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def test_no_loss_is_missing():
    """Every function of algos/ that returns a loss stands in some row; others only combine them."""
    on_page = {name for row in ROWS for name in named(row["function"])}
    assert len(losses()) > 25
    assert losses() - COMBINE <= on_page


COMBINE = {
    "algos.combine.add_losses",
    "algos.direct.pairwise_loss",
    "algos.policy.surrogate_loss",
}


def losses() -> set[str]:
    """Returns the public functions of algos/ whose annotated result is a Loss."""
    found = set()
    for module in pkgutil.iter_modules(algos.__path__):
        loaded = importlib.import_module(f"rlhfjax.algos.{module.name}")
        for name, value in vars(loaded).items():
            is_own = getattr(value, "__module__", "") == loaded.__name__
            annotations = getattr(value, "__annotations__", {})
            if (
                is_own
                and not name.startswith("_")
                and annotations.get("return") is Loss
            ):
                found.add(f"algos.{module.name}.{name}")
    return found
