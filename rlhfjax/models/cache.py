"""The key/value cache of sampling."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.models import quantized
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.quantized import Quantized

CachedLayer = Float[Array, "b g s k"] | Quantized


class Cache(NamedTuple):
    """Keys and values of the tokens run so far: one array per layer, quantized if asked.

    A window layer keeps the last `window` entries: entry e is at place e mod window.
    """

    k: tuple[CachedLayer, ...]  # [b, kv_heads, entries, head_dim] each
    v: tuple[CachedLayer, ...]
    valid: Bool[Array, "b s"]  # entries that hold a real token
    window_valid: Bool[Array, "b w"] | None = None  # the same of the layers with fewer

    def is_window(self, layer: int) -> bool:
        """Returns whether a layer keeps fewer entries than others do."""
        kept = jax.tree.leaves(self.k[layer])[0].shape[2]
        return kept < self.valid.shape[1]

    def place(self, layer: int, entry: Int[Array, ""]) -> Int[Array, ""]:
        """Returns where a layer keeps an entry."""
        if not self.is_window(layer):
            return entry
        assert self.window_valid is not None
        return entry % self.window_valid.shape[1]

    def valid_of(self, layer: int) -> Bool[Array, "b s"]:
        """Returns which entries of a layer hold a real token."""
        if not self.is_window(layer):
            return self.valid
        assert self.window_valid is not None
        return self.window_valid

    def mark(self, new: Bool[Array, "b t"], entry: int | Int[Array, ""]) -> "Cache":
        """Returns the cache with `new` written to the valid entries, from `entry` on."""
        valid = _write(self.valid, new, entry, 1)
        if self.window_valid is None:
            return self._replace(valid=valid)
        window = self.window_valid.shape[1]
        windowed = _write(self.window_valid, new, entry % window, 1)
        return self._replace(valid=valid, window_valid=windowed)


def empty_cache(
    config: TransformerConfig,
    batch: int,
    length: int,
    int8: bool,
) -> Cache:
    """Returns a cache without valid entries, of `length` entries per row."""
    window = length if config.window is None else min(config.window, length)

    def layer(i: int) -> CachedLayer:
        entries = window if config.kind(i) == "window" else length
        return empty_layer(config, batch, entries, int8)

    k = tuple(layer(i) for i in range(config.n_layers))
    v = tuple(layer(i) for i in range(config.n_layers))
    valid = jnp.zeros((batch, length), bool)
    if window == length:
        return Cache(k, v, valid)
    return Cache(k, v, valid, jnp.zeros((batch, window), bool))


def empty_layer(
    config: TransformerConfig, batch: int, entries: int, int8: bool
) -> CachedLayer:
    """Returns zeros for the keys or values of a layer."""
    shape = (batch, config.kv_heads, entries, config.head_dim)
    if int8:
        scale = jnp.zeros(shape[:3], jnp.float32)
        return Quantized(values=jnp.zeros(shape, jnp.int8), scale=scale)
    return jnp.zeros(shape, config.activation_dtype)


def grown(cache: Cache, length: int) -> Cache:
    """Returns a cache without window layers with `length` entries per row, the new ones empty."""
    new = length - cache.valid.shape[1]

    def pad(x: jax.Array, axis: int) -> jax.Array:
        widths = [(0, new if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, widths)

    k, v = jax.tree.map(lambda x: pad(x, 2), (cache.k, cache.v))
    return Cache(k, v, pad(cache.valid, 1))


def write(
    cached: CachedLayer,
    new: Float[Array, "b g t k"],
    place: int | jax.Array,
) -> CachedLayer:
    """Returns a layer's keys or values with `new` at the places from `place` on.

    Of more tokens than there are places, from place 0 on, the last ones are kept: token e at place
    e mod n of n.
    """
    if not isinstance(cached, Quantized):
        return _write(cached, new, place, 2)
    return jax.tree.map(
        lambda old, x: _write(old, x, place, 2), cached, quantized.absmax(new, (3,))
    )


def _write(old, new, place, axis):
    n, t = old.shape[axis], new.shape[axis]
    if t > n:
        last = jax.lax.slice_in_dim(new, t - n, t, axis=axis)
        return jnp.roll(last, t % n, axis)
    return jax.lax.dynamic_update_slice_in_dim(old, new, place, axis)
