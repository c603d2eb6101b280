"""Hugging Face's config.json to our TransformerConfig and back, strictly.

Every key is read, known to change nothing, or refused: what it says and our Transformer cannot do is an error. So is
exporting: a model is of the first family whose config.json, read back, means the same.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from rlhfjax import paths
from rlhfjax.config import build
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop.hf_families import FAMILIES, REQUIRED, Family, Said
from rlhfjax.models import Model, TransformerConfig
from rlhfjax.paths import Path

REWARD_BIAS = "rlhfjax_reward_bias"  # our key: the constant of a reward that was dropped from its weights


def read(path: Path) -> tuple[str, Model, float]:
    """The family, the model and its reward's constant (0 but for our exports) that a config.json describes.

    `...ForCausalLM` is a language model, `...ForSequenceClassification` with one label a scalar one.
    Raises CheckpointError, one line with the file and the key, for what our Transformer cannot be.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror or 'there is no such file'}"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    said = Said(path, values)
    name, head = _architecture(said)
    constant = 0.0
    if head == "scalar":
        labels = len(said.take("id2label", dict, {})) or said.take("num_labels", int, 2)
        if labels != 1:
            raise said.refuse(
                "id2label", f"{labels} labels", "one, which is the reward"
            )
        constant = said.take(REWARD_BIAS, float, 0.0)
    return name, Model(_config(name, said), head), constant


def write(
    model: Model, dtype: str, ids: Mapping[str, int | None]
) -> tuple[str, dict[str, Any]]:
    """The family of a model and its config.json; the inverse of `read`, but for what only training knows.

    Args: ids of "pad", "bos" and "eos"; null for the others, so that `transformers` does not assume its own.
    Raises: ConfigError for a model that is of no family, or ids that cannot be.
    """
    for name, family in FAMILIES.items():
        described = _describe(family, model.config)
        try:
            again = _config(name, Said(paths.path("config.json"), described))
        except CheckpointError:  # an activation that the family does not have, say
            continue
        if _meaning(again) == _meaning(model.config):
            break
    else:
        raise ConfigError(f"no architecture in {', '.join(FAMILIES)} is {model.config}")
    labels = {
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "problem_type": "regression",
    }
    return name, {
        "architectures": [family.causal if model.head == "lm" else family.classifier],
        "model_type": name,
        **described,
        **_ids(model, ids),
        "torch_dtype": dtype,
        **(labels if model.head == "scalar" else {}),
    }


def _architecture(said: Said) -> tuple[str, str]:
    named = said.take("architectures", list, [])
    known = {family.causal: (name, "lm") for name, family in FAMILIES.items()}
    known |= {family.classifier: (name, "scalar") for name, family in FAMILIES.items()}
    if len(named) != 1 or named[0] not in known:
        raise said.refuse("architectures", named, f"one of {', '.join(known)}")
    name, head = known[named[0]]
    if (kind := said.take("model_type", str, name)) != name:
        raise said.refuse("model_type", kind, repr(name))
    return name, head


def _config(name: str, said: Said) -> TransformerConfig:
    family = FAMILIES[name]
    kinds = {"norm_eps": float, "init_std": float, "tie_embeddings": bool}
    fields = {
        ours: said.take(
            theirs, kinds.get(ours, int), family.defaults.get(ours, REQUIRED)
        )
        for ours, theirs in family.keys.items()
    }
    fields |= family.fixed | family.read(said, fields)
    said.finish(family.neutral)
    try:
        config = build(TransformerConfig, fields, "model")
    except ConfigError as error:
        raise CheckpointError(f"{said.path}: {error}") from None
    return dataclasses.replace(
        config,
        n_kv_heads=None if config.kv_heads == config.n_heads else config.kv_heads,
        d_head=None
        if config.n_heads * config.head_dim == config.d_model
        else config.head_dim,
    )


def _describe(family: Family, c: TransformerConfig) -> dict[str, Any]:
    values = dataclasses.asdict(c) | {"n_kv_heads": c.kv_heads, "d_head": c.head_dim}
    return {
        theirs: values[ours] for ours, theirs in family.keys.items()
    } | family.write(c)


def _meaning(c: TransformerConfig) -> TransformerConfig:
    """The config with everything at its default that does not change what a trained model computes."""
    rope = (
        {} if c.positions == "rope" else {"rope_theta": 10000.0, "rope_fraction": 1.0}
    )
    trained = {
        "dropout": 0.0,
        "init_std": 0.02,
        "scale_residual_init": False,
        "remat": "none",
    }
    same = {
        "n_kv_heads": c.kv_heads,
        "d_head": c.head_dim,
        "qkv_bias": c.bias or c.qkv_bias,
    }
    return dataclasses.replace(
        c, **rope, **trained, **same, dtype="float32", scan_layers=False
    )


def _ids(model: Model, ids: Mapping[str, int | None]) -> dict[str, int | None]:
    names = ("pad", "bos", "eos")
    for name, value in ids.items():
        if name not in names:
            raise ConfigError(f"special_ids[{name!r}]: accepted are {', '.join(names)}")
        if value is not None and not 0 <= value < model.config.vocab_size:
            raise ConfigError(
                f"special_ids[{name!r}] is {value}: the vocabulary has {model.config.vocab_size} ids"
            )
    pad = ids.get("pad")
    if model.head == "scalar" and pad is None:
        raise ConfigError(
            "special_ids['pad'] is missing: transformers scores the last token that is not padding"
        )
    if model.head == "scalar" and pad in (ids.get("bos"), ids.get("eos")):
        raise ConfigError(
            f"special_ids['pad'] is {pad}, bos or eos too: transformers would take that for padding"
        )
    return {f"{name}_token_id": ids.get(name) for name in names}
