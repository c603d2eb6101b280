"""Tokenizers of Hugging Face's `tokenizers` library: a folder's tokenizer.json and what stands beside it."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tokenizers

from rlhfjax import json_text, paths
from rlhfjax.data.template import BUILT_IN, MARKERS, Template
from rlhfjax.errors import DataError, first_line
from rlhfjax.paths import Path

FILE, CONFIG_FILE, MAP_FILE, TEMPLATE_FILE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_PADS = (
    "<|endoftext|>",
    "<unk>",
)  # where no special is called a pad: one that ends documents, or stands for nothing
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_SPACE = "\u2581"  # how BPE over characters writes a blank
# How byte-level BPE spells the 256 bytes.
_BYTES = frozenset(tokenizers.pre_tokenizers.ByteLevel.alphabet())
_NEVER = "ÿ"  # how byte-level BPE spells the byte 0xFF, which no UTF-8 text contains


class HuggingFaceTokenizer:
    """A tokenizer.json with its specials and chat template, safe against injected markers.

    Byte-level BPE (GPT-2, Llama 3, Qwen2, SmolLM2) decodes what it encoded exactly, as far as its normalizer and its
    vocabulary go: SmolLM2's has no piece for some control characters, which `encode` leaves out as transformers does.

    `eos_id` is what the sampler stops on: the token with which the chat template ends the assistant's turn, and only
    without a template the eos_token of the file. `pad_id` is never that one: a file whose pad is its eos (SmolLM2) gets
    a special that its template does not use, and a vocabulary without one (GPT-2) a byte that no text contains.

    Args:
      backend: the tokenizer itself.
      config: what tokenizer_config.json says; NAMES and chat_template are read, the rest is kept for `save`.
      template: a name in BUILT_IN or Jinja source, instead of the config's.
      where: the file, for errors.

    Raises:
      DataError: neither BPE over bytes nor over characters with a fallback to bytes, no eos, no possible pad, or a
        chat template that cannot be cut into turns.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        *,
        template: str = "",
        where: str = "tokenizer",
    ):
        self._where, self._config = where, dict(config)
        source = BUILT_IN.get(template, template) or _template_of(config)
        names = {name: _content(config[name]) for name in NAMES if config.get(name)}
        data = _prepared(backend, {*names.values()}, source)
        self._json = json_text.encode(data, where)
        self._backend = _backend(data)
        after_special, after_text = (
            _without_prefix(data),
            _without_prefix(data, anywhere=True),
        )
        following = self._backend if after_special == data else _backend(after_special)
        joined = following if after_text == after_special else _backend(after_text)
        self._backends = {
            "nothing": self._backend,
            "special": following,
            "text": joined,
        }
        self._bytes = _over_bytes(data, where)
        self._ids = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(self._ids.values())
        self._added = {t["content"]: t for t in data["added_tokens"]}
        self._specials = {
            text: t["id"] for text, t in self._added.items() if t["special"]
        }
        self._unk: str | None = data["model"].get("unk_token")
        self._guard()
        self.template = Template(
            source,
            specials=self._specials,
            names=names,
            encode=self._encode_run,
            decode=self.decode,
            where=where,
        )
        self._set_ids(
            {name: self._ids[text] for name, text in names.items() if text in self._ids}
        )

    def _guard(self) -> None:
        longest_first = sorted(map(re.escape, self._specials), key=len, reverse=True)
        self._marker = re.compile("|".join(longest_first) or "(?!)")
        # The model's own unk is an answer to what it cannot spell, not to what a text says.
        self._forbidden = frozenset(
            i for text, i in self._specials.items() if text != self._unk
        )
        self._dropped: frozenset[int] = frozenset()

    def _set_ids(self, given: Mapping[str, int]) -> None:
        source = self.template.source
        if not source and "eos_token" not in given:
            raise DataError(
                f"{self._where}: neither an eos_token nor a chat template says what ends a turn"
            )
        for text, token in self._added.items():
            if token["id"] in self.template.written and (
                token["lstrip"] or token["rstrip"] or token["single_word"]
            ):
                raise DataError(
                    f"{self._where}: {text!r} of its chat template swallows the blanks beside it"
                )
        self.eos_id = self.template.end_id if source else given["eos_token"]
        self.bos_id = given.get("bos_token", given.get("eos_token", self.eos_id))
        self.pad_id = self._pad(given)
        self.unk_id = given.get("unk_token", self.pad_id)
        self._dropped = frozenset((self.pad_id, self.bos_id, self.eos_id))

    def _pad(self, given: Mapping[str, int]) -> int:
        if given.get("pad_token", self.eos_id) != self.eos_id:
            return given["pad_token"]
        busy = {self.bos_id, *given.values()}
        spare = {
            text
            for text, i in self._specials.items()
            if i != self.eos_id and (i not in busy or text in _PADS)
        }
        free = [
            text for text in spare if self._specials[text] not in self.template.written
        ]
        free.sort(
            key=lambda text: (
                "pad" not in text.lower(),
                text not in _PADS,
                self._specials[text],
            )
        )
        free += [_NEVER] if self._bytes and _NEVER in self._ids else []
        if not free:
            raise DataError(
                f"{self._where}: no token is free to be the pad, which must not be the eos"
            )
        return self._ids[free[0]]

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, HuggingFaceTokenizer) and self._state() == other._state()
        )

    def __hash__(self) -> int:
        return hash(self._json)

    def __reduce__(
        self,
    ) -> tuple[
        Any, ...
    ]:  # a pickled backend would forget to take specials in a text for text
        return _restored, (self._json, self._config, self.template.source, self._where)

    def with_template(self, template: str) -> "HuggingFaceTokenizer":
        """The same tokenizer with another chat template: a name in BUILT_IN or Jinja source. Raises DataError."""
        return _restored(self._json, self._config, template, self._where)

    def _state(self) -> tuple[Any, ...]:
        return (
            self._json,
            self.template.source,
            self.pad_id,
            self.bos_id,
            self.eos_id,
            self.unk_id,
        )

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads, into a folder.

        A pad that is a special token is written as the pad_token: whoever trains on then has one that is not the eos.
        """
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        } | self._config
        config |= (
            {"chat_template": self.template.source} if self.template.source else {}
        )
        pads = [text for text, i in self._specials.items() if i == self.pad_id]
        config |= {"pad_token": pads[0]} if pads else {}
        file = folder / CONFIG_FILE
        paths.write(file, json_text.encode(config, file, indent=2) + "\n")
        paths.write(folder / FILE, self._json)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without specials; what looks like a special is encoded as ordinary characters."""
        return self._encode(self._backend, text)

    def _encode_run(self, text: str, before: str) -> list[int]:
        """Ids of a text in a conversation: a blank may belong before the first word of all, or of a run."""
        return self._encode(self._backends[before], text)

    def _encode(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        ids = backend.encode(text, add_special_tokens=False).ids
        if self._forbidden.isdisjoint(ids):
            return ids
        # Rare: a vocabulary whose ordinary rules also arrive at a special. Cut within it, so that neither half is one.
        cuts = [match.start() + 1 for match in self._marker.finditer(text)]
        parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        backends = [backend, *[self._backends["text"]] * len(cuts)]
        ids = [
            i
            for b, part in zip(backends, parts, strict=True)
            for i in b.encode(part, add_special_tokens=False).ids
        ]
        if not self._forbidden.isdisjoint(ids):
            raise DataError(
                f"{self._where}: {text[:60]!r} cannot be encoded without a special token"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; pad, bos and eos are dropped, other specials show as themselves."""
        kept = [int(i) for i in ids if int(i) not in self._dropped]
        return self._backend.decode(kept, skip_special_tokens=False)

    def token_id(self, piece: str) -> int:
        """The id of one piece, for instance a special. Raises DataError when it is not in the vocabulary."""
        if piece not in self._ids:
            raise DataError(
                f"{self._where}: no piece {piece!r} among its {self.vocab_size}"
            )
        return self._ids[piece]

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, int32 [v]; 0 for specials and for unk; see
        `Tokenizer`."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for piece, i in self._ids.items():
            lengths[i] = self._byte_length(piece)
        return lengths

    def _byte_length(self, piece: str) -> int:
        if piece in self._added:
            return 0 if self._added[piece]["special"] else len(piece.encode())
        if piece == self._unk:
            return 0
        if self._bytes:
            # A character stands for a byte, but a piece with another character is decoded as it is
            # spelled.
            return len(piece) if _BYTES.issuperset(piece) else len(piece.encode())
        return (
            1
            if re.fullmatch("<0x[0-9A-F]{2}>", piece)
            else len(piece.replace(_SPACE, " ").encode())
        )


def read_folder(folder: str | os.PathLike, template: str = "") -> HuggingFaceTokenizer:
    """The tokenizer in a folder: tokenizer.json, and where they are its config, special tokens and chat template.

    Raises:
      DataError: a file is missing or damaged, or see HuggingFaceTokenizer.
    """
    folder = paths.path(folder)
    path = folder / FILE
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except Exception as error:  # the library raises nothing more special
        raise DataError(f"{path}: not a tokenizer ({first_line(error)})") from None
    config = _read_json(folder / MAP_FILE) | _read_json(folder / CONFIG_FILE)
    if (folder / TEMPLATE_FILE).is_file():
        config["chat_template"] = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    return HuggingFaceTokenizer(backend, config, template=template, where=str(path))


def _restored(
    data: str, config: Mapping[str, Any], template: str, where: str
) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(
        tokenizers.Tokenizer.from_str(data), config, template=template, where=where
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise DataError(f"{path}: expected a JSON object") from None


def _template_of(config: Mapping[str, Any]) -> str:
    """The chat template; of several named ones the default."""
    found = config.get("chat_template") or ""
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}
    return found if isinstance(found, str) else found.get("default", "")


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else str(token)


def _prepared(
    backend: tokenizers.Tokenizer, names: set[str], source: str
) -> dict[str, Any]:
    """tokenizer.json, with every token that is named a special or that the template writes marked as one."""
    data = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    for token in data["added_tokens"]:
        token["special"] = (
            token["special"]
            or token["content"] in names
            or _markup(token["content"], source)
        )
    known = {token["content"] for token in data["added_tokens"]}
    for text in sorted(names - known):
        if (i := backend.token_to_id(text)) is not None:
            data["added_tokens"].append(
                {"id": i, "content": text, "special": True} | _PLAIN
            )
    data["added_tokens"].sort(key=lambda token: token["id"])
    return data


def _markup(text: str, source: str) -> bool:
    return text in MARKERS.get(source, ()) or (
        text in source and bool(re.search(r"[^\w\s]", text))
    )


def _backend(data: Mapping[str, Any]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(json_text.encode(data, FILE))
    backend.encode_special_tokens = True  # take specials in a text for text
    return backend


def _without_prefix(data: Mapping[str, Any], anywhere: bool = False) -> dict[str, Any]:
    """tokenizer.json for what is not a text's beginning, or follows text: no blank is put before it."""
    text = json_text.encode(
        {name: data[name] for name in ("normalizer", "pre_tokenizer")}, FILE
    )
    text = text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    if anywhere:
        text = text.replace('"prepend_scheme": "always"', '"prepend_scheme": "never"')
        text = text.replace('"add_prefix_space": true', '"add_prefix_space": false')
        text = re.sub(
            r'"prepend": "[^"]*"', '"prepend": ""', text
        )  # the normalizer of older Llama 2 files
    return {**data, **json.loads(text)}


def _parts(component: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A decoder as a list: the members of a sequence, or itself."""
    if not component:
        return []
    return (
        [p for part in component["decoders"] for p in _parts(part)]
        if "decoders" in component
        else [dict(component)]
    )


def _over_bytes(data: Mapping[str, Any], where: str) -> bool:
    """Whether pieces are spelled in bytes; else in characters, with a fallback to bytes."""
    kinds = {part["type"] for part in _parts(data["decoder"])}
    if data["model"]["type"] == "BPE" and "ByteLevel" in kinds:
        return True
    if data["model"]["type"] == "BPE" and "ByteFallback" in kinds:
        return False
    name = f"{data['model']['type']} with decoder {'/'.join(sorted(kinds)) or 'none'}"
    raise DataError(
        f"{where}: {name}; accepted: BPE with a ByteLevel or a ByteFallback decoder"
    )
