"""A small study file, and runs of it that were never computed."""

import json
from collections.abc import Mapping
from pathlib import Path

from rlhfjax.config import write_json
from rlhfjax.lab import Comparison, Outcome, Study
from rlhfjax.sweep.expand import Run
from tests.report.made_up_run import make_stage

FILE = """
from rlhfjax.config import parse_arg
from rlhfjax.lab import *
from rlhfjax.stages import stage_config
from rlhfjax.sweep import *

STUDY = Study(
    claim="A larger rate is better",
    paper="Nobody 2020",
    figure="figure 1",
    conditions={{
        "small": {{"optim.learning_rate": 1e-4}},
        "large": {{"optim.learning_rate": 1e-3}},
    }},
    seeds=3,
    values={{"loss": "val_loss"}},
    primary=(
        Comparison(
            name="large beats small",
            value="loss",
            condition="large",
            baseline="small",
            expected="less",
        ),
    ),
    curves=("val_loss",),
    drawing=Figure(x="step", y="val_loss", title="loss"),
)

def get_config(arg=None):
    arg = parse_arg(arg, seed=0)
    source = {{"spec": "jsonl:nowhere.jsonl", "kind": "messages", "split": "all"}}
    return stage_config(
        "sft", init_from="nowhere", sources=(source,), eval_sources=(source,), length=32,
        batch_size=8, steps={steps}, seed=arg.seed, optim={{"learning_rate": 1e-3}},
    )

def sweep(add):
    for one in {sweep}: add(one)
"""
SWEEP = "product(grid('optim.learning_rate', 1e-4, 1e-3), seeds(3))"


def write(folder: Path, sweep: str = SWEEP, steps: int = 4) -> str:
    """Writes the study's file; returns its path."""
    folder.mkdir(exist_ok=True)
    (folder / "study.py").write_text(FILE.format(sweep=sweep, steps=steps))
    return str(folder / "study.py")


def finish(run: Run, loss: float, date: str = "2020-01-01") -> None:
    """Writes the files of a finished run whose held-out loss falls to `loss`."""
    curve = [(step, {"val_loss": loss + 4 - step}) for step in (2, 4)]
    make_stage(run.workdir, "sft", 4, curve, seconds=2.5)
    write_json(run.workdir / "config.json", run.config)
    start = {
        "date": date,
        "command": "rlhfjax train",
        "commit": "c0ffee",
        "clean": True,
        "hardware": {"devices": "1 x cpu", "cores": 2, "cpu": "A CPU (avx2)"},
        "versions": {"jax": "0.10"},
    }
    (run.workdir / "provenance.jsonl").write_text(json.dumps(start) + "\n")


def finish_all(runs: list[Run], date: str = "2020-01-01") -> None:
    """The larger rate has the lower loss, by 0.9, 1.0 and 1.1."""
    for run in runs:
        seed = run.overrides["arg.seed"]
        is_large = run.overrides["optim.learning_rate"] == 1e-3
        loss = 2.0 + 0.1 * seed - is_large * (0.9 + 0.1 * seed)
        finish(run, loss, date)


def study(*primary: Comparison, **changes) -> Study:
    """A study of the conditions a, b and c, with the value x."""
    card = {
        "claim": "a is above b",
        "paper": "Nobody 2020",
        "figure": "figure 1",
        "conditions": {name: {"option": name} for name in "abc"},
        "seeds": 5,
        "values": {"x": "x", "y": "y"},
        "primary": primary or (greater(),),
    }
    return Study(**card | changes)


def compared(expected: str, **changes) -> Comparison:
    card = {
        "name": expected,
        "value": "x",
        "condition": "a",
        "baseline": "b",
        "expected": expected,
    }
    return Comparison(**card | changes)


def greater(**changes) -> Comparison:
    return compared("greater", **changes)


def outcomes(values: Mapping[str, list[float]], name: str = "x") -> list[Outcome]:
    """One outcome per condition and value; the i-th value has the seed i."""
    return [
        Outcome(condition=condition, seeds={"seed": i}, metrics={name: value})
        for condition, row in values.items()
        for i, value in enumerate(row)
    ]
