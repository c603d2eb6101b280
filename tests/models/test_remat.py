"""Which products the backward pass recomputes, counted in the program of a gradient."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rlhfjax.models import Model, TransformerConfig, quantized
from rlhfjax.models.lora import LoraConfig
from rlhfjax.state import merge_params

CONFIG = TransformerConfig(
    vocab_size=96, d_model=32, n_layers=2, n_heads=4, d_ff=48, max_length=64
)
TOKENS = jax.ShapeDtypeStruct((4, 32), jnp.int32)


def products(jaxpr):
    """Returns how many products are with weights, and how many are attention's."""
    count = collections.Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            _, (batch, _) = equation.params["dimension_numbers"]
            count["attention" if batch else "weights"] += 1
        for inner in jax.core.jaxprs_in_params(equation.params):
            count += products(inner)
    return count


def of_gradient(model, params, trained):
    """Returns the products of the gradient in one layer, of two that are alike."""

    def loss(trained, params, tokens):
        return model.hidden(merge_params(params, trained), tokens).sum()

    traced = jax.jit(jax.grad(loss)).trace(trained, params, TOKENS)
    layers = 1 if model.config.scan_layers else model.config.n_layers
    count = products(traced.jaxpr.jaxpr)
    return count["weights"] / layers, count["attention"] / layers


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16_products", "bfloat16"])
@pytest.mark.parametrize(
    ("remat", "weights", "attention"),
    [
        # Query, key, value, out, gate, up, down, each with two gradients. Scores and output, with
        # four.
        ("none", 7 + 14, 2 + 4),
        ("dots", 7 + 14, 2 + 4 + 2),
        ("offload", 7 + 14, 2 + 4 + 2),
        ("full", 7 + 14 + 6, 2 + 4 + 2),  # no product reads the output of `down`
    ],
)
def test_products_with_weights_are_recomputed_by_full_alone(
    remat, weights, attention, dtype, scan
):
    config = dataclasses.replace(CONFIG, dtype=dtype, remat=remat, scan_layers=scan)
    model = Model(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert of_gradient(model, {}, params) == (weights, attention)


@pytest.mark.parametrize("base", ["int8", "nf4"])
@pytest.mark.parametrize(("remat", "more"), [("none", 0), ("dots", 0), ("full", 10)])
def test_nor_are_those_with_quantized_weights(remat, more, base):
    """A frozen kernel has no gradient; query and value have two products of adapters each."""
    lora = LoraConfig(rank=2, base=base)
    config = dataclasses.replace(CONFIG, remat=remat, scan_layers=True)
    model = Model(config, lora=lora)

    def init(key):
        return quantized.base(model.init(key), model.axes(), base)

    params = jax.eval_shape(init, jax.random.key(0))
    trained = jax.eval_shape(model.init_trained, jax.random.key(0))
    found, _ = of_gradient(model, params, trained)
    assert found == (7 + 4) + (7 + 2 * 4) + more
