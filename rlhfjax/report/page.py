"""Writes `report.html`: one self-contained page about a run."""

import dataclasses
import math
import os
import re
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from rlhfjax import json_text, paths
from rlhfjax.metrics import duration
from rlhfjax.paths import Path
from rlhfjax.report import figures, tables
from rlhfjax.report.workdir import Curve, Run, Stage, read_run

FEW, MANY = 8, 40  # samples in sight, and behind a click
REPORT = "report.html"


@dataclasses.dataclass(frozen=True)
class Panel:
    """One small figure of a stage: a metric, its last values, and the SVG."""

    name: str
    train: str
    val: str
    svg: Markup


def write_report(workdir: str | os.PathLike) -> Path:
    """Writes `workdir/report.html` from what the run has left so far, and returns its path.

    Raises:
      ConfigError: the workdir does not exist or holds no run.
      DataError: a file in it is damaged.
    """
    workdir = paths.path(workdir)
    return paths.write(workdir / REPORT, render(read_run(workdir)))


def environment() -> jinja2.Environment:
    """What renders the templates of this folder."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("rlhfjax.report", "."),
        autoescape=True,  # generated text may hold anything
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["turns"] = turns
    made.filters["number"] = tables.number
    made.filters["json"] = _json
    return made


def _json(value: Any) -> str:
    """JSON for people; null for a number that is not finite."""
    return json_text.encode(
        json_text.null_nonfinite(value), REPORT, indent=2, default=str
    )


def render(run: Run) -> str:
    """The page as HTML; every text of the run is escaped."""
    headlines = tables.headlines(run)
    seconds = sum(stage.seconds or 0 for stage in run.stages)
    return (
        environment()
        .get_template("page.html")
        .render(
            run=run,
            finished=all(stage.status == "done" for stage in run.stages),
            total_time=duration(seconds) if seconds else "",
            headlines=headlines,
            cards=[row for row in headlines if row.name in tables.CARDS and row.policy],
            rows=[tables.stage_row(stage) for stage in run.stages],
            times=[tables.goodput_row(stage) for stage in run.stages if stage.goodput],
            panels={stage.name: panels(stage) for stage in run.stages if stage.curves},
            frontiers=frontiers(run),
            policies=[
                (*figures.mark(i), stage.name) for i, stage in enumerate(policies(run))
            ],
            pools=[stage.name for stage in pools(run)],
            calibrations=[
                (s.name, s.calibration, Markup(figures.reliability(s.calibration)))
                for s in calibrated(run)
            ],
            histograms=histograms(run),
            comparisons=[
                (stage, stage.samples[:FEW], stage.samples[FEW:MANY])
                for stage in run.stages
                if compares(stage)
            ],
            examples=[
                (s, s.samples[:FEW])
                for s in run.stages
                if s.samples and not compares(s)
            ],
        )
    )


def turns(prompt: str) -> list[tuple[str, str]]:
    """A rendered conversation as (role, text) pairs; what stands before the first marker has no role."""
    first, *rest = re.split(r"<\|(\w+)\|>", prompt)
    pairs = [("", first), *zip(rest[::2], rest[1::2], strict=True)]
    return [(role, text.strip()) for role, text in pairs if text.strip()]


def panels(stage: Stage) -> list[Panel]:
    """One panel a metric, `NAME` and `val_NAME` on one axis; the telling ones first, then by name.

    A metric that was seen only once is no curve, and only in the tables.
    """
    curves = {
        name: curve for name, curve in stage.curves.items() if len(set(curve[0])) > 1
    }
    names = dict.fromkeys(
        [*(n for n in tables.TELLING if n in curves), *sorted(curves)]
    )
    bases = list(dict.fromkeys(name.removeprefix("val_") for name in names))
    return [_panel(base, curves) for base in bases]


def _panel(base: str, curves: dict) -> Panel:
    train, val = curves.get(base), curves.get(f"val_{base}")
    last = [
        "" if curve is None else tables.number(curve[1][-1]) for curve in (train, val)
    ]
    return Panel(base, *last, Markup(figures.curves(train, val)))


def frontiers(run: Run) -> list[Markup]:
    """Returns the reward-KL figures, proxy and gold, of what there is: validations of policies,
    best-of-n and the last comparison."""
    out = []
    for key in ("proxy", "gold"):
        paths = [_path(stage, key) for stage in policies(run)]
        best = [_path(stage, key, "") for stage in pools(run)]
        end = _end(run, key)
        if any(paths) or any(best) or end:
            out.append(Markup(figures.frontier(key, paths, end, best)))
    return out


def policies(run: Run) -> list[Stage]:
    """The stages that trained a policy on a reward: those whose validations have its KL and its
    proxy or gold reward."""
    return [
        stage for stage in run.stages if _path(stage, "proxy") or _path(stage, "gold")
    ]


def pools(run: Run) -> list[Stage]:
    """The stages that picked the best of n samples: those whose metrics have the KL in the pool."""
    return [stage for stage in run.stages if "kl_pool" in stage.curves]


def _path(stage: Stage, key: str, prefix: str = "val_") -> dict[str, list[float]]:
    """The lines of metrics that have both KL and reward, finite, as columns, in order."""
    names = (f"{prefix}kl", f"{prefix}{key}")
    kl, reward = (
        dict(zip(*stage.curves.get(name, ([], [])), strict=True)) for name in names
    )
    measured = {step: (kl[step], reward[step]) for step in kl if step in reward}
    both = [step for step, values in measured.items() if np.isfinite(values).all()]
    return (
        {"kl": [kl[step] for step in both], key: [reward[step] for step in both]}
        if both
        else {}
    )


def _end(run: Run, key: str) -> Curve | None:
    """Both models of the last comparison: ([0, KL], [the baseline's reward, the policy's])."""
    if not run.comparisons:
        return None
    metrics = run.comparisons[-1].last
    names = ("kl", f"{key}_baseline", f"{key}_policy")
    kl, baseline, policy = (metrics.get(name, math.nan) for name in names)
    known = math.isfinite(kl) and math.isfinite(baseline) and math.isfinite(policy)
    return ([0.0, kl], [baseline, policy]) if known else None


def calibrated(run: Run) -> list[Stage]:
    return [
        stage
        for stage in run.stages
        if stage.calibration and stage.calibration.get("count")
    ]


def compares(stage: Stage) -> bool:
    """Whether the stage's samples are answers of two models to the same prompts."""
    return bool(stage.samples) and all(
        {"prompt", "baseline", "policy"} <= row.keys() for row in stage.samples
    )


def histograms(run: Run) -> list[tuple[str, Markup]]:
    """Distributions of both models' rewards over the last comparison's samples."""
    stages = [stage for stage in run.comparisons if compares(stage)]
    out = []
    for key in ("gold", "proxy"):
        rows = [
            row for row in (stages[-1].samples if stages else []) if _scored(row, key)
        ]
        if len(rows) >= 10:
            columns = (
                [float(row[f"{key}_{who}"]) for row in rows]
                for who in ("baseline", "policy")
            )
            out.append(
                (
                    f"{key} reward",
                    Markup(
                        figures.distributions(*columns, f"{key} reward of an answer")
                    ),
                )
            )
    return out


def _scored(row: dict, key: str) -> bool:
    values = row.get(f"{key}_baseline"), row.get(f"{key}_policy")
    return all(
        isinstance(value, int | float) and math.isfinite(value) for value in values
    )
