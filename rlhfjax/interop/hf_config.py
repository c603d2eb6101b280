"""Hugging Face's config.json to our TransformerConfig and back, strictly.

Every key is read, known to change nothing, or an error. Exports are strict too: a model belongs to
the first family whose config.json, read back, means the same.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rlhfjax import json_text, paths, ranges
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop import names
from rlhfjax.interop.hf_families import (
    FAMILIES,
    KINDS,
    NEUTRAL,
    ROPE_DEFAULTS,
    SILENT,
    Family,
)
from rlhfjax.json_text import named, shown
from rlhfjax.models import Model, TransformerConfig
from rlhfjax.paths import Path

REQUIRED = object()
# A key of ours: the constant of a reward that was dropped from its weights.
REWARD_BIAS = "rlhfjax_reward_bias"
QUANTIZATION = "quantization_config"


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


def write(
    model: Model, dtype: str, ids: Mapping[str, int | None]
) -> tuple[str, dict[str, Any]]:
    """Returns the family of a model and its config.json, the inverse of `read`.

    What only training needs is left out.

    Args:
      ids: ids of "pad", "bos" and "eos". Absent ones are written as null, so that `transformers`
        does not use its defaults.
    Raises:
      ConfigError: the model belongs to no family, or an id is invalid.
    """
    name, described = _family_of(model.config)
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


class ConfigValues:
    """The values of a config.json, taken key by key; `finish` rejects what is left."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path = path
        self.left = {key: value for key, value in values.items() if value is not None}

    def take(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """Removes a key and returns its value, or the default if it is absent or null."""
        value = self.left.pop(key, default)
        if value is REQUIRED:
            raise CheckpointError(f"{self.path}: there is no {key}")
        if kind is float and type(value) is int:
            value = float(value)
        if value is not default and type(value) is not kind:
            raise CheckpointError(
                f"{self.path}: {key} is {shown(value)}: expected {kind.__name__}"
            )
        return value

    def take_equal(self, keys: str, kind: type, default: Any) -> Any:
        """Removes keys, separated by blanks, and returns the value that they have in common."""
        first, *others = keys.split()
        value = self.take(first, kind, default)
        for key in others:
            if (other := self.take(key, kind, default)) != value:
                raise self.invalid(key, other, f"that of {first}, {value!r}")
        return value

    def take_rope(self, key: str, key_of_4: str, default: float) -> float:
        """Removes a number of RoPE from all places that may hold it, and returns it.

        Args:
          key: its name in `rope_parameters`, where transformers 5 has it.
          key_of_4: its key in transformers 4, where GPT-NeoX has names of its own.
        """
        places = (key_of_4, key, f"rope_parameters.{key}", f"rope_scaling.{key}")
        found = {name: self.take(name, float) for name in places if name in self.left}
        value = next(iter(found.values()), default)
        for name, other in found.items():
            if other != value:
                raise self.invalid(name, other, f"what it says elsewhere, {value}")
        return value

    def flatten(self, key: str) -> None:
        """Replaces an object by its members, "key.member"."""
        for name, value in self.take(key, dict, {}).items():
            if value is not None:
                self.left[f"{key}.{name}"] = value

    def finish(self, family: Family) -> None:
        """Raises CheckpointError for a key that is left, unless it changes nothing."""
        neutral = {**NEUTRAL, **family.neutral}
        # The kind of a thing, such as "yarn", before its numbers.
        for key in sorted(self.left, key=_is_detail):
            value = self.left[key]
            if key in SILENT or (key in family.silent and type(value) is int):
                continue
            accepted = neutral.get(key, ())
            # An empty list is one value.
            elements = value if isinstance(value, list) and value else [value]
            if not all(_is_one_of(element, accepted) for element in elements):
                raise self.invalid(key, value, " or ".join(map(repr, accepted)))

    def invalid(self, key: str, value: Any, accepted: str = "") -> CheckpointError:
        """Returns the error for a value that our Transformer cannot express."""
        accepted = f"; accepted is {accepted}" if accepted else ""
        if key.startswith(f"{QUANTIZATION}."):
            accepted = "; take the model's folder from before quantization"
        told = f"{named(key)} = {shown(value)}"
        return CheckpointError(
            f"{self.path}: our Transformer cannot do what {told} says{accepted}"
        )


def _is_detail(key: str) -> bool:
    """Returns whether a key is none that names a kind of scaling or quantization."""
    return key.rpartition(".")[2] not in ("rope_type", "type", "quant_method")


def _is_one_of(value: Any, accepted: Sequence[Any]) -> bool:
    """Returns whether a value is accepted. In Python 0 == False; in JSON they differ."""
    return any(
        value == other and isinstance(value, bool) == isinstance(other, bool)
        for other in accepted
    )


def _architecture(values: ConfigValues) -> tuple[str, str]:
    """Returns the family and the head."""
    given = values.take("architectures", list, [])
    known = {}
    for name, family in FAMILIES.items():
        known[family.causal] = name, "lm"
        known[family.classifier] = name, "scalar"
    if len(given) != 1 or not isinstance(given[0], str) or given[0] not in known:
        raise values.invalid("architectures", given, f"one of {', '.join(known)}")
    name, head = known[given[0]]
    if (kind := values.take("model_type", str, name)) != name:
        raise values.invalid("model_type", kind, repr(name))
    return name, head


def _config(family: Family, values: ConfigValues) -> TransformerConfig:
    for key in ("rope_parameters", "rope_scaling", QUANTIZATION):
        values.flatten(key)
    fields = dict(family.fixed)
    for field, keys in family.keys.items():
        default = family.defaults.get(field, REQUIRED)
        fields[field] = values.take_equal(keys, KINDS.get(field, int), default)
    fields["mlp"] = _activation(family, values, fields["mlp"])
    if fields.get("d_ff") is None:  # GPT-1, and GPT-2 without n_inner
        fields["d_ff"] = 4 * fields["d_model"]
    if family.parallel and values.take(family.parallel, bool, True):
        fields["residual"] = "parallel"
    if family.rope:
        fields |= _rope(family, values)
    values.finish(family)
    config = names.build_config(fields, {**family.keys, **family.rope}, values.path)
    plain_heads = config.n_heads * config.head_dim == config.d_model
    return dataclasses.replace(
        config,
        n_kv_heads=None if config.kv_heads == config.n_heads else config.kv_heads,
        d_head=None if plain_heads else config.head_dim,
    )


def _activation(family: Family, values: ConfigValues, name: str) -> str:
    """Returns our name of an activation."""
    for mlp, spellings in family.activations.items():
        if name in spellings:
            return mlp
    accepted = sum(family.activations.values(), ())
    raise values.invalid(family.keys["mlp"], name, " or ".join(map(repr, accepted)))


def _rope(family: Family, values: ConfigValues) -> dict[str, float]:
    """Returns RoPE's base and the fraction of each head that it rotates.

    The kinds of RoPE other than the plain one are left for `finish` to reject.
    """
    defaults = {**ROPE_DEFAULTS, **family.defaults}
    keys = {"rope_theta": "rope_theta", "rope_fraction": "partial_rotary_factor"}
    rope = {
        field: values.take_rope(key, family.rope.get(field, key), defaults[field])
        for field, key in keys.items()
    }
    if "rope_fraction" not in family.rope and rope["rope_fraction"] != 1:
        raise values.invalid("partial_rotary_factor", rope["rope_fraction"], "1")
    return rope


def _family_of(config: TransformerConfig) -> tuple[str, dict[str, Any]]:
    """Returns the first family that can express a config, and what its config.json says."""
    path = paths.path("config.json")
    for name, family in FAMILIES.items():
        described = _describe(family, config)
        try:
            again = _config(family, ConfigValues(path, described))
        except CheckpointError:  # for example another activation
            continue
        if _meaning(again) == _meaning(config):
            return name, described
    raise ConfigError(f"no architecture in {', '.join(FAMILIES)} is {config}")


def _describe(family: Family, config: TransformerConfig) -> dict[str, Any]:
    """Returns what `_config` reads. A value that the family cannot express gives another config."""
    fields = dataclasses.asdict(config)
    fields |= {"n_kv_heads": config.kv_heads, "d_head": config.head_dim}
    fields["mlp"] = family.activations.get(config.mlp, ("",))[0]
    described = {
        key: fields[field]
        for field, keys in family.keys.items()
        for key in keys.split()
    }
    described |= {key: fields[field] for field, key in family.rope.items()}
    if family.parallel:
        described[family.parallel] = config.residual == "parallel"
    return {**described, **family.written}


def _meaning(config: TransformerConfig) -> TransformerConfig:
    """Returns the config with defaults wherever a trained model computes the same with them."""
    rope = {} if config.positions == "rope" else ROPE_DEFAULTS
    return dataclasses.replace(
        config,
        **rope,
        dropout=0.0,
        init_std=0.02,
        scale_residual_init=False,
        remat="none",
        n_kv_heads=config.kv_heads,
        d_head=config.head_dim,
        qkv_bias=config.bias or config.qkv_bias,
        dtype="float32",
        scan_layers=False,
    )


def _token_ids(model: Model, ids: Mapping[str, int | None]) -> dict[str, int | None]:
    accepted = ("pad", "bos", "eos")
    for name, value in ids.items():
        if name not in accepted:
            raise ConfigError(
                f"special_ids[{name!r}]: accepted are {', '.join(accepted)}"
            )
        if value is not None and not 0 <= value < model.config.vocab_size:
            raise ConfigError(
                f"special_ids[{name!r}] is {value}: the vocabulary has "
                f"{model.config.vocab_size} ids"
            )
    pad = ids.get("pad")
    if model.head == "scalar" and pad is None:
        raise ConfigError(
            "special_ids['pad'] is missing: transformers scores the last token that is not padding"
        )
    if model.head == "scalar" and pad in (ids.get("bos"), ids.get("eos")):
        raise ConfigError(
            f"special_ids['pad'] is {pad}, bos or eos too: "
            "transformers would take that for padding"
        )
    return {f"{name}_token_id": ids.get(name) for name in accepted}
