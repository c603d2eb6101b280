"""A key/value cache whose rows, the lanes, each have their own length, and what runs over it.

Entry e of a lane holds the token at position e, in every layer. So a lane's first n entries are
those of its first n tokens, whatever was written after them, and another response can begin behind
any of them. A window layer keeps all entries too, and masks the distant ones: a ring of the last
`window` has lost what a shorter beginning needs.

A token sees the entries up to its own position. Entries behind it may hold anything finite; they
are written before a token sees them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.models import kinds, quantized
from rlhfjax.models.attention import attend, cached_attention
from rlhfjax.models.lora import Params
from rlhfjax.models.quantized import Quantized
from rlhfjax.models.transformer import Model

Layer = jax.Array | Quantized  # [l, kv_heads, entries, head_dim]


class LaneCache(NamedTuple):
    """Keys and values of l lanes: one array per layer, int8 if the model's cache is."""

    k: tuple[Layer, ...]
    v: tuple[Layer, ...]


def empty_lanes(model: Model, lanes: int, entries: int) -> LaneCache:
    """Returns a cache of zeros."""
    c = model.config
    shape = (lanes, c.kv_heads, entries, c.head_dim)

    def layer() -> Layer:
        if not model.int8_cache:
            return jnp.zeros(shape, c.activation_dtype)
        scale = jnp.zeros(shape[:3], jnp.float32)
        return Quantized(values=jnp.zeros(shape, jnp.int8), scale=scale)

    k = tuple(layer() for _ in range(c.n_layers))
    v = tuple(layer() for _ in range(c.n_layers))
    return LaneCache(k, v)


def decode_lanes(
    model: Model,
    params: Params,
    cache: LaneCache,
    token: Int[Array, " l"],
    position: Int[Array, " l"],
    entry: Int[Array, " l"],
    entries: int,
    first: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, "l d"], LaneCache]:
    """Runs a token of each of l lanes from `first` on; returns their hidden states and the cache.

    Args:
      entry: where its keys and values are written: its position. For a lane without a token, an
        entry behind all that are in use.
      entries: how many of each lane are read; more than every position.
    """
    k, v = list(cache.k), list(cache.v)
    scoring = kinds.scoring_of(model.config)
    visible = _visible_by_kind(model, position[:, None], entries)
    write = functools.partial(_write_tokens, entry=entry, first=first)
    lanes = token.shape[0]
    read = functools.partial(_read_lanes, first=first, lanes=lanes, entries=entries)

    def attend_layer(i, q, new_k, new_v):
        k[i], v[i] = write(k[i], new_k), write(v[i], new_v)
        valid = visible[kinds.index_of(model.config, i)][:, 0]
        out = cached_attention(q[:, :, 0], read(k[i]), read(v[i]), valid, scoring)
        return out[:, :, None]

    hidden = model.run(params, token[:, None], position[:, None], attend_layer)
    return hidden[:, 0], LaneCache(tuple(k), tuple(v))


def prefill_lane(
    model: Model,
    params: Params,
    cache: LaneCache,
    lane: Int[Array, ""],
    tokens: Int[Array, " c"],
    start: Int[Array, ""],
    entries: int,
) -> tuple[Float[Array, "c d"], LaneCache]:
    """Runs consecutive tokens of one lane; returns their hidden states and the cache.

    They are written to the entries from `start` on. Tokens of padding may follow the real ones:
    what is written for them is not seen before it is overwritten.

    Args:
      start: position of the first token; the cache has room for all c behind it.
      entries: how many of the lane are read; more than the position of the last real token.
    """
    c = model.config
    k, v = list(cache.k), list(cache.v)
    place = start + jnp.arange(tokens.shape[0], dtype=jnp.int32)[None]
    visible = _visible_by_kind(model, place, entries)
    # Padding may lie behind the last position that the model has.
    positions = jnp.minimum(place, c.max_length - 1)
    write = functools.partial(_write_chunk, lane=lane, start=start)
    read = functools.partial(_read_lane, lane=lane, entries=entries)

    def attend_layer(i, q, new_k, new_v):
        q, new_k, new_v = (x.swapaxes(0, 2) for x in (q, new_k, new_v))
        k[i], v[i] = write(k[i], new_k), write(v[i], new_v)
        mask = visible[kinds.index_of(c, i)]
        out = attend(q, read(k[i]), read(v[i]), mask, kinds.scoring_of(c))
        return out.swapaxes(0, 2)

    # As rows of one token each: products with int8 kernels are faster then (models.few_rows).
    hidden = model.run(params, tokens[:, None], positions[0, :, None], attend_layer)
    return hidden[:, 0], LaneCache(tuple(k), tuple(v))


def _visible_by_kind(
    model: Model, position: Int[Array, "b t"], entries: int
) -> tuple[Bool[Array, "b t s"], ...]:
    """Returns which entries the tokens at these positions see, for each kind of layer."""
    c = model.config
    entry = jnp.arange(entries, dtype=jnp.int32)
    distance = position[..., None] - entry
    everything = distance >= 0

    def visible(kind: str) -> jax.Array:
        if kind != "window" or c.window is None:
            return everything
        return everything & (distance < c.window)

    return tuple(visible(kind) for kind in c.kinds)


# ------------------------------------------------------------------ one layer


def _as_stored(cached: Layer, new: Float[Array, "b g t k"]) -> Layer:
    """Returns keys or values in the form of the cache."""
    if isinstance(cached, Quantized):
        return quantized.absmax(new, (3,))
    return new


def _write_tokens(
    cached: Layer,
    new: Float[Array, "l g 1 k"],
    *,
    entry: Int[Array, " l"],
    first: Int[Array, ""] | int,
) -> Layer:
    lanes = first + jnp.arange(entry.shape[0])

    def write(old, x):
        return old.at[lanes, :, entry].set(
            x[:, :, 0], unique_indices=True, indices_are_sorted=True
        )

    return jax.tree.map(write, cached, _as_stored(cached, new))


def _write_chunk(
    cached: Layer,
    new: Float[Array, "1 g c k"],
    *,
    lane: Int[Array, ""],
    start: Int[Array, ""],
) -> Layer:
    def write(old, x):
        where = (lane, 0, start, 0)[: old.ndim]
        return jax.lax.dynamic_update_slice(old, x, where)

    return jax.tree.map(write, cached, _as_stored(cached, new))


def _read_lanes(
    cached: Layer, *, first: Int[Array, ""] | int, lanes: int, entries: int
) -> Layer:
    def read(x):
        return jax.lax.dynamic_slice_in_dim(x, first, lanes)[:, :, :entries]

    return jax.tree.map(read, cached)


def _read_lane(cached: Layer, *, lane: Int[Array, ""], entries: int) -> Any:
    """Returns the first entries of one lane, dequantized."""

    def read(x):
        one = jax.lax.dynamic_index_in_dim(x, lane, axis=0)
        return one[:, :, :entries]

    if isinstance(cached, Quantized):
        return read(cached.values) * read(cached.scale)[..., None]
    return read(cached)
