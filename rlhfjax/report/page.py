"""Writes `report.html`: one self-contained page about a run."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jinja2
import numpy as np

from rlhfjax import json_text, paths
from rlhfjax.paths import Path
from rlhfjax.progress import duration
from rlhfjax.redact import redact
from rlhfjax.report import corpus, figures, length, meanings, names, origin, tables
from rlhfjax.report.downloads import Drawing, drawing
from rlhfjax.report.rollouts import rollouts
from rlhfjax.report.workdir import Curve, Run, Stage, read_run
from rlhfjax.workdirs import Calibration

# Samples that are shown, and samples in all, the others being folded.
FEW, MANY = 8, 40
REPORT = "report.html"


@dataclasses.dataclass(frozen=True)
class Panel:
    """One small figure of a stage: a metric, its last values, and the figure."""

    name: str
    train: str
    val: str
    unit: str
    hint: str
    drawing: Drawing


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
    comparison = run.comparisons[-1] if run.comparisons else None
    models = names.of_models(run, comparison)
    samples = comparison.samples if comparison and compares(comparison) else []
    parts: dict[str, Any] = {
        "headlines": headlines,
        "frontiers": frontiers(run),
        "over_steps": over_steps(run),
        "scatters": length.scatters(samples, models),
        "tax": tables.tax_rows(run),
        "calibrations": calibrations(run),
        "histograms": histograms(run),
        "comparisons": [(s, s.samples[:FEW], s.samples[FEW:MANY]) for s in comparisons],
        "rollouts": [r for stage in run.stages if (r := rollouts(stage))],
        "panels": {stage.name: panels(stage) for stage in run.stages if stage.curves},
        "examples": [(stage, stage.samples[:FEW]) for stage in others],
        "origin": origin.rows(run),
        "corpora": corpus.prepared(run),
        "times": [tables.goodput_row(s) for s in run.stages if s.goodput],
    }
    template = environment().get_template("page.html")
    page = template.render(
        run=run,
        finished=all(stage.status == "done" for stage in run.stages),
        total_time=duration(seconds) if seconds else "",
        contents=contents(parts),
        cards=tables.cards(headlines),
        rewards_note=tables.rewards_note(run),
        models=models,
        rows=[(tables.stage_row(s), tables.last_values(s)) for s in run.stages],
        policies=[(*figures.mark(i), s.name) for i, s in enumerate(policies(run))],
        pools=[stage.name for stage in pools(run)],
        **parts,
    )
    return encodable(page)


def encodable(page: str) -> str:
    """Returns a page with escapes for what UTF-8 lacks: bytes of a file's name in another code."""
    return page.encode(errors="backslashreplace").decode()


# Anchors and titles of the page's sections, and which parts a section needs; none: always there.
SECTIONS = (
    ("result", "Result", ("headlines",)),
    ("stages", "Stages", ()),
    ("times", "Where the time went", ("times",)),
    ("corpus", "Prepared corpus", ("corpora",)),
    ("reward_and_kl", "Reward and KL", ("frontiers", "over_steps")),
    ("length", "Reward and length", ("scatters",)),
    ("tax", "Alignment tax", ("tax",)),
    ("reward_model", "Reward model", ("calibrations", "histograms")),
    ("samples", "Samples", ("comparisons",)),
    ("rollouts", "Samples over training", ("rollouts",)),
    ("curves", "Curves", ("panels",)),
    ("examples", "Examples from the stages", ("examples",)),
    ("origin", "Provenance", ("origin",)),
    ("configuration", "Configuration", ()),
)


def contents(parts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the table of contents: anchors and titles of the sections that there are."""
    return [
        (anchor, title)
        for anchor, title, needed in SECTIONS
        if not needed or any(parts[part] for part in needed)
    ]


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
    ordered = dict.fromkeys([*telling, *sorted(curves)])
    bases = dict.fromkeys(name.removeprefix("val_") for name in ordered)
    return [_panel(stage, base, curves) for base in bases]


def _panel(stage: Stage, base: str, curves: dict[str, Curve]) -> Panel:
    train = curves.get(base)
    val = curves.get(f"val_{base}")
    columns = _columns(base, train) | _columns(f"val_{base}", val)
    svg = figures.curves(train, val)
    meaning = meanings.find(base, stage.kind)
    return Panel(
        name=base,
        train=_last_value(train),
        val=_last_value(val),
        unit=meaning.unit if meaning else "",
        hint=meanings.hint(base, stage.kind),
        drawing=drawing(f"{stage.name}_{base}", svg, columns),
    )


def _columns(name: str, curve: Curve | None) -> dict[str, list]:
    """Returns the columns of a curve for a CSV file; {} without one."""
    if curve is None:
        return {}
    steps, values = curve
    return {f"step_{name}": steps, name: values}


def over_steps(run: Run) -> list[tuple[str, Drawing]]:
    """Returns (stage, figure) of held-out proxy and gold reward over steps, of policy stages."""
    found = []
    for stage in policies(run):
        proxy, gold = (stage.curves.get(f"val_{key}") for key in ("proxy", "gold"))
        columns = _columns("proxy", proxy) | _columns("gold", gold)
        svg = figures.proxy_and_gold(proxy, gold)
        found.append((stage.name, drawing(f"{stage.name}_rewards", svg, columns)))
    return found


def _last_value(curve: Curve | None) -> str:
    if curve is None:
        return ""
    _, values = curve
    return tables.number(values[-1])


def frontiers(run: Run) -> list[Drawing]:
    """Returns the figures of proxy and gold reward against KL, those that have any data.

    They show validations of policies, best-of-n sampling and the last comparison.
    """
    drawings = []
    for key in ("proxy", "gold"):
        paths = {stage.name: _path(stage, key) for stage in policies(run)}
        best_of_n = {stage.name: _path(stage, key, "") for stage in pools(run)}
        end = _end(run, key)
        if not (any(paths.values()) or any(best_of_n.values()) or end):
            continue
        svg = figures.frontier(key, list(paths.values()), end, list(best_of_n.values()))
        columns = {
            f"{stage} {column}": values
            for stage, path in (paths | best_of_n).items()
            for column, values in path.items()
        }
        if end is not None:
            columns |= {"comparison kl": end[0], f"comparison {key}": end[1]}
        drawings.append(drawing(f"{key}_and_kl", svg, columns))
    return drawings


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


def calibrations(run: Run) -> list[tuple[str, Calibration, Drawing]]:
    """Returns (stage, calibration, figure) of the reward models whose calibration was measured."""
    found = []
    for stage in run.stages:
        calibration = stage.calibration
        if calibration and calibration.get("count"):
            bins = ("confidence", "accuracy", "count")
            columns = {name: calibration[name] for name in bins}
            svg = figures.reliability(calibration)
            figure = drawing(f"{stage.name}_calibration", svg, columns)
            found.append((stage.name, calibration, figure))
    return found


def compares(stage: Stage) -> bool:
    """Returns whether the stage's samples are responses of two models to the same prompts."""
    columns = {"prompt", "baseline", "policy"}
    return bool(stage.samples) and all(columns <= row.keys() for row in stage.samples)


def histograms(run: Run) -> list[tuple[str, Drawing]]:
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
        svg = figures.distributions(baseline, policy, label)
        columns = {"baseline": baseline, "policy": policy}
        name = f"{key} reward"
        out.append((name, drawing(f"{key}_distribution", svg, columns)))
    return out


def _is_scored(row: dict, key: str) -> bool:
    values = (row.get(f"{key}_baseline"), row.get(f"{key}_policy"))
    return all(isinstance(x, int | float) and math.isfinite(x) for x in values)
