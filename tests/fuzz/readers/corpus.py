"""Readers of what `prepare` and `synthesize` keep, and of an endpoint's replies."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from rlhfjax import json_text
from rlhfjax.corpus import instructions, measure, summary, write
from rlhfjax.corpus.options import (
    EvaluationConfig,
    Filters,
    LanguageConfig,
    NearConfig,
    QualityConfig,
    RepeatedPromptConfig,
)
from rlhfjax.corpus.rows import Item
from rlhfjax.endpoint import reply_of
from rlhfjax.report import corpus as section
from rlhfjax.report.workdir import read_run
from tests.fuzz.inputs import binary_bytes, json_bytes
from tests.fuzz.readers.table import Reader, Table, Trial, dumped, file_reader

TABLE: Table = {}
FILTERS = Filters(
    language=LanguageConfig(),
    quality=QualityConfig(),
    exact=True,
    near=NearConfig(threshold=0.8, permutations=8),
    prompts=RepeatedPromptConfig(),
    evaluation=EvaluationConfig(ngram=2),
    seed=0,
)
TEXTS = ("who sat on the mat?", "the cat sat", "é")
SUMMARY = {
    "kind": "text",
    "sources": [
        {
            "spec": "jsonl:x",
            "weight": None,
            "rows": 3,
            "skipped": 0,
            "left": 2,
            "files": "{split}/00-*.jsonl",
        }
    ],
    "filters": [{"name": "exact", "removed": 1, "left": 2}],
    "splits": {"train": 2},
    "words": {"train": 9},
    "cut": 0,
    "ignored": 0,
    "quality_auc": 0.9,
    "languages": {"en": 3},
    "lengths": {"before": [0, 1, 2], "after": [0, 1, 1]},
    "examples": {
        "exact": [{"place": "x:1", "text": "a", "why": "", "like": "a"}],
    },
}


def _measures(folder: Path) -> tuple[Path, list[bytes], Callable]:
    items = [Item(text=text, identity=text, prompt=text, user="") for text in TEXTS]
    table = np.zeros(0, np.uint64)
    path = folder / "x.npz"
    measure.write(path, measure.measure(measure.Tools(FILTERS, None, table), items))
    return path, [path.read_bytes()], lambda: measure.read(path)


def _written(folder: Path) -> tuple[Path, list[bytes], Callable]:
    path = folder / "x.json"
    good = {"rows": {"train": 2}, "words": {"train": 5}, "lengths": [0, 2]}
    seeds = dumped(good | {"cut": [1], "removed": []})
    return path, seeds, lambda: write.read(path)


def _summary(folder: Path) -> tuple[Path, list[bytes], Callable]:
    (folder / "config.json").write_text('{"stage": "prepare"}')
    path = folder / summary.FILE
    return path, dumped(SUMMARY), lambda: section.prepared(read_run(folder))


def _round(folder: Path) -> tuple[Path, list[bytes], Callable]:
    path = folder / "x.json"
    one = {
        "id": "0-1-2",
        "text": "Name a fruit.",
        "model": "m",
        "seed": 0,
        "round": 0,
        "examples": ["seed-1"],
        "nearest": "seed-0",
        "similarity": 0.25,
    }
    seeds = dumped({"taken": [one], "counts": {"": 1, "similar": 2}})
    return path, seeds, lambda: json_text.read(path, instructions.Round)


def _reply(folder: Path) -> Trial:
    choice = {"message": {"content": "hi"}, "finish_reason": "stop"}
    seeds = dumped(
        {"choices": [choice], "model": "m"},
        {"choices": [{"message": {"content": None}}], "usage": {"total_tokens": 3}},
    )

    def call(content: bytes) -> None:
        reply = reply_of(content, "http://localhost/v1", "m")
        instructions.parse(reply["text"], reply["is_cut"])

    return Trial(seeds, json_bytes(seeds), call)


file_reader(TABLE, "corpus_measures", binary_bytes, _measures, examples=50)
file_reader(TABLE, "corpus_written", json_bytes, _written)
file_reader(TABLE, "corpus_summary", json_bytes, _summary, examples=30)
file_reader(TABLE, "synthesis_round", json_bytes, _round)
TABLE["endpoint_reply"] = Reader(_reply)
