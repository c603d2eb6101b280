"""Ranked completions on disk: a TFDS ArrayRecord dataset, and beside it the same rows as JSON lines.

    DIR/preferences-train.array_record-...  features.json  dataset_info.json     tfds.builder_from_directory(DIR)
    DIR/train.jsonl                                                              jsonl:DIR/train.jsonl

Token ids are stored as they were sampled, so that nothing downstream has to encode text anew.
"""

import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rlhfjax import json_text, paths
from rlhfjax.data.corpora import INFO, locked, write_quietly
from rlhfjax.data.rows import BadRow, Row, normalize
from rlhfjax.data.sources import Source, open_source
from rlhfjax.errors import DataError


class RankedCompletions(tfds.core.GeneratorBasedBuilder):
    """One row a prompt. Tokens of the k completions lie end to end in `tokens`, `token_counts` says where to cut."""

    name = "preferences"
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(__file__).parent

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
            flat = [token for ids in row["completion_tokens"] for token in ids]
            stored = {
                name: row[name]
                for name in (
                    "prompt",
                    "prompt_tokens",
                    "completions",
                    "scores",
                    "ranks",
                )
            }
            yield (
                i,
                stored
                | {
                    "tokens": np.array(flat, np.int32),
                    "token_counts": np.array(
                        [len(ids) for ids in row["completion_tokens"]], np.int32
                    ),
                    "labeler": row["labeler"],
                },
            )


def ranks_of(scores: Sequence[float]) -> list[int]:
    """Ranks from 1, the best; equal scores share a rank and the next rank follows on."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) + 1 for score in scores]


def write_preferences(
    folder: str | os.PathLike, splits: Mapping[str, Iterable[Row]], *, labeler: str
) -> None:
    """Writes ranked completions, atomically: the folder appears complete or not at all, replacing an older one.

    Args:
      splits: split name to rows {prompt: str, prompt_tokens: [n], completions: [k] str, completion_tokens: [k][r],
        scores: [k], ranks: [k] (from the scores if missing), labeler: str (`labeler` if missing)}.
      labeler: who ranked, for instance "simulated: VADER sentiment".

    Raises:
      DataError: a row is malformed, or a split is empty.
    """
    folder = paths.path(folder)
    paths.make_folder(folder.parent)
    rows = {
        split: [_row(one, labeler, split, i) for i, one in enumerate(some)]
        for split, some in splits.items()
    }
    for split, some in rows.items():
        if not some:
            raise DataError(f"preferences: no rows in split {split!r}")
    lock = paths.lock_file(folder.with_name(f".{folder.name}.lock"))
    with locked(lock), paths.replacing(folder, INFO) as new:
        builder = RankedCompletions(rows, data_dir=new, file_format="array_record")
        write_quietly(builder)
        for file in pathlib.Path(builder.data_dir).iterdir():
            os.replace(file, new / file.name)
        shutil.rmtree(new / builder.name)
        for split, some in rows.items():
            name = f"{split}.jsonl"
            lines = [
                json_text.encode(row, f"{folder / name}:{i}", default=_plain) + "\n"
                for i, row in enumerate(some, start=1)
            ]
            (new / name).write_text("".join(lines), encoding="utf-8")


def read_preferences(folder: str | os.PathLike, split: str = "train") -> Source:
    """The rows of a split, of kind preferences, in the order written. Raises DataError when there are none."""
    if not (paths.path(folder) / INFO).is_file():
        raise DataError(
            f"preferences: {folder} holds no dataset; the collect stage writes one"
        )
    return open_source(f"tfds:{os.fspath(folder)}", kind="preferences", split=split)


def _row(row: Row, labeler: str, split: str, index: int) -> Row:
    try:
        if "completion_tokens" not in row:
            raise BadRow("no column 'completion_tokens'")
        row = normalize("preferences", row, {})
    except BadRow as reason:
        raise DataError(
            f"preferences: split {split!r} row {index}: {reason}"
        ) from reason
    with np.errstate(over="ignore"):  # an infinity is refused where it is written
        # What ArrayRecord keeps, so that the twin is equal.
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
