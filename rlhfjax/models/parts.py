"""What the linen modules share: parameters with named axes, activations, initial scales."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from rlhfjax.models.config import TransformerConfig

GELU = {
    "gelu": functools.partial(nn.gelu, approximate=True),
    "gelu_exact": functools.partial(nn.gelu, approximate=False),
}
GATES = {"swiglu": nn.silu, "geglu": GELU["gelu"]}


class Named(struct.PyTreeNode, nn.meta.AxisMetadata):
    """A fresh parameter with the logical names of its axes.

    Linen's own boxes would constrain the parameter to mesh axes.
    """

    value: Any
    names: tuple[str | None, ...] = struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return self.replace(value=val)

    def add_axis(self, index, params):
        raise NotImplementedError("layers are stacked by Model.init")

    remove_axis = add_axis


def parameter(
    module: nn.Module,
    name: str,
    init: float | Callable[..., jax.Array],
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
) -> Any:
    """Returns a float32 parameter.

    Args:
      init: the standard deviation of a normal distribution around 0, or an initializer.
      axes: the logical names of its dimensions.
    """
    make = init if callable(init) else nn.initializers.normal(init)

    def named(*args):
        return Named(make(*args), axes)

    return module.param(name, named, shape, jnp.float32)


def residual_std(config: TransformerConfig) -> float:
    """Returns the init std of the projections that write into the residual stream.

    GPT-2 divides it by the square root of the number of such projections.
    """
    scale = (2 * config.n_layers) ** -0.5 if config.scale_residual_init else 1.0
    return float(config.init_std * scale)
