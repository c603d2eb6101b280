"""A key/value cache whose rows, the lanes, each have their own length, and what runs over it.

It is what rollouts with continuous batching and the server decode with. Entry e of a lane holds the
token at position e, in every layer. So a lane's first n entries are those of its first n tokens,
whatever was written after them, and another response can begin behind any of them.

A token sees the entries up to its own position. Entries behind it may hold anything finite; they
are written before a token sees them.

A window layer may keep the last `window` tokens alone, the one at position e in entry e mod window.
That takes less memory, but it has lost what a shorter beginning needs: rollouts, which begin every
response in an empty lane, keep the last ones, and the server keeps all.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.models import kinds, quantized
from rlhfjax.models.attention import attend, cached_attention
from rlhfjax.models.cache import Cache, empty_layer
from rlhfjax.models.lora import Params
from rlhfjax.models.quantized import Quantized
from rlhfjax.models.transformer import Model

Layer = jax.Array | Quantized  # [l, kv_heads, entries, head_dim]


class LaneCache(NamedTuple):
    """Keys and values of l lanes: one array per layer, int8 if the model's cache is."""

    k: tuple[Layer, ...]
    v: tuple[Layer, ...]


def empty_lanes(
    model: Model, lanes: int, entries: int, *, begins_again: bool
) -> LaneCache:
    """Returns a cache of zeros.

    Args:
      begins_again: whether a response may begin behind some of a lane's tokens, so that window
        layers keep all of them.
    """
    c = model.config

    def layer(i: int) -> Layer:
        kept = entries
        if c.kind(i) == "window" and c.window is not None and not begins_again:
            kept = min(c.window, entries)
        return empty_layer(c, lanes, kept, model.int8_cache)

    k = tuple(layer(i) for i in range(c.n_layers))
    v = tuple(layer(i) for i in range(c.n_layers))
    return LaneCache(k, v)


def fill_lanes(
    cache: LaneCache, prompts: Cache, lanes: Int[Array, " m"], padding: Int[Array, " m"]
) -> LaneCache:
    """Returns the cache with some lanes replaced by prompts.

    Args:
      prompts: what `Model.prefill` wrote for m left-padded prompts.
      padding: number of padding tokens before each.
    """

    def fill(old: jax.Array, new: jax.Array) -> jax.Array:
        # The token at position e moves from entry padding + e to e. Of a window layer that has
        # wrapped, both are modulo the window.
        moved = jax.vmap(lambda x, n: jnp.roll(x, -n, axis=1))(new, padding)
        return old.at[lanes, :, : new.shape[2]].set(moved, unique_indices=True)

    k, v = jax.tree.map(fill, (cache.k, cache.v), (prompts.k, prompts.v))
    return LaneCache(k, v)


def copy_lane(
    cache: LaneCache, source: Int[Array, ""], target: Int[Array, ""], entries: int
) -> LaneCache:
    """Returns the cache with the first entries of one lane in another one too."""

    def copy(x: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_slice_in_dim(x, source, 1)[:, :, :entries]
        where = (target, *(0,) * (x.ndim - 1))
        return jax.lax.dynamic_update_slice(x, one, where)

    return jax.tree.map(copy, cache)


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
      entry: where its keys and values are written: its position. For a lane without a token that
        will begin again, an entry behind all that are in use.
      entries: how many of each lane are read; more than every position.
    """
    k, v = list(cache.k), list(cache.v)
    scoring = kinds.scoring_of(model.config)
    visible = _visible_by_kind(model, cache, position[:, None], entries)
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
    visible = _visible_by_kind(model, cache, place, entries)
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
    model: Model, cache: LaneCache, position: Int[Array, "b t"], entries: int
) -> tuple[Bool[Array, "b t s"], ...]:
    """Returns which entries the tokens at these positions see, for each kind of layer."""
    c = model.config

    def visible(kind: str) -> jax.Array:
        layer = next(i for i in range(c.n_layers) if c.kind(i) == kind)
        kept = _kept(cache.k[layer])
        entry = jnp.arange(min(entries, kept), dtype=jnp.int32)
        # How long ago the token of an entry was; longer than the response, if it has none.
        distance = (position[..., None] - entry) % kept
        is_past = distance <= position[..., None]
        if kind != "window" or c.window is None:
            return is_past
        return is_past & (distance < c.window)

    return tuple(visible(kind) for kind in c.kinds)


# ------------------------------------------------------------------ one layer


def _kept(cached: Layer) -> int:
    """Returns how many entries a layer keeps of each lane."""
    return jax.tree.leaves(cached)[0].shape[2]


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
    lanes, place = first + jnp.arange(entry.shape[0]), entry % _kept(cached)

    def write(old, x):
        return old.at[lanes, :, place].set(
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
        if lanes < x.shape[0]:
            x = jax.lax.dynamic_slice_in_dim(x, first, lanes)
        return x[:, :, :entries]

    return jax.tree.map(read, cached)


def _read_lane(cached: Layer, *, lane: Int[Array, ""], entries: int) -> Any:
    """Returns the first entries of one lane, dequantized."""

    def read(x):
        one = jax.lax.dynamic_index_in_dim(x, lane, axis=0)
        return one[:, :, :entries]

    if isinstance(cached, Quantized):
        return read(cached.values) * read(cached.scale)[..., None]
    return read(cached)
