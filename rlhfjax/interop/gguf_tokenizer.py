"""The tokenizer in a GGUF file, with its chat template.

Of kind "gpt2" is byte-level BPE, as GPT-2, Llama 3, Qwen2 and SmolLM have it; `gguf_pre` has its
pre-tokenizers. Of kind "llama" is SentencePiece's BPE with a fallback to bytes, as Llama 2, Gemma
and Mistral have it: a pair is merged whose token has the best score. There the literal character
U+2581, by which files spell a blank, is spelled in bytes, so that every text comes back; llama.cpp
takes it for a blank.
"""

import math
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from rlhfjax.data import sentencepiece_json
from rlhfjax.data.end_ids import END_IDS
from rlhfjax.data.hf_tokenizer import HuggingFaceTokenizer
from rlhfjax.errors import CheckpointError, first_line
from rlhfjax.interop import gguf_pre
from rlhfjax.interop.gguf_file import open_gguf
from rlhfjax.interop.gguf_pre import PRE
from rlhfjax.interop.gguf_vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from rlhfjax.json_text import shown
from rlhfjax.paths import Path

_PLAIN_IN_PHI3 = ("<s>", "<unk>", "<|endoftext|>")
# Characters of a token that others are merged to; Llama 2 and Gemma have 16.
_LONGEST = 256
_KINDS = range(7)  # 0: undefined
# Special tokens by GGUF's names and by transformers'.
_NAMES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
}
_ENDS = ("eos", "eot", "eom")  # of a text, of a turn, of a message


def gguf_tokenizer(path: str | Path) -> HuggingFaceTokenizer:
    """Returns the tokenizer of a GGUF file, with its chat template.

    Raises:
      CheckpointError: the file is not a whole GGUF file, its tokenizer is of another kind, or its
        pre-tokenizer is not in PRE. Names the file and the key.
      DataError: the chat template cannot be cut into turns.
      ConfigError: the gguf package is not installed.
    """
    metadata, _ = open_gguf(path)
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model is {shown(kind)}; accepted: 'gpt2', that is "
            "byte-level BPE, and 'llama', SentencePiece's BPE"
        )
    tokens = _strings(path, metadata, "tokens")
    if kind == "llama":
        tokens = [text.replace(SPACE, " ") for text in tokens]
    kinds = _array(path, metadata, "token_type")
    _validate_kinds(path, tokens, kinds)
    _validate_lengths(path, tokens, set(tokens), kinds)
    while kinds and kinds[-1] == UNUSED:  # the model has more ids than the tokenizer
        tokens.pop()
        kinds.pop()
    if kind == "gpt2":
        backend, adds_bos = _byte_level(path, metadata, tokens)
    else:
        backend, adds_bos = _scored(path, metadata, tokens, kinds), True
    swallowing = kind == "llama" and _is_phi3(metadata)
    for text, kind in zip(tokens, kinds, strict=True):
        rstrip = swallowing and kind == CONTROL and text not in _PLAIN_IN_PHI3
        token = AddedToken(text, normalized=False, rstrip=rstrip)
        if kind in (CONTROL, UNKNOWN):
            backend.add_special_tokens([token])
        elif kind == USER_DEFINED:
            backend.add_tokens([token])
    config = _config(path, metadata, tokens, adds_bos)
    return HuggingFaceTokenizer(backend, config, context=str(path))


def _is_phi3(metadata: Mapping[str, Any]) -> bool:
    """Returns whether special tokens swallow the blanks behind them, as llama.cpp decides it."""
    name = str(metadata.get("general.name", "")).lower()
    return "phi-3" in name or "phi3" in name


def _array(path: str | Path, metadata: Mapping[str, Any], name: str) -> list[Any]:
    """Returns one of the tokenizer's arrays."""
    key = f"tokenizer.ggml.{name}"
    if key not in metadata:
        raise CheckpointError(f"{path}: there is no {key}")
    if not isinstance(metadata[key], list):
        raise CheckpointError(
            f"{path}: {key} is {shown(metadata[key])}: expected an array"
        )
    return metadata[key]


def _strings(path: str | Path, metadata: Mapping[str, Any], name: str) -> list[str]:
    """Returns one of the tokenizer's arrays of strings."""
    texts = []
    for i, content in enumerate(_array(path, metadata, name)):
        try:
            texts.append(content.decode())
        except (UnicodeDecodeError, AttributeError):  # no UTF-8, and a number
            raise CheckpointError(
                f"{path}: tokenizer.ggml.{name}[{i}] is {shown(content)}: expected UTF-8 text"
            ) from None
    return texts


def _byte_level(
    path: str | Path, metadata: Mapping[str, Any], tokens: Sequence[str]
) -> tuple[tokenizers.Tokenizer, bool]:
    """Returns byte-level BPE without its added tokens, and whether bos is put before a text."""
    name = metadata.get("tokenizer.ggml.pre")
    if name not in PRE:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre is {shown(name)}; accepted: {', '.join(PRE)}"
        )
    pre = PRE[name]
    merges = _strings(path, metadata, "merges")
    try:
        bpe = models.BPE(
            vocab={text: i for i, text in enumerate(tokens)},
            merges=[_split_merge(merge) for merge in merges],
            ignore_merges=pre.ignore_merges,
        )
    except Exception as error:  # the library raises nothing more special
        why = first_line(error)
        raise CheckpointError(
            f"{path}: tokenizer.ggml.merges do not fit the tokens ({why})"
        ) from None
    backend = tokenizers.Tokenizer(bpe)
    backend.decoder = decoders.ByteLevel()
    gguf_pre.apply(backend, pre)
    return backend, pre.adds_bos


def _scored(
    path: str | Path,
    metadata: Mapping[str, Any],
    tokens: Sequence[str],
    kinds: Sequence[int],
) -> tokenizers.Tokenizer:
    """Returns BPE by scores without its added tokens."""
    if metadata.get("tokenizer.ggml.precompiled_charsmap"):
        raise CheckpointError(
            f"{path}: tokenizer.ggml.precompiled_charsmap: a tokenizer that changes characters "
            "is not read"
        )
    pairs = list(zip(tokens, kinds, strict=True))
    in_bytes = {text for text, kind in pairs if kind == BYTE}
    missing = {sentencepiece_json.BYTE.format(i) for i in range(256)} - in_bytes
    if missing:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.tokens: {min(missing)} is missing, the token of a byte"
        )
    scores = _scores(path, metadata, tokens, kinds)
    bpe = models.BPE(
        vocab={text: i for i, text in enumerate(tokens)},
        merges=list(sentencepiece_json.merges(scores)),
        byte_fallback=True,
        unk_token=next((text for text, kind in pairs if kind == UNKNOWN), None),
    )
    backend = tokenizers.Tokenizer(bpe)
    decoding = [decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Prepend(" ")
        decoding.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(decoding)
    return backend


def _scores(
    path: str | Path,
    metadata: Mapping[str, Any],
    tokens: Sequence[str],
    kinds: Sequence[int],
) -> dict[str, float]:
    """Returns the scores of the tokens that others are merged to, which all differ."""
    given = _array(path, metadata, "scores")
    if len(given) < len(tokens):
        raise CheckpointError(
            f"{path}: tokenizer.ggml: {len(tokens)} tokens and {len(given)} scores"
        )
    scores: dict[str, float] = {}
    texts: dict[float, str] = {}
    for text, kind, score in zip(tokens, kinds, given, strict=False):
        if kind != NORMAL:
            continue
        if type(score) is not float or not math.isfinite(score):
            raise CheckpointError(
                f"{path}: tokenizer.ggml.scores has {shown(score)}: expected numbers"
            )
        if len(text) > _LONGEST:
            raise CheckpointError(
                f"{path}: tokenizer.ggml.tokens: {shown(text)} has {len(text)} characters: "
                f"accepted are {_LONGEST}"
            )
        scores[text] = score
        other = texts.setdefault(score, text)
        if other != text and min(len(other), len(text)) > 1:
            raise CheckpointError(
                f"{path}: tokenizer.ggml.scores: {shown(other)} and {shown(text)} have the same: "
                "which is merged first is not said"
            )
    return scores


def _validate_lengths(
    path: str | Path, tokens: Sized, vocabulary: Sized, kinds: Sized
) -> None:
    """Raises CheckpointError if a token is there twice, or has no type."""
    if len(vocabulary) < len(tokens) or len(kinds) != len(tokens):
        raise CheckpointError(
            f"{path}: tokenizer.ggml: {len(tokens)} tokens, {len(vocabulary)} of them distinct, "
            f"and {len(kinds)} types"
        )


def _validate_kinds(
    path: str | Path, tokens: Sequence[str], kinds: Sequence[Any]
) -> None:
    """Raises CheckpointError for an empty token, or a type that GGUF does not have."""
    if "" in tokens:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.tokens[{tokens.index('')}] is empty"
        )
    for i, kind in enumerate(kinds):
        if type(kind) is not int or kind not in _KINDS:
            raise CheckpointError(
                f"{path}: tokenizer.ggml.token_type[{i}] is {shown(kind)}: expected 0 to 6"
            )


def _split_merge(merge: str) -> tuple[str, str]:
    """Returns the two halves of a merge; the first may itself start with a blank."""
    cut = merge.find(" ", 1)
    if cut < 0:
        raise ValueError(f"{shown(merge)} is not two tokens with a blank between them")
    return merge[:cut], merge[cut + 1 :]


def _config(
    path: str | Path, metadata: Mapping[str, Any], tokens: list[str], adds_bos: bool
) -> dict[str, Any]:
    """Returns a tokenizer_config.json: special tokens, whether a text has a bos, chat template.

    Args:
      adds_bos: whether it has one if the file does not say it.
    """
    config = {}
    if template := metadata.get("tokenizer.chat_template"):
        if not isinstance(template, str):
            raise CheckpointError(
                f"{path}: tokenizer.chat_template is {shown(template)}: expected text"
            )
        config["chat_template"] = template
    for key, name in _NAMES.items():
        i = _special_id(path, metadata, key, len(tokens))
        if i is not None:
            config[name] = tokens[i]
    ends = [_special_id(path, metadata, key, len(tokens)) for key in _ENDS]
    config[END_IDS] = [i for i in ends if i is not None]
    adds = metadata.get("tokenizer.ggml.add_bos_token", adds_bos)
    if not isinstance(adds, bool):
        raise CheckpointError(
            f"{path}: tokenizer.ggml.add_bos_token is {shown(adds)}: expected a bool"
        )
    return config | {"add_bos_token": adds}


def _special_id(
    path: str | Path, metadata: Mapping[str, Any], key: str, count: int
) -> int | None:
    """Returns the id of a special token; None if the file names none."""
    name = f"tokenizer.ggml.{key}_token_id"
    i = metadata.get(name)
    if i is not None and (type(i) is not int or not 0 <= i < count):
        raise CheckpointError(f"{path}: {name} is {shown(i)}, of {count} tokens")
    return i
