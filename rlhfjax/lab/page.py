"""Writes study.html: the card, the figure, the comparisons and the verdict of a study."""

import math
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from rlhfjax import paths
from rlhfjax.lab import drawings, outcomes, results
from rlhfjax.lab.card import Shape
from rlhfjax.lab.found import Found
from rlhfjax.lab.results import Row, rule_digest
from rlhfjax.lab.verdict import Result, Verdict
from rlhfjax.paths import Path
from rlhfjax.progress import duration
from rlhfjax.report import origin, tables
from rlhfjax.report.page import REPORT, encodable, environment

PAGE = "study.html"
# Metrics that say how much of a gold reward its cheapest substitutes predict.
BASELINES = ("length_accuracy", "word_accuracy", "ten_words_accuracy")
MOST_PREDICTED = 0.55
STATES = {
    "holds": "holds",
    "against": "against the claim",
    "undecided": "not decided",
    "missing": "missing",
}


def write(folder: Path, found: Found, verdict: Verdict) -> Path:
    """Writes the page of a study into a sweep's folder; returns its path."""
    return paths.write(folder / PAGE, render(found, verdict, folder))


def render(found: Found, verdict: Verdict, folder: Path | None = None) -> str:
    """Returns the page as HTML; every text of a card or a row is escaped.

    Args:
      folder: the sweep's, for links to the reports of its runs.
    """
    study = found.study
    rows = found.in_order
    all_outcomes = [results.to_outcome(row) for row in rows]
    compared = [("required", x) for x in verdict.requires]
    compared += [("primary", x) for x in verdict.primary]
    baselines = gold_baselines(rows)
    origin_rows = provenance(found)
    sections = {"card": "Card", "figure": "Figure", "comparisons": "Comparisons"}
    sections |= {"gold": "Gold rewards"} if baselines else {}
    sections |= {"runs": "Runs"}
    sections |= {"origin": "Provenance"} if origin_rows else {}
    drawing = study.drawing
    shape = drawing.paper if drawing else ""
    page = environment().get_template("study.html")
    text = page.render(
        study=study,
        verdict=verdict,
        done=len(rows),
        total=len(found.planned),
        card=card_rows(found),
        drawing=drawing,
        figure=drawings.figure(study, all_outcomes),
        paper=drawings.paper(study),
        paper_source=shape.source if isinstance(shape, Shape) else "",
        paper_text="" if isinstance(shape, Shape) else shape,
        comparisons=[comparison_row(kind, x) for kind, x in compared],
        baselines=baselines,
        most_predicted=MOST_PREDICTED,
        runs=run_rows(found, folder),
        values=list(study.values),
        repeats=found.repeats,
        origin=origin_rows,
        contents=sections.items(),
    )
    return encodable(text)


def card_rows(found: Found) -> list[tuple[str, str]]:
    """Returns (name, text) pairs of the card."""
    study = found.study
    rows = [("Paper", f"{study.paper}: {study.figure}")]
    for name, overrides in study.conditions.items():
        options = [f"{option} = {value}" for option, value in overrides.items()]
        rows.append((f"Condition {name}", ", ".join(options) or "as the file has it"))
    for name, value in study.values.items():
        rows.append((f"Value {name}", outcomes.describe(value)))
    rows += [(f"Required: {x.name}", x.statement) for x in study.requires]
    rows += [(f"Primary: {x.name}", x.statement) for x in study.primary]
    rows.append(("Seeds", f"{study.seeds} per condition"))
    if study.cost:
        rows.append(("Cost", study.cost))
    return rows


def comparison_row(kind: str, result: Result) -> dict[str, Any]:
    """Returns the cells of a comparison as texts; "" where there is nothing to show."""
    estimate, comparison = result.estimate, result.comparison
    cells: dict[str, Any] = {
        "kind": kind,
        "name": comparison.name,
        "statement": comparison.statement,
        "state": result.state,
        "says": STATES[result.state],
        "reason": result.reason,
    }
    empty = ("n", "mean", "interval", "level", "p", "sd", "detectable", "method")
    cells |= dict.fromkeys(empty, "")
    if estimate is None:
        return cells
    cells |= {
        "n": str(estimate.n),
        "mean": tables.number(estimate.mean),
        "sd": tables.number(estimate.sd),
        "method": estimate.method,
    }
    if (ends := result.interval) is not None:
        low, high = map(tables.number, ends)
        cells["interval"] = f"{low} to {high}"
        cells["level"] = f"{100 * result.level:.4g} %"
        cells["p"] = f"{result.adjusted:.2g}"
        cells["detectable"] = f"±{tables.number(result.detectable or math.nan)}"
    return cells


def run_rows(found: Found, folder: Path | None) -> list[dict[str, Any]]:
    """Returns a row per planned run: where it is from, its values and its seconds."""
    names = {run.hash: run.name for run in found.planned}
    values = values_of(found)
    rows = []
    for run in found.planned:
        row = found.rows.get(run.hash)
        here = found.here.get(run.hash, "")
        source = "waiting"
        if row is not None:
            source = "run here" if here else "taken from results"
        rows.append(
            {
                "name": names[run.hash],
                "condition": run.condition,
                "source": source,
                "page": _link(folder, here),
                "values": values.get(run.hash, {}),
                "seconds": "" if row is None else duration(row["seconds"]),
            }
        )
    return rows


def _link(folder: Path | None, name: str) -> str:
    if folder is None or not name or not paths.exists(folder / name / REPORT):
        return ""
    return quote(f"{name}/{REPORT}")


def values_of(found: Found) -> dict[str, dict[str, str]]:
    """Returns {hash of a run: {value: its number}}, without those that cannot be computed."""
    texts: dict[str, dict[str, str]] = {}
    here = [(row["hash"], results.to_outcome(row)) for row in found.in_order]
    for name in found.study.values:
        for condition in found.study.conditions:
            group = [(h, x) for h, x in here if x.condition == condition]
            measured = drawings.measured(found.study, name, [x for _, x in group])
            for row_hash, outcome in group:
                if outcome.seed in measured:
                    number = tables.number(measured[outcome.seed])
                    texts.setdefault(row_hash, {})[name] = number
    return texts


def gold_baselines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns mean and greatest value over runs of every metric in BASELINES; marks a high mean.

    What predicts a gold reward this well without understanding a response is a substitute for it.
    One run tells it within two points or so, and the greatest of several is above the truth.
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row["metrics"].items():
            if name.endswith(BASELINES) and value is not None:
                found.setdefault(name, []).append(value)
    return [
        {
            "name": name,
            "mean": tables.number(sum(values) / len(values), percent=True),
            "greatest": tables.number(max(values), percent=True),
            "high": sum(values) / len(values) > MOST_PREDICTED,
        }
        for name, values in found.items()
    ]


def provenance(found: Found) -> list[tuple[str, str]]:
    """Returns where the rows come from: what all starts of a sweep show, and what a study adds."""
    rows = found.in_order
    if not rows:
        return []
    starts: list[Mapping[str, Any]] = [row for row in rows if row.get("date")]
    pairs = origin.of_starts([{**row, "seeds": {}} for row in starts])
    dtypes = sorted({dtype for row in rows for dtype in row["dtype"]})
    pairs.append(("Dtypes", ", ".join(dtypes) or "unknown"))
    pairs.append(("Seconds", f"{duration(results.seconds(rows))}, shared stages once"))
    digest = rule_digest(found.study)
    others = sum(row["rule"] != digest for row in rows)
    rule = f"{digest}: written before all {len(rows)} runs"
    if others:
        rule = f"{digest}: {others} of {len(rows)} runs were made under another rule"
    pairs.append(("Rule", rule))
    if len(cpus := results.processors(rows)) > 1:
        several = f"{', '.join(cpus)}: numbers differ between them by rounding"
        pairs.append(("Several processors", f"{several}, those of shared stages too"))
    return pairs
