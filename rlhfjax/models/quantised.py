"""int8 for inference: weights with a scale an output channel, cached keys and values with a scale a token and head.

    q = round(x / s),  s = max |x| / 127    over the axes that share the scale, so that |x - s q| <= s / 2

A quantised kernel stands where the float one stood, as int8, with its scales beside it: `kernel` and `kernel_scale`,
and `tokens`, `tokens_scale` of an embedding. The layers know what to do by its dtype; biases and norms stay as they
are. A gradient passes through to what a layer was given, none to the weights.

Source: absmax quantisation, vector-wise (Dettmers et al. 2022, LLM.int8(), section 2.1 and 3.1), of weights alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from rlhfjax.errors import ConfigError
from rlhfjax.models.linear import linear

SCALE = "_scale"
LARGEST = 127.0


class Quantised(NamedTuple):
    """values * scale, the scale without the axes that share it."""

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]


def absmax(x: Float[Array, "..."], axes: tuple[int, ...]) -> Quantised:
    """Symmetric int8: q = round(x / s) with s = max |x| / 127 over `axes`; zeros have scale 0 and stay zeros."""
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(axes, keepdims=True) / LARGEST
    values = jnp.round(wide / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8)
    return Quantised(values, scale.squeeze(axes))


def weights(params: dict[str, Any], axes: dict[str, Any]) -> dict[str, Any]:
    """The parameters with int8 in the place of every projection's kernel, the embedding and the output matrix.

    Args:
      params: of a language model, or any tree of such.
      axes: the names of their axes, `Model.axes()`; adapters may be missing from it and stay as they are.
    Raises:
      ConfigError: the weights are int8 already.
    """
    out: dict[str, Any] = {}
    for name, value in params.items():
        names = axes.get(name)
        shared = () if isinstance(value, dict) else _inputs(name, names)
        if isinstance(value, dict):
            out[name] = weights(value, names or {})
        elif not shared:
            out[name] = value
        elif value.dtype == jnp.int8:
            raise ConfigError(f"quantised.weights: {name} is int8 already")
        else:
            out[name], out[name + SCALE] = absmax(value, shared)
    return out


def _inputs(name: str, names: tuple[str, ...] | None) -> tuple[int, ...]:
    """The axes that one scale is shared by: what is summed over; none of what stays as it is."""
    if name not in ("kernel", "tokens") or names is None or len(names) < 2:
        return ()
    if name == "tokens":
        return (1,)  # a scale a row, which is an output of the tied matrix
    first = 1 if names[0] == "layers" else 0
    return (first, first + 1) if names[first] == "heads" else (first,)


def linear_int8(
    x: Float[Array, "b t x"], kernel: Int8[Array, "x y"], scale: Float[Array, " y"]
) -> Float[Array, "b t y"]:
    """(x . kernel) * scale in x's dtype."""
    # Tied to x, the kernel is not made wide outside of a decoding loop, where it would be read at its full width.
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    return (linear(x, kernel.astype(x.dtype)).astype(jnp.float32) * scale).astype(x.dtype)
