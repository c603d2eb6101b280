"""What is changed in the content of a tokenizer.json before a tokenizer is made of it."""

import re
from collections.abc import Mapping
from typing import Any

import tokenizers

from rlhfjax import json_text
from rlhfjax.data import thoughts
from rlhfjax.data.built_in_templates import MARKERS
from rlhfjax.data.tokenizer_files import FILE
from rlhfjax.errors import DataError

_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def with_specials(
    backend: tokenizers.Tokenizer, names: set[str], source: str
) -> dict[str, Any]:
    """Returns tokenizer.json with all special tokens marked as special.

    Special are also the tokens in `names`, and the markers of the chat template `source`.
    """
    data = json_text.parse(backend.to_str()) | {"truncation": None, "padding": None}
    added = data["added_tokens"]
    for token in added:
        text = token["content"]
        token["special"] |= text in names or _is_marker(text, source)
    known = {token["content"] for token in added}
    for text in sorted(names - known):
        i = backend.token_to_id(text)
        if i is not None:
            added.append({"id": i, "content": text, "special": True} | _PLAIN)
    added.sort(key=lambda token: token["id"])
    return data


def for_file(data: Mapping[str, Any], backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """Returns a tokenizer.json in which the marks of thoughts are as special as they were.

    Readers that leave specials out of a response keep its thought.
    """
    added = json_text.parse(backend.to_str())["added_tokens"]
    plain = {token["content"] for token in added if not token["special"]}
    plain &= set(thoughts.MARKS)
    tokens = [
        token | {"special": token["special"] and token["content"] not in plain}
        for token in data["added_tokens"]
    ]
    return {**data, "added_tokens": tokens}


def _is_marker(text: str, source: str) -> bool:
    """Returns whether a token is written by a chat template and is no ordinary word."""
    if text in MARKERS.get(source, ()):
        return True
    return text in source and bool(re.search(r"[^\w\s]", text))


def make_backend(data: Mapping[str, Any]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(json_text.encode(data, FILE))
    backend.encode_special_tokens = True  # encode specials in a text as ordinary text
    return backend


def without_prefix(data: Mapping[str, Any], anywhere: bool = False) -> dict[str, Any]:
    """Returns a tokenizer.json that puts no blank before a text that follows something.

    Args:
      anywhere: never put a blank, for text that follows text.
    """
    parts = {name: data[name] for name in ("normalizer", "pre_tokenizer")}
    text = json_text.encode(parts, FILE)
    text = text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    if anywhere:
        text = text.replace('"prepend_scheme": "always"', '"prepend_scheme": "never"')
        text = text.replace('"add_prefix_space": true', '"add_prefix_space": false')
        # The normalizer of older Llama 2 files.
        text = re.sub(r'"prepend": "[^"]*"', '"prepend": ""', text)
    return {**data, **json_text.parse(text)}


def _types(part: Mapping[str, Any] | None) -> set[str]:
    """Returns the types of a decoder, pre-tokenizer or normalizer, and of its members."""
    if not part:
        return set()
    for members in ("decoders", "pretokenizers", "normalizers"):
        if members in part:
            return set().union(*map(_types, part[members]))
    return {part["type"]}


def over_bytes(data: Mapping[str, Any], context: str) -> bool:
    """Returns whether pieces are spelled in bytes; else in characters, with a fallback to bytes."""
    kind = data["model"]["type"]
    decoders = _types(data["decoder"])
    if kind == "BPE" and decoders & {"ByteLevel", "ByteFallback"}:
        encoders = _types(data["pre_tokenizer"]) | _types(data["normalizer"])
        if "ByteLevel" in decoders - encoders:
            raise DataError(
                f"{context}: a ByteLevel decoder, and no ByteLevel pre_tokenizer: "
                "text would not come back as it was"
            )
        if "ByteLevel" not in decoders and not data["model"]["byte_fallback"]:
            raise DataError(
                f"{context}: a ByteFallback decoder, and model.byte_fallback is false: "
                "text would not come back as it was"
            )
        return "ByteLevel" in decoders
    name = f"{kind} with decoder {'/'.join(sorted(decoders)) or 'none'}"
    raise DataError(
        f"{context}: {name}; accepted: BPE with a ByteLevel or a ByteFallback decoder"
    )
