"""Log-probabilities and cross-entropy from hidden states, in chunks of time.

The logits [b, t, v] never exist whole. `output` is the matrix that makes logits: [v, d] if `tied`
(the embedding), else [d, v].

On a mesh every device goes through chunks of its own rows and accumulates its own gradient of
`output`. The gradients are summed over devices once, after the last chunk (`per_shard`). With
chunks of the global batch they would be summed in every chunk.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from rlhfjax.mesh import constrain, shards
from rlhfjax.models import few_rows
from rlhfjax.models.linear import product_dtype, transposed
from rlhfjax.models.softcap import capped, slope
from rlhfjax.types import PyTree

CHUNK_ELEMENTS = 2**23  # logits of one chunk on one device: 32 MiB in float32
SHARDS = ("batch", "time")  # the two leading axes in `per_shard`
# The logit of an id that is left out. Its probability is exactly 0. It is finite, because p log p
# of an infinite one has no gradient.
LEFT_OUT = -1e30


class Output(NamedTuple):
    """How hidden states become logits."""

    tied: bool  # whether the matrix is the embedding [v, d], or [d, v]
    softcap: float | None = None  # logits l become c tanh(l / c); None: they stay
    dtype: str | None = None  # of the inputs of the products; None: that of hidden

    def narrowed(
        self, x: Float[Array, "*x"], hidden: Float[Array, "*b d"]
    ) -> Float[Array, "*x"]:
        """Returns an input of a product with hidden states, rounded to its dtype."""
        return x.astype(self.dtype or hidden.dtype)

    def logits(
        self, hidden: Float[Array, "... d"], output: Num[Array, "x y"]
    ) -> Float[Array, "... v"]:
        """Returns float32 logits."""
        logits = unembed(hidden, output, self.tied, self.dtype)
        return capped(logits, self.softcap)


def cross_entropy(
    hidden: Float[Array, "b t d"],
    output: Float[Array, "x y"],
    targets: Int[Array, "b t"],
    mask: Float[Array, "b t"],
    *,
    tied: bool,
    softcap: float | None = None,
    dtype: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the summed next-token loss and its weight, both float32.

      sum_i mask_i (logsumexp(logits_i) - logits_i[target_i])  (nats),   sum_i mask_i

    The gradient is computed together with the loss, chunk by chunk.

    Args:
      dtype: of the inputs of the products; None: that of hidden.
    """
    how = Output(tied, softcap, dtype)
    return _cross_entropy(hidden, output, targets, mask, how), mask.sum()


def logprobs(
    hidden: Float[Array, "b t d"],
    output: Float[Array, "x y"],
    targets: Int[Array, "b t"],
    temperature: float = 1.0,
    *,
    tied: bool,
    softcap: float | None = None,
    dtype: str | None = None,
    ids: int | None = None,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Returns log p(target) and the entropy -sum p log p of p = softmax(logits / temperature).

    Both are in nats, float32. The entropy is computed from log p_i = l_i - logsumexp(l), as
    -sum_i p_i log p_i. No term is negative, and the error is that of logsumexp(l), half a unit in
    the last place. The form logsumexp(l) - sum p_i l_i subtracts numbers as large as the logits:
    for (800, -800, 800) it gives 0.7164 instead of ln 2.

    The backward pass recomputes the logits of each chunk, unless there is only one chunk.

    Args:
      dtype: of the inputs of the products; None: that of hidden.
      ids: p is over the ids below it; None: over all.
    """
    how = Output(tied, softcap, dtype)

    def local(hidden, output, targets):
        def step(_, chunk):
            x, y = chunk
            logits = below(how.logits(x, output), ids) / temperature
            lse = jax.nn.logsumexp(logits, axis=-1)
            logprob = _at(logits, y) - lse
            log_p = logits - lse[..., None]
            return None, (logprob, -(jnp.exp(log_p) * log_p).sum(-1))

        if _n_chunks(hidden, output, how.tied) > 1:
            step = jax.checkpoint(step)
        return _scan(step, None, hidden, output, how.tied, targets)[1]

    parts, join = per_shard(local, hidden, output, how.tied, targets)
    return jax.tree.map(join, parts)


def vocabulary_kl(
    hiddens: tuple[Float[Array, "b t d"], Float[Array, "b t d"]],
    outputs: tuple[Float[Array, "x y"], Float[Array, "x y"]],
    temperature: float = 1.0,
    *,
    how: Output,
    ids: int | None = None,
) -> Float[Array, "b t"]:
    """Returns KL(p || q) = sum_v p_v (log p_v - log q_v) at every position, nats, float32.

    p and q are softmax(logits / temperature) of two models, over the whole vocabulary. The logits
    of both exist for one chunk at a time. It has no gradient to save memory for.

    Args:
      hiddens, outputs: of p's model and of q's, which have the same config.
      ids: p and q are over the ids below it; None: over all.
    """
    mine, other = hiddens

    def local(hidden, outputs, other):
        def log_softmax(x, output):
            logits = below(how.logits(x, output), ids)
            return jax.nn.log_softmax(logits / temperature, axis=-1)

        def step(_, chunk):
            x, y = chunk
            log_p = log_softmax(x, outputs[0])
            log_q = log_softmax(y, outputs[1])
            p, q = jnp.exp(log_p), jnp.exp(log_q)
            # sum (q - p) is 0. With it no term is negative, and an error of a logsumexp cancels.
            return None, (p * (log_p - log_q) + (q - p)).sum(-1)

        return _scan(step, None, hidden, outputs[0], how.tied, other)[1]

    parts, join = per_shard(local, mine, outputs, how.tied, other)
    return join(parts)


def below(logits: Float[Array, "*b v"], ids: int | None) -> Float[Array, "*b v"]:
    """Returns logits with probability 0 for all but the first `ids` ids; None leaves all."""
    if ids is None:
        return logits
    is_below = jnp.arange(logits.shape[-1]) < ids
    return jnp.where(is_below, logits, LEFT_OUT)


def unembed(
    hidden: Float[Array, "... d"],
    output: Num[Array, "x y"],
    tied: bool,
    dtype: str | None = None,
) -> Float[Array, "... v"]:
    """Returns float32 logits: hidden . output^T if tied (output [v, d]), else hidden . output.

    Args:
      dtype: both are rounded to it before they are multiplied; None: that of hidden.
    """
    if output.dtype == jnp.int8:
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = few_rows.product(rows, output, tied, dtype)
        return logits.reshape(*hidden.shape[:-1], -1)
    dtype = product_dtype(hidden, output, dtype)
    if dtype == str(hidden.dtype):
        return _product(hidden, output.astype(dtype), tied)
    rows = hidden.reshape(-1, hidden.shape[-1])
    logits: Any = _rounded(rows, output, tied, dtype)
    return logits.reshape(*hidden.shape[:-1], -1)


def _product(hidden, output, tied):
    return jnp.einsum(
        "...d,vd->...v" if tied else "...d,dv->...v",
        hidden,
        output,
        preferred_element_type=jnp.float32,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rounded(
    hidden: Float[Array, "n d"], output: Float[Array, "x y"], tied: bool, dtype: str
) -> Float[Array, "n v"]:
    """Returns `unembed` of inputs rounded to dtype; so are those of its gradients' products."""
    return _rounded_forward(hidden, output, tied, dtype)[0]


def _rounded_forward(hidden, output, tied, dtype):
    narrow = hidden.astype(dtype)
    return _product(narrow, output.astype(dtype), tied), (narrow, output)


def _rounded_backward(tied, dtype, saved, d_logits):
    hidden, output = saved
    d_logits = jax.lax.optimization_barrier(d_logits.astype(dtype))
    d_hidden = _product(d_logits, output.astype(dtype), not tied)
    d_output = jnp.einsum(
        "nd,nv->dv", hidden, d_logits, preferred_element_type=jnp.float32
    )
    d_output = transposed(d_output) if tied else d_output
    return d_hidden, d_output.astype(output.dtype)


_rounded.defvjp(_rounded_forward, _rounded_backward)


# ------------------------------------------------------------------ cross-entropy


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(
    hidden: Float[Array, "b t d"],
    output: Float[Array, "x y"],
    targets: Int[Array, "b t"],
    mask: Float[Array, "b t"],
    how: Output,
) -> Float[Array, ""]:
    def local(hidden, output, targets, mask):
        def step(total, chunk):
            x, y, m = chunk
            logits = how.logits(x, output)
            picked = _at(logits, y)
            nll = jax.nn.logsumexp(logits, axis=-1) - picked
            return total + (nll * m).sum(), None

        zero = jnp.zeros((), jnp.float32)
        return _scan(step, zero, hidden, output, how.tied, targets, mask)[0]

    output = how.narrowed(output, hidden)
    totals, _ = per_shard(local, hidden, output, how.tied, targets, mask)
    return totals.sum()


def _cross_entropy_forward(
    hidden: Float[Array, "b t d"],
    output: Float[Array, "x y"],
    targets: Int[Array, "b t"],
    mask: Float[Array, "b t"],
    how: Output,
):
    """Returns the loss, and its gradient for the backward pass.

    The gradient is computed while each chunk's logits are at hand (as in Liger Kernel), so that
    nothing is recomputed.
    """
    local = functools.partial(_loss_and_gradient, how)
    output = how.narrowed(output, hidden)
    parts, join = per_shard(local, hidden, output, how.tied, targets, mask)
    total, d_output, d_hidden, nll = parts
    d_output = d_output.reshape(-1, *d_output.shape[2:]).sum(0)
    loss = total.sum()
    d_hidden = join(d_hidden)
    d_output = transposed(d_output) if how.tied else d_output
    return loss, (d_hidden, d_output, join(nll))


def _loss_and_gradient(
    how: Output,
    hidden: Float[Array, "b t d"],
    output: Float[Array, "x y"],
    targets: Int[Array, "b t"],
    mask: Float[Array, "b t"],
):
    """Returns the summed loss, its gradients, and the loss per target.

    The gradient of `output` is [d, v] in float32, that of `hidden` is in hidden's dtype.
    """

    def step(carry, chunk):
        total, d_output = carry
        x, y, m = chunk
        x = how.narrowed(x, hidden)
        logits = how.logits(x, output)
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = lse - _at(logits, y)
        hit = jnp.arange(logits.shape[-1]) == y[..., None]
        d_logits = (jnp.exp(logits - lse[..., None]) - hit) * m[..., None]
        if how.softcap is not None:
            d_logits *= slope(logits, how.softcap)
        d_logits = how.narrowed(d_logits, hidden)
        # Computed once, then multiplied from both sides. The gradient of `output` is summed as
        # [d, v] and transposed at the end: transposing x is cheaper than transposing d_logits.
        d_logits = jax.lax.optimization_barrier(d_logits)
        d_x = jnp.einsum(
            "btv,vd->btd" if how.tied else "btv,dv->btd",
            d_logits,
            output,
            preferred_element_type=hidden.dtype,
        )
        d_output += jnp.einsum(
            "btd,btv->dv", x, d_logits, preferred_element_type=jnp.float32
        )
        return (total + (nll * m).sum(), d_output), (d_x, nll)

    shape = output.shape[::-1] if how.tied else output.shape
    zeros = jnp.zeros((), jnp.float32), jnp.zeros(shape, jnp.float32)
    totals, outputs = _scan(step, zeros, hidden, output, how.tied, targets, mask)
    return *totals, *outputs


def _cross_entropy_backward(how, saved, g):
    d_hidden, d_output, d_mask = saved
    return (g * d_hidden).astype(d_hidden.dtype), g * d_output, None, g * d_mask


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _at(
    logits: Float[Array, "b t v"],
    targets: Int[Array, "b t"],
) -> Float[Array, "b t"]:
    """Returns the logits of the targets."""
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


# ------------------------------------------------------------------ shards and chunks


def per_shard(
    local: Callable[..., Any],
    hidden: Float[Array, "b t d"],
    output: Float[Array, "x y"] | tuple[Float[Array, "x y"], ...],
    tied: bool,
    *rows: Num[Array, "b t ..."],
) -> tuple[Any, Callable[[jax.Array], jax.Array]]:
    """Maps local(hidden, output, *rows) over the rows of each device.

    Arrays [b, t, ...] are split into [m, n, b / m, t / n, ...] for m batch shards and n time
    shards, with zeros after t if n does not divide it. `local` is mapped over the first two axes.
    `output`, one matrix or several, is broadcast to these axes too, so that its gradient is summed
    over devices only where the broadcast ends.

    Returns:
      The results of `local` with the two axes in front, and `join`, which maps an array
      [m, n, b / m, t / n, ...] back to [b, t, ...].
    """
    batch, time = hidden.shape[:2]
    m, n = (shards(name) for name in SHARDS)
    if m * n == 1 or batch % m:
        result = local(hidden, output, *rows)
        return jax.tree.map(lambda x: x[None, None], result), lambda x: x[0, 0]
    padding = -time % n

    def split(x):
        x = _pad_time(x, padding)
        x = x.reshape(m, batch // m, n, (time + padding) // n, *x.shape[2:])
        x = x.swapaxes(1, 2)
        return _constrain_shards(x)

    def join(x):
        x = x.swapaxes(1, 2)
        x = x.reshape(batch, time + padding, *x.shape[4:])
        return _constrain_shards(x[:, :time])

    # One copy per device, which holds `output` whole anyway. The broadcast adds one axis and not
    # two, so that the sum over it is one reduction.
    output_axes = ("vocab", None) if tied else (None, "vocab")

    def copy(matrix):
        copies = jnp.broadcast_to(matrix, (m * n, *matrix.shape))
        copies = copies.reshape(m, n, *matrix.shape)
        return constrain(copies, (*SHARDS, *output_axes))

    copies = jax.tree.map(copy, output)
    mapped = jax.vmap(jax.vmap(local))
    return mapped(split(hidden), copies, *map(split, rows)), join


def _constrain_shards(x: jax.Array) -> jax.Array:
    others = [None] * (x.ndim - 2)
    return constrain(x, (*SHARDS, *others))


def _pad_time(x: jax.Array, padding: int) -> jax.Array:
    """Returns x [b, t, ...] with zeros after t."""
    others = [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, [(0, 0), (0, padding), *others])


def _n_chunks(
    hidden: Float[Array, "b t d"],
    output: Float[Array, "x y"],
    tied: bool,
) -> int:
    """Returns the number of chunks of time, each of at most CHUNK_ELEMENTS logits per device."""
    batch, time = hidden.shape[:2]
    vocab = math.ceil(output.shape[0 if tied else 1] / shards("vocab"))
    return min(time, math.ceil(time * batch * vocab / CHUNK_ELEMENTS))


def _scan(
    step: Callable[..., Any],
    carry: PyTree,
    hidden: Float[Array, "b t d"],
    output: Float[Array, "x y"],
    tied: bool,
    *rows: Num[Array, "b t ..."],
) -> tuple[PyTree, PyTree]:
    """Scans `step(carry, (hidden, *rows))` over chunks of time.

    It is a loop because a scheduler could run unrolled chunks side by side, with all their logits
    alive. The last chunk is padded with zeros. Returns the carry, and the outputs [b, t, ...].
    """
    batch, time = hidden.shape[:2]
    count = _n_chunks(hidden, output, tied)
    if count == 1:
        return step(carry, (hidden, *rows))
    size = math.ceil(time / count)
    count = math.ceil(time / size)
    padding = count * size - time

    def split(x):
        x = _pad_time(x, padding).reshape(batch, count, size, *x.shape[2:])
        return x.swapaxes(0, 1)

    def join(x):
        x = x.swapaxes(0, 1)
        x = x.reshape(batch, count * size, *x.shape[3:])
        return x[:, :time]

    chunks = tuple(split(x) for x in (hidden, *rows))
    carry, outputs = jax.lax.scan(step, carry, chunks)
    return carry, jax.tree.map(join, outputs)
