"""The key/value cache of sampling."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhfjax.models import quantized
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.quantized import Quantized

CachedLayer = Float[Array, "b g s k"] | Quantized


class Cache(NamedTuple):
    """Keys and values of the tokens run so far: one array per layer, quantized if asked."""

    k: tuple[CachedLayer, ...]  # [b, kv_heads, entries, head_dim] each
    v: tuple[CachedLayer, ...]
    valid: Bool[Array, "b s"]  # entries that hold a real token


def empty_cache(
    config: TransformerConfig,
    batch: int,
    length: int,
    int8: bool,
) -> Cache:
    """Returns a cache without valid entries, of `length` entries per row."""
    shape = (batch, config.kv_heads, length, config.head_dim)

    def empty_layer() -> CachedLayer:
        if int8:
            scale = jnp.zeros(shape[:3], jnp.float32)
            return Quantized(values=jnp.zeros(shape, jnp.int8), scale=scale)
        return jnp.zeros(shape, config.dtype)

    k = tuple(empty_layer() for _ in range(config.n_layers))
    v = tuple(empty_layer() for _ in range(config.n_layers))
    return Cache(k, v, jnp.zeros((batch, length), bool))


def write(
    cached: CachedLayer,
    new: Float[Array, "b g t k"],
    entry: int | jax.Array,
) -> CachedLayer:
    """Returns a layer's keys or values with `new` at the entries from `entry` on."""
    if not isinstance(cached, Quantized):
        return jax.lax.dynamic_update_slice_in_dim(cached, new, entry, 2)
    return jax.tree.map(
        lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, entry, 2),
        cached,
        quantized.absmax(new, (3,)),
    )
