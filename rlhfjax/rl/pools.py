"""Pools of responses in a file: sampled and scored by the gold reward once, for many proxies."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from rlhfjax import paths
from rlhfjax.errors import DataError
from rlhfjax.paths import Path
from rlhfjax.rl.rollout import Rollout

FILE = "responses.npz"


class SavedPools(NamedTuple):
    """Rows of a rollout, N after each other per prompt, and what they score by the gold reward."""

    tokens: Int[np.ndarray, "b p_r"]
    attention_mask: Bool[np.ndarray, "b p_r"]
    mask: Bool[np.ndarray, "b r"]
    gold: Float[np.ndarray, " b"]

    def rollout(self, first: int, size: int) -> Rollout:
        """Returns `size` rows from `first` on; past the last one it is repeated."""
        rows = np.minimum(np.arange(first, first + size), len(self.tokens) - 1)
        mask = self.mask[rows].astype(np.float32)
        columns: Any = (
            self.tokens[rows],
            self.attention_mask[rows].astype(np.int32),
            mask,
            np.full_like(mask, np.nan),  # the log-probabilities are not saved
        )
        return Rollout(*columns)


def collected(rollouts: Sequence[Rollout], gold: Sequence[float]) -> SavedPools:
    """Returns the pools of batches; rows past the scores only fill the last batch."""
    n = len(gold)
    return SavedPools(
        tokens=np.concatenate([x.tokens for x in rollouts])[:n],
        attention_mask=np.concatenate([x.attention_mask for x in rollouts])[:n] > 0,
        mask=np.concatenate([x.mask for x in rollouts])[:n] > 0,
        gold=np.array(gold, np.float64),
    )


def write(workdir: Path, pools: SavedPools) -> None:
    """Writes the pools, completely or not at all."""
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **pools._asdict())
    paths.write(workdir / FILE, file.getvalue())


def read(workdir: Path) -> SavedPools:
    """Returns the pools that a stage saved.

    Raises:
      DataError: there are none, or the file is damaged.
    """
    path = workdir / FILE
    content = paths.read_if_there(path)
    if content is None:
        raise DataError(
            f"{path}: not found; a best_of_n stage writes it with save_responses=True"
        )
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            pools = SavedPools(**{name: file[name] for name in SavedPools._fields})
    except Exception as error:  # zlib's and NumPy's parsers raise many kinds
        raise DataError(f"{path}: is damaged: {type(error).__name__}") from None
    if not _fits(pools):
        raise DataError(f"{path}: is damaged: its arrays do not fit each other")
    return pools


def _fits(pools: SavedPools) -> bool:
    tokens, attention_mask, mask, gold = pools
    return (
        [x.ndim for x in pools] == [2, 2, 2, 1]
        and tokens.shape == attention_mask.shape
        and len({len(x) for x in pools}) == 1
        and 0 < mask.shape[1] < tokens.shape[1]
        and len(tokens) > 0
        and np.issubdtype(tokens.dtype, np.integer)
        and attention_mask.dtype == mask.dtype == np.bool_
        and np.issubdtype(gold.dtype, np.floating)
        and bool(np.isfinite(gold).all())
    )
