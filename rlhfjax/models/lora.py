"""Low-rank adapters: h = W x + (alpha / r) B A x, with W frozen and A, B trained.

A model with adapters has the parameters of one without them, plus `lora_a` [in…, r] and `lora_b`
[r, out…] beside the `kernel` [in…, out…] of every adapted projection. Base and adapters are two
trees, which `state.merge_params` joins; the base stays the same arrays, whoever else uses them.

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
    """Which projections have adapters, and their rank.

    Raises:
      ConfigError: a quantized base without adapters, or `targets` is not a regular expression.
    """

    rank: SizeOrNone = 0
    """Rank r of the adapters; 0: no adapters, all parameters are trained."""
    alpha: Positive = 16.0
    """The adapters' product is scaled by alpha / rank."""
    targets: str = "attention/(query|value)"
    """Regular expression searched for in the paths of projections, such as
    backbone/layers/layer_3/attention/query. The paper adapts query and value (section 4.2), QLoRA
    all projections: "attention|mlp"."""
    dropout: ShareBelow1 = 0.0
    """Dropout rate of the adapters' input."""
    base: Literal["float32", "int8", "nf4"] = "float32"
    """Format of the frozen kernels of the layers; see models.quantized."""

    def __post_init__(self):
        if self.base != "float32" and not self.rank:
            raise ConfigError(
                f"lora.base={self.base!r}: must be float32 with lora.rank=0, which has no adapters"
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
    """Returns the tree without adapters."""
    kept = {name: value for name, value in tree.items() if name not in NAMES}
    return _map_subtrees(base, kept)


def _map_subtrees(function, tree: Params) -> Params:
    return {
        name: function(value) if isinstance(value, dict) else value
        for name, value in tree.items()
    }


def adapters(config: LoraConfig, tree: Params) -> Params:
    """Returns the adapters of the projections whose paths match `targets`.

    Args:
      tree: parameters with adapters at every projection.

    Raises:
      ConfigError: `targets` matches no path, or one of experts, which have no adapters.
    """
    paths: list[str] = []
    matched = _adapters(config, tree, "", paths)
    if not matched:
        raise ConfigError(
            f"lora.targets={config.targets!r} matches none of {', '.join(paths)}"
        )
    return matched


def _adapters(config: LoraConfig, tree: Params, path: str, paths: list[str]) -> Params:
    """Returns the matching adapters below `path`, and appends all projections to `paths`."""
    if NAMES[0] in tree:
        paths.append(path)
        matches = re.search(config.targets, path)
        return {name: tree[name] for name in NAMES} if matches else {}
    matched = {}
    for name, subtree in tree.items():
        if isinstance(subtree, dict):
            subpath = f"{path}/{name}".lstrip("/")
            if "router" in tree and re.search(config.targets, subpath):
                raise ConfigError(
                    f"lora.targets={config.targets!r} matches {subpath}: experts have no "
                    "adapters, attention has them"
                )
            if part := _adapters(config, subtree, subpath, paths):
                matched[name] = part
    return matched


def merge(config: LoraConfig, params: Params) -> Params:
    """Returns plain parameters of the same function: kernels W + (alpha / r) A B, in float32.

    Stacked layers, whose arrays all have a first axis "layers", stay stacked.
    """
    if NAMES[0] not in params:
        return _map_subtrees(lambda subtree: merge(config, subtree), params)
    kernel, a, b = params["kernel"], *(params[name] for name in NAMES)

    def product(a, b):
        return jnp.tensordot(a, b, 1, precision="highest")

    stacked = kernel.ndim == a.ndim + b.ndim - 3
    delta = jax.vmap(product)(a, b) if stacked else product(a, b)
    return {**base(params), "kernel": kernel + config.scale * delta}
