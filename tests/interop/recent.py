"""Small configs of the families that `transformers` has and that combine further options.

What an option does is tested in tests/models; these are for files and for whole models.
"""

from rlhfjax.models import TransformerConfig
from rlhfjax.models.config import RopeScaling
from tests.models.families import SIZE

RECENT = {
    "llama3": TransformerConfig(
        **SIZE,
        n_kv_heads=2,
        rope_theta=500.0,
        rope_scaling=RopeScaling(
            "llama3",
            factor=4.0,
            original_length=16,
            low_frequency=1.0,
            high_frequency=4.0,
        ),
    ),
    "llama-linear": TransformerConfig(
        **SIZE, attention_bias=True, rope_scaling=RopeScaling("linear", factor=2.0)
    ),
    "llama-yarn": TransformerConfig(
        **SIZE,
        tie_embeddings=False,
        rope_scaling=RopeScaling("yarn", factor=4.0, original_length=8, beta_fast=2.0),
    ),
    "qwen3": TransformerConfig(
        **SIZE, n_kv_heads=2, d_head=8, norm_eps=1e-6, qk_norm="head"
    ),
    "mistral": TransformerConfig(
        **SIZE,
        n_kv_heads=2,
        tie_embeddings=False,
        attention_pattern=("window",),
        window=5,
    ),
    "qwen2-window": TransformerConfig(
        **SIZE,
        n_kv_heads=2,
        qkv_bias=True,
        norm_eps=1e-6,
        attention_pattern=("full", "window"),
        window=5,
    ),
    "gemma": TransformerConfig(
        **SIZE,
        n_kv_heads=1,
        d_head=8,
        norm_plus_one=True,
        scale_embedding=True,
        mlp="geglu",
    ),
    "gemma2": TransformerConfig(
        **SIZE,
        n_kv_heads=2,
        d_head=8,
        residual="sandwich",
        norm_plus_one=True,
        scale_embedding=True,
        mlp="geglu",
        attention_pattern=("window", "full"),
        window=5,
        attention_scale=12**-0.5,
        attention_softcap=2.0,
        logit_softcap=3.0,
    ),
    "gemma3": TransformerConfig(
        **SIZE | {"n_layers": 3},
        n_kv_heads=1,
        d_head=8,
        residual="sandwich",
        norm_plus_one=True,
        scale_embedding=True,
        mlp="geglu",
        attention_pattern=("window", "window", "full"),
        window=5,
        window_rope_theta=50.0,
        rope_scaling=RopeScaling("linear", factor=2.0),
        qk_norm="head",
    ),
    "phi3": TransformerConfig(
        **SIZE,
        n_kv_heads=2,
        d_head=8,
        rope_fraction=0.5,
        tie_embeddings=False,
        attention_pattern=("window",),
        window=5,
    ),
    "olmo2": TransformerConfig(
        **SIZE,
        n_kv_heads=2,
        residual="norm_after",
        qk_norm="projection",
        tie_embeddings=False,
    ),
    "smollm3": TransformerConfig(
        **SIZE, n_kv_heads=2, attention_pattern=("full", "full_no_rope")
    ),
}
