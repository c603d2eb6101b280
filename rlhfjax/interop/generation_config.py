"""Sampling settings in a Hugging Face folder: generation_config.json.

Rules of transformers: `do_sample: true` alone means temperature 1, top_k 50 and top_p 1, and
`do_sample: false` means greedy. A file that has settings without `do_sample` is taken to mean them.
"""

import os
from typing import Any, NamedTuple

from rlhfjax import json_text, paths

FILE = "generation_config.json"
SETTINGS = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "max_new_tokens": int,
}
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
# Options that change what is sampled, with the values that change nothing.
_NEUTRAL = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "top_h": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": None,
    "num_beams": 1,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "stop_strings": None,
}


class GenerationConfig(NamedTuple):
    """What a folder's generation_config.json says about sampling."""

    settings: dict[str, int | float]  # by the names of `Sampling`
    stop_ids: frozenset[int]  # ids that end a response
    ignored: dict[str, Any]  # options that change the result and that we do not have


def read(folder: str | os.PathLike) -> GenerationConfig:
    """Returns the sampling settings of a folder; none if the file does not exist.

    Raises:
      DataError: the file is not a JSON object.
    """
    file = paths.path(folder) / FILE
    given = json_text.read_if_there(file, json_text.Object) or {}
    given = {name: value for name, value in given.items() if value is not None}
    settings = dict(_SAMPLING) if given.get("do_sample") is True else {}
    ignored = {}
    for name, kind in SETTINGS.items():
        if name not in given:
            continue
        if _is_number(given[name], kind):
            settings[name] = kind(given[name])
        else:
            ignored[name] = given[name]
    if given.get("do_sample") is False:
        settings["temperature"] = 0.0
    for name, neutral in _NEUTRAL.items():
        if given.get(name, neutral) not in (neutral, [], {}):
            ignored[name] = given[name]
    return GenerationConfig(settings, _ids(given.get("eos_token_id")), ignored)


def _is_number(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return kind(value) == value


def _ids(value: Any) -> frozenset[int]:
    ids = value if isinstance(value, list) else [value]
    return frozenset(i for i in ids if _is_number(i, int))
