"""Fresh parameters of a model with their logical axis names, and trees of stacked layers."""

import jax
import jax.numpy as jnp

from rlhfjax.models import blocks, parts
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.lora import LoraConfig, Params
from rlhfjax.models.rope import rope_of

# Names of parameters that are cast to the compute dtype where they are used.
MATRICES = ("kernel", "tokens", "positions")


def init_named(
    config: TransformerConfig,
    head: str,
    lora: LoraConfig,
    key: jax.Array,
) -> Params:
    """Returns fresh parameters, each a `parts.Named`; with LoRA adapters if lora.rank > 0."""
    embed_key, layer_key, head_key = jax.random.split(key, 3)
    tokens = jnp.zeros((1, 1), jnp.int32)
    x = jnp.zeros((1, 1, config.d_model), config.activation_dtype)
    rope = rope_of(config, tokens)
    block = blocks.Block(config, lora)

    def attend(q, k, v):
        return q

    def init_layer(key):
        return block.init(key, x, rope, attend)["params"]

    layer_keys = jax.random.split(layer_key, config.n_layers)
    if config.scan_layers:
        layers = jax.vmap(init_layer)(layer_keys)
    else:
        layers = {
            f"layer_{i}": init_layer(layer_keys[i]) for i in range(config.n_layers)
        }
    embed = blocks.Embed(config).init(embed_key, tokens, tokens)["params"]
    backbone = {"embed": embed, "layers": layers}
    if config.final_norm:
        backbone["norm"] = blocks.Norm(config).init(key, x)["params"]
    params: Params = {"backbone": backbone}
    if head == "scalar":
        params["head"] = blocks.ScalarHead(config.d_model).init(head_key)["params"]
    elif not config.tie_embeddings:
        params["head"] = blocks.Unembed(config).init(head_key)["params"]
    return params


def axis_names(config: TransformerConfig, named: Params) -> Params:
    """Returns the logical axis names of each array in the tree of `init_named`."""

    def is_named(x):
        return isinstance(x, parts.Named)

    tree = jax.tree.map(lambda p: p.names, named, is_leaf=is_named)
    if config.scan_layers:
        tree["backbone"]["layers"] = jax.tree.map(
            lambda names: ("layers", *names),
            tree["backbone"]["layers"],
            is_leaf=lambda x: isinstance(x, tuple),
        )
    return tree


def in_compute_dtype(config: TransformerConfig, params: Params, axes: Params) -> Params:
    """Returns the parameters with all matrices in the dtype of activations.

    So a model computes the same bits, and casts nothing more; only products of narrower inputs
    (`bfloat16_products`) still round theirs. A router computes in float32, and norms, biases and
    quantized weights stay as they are.

    Args:
      axes: the logical axis names, `Model.axes()`.
    """
    out: Params = {}
    for name, value in params.items():
        names = axes.get(name) or ()
        if isinstance(value, dict):
            out[name] = in_compute_dtype(config, value, axes.get(name) or {})
        elif name in MATRICES and "router" not in names and value.dtype == jnp.float32:
            out[name] = value.astype(config.activation_dtype)
        else:
            out[name] = value
    return out


def stacked(params: Params) -> Params:
    """Returns the parameters of a model with `scan_layers`, from those of one without it."""
    layers = params["backbone"]["layers"]
    in_order = [layers[f"layer_{i}"] for i in range(len(layers))]
    return _with_layers(params, jax.tree.map(lambda *x: jnp.stack(x), *in_order))


def unstacked(params: Params) -> Params:
    """Returns the parameters of a model without `scan_layers`, from those of one with it."""
    layers = params["backbone"]["layers"]
    n = jax.tree.leaves(layers)[0].shape[0]
    separate = {
        f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(n)
    }
    return _with_layers(params, separate)


def _with_layers(params, layers):
    return params | {"backbone": params["backbone"] | {"layers": layers}}
