"""A matrix product with a faster gradient: most of the training time is spent here."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

# A product of fewer rows takes less time in float32 than converting its kernel does. It stays in
# the dtype of x, unless the kernel was converted before.
FEW_ROWS = 64


def transposed(x: Float[Array, "*b x y"]) -> Float[Array, "*b y x"]:
    """Returns x^T of a finished product.

    The barrier keeps XLA from folding the transposition into a slower form of that product.
    """
    return jax.lax.optimization_barrier(x).swapaxes(-1, -2)


def linear(
    x: Float[Array, "b t x"],
    kernel: Float[Array, "x y"],
    dtype: str | None = None,
) -> Float[Array, "b t y"]:
    """Returns x . kernel in x's dtype.

    Args:
      dtype: both are rounded to it before they are multiplied; None: that of x.
    """
    dtype = product_dtype(x, kernel, dtype)
    if dtype == str(x.dtype):
        kernel = kernel.astype(dtype)
    return _linear(x, kernel, dtype)


def product_dtype(
    x: Float[Array, "*b x"], kernel: Num[Array, "y z"], dtype: str | None
) -> str:
    """Returns the dtype that both inputs of a product are rounded to.

    Args:
      dtype: the one of the model's config; None: that of x.
    """
    rows = math.prod(x.shape[:-1])
    if dtype is None or (rows < FEW_ROWS and str(kernel.dtype) != dtype):
        return str(x.dtype)
    return dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(
    x: Float[Array, "b t x"],
    kernel: Float[Array, "x y"],
    dtype: str,
) -> Float[Array, "b t y"]:
    """Returns the product of x and kernel, both rounded to dtype.

    The gradient is that of autodiff, dx = dy . kernel^T and dkernel = x^T . dy, computed in a
    faster way. A barrier computes dy once; otherwise each product would recompute it inside of the
    transposed copy that it fuses. And x^T . dy transposes the narrower of its two operands.
    """
    return _forward(x, kernel, dtype)[0]


def _forward(x, kernel, dtype):
    # Not by `_linear`: remat="dots" does not see a product within a function of a custom gradient,
    # and would recompute it.
    narrow = x.astype(dtype)
    y = jnp.einsum(
        "btx,xy->bty",
        narrow,
        kernel.astype(dtype),
        preferred_element_type=x.dtype,
    )
    return y, (narrow, kernel)


def _backward(dtype, saved, dy):
    x, kernel = saved
    wide = dy.dtype
    dy = jax.lax.optimization_barrier(dy.astype(dtype))
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    dx = product("bty,xy->btx", dy, kernel.astype(dtype))
    if x.shape[-1] <= dy.shape[-1]:
        d_kernel = product("btx,bty->xy", x, dy)
    else:
        d_kernel = transposed(product("bty,btx->yx", dy, x))
    return dx, d_kernel.astype(kernel.dtype)


_linear.defvjp(_forward, _backward)
