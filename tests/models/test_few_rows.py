"""Int8 products of few rows against the plain product of the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.models import few_rows


@functools.partial(jax.jit, static_argnames=("tied", "dtype"))
def product(x, kernel, tied=False, dtype=None):
    return few_rows.product(x, kernel, tied, dtype)


def numbers(rows, inputs, outputs, tied):
    x = jax.random.normal(jax.random.key(rows), (rows, inputs))
    shape = (outputs, inputs) if tied else (inputs, outputs)
    kernel = jax.random.randint(jax.random.key(inputs), shape, -127, 128, jnp.int8)
    return x, kernel


def by_numpy(x, kernel, tied):
    wide = np.asarray(kernel, np.float64)
    return np.asarray(x, np.float64) @ (wide.T if tied else wide)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 64, 400), (1, 7, 5), (2, 24, 192), (8, 24, 500), (65, 8, 200)],
)
def test_a_product_is_the_plain_one(rows, inputs, outputs, tied):
    x, kernel = numbers(rows, inputs, outputs, tied)
    expected = by_numpy(x, kernel, tied)
    got = product(x, kernel, tied)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * 127 * inputs**0.5)


def test_narrow_inputs_round_x_alone_and_only_from_eight_rows_on():
    """Int8 is exact in bfloat16, so that the product is that of the rounded x."""
    x, kernel = numbers(8, 64, 200, tied=False)
    narrow = x.astype(jnp.bfloat16).astype(jnp.float32)
    rounded, exact = by_numpy(narrow, kernel, False), by_numpy(x, kernel, False)
    assert np.abs(rounded - exact).max() > 1
    got = product(x, kernel, dtype="bfloat16")
    np.testing.assert_allclose(got, rounded, rtol=1e-5, atol=0.01)
    few = product(x[:7], kernel, dtype="bfloat16")
    np.testing.assert_allclose(few, exact[:7], rtol=1e-5, atol=0.01)
