"""Log-probabilities and cross-entropy from hidden states, in chunks of time: the logits [b, t, v] never live whole.

`output` is the matrix that makes logits: [v, d] (the tied embedding) or [d, v], told apart by `equation`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from rlhfjax.models.linear import transposed

CHUNK_ELEMENTS = 2**23  # logits of one chunk: 32 MiB in float32


def unembed(hidden: Float[Array, "... d"], output: Num[Array, "x y"], tied: bool) -> Float[Array, "... v"]:
    """Logits in float32: hidden . output^T (tied, output [v, d]) or hidden . output ([d, v])."""
    return jnp.einsum(
        "...d,vd->...v" if tied else "...d,dv->...v",
        hidden,
        output.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )


def _scan(step, carry, hidden, output, tied, *rows):
    """scan `step(carry, (hidden, *rows))` over chunks of time, at most CHUNK_ELEMENTS logits each.

    A real loop, since a scheduler is free to run unrolled chunks side by side, with all their logits alive. Rows end in
    padding of zeros where the chunks are not equal. Returns the carry and the outputs with their time axis restored.
    """
    batch, time = hidden.shape[:2]
    vocab = output.shape[0 if tied else 1]
    count = min(time, -(-time * batch * vocab // CHUNK_ELEMENTS))
    if count == 1:
        return step(carry, (hidden, *rows))
    size = -(-time // count)
    count = -(-time // size)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, count * size - time)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, count, size, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(batch, count * size, *x.shape[3:])[:, :time]

    carry, out = jax.lax.scan(step, carry, tuple(split(x) for x in (hidden, *rows)))
    return carry, jax.tree.map(join, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden, output, targets, mask, tied):
    def step(total, chunk):
        x, y, m = chunk
        logits = unembed(x, output, tied)
        picked = jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]
        return total + ((jax.nn.logsumexp(logits, axis=-1) - picked) * m).sum(), None

    return _scan(step, jnp.zeros((), jnp.float32), hidden, output, tied, targets, mask)[0]


def _cross_entropy_forward(hidden, output, targets, mask, tied):
    """The loss and, while each chunk's logits are at hand, its gradient (as Liger Kernel does): no recomputation."""
    wide = output.astype(hidden.dtype)

    def step(carry, chunk):
        total, d_output = carry
        x, y, m = chunk
        logits = unembed(x, output, tied)
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = lse - jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]
        hit = jnp.arange(logits.shape[-1]) == y[..., None]
        d_logits = ((jnp.exp(logits - lse[..., None]) - hit) * m[..., None]).astype(hidden.dtype)
        # Made once, then multiplied from either side; [d, v] and a transposition at the end, because it is cheaper to
        # transpose the narrow operand x than d_logits.
        d_logits = jax.lax.optimization_barrier(d_logits)
        d_x = jnp.einsum("btv,vd->btd" if tied else "btv,dv->btd", d_logits, wide)
        d_output += jnp.einsum("btd,btv->dv", x, d_logits, preferred_element_type=jnp.float32)
        return (total + (nll * m).sum(), d_output), (d_x, nll)

    zeros = jnp.zeros((), jnp.float32), jnp.zeros(output.shape[::-1] if tied else output.shape, jnp.float32)
    (total, d_output), (d_hidden, nll) = _scan(step, zeros, hidden, output, tied, targets, mask)
    return total, (d_hidden, transposed(d_output) if tied else d_output, nll)


def _cross_entropy_backward(tied, saved, g):
    d_hidden, d_output, d_mask = saved
    return (g * d_hidden).astype(d_hidden.dtype), g * d_output, None, g * d_mask


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def cross_entropy(
    hidden: Float[Array, "b t d"],
    output: Float[Array, "x y"],
    targets: Int[Array, "b t"],
    mask: Float[Array, "b t"],
    *,
    tied: bool,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed next-token loss: sum_i mask_i (logsumexp(logits_i) - logits_i[target_i]), and sum_i mask_i.

    Returns (nats, weight), both float32. The gradient is made together with the loss, chunk by chunk.
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
    """log p(target) and the entropy -sum p log p (nats, float32) of p = softmax(logits / temperature).

    A chunk's logits are not kept for the backward pass but made again, except where one chunk is all there is.
    """

    def step(_, chunk):
        x, y = chunk
        logits = unembed(x, output, tied) / temperature
        lse = jax.nn.logsumexp(logits, axis=-1)
        logprob = jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0] - lse
        return None, (logprob, lse - (jnp.exp(logits - lse[..., None]) * logits).sum(-1))

    whole = hidden.shape[0] * hidden.shape[1] * output.shape[0 if tied else 1] <= CHUNK_ELEMENTS
    return _scan(step if whole else jax.checkpoint(step), None, hidden, output, tied, targets)[1]
