"""Scaled dot-product attention: causal over a whole sequence, and one query against a cache.

The layout is [b, h, t, k], heads before time, so that every product is a plain batch of matrix
products. With grouped keys (GQA) the queries that share a key head have an axis of their own,
[b, g, h / g, t, k]. So no key is repeated, and the time axis can be split over devices; an axis of
heads and time stacked together could not.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from rlhfjax.models.linear import transposed
from rlhfjax.models.quantized import Quantized
from rlhfjax.models.softcap import capped, slope

# The score of a masked key. It is finite, so that a row with only masked scores has no NaN.
MASKED = -1e30
# Queries per block. A block skips the keys after its end, which saves about half of the work.
QUERY_BLOCK = 128


class Scoring(NamedTuple):
    """How attention makes its scores, besides the product of query and key."""

    scale: float | None = None  # factor of the product; None: 1 / sqrt(width of a head)
    softcap: float | None = None  # scores s become c tanh(s / c); None: they stay
    dtype: str | None = None  # of the inputs of the products; None: that of the queries

    def scaled(self, q: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Returns the queries times the scale."""
        return q * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)

    def capped(self, scores: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Returns the scores, capped if there is a cap."""
        return capped(scores, self.softcap)

    def narrowed(self, x: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Returns an input of a product, rounded to its dtype."""
        return x if self.dtype is None else x.astype(self.dtype)


PLAIN = Scoring()


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b g s d"],
    v: Float[Array, "b g s d"],
    allowed: Bool[Array, "_ t s"],
    drop: Float[Array, "b h t s"] | None,
    scoring: Scoring,
) -> Float[Array, "b h t d"]:
    """Returns softmax(scores) v over the allowed keys, with the scores of q k^T by `scoring`.

    Args:
      allowed: of each row, or the same for all rows.
      drop: factors of the attention weights, 0 or 1 / (1 - rate).
    """
    return _attend_forward(q, k, v, allowed, drop, scoring)[0]


def _attend_forward(
    q: Float[Array, "b h t d"],
    k: Float[Array, "b g s d"],
    v: Float[Array, "b g s d"],
    allowed: Bool[Array, "_ t s"],
    drop: Float[Array, "b h t s"] | None,
    scoring: Scoring,
):
    b, h, t, d = q.shape
    g, s = k.shape[1:3]
    grouped = scoring.narrowed(scoring.scaled(q)).reshape(b, g, h // g, t, d)
    k, v = scoring.narrowed(k), scoring.narrowed(v)
    scores = jnp.einsum(
        "bgrtd,bgsd->bgrts", grouped, k, preferred_element_type=jnp.float32
    )
    visible = allowed[:, None]
    scores = scoring.capped(scores.reshape(b, h, t, s))
    d_cap = None if scoring.softcap is None else slope(scores, scoring.softcap)
    scores = jnp.where(visible, scores, MASKED)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    # Dividing the output [t, d] by the sum costs less than dividing the weights [t, s].
    total = weights.sum(-1, keepdims=True)
    weights = weights.astype(v.dtype)
    kept = _times(weights, drop).reshape(b, g, h // g, t, s)
    out = jnp.einsum("bgrts,bgsd->bgrtd", kept, v, preferred_element_type=jnp.float32)
    out = out.reshape(b, h, t, d) / total
    out = out.astype(q.dtype)
    return out, (grouped, k, v, drop, weights, total, out, d_cap)


def _attend_backward(scoring, saved, d_out):
    """Returns the gradients of q, k and v.

    With w = e / total: dw = d_out v^T, de = (dw - out . d_out) / total, and dscores = e de, which
    is 0 where e is masked; a soft cap multiplies it by its slope. The products that sum over
    queries are computed as [d, s] and then transposed, because transposing [t, s] costs more.
    """
    q, k, v, drop, weights, total, out, d_cap = saved
    b, h, t, d = out.shape
    g, s = k.shape[1:3]
    product = functools.partial(jnp.einsum, preferred_element_type=out.dtype)
    d_sum = (d_out.astype(jnp.float32) * out).sum(-1, keepdims=True) / total
    d_out = jax.lax.optimization_barrier((d_out / total).astype(v.dtype))
    d_out = d_out.reshape(q.shape)
    kept = _times(weights, drop).reshape(b, g, h // g, t, s)
    d_v = transposed(product("bgrtd,bgrts->bgds", d_out, kept))
    d_kept = jnp.einsum(
        "bgrtd,bgsd->bgrts", d_out, v, preferred_element_type=jnp.float32
    )
    d_kept = d_kept.reshape(b, h, t, s)
    d_scores = _times(weights * (_times(d_kept, drop) - d_sum), d_cap)
    d_scores = d_scores.astype(v.dtype).reshape(kept.shape)
    d_scores = jax.lax.optimization_barrier(d_scores)
    d_q = scoring.scaled(product("bgrts,bgsd->bgrtd", d_scores, k))
    d_k = transposed(product("bgrtd,bgrts->bgds", q, d_scores))
    return d_q.reshape(b, h, t, d), d_k, d_v, None, None


def _times(
    x: Float[Array, "b h t s"],
    factors: Float[Array, "b h t s"] | None,
) -> Float[Array, "b h t s"]:
    return x if factors is None else x * factors.astype(x.dtype)


_attend.defvjp(_attend_forward, _attend_backward)


def allowed(
    segment_ids: Int[Array, "b t"] | None,
    start: int,
    stop: int,
    window: int | None = None,
) -> Bool[Array, "_ q s"]:
    """Returns which keys the queries start .. stop may see: [b or 1, q, s].

    These are the earlier keys of the query's own document, and with a window only those at a
    distance below it. Padding sees only itself. The keys are `first_key` .. stop.
    """
    first = first_key(start, window)
    query = jnp.arange(start, stop)[:, None]
    key = jnp.arange(first, stop)[None, :]
    visible = (key <= query)[None]
    if window is not None:
        visible &= query - key < window
    if segment_ids is None:
        return visible
    key_ids = segment_ids[:, None, first:stop]
    query_ids = segment_ids[:, start:stop, None]
    return (visible & (key_ids == query_ids) & (key_ids > 0)) | (key == query)


def first_key(start: int, window: int | None) -> int:
    """Returns the first key that any query from `start` on may see."""
    return 0 if window is None else max(0, start - window + 1)


def causal_attention(
    q: Float[Array, "b h t k"],
    k: Float[Array, "b g t k"],
    v: Float[Array, "b g t k"],
    segment_ids: Int[Array, "b t"] | None = None,
    *,
    window: int | None = None,
    scoring: Scoring = PLAIN,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "b h t k"]:
    """Returns the output of causal attention within documents, in q's dtype.

    Query i sees key j if j <= i, i - j < window, both have the same segment id, and j is not
    padding (id 0). A query on padding sees only itself, so that nothing is NaN. The softmax is in
    float32.

    Args:
      segment_ids: document ids; None is plain causal attention.
      window: how many tokens a query sees, itself included; None: all earlier ones.
      rate: dropout rate of the attention weights, used if a key is given.

    Source: Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al. 2023; windows: Beltagy et al.
    2020, section 3.1.
    """
    t = q.shape[2]
    blocks = []
    for i, start in enumerate(range(0, t, QUERY_BLOCK)):
        stop = min(start + QUERY_BLOCK, t)
        first = first_key(start, window)
        drop = None
        if key is not None and rate > 0:
            ones = jnp.ones((*q.shape[:2], stop - start, stop - first))
            drop = dropout(ones, rate, jax.random.fold_in(key, i))
        block = _attend(
            q[:, :, start:stop],
            k[:, :, first:stop],
            v[:, :, first:stop],
            allowed(segment_ids, start, stop, window),
            drop,
            scoring,
        )
        blocks.append(block)
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=2)


def attend(
    q: Float[Array, "b h t k"],
    k: Float[Array, "b g s k"],
    v: Float[Array, "b g s k"],
    visible: Bool[Array, "_ t s"],
    scoring: Scoring = PLAIN,
) -> Float[Array, "b h t k"]:
    """Returns the attention of queries over the keys that each of them may see, in q's dtype."""
    out: Any = _attend(q, k, v, visible, None, scoring)
    return out


def cached_attention(
    q: Float[Array, "b h k"],
    k: Float[Array, "b g s k"] | Quantized,
    v: Float[Array, "b g s k"] | Quantized,
    valid: Bool[Array, "b s"],
    scoring: Scoring = PLAIN,
) -> Float[Array, "b h k"]:
    """Returns the attention of one query per row over the valid entries of a cache.

    Rounding the cache would cost more than its few products, which are in the dtype of q. A
    quantized cache has one scale per entry and head. The scales multiply scores and weights, so
    that no key or value is dequantized outside of the products.
    """
    scoring = scoring._replace(dtype=None)
    if isinstance(k, Quantized):
        assert isinstance(v, Quantized)
        return _cached_int8(q, k, v, valid, scoring)
    out: Any = _attend(q[:, :, None], k, v, valid[:, None], None, scoring)
    return out[:, :, 0]


def _cached_int8(
    q: Float[Array, "b h k"],
    k: Quantized,
    v: Quantized,
    valid: Bool[Array, "b s"],
    scoring: Scoring,
) -> Float[Array, "b h k"]:
    b, h, d = q.shape
    g = k.values.shape[1]
    grouped = scoring.scaled(q).reshape(b, g, h // g, d)
    scores = jnp.einsum(
        "bghd,bgsd->bghs",
        grouped,
        k.values.astype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    scores = scoring.capped(scores * k.scale[:, :, None])
    scores = jnp.where(valid[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1) * v.scale[:, :, None]
    out = jnp.einsum(
        "bghs,bgsd->bghd",
        weights.astype(q.dtype),
        v.values.astype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    return out.astype(q.dtype).reshape(b, h, d)
