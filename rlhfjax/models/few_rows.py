"""Products of few rows with an int8 matrix, as a decode step has them, in forms that CPUs run fast.

XLA's CPU backend converts the whole matrix to floats before a product, which writes and reads four
bytes per weight. Here only a part that fits a core's cache is converted at a time. The values are
those of the plain product, to rounding. benchmarks/README.md has what each form reaches.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from rlhfjax.mesh import disjoint

# With more rows, the product takes longer than the conversion.
MOST_ROWS = 64
# From this number of rows on, bfloat16 inputs make a product faster than float32 inputs.
FEWEST_NARROW = 8
TERMS = 8  # parts of one row's sums, which are added element by element
OUTPUTS = 192  # converted at a time: 0.4 MB of 576 inputs
# The logical axes of a matrix. Sums and blocks would gather one that is split over devices.
AXES = ("embed", "heads", "kv_heads", "mlp", "vocab")


def product(
    x: Float[Array, "n x"],
    kernel: Int8[Array, "y z"],
    tied: bool = False,
    dtype: str | None = None,
) -> Float[Array, "n out"]:
    """Returns x . kernel, or x . kernel^T if tied, in float32.

    Args:
      dtype: of the inputs of a CPU's product of a few rows; None: that of x. Int8 is exact in
        bfloat16.
    """
    plain = functools.partial(_plain, tied=tied)
    rows = x.shape[0]
    if rows > MOST_ROWS or any(disjoint(*AXES).values()):
        return plain(x, kernel)
    if rows == 1 and not tied:
        on_cpu = _sums
    else:
        narrow = dtype if rows >= FEWEST_NARROW else None
        on_cpu = functools.partial(_blocks, tied=tied, dtype=narrow or x.dtype)
    y: Any = jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=plain)
    return y


def _plain(x, kernel, *, tied):
    return jnp.einsum(
        "nx,yx->ny" if tied else "nx,xy->ny",
        x,
        kernel.astype(x.dtype),
        preferred_element_type=jnp.float32,
    )


def _sums(x, kernel):
    """Returns the product of one row: TERMS parts of the inputs element by element, then a sum.

    XLA vectorizes the first step and runs it on all cores. The barrier keeps the two apart: in one
    loop it vectorizes neither.
    """
    inputs, outputs = kernel.shape
    terms = math.gcd(inputs, TERMS)
    parts = kernel.reshape(terms, inputs // terms, outputs)
    factors = x.astype(jnp.float32).reshape(terms, inputs // terms, 1)
    added = sum(factors[i] * parts[i].astype(jnp.float32) for i in range(terms))
    added = jax.lax.optimization_barrier(added)
    return jnp.ones((1, inputs // terms)) @ added


def _blocks(x, kernel, *, tied, dtype):
    """Returns the product, OUTPUTS columns at a time."""
    axis = 0 if tied else 1
    x = x.astype(dtype)
    size = min(OUTPUTS, kernel.shape[axis])
    count, rest = divmod(kernel.shape[axis], size)

    def columns(start, width):
        part = jax.lax.dynamic_slice_in_dim(kernel, start, width, axis)
        return _plain(x, part, tied=tied)

    starts = size * jnp.arange(count)
    blocks = jax.lax.map(lambda start: columns(start, size), starts)
    y = blocks.swapaxes(0, 1).reshape(x.shape[0], count * size)
    if not rest:
        return y
    return jnp.concatenate([y, columns(count * size, rest)], axis=1)
