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
import tensorflow_datasets as tfds

from rlhfjax import json_text, paths
from rlhfjax.data.corpora import INFO, is_dataset, locked, write_quietly
from rlhfjax.data.rows import BadRow, Row, normalize
from rlhfjax.data.sources import Source, open_source
from rlhfjax.errors import DataError


class RankedCompletions(tfds.core.GeneratorBasedBuilder):
    """One row per prompt.

    The tokens of its k completions are concatenated in `tokens`; `token_counts` has their lengths.
    """

    name = "preferences"
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(__file__).parent  # pyright: ignore[reportAssignmentType]

    def __init__(self, rows: Mapping[str, Sequence[Row]], **kwargs: Any):
        self._rows = rows
        super().__init__(**kwargs)

    def _info(self):
        ids = tfds.features.Tensor(shape=(None,), dtype=np.int32)
        features = {
            "prompt": tfds.features.Text(),
            "prompt_tokens": ids,
            "completions": tfds.features.Sequence(tfds.features.Text()),
            "tokens": ids,
            "token_counts": ids,
            "scores": tfds.features.Tensor(shape=(None,), dtype=np.float32),
            "ranks": ids,
            "labeler": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            description=self.__doc__,
            disable_shuffling=True,  # the order of the rows is kept
        )

    def _split_generators(self, dl_manager):
        return {
            split: self._generate_examples(rows) for split, rows in self._rows.items()
        }

    def _generate_examples(self, rows):
        for i, row in enumerate(rows):
            stored = dict(row)
            ids = stored.pop("completion_tokens")
            counts = [len(completion) for completion in ids]
            flat = [token for completion in ids for token in completion]
            stored["tokens"] = np.array(flat, np.int32)
            stored["token_counts"] = np.array(counts, np.int32)
            yield i, stored


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
