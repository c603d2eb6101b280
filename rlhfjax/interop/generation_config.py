"""Sampling settings in a Hugging Face folder: generation_config.json.

Rules of transformers: `do_sample: true` alone means temperature 1, top_k 50 and top_p 1, and
`do_sample: false` means greedy. A file that has settings without `do_sample` is taken to mean them.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhfjax import json_text, paths

FILE = "generation_config.json"
SETTINGS = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "max_new_tokens": int,
}
# How `chat` samples from our own models.
OURS = {"temperature": 0.7, "top_p": 0.9}
MAX_NEW_TOKENS = 256
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
_STOP = "stop_strings"
# Options that change what is sampled, with the values that change nothing.
_NEUTRAL = {
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
}


class GenerationConfig(NamedTuple):
    """What a folder's generation_config.json says about sampling."""

    settings: dict[str, int | float | tuple[str, ...]]  # by the names of `Sampling`
    ignored: dict[str, Any]  # options that change the result and that we do not have


def read(folder: str | os.PathLike) -> GenerationConfig:
    """Returns the sampling settings of a folder; none if the file does not exist.

    The ids that end a response are the tokenizer's (`data.end_ids`).

    Raises:
      DataError: the file is not a JSON object.
    """
    file = paths.path(folder) / FILE
    given = json_text.read_if_there(file, json_text.Object) or {}
    given = {name: value for name, value in given.items() if value is not None}
    settings: dict[str, Any] = {}
    if given.get("do_sample") is True:
        settings |= _SAMPLING
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
    stop = given.get(_STOP, [])
    stop = [stop] if isinstance(stop, str) else stop
    if not _are_texts(stop):
        ignored[_STOP] = stop
    elif stop:
        settings["stop"] = tuple(stop)
    for name, neutral in _NEUTRAL.items():
        if given.get(name, neutral) not in (neutral, [], {}):
            ignored[name] = given[name]
    return GenerationConfig(settings, ignored)


def longest_response(context: int) -> int:
    """Returns the default of max_new_tokens for a model's context, in tokens."""
    return min(MAX_NEW_TOKENS, max(1, context // 4))


def of_ours(context: int, ids: Mapping[str, int | list[int]]) -> dict[str, Any]:
    """Returns a generation_config.json with which transformers samples as `chat` does.

    Args:
      context: the model's context, in tokens.
      ids: ids of "pad", "bos" and "eos"; of "eos" there may be several.
    """
    return {
        **{f"{name}_token_id": i for name, i in ids.items()},
        "do_sample": True,
        **OURS,
        "top_k": 0,  # transformers' default is 50
        "max_new_tokens": longest_response(context),
    }


def _is_number(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return kind(value) == value


def _are_texts(value: Any) -> bool:
    is_list = isinstance(value, list)
    return is_list and all(isinstance(text, str) and text for text in value)
