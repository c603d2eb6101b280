"""Log-probabilities and cross-entropy from hidden states, in chunks of time: the logits [b, t, v] never live whole.

`output` is the matrix that makes logits: [v, d] (the tied embedding) or [d, v], told apart by `tied`.

On a mesh every device goes through chunks of its own rows and adds up its own gradient of `output`; the devices' sums
are added once, after the last chunk (`apart`). Chunks of the global batch would have them added in every chunk.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from rlhfjax.mesh import constrain, shards
from rlhfjax.models.linear import transposed

CHUNK_ELEMENTS = 2**23  # logits of one chunk on one device: 32 MiB in float32
SHARDS = ("batch", "time")  # the two axes that `apart` puts first


def unembed(
    hidden: Float[Array, "... d"], output: Num[Array, "x y"], tied: bool
) -> Float[Array, "... v"]:
    """Logits in float32: hidden . output^T (tied, output [v, d]) or hidden . output ([d, v])."""
    return jnp.einsum(
        "...d,vd->...v" if tied else "...d,dv->...v",
        hidden,
        output.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )


def apart(local: Callable[..., Any], hidden, output, tied: bool, *rows):
    """local(hidden, output, *rows) on each device's rows by themselves, and how to join what it returns a row.

    Rows [b, t, ...] are split into [batch shards, time shards, b / batch shards, t / time shards, ...], t padded with
    zeros where it does not divide, and `local` is mapped over the first two axes. `output` gets these axes too, so
    that its gradient is summed over the devices where the axes are dropped again, and there alone.

    Returns:
      What `local` returns with the two axes before it, and `join`, which makes rows [b, t, ...] of it again.
    """
    (batch, time), (m, n) = hidden.shape[:2], (shards(name) for name in SHARDS)
    if m * n == 1 or batch % m:
        one = jax.tree.map(lambda x: x[None, None], local(hidden, output, *rows))
        return one, lambda x: x[0, 0]
    padding = -time % n

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(m, batch // m, n, (time + padding) // n, *x.shape[2:]).swapaxes(
            1, 2
        )
        return constrain(x, (*SHARDS, *[None] * (x.ndim - 2)))

    def join(x):
        x = x.swapaxes(1, 2).reshape(batch, time + padding, *x.shape[4:])[:, :time]
        return constrain(x, (*SHARDS, *[None] * (x.ndim - 2)))

    # One a device, as it is whole there anyway; one new axis, not two, whose sum is one reduction.
    copies = jnp.broadcast_to(output, (m * n, *output.shape)).reshape(
        m, n, *output.shape
    )
    copies = constrain(
        copies, (*SHARDS, *(("vocab", None) if tied else (None, "vocab")))
    )
    return jax.vmap(jax.vmap(local))(split(hidden), copies, *map(split, rows)), join


def _chunks(hidden, output, tied):
    """How many chunks of time: each has at most CHUNK_ELEMENTS logits on one device."""
    batch, time = hidden.shape[:2]
    vocab = -(-output.shape[0 if tied else 1] // shards("vocab"))
    return min(time, -(-time * batch * vocab // CHUNK_ELEMENTS))


def _scan(step, carry, hidden, output, tied, *rows):
    """scan `step(carry, (hidden, *rows))` over chunks of time, at most CHUNK_ELEMENTS logits each.

    A real loop, since a scheduler is free to run unrolled chunks side by side, with all their logits alive. Rows end in
    padding of zeros where the chunks are not equal. Returns the carry and the outputs with their time axis restored.
    """
    batch, time = hidden.shape[:2]
    count = _chunks(hidden, output, tied)
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
    def local(hidden, output, targets, mask):
        def step(total, chunk):
            x, y, m = chunk
            logits = unembed(x, output, tied)
            picked = jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]
            return total + (
                (jax.nn.logsumexp(logits, axis=-1) - picked) * m
            ).sum(), None

        return _scan(
            step, jnp.zeros((), jnp.float32), hidden, output, tied, targets, mask
        )[0]

    return apart(local, hidden, output.astype(hidden.dtype), tied, targets, mask)[
        0
    ].sum()


def _cross_entropy_forward(hidden, output, targets, mask, tied):
    """The loss and, while each chunk's logits are at hand, its gradient (as Liger Kernel does): no recomputation."""
    local = functools.partial(_loss_and_gradient, tied)
    parts, join = apart(local, hidden, output.astype(hidden.dtype), tied, targets, mask)
    total, d_output, d_hidden, nll = parts
    d_output = d_output.reshape(-1, *d_output.shape[2:]).sum(0)
    return total.sum(), (
        join(d_hidden),
        transposed(d_output) if tied else d_output,
        join(nll),
    )


def _loss_and_gradient(tied, hidden, output, targets, mask):
    """The summed loss, the gradients of `output` as [d, v] in float32 and of `hidden`, and the loss of each target."""

    def step(carry, chunk):
        total, d_output = carry
        x, y, m = chunk
        logits = unembed(x, output, tied)
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = lse - jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]
        hit = jnp.arange(logits.shape[-1]) == y[..., None]
        d_logits = ((jnp.exp(logits - lse[..., None]) - hit) * m[..., None]).astype(
            hidden.dtype
        )
        # Made once, then multiplied from either side; [d, v] and a transposition at the end, because it is cheaper to
        # transpose the narrow operand x than d_logits.
        d_logits = jax.lax.optimization_barrier(d_logits)
        d_x = jnp.einsum("btv,vd->btd" if tied else "btv,dv->btd", d_logits, output)
        d_output += jnp.einsum(
            "btd,btv->dv", x, d_logits, preferred_element_type=jnp.float32
        )
        return (total + (nll * m).sum(), d_output), (d_x, nll)

    zeros = (
        jnp.zeros((), jnp.float32),
        jnp.zeros(output.shape[::-1] if tied else output.shape, jnp.float32),
    )
    (total, d_output), (d_hidden, nll) = _scan(
        step, zeros, hidden, output, tied, targets, mask
    )
    return total, d_output, d_hidden, nll


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

    With log p_i = l_i - logsumexp(l), H = -sum_i p_i (l_i - logsumexp(l)): no term is below 0, and
    the error is that of logsumexp(l), half a unit in the last place. In logsumexp(l) - sum p_i l_i
    numbers as large as the logits cancel: of (800, -800, 800) it makes 0.7164, not ln 2.

    A chunk's logits are not kept for the backward pass but made again, except where one chunk is all there is.
    """

    def local(hidden, output, targets):
        def step(_, chunk):
            x, y = chunk
            logits = unembed(x, output, tied) / temperature
            lse = jax.nn.logsumexp(logits, axis=-1)
            logprob = jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0] - lse
            every = logits - lse[..., None]
            return None, (logprob, -(jnp.exp(every) * every).sum(-1))

        whole = _chunks(hidden, output, tied) == 1
        return _scan(
            step if whole else jax.checkpoint(step), None, hidden, output, tied, targets
        )[1]

    parts, join = apart(local, hidden, output, tied, targets)
    return jax.tree.map(join, parts)
