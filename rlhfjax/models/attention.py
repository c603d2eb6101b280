"""Scaled dot-product attention: causal over a whole sequence, and one query against a cache.

Layout is [b, h, t, k] (heads before time), so that every product is a plain batch of matrix products. With grouped
keys (GQA) the queries that share a key head are stacked along time: no key is ever repeated.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

MASKED = -1e30  # finite: a row of nothing but masked scores stays free of NaN
QUERY_BLOCK = 128  # queries a block; a block sees only the keys up to its own end, so about half the work is skipped


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Inverted dropout: x * Bernoulli(1 - rate) / (1 - rate); the identity without a key or a rate."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def rope_tables(
    positions: Int[Array, "*b"], head_dim: int, theta: float
) -> tuple[Float[Array, "*b half"], Float[Array, "*b half"]]:
    """cos and sin of position * theta^(-2i / head_dim), i = 0 .. head_dim/2 - 1, float32 (Su et al. 2021, eq. 15)."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "b h t k"], tables: tuple[Float[Array, "b t half"], Float[Array, "b t half"]]
) -> Float[Array, "b h t k"]:
    """Rotate each pair (x_i, x_{i + k/2}) by its position's angle: the half-split layout of Hugging Face's Llama."""
    cos, sin = (table[:, None] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _attend(q, k, v, allowed, rate, key):
    """softmax(q k^T / sqrt(d)) v over the allowed keys; q [b,h,t,d], k and v [b,g,s,d], allowed [b|1,t,s]."""
    b, h, t, d = q.shape
    g, s = k.shape[1:3]
    stacked = (q * d**-0.5).reshape(b, g, h // g * t, d)
    scores = jnp.einsum("bgtd,bgsd->bgts", stacked, k, preferred_element_type=jnp.float32)
    scores = jnp.where(allowed[:, None, None], scores.reshape(b, g, h // g, t, s), MASKED)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - top)
    # Dividing the [t, d] output costs less than dividing the [t, s] weights; dropout acts on the same ratio.
    total = weights.sum(-1).reshape(b, h, t, 1)
    weights = dropout(weights, rate, key).reshape(b, g, h // g * t, s).astype(v.dtype)
    out = jnp.einsum("bgts,bgsd->bgtd", weights, v, preferred_element_type=jnp.float32)
    return (out.reshape(b, h, t, d) / total).astype(q.dtype)


def _allowed(segments, start, stop):
    """Which keys 0 .. stop the queries start .. stop may see: causal, same segment; padding sees only itself."""
    query = jnp.arange(start, stop)[:, None]
    slot = jnp.arange(stop)[None, :]
    causal = (slot <= query)[None]
    if segments is None:
        return causal
    theirs, mine = segments[:, None, :stop], segments[:, start:stop, None]
    return (causal & (theirs == mine) & (theirs > 0)) | (slot == query)


def causal_attention(
    q: Float[Array, "b h t k"],
    k: Float[Array, "b g t k"],
    v: Float[Array, "b g t k"],
    segments: Int[Array, "b t"] | None = None,
    *,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "b h t k"]:
    """Causal attention within segments.

    A query at slot i sees slot j iff j <= i, segments[i] == segments[j] and j is not padding (segment 0); a padding
    query sees itself alone, so that nothing is NaN. Segments None: plain causal.
    Returns [b, h, t, k] in q's dtype; the softmax is float32. `rate` drops attention weights when a key is given.
    Source: Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al. 2023.
    """
    t = q.shape[2]
    blocks = []
    for i, start in enumerate(range(0, t, QUERY_BLOCK)):
        stop = min(start + QUERY_BLOCK, t)
        block_key = None if key is None else jax.random.fold_in(key, i)
        seen = slice(None), slice(None), slice(0, stop)
        allowed = _allowed(segments, start, stop)
        blocks.append(_attend(q[:, :, start:stop], k[seen], v[seen], allowed, rate, block_key))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=2)


def cached_attention(
    q: Float[Array, "b h k"], k: Float[Array, "b g s k"], v: Float[Array, "b g s k"], valid: Bool[Array, "b s"]
) -> Float[Array, "b h k"]:
    """Attention of one query a row over the valid slots of a cache; returns [b, h, k]."""
    return _attend(q[:, :, None], k, v, valid[:, None], 0.0, None)[:, :, 0]
