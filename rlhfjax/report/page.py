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
from rlhfjax.redact import redact
from rlhfjax.report import figures, tables
from rlhfjax.report.workdir import Curve, Run, Stage, read_run
from rlhfjax.workdirs import Calibration

# Samples that are shown, and samples in all, the others being folded.
FEW, MANY = 8, 40
REPORT = "report.html"


@dataclasses.dataclass(frozen=True)
class Panel:
    """One small figure of a stage: a metric, its last values, and the SVG."""

    name: str
    train: str
    val: str
    svg: Markup


def write_report(workdir: str | os.PathLike) -> Path:
    """Writes `workdir/report.html` from the run's files so far, and returns its path.

    Raises:
      ConfigError: the workdir does not exist or holds no run.
      DataError: a file in it is damaged.
    """
    workdir = paths.path(workdir)
    return paths.write(workdir / REPORT, render(read_run(workdir)))


def environment() -> jinja2.Environment:
    """Returns the environment that renders the templates of this folder."""
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("rlhfjax.report", "."),
        autoescape=True,  # generated text may hold anything
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["turns"] = turns
    env.filters["number"] = tables.number
    env.filters["json"] = _json
    return env


def _json(value: Any) -> str:
    """Returns indented JSON; a number that is not finite becomes null."""
    finite = json_text.null_nonfinite(value)
    return redact(json_text.encode(finite, REPORT, indent=2, default=str), {})


def render(run: Run) -> str:
    """Returns the page as HTML; every text of the run is escaped."""
    headlines = tables.headlines(run)
    seconds = sum(stage.seconds or 0 for stage in run.stages)
    comparisons = [stage for stage in run.stages if compares(stage)]
    others = [stage for stage in run.stages if stage.samples and not compares(stage)]
    template = environment().get_template("page.html")
    page = template.render(
        run=run,
        finished=all(stage.status == "done" for stage in run.stages),
        total_time=duration(seconds) if seconds else "",
        headlines=headlines,
        cards=[row for row in headlines if row.name in tables.CARDS and row.policy],
        rows=[tables.stage_row(stage) for stage in run.stages],
        times=[tables.goodput_row(stage) for stage in run.stages if stage.goodput],
        panels={stage.name: panels(stage) for stage in run.stages if stage.curves},
        frontiers=frontiers(run),
        policies=[(*figures.mark(i), s.name) for i, s in enumerate(policies(run))],
        pools=[stage.name for stage in pools(run)],
        calibrations=calibrations(run),
        histograms=histograms(run),
        comparisons=[(s, s.samples[:FEW], s.samples[FEW:MANY]) for s in comparisons],
        examples=[(stage, stage.samples[:FEW]) for stage in others],
    )
    return encodable(page)


def encodable(page: str) -> str:
    """Returns a page with escapes for what UTF-8 lacks: bytes of a file's name in another code."""
    return page.encode(errors="backslashreplace").decode()


def turns(prompt: str) -> list[tuple[str, str]]:
    """Splits a rendered conversation into (role, text) pairs.

    Text before the first role marker has the role "".
    """
    first, *rest = re.split(r"<\|(\w+)\|>", prompt)
    pairs = [("", first), *zip(rest[::2], rest[1::2], strict=True)]
    return [(role, text.strip()) for role, text in pairs if text.strip()]


def panels(stage: Stage) -> list[Panel]:
    """Returns one panel per metric, with `NAME` and `val_NAME` on one axis.

    The most telling metrics come first, then the others by name. A metric that was logged at a
    single step is no curve; only the tables show it.
    """
    curves = {
        name: curve for name, curve in stage.curves.items() if len(set(curve[0])) > 1
    }
    telling = [name for name in tables.TELLING if name in curves]
    names = dict.fromkeys([*telling, *sorted(curves)])
    bases = dict.fromkeys(name.removeprefix("val_") for name in names)
    return [_panel(base, curves) for base in bases]


def _panel(base: str, curves: dict[str, Curve]) -> Panel:
    train = curves.get(base)
    val = curves.get(f"val_{base}")
    return Panel(
        name=base,
        train=_last_value(train),
        val=_last_value(val),
        svg=Markup(figures.curves(train, val)),
    )


def _last_value(curve: Curve | None) -> str:
    if curve is None:
        return ""
    _, values = curve
    return tables.number(values[-1])


def frontiers(run: Run) -> list[Markup]:
    """Returns the figures of proxy and gold reward against KL, those that have any data.

    They show validations of policies, best-of-n sampling and the last comparison.
    """
    svgs = []
    for key in ("proxy", "gold"):
        paths = [_path(stage, key) for stage in policies(run)]
        best_of_n = [_path(stage, key, "") for stage in pools(run)]
        end = _end(run, key)
        if any(paths) or any(best_of_n) or end:
            svgs.append(Markup(figures.frontier(key, paths, end, best_of_n)))
    return svgs


def policies(run: Run) -> list[Stage]:
    """Returns the stages whose validations have the policy's KL and its proxy or gold reward."""
    return [
        stage for stage in run.stages if _path(stage, "proxy") or _path(stage, "gold")
    ]


def pools(run: Run) -> list[Stage]:
    """Returns the best-of-n stages: their metrics have `kl_pool`."""
    return [stage for stage in run.stages if "kl_pool" in stage.curves]


def _path(stage: Stage, key: str, prefix: str = "val_") -> dict[str, list[float]]:
    """Returns the columns KL and reward at the steps where both are finite; {} if there is none."""
    kl = _by_step(stage, f"{prefix}kl")
    reward = _by_step(stage, f"{prefix}{key}")
    measured = {step: (kl[step], reward[step]) for step in kl if step in reward}
    both = [step for step, values in measured.items() if np.isfinite(values).all()]
    if not both:
        return {}
    return {"kl": [kl[step] for step in both], key: [reward[step] for step in both]}


def _by_step(stage: Stage, name: str) -> dict[float | int, float]:
    steps, values = stage.curves.get(name, ([], []))
    return dict(zip(steps, values, strict=True))


def _end(run: Run, key: str) -> Curve | None:
    """Returns the last comparison as ([0, KL], [reward of the baseline, reward of the policy])."""
    if not run.comparisons:
        return None
    metrics = run.comparisons[-1].last
    names = ("kl", f"{key}_baseline", f"{key}_policy")
    kl, baseline, policy = (metrics.get(name, math.nan) for name in names)
    if not np.isfinite([kl, baseline, policy]).all():
        return None
    return [0.0, kl], [baseline, policy]


def calibrations(run: Run) -> list[tuple[str, Calibration, Markup]]:
    """Returns (stage, calibration, figure) of the reward models whose calibration was measured."""
    return [
        (stage.name, stage.calibration, Markup(figures.reliability(stage.calibration)))
        for stage in run.stages
        if stage.calibration and stage.calibration.get("count")
    ]


def compares(stage: Stage) -> bool:
    """Returns whether the stage's samples are responses of two models to the same prompts."""
    columns = {"prompt", "baseline", "policy"}
    return bool(stage.samples) and all(columns <= row.keys() for row in stage.samples)


def histograms(run: Run) -> list[tuple[str, Markup]]:
    """Returns the distributions of both models' rewards over the last comparison's samples."""
    stages = [stage for stage in run.comparisons if compares(stage)]
    samples = stages[-1].samples if stages else []
    out = []
    for key in ("gold", "proxy"):
        rows = [row for row in samples if _is_scored(row, key)]
        if len(rows) < 10:
            continue
        baseline = [float(row[f"{key}_baseline"]) for row in rows]
        policy = [float(row[f"{key}_policy"]) for row in rows]
        label = f"{key} reward of a response"
        svg = Markup(figures.distributions(baseline, policy, label))
        out.append((f"{key} reward", svg))
    return out


def _is_scored(row: dict, key: str) -> bool:
    values = (row.get(f"{key}_baseline"), row.get(f"{key}_policy"))
    return all(isinstance(x, int | float) and math.isfinite(x) for x in values)
