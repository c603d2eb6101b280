"""Hugging Face's config.json to our TransformerConfig and back, strictly.

Every key is read, known to change nothing, or an error. Exports are strict too: a model belongs to
the first family whose config.json, read back, means the same.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rlhfjax import json_text, paths, ranges
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop import hf_layers, hf_rope, names
from rlhfjax.interop.hf_families import (
    FAMILIES,
    KINDS,
    NULLABLE,
    ROPE_DEFAULTS,
    Family,
)
from rlhfjax.interop.hf_values import QUANTIZATION, REQUIRED, ConfigValues
from rlhfjax.interop.others import missing
from rlhfjax.models import Model, TransformerConfig
from rlhfjax.models.config import RopeScaling
from rlhfjax.paths import Path

# Ids by name: "pad", "bos", "eos".
SpecialIds = Mapping[str, int | Sequence[int] | None]
# A key of ours: the constant of a reward that was dropped from its weights.
REWARD_BIAS = "rlhfjax_reward_bias"


def read(path: Path) -> tuple[str, Model, float]:
    """Returns the family, the model and the reward's constant that a config.json describes.

    `...ForCausalLM` is a language model, `...ForSequenceClassification` with one label a reward
    model. The constant is 0 except in our own exports.

    Raises:
      CheckpointError: our Transformer cannot express the model; names the file and the key.
    """
    content = json_text.read_object(path, error=CheckpointError)
    values = ConfigValues(path, content)
    name, head = _architecture(values)
    constant = 0.0
    if head == "scalar":
        labels = len(values.take("id2label", dict, {}))
        labels = labels or values.take("num_labels", int, 2)
        if labels != 1:
            raise values.invalid(
                "id2label", f"{labels} labels", "one, which is the reward"
            )
        constant = values.take(REWARD_BIAS, float, 0.0)
        if abs(constant) > ranges.LARGEST:
            raise values.invalid(REWARD_BIAS, constant, "a float32")
    return name, Model(_config(FAMILIES[name], values), head), constant


def write(model: Model, dtype: str, ids: SpecialIds) -> tuple[str, dict[str, Any]]:
    """Returns the family of a model and its config.json, the inverse of `read`.

    What only training needs is left out.

    Args:
      ids: ids of "pad", "bos" and "eos", of which several may end a text. Absent ones are written
        as null, so that `transformers` does not use its defaults.
    Raises:
      ConfigError: the model belongs to no family, or an id is invalid.
    """
    name, described = families_of(model.config)[0]
    family = FAMILIES[name]
    labels = {
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "problem_type": "regression",
    }
    return name, {
        "architectures": [family.causal if model.head == "lm" else family.classifier],
        "model_type": name,
        **described,
        **_token_ids(model, ids),
        "torch_dtype": dtype,
        **(labels if model.head == "scalar" else {}),
    }


def _architecture(values: ConfigValues) -> tuple[str, str]:
    """Returns the family and the head."""
    given = values.take("architectures", list, [])
    known = {}
    for name, family in FAMILIES.items():
        known[family.causal] = name, "lm"
        known[family.classifier] = name, "scalar"
    if len(given) != 1 or not isinstance(given[0], str) or given[0] not in known:
        decoders = ", ".join(family.causal for family in FAMILIES.values())
        accepted = f"one of {decoders}, and …ForSequenceClassification of each"
        if given and str(given[0]).endswith("ForConditionalGeneration"):
            of_text = (
                "a decoder of text alone (of Gemma 3 its text part, see docs/models.md)"
            )
            accepted = f"{of_text}, {accepted}"
        reason = missing(given[0]) if given else ""
        raise values.invalid("architectures", given, accepted, reason)
    name, head = known[given[0]]
    if (kind := values.take("model_type", str, name)) != name:
        raise values.invalid("model_type", kind, repr(name))
    return name, head


def _config(family: Family, values: ConfigValues) -> TransformerConfig:
    values.flatten(QUANTIZATION)
    fields = dict(family.fixed)
    for field, keys in family.keys.items():
        fields[field] = _take(family, values, field, keys)
    fields["mlp"] = _activation(family, values, fields["mlp"])
    if fields.get("d_ff") is None:  # GPT-1, and GPT-2 without n_inner
        fields["d_ff"] = 4 * fields["d_model"]
    if family.parallel and values.take(family.parallel, bool, True):
        fields["residual"] = "parallel"
    if family.query_scalar:
        scalar = values.take(family.query_scalar, int, 256)
        if scalar < 1:
            raise values.invalid(family.query_scalar, scalar, "a positive number")
        fields["attention_scale"] = scalar**-0.5
    if fields.get("bias") and not fields.get("attention_bias", True):
        key = family.keys["bias"]
        raise values.invalid(key, True, "true with attention_bias true")
    fields |= hf_rope.read(family, values, fields["max_length"])
    fields |= hf_layers.read(family, values, fields["n_layers"])
    values.finish(family)
    if fields["window"] is None:
        fields.pop("window_rope_theta", None)
    config = names.build_config(fields, {**family.keys, **family.rope}, values.path)
    return plain(config)


def _take(family: Family, values: ConfigValues, field: str, keys: str) -> Any:
    """Removes the keys of a field and returns its value."""
    kind = KINDS.get(field, int)
    default = family.defaults.get(field, REQUIRED)
    if field in NULLABLE:
        return values.take_or_none(keys, kind, default)
    if field in family.other_keys:
        return values.take_first((keys, family.other_keys[field]), kind, default)
    return values.take_equal(keys.split(), kind, default)


def plain(config: TransformerConfig) -> TransformerConfig:
    """Returns the config with None wherever a field says what None means."""
    plain_heads = config.n_heads * config.head_dim == config.d_model
    scale = config.attention_scale
    return dataclasses.replace(
        config,
        n_kv_heads=None if config.kv_heads == config.n_heads else config.kv_heads,
        d_head=None if plain_heads else config.head_dim,
        attention_scale=None if scale == config.head_dim**-0.5 else scale,
        attention_bias=config.attention_bias and not config.bias,
    )


def _activation(family: Family, values: ConfigValues, name: str) -> str:
    """Returns our name of an activation."""
    for mlp, spellings in family.activations.items():
        if name in spellings:
            return mlp
    accepted = sum(family.activations.values(), ())
    raise values.invalid(family.keys["mlp"], name, " or ".join(map(repr, accepted)))


def families_of(config: TransformerConfig) -> list[tuple[str, dict[str, Any]]]:
    """Returns the families that can express a config, with what their config.json says.

    Raises:
      ConfigError: there is none.
    """
    path = paths.path("config.json")
    found = []
    for name, family in FAMILIES.items():
        if family.heads_divide and config.d_model % config.n_heads:
            continue
        described = _describe(family, config)
        try:
            again = _config(family, ConfigValues(path, described))
        except CheckpointError:  # for example another activation
            continue
        if meaning(again) == meaning(config):
            found.append((name, described))
    if not found:
        known = ", ".join(FAMILIES)
        raise ConfigError(f"no architecture in {known} has {chosen(config)}")
    return found


def chosen(config: TransformerConfig) -> str:
    """Returns the options of a config that are not at their defaults, for an error."""
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }
    return ", ".join(f"model.{name} = {value!r}" for name, value in values.items())


def _describe(family: Family, config: TransformerConfig) -> dict[str, Any]:
    """Returns what `_config` reads. A value that the family cannot express gives another config."""
    fields = dataclasses.asdict(config)
    fields |= {"n_kv_heads": config.kv_heads, "d_head": config.head_dim}
    fields["mlp"] = family.activations.get(config.mlp, ("",))[0]
    fields["attention_bias"] = config.attention_bias or config.bias
    described = {
        key: fields[field]
        for field, keys in family.keys.items()
        for key in keys.split()
    }
    if family.parallel:
        described[family.parallel] = config.residual == "parallel"
    if family.query_scalar:
        described[family.query_scalar] = round(_scale(config) ** -2)
    return {
        **described,
        **hf_rope.describe(family, config),
        **hf_layers.describe(family, config),
        **family.written,
    }


def _scale(config: TransformerConfig) -> float:
    """Returns the factor of the attention scores."""
    if config.attention_scale is None:
        return config.head_dim**-0.5
    return config.attention_scale


def meaning(config: TransformerConfig) -> TransformerConfig:
    """Returns the config with defaults wherever a trained model computes the same with them."""
    rope = {} if config.positions == "rope" else ROPE_DEFAULTS
    kinds = hf_layers.kinds_of(config)
    windowed = "window" in kinds
    scaling = hf_rope.meaning(config.rope_scaling)
    local = config.window_rope_theta
    if windowed and config.positions == "rope" and scaling == RopeScaling():
        local = local or config.rope_theta
    return dataclasses.replace(
        config,
        **rope,
        dropout=0.0,
        router_loss=0.0,
        init_std=0.02,
        scale_residual_init=False,
        remat="none",
        n_kv_heads=config.kv_heads,
        d_head=config.head_dim,
        attention_bias=config.bias or config.attention_bias,
        qkv_bias=config.bias or config.attention_bias or config.qkv_bias,
        attention_pattern=hf_layers.shortest(kinds),
        window=config.window if windowed else None,
        window_rope_theta=local if windowed else None,
        rope_scaling=scaling,
        # A config.json has the square of its inverse: 12 digits come back.
        attention_scale=float(f"{_scale(config):.12g}"),
        attention="einsum",
        dtype="float32",
        scan_layers=False,
    )


def _token_ids(model: Model, ids: SpecialIds) -> dict[str, Any]:
    """Returns the keys of special ids; several of one kind are a list."""
    accepted = ("pad", "bos", "eos")
    every = {name: _as_list(value) for name, value in ids.items()}
    for name, values in every.items():
        if name not in accepted:
            raise ConfigError(
                f"special_ids[{name!r}]: accepted are {', '.join(accepted)}"
            )
        for value in values:
            if not 0 <= value < model.config.vocab_size:
                raise ConfigError(
                    f"special_ids[{name!r}] is {value}: the vocabulary has "
                    f"{model.config.vocab_size} ids"
                )
    pad = ids.get("pad")
    if model.head == "scalar" and pad is None:
        raise ConfigError(
            "special_ids['pad'] is missing: transformers scores the last token that is not padding"
        )
    if model.head == "scalar" and pad in every.get("bos", []) + every.get("eos", []):
        raise ConfigError(
            f"special_ids['pad'] is {pad}, bos or eos too: "
            "transformers would take that for padding"
        )
    written = {}
    for name in accepted:
        values = every.get(name, [])
        written[f"{name}_token_id"] = values[0] if len(values) == 1 else values or None
    return written


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
