"""Reads and writes ranked completions: a TFDS ArrayRecord dataset, and its rows as JSON lines.

    DIR/preferences-train.array_record-...      tfds.builder_from_directory(DIR)
    DIR/features.json, DIR/dataset_info.json
    DIR/train.jsonl                             jsonl:DIR/train.jsonl

Token ids are stored as they were sampled, so that no later stage encodes text anew.
"""

import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhfjax import json_text, paths
from rlhfjax.data.dataset_folders import INFO, is_dataset, locked
from rlhfjax.data.rows import BadRow, Row, normalize
from rlhfjax.data.sources import Source, open_source
from rlhfjax.errors import DataError


def ranks_of(scores: Sequence[float]) -> list[int]:
    """Returns ranks from 1, the best. Equal scores share a rank, and no rank is left out."""
    ranks = {
        score: rank for rank, score in enumerate(sorted(set(scores), reverse=True), 1)
    }
    return [ranks[score] for score in scores]


def write_preferences(
    folder: str | os.PathLike, splits: Mapping[str, Iterable[Row]], *, labeler: str
) -> None:
    """Writes ranked completions atomically, in place of an older folder.

    Args:
      splits: rows by name of the split. A row is {prompt: str, prompt_tokens: [n], completions:
        [k] str, completion_tokens: [k][r], scores: [k], ranks: [k], labeler: str}; ranks may be
        absent and then follow from the scores.
      labeler: who ranked the rows without a labeler, such as "simulated: VADER sentiment".

    Raises:
      DataError: a row is malformed, or a split is empty.
    """
    # TFDS takes a second to import.
    from rlhfjax.data.corpora import write_quietly
    from rlhfjax.data.ranked_completions import RankedCompletions

    folder = paths.path(folder)
    paths.make_folder(folder.parent)
    rows = {}
    for split, given in splits.items():
        rows[split] = [_row(row, labeler, split, i) for i, row in enumerate(given)]
        if not rows[split]:
            raise DataError(f"preferences: no rows in split {split!r}")
    lock = paths.lock_file(folder.with_name(f".{folder.name}.lock"))
    with locked(lock), paths.replacing(folder, INFO) as new:
        builder = RankedCompletions(rows, data_dir=new, file_format="array_record")
        write_quietly(builder)
        for file in pathlib.Path(builder.data_dir).iterdir():
            os.replace(file, new / file.name)
        shutil.rmtree(new / builder.name)
        for split in rows:
            _write_lines(new / f"{split}.jsonl", rows[split], folder / f"{split}.jsonl")


def _write_lines(file: paths.Path, rows: Sequence[Row], name: paths.Path) -> None:
    """Writes rows as JSON lines.

    Args:
      name: the file's name for error messages.
    """
    lines = [
        json_text.encode(row, f"{name}:{i}", default=_plain) + "\n"
        for i, row in enumerate(rows, start=1)
    ]
    file.write_text("".join(lines), encoding="utf-8")


def read_preferences(folder: str | os.PathLike, split: str = "train") -> Source:
    """Returns the rows of a split, of kind preferences, in the order in which they were written.

    Raises:
      DataError: the folder holds no dataset, or the split no rows.
    """
    if not is_dataset(folder):
        raise DataError(
            f"preferences: {folder} holds no dataset; the collect stage writes one"
        )
    return open_source(f"tfds:{os.fspath(folder)}", kind="preferences", split=split)


def _row(row: Row, labeler: str, split: str, index: int) -> Row:
    """Returns a row as it is stored. Raises DataError if it is malformed."""
    try:
        if "completion_tokens" not in row:
            raise BadRow("no column 'completion_tokens'")
        row = normalize("preferences", row, {})
    except BadRow as reason:
        raise DataError(
            f"preferences: split {split!r} row {index}: {reason}"
        ) from reason
    # Scores are rounded to float32, as ArrayRecord stores them, so that both files are equal.
    scores = [float(np.float32(score)) for score in row["scores"]]
    ranks = [int(rank) for rank in row.get("ranks", ranks_of(scores))]
    return {
        "prompt": row["prompt"],
        "completions": row["completions"],
        "scores": scores,
        "ranks": ranks,
        "labeler": row.get("labeler") or labeler,
        "prompt_tokens": row["prompt_tokens"],
        "completion_tokens": row["completion_tokens"],
    }


def _plain(value: Any) -> Any:
    return value.tolist()
