"""Rotary position embeddings: frequencies, their scaling to longer contexts, and the rotation."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhfjax.models.config import Attention, RopeScaling, TransformerConfig

RopeTables = tuple[Float[Array, "b t half"], Float[Array, "b t half"]]
"""cos and sin of the angle of each position, float32."""

UNSCALED = RopeScaling()


def frequencies(dim: int, theta: float) -> Float[Array, " half"]:
    """Returns theta^(-2i / dim), i = 0 .. dim/2 - 1, in radians per token, float32.

    Source: Su et al. 2021, eq. 15.
    """
    exponents = -jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    return theta**exponents


def scaled(
    plain: Float[Array, " half"], theta: float, scaling: RopeScaling
) -> Float[Array, " half"]:
    """Returns the frequencies of a model with `scaling`; RopeScaling has the equations."""
    if scaling.kind == "none":
        return plain
    kept = 0.0 if scaling.kind == "linear" else _kept(plain, theta, scaling)
    return (1 - kept) * plain / scaling.factor + kept * plain


def _kept(plain, theta, scaling):
    """Returns the share m of each frequency that stays as it is, from 0 to 1."""
    if scaling.kind == "llama3":
        turns = scaling.original_length * plain / (2 * math.pi)
        low = scaling.low_frequency
        high = scaling.high_frequency
        return jnp.clip((turns - low) / (high - low), 0, 1)
    half = plain.shape[0]

    def index(turns):
        """Returns the fractional index of the frequency with this number of turns."""
        length = scaling.original_length / (2 * math.pi * turns)
        return half * math.log(length) / math.log(theta)

    # The released code rounds outwards, and keeps the ramp from being a step.
    first = max(math.floor(index(scaling.beta_fast)), 0)
    last = min(math.ceil(index(scaling.beta_slow)), 2 * half - 1)
    width = max(last - first, 1e-3)
    ramp = (np.arange(half, dtype=np.float32) - first) / width
    return 1 - jnp.clip(ramp, 0, 1)


def rope_tables(
    positions: Int[Array, "*b"],
    dim: int,
    theta: float,
    scaling: RopeScaling = UNSCALED,
) -> tuple[Float[Array, "*b half"], Float[Array, "*b half"]]:
    """Returns cos and sin of position * frequency in float32, with yarn times its factor."""
    frequency = scaled(frequencies(dim, theta), theta, scaling)
    angle = positions[..., None].astype(jnp.float32) * frequency
    cos = jnp.cos(angle)
    sin = jnp.sin(angle)
    if scaling.kind != "yarn":
        return cos, sin
    factor = attention_factor(scaling)
    return cos * factor, sin * factor


def attention_factor(scaling: RopeScaling) -> float:
    """Returns the factor of cos and sin in kind "yarn"."""
    if scaling.attention_factor is None:
        return usual_factor(scaling.factor)
    return scaling.attention_factor


def usual_factor(factor: float) -> float:
    """Returns 0.1 ln(factor) + 1 (Peng et al. 2023, eq. 22)."""
    return 0.1 * math.log(factor) + 1


def rope_of(
    config: TransformerConfig,
    positions: Int[Array, "b t"],
    kind: Attention = "full",
) -> RopeTables | None:
    """Returns the RoPE tables of a kind of layer at `positions`; None if it does not rotate."""
    if config.positions != "rope" or kind == "full_no_rope":
        return None
    theta = config.rope_theta
    scaling = config.rope_scaling
    if kind == "window" and config.window_rope_theta is not None:
        theta = config.window_rope_theta
        scaling = UNSCALED
    return rope_tables(positions, config.rope_dim, float(theta), scaling)


def identity(like: RopeTables) -> RopeTables:
    """Returns the tables of a rotation by 0."""
    return jnp.ones_like(like[0]), jnp.zeros_like(like[1])


def rotate(
    x: Float[Array, "b h t k"],
    tables: RopeTables,
) -> Float[Array, "b h t k"]:
    """Rotates each pair (x_i, x_{i + half}) by the angle of its position.

    This is the half-split layout of Hugging Face's Llama. If the tables are for fewer than k
    dimensions, only the first 2 half of them are rotated (GPT-NeoX).
    """
    dim = 2 * tables[0].shape[-1]
    if dim < x.shape[-1]:
        rotated = rotate(x[..., :dim], tables)
        return jnp.concatenate([rotated, x[..., dim:]], axis=-1)
    cos, sin = (table[:, None, :, None] for table in tables)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    # Reversing an axis swaps the halves; concatenating them is several times slower on a CPU.
    sign = jnp.array([-1.0, 1.0])[:, None]
    rotated = pairs * cos + pairs[..., ::-1, :] * (sin * sign)
    return rotated.reshape(x.shape).astype(x.dtype)
