"""The metadata of a GGUF file to our TransformerConfig and back, strictly.

Every key of the architecture is read, known to change nothing, or an error. Exports are strict too:
a model is written as the first architecture whose metadata, read back, mean the same.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop import gguf_rope, hf_config, hf_layers, names
from rlhfjax.interop.gguf_families import ARCHITECTURES, KEYS, OUTPUT, Architecture
from rlhfjax.interop.gguf_values import Metadata
from rlhfjax.interop.hf_values import REQUIRED
from rlhfjax.interop.others import missing
from rlhfjax.json_text import shown
from rlhfjax.models import Model, TransformerConfig
from rlhfjax.models.config import Attention
from rlhfjax.models.rope import attention_factor
from rlhfjax.paths import Path

_DEEPEST = 1024  # ranges.Depth
# Options in the order of how much they add, and a tensor that only a model with them has.
_BIASES = {
    "bias": "blk.0.ffn_down.bias",
    "attention_bias": "blk.0.attn_output.bias",
    "qkv_bias": "blk.0.attn_q.bias",
}


def read(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Collection[str],
    rope_factors: np.ndarray | None,
) -> tuple[Architecture, TransformerConfig]:
    """Returns the architecture and the config that the metadata describe.

    general.* is about the file, and tokenizer.* about the tokenizer.

    Args:
      tensors: names of the tensors.
      rope_factors: content of the tensor ROPE_FACTORS, if there is one.
    Raises:
      CheckpointError: our Transformer cannot express the model; names the file and the key.
    """
    name = _architecture(path, metadata)
    architecture = ARCHITECTURES[name]
    values = Metadata(path, name, metadata)
    fields: dict[str, Any] = dict(architecture.fixed)
    fields |= _sizes(values, metadata)
    fields |= _experts(architecture, values)
    fields |= _layers(architecture, values, fields)
    if architecture.biases:
        present = [field for field, tensor in _BIASES.items() if tensor in tensors]
        fields |= dict.fromkeys(present[:1], True)
    fields.setdefault("tie_embeddings", OUTPUT not in tensors)
    for field, default in architecture.softcaps.items():
        fields[field] = values.get(KEYS[field], float, default) or None
    if architecture.deepest == fields["n_layers"]:
        width = fields["d_model"] // max(fields["n_heads"], 1)
        fields["attention_scale"] = max(width, 1) ** -0.5
    fields |= _rope(architecture, values, fields, rope_factors)
    values.validate_rest()
    spelled = {field: values.start + key for field, key in KEYS.items()}
    config = names.build_config(fields, spelled, path)
    return architecture, hf_config.plain(config)


def describe(
    config: TransformerConfig,
) -> tuple[str, dict[str, Any], np.ndarray | None]:
    """Returns the architecture's name, its metadata, and the content of ROPE_FACTORS if it has one.

    `read` of it means the same model.

    Raises:
      ConfigError: llama.cpp has no architecture for the model.
    """
    meant = hf_config.meaning(config)
    shapes = names.shapes_of(Model(meant))
    for name, architecture in ARCHITECTURES.items():
        if not _is_computed(architecture, meant):
            continue
        metadata, factors = _described(name, architecture, meant)
        tensors = [row.name for row in names.rows(architecture.table, "lm", shapes)]
        try:
            _, again = read("model.gguf", metadata, tensors, factors)
        except CheckpointError:  # for example another activation
            continue
        if _comparable(again) == _comparable(config):
            return name, metadata, factors
    raise ConfigError(
        f"llama.cpp's architectures {', '.join(ARCHITECTURES)} cannot express "
        f"{hf_config.chosen(config)}"
    )


# ------------------------------------------------------------------ reading


def _architecture(path: str | Path, metadata: Mapping[str, Any]) -> str:
    """Returns the architecture's name. Raises CheckpointError if it is unsupported or split."""
    # The parts after the first say nothing but this.
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise CheckpointError(
            f"{path}: split.count is {shown(parts)}: "
            "merge the parts first (llama-gguf-split --merge FIRST-PART MERGED)"
        )
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: general.architecture is {shown(name)}{missing(name)}: "
            f"accepted are {', '.join(ARCHITECTURES)}"
        )
    kind = metadata.get("general.type", "model")  # old files have none
    if kind != "model":
        raise CheckpointError(
            f"{path}: general.type is {shown(kind)}: accepted is 'model'"
        )
    return name


def _sizes(values: Metadata, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that every architecture has."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    n_tokens = len(tokens) if isinstance(tokens, list) else REQUIRED
    fields = {
        field: values.get(KEYS[field], int)
        for field in ("d_model", "n_layers", "n_heads", "d_ff", "max_length")
    }
    fields["vocab_size"] = values.get(KEYS["vocab_size"], int, n_tokens)
    fields["n_kv_heads"] = values.get(KEYS["n_kv_heads"], int, fields["n_heads"])
    plain_width = fields["d_model"] // max(fields["n_heads"], 1)
    fields["d_head"] = values.get(KEYS["d_head"], int, plain_width)
    width = values.get("attention.value_length", int, fields["d_head"])
    if width != fields["d_head"]:
        raise values.refuse(
            "attention.value_length", width, f"the keys' width, {fields['d_head']}"
        )
    return fields | {"norm_eps": values.get(KEYS["norm_eps"], float)}


def _experts(architecture: Architecture, values: Metadata) -> dict[str, Any]:
    """Returns the fields of a mixture of experts; {} for a dense model."""
    if architecture.experts == "none":  # then `validate_rest` accepts no experts
        return {}
    n_experts = values.get(KEYS["n_experts"], int, 0)
    n_chosen = values.get(KEYS["experts_per_token"], int, 0)
    if not n_experts and architecture.experts == "all":
        raise values.refuse(KEYS["n_experts"], n_experts, "a number of experts")
    if not n_experts and n_chosen:
        raise values.refuse(KEYS["experts_per_token"], n_chosen, "0 without experts")
    if not n_experts:
        return {}
    fields = {"n_experts": n_experts, "experts_per_token": n_chosen}
    if architecture.expert_width != KEYS["d_ff"]:
        fields["d_ff"] = values.get(architecture.expert_width, int)
    return fields


def _layers(
    architecture: Architecture, values: Metadata, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the fields of windows and of the kinds of attention of the layers."""
    width = values.get(KEYS["window"], int, architecture.window) or None
    full = {"attention_pattern": architecture.pattern}
    if architecture.period == 1:
        if width is None or width >= fields["max_length"]:
            return full
        return {"attention_pattern": ("window",), "window": width}
    kinds = _kinds(architecture, values, fields["n_layers"])
    if width is None or "window" not in kinds:
        return full
    theta = architecture.window_rope_theta
    return {
        "attention_pattern": hf_layers.shortest(kinds),
        "window": width,
        "window_rope_theta": values.get(KEYS["window_rope_theta"], float, theta),
    }


def _kinds(
    architecture: Architecture, values: Metadata, n_layers: int
) -> list[Attention]:
    """Returns the kind of attention of each layer where some have windows."""
    key = "attention.sliding_window_pattern"
    given = values.left.pop(values.start + key, architecture.period)
    depth = min(n_layers, _DEEPEST)  # more is an error of n_layers
    slides = given
    if type(given) is int and given > 0:
        slides = [(i + 1) % given != 0 for i in range(depth)]
    if not isinstance(slides, list) or len(slides) != depth:
        raise values.refuse(key, given, f"a number, or a list of {n_layers}")
    return ["window" if slide else "full" for slide in slides]


def _rope(
    architecture: Architecture,
    values: Metadata,
    fields: Mapping[str, Any],
    rope_factors: np.ndarray | None,
) -> dict[str, Any]:
    """Returns the fields of rotary positions."""
    width = fields["d_head"]
    rotated = values.get(KEYS["rope_fraction"], int, width)
    if rotated != width and not architecture.partly_rotated:
        raise values.refuse(
            KEYS["rope_fraction"], rotated, f"the width of a head, {width}"
        )
    theta = values.get(KEYS["rope_theta"], float, 10000.0)
    return {
        "rope_theta": theta,
        "rope_fraction": rotated / max(width, 1),
        "rope_scaling": gguf_rope.read(
            architecture,
            values,
            rotated=rotated,
            theta=theta,
            max_length=fields["max_length"],
            factors=rope_factors,
        ),
    }


# ------------------------------------------------------------------ writing


def _is_computed(architecture: Architecture, config: TransformerConfig) -> bool:
    """Returns whether llama.cpp computes what has no metadata: windows, and the heads' width."""
    windows = "window" in config.kinds and architecture.period == 1
    width = config.n_heads * config.head_dim
    square = width == config.d_model or not architecture.square
    scalings = ("none", *architecture.scalings)
    return square and not windows and config.rope_scaling.kind in scalings


def _described(
    name: str, architecture: Architecture, config: TransformerConfig
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Returns what `read` reads. What the architecture cannot express is left out."""
    fields = dataclasses.asdict(config) | {"rope_fraction": config.rope_dim}
    left_out = {"attention_softcap", "logit_softcap"} - architecture.softcaps.keys()
    if architecture.experts == "none" or not config.n_experts:
        left_out |= {"n_experts", "experts_per_token"}
    if architecture.window_rope_theta is None:
        left_out.add("window_rope_theta")
    described = {
        key: fields[field]
        for field, key in KEYS.items()
        if field not in left_out and fields[field] is not None
    }
    described["attention.value_length"] = config.head_dim
    if config.n_experts:
        described[architecture.expert_width] = config.d_ff
    scaling, factors = gguf_rope.describe(
        config.rope_scaling, config.rope_dim, config.rope_theta
    )
    named = {f"{name}.{key}": value for key, value in (described | scaling).items()}
    return {"general.architecture": name, "general.type": "model", **named}, factors


def _comparable(config: TransformerConfig) -> TransformerConfig:
    """Returns what a config means, with the digits that a file's float32 has."""
    meant = hf_config.meaning(config)
    if meant.rope_scaling.kind != "yarn":
        return meant
    factor = float(f"{attention_factor(meant.rope_scaling):.6g}")
    scaling = dataclasses.replace(meant.rope_scaling, attention_factor=factor)
    return dataclasses.replace(meant, rope_scaling=scaling)
