"""Log-probabilities and cross-entropy from hidden states, in chunks of time: the logits [b, t, v] never live whole.

`output` is the matrix that makes logits: [v, d] (the tied embedding) or [d, v], told apart by `equation`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK_ELEMENTS = 2**23  # logits of one chunk: 32 MiB in float32


def unembed(hidden: Float[Array, "... d"], output: Float[Array, "x y"], tied: bool) -> Float[Array, "... v"]:
    """Logits in float32: hidden . output^T (tied, output [v, d]) or hidden . output ([d, v])."""
    return jnp.einsum(
        "...d,vd->...v" if tied else "...d,dv->...v",
        hidden,
        output.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )


def _chunks(length, elements_per_step):
    """Split a time axis into equal chunks (the last may be shorter) of at most CHUNK_ELEMENTS logits each."""
    count = max(1, -(-length * elements_per_step // CHUNK_ELEMENTS))
    size = -(-length // count)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _slices(hidden, output, tied):
    vocab = output.shape[0 if tied else 1]
    return _chunks(hidden.shape[1], hidden.shape[0] * vocab)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden, output, targets, mask, tied):
    total = jnp.zeros((), jnp.float32)
    for part in _slices(hidden, output, tied):
        logits = unembed(hidden[:, part], output, tied)
        picked = jnp.take_along_axis(logits, targets[:, part, None], axis=-1)[..., 0]
        total += ((jax.nn.logsumexp(logits, axis=-1) - picked) * mask[:, part]).sum()
    return total


def _cross_entropy_forward(hidden, output, targets, mask, tied):
    """The loss and, while each chunk's logits are at hand, its gradient (as Liger Kernel does): no recomputation."""
    total = jnp.zeros((), jnp.float32)
    wide = output.astype(hidden.dtype)
    d_output = jnp.zeros(output.shape[::-1] if tied else output.shape, jnp.float32)
    d_hidden, losses = [], []
    for part in _slices(hidden, output, tied):
        x, y, m = hidden[:, part], targets[:, part], mask[:, part]
        logits = unembed(x, output, tied)
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = lse - jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]
        total += (nll * m).sum()
        hit = jnp.arange(logits.shape[-1]) == y[..., None]
        d_logits = ((jnp.exp(logits - lse[..., None]) - hit) * m[..., None]).astype(hidden.dtype)
        # Made once, then multiplied from either side; [d, v] and a transposition at the end, because it is cheaper to
        # transpose the narrow operand x than d_logits.
        d_logits = jax.lax.optimization_barrier(d_logits)
        d_hidden.append(jnp.einsum("btv,vd->btd" if tied else "btv,dv->btd", d_logits, wide))
        d_output += jnp.einsum("btd,btv->dv", x, d_logits, preferred_element_type=jnp.float32)
        losses.append(nll)
    d_output = d_output.T if tied else d_output
    return total, (jnp.concatenate(d_hidden, axis=1), d_output, jnp.concatenate(losses, axis=1))


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


def _logprobs(hidden, output, targets, temperature, tied):
    logits = unembed(hidden, output, tied) / temperature
    lse = jax.nn.logsumexp(logits, axis=-1)
    logprob = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - lse
    entropy = lse - (jnp.exp(logits - lse[..., None]) * logits).sum(-1)
    return logprob, entropy


def logprobs(
    hidden: Float[Array, "b t d"],
    output: Float[Array, "x y"],
    targets: Int[Array, "b t"],
    temperature: float = 1.0,
    *,
    tied: bool,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """log p(target) and the entropy -sum p log p (nats, float32) of p = softmax(logits / temperature)."""
    parts = _slices(hidden, output, tied)
    one = functools.partial(_logprobs, temperature=temperature, tied=tied)
    if len(parts) > 1:
        one = jax.checkpoint(one)  # a chunk's logits are made again in the backward pass, not kept
    pairs = [one(hidden[:, part], output, targets[:, part]) for part in parts]
    return tuple(jnp.concatenate(both, axis=1) for both in zip(*pairs, strict=True))
