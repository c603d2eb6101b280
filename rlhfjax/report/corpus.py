"""The section of a report about what `prepare` did to a corpus."""

import dataclasses
from collections.abc import Sequence

from rlhfjax.corpus.options import MEANINGS
from rlhfjax.corpus.summary import Example, SourceSummary, Summary
from rlhfjax.corpus.write import BINS
from rlhfjax.report import figures
from rlhfjax.report.downloads import Drawing, drawing
from rlhfjax.report.tables import number
from rlhfjax.report.workdir import Run

MOST_LANGUAGES = 8  # that are named


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the page shows of a stage that prepared a corpus."""

    stage: str
    sources: list[dict[str, str]]
    filters: list[
        dict[str, str]
    ]  # rows of a table: name, meaning, removed, share, left
    splits: str
    notes: list[str]
    lengths: Drawing
    examples: list[tuple[str, str, list[Example]]]  # filter, meaning, rows


def prepared(run: Run) -> list[Prepared]:
    """Returns what the page shows of each stage that prepared a corpus."""
    return [_prepared(stage.name, stage.corpus) for stage in run.stages if stage.corpus]


def _prepared(name: str, summary: Summary) -> Prepared:
    counts = [
        f"{split} {rows:,} rows, {summary['words'].get(split, 0):,} words"
        for split, rows in summary["splits"].items()
    ]
    examples = [
        (filter_name, MEANINGS.get(filter_name, ""), rows)
        for filter_name, rows in summary["examples"].items()
        if rows
    ]
    return Prepared(
        stage=name,
        sources=[_source(source) for source in summary["sources"]],
        filters=_filters(summary),
        splits="; ".join(counts),
        notes=_notes(summary),
        lengths=_lengths(name, summary),
        examples=examples,
    )


def _source(source: SourceSummary) -> dict[str, str]:
    weight = source["weight"]
    return {
        "spec": source["spec"],
        "rows": f"{source['rows']:,}",
        "skipped": f"{source['skipped']:,}",
        "left": f"{source['left']:,}",
        "share": _share(source["left"], source["rows"]),
        "weight": "" if weight is None else number(weight),
        "files": source["files"],
    }


def _filters(summary: Summary) -> list[dict[str, str]]:
    rows = []
    before = sum(source["rows"] for source in summary["sources"])
    for one in summary["filters"]:
        row = {
            "name": one["name"],
            "meaning": MEANINGS.get(one["name"], ""),
            "removed": f"{one['removed']:,}",
            "share": _share(one["removed"], before),
            "left": f"{one['left']:,}",
        }
        rows.append(row)
        before = one["left"]
    return rows


def _share(part: int, whole: int) -> str:
    return number(part / whole, percent=True) if whole else ""


def _notes(summary: Summary) -> list[str]:
    """Returns what else was counted, in sentences."""
    notes = []
    auc = summary["quality_auc"]
    if auc is not None:
        notes.append(
            f"The classifier of quality tells held-out documents apart with an AUC of {auc:.3f}."
        )
    if summary["cut"]:
        notes.append(f"{summary['cut']:,} documents lost evaluation text and stayed.")
    if summary["ignored"]:
        notes.append(
            f"{summary['ignored']:,} n-grams of evaluation text were ignored as phrases."
        )
    languages = list(summary["languages"].items())[:MOST_LANGUAGES]
    if languages:
        counts = ", ".join(f"{code} {count:,}" for code, count in languages)
        notes.append(f"Languages of the rows read, the most frequent: {counts}.")
    return notes


def _lengths(name: str, summary: Summary) -> Drawing:
    before, after = (
        summary["lengths"].get(when, [])[:BINS] for when in ("before", "after")
    )
    size = 1 + max(_last(before), _last(after))
    columns = {
        "words_from": [0, *(2**i for i in range(size - 1))],
        "before": _resized(before, size),
        "after": _resized(after, size),
    }
    svg = figures.lengths(*columns.values())
    return drawing(f"{name}_lengths", svg, columns)


def _resized(counts: list[int], size: int) -> list[int]:
    return [*counts[:size], *[0] * (size - len(counts))]


def _last(counts: Sequence[int]) -> int:
    """Returns the index of the last bin that is not empty."""
    return max((i for i, count in enumerate(counts) if count), default=0)
