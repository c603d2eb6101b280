"""Small configs of each family, and parameters that are not all at their init (biases and scales
included).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.models import TransformerConfig
from rlhfjax.models.config import RopeScaling

SIZE = {
    "vocab_size": 61,
    "d_model": 24,
    "n_layers": 2,
    "n_heads": 4,
    "d_ff": 40,
    "max_length": 32,
    "init_std": 0.3,
}
FAMILIES = {
    "llama": TransformerConfig(**SIZE, tie_embeddings=False),
    "llama-gqa": TransformerConfig(**SIZE, n_kv_heads=2, rope_theta=500.0, d_head=8),
    "gpt2": TransformerConfig(
        **SIZE,
        positions="learned",
        norm="layernorm",
        mlp="gelu",
        bias=True,
        scale_residual_init=True,
    ),
    "gpt1": TransformerConfig(
        **SIZE,
        positions="learned",
        norm="layernorm",
        mlp="gelu",
        bias=True,
        residual="post_norm",
    ),
    "neox": TransformerConfig(
        **SIZE,
        norm="layernorm",
        mlp="gelu_exact",
        bias=True,
        residual="parallel",
        rope_fraction=0.25,
        d_head=16,
        tie_embeddings=False,
    ),
    "qwen2": TransformerConfig(
        **SIZE, n_kv_heads=2, qkv_bias=True, rope_theta=1000.0, norm_eps=1e-6
    ),
}
# The further options of the families in use, many in one model.
FEATURES = {
    "gemma-like": TransformerConfig(
        **SIZE | {"n_layers": 3, "init_std": 0.1},
        n_kv_heads=2,
        d_head=8,
        attention_pattern=("window", "full", "full_no_rope"),
        window=5,
        window_rope_theta=50.0,
        rope_scaling=RopeScaling(
            "llama3", factor=4.0, original_length=24, high_frequency=3.0
        ),
        attention_scale=0.25,
        attention_softcap=2.0,
        logit_softcap=3.0,
        qk_norm="head",
        norm_plus_one=True,
        residual="sandwich",
        mlp="geglu",
        scale_embedding=True,
    ),
    "olmo-like": TransformerConfig(
        **SIZE,
        n_kv_heads=2,
        d_head=8,
        attention_pattern=("window",),
        window=4,
        rope_theta=100.0,
        rope_scaling=RopeScaling("yarn", factor=3.0, original_length=64, beta_fast=8.0),
        qk_norm="projection",
        residual="norm_after",
        attention_bias=True,
        tie_embeddings=False,
    ),
    "moe": TransformerConfig(
        **SIZE | {"d_ff": 16},
        n_kv_heads=2,
        qk_norm="head",
        n_experts=6,
        experts_per_token=2,
        router_loss=0.01,
        tie_embeddings=False,
    ),
}
CONFIGS = FAMILIES | FEATURES
# Each option once: "llama" is in "llama-gqa" and "neox" (all heads their own keys, an untied
# output).
DISTINCT = tuple(name for name in CONFIGS if name != "llama")
# For what compiles much: two families that differ in positions, norms, heads and biases at once,
# the others among the slow proofs.
MOSTLY_SLOW = [
    pytest.param(
        name,
        marks=[] if name in ("llama-gqa", "gpt2", "gemma-like") else pytest.mark.slow,
    )
    for name in CONFIGS
]


STD = {
    "scale": 0.1,
    "bias": 0.1,
    "lora_a": 0.15,
    "lora_b": 0.1,
}  # of all others init_std


def random_params(model, seed=0):
    """Parameters of a model, none of them at its init: a bias or a scale that is left out of a sum
    shows.

    They are drawn by numpy, so that no program is compiled for them.
    """
    return random_like(model.shapes(), model.config.init_std, seed)


def random_trained(model, seed=1):
    """The same of what is trained: adapters, and a scalar head."""
    return random_like(model.trained_shapes(), model.config.init_std, seed)


def random_like(shapes, std, seed):
    """Arrays of these shapes from N(0, std), biases, scales and adapters from narrower ones; scales
    around 1.
    """
    rng = np.random.default_rng(seed)

    def draw(path, x):
        name = path[-1].key
        mean = 1.0 if name == "scale" else 0.0
        return jnp.asarray(rng.normal(mean, STD.get(name, std), x.shape), x.dtype)

    return jax.tree.map_with_path(draw, shapes)


def shaken(params, seed=7):
    """Returns the parameters plus N(0, 0.1), so that a missing bias or scale shows."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree,
        [
            x + 0.1 * jax.random.normal(k, x.shape)
            for x, k in zip(leaves, keys, strict=True)
        ],
    )


def tokens(batch, length, seed=1, vocab=61):
    return jnp.asarray(
        np.random.default_rng(seed).integers(2, vocab, (batch, length)), jnp.int32
    )
