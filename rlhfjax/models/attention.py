"""Scaled dot-product attention: causal over a whole sequence, and one query against a cache.

The layout is [b, h, t, k], heads before time, so that every product is a plain batch of matrix
products. With grouped keys (GQA) the queries that share a key head have an axis of their own,
[b, g, h / g, t, k]. So no key is repeated, and the time axis can be split over devices; an axis of
heads and time stacked together could not.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.linear import transposed
from rlhfjax.models.quantized import Quantized

# The score of a masked key. It is finite, so that a row with only masked scores has no NaN.
MASKED = -1e30
# Queries per block. A block skips the keys after its end, which saves about half of the work.
QUERY_BLOCK = 128

RopeTables = tuple[Float[Array, "b t half"], Float[Array, "b t half"]]
"""cos and sin of the angle of each position, float32."""


def dropout(
    x: Float[Array, "..."],
    rate: float,
    key: Key[Array, ""] | None,
) -> Float[Array, "..."]:
    """Returns x * Bernoulli(1 - rate) / (1 - rate), or x itself without a key or a rate."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def rope_tables(
    positions: Int[Array, "*b"],
    dim: int,
    theta: float,
) -> tuple[Float[Array, "*b half"], Float[Array, "*b half"]]:
    """Returns cos and sin of position * theta^(-2i / dim), i = 0 .. dim/2 - 1, in float32.

    Source: Su et al. 2021, eq. 15.
    """
    frequency = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rope_of(
    config: TransformerConfig,
    positions: Int[Array, "b t"],
) -> RopeTables | None:
    """Returns the RoPE tables of a model at `positions`; None if it has learned positions."""
    if config.positions != "rope":
        return None
    return rope_tables(positions, config.rope_dim, float(config.rope_theta))


def rotate(
    x: Float[Array, "b h t k"],
    tables: RopeTables,
) -> Float[Array, "b h t k"]:
    """Rotates each pair (x_i, x_{i + half}) by the angle of its position.

    This is the half-split layout of Hugging Face's Llama. If the tables are for fewer than k
    dimensions, only the first 2 half of them are rotated (GPT-NeoX).
    """
    dim = 2 * tables[0].shape[-1]
    if dim < x.shape[-1]:
        rotated = rotate(x[..., :dim], tables)
        return jnp.concatenate([rotated, x[..., dim:]], axis=-1)
    cos, sin = (table[:, None, :, None] for table in tables)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    # Reversing an axis swaps the halves; concatenating them is several times slower on a CPU.
    sign = jnp.array([-1.0, 1.0])[:, None]
    rotated = pairs * cos + pairs[..., ::-1, :] * (sin * sign)
    return rotated.reshape(x.shape).astype(x.dtype)


@jax.custom_vjp
def _attend(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b g s d"],
    v: Float[Array, "b g s d"],
    allowed: Bool[Array, "_ t s"],
    drop: Float[Array, "b h t s"] | None,
) -> Float[Array, "b h t d"]:
    """Returns softmax(q k^T / sqrt(d)) v over the allowed keys.

    Args:
      allowed: of each row, or the same for all rows.
      drop: factors of the attention weights, 0 or 1 / (1 - rate).
    """
    return _attend_forward(q, k, v, allowed, drop)[0]


def _attend_forward(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b g s d"],
    v: Float[Array, "b g s d"],
    allowed: Bool[Array, "_ t s"],
    drop: Float[Array, "b h t s"] | None,
):
    b, h, t, d = q.shape
    g, s = k.shape[1:3]
    grouped = (q * d**-0.5).reshape(b, g, h // g, t, d)
    scores = jnp.einsum(
        "bgrtd,bgsd->bgrts", grouped, k, preferred_element_type=jnp.float32
    )
    scores = jnp.where(allowed[:, None], scores.reshape(b, h, t, s), MASKED)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    # Dividing the output [t, d] by the sum costs less than dividing the weights [t, s].
    total = weights.sum(-1, keepdims=True)
    weights = weights.astype(v.dtype)
    kept = _times(weights, drop).reshape(b, g, h // g, t, s)
    out = jnp.einsum("bgrts,bgsd->bgrtd", kept, v, preferred_element_type=jnp.float32)
    out = out.reshape(b, h, t, d) / total
    out = out.astype(q.dtype)
    return out, (grouped, k, v, drop, weights, total, out)


def _attend_backward(saved, d_out):
    """Returns the gradients of q, k and v.

    With w = e / total: dw = d_out v^T, de = (dw - out . d_out) / total, and dscores = e de, which
    is 0 where e is masked. The products that sum over queries are computed as [d, s] and then
    transposed, because transposing [t, s] costs more.
    """
    q, k, v, drop, weights, total, out = saved
    b, h, t, d = out.shape
    g, s = k.shape[1:3]
    d_sum = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True) / total
    d_out = jax.lax.optimization_barrier((d_out / total).astype(v.dtype))
    d_out = d_out.reshape(q.shape)
    kept = _times(weights, drop).reshape(b, g, h // g, t, s)
    d_v = transposed(jnp.einsum("bgrtd,bgrts->bgds", d_out, kept))
    d_kept = jnp.einsum(
        "bgrtd,bgsd->bgrts", d_out, v, preferred_element_type=jnp.float32
    )
    d_kept = d_kept.reshape(b, h, t, s)
    d_scores = weights * (_times(d_kept, drop) - d_sum)
    d_scores = d_scores.astype(v.dtype).reshape(kept.shape)
    d_scores = jax.lax.optimization_barrier(d_scores)
    d_q = jnp.einsum("bgrts,bgsd->bgrtd", d_scores, k) * d**-0.5
    d_k = transposed(jnp.einsum("bgrtd,bgrts->bgds", q, d_scores))
    return d_q.reshape(b, h, t, d), d_k, d_v, None, None


def _times(
    x: Float[Array, "b h t s"],
    drop: Float[Array, "b h t s"] | None,
) -> Float[Array, "b h t s"]:
    return x if drop is None else x * drop.astype(x.dtype)


_attend.defvjp(_attend_forward, _attend_backward)


def allowed(
    segment_ids: Int[Array, "b t"] | None,
    start: int,
    stop: int,
) -> Bool[Array, "_ q s"]:
    """Returns which of the keys 0 .. stop the queries start .. stop may see: [b or 1, q, s].

    These are the earlier keys of the query's own document. Padding sees only itself.
    """
    query = jnp.arange(start, stop)[:, None]
    key = jnp.arange(stop)[None, :]
    causal = (key <= query)[None]
    if segment_ids is None:
        return causal
    key_ids = segment_ids[:, None, :stop]
    query_ids = segment_ids[:, start:stop, None]
    return (causal & (key_ids == query_ids) & (key_ids > 0)) | (key == query)


def causal_attention(
    q: Float[Array, "b h t k"],
    k: Float[Array, "b g t k"],
    v: Float[Array, "b g t k"],
    segment_ids: Int[Array, "b t"] | None = None,
    *,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "b h t k"]:
    """Returns the output of causal attention within documents, in q's dtype.

    Query i sees key j if j <= i, both have the same segment id, and j is not padding (id 0). A
    query on padding sees only itself, so that nothing is NaN. The softmax is in float32.

    Args:
      segment_ids: document ids; None is plain causal attention.
      rate: dropout rate of the attention weights, used if a key is given.

    Source: Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al. 2023.
    """
    t = q.shape[2]
    blocks = []
    for i, start in enumerate(range(0, t, QUERY_BLOCK)):
        stop = min(start + QUERY_BLOCK, t)
        drop = None
        if key is not None and rate > 0:
            ones = jnp.ones((*q.shape[:2], stop - start, stop))
            drop = dropout(ones, rate, jax.random.fold_in(key, i))
        block = _attend(
            q[:, :, start:stop],
            k[:, :, :stop],
            v[:, :, :stop],
            allowed(segment_ids, start, stop),
            drop,
        )
        blocks.append(block)
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=2)


def cached_attention(
    q: Float[Array, "b h k"],
    k: Float[Array, "b g s k"] | Quantized,
    v: Float[Array, "b g s k"] | Quantized,
    valid: Bool[Array, "b s"],
) -> Float[Array, "b h k"]:
    """Returns the attention of one query per row over the valid entries of a cache.

    A quantized cache has one scale per entry and head. The scales multiply scores and weights, so
    that no key or value is dequantized outside of the products.
    """
    if isinstance(k, Quantized):
        assert isinstance(v, Quantized)
        return _cached_int8(q, k, v, valid)
    return _attend(q[:, :, None], k, v, valid[:, None], None)[:, :, 0]


def _cached_int8(
    q: Float[Array, "b h k"],
    k: Quantized,
    v: Quantized,
    valid: Bool[Array, "b s"],
) -> Float[Array, "b h k"]:
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
    weights = jax.nn.softmax(scores, axis=-1) * v.scale[:, :, None]
    out = jnp.einsum(
        "bghs,bgsd->bghd",
        weights.astype(q.dtype),
        v.values.astype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    return out.astype(q.dtype).reshape(b, h, d)
