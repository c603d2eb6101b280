"""The compiled programs of the engine: fixed shapes, so that nothing is compiled while it serves.

The cache stays on the device and is donated to every program. A program takes small arrays from the
host and returns one small array to it. Each exists for a few numbers of cache entries that it
reads, because attention over entries that no lane has filled takes as long as over full ones.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from rlhfjax.models.lanes import LaneCache, copy_lane, decode_lanes, prefill_lane
from rlhfjax.models.lora import Params
from rlhfjax.models.transformer import Model
from rlhfjax.sampling.lanes import Drawn, Settings, draw, look_up

FEWEST_ENTRIES = (
    256  # that a decode step reads; others read 2 times, 4 times, … as many
)


class Step(NamedTuple):
    """What a decode step takes of each of l lanes."""

    token: Any  # int [l], the last one of the lane
    position: Any  # int [l], its position
    entry: Any  # int [l], where its keys and values go
    index: Any  # int [l], number of tokens drawn before


class Place(NamedTuple):
    """Where a chunk of a prompt goes."""

    lane: Any  # int
    start: Any  # int, position of its first token


def entry_counts(length: int) -> tuple[int, ...]:
    """Returns the numbers of entries that decode steps read, the last one `length`."""
    counts = []
    count = FEWEST_ENTRIES
    while count < length:
        counts.append(count)
        count *= 2
    return (*counts, length)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode(
    model: Model,
    entries: int,
    alternatives: int,
    params: Params,
    cache: LaneCache,
    step: Int[Array, "4 l"],
    first: Int[Array, ""],
    settings: Settings,
    mask: UInt32[Array, "n w"],
) -> tuple[LaneCache, Int[Array, "l z"]]:
    """Runs the last token of l lanes and draws the next. Returns the cache and packed tokens.

    Args:
      step: a Step of these lanes, stacked.
      first: the first of them.
      settings, mask: of all n lanes.
    """
    token, position, entry, index = step
    lanes = token.shape[0]
    settings, mask = jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, first, lanes), (settings, mask)
    )
    hidden, cache = decode_lanes(
        model, params, cache, token, position, entry, entries, first
    )
    logits = model.sampling_logits(params, hidden)
    return cache, _pack(draw(logits, index, settings, mask, alternatives))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def prefill(
    model: Model,
    entries: int,
    params: Params,
    cache: LaneCache,
    place: Int[Array, " 2"],
    tokens: Int[Array, " c"],
) -> LaneCache:
    """Runs a chunk of a prompt. Returns the cache.

    Args:
      place: a Place, stacked.
    """
    lane, start = place
    return prefill_lane(model, params, cache, lane, tokens, start, entries)[1]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def copy(entries: int, cache: LaneCache, lanes: Int[Array, " 2"]) -> LaneCache:
    """Copies the first entries of lanes[0] to lanes[1]. Returns the cache."""
    return copy_lane(cache, lanes[0], lanes[1], entries)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def score(
    model: Model,
    entries: int,
    alternatives: int,
    params: Params,
    cache: LaneCache,
    place: Int[Array, " 2"],
    tokens: Int[Array, " c"],
    targets: Int[Array, " c"],
) -> tuple[LaneCache, Int[Array, "c z"]]:
    """Runs a chunk of a prompt. Returns the cache, and packed targets.

    Args:
      targets: the tokens that follow those of the chunk.
    """
    lane, start = place
    hidden, cache = prefill_lane(model, params, cache, lane, tokens, start, entries)
    logits = model.sampling_logits(params, hidden)
    return cache, _pack(look_up(logits, targets, jnp.array(True), alternatives))


def _pack(drawn: Drawn) -> Int[Array, "n z"]:
    """Returns what was drawn as one array, so that the host waits for one transfer."""
    columns = (
        drawn.token[:, None],
        _bits(drawn.logprob)[:, None],
        drawn.top,
        _bits(drawn.top_logprob),
    )
    return jnp.concatenate(columns, axis=1)


def _bits(x: Float[Array, "*n"]) -> Int[Array, "*n"]:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def unpack(packed: Any) -> Drawn:
    """Returns what was drawn, on the host."""
    array: Any = np.asarray(packed)
    alternatives = (array.shape[1] - 2) // 2
    top, top_bits = array[:, 2 : 2 + alternatives], array[:, 2 + alternatives :]
    return Drawn(
        token=array[:, 0],
        logprob=_floats(array[:, 1]),
        top=top,
        top_logprob=_floats(top_bits),
    )


def _floats(bits: np.ndarray) -> Any:
    return np.ascontiguousarray(bits).view(np.float32)
