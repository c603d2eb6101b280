"""Reads the files of a Hugging Face tokenizer, and validates what the library does not.

The library takes an added token's id for a wish, ids of 2^32 for a vocabulary, and panics on some
options: then it prints its own traceback.
"""

import codecs
from collections.abc import Mapping
from typing import Any

import tokenizers

from rlhfjax import json_text, paths
from rlhfjax.data.built_in_templates import read_template
from rlhfjax.errors import DataError, first_line
from rlhfjax.json_text import Object, named, shown
from rlhfjax.paths import Path
from rlhfjax.ranges import MOST_TOKENS

FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
# Options of BPE and the values that are read. With a dropout the same text has other ids each time.
_ACCEPTED = {
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "dropout": (None, 0),
}
FILES = (FILE, CONFIG_FILE, MAP_FILE, TEMPLATE_FILE)
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a tokenizer.json.

    Raises:
      DataError: the file is missing or damaged, or its ids are no vocabulary.
    """
    content = paths.read(path)
    data = json_text.as_object(json_text.decode(content, path), path)
    _validate_parts(data, path)
    backend = _parsed(content.removeprefix(codecs.BOM_UTF8).decode(), path)
    _validate_ids(backend, path)
    unknown = (data.get("model") or {}).get("unk_token")
    if unknown is not None and backend.token_to_id(unknown) is None:
        raise DataError(
            f"{path}: model.unk_token {shown(unknown)} is none of its tokens"
        )
    for token in data.get("added_tokens") or ():
        i = backend.token_to_id(token["content"])
        if i != token["id"]:
            raise DataError(
                f"{path}: the added token {shown(token['content'])} has the id {token['id']}, "
                f"where {i} is the next free one or that of the vocabulary"
            )
    return backend


def read_config(folder: Path) -> Object:
    """Returns the config beside a tokenizer.json: its special tokens, and its chat template.

    Raises:
      DataError: a file is damaged, or a value has a wrong type. Names the file and the key.
    """
    config: Object = {}
    for name in (MAP_FILE, CONFIG_FILE):
        path = folder / name
        content = paths.read_if_there(path)
        if content is None:
            continue
        values = json_text.as_object(json_text.decode(content, path), path)
        validate_config(values, path)
        config |= values
    template = folder / TEMPLATE_FILE
    if not paths.lexists(str(template)):
        return config
    return config | {"chat_template": read_template(template)}


def validate_config(config: Mapping[str, Any], context: Any) -> None:
    """Raises DataError if a special token or the chat template has a wrong type."""
    for name in NAMES:
        token = config.get(name)
        content = token.get("content") if isinstance(token, Mapping) else token
        if token is not None and not isinstance(content, str):
            raise DataError(
                f"{context}: {name} is {shown(token)}: expected text, or an object with content"
            )
    template_of(config, context)


def template_of(config: Mapping[str, Any], context: Any) -> str:
    """Returns the config's chat template; of several named ones the default.

    Raises:
      DataError: it is no text, and none of several is the default.
    """
    template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return template or ""
    named_ones = template
    if isinstance(template, list):
        named_ones = {}
        for i, entry in enumerate(template):
            place = f"{context}: chat_template[{i}]"
            entry = json_text.validate(entry, place, dict[str, str])
            if not {"name", "template"} <= entry.keys():
                raise DataError(f"{place}: expected an object with name and template")
            named_ones[entry["name"]] = entry["template"]
    if not isinstance(named_ones, Mapping) or not isinstance(
        named_ones.get("default"), str
    ):
        raise DataError(
            f"{context}: chat_template is {shown(template)}: "
            "expected text, or several with the name 'default' among them"
        )
    return named_ones["default"]


def _parsed(text: str, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more special
        why = first_line(error)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        why = first_line(error)
    raise DataError(f"{path}: not a tokenizer ({why:.200})")


def _validate_parts(data: Mapping[str, Any], path: Path) -> None:
    """Raises DataError for parts that the library guesses the meaning of, or panics on."""
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model"):
        if not isinstance(data.get(key), Mapping | None):
            raise DataError(
                f"{path}: {key} is {shown(data[key])}: expected a JSON object"
            )
    model = data.get("model") or {}
    for key, accepted in _ACCEPTED.items():
        if model.get(key) not in accepted:
            raise DataError(
                f"{path}: model.{key} is {shown(model[key])}: accepted is null"
            )


def _validate_ids(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Raises DataError if two tokens share an id, or an id is beyond any vocabulary."""
    by_id: dict[int, str] = {}
    for text, i in backend.get_vocab(with_added_tokens=True).items():
        if i in by_id:
            raise DataError(
                f"{path}: {shown(by_id[i])} and {shown(text)} both have the id {i}"
            )
        if i >= MOST_TOKENS:
            raise DataError(
                f"{path}: {named(text)} has the id {i}: must be < {MOST_TOKENS}"
            )
        by_id[i] = text
    if not by_id:
        raise DataError(f"{path}: it has no tokens")
