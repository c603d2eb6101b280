"""Model shapes by name. `preset("gpt2-124m")`; parameter counts are pinned in tests/models/test_presets.py."""

import dataclasses
from typing import Any

from rlhfjax.errors import ConfigError
from rlhfjax.models.config import TransformerConfig

# GPT-2 (Radford et al. 2019, Table 2 and the released hparams): pre-norm, learned positions, context 1024. Residual
# projections start smaller by 1/sqrt(number of residual layers) (section 2.3); dropout 0.1 as in GPT-1 (section 4.1).
GPT2 = {
    "vocab_size": 50257,
    "max_length": 1024,
    "positions": "learned",
    "norm": "layernorm",
    "mlp": "gelu",
    "bias": True,
    "dropout": 0.1,
    "scale_residual_init": True,
}
# GPT-3 (Brown et al. 2020, section 2.1): "the same model and architecture as GPT-2", context 2048. Every second layer
# of theirs is locally banded sparse; ours are all dense. The paper names no dropout.
GPT3 = GPT2 | {"max_length": 2048, "dropout": 0.0}
# Llama 2 (Touvron et al. 2023, section 2.2): RMSNorm, SwiGLU, RoPE, no biases, untied output.
LLAMA2 = {"vocab_size": 32000, "max_length": 4096, "tie_embeddings": False}
# SmolLM2 (config.json of the release): a Llama with grouped keys and a tied output; init_std is 1/sqrt(d_model).
SMOLLM2 = {"vocab_size": 49152, "max_length": 8192, "rope_theta": 100000.0}


def _shape(family: dict, n_layers: int, d_model: int, n_heads: int, d_ff: int, **more: Any) -> dict:
    return family | {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "d_ff": d_ff} | more


def _gpt(family: dict, n_layers: int, d_model: int, n_heads: int) -> dict:
    return _shape(family, n_layers, d_model, n_heads, 4 * d_model)


PRESETS: dict[str, dict[str, Any]] = {
    # The shapes of the benchmarks: small Llamas with a tied output.
    "tiny": _shape({"max_length": 1024}, 4, 128, 4, 352, vocab_size=4096),
    "small": _shape({"max_length": 1024}, 6, 384, 6, 1024, vocab_size=8192),
    "gpt2-124m": _gpt(GPT2, 12, 768, 12),
    "gpt2-355m": _gpt(GPT2, 24, 1024, 16),
    "gpt2-774m": _gpt(GPT2, 36, 1280, 20),
    "gpt2-1.5b": _gpt(GPT2, 48, 1600, 25),
    # Brown et al. 2020, Table 2.1
    "gpt3-125m": _gpt(GPT3, 12, 768, 12),
    "gpt3-350m": _gpt(GPT3, 24, 1024, 16),
    "gpt3-760m": _gpt(GPT3, 24, 1536, 16),
    "gpt3-1.3b": _gpt(GPT3, 24, 2048, 16),  # printed 24 heads of 128, which is not 2048; Stiennon et al. Table 3: 16
    "gpt3-2.7b": _gpt(GPT3, 32, 2560, 32),
    "gpt3-6.7b": _gpt(GPT3, 32, 4096, 32),
    "gpt3-13b": _gpt(
        GPT3, 40, 5120, 40
    ),  # printed width 5140, but 40 heads of 128 are 5120; so Stiennon et al. Table 3
    "gpt3-175b": _gpt(GPT3, 96, 12288, 96),
    "llama2-7b": _shape(LLAMA2, 32, 4096, 32, 11008),
    "smollm2-135m": _shape(SMOLLM2, 30, 576, 9, 1536, n_kv_heads=3, init_std=576**-0.5),
}


def preset(name: str, **changes: Any) -> TransformerConfig:
    """The named shape, with fields changed: preset("gpt2-124m", dropout=0.0, scan_layers=True).

    Raises ConfigError for a name that is not in PRESETS or a field that TransformerConfig lacks.
    """
    if name not in PRESETS:
        raise ConfigError(f"model preset {name!r} is unknown: accepted are {', '.join(PRESETS)}")
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    if unknown := sorted(set(changes) - fields):
        raise ConfigError(f"model.{unknown[0]} is not a field of the model: accepted are {', '.join(sorted(fields))}")
    return TransformerConfig(**{**PRESETS[name], **changes})
