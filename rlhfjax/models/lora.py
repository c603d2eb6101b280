"""Low-rank adapters: h = W x + (alpha / r) B A x, with W frozen and A, B trained.

The parameters of a model with adapters are those of one without, plus `lora_a` [in…, r] and `lora_b` [r, out…] beside
the `kernel` [in…, out…] of every projection that is adapted. Base and adapters are two trees that a merge of dicts
makes one (`state.merge_params`): the base stays the same arrays, whoever else uses them.

Source: Hu et al. 2021, eq. 3 and section 4.1.
"""

import dataclasses
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhfjax.errors import ConfigError
from rlhfjax.ranges import Positive, ShareBelow1, SizeOrNone

Params = dict[str, Any]
NAMES = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which projections have adapters, and of what rank; rank 0 is none: everything is trained.

    Raises:
      ConfigError: a quantized base without adapters, or `targets` is no regular expression.
    """

    rank: SizeOrNone = 0
    alpha: Positive = 16.0  # the adapters' product counts alpha / rank
    # searched for in the paths of the projections, such as backbone/layers/layer_3/attention/query; the paper adapts
    # query and value (section 4.2), QLoRA all of them: "attention|mlp"
    targets: str = "attention/(query|value)"
    dropout: ShareBelow1 = 0.0  # of the adapters' input
    base: Literal["float32", "int8", "nf4"] = (
        "float32"  # the frozen kernels of the layers (models.quantized)
    )

    def __post_init__(self):
        if self.base != "float32" and not self.rank:
            raise ConfigError(
                f"lora.base={self.base!r}: a base is quantized under adapters, and lora.rank=0 has none"
            )
        try:
            re.compile(self.targets)
        except re.error as e:
            raise ConfigError(
                f"lora.targets={self.targets!r} is no regular expression: {e}"
            ) from None

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank


def base(tree: Params) -> Params:
    """A tree without adapters."""
    return {
        k: base(v) if isinstance(v, dict) else v
        for k, v in tree.items()
        if k not in NAMES
    }


def adapters(config: LoraConfig, tree: Params) -> Params:
    """The adapters alone of a tree that has them at every projection: those whose paths `targets` is found in.

    Raises:
      ConfigError: it is found in none of them.
    """
    paths: list[str] = []
    found = _adapters(config, tree, "", paths)
    if not found:
        raise ConfigError(
            f"lora.targets={config.targets!r} is found in none of {', '.join(paths)}"
        )
    return found


def _adapters(config: LoraConfig, tree: Params, path: str, paths: list[str]) -> Params:
    if NAMES[0] in tree:
        paths.append(path)
        return (
            {name: tree[name] for name in NAMES}
            if re.search(config.targets, path)
            else {}
        )
    parts = {
        k: _adapters(config, v, f"{path}/{k}".lstrip("/"), paths)
        for k, v in tree.items()
        if isinstance(v, dict)
    }
    return {k: part for k, part in parts.items() if part}


def merge(config: LoraConfig, params: Params) -> Params:
    """Base and adapters to the plain parameters of the same function: W + (alpha / r) A B, in float32.

    Layers that are stacked (a first axis "layers" everywhere) stay so.
    """
    if NAMES[0] not in params:
        return {
            k: merge(config, v) if isinstance(v, dict) else v for k, v in params.items()
        }
    kernel, a, b = params["kernel"], *(params[name] for name in NAMES)

    def product(a, b):
        return jnp.tensordot(a, b, 1, precision="highest")

    stacked = kernel.ndim == a.ndim + b.ndim - 3
    delta = jax.vmap(product)(a, b) if stacked else product(a, b)
    return {**base(params), "kernel": kernel + config.scale * delta}
