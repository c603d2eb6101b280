"""The parameters of a decoding loop: kernels are rounded once, before its first step.

This is for float32 activations with products of narrower inputs. A step has few rows, so that
rounding a kernel would take as long as its product.
"""

import jax.numpy as jnp

from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.lora import NAMES, Params
from rlhfjax.models.quantized import SCALE

# With fewer rows, a step takes less time in float32.
FEWEST_ROWS = 8
PROJECTED = ("kernel", *NAMES)  # parameters that are inputs of products
TIED = "tied"  # the rounded copy of an embedding that is the output too


def rounded(config: TransformerConfig, params: Params, rows: int) -> Params:
    """Returns the parameters with the kernels of all projections, and the output, rounded.

    The embedding, experts and quantized kernels stay as they are.

    Args:
      rows: number of rows that are decoded at a time.
    """
    dtype = config.product_dtype
    if dtype == config.activation_dtype or rows < FEWEST_ROWS:
        return params
    backbone = params["backbone"]
    layers = _with_kernels(backbone["layers"], dtype)
    head = _with_kernels(params.get("head", {}), dtype)
    embed = backbone["embed"]
    if config.tie_embeddings and "tokens" + SCALE not in embed:
        head = {TIED: embed["tokens"].astype(dtype)}
    return {"backbone": {**backbone, "layers": layers}, "head": head}


def _with_kernels(tree: Params, dtype: str) -> Params:
    if "router" in tree:
        return tree
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found[name] = _with_kernels(value, dtype)
        elif name in PROJECTED and jnp.issubdtype(value.dtype, jnp.floating):
            found[name] = value.astype(dtype)
        else:
            found[name] = value
    return found


def tied_output(params: Params) -> tuple[Params, str]:
    """Returns the tree that has the output of a model with a tied one, and its name there."""
    head = params.get("head", {})
    return (head, TIED) if TIED in head else (params["backbone"]["embed"], "tokens")
