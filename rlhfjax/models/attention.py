"""Scaled dot-product attention: causal over a whole sequence, and one query against a cache.

Layout is [b, h, t, k] (heads before time), so that every product is a plain batch of matrix products. With grouped
keys (GQA) the queries that share a key head are an axis of their own, [b, g, h / g, t, k]: no key is ever repeated, and
the time axis can be split over devices, which it could not be where heads and time are stacked into one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from rlhfjax.models.linear import transposed
from rlhfjax.models.quantized import Quantized

MASKED = -1e30  # finite: a row of nothing but masked scores stays free of NaN
QUERY_BLOCK = 128  # queries a block; a block sees only the keys up to its own end, so about half the work is skipped


def dropout(
    x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None
) -> Float[Array, "..."]:
    """Inverted dropout: x * Bernoulli(1 - rate) / (1 - rate); the identity without a key or a rate."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def rope_tables(
    positions: Int[Array, "*b"], dim: int, theta: float
) -> tuple[Float[Array, "*b half"], Float[Array, "*b half"]]:
    """cos and sin of position * theta^(-2i / dim), i = 0 .. dim/2 - 1, float32 (Su et al. 2021, eq. 15)."""
    frequency = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "b h t k"],
    tables: tuple[Float[Array, "b t half"], Float[Array, "b t half"]],
) -> Float[Array, "b h t k"]:
    """Rotate each pair (x_i, x_{i + half}) by its position's angle: the half-split layout of Hugging Face's Llama.

    Tables for fewer than k dimensions rotate the first 2 half of them and leave the rest (GPT-NeoX).
    """
    if (dim := 2 * tables[0].shape[-1]) < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :dim], tables), x[..., dim:]], axis=-1)
    cos, sin = (table[:, None, :, None] for table in tables)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    # Halves change places by a reversed axis: a concatenation of them costs several times as much on a CPU.
    sign = jnp.array([-1.0, 1.0])[:, None]
    return (
        (pairs * cos + pairs[..., ::-1, :] * (sin * sign))
        .reshape(x.shape)
        .astype(x.dtype)
    )


@jax.custom_vjp
def _attend(q, k, v, allowed, drop):
    """softmax(q k^T / sqrt(d)) v over the allowed keys, the weights times `drop` if it is given.

    q [b, h, t, d]; k, v [b, g, s, d]; allowed [b or 1, t, s]; drop [b, h, t, s], 0 or 1 / (1 - rate), or None.
    """
    return _attend_forward(q, k, v, allowed, drop)[0]


def _attend_forward(q, k, v, allowed, drop):
    b, h, t, d = q.shape
    g, s = k.shape[1:3]
    grouped = (q * d**-0.5).reshape(b, g, h // g, t, d)
    scores = jnp.einsum(
        "bgrtd,bgsd->bgrts", grouped, k, preferred_element_type=jnp.float32
    )
    scores = jnp.where(allowed[:, None], scores.reshape(b, h, t, s), MASKED)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(
        -1, keepdims=True
    )  # dividing the [t, d] output costs less than dividing the [t, s] weights
    weights = weights.astype(v.dtype)
    kept = _times(weights, drop).reshape(b, g, h // g, t, s)
    out = (
        jnp.einsum(
            "bgrts,bgsd->bgrtd", kept, v, preferred_element_type=jnp.float32
        ).reshape(b, h, t, d)
        / total
    )
    out = out.astype(q.dtype)
    return out, (grouped, k, v, drop, weights, total, out)


def _attend_backward(saved, d_out):
    """With w = e / total: dw = d_out v^T, de = (dw - out . d_out) / total, dscores = e de (0 where e is masked).

    The products that sum over queries are made as [d, s] and then transposed: transposing [t, s] costs more.
    """
    q, k, v, drop, weights, total, out = saved
    b, h, t, d = out.shape
    g, s = k.shape[1:3]
    d_sum = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True) / total
    d_out = jax.lax.optimization_barrier((d_out / total).astype(v.dtype)).reshape(
        q.shape
    )
    kept = _times(weights, drop).reshape(b, g, h // g, t, s)
    d_v = transposed(jnp.einsum("bgrtd,bgrts->bgds", d_out, kept))
    d_kept = jnp.einsum(
        "bgrtd,bgsd->bgrts", d_out, v, preferred_element_type=jnp.float32
    ).reshape(b, h, t, s)
    d_scores = (
        (weights * (_times(d_kept, drop) - d_sum)).astype(v.dtype).reshape(kept.shape)
    )
    d_scores = jax.lax.optimization_barrier(d_scores)
    d_q = jnp.einsum("bgrts,bgsd->bgrtd", d_scores, k) * d**-0.5
    d_k = transposed(jnp.einsum("bgrtd,bgrts->bgds", q, d_scores))
    return d_q.reshape(b, h, t, d), d_k, d_v, None, None


def _times(x, drop):
    return x if drop is None else x * drop.astype(x.dtype)


_attend.defvjp(_attend_forward, _attend_backward)


def allowed(segments, start, stop):
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
        seen = slice(None), slice(None), slice(0, stop)
        drop = None
        if key is not None and rate > 0:
            drop = dropout(
                jnp.ones((*q.shape[:2], stop - start, stop)),
                rate,
                jax.random.fold_in(key, i),
            )
        blocks.append(
            _attend(
                q[:, :, start:stop],
                k[seen],
                v[seen],
                allowed(segments, start, stop),
                drop,
            )
        )
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=2)


def cached_attention(
    q: Float[Array, "b h k"],
    k: Float[Array, "b g s k"] | Quantized,
    v: Float[Array, "b g s k"] | Quantized,
    valid: Bool[Array, "b s"],
) -> Float[Array, "b h k"]:
    """Attention of one query a row over the valid slots of a cache; returns [b, h, k].

    Of a quantized cache the scales, one a slot and head, multiply scores and weights: no key or value is made wide
    but in the products themselves.
    """
    if isinstance(k, Quantized):
        return _cached_int8(q, k, v, valid)
    return _attend(q[:, :, None], k, v, valid[:, None], None)[:, :, 0]


def _cached_int8(q, k, v, valid):
    b, h, d = q.shape
    g = k.values.shape[1]
    grouped = (q * d**-0.5).reshape(b, g, h // g, d)
    scores = jnp.einsum(
        "bghd,bgsd->bghs",
        grouped,
        k.values.astype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    scores = jnp.where(valid[:, None, None], scores * k.scale[:, :, None], MASKED)
    weights = (jax.nn.softmax(scores, axis=-1) * v.scale[:, :, None]).astype(q.dtype)
    out = jnp.einsum(
        "bghs,bgsd->bghd",
        weights,
        v.values.astype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    return out.astype(q.dtype).reshape(b, h, d)
