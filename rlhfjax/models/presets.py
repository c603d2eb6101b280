"""Model configs by name: `preset("gpt2-124m")`.

Parameter counts are pinned in tests/models/test_presets.py.
"""

from typing import Any

from rlhfjax.config import build
from rlhfjax.errors import ConfigError
from rlhfjax.json_text import shown
from rlhfjax.models.config import TransformerConfig

# GPT-1 (Radford et al. 2018, section 4.1): a norm after each sum, learned positions, N(0, 0.02),
# dropout 0.1. The vocabulary is 40,000 merges and 478 characters (released encoder). Its GELU is
# the tanh form (released code).
GPT1 = {
    "vocab_size": 40478,
    "max_length": 512,
    "positions": "learned",
    "norm": "layernorm",
    "mlp": "gelu",
    "residual": "post_norm",
    "bias": True,
    "dropout": 0.1,
}
# GPT-2 (Radford et al. 2019, Table 2 and the released hparams): norms before each sublayer and one
# after the last layer; context 1024. Residual projections start smaller by
# 1/sqrt(number of residual layers) (section 2.3).
GPT2 = GPT1 | {
    "vocab_size": 50257,
    "max_length": 1024,
    "residual": "pre_norm",
    "scale_residual_init": True,
}
# GPT-3 (Brown et al. 2020, section 2.1): "the same model and architecture as GPT-2", context 2048.
# In the paper every second layer is locally banded sparse, of an unpublished width; ours are all
# dense. attention_pattern=("full", "window"), window=N is the banded model. The paper names no
# dropout.
GPT3 = GPT2 | {"max_length": 2048, "dropout": 0.0}
# Llama 2 (Touvron et al. 2023, section 2.2): RMSNorm, SwiGLU, RoPE, no biases, untied output,
# context 4096. MLP widths are from config.json of the release.
LLAMA2 = {"vocab_size": 32000, "max_length": 4096, "tie_embeddings": False}
# Llama 3 (Grattafiori et al. 2024, Table 3; context 8192 and vocabulary from config.json of the 8B
# release).
LLAMA3 = LLAMA2 | {"vocab_size": 128256, "max_length": 8192, "rope_theta": 500000.0}
# Llama 3.1 and 3.2 (Grattafiori et al. 2024, section 3.4.2; config.json of each release): rotary
# frequencies lowered for a context of 131,072; the 3.2 releases have a tied output.
LLAMA3_SCALING = {
    "kind": "llama3",
    "factor": 8.0,
    "original_length": 8192,
    "low_frequency": 1.0,
    "high_frequency": 4.0,
}
LLAMA31 = LLAMA3 | {"max_length": 131072, "rope_scaling": LLAMA3_SCALING}
LLAMA32 = LLAMA31 | {
    "rope_scaling": LLAMA3_SCALING | {"factor": 32.0},
    "tie_embeddings": True,
}
# Pythia (Biderman et al. 2023, Table 1; the yml files of its repository; vocabularies as padded in
# each config.json): GPT-NeoX, parallel attention and MLP, RoPE on a quarter of each head, untied
# output. config.json has "gelu", which is x Phi(x); the training kernel ("bias-gelu-fusion") used
# the tanh form.
PYTHIA = {
    "vocab_size": 50304,
    "max_length": 2048,
    "rope_fraction": 0.25,
    "norm": "layernorm",
    "mlp": "gelu_exact",
    "residual": "parallel",
    "bias": True,
    "tie_embeddings": False,
    "scale_residual_init": True,
}
# Qwen2.5 (Qwen Team 2024, section 2 and Table 1; config.json of the release): a Llama with biases
# on query, key and value.
QWEN2 = {
    "vocab_size": 151936,
    "max_length": 32768,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "qkv_bias": True,
}
# Qwen3 (Qwen Team 2025, section 2 and Table 1; config.json of each release): no biases, queries and
# keys normalized, heads of 128 at every width; 4B and smaller have a tied output.
QWEN3 = {
    "vocab_size": 151936,
    "max_length": 40960,
    "n_kv_heads": 8,
    "d_head": 128,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "qk_norm": "head",
}
# Mistral 7B (Jiang et al. 2023, Table 1; config.json of v0.1): a Llama with a window in each layer.
MISTRAL = {
    "vocab_size": 32000,
    "max_length": 32768,
    "attention_pattern": ("window",),
    "window": 4096,
    "tie_embeddings": False,
}
# Qwen3-30B-A3B (Qwen Team 2025, section 2 and Table 2; config.json of the release): 8 of 128
# experts per token, whose probabilities are normalized.
QWEN3_MOE = QWEN3 | {
    "n_kv_heads": 4,
    "n_experts": 128,
    "experts_per_token": 8,
    "router_loss": 0.001,
    "tie_embeddings": False,
}
# Mixtral 8x7B (Jiang et al. 2024, Table 1; config.json of v0.1): 2 of 8 experts, and no window.
MIXTRAL = {
    "vocab_size": 32000,
    "max_length": 32768,
    "n_kv_heads": 8,
    "rope_theta": 1e6,
    "n_experts": 8,
    "experts_per_token": 2,
    "router_loss": 0.02,
    "tie_embeddings": False,
}
# Gemma (Gemma Team 2024, Table 1; config.json): scaled embeddings, norms times 1 + scale, GeGLU,
# heads of 256.
GEMMA = {
    "vocab_size": 256000,
    "max_length": 8192,
    "norm_eps": 1e-6,
    "norm_plus_one": True,
    "scale_embedding": True,
    "mlp": "geglu",
}
# Gemma 2 (Gemma Team 2024b, section 2 and Table 1; config.json): norms before and after each
# sublayer, soft caps, a window in every second layer.
GEMMA2 = GEMMA | {
    "d_head": 256,
    "residual": "sandwich",
    "attention_pattern": ("window", "full"),
    "window": 4096,
    "attention_softcap": 50.0,
    "logit_softcap": 30.0,
}
# Gemma 3 (Gemma Team 2025, section 2; config.json of the 1B release): five layers with a window to
# one without, with separate bases, and normalized queries and keys instead of soft caps.
GEMMA3 = GEMMA | {
    "vocab_size": 262144,
    "max_length": 32768,
    "d_head": 256,
    "residual": "sandwich",
    "attention_pattern": ("window",) * 5 + ("full",),
    "window": 512,
    "rope_theta": 1e6,
    "window_rope_theta": 10000.0,
    "qk_norm": "head",
}
# Phi-3-mini (Abdin et al. 2024, section 2; config.json of the 4k release): a Llama whose window is
# half of its context.
PHI3 = {
    "vocab_size": 32064,
    "max_length": 4096,
    "attention_pattern": ("window",),
    "window": 2047,
    "tie_embeddings": False,
}
# OLMo 2 (OLMo Team 2025, section 2; config.json of each release): norms after each sublayer;
# queries and keys normalized over all heads.
OLMO2 = {
    "vocab_size": 100352,
    "max_length": 4096,
    "rope_theta": 500000.0,
    "norm_eps": 1e-6,
    "residual": "norm_after",
    "qk_norm": "projection",
    "tie_embeddings": False,
}
# SmolLM3 (config.json of the release): a Llama with a tied output; each fourth layer has no RoPE.
SMOLLM3 = {
    "vocab_size": 128256,
    "max_length": 65536,
    "rope_theta": 5e6,
    "norm_eps": 1e-6,
    "attention_pattern": ("full",) * 3 + ("full_no_rope",),
}
# SmolLM2 (config.json of each release): a Llama with a tied output; the two smaller models have
# grouped keys.
SMOLLM2 = {"vocab_size": 49152, "max_length": 8192, "rope_theta": 100000.0}


def _sizes(
    family: dict,
    n_layers: int,
    d_model: int,
    n_heads: int,
    d_ff: int,
    **fields: Any,
) -> dict[str, Any]:
    return {
        **family,
        "n_layers": n_layers,
        "d_model": d_model,
        "n_heads": n_heads,
        "d_ff": d_ff,
        **fields,
    }


def _gpt(
    family: dict,
    n_layers: int,
    d_model: int,
    n_heads: int,
    **fields: Any,
) -> dict[str, Any]:
    return _sizes(family, n_layers, d_model, n_heads, 4 * d_model, **fields)


PRESETS: dict[str, dict[str, Any]] = {
    # Small Llamas with a tied output, for benchmarks.
    "tiny": _sizes({"max_length": 1024}, 4, 128, 4, 352, vocab_size=4096),
    "small": _sizes({"max_length": 1024}, 6, 384, 6, 1024, vocab_size=8192),
    "gpt1": _gpt(GPT1, 12, 768, 12),
    # Radford et al. 2019, Table 2: layers and widths; heads of 64 from the released hparams.
    "gpt2-124m": _gpt(GPT2, 12, 768, 12),
    "gpt2-355m": _gpt(GPT2, 24, 1024, 16),
    "gpt2-774m": _gpt(GPT2, 36, 1280, 20),
    "gpt2-1.5b": _gpt(GPT2, 48, 1600, 25),
    # Brown et al. 2020, Table 2.1, with two misprints corrected: 24 heads of 128 are not XL's width
    # of 2048, and 13B's 40 heads of 128 are not 5140. Stiennon et al. 2020, Table 3, has 16 heads
    # and 5120 for the same models.
    "gpt3-125m": _gpt(GPT3, 12, 768, 12),
    "gpt3-350m": _gpt(GPT3, 24, 1024, 16),
    "gpt3-760m": _gpt(GPT3, 24, 1536, 16),
    "gpt3-1.3b": _gpt(GPT3, 24, 2048, 16),  # printed: 24 heads
    "gpt3-2.7b": _gpt(GPT3, 32, 2560, 32),
    "gpt3-6.7b": _gpt(GPT3, 32, 4096, 32),
    "gpt3-13b": _gpt(GPT3, 40, 5120, 40),  # printed: width 5140
    "gpt3-175b": _gpt(GPT3, 96, 12288, 96),
    # Stiennon et al. 2020, Table 3: GPT-3's architecture, 2048 learned positions
    "stiennon-1.3b": _gpt(GPT3, 24, 2048, 16),
    "stiennon-3b": _gpt(GPT3, 32, 2560, 32),
    "stiennon-6.7b": _gpt(GPT3, 32, 4096, 32),
    "stiennon-13b": _gpt(GPT3, 40, 5120, 40),
    "llama2-7b": _sizes(LLAMA2, 32, 4096, 32, 11008),
    "llama2-13b": _sizes(LLAMA2, 40, 5120, 40, 13824),
    "llama2-70b": _sizes(LLAMA2, 80, 8192, 64, 28672, n_kv_heads=8),
    "llama3-8b": _sizes(LLAMA3, 32, 4096, 32, 14336, n_kv_heads=8),
    "llama3.1-8b": _sizes(LLAMA31, 32, 4096, 32, 14336, n_kv_heads=8),
    "llama3.2-1b": _sizes(LLAMA32, 16, 2048, 32, 8192, n_kv_heads=8),
    "llama3.2-3b": _sizes(LLAMA32, 28, 3072, 24, 8192, n_kv_heads=8),
    # init_std is sqrt(2 / (5 d)) where the yml has "small_init". Its "wang_init" of the residual
    # projections, 2 / (l sqrt(d)), is 1.12 (1B) and 0.79 (2.8B) times ours. The yml of 6.9B names
    # neither, so it has GPT-NeoX's defaults, which are ours.
    "pythia-1b": _gpt(PYTHIA, 16, 2048, 8, init_std=(2 / 5 / 2048) ** 0.5),
    "pythia-2.8b": _gpt(PYTHIA, 32, 2560, 32, init_std=(2 / 5 / 2560) ** 0.5),
    "pythia-6.9b": _gpt(PYTHIA, 32, 4096, 32, vocab_size=50432),
    "qwen2.5-0.5b": _sizes(QWEN2, 24, 896, 14, 4864, n_kv_heads=2),
    "smollm2-135m": _sizes(SMOLLM2, 30, 576, 9, 1536, n_kv_heads=3, init_std=576**-0.5),
    "smollm2-360m": _sizes(SMOLLM2, 32, 960, 15, 2560, n_kv_heads=5),
    "smollm2-1.7b": _sizes(SMOLLM2, 24, 2048, 32, 8192, rope_theta=130000.0),
    "smollm3-3b": _sizes(SMOLLM3, 36, 2048, 16, 11008, n_kv_heads=4),
    "qwen3-0.6b": _sizes(QWEN3, 28, 1024, 16, 3072),
    "qwen3-1.7b": _sizes(QWEN3, 28, 2048, 16, 6144),
    "qwen3-4b": _sizes(QWEN3, 36, 2560, 32, 9728),
    "qwen3-8b": _sizes(QWEN3, 36, 4096, 32, 12288, tie_embeddings=False),
    "qwen3-30b-a3b": _sizes(QWEN3_MOE, 48, 2048, 32, 768),
    "mixtral-8x7b": _sizes(MIXTRAL, 32, 4096, 32, 14336),
    "mistral-7b": _sizes(MISTRAL, 32, 4096, 32, 14336, n_kv_heads=8),
    "gemma-2b": _sizes(GEMMA, 18, 2048, 8, 16384, n_kv_heads=1),
    "gemma2-2b": _sizes(GEMMA2, 26, 2304, 8, 9216, n_kv_heads=4),
    "gemma2-9b": _sizes(GEMMA2, 42, 3584, 16, 14336, n_kv_heads=8),
    "gemma3-1b": _sizes(GEMMA3, 26, 1152, 4, 6912, n_kv_heads=1),
    "phi3-mini": _sizes(PHI3, 32, 3072, 32, 8192),
    "olmo2-1b": _sizes(OLMO2, 16, 2048, 16, 8192),
    "olmo2-7b": _sizes(OLMO2, 32, 4096, 32, 11008),
}


def preset(name: str, **changes: Any) -> TransformerConfig:
    """Returns a named config with fields changed: preset("gpt2-124m", dropout=0.0).

    Raises:
      ConfigError: the name is not in PRESETS, or TransformerConfig lacks a field.
    """
    if name not in PRESETS:
        accepted = ", ".join(PRESETS)
        raise ConfigError(
            f"model preset {shown(name)} is unknown: accepted are {accepted}"
        )
    return build(TransformerConfig, {**PRESETS[name], **changes}, "model")
