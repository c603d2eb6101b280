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
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from rlhfjax.mesh import constrain, shards
from rlhfjax.models.linear import transposed
from rlhfjax.types import PyTree

CHUNK_ELEMENTS = 2**23  # logits of one chunk on one device: 32 MiB in float32
SHARDS = ("batch", "time")  # the two leading axes in `per_shard`


def cross_entropy(
    hidden: Float[Array, "b t d"],
    output: Float[Array, "x y"],
    targets: Int[Array, "b t"],
    mask: Float[Array, "b t"],
    *,
    tied: bool,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the summed next-token loss and its weight, both float32.

      sum_i mask_i (logsumexp(logits_i) - logits_i[target_i])  (nats),   sum_i mask_i

    The gradient is computed together with the loss, chunk by chunk.
    """
    return _cross_entropy(hidden, output, targets, mask, tied), mask.sum()


def logprobs(
    hidden: Float[Array, "b t d"],
    output: Float[Array, "x y"],
    targets: Int[Array, "b t"],
    temperature: float = 1.0,
    *,
    tied: bool,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Returns log p(target) and the entropy -sum p log p of p = softmax(logits / temperature).

    Both are in nats, float32. The entropy is computed from log p_i = l_i - logsumexp(l), as
    -sum_i p_i log p_i. No term is negative, and the error is that of logsumexp(l), half a unit in
    the last place. The form logsumexp(l) - sum p_i l_i subtracts numbers as large as the logits:
    for (800, -800, 800) it gives 0.7164 instead of ln 2.

    The backward pass recomputes the logits of each chunk, unless there is only one chunk.
    """

    def local(hidden, output, targets):
        def step(_, chunk):
            x, y = chunk
            logits = unembed(x, output, tied) / temperature
            lse = jax.nn.logsumexp(logits, axis=-1)
            logprob = _at(logits, y) - lse
            log_p = logits - lse[..., None]
            return None, (logprob, -(jnp.exp(log_p) * log_p).sum(-1))

        if _n_chunks(hidden, output, tied) > 1:
            step = jax.checkpoint(step)
        return _scan(step, None, hidden, output, tied, targets)[1]

    parts, join = per_shard(local, hidden, output, tied, targets)
    return jax.tree.map(join, parts)


def unembed(
    hidden: Float[Array, "... d"],
    output: Num[Array, "x y"],
    tied: bool,
) -> Float[Array, "... v"]:
    """Returns float32 logits: hidden . output^T if tied (output [v, d]), else hidden . output."""
    return jnp.einsum(
        "...d,vd->...v" if tied else "...d,dv->...v",
        hidden,
        output.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )


# ------------------------------------------------------------------ cross-entropy


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(
    hidden: Float[Array, "b t d"],
    output: Float[Array, "x y"],
    targets: Int[Array, "b t"],
    mask: Float[Array, "b t"],
    tied: bool,
) -> Float[Array, ""]:
    def local(hidden, output, targets, mask):
        def step(total, chunk):
            x, y, m = chunk
            logits = unembed(x, output, tied)
            picked = _at(logits, y)
            nll = jax.nn.logsumexp(logits, axis=-1) - picked
            return total + (nll * m).sum(), None

        zero = jnp.zeros((), jnp.float32)
        return _scan(step, zero, hidden, output, tied, targets, mask)[0]

    output = output.astype(hidden.dtype)
    totals, _ = per_shard(local, hidden, output, tied, targets, mask)
    return totals.sum()


def _cross_entropy_forward(
    hidden: Float[Array, "b t d"],
    output: Float[Array, "x y"],
    targets: Int[Array, "b t"],
    mask: Float[Array, "b t"],
    tied: bool,
):
    """Returns the loss, and its gradient for the backward pass.

    The gradient is computed while each chunk's logits are at hand (as in Liger Kernel), so that
    nothing is recomputed.
    """
    local = functools.partial(_loss_and_gradient, tied)
    output = output.astype(hidden.dtype)
    parts, join = per_shard(local, hidden, output, tied, targets, mask)
    total, d_output, d_hidden, nll = parts
    d_output = d_output.reshape(-1, *d_output.shape[2:]).sum(0)
    loss = total.sum()
    d_hidden = join(d_hidden)
    d_output = transposed(d_output) if tied else d_output
    return loss, (d_hidden, d_output, join(nll))


def _loss_and_gradient(
    tied: bool,
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
        logits = unembed(x, output, tied)
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = lse - _at(logits, y)
        hit = jnp.arange(logits.shape[-1]) == y[..., None]
        d_logits = (jnp.exp(logits - lse[..., None]) - hit) * m[..., None]
        d_logits = d_logits.astype(hidden.dtype)
        # Computed once, then multiplied from both sides. The gradient of `output` is summed as
        # [d, v] and transposed at the end: transposing x is cheaper than transposing d_logits.
        d_logits = jax.lax.optimization_barrier(d_logits)
        d_x = jnp.einsum("btv,vd->btd" if tied else "btv,dv->btd", d_logits, output)
        d_output += jnp.einsum(
            "btd,btv->dv", x, d_logits, preferred_element_type=jnp.float32
        )
        return (total + (nll * m).sum(), d_output), (d_x, nll)

    shape = output.shape[::-1] if tied else output.shape
    zeros = jnp.zeros((), jnp.float32), jnp.zeros(shape, jnp.float32)
    totals, outputs = _scan(step, zeros, hidden, output, tied, targets, mask)
    return *totals, *outputs


def _cross_entropy_backward(tied, saved, g):
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
    output: Float[Array, "x y"],
    tied: bool,
    *rows: Num[Array, "b t"],
) -> tuple[Any, Callable[[jax.Array], jax.Array]]:
    """Maps local(hidden, output, *rows) over the rows of each device.

    Arrays [b, t, ...] are split into [m, n, b / m, t / n, ...] for m batch shards and n time
    shards, with zeros after t if n does not divide it. `local` is mapped over the first two axes.
    `output` is broadcast to these axes too, so that its gradient is summed over devices only where
    the broadcast ends.

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
    copies = jnp.broadcast_to(output, (m * n, *output.shape))
    copies = copies.reshape(m, n, *output.shape)
    output_axes = ("vocab", None) if tied else (None, "vocab")
    copies = constrain(copies, (*SHARDS, *output_axes))
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
    *rows: Num[Array, "b t"],
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
