"""The TFDS builder of a folder of preferences, see `preferences.write_preferences`."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rlhfjax.data.rows import Row


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
