"""Rotary positions in a config.json: their bases, the rotated fraction, and how they are scaled.

transformers 4 has `rope_theta` and `rope_scaling`; transformers 5 has all of it in
`rope_parameters`, which Gemma 3 has once for each type of layer. Both are read. What is written is
the older style, which both load.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rlhfjax.interop.hf_families import ROPE_DEFAULTS, Family
from rlhfjax.interop.hf_values import REQUIRED, ConfigValues
from rlhfjax.models.config import RopeScaling, TransformerConfig

OBJECTS = ("rope_parameters", "rope_scaling")
LOCAL = "rope_parameters.sliding_attention"
_GLOBAL = "rope_parameters.full_attention"
# Names in transformers 5 of what older configs name differently.
_KEYS = {"rope_theta": "rope_theta", "rope_fraction": "partial_rotary_factor"}
# The kinds of RopeScaling, and the fields that each has: RopeScaling's name, theirs, the default.
_ORIGINAL = ("original_length", "original_max_position_embeddings")
_FACTOR = ("factor", "factor", REQUIRED)
_SCALINGS = {
    "linear": (_FACTOR,),
    "llama3": (
        _FACTOR,
        ("low_frequency", "low_freq_factor", REQUIRED),
        ("high_frequency", "high_freq_factor", REQUIRED),
    ),
    "yarn": (
        _FACTOR,
        ("beta_fast", "beta_fast", 32.0),
        ("beta_slow", "beta_slow", 1.0),
        ("attention_factor", "attention_factor", None),
    ),
}


def read(family: Family, values: ConfigValues, max_length: int) -> dict[str, Any]:
    """Returns the TransformerConfig fields of rotary positions.

    Raises:
      CheckpointError: two places differ, or the kind of scaling is not one of the family's.
    """
    for key in OBJECTS:
        values.flatten(key)
    if not family.rope:
        return {}
    places: tuple[str, ...] = OBJECTS
    local = {}
    if "window_rope_theta" in family.rope:
        values.flatten(_GLOBAL)
        values.flatten(LOCAL)
        places = (_GLOBAL, "rope_scaling")
        local = {"window_rope_theta": _window_theta(family, values)}
    defaults = {**ROPE_DEFAULTS, **family.defaults}
    rope = {}
    for field, key in _KEYS.items():
        older = family.rope.get(field, key)
        keys = dict.fromkeys((older, key, *_in(places, key)))
        rope[field] = values.take_first(list(keys), float, defaults[field])
    if "rope_fraction" not in family.rope and rope["rope_fraction"] != 1:
        raise values.invalid("partial_rotary_factor", rope["rope_fraction"], "1")
    return {**rope, **local, **_scaling(family, values, places, max_length)}


def describe(family: Family, config: TransformerConfig) -> dict[str, Any]:
    """Returns what `read` reads. What the family cannot express is left out."""
    fields = dataclasses.asdict(config)
    if config.window_rope_theta is None:
        fields["window_rope_theta"] = config.rope_theta
    described = {key: fields[field] for field, key in family.rope.items()}
    scaling = config.rope_scaling
    if scaling.kind == "none" or not family.rope:
        return described
    values: dict[str, Any] = {"rope_type": scaling.kind}
    for field, key, _ in _SCALINGS[scaling.kind]:
        if (value := getattr(scaling, field)) is not None:
            values[key] = value
    if scaling.kind != "linear":
        values[_ORIGINAL[1]] = scaling.original_length
    return {**described, "rope_scaling": values}


def meaning(scaling: RopeScaling) -> RopeScaling:
    """Returns the scaling with defaults in the fields that its kind does not use."""
    if scaling.kind == "none":
        return RopeScaling()
    fields = {field: getattr(scaling, field) for field, *_ in _SCALINGS[scaling.kind]}
    if scaling.kind != "linear":
        fields["original_length"] = scaling.original_length
    return RopeScaling(scaling.kind, **fields)


def _window_theta(family: Family, values: ConfigValues) -> float:
    """Returns the base of the layers with a window; `finish` rejects a scaling of theirs."""
    keys = (family.rope["window_rope_theta"], f"{LOCAL}.rope_theta")
    return values.take_first(keys, float, family.defaults["window_rope_theta"])


def _scaling(
    family: Family, values: ConfigValues, places: Sequence[str], max_length: int
) -> dict[str, Any]:
    """Returns the field rope_scaling as a dict; nothing if there is none."""
    keys = (*_in(places, "rope_type"), *_in(places, "type"))
    present = next((key for key in keys if key in values.left), keys[0])
    kind = values.take_first(keys, str, "default")
    if kind == "default":
        return {}
    if kind not in family.scalings:
        accepted = " or ".join(map(repr, ("default", *family.scalings)))
        raise values.invalid(present, kind, accepted)
    # Where the kind stands, its numbers are missed.
    place = present.rpartition(".")[0]
    places = sorted(places, key=lambda other: other != place)
    fields: dict[str, Any] = {"kind": kind}
    for field, key, default in _SCALINGS[kind]:
        fields[field] = values.take_first(_in(places, key), float, default)
    if kind != "linear":
        field, key = _ORIGINAL
        keys = (*_in(places, key), key)
        fields[field] = values.take_first(keys, int, max_length)
    return {"rope_scaling": fields}


def _in(places: Sequence[str], key: str) -> list[str]:
    return [f"{place}.{key}" for place in places]
