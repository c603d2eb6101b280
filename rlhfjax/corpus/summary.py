"""What was done to a corpus, for its reader and for the report: corpus.json."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NotRequired

import numpy as np
from typing_extensions import TypedDict

from rlhfjax.corpus import evaluation
from rlhfjax.corpus.decide import Decision
from rlhfjax.corpus.measure import Arrays
from rlhfjax.corpus.options import REMOVED_BY, Filters
from rlhfjax.corpus.parts import Corpus
from rlhfjax.corpus.write import BINS, Written
from rlhfjax.data.config import SourceConfig
from rlhfjax.data.rows import SPLITS
from rlhfjax.errors import cut
from rlhfjax.ranges import Count

FILE = "corpus.json"
EXAMPLES = 4  # per filter
MOST_SHOWN = 400  # characters of an example
MOST_LANGUAGES = 20


class SourceSummary(TypedDict):
    """A source, and where its rows are."""

    spec: str
    weight: float | None  # share in training, as the config gave it
    rows: Count  # read
    skipped: Count  # malformed rows
    left: Count
    files: str  # glob within the workdir; {split} stands for a split


class FilterSummary(TypedDict):
    """A filter."""

    name: str
    removed: Count
    left: Count  # after it


class Example(TypedDict):
    """A row that a filter removed."""

    place: str
    text: str
    why: str
    like: NotRequired[str]  # the row that it repeats


class Summary(TypedDict):
    """The content of corpus.json."""

    kind: str
    sources: list[SourceSummary]
    filters: list[FilterSummary]  # those that are on, in their order
    splits: dict[str, Count]  # rows written
    words: dict[str, Count]  # written, by split
    cut: Count  # documents that lost evaluation text and stayed
    ignored: Count  # n-grams of evaluation text that too many documents have
    quality_auc: float | None  # of the classifier, on held-out documents
    languages: dict[str, Count]  # rows read, by language
    lengths: dict[str, list[Count]]  # rows by words, see `write.BINS`: before and after
    examples: dict[str, list[Example]]  # by filter


def summarize(
    corpus: Corpus,
    configs: Sequence[SourceConfig],
    filters: Filters,
    measured: Arrays,
    decision: Decision,
    written: Sequence[Written],
    table: np.ndarray,
) -> dict[str, Any]:
    """Returns a Summary without `quality_auc`."""
    removed = decision.removed.copy()
    removed[[row for part in written for row in part["removed"]]] = REMOVED_BY.index(
        "evaluation"
    )
    languages = Counter(measured["language"].tolist())
    del languages[""]
    return {
        "kind": corpus.kind,
        "sources": _sources(corpus, configs, removed),
        "filters": _filters(filters, removed),
        "splits": _totals(written, "rows"),
        "words": _totals(written, "words"),
        "cut": sum(len(part["cut"]) for part in written),
        "ignored": decision.ignored,
        "languages": dict(languages.most_common(MOST_LANGUAGES)),
        "lengths": {
            "before": _bins(measured["words"]),
            "after": np.sum([part["lengths"] for part in written], axis=0).tolist(),
        },
        "examples": _examples(corpus, filters, measured, decision, removed, table),
    }


def is_on(filters: Filters) -> dict[str, bool]:
    """Returns which filters are on, in their order."""
    return {
        "language": bool(filters.language.keep),
        "quality": bool(filters.quality.reference),
        "exact": filters.exact,
        "near": bool(filters.near.threshold),
        "prefix": bool(filters.prompts.prefix),
        "user": bool(filters.prompts.per_user),
        "evaluation": bool(filters.evaluation.sources),
    }


def _sources(
    corpus: Corpus, configs: Sequence[SourceConfig], removed: np.ndarray
) -> list[SourceSummary]:
    summaries = []
    for i, (config, source) in enumerate(zip(configs, corpus.sources, strict=True)):
        parts = [part for part in corpus.parts if part.source == i]
        own = removed[parts[0].start : parts[-1].end]
        summary = SourceSummary(
            spec=config.spec,
            weight=getattr(config, "weight", None),
            rows=len(source),
            skipped=source.skipped,
            left=int((own == 0).sum()),
            files=f"{{split}}/{i:02d}-*.jsonl",
        )
        summaries.append(summary)
    return summaries


def _filters(filters: Filters, removed: np.ndarray) -> list[FilterSummary]:
    summaries, left = [], len(removed)
    for name, on in is_on(filters).items():
        count = int((removed == REMOVED_BY.index(name)).sum())
        left -= count
        if on:
            summaries.append(FilterSummary(name=name, removed=count, left=left))
    return summaries


def _totals(written: Sequence[Written], key: str) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for part in written:
        totals.update(part[key])
    return {split: totals[split] for split in SPLITS if split in totals}


def _bins(counts: np.ndarray) -> list[int]:
    """Returns how many lengths are in each bin, see `write.BINS`."""
    bins = [min(count.bit_length(), BINS - 1) for count in counts.tolist()]
    return np.bincount(bins, minlength=BINS).tolist()


def _examples(
    corpus: Corpus,
    filters: Filters,
    measured: Arrays,
    decision: Decision,
    removed: np.ndarray,
    table: np.ndarray,
) -> dict[str, list[Example]]:
    """Returns a few rows that each filter removed: those whose hashes are the smallest."""
    order = np.lexsort(measured["digest"][:, :8].T[::-1])
    has_hits = np.diff(decision.starts) > 0
    examples = {}
    for name, on in is_on(filters).items():
        wanted = removed == REMOVED_BY.index(name)
        if name == "evaluation":
            wanted |= has_hits
        rows = order[wanted[order]][:EXAMPLES].tolist()
        if on:
            examples[name] = [
                _example(corpus, filters, measured, decision, row, table)
                for row in rows
            ]
    return examples


def _example(
    corpus: Corpus,
    filters: Filters,
    measured: Arrays,
    decision: Decision,
    row: int,
    table: np.ndarray,
) -> Example:
    item = corpus.item(row)
    example = Example(place=corpus.locate(row), text=cut(item.text, MOST_SHOWN), why="")
    name = REMOVED_BY[decision.removed[row]]
    like = int(decision.like[row])
    if name == "language":
        probability = measured["probability"][row]
        example["why"] = f"{measured['language'][row]}, probability {probability:.2f}"
    elif name == "quality":
        example["why"] = f"score {measured['score'][row]:.3f}"
    elif name == "near":
        similarity = decision.similarity[row]
        example["why"] = f"estimated similarity {similarity:.2f}"
    elif not name:
        hashes = table[decision.hits_of(row)]
        found = evaluation.overlap(item.text, hashes, filters.evaluation.ngram)
        example["why"] = f"has {cut(found, MOST_SHOWN)!r}"
    if like >= 0:
        example["like"] = cut(corpus.item(like).text, MOST_SHOWN)
    return example
