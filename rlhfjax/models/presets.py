"""Model configs by name: `preset("gpt2-124m")`.

Parameter counts are pinned in tests/models/test_presets.py.
"""

from typing import Any

from rlhfjax.config import build
from rlhfjax.errors import ConfigError
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
# In the paper every second layer is locally banded sparse; ours are all dense. The paper names no
# dropout.
GPT3 = GPT2 | {"max_length": 2048, "dropout": 0.0}
# Llama 2 (Touvron et al. 2023, section 2.2): RMSNorm, SwiGLU, RoPE, no biases, untied output,
# context 4096. MLP widths are from config.json of the release.
LLAMA2 = {"vocab_size": 32000, "max_length": 4096, "tie_embeddings": False}
# Llama 3 (Grattafiori et al. 2024, Table 3; context 8192 and vocabulary from config.json of the 8B
# release).
LLAMA3 = LLAMA2 | {"vocab_size": 128256, "max_length": 8192, "rope_theta": 500000.0}
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
}


def preset(name: str, **changes: Any) -> TransformerConfig:
    """Returns a named config with fields changed: preset("gpt2-124m", dropout=0.0).

    Raises:
      ConfigError: the name is not in PRESETS, or TransformerConfig lacks a field.
    """
    if name not in PRESETS:
        accepted = ", ".join(PRESETS)
        raise ConfigError(f"model preset {name!r} is unknown: accepted are {accepted}")
    return build(TransformerConfig, {**PRESETS[name], **changes}, "model")
