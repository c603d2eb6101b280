"""Scaled rotary frequencies: by hand, and where they join."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.models.config import RopeScaling
from rlhfjax.models.rope import frequencies, rope_tables, scaled


def angles(scaling, dim=8, theta=10000.0):
    return np.asarray(scaled(frequencies(dim, theta), theta, scaling))


def test_linear_scaling_is_interpolation_of_positions():
    """Position 3 s is then where position 3 was."""
    plain = rope_tables(jnp.array([3]), 8, 1e4)
    stretched = rope_tables(jnp.array([12]), 8, 1e4, RopeScaling("linear", factor=4.0))
    for a, b in zip(plain, stretched, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_llama3_by_hand():
    """theta 10000 and 8 dimensions: 1, 0.1, 0.01, 0.001, of which the wavelengths are 6.3, 63, 628
    and 6283 tokens. With 640 tokens: 101.9, 10.2, 1.02 and 0.10 turns.

    Between 1 and 4 turns m = (1.0186 - 1) / 3 = 0.0062: 0.0062 x 0.01 + 0.9938 x 0.01 / 8.
    """
    got = angles(RopeScaling("llama3", factor=8.0, original_length=640))
    m = (640 * 0.01 / (2 * math.pi) - 1) / 3
    expected = [1.0, 0.1, m * 0.01 + (1 - m) * 0.01 / 8, 0.001 / 8]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_yarn_by_hand():
    """Turns t at index 4 ln(L / 2 pi t) / ln 10000, with L = 640: 32 turns at 0.5, one at 2.008;
    rounded outwards 0 and 3, so that the ramp is 0, 1/3, 2/3, 1.
    """
    scaling = RopeScaling("yarn", factor=16.0, original_length=640)
    slow = np.array([0, 1 / 3, 2 / 3, 1])
    plain = np.array([1, 0.1, 0.01, 0.001])
    np.testing.assert_allclose(
        angles(scaling), slow * plain / 16 + (1 - slow) * plain, rtol=1e-5
    )
    # The temperature: both factors of a score are longer by 0.1 ln 16 + 1.
    cos, sin = rope_tables(jnp.array([5]), 8, 1e4, scaling)
    np.testing.assert_allclose(np.hypot(cos, sin), 0.1 * math.log(16) + 1, rtol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_a_factor_of_1_changes_nothing(kind):
    scaling = RopeScaling(kind, factor=1.0, original_length=640)
    plain, same = (
        rope_tables(jnp.array([7]), 8, 1e4, s) for s in (RopeScaling(), scaling)
    )
    for a, b in zip(plain, same, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
