"""A model and its cache on the device, and the programs that run them.

Nothing is compiled after `compile`, whatever comes: every size is one of a few.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rlhfjax.device_bytes import validate_bytes
from rlhfjax.errors import ConfigError
from rlhfjax.models.lanes import LaneCache, empty_lanes
from rlhfjax.models.lora import Params
from rlhfjax.models.transformer import Model
from rlhfjax.sampling.lanes import Settings, words
from rlhfjax.serve import programs
from rlhfjax.serve.programs import Place, Step
from rlhfjax.serve.requests import MOST_TOP

EVERY_ID = np.uint32(2**32 - 1)  # a word of a vocabulary mask that removes nothing
SHORT = 4  # times shorter than a chunk is the one for the last tokens of a prompt


class Device:
    """The device state of an engine.

    Args:
      lanes: number of responses that are decoded at a time.
      length: tokens of prompt and response together, at most.
      chunk: tokens of a prompt that are run at a time.

    Raises:
      ConfigError: a size is out of its range, or the cache needs more memory than there is.
    """

    def __init__(
        self, model: Model, params: Params, lanes: int, length: int, chunk: int
    ):
        _validate_sizes(model, lanes, length, chunk)
        self.lanes, self.length, self._model = lanes, length, model
        # A padded chunk may reach over the end. The last entry belongs to no token.
        self._entries = length + chunk
        self.spare = self._entries - 1
        self._counts = programs.entry_counts(length)
        self._chunk_counts = self._counts[::-2][::-1]
        self.short_chunk = max(1, chunk // SHORT)
        self._chunks = sorted({self.short_chunk, chunk})
        self._alternatives = min(MOST_TOP, model.config.vocab_size)
        shapes = jax.eval_shape(self._empty)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        validate_bytes("serve", {"the KV cache": size}, "lanes or length")
        self._params = model.for_decoding(jax.device_put(params), lanes)
        shape = (lanes, words(model.config.vocab_size))
        self._no_mask = jax.device_put(np.full(shape, EVERY_ID))
        self.reset()

    def reset(self) -> None:
        """Empties the cache, also if a program failed and took it along."""
        self._cache = self._empty()

    def set_settings(self, settings: Settings) -> None:
        """Sets how the lanes sample from now on."""
        self._settings = jax.device_put(settings)

    def decode(self, step: Step, mask: np.ndarray | None = None) -> jax.Array:
        """Begins a decode step. Returns packed tokens, a row per lane, that are still computed.

        Where one lane alone has a token, no other is run, and its row is the only one.

        Args:
          step: a lane without a token has position 0 and entry `spare`.
          mask: vocabulary masks [l, w]; None: every id may be drawn.
        """
        entries = _least(self._counts, int(step.position.max()) + 1)
        given = self._no_mask if mask is None else jax.device_put(mask)
        used = np.flatnonzero(step.entry != self.spare)
        if used.size == 1:
            return self._decode(entries, step, given, slice(used[0], used[0] + 1))
        return self._decode(entries, step, given)

    def prefill(self, lane: int, start: int, tokens: Sequence[int]) -> int:
        """Begins to run the next chunk of a prompt's tokens. Returns the number of its tokens.

        Args:
          start: position of the first token.
        """
        size, count = self._chunk(len(tokens))
        entries = _least(self._chunk_counts, start + count)
        padded = _padded(tokens[:count], size)
        self._prefill(entries, Place(lane, start), padded)
        return count

    def copy(self, source: int, target: int, count: int) -> None:
        """Begins to copy the first `count` entries of one lane to another."""
        entries = _least(self._chunk_counts, count)
        self._copy(entries, source, target)

    def score(
        self, lane: int, start: int, tokens: Sequence[int]
    ) -> tuple[int, jax.Array]:
        """As `prefill`, of all tokens but the last, with the tokens that follow each of them.

        Returns also their packed rows, of which the first ones are those of the chunk's tokens.
        """
        _, count = self._chunk(len(tokens) - 1)
        size = self._chunks[-1]
        entries = _least(self._chunk_counts, start + count)
        padded, targets = _padded(tokens[:count], size), tokens[1 : count + 1]
        place = Place(lane, start)
        return count, self._score(entries, place, padded, _padded(targets, size))

    def wait(self) -> None:
        """Waits until everything that was begun has ended."""
        jax.block_until_ready(self._cache)

    def compile(self) -> None:
        """Runs every program once, on entries that belong to no token."""
        lanes = np.zeros(self.lanes, np.int32)
        step = Step(lanes, lanes, lanes + self.spare, lanes)
        behind = Place(0, self.length)
        for entries in self._counts:
            self._decode(entries, step, self._no_mask)
            self._decode(entries, step, self._no_mask, slice(0, 1))
        for entries in self._chunk_counts:
            self._copy(entries, 0, 0)
            for size in self._chunks:
                self._prefill(entries, behind, _padded([], size))
            padded = _padded([], self._chunks[-1])
            self._score(entries, behind, padded, padded)
        self.wait()

    def _decode(
        self, entries: int, step: Step, mask: Any, lanes: slice = slice(0, None)
    ) -> jax.Array:
        self._cache, packed = programs.decode(
            self._model,
            entries,
            self._alternatives,
            self._params,
            self._cache,
            np.stack(step).astype(np.int32)[:, lanes],
            np.int32(lanes.start),
            self._settings,
            mask,
        )
        return packed

    def _copy(self, entries: int, source: int, target: int) -> None:
        lanes = np.array([source, target], np.int32)
        self._cache = programs.copy(entries, self._cache, lanes)

    def _prefill(self, entries: int, place: Place, tokens: np.ndarray) -> None:
        where = np.array(place, np.int32)
        self._cache = programs.prefill(
            self._model, entries, self._params, self._cache, where, tokens
        )

    def _score(
        self, entries: int, place: Place, tokens: np.ndarray, targets: np.ndarray
    ) -> jax.Array:
        self._cache, packed = programs.score(
            self._model,
            entries,
            self._alternatives,
            self._params,
            self._cache,
            np.array(place, np.int32),
            tokens,
            targets,
        )
        return packed

    def _chunk(self, rest: int) -> tuple[int, int]:
        """Returns the size of the next chunk, and how many of `rest` tokens it takes."""
        size = _least(self._chunks, rest)
        return size, min(size, rest)

    def _empty(self) -> LaneCache:
        return empty_lanes(self._model, self.lanes, self._entries, begins_again=True)


def _validate_sizes(model: Model, lanes: int, length: int, chunk: int) -> None:
    if model.head != "lm":
        raise ConfigError(
            f"serve: needs a language model, this one has a {model.head} head"
        )
    for name, value in {"lanes": lanes, "length": length, "chunk": chunk}.items():
        if value < 1:
            raise ConfigError(f"{name}={value}: must be >= 1")
    context = model.config.max_length
    if length > context:
        raise ConfigError(
            f"length={length}: must be <= the model's context of {context} tokens"
        )


def _least(sizes: Sequence[int], needed: int) -> int:
    """Returns the smallest of ascending sizes that is large enough, else the largest."""
    return next((size for size in sizes if size >= needed), sizes[-1])


def _padded(tokens: Sequence[int], size: int) -> np.ndarray:
    padded = np.zeros(size, np.int32)
    padded[: len(tokens)] = tokens
    return padded
