"""Tokenizers of Hugging Face's `tokenizers` library: tokenizer.json and the files beside it."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tokenizers

from rlhfjax import json_text, paths
from rlhfjax.data import thoughts
from rlhfjax.data.built_in_templates import BUILT_IN
from rlhfjax.data.end_ids import END_IDS, end_ids
from rlhfjax.data.template import Template
from rlhfjax.data.tokenizer_files import (
    CONFIG_FILE,
    FILE,
    NAMES,
    read_backend,
    read_config,
    template_of,
)
from rlhfjax.data.tokenizer_json import (
    for_file,
    make_backend,
    over_bytes,
    with_specials,
    without_prefix,
)
from rlhfjax.errors import DataError
from rlhfjax.paths import Path

# Specials that can be the pad where none is named so: document end, and unknown.
_PADS = ("<|endoftext|>", "<unk>")
_SPACE = "\u2581"  # how BPE over characters spells a blank
# Specials that end a document in vocabularies whose eos_token ends a turn.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
# Keys of tokenizer_config.json that replace what tokenizer.json says.
_OTHER_READERS = ("added_tokens_decoder", "auto_map", "backend")
# How byte-level BPE spells the 256 bytes: those that Latin-1 prints as they are, the others in
# order from U+0100 on.
_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_BYTES = {chr(byte): byte for byte in _PRINTED}
_BYTES |= {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
_NEVER = "ÿ"  # how byte-level BPE spells the byte 0xFF, which no UTF-8 text contains


class HuggingFaceTokenizer:
    """A tokenizer.json with its specials and chat template, safe against injected markers.

    Byte-level BPE (GPT-2, Llama 3, Qwen2, SmolLM2) decodes exactly what it encoded, except where
    its normalizer or vocabulary loses something: SmolLM2's has no piece for some control
    characters, which `encode` omits as transformers does.

    `eos_id` is the token that the sampler stops on: the one with which the chat template ends the
    assistant's turn, or without a template the file's eos_token. `extra_eos_ids` are the other ids
    that end a response according to the model's files (`end_ids`). `pad_id` is always another one
    than `eos_id`. If a file's pad is its eos (SmolLM2), a special that the template does not use
    becomes the pad; if there is none (GPT-2), a byte that no text contains.

    `document_end` is the file's eos_token, or a special such as <|endoftext|> if that ends a turn.
    `document_start` is the file's bos_token, if its post-processor writes one before a text.

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
        data = with_specials(backend, set(names.values()), source)
        self._json = json_text.encode(for_file(data, backend), context)
        self._backend = make_backend(data)
        # Backends by what stands before a text; equal ones are shared to save memory.
        after_special = without_prefix(data)
        after_text = without_prefix(data, anywhere=True)
        following = (
            self._backend if after_special == data else make_backend(after_special)
        )
        joined = following if after_text == after_special else make_backend(after_text)
        self._backends = {
            "nothing": self._backend,
            "special": following,
            "text": joined,
        }
        self._over_bytes = over_bytes(data, context)
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
            swallows=[token["id"] for token in data["added_tokens"] if token["rstrip"]],
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
        others = sorted(set(self._config.get(END_IDS, ())) - {self.eos_id})
        # An id without a token cannot be sampled.
        self.extra_eos_ids = tuple(i for i in others if i < self.vocab_size)
        specials = (self.pad_id, self.bos_id, self.eos_id)
        self._dropped = frozenset((*specials, *self.extra_eos_ids))
        self.document_end = self._choose_document_end(given)
        self.document_start = self._choose_document_start(given)

    def _validate_template(self, given: Mapping[str, int]) -> None:
        if not self.template.source:
            if "eos_token" not in given:
                raise DataError(
                    f"{self._context}: neither an eos_token nor a chat template says "
                    "what ends a turn"
                )
            return
        for text, token in self._added.items():
            swallows = token["lstrip"] or token["single_word"]
            if swallows and token["id"] in self.template.written:
                raise DataError(
                    f"{self._context}: {text!r} of its chat template swallows the blanks before it"
                )

    def _choose_pad(self, given: Mapping[str, int]) -> int:
        """Returns the id of the pad, which is not the eos."""
        if given.get("pad_token", self.eos_id) != self.eos_id:
            return given["pad_token"]
        busy = {self.bos_id, *given.values()}
        candidates = []
        for text, i in self._specials.items():
            unused = i != self.eos_id and i not in self.template.written
            unused = unused and text not in thoughts.MARKS
            if unused and (i not in busy or text in _PADS):
                candidates.append(("pad" not in text.lower(), text not in _PADS, i))
        if candidates:
            return min(candidates)[-1]
        if self._over_bytes and _NEVER in self._ids:
            return self._ids[_NEVER]
        raise DataError(
            f"{self._context}: no token is free to be the pad, which must not be the eos"
        )

    def _choose_document_end(self, given: Mapping[str, int]) -> int:
        eos = given.get("eos_token", self.eos_id)
        if eos != self.eos_id:
            return eos
        known = [
            self._specials[text] for text in _DOCUMENT_ENDS if text in self._specials
        ]
        return known[0] if known else eos

    def _choose_document_start(self, given: Mapping[str, int]) -> tuple[int, ...]:
        adds = self._config.get("add_bos_token")
        if "bos_token" not in given or adds is False:
            return ()
        bos = given["bos_token"]
        written = self._backend.encode("", add_special_tokens=True).ids
        return (bos,) if adds is True or bos in written[:1] else ()

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
        that is not the eos. The class is the one that takes tokenizer.json as it is, and keys with
        which a reader would take other code or other added tokens are left out.
        """
        config = {"clean_up_tokenization_spaces": False, **self._config}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        for name in _OTHER_READERS:
            config.pop(name, None)
        if self.template.source:
            config["chat_template"] = self.template.source
        for text, i in self._specials.items():
            if i == self.pad_id:
                config["pad_token"] = text
        file = folder / CONFIG_FILE
        paths.write(file, json_text.encode(config, file, indent=2) + "\n")
        paths.write(folder / FILE, self._json)

    def content(self) -> dict[str, Any]:
        """Returns the content of tokenizer.json."""
        return json_text.parse(self._json)

    def export(self, folder: Path) -> None:
        """Writes the files for AutoTokenizer, as `save` does."""
        self.save(folder)

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
        return np.array([len(text) for text in self.token_bytes()], np.int32)

    def token_bytes(self) -> list[bytes]:
        """Returns the UTF-8 bytes of each id's text; none for specials and unk."""
        texts = [b""] * self.vocab_size
        for piece, i in self._ids.items():
            texts[i] = self._bytes_of(piece)
        return texts

    def _bytes_of(self, piece: str) -> bytes:
        if piece in self._added:
            if self._added[piece]["special"]:
                return b""
            text = piece if self._over_bytes else piece.replace(_SPACE, " ")
            return text.encode()
        if piece == self._unk:
            return b""
        if self._over_bytes:
            # A character stands for a byte, but a piece with any other character is decoded as it
            # is spelled.
            is_bytes = _BYTES.keys() >= set(piece)
            if not is_bytes:
                return piece.encode()
            return bytes([_BYTES[character] for character in piece])
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(_SPACE, " ").encode()


def read_folder(folder: str | os.PathLike) -> HuggingFaceTokenizer:
    """Returns the tokenizer in a folder.

    Reads tokenizer.json and, if present, the config, special tokens, chat template and ids that end
    a response beside it.

    Raises:
      DataError: tokenizer.json is missing, a file is damaged, or see HuggingFaceTokenizer.
    """
    folder = paths.path(folder)
    path = folder / FILE
    backend = read_backend(path)
    config = read_config(folder)
    if ids := end_ids(folder, config):
        config[END_IDS] = ids
    return HuggingFaceTokenizer(backend, config, context=str(path))


def _from_json(
    data: str, config: Mapping[str, Any], template: str, context: str
) -> HuggingFaceTokenizer:
    backend = tokenizers.Tokenizer.from_str(data)
    return HuggingFaceTokenizer(backend, config, template=template, context=context)


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else str(token)
