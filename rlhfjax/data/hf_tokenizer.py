"""Tokenizers of Hugging Face's `tokenizers` library: tokenizer.json and the files beside it."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tokenizers

from rlhfjax import json_text, paths
from rlhfjax.data.template import BUILT_IN, MARKERS, Template
from rlhfjax.data.tokenizer_files import (
    CONFIG_FILE,
    FILE,
    NAMES,
    read_backend,
    read_config,
    template_of,
)
from rlhfjax.errors import DataError
from rlhfjax.paths import Path

# Specials that can be the pad where none is named so: document end, and unknown.
_PADS = ("<|endoftext|>", "<unk>")
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_SPACE = "\u2581"  # how BPE over characters spells a blank
# How byte-level BPE spells the 256 bytes.
_BYTES = frozenset(tokenizers.pre_tokenizers.ByteLevel.alphabet())
_NEVER = "ÿ"  # how byte-level BPE spells the byte 0xFF, which no UTF-8 text contains


class HuggingFaceTokenizer:
    """A tokenizer.json with its specials and chat template, safe against injected markers.

    Byte-level BPE (GPT-2, Llama 3, Qwen2, SmolLM2) decodes exactly what it encoded, except where
    its normalizer or vocabulary loses something: SmolLM2's has no piece for some control
    characters, which `encode` omits as transformers does.

    `eos_id` is the token that the sampler stops on: the one with which the chat template ends the
    assistant's turn, or without a template the file's eos_token. `pad_id` is always another one. If
    a file's pad is its eos (SmolLM2), a special that the template does not use becomes the pad; if
    there is none (GPT-2), a byte that no text contains.

    Args:
      backend: the tokenizer itself.
      config: content of tokenizer_config.json. NAMES and chat_template are read, the rest is kept
        for `save`.
      template: replaces the config's chat template: a name in BUILT_IN or Jinja source.
      context: the file, for errors.

    Raises:
      DataError: the model is neither BPE over bytes nor over characters with a fallback to bytes,
        there is no eos or no possible pad, or the chat template cannot be cut into turns.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        *,
        template: str = "",
        context: str = "tokenizer",
    ):
        self._context = context
        self._config = dict(config)
        source = BUILT_IN.get(template, template) or template_of(config, context)
        names = {name: _content(config[name]) for name in NAMES if config.get(name)}
        data = _with_specials(backend, set(names.values()), source)
        self._json = json_text.encode(data, context)
        self._backend = _backend(data)
        # Backends by what stands before a text; equal ones are shared to save memory.
        after_special = _without_prefix(data)
        after_text = _without_prefix(data, anywhere=True)
        following = self._backend if after_special == data else _backend(after_special)
        joined = following if after_text == after_special else _backend(after_text)
        self._backends = {
            "nothing": self._backend,
            "special": following,
            "text": joined,
        }
        self._over_bytes = _over_bytes(data, context)
        self._ids = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(self._ids.values())
        self._added = {token["content"]: token for token in data["added_tokens"]}
        self._specials = {
            text: token["id"] for text, token in self._added.items() if token["special"]
        }
        self._unk: str | None = data["model"].get("unk_token")
        longest_first = sorted(map(re.escape, self._specials), key=len, reverse=True)
        self._marker = re.compile("|".join(longest_first) or "(?!)")
        # The model's own unk stands for what it cannot spell, whatever the text.
        self._forbidden = frozenset(
            i for text, i in self._specials.items() if text != self._unk
        )
        self._dropped: frozenset[int] = frozenset()
        self.template = Template(
            source,
            specials=self._specials,
            names=names,
            encode=self._encode_run,
            decode=self.decode,
            context=context,
        )
        ids = {
            name: self._ids[text] for name, text in names.items() if text in self._ids
        }
        self._set_ids(ids)

    def _set_ids(self, given: Mapping[str, int]) -> None:
        """Sets pad_id, bos_id, eos_id and unk_id from the ids that the config names."""
        self._validate_template(given)
        has_template = bool(self.template.source)
        self.eos_id = self.template.end_id if has_template else given["eos_token"]
        self.bos_id = given.get("bos_token", given.get("eos_token", self.eos_id))
        self.pad_id = self._choose_pad(given)
        self.unk_id = given.get("unk_token", self.pad_id)
        self._dropped = frozenset((self.pad_id, self.bos_id, self.eos_id))

    def _validate_template(self, given: Mapping[str, int]) -> None:
        if not self.template.source:
            if "eos_token" not in given:
                raise DataError(
                    f"{self._context}: neither an eos_token nor a chat template says "
                    "what ends a turn"
                )
            return
        for text, token in self._added.items():
            swallows = token["lstrip"] or token["rstrip"] or token["single_word"]
            if swallows and token["id"] in self.template.written:
                raise DataError(
                    f"{self._context}: {text!r} of its chat template swallows the blanks beside it"
                )

    def _choose_pad(self, given: Mapping[str, int]) -> int:
        """Returns the id of the pad, which is not the eos."""
        if given.get("pad_token", self.eos_id) != self.eos_id:
            return given["pad_token"]
        busy = {self.bos_id, *given.values()}
        candidates = []
        for text, i in self._specials.items():
            unused = i != self.eos_id and i not in self.template.written
            if unused and (i not in busy or text in _PADS):
                candidates.append(("pad" not in text.lower(), text not in _PADS, i))
        if candidates:
            return min(candidates)[-1]
        if self._over_bytes and _NEVER in self._ids:
            return self._ids[_NEVER]
        raise DataError(
            f"{self._context}: no token is free to be the pad, which must not be the eos"
        )

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, HuggingFaceTokenizer) and self._state() == other._state()
        )

    def __hash__(self) -> int:
        return hash(self._json)

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled backend would forget to encode specials in a text as ordinary text.
        arguments = (self._json, self._config, self.template.source, self._context)
        return _from_json, arguments

    def with_template(self, template: str) -> "HuggingFaceTokenizer":
        """Returns the tokenizer with another chat template.

        Args:
          template: a name in BUILT_IN or Jinja source.
        Raises:
          DataError: the template cannot be cut into turns.
        """
        return _from_json(self._json, self._config, template, self._context)

    def _state(self) -> tuple[Any, ...]:
        ids = (self.pad_id, self.bos_id, self.eos_id, self.unk_id)
        return (self._json, self.template.source, *ids)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json for transformers' AutoTokenizer.

        A pad that is a special token is written as the pad_token, so that readers too have a pad
        that is not the eos.
        """
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._config,
        }
        if self.template.source:
            config["chat_template"] = self.template.source
        for text, i in self._specials.items():
            if i == self.pad_id:
                config["pad_token"] = text
        file = folder / CONFIG_FILE
        paths.write(file, json_text.encode(config, file, indent=2) + "\n")
        paths.write(folder / FILE, self._json)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text. A special token in it is encoded as ordinary characters."""
        return self._encode(self._backend, text)

    def _encode_run(self, text: str, before: str) -> list[int]:
        """Returns the ids of a text in a conversation.

        What stands before it decides whether its first word gets a blank.
        """
        return self._encode(self._backends[before], text)

    def _encode(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        ids = backend.encode(text, add_special_tokens=False).ids
        if self._forbidden.isdisjoint(ids):
            return ids
        # Rare: a vocabulary whose ordinary merges produce a special. Cut the text within each
        # special, so that neither half is one.
        ids = []
        start = 0
        cuts = [match.start() + 1 for match in self._marker.finditer(text)]
        for end in (*cuts, len(text)):
            ids += backend.encode(text[start:end], add_special_tokens=False).ids
            backend = self._backends["text"]
            start = end
        if not self._forbidden.isdisjoint(ids):
            raise DataError(
                f"{self._context}: {text[:60]!r} cannot be encoded without a special token"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of some ids, without pad, bos and eos; other specials are spelled."""
        kept = [int(i) for i in ids if int(i) not in self._dropped]
        return self._backend.decode(kept, skip_special_tokens=False)

    def token_id(self, piece: str) -> int:
        """Returns the id of one piece, for example a special.

        Raises:
          DataError: the piece is not in the vocabulary.
        """
        if piece not in self._ids:
            raise DataError(
                f"{self._context}: no piece {piece!r} among its {self.vocab_size}"
            )
        return self._ids[piece]

    def byte_lengths(self) -> np.ndarray:
        """Returns the number of UTF-8 bytes of each id's text, int32 [vocab_size].

        0 for specials and unk; see `Tokenizer`.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        for piece, i in self._ids.items():
            lengths[i] = self._byte_length(piece)
        return lengths

    def _byte_length(self, piece: str) -> int:
        if piece in self._added:
            return 0 if self._added[piece]["special"] else len(piece.encode())
        if piece == self._unk:
            return 0
        if self._over_bytes:
            # A character stands for a byte, but a piece with any other character is decoded as it
            # is spelled.
            return len(piece) if _BYTES.issuperset(piece) else len(piece.encode())
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return 1
        return len(piece.replace(_SPACE, " ").encode())


def read_folder(folder: str | os.PathLike) -> HuggingFaceTokenizer:
    """Returns the tokenizer in a folder.

    Reads tokenizer.json and, if present, the config, special tokens and chat template beside it.

    Raises:
      DataError: tokenizer.json is missing, a file is damaged, or see HuggingFaceTokenizer.
    """
    folder = paths.path(folder)
    path = folder / FILE
    backend = read_backend(path)
    return HuggingFaceTokenizer(backend, read_config(folder), context=str(path))


def _from_json(
    data: str, config: Mapping[str, Any], template: str, context: str
) -> HuggingFaceTokenizer:
    backend = tokenizers.Tokenizer.from_str(data)
    return HuggingFaceTokenizer(backend, config, template=template, context=context)


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else str(token)


def _with_specials(
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


def _is_marker(text: str, source: str) -> bool:
    """Returns whether a token is written by a chat template and is no ordinary word."""
    if text in MARKERS.get(source, ()):
        return True
    return text in source and bool(re.search(r"[^\w\s]", text))


def _backend(data: Mapping[str, Any]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(json_text.encode(data, FILE))
    backend.encode_special_tokens = True  # encode specials in a text as ordinary text
    return backend


def _without_prefix(data: Mapping[str, Any], anywhere: bool = False) -> dict[str, Any]:
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


def _over_bytes(data: Mapping[str, Any], context: str) -> bool:
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
        return "ByteLevel" in decoders
    name = f"{kind} with decoder {'/'.join(sorted(decoders)) or 'none'}"
    raise DataError(
        f"{context}: {name}; accepted: BPE with a ByteLevel or a ByteFallback decoder"
    )
