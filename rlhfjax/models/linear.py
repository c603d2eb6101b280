"""A matrix product with a faster gradient: most of the training time is spent here."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def transposed(x: Float[Array, "*b x y"]) -> Float[Array, "*b y x"]:
    """Returns x^T of a finished product.

    The barrier keeps XLA from folding the transposition into a slower form of that product.
    """
    return jax.lax.optimization_barrier(x).swapaxes(-1, -2)


@jax.custom_vjp
def linear(
    x: Float[Array, "b t x"],
    kernel: Float[Array, "x y"],
) -> Float[Array, "b t y"]:
    """Returns x . kernel.

    The gradient is that of autodiff, dx = dy . kernel^T and dkernel = x^T . dy, computed in a
    faster way. A barrier computes dy once; otherwise each product would recompute it inside of the
    transposed copy that it fuses. And x^T . dy transposes the narrower of its two operands.
    """
    return jnp.einsum("btx,xy->bty", x, kernel)


def _forward(x, kernel):
    return linear(x, kernel), (x, kernel)


def _backward(saved, dy):
    x, kernel = saved
    dy = jax.lax.optimization_barrier(dy)
    dx = jnp.einsum("bty,xy->btx", dy, kernel)
    if x.shape[-1] <= dy.shape[-1]:
        return dx, jnp.einsum("btx,bty->xy", x, dy)
    return dx, transposed(jnp.einsum("bty,btx->yx", dy, x))


linear.defvjp(_forward, _backward)
