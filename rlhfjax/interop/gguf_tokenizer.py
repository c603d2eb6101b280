"""The tokenizer in a GGUF file: byte-level BPE as GPT-2, Llama 3, Qwen2 and SmolLM have it.

A file names its pre-tokenizer and does not describe it. The pre-tokenizers here are those of the
models' own tokenizer.json. llama.cpp's agree with them except that Qwen2's normalizes text to NFC
first, which llama.cpp does not.
"""

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from rlhfjax.data.hf_tokenizer import HuggingFaceTokenizer
from rlhfjax.errors import CheckpointError, first_line
from rlhfjax.interop.gguf_file import open_gguf
from rlhfjax.json_text import shown
from rlhfjax.paths import Path

# Values of tokenizer.ggml.token_type.
_KINDS = range(7)
_CONTROL = 3  # a special token
_USER_DEFINED = 4  # a token that is found whole in a text
# The pattern of Llama 3 and Qwen2 has the numbers between these two halves.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
PRE = ("gpt-2", "llama-bpe", "llama3", "llama-v3", "qwen2", "smollm")
# Special tokens by transformers' names and by GGUF's.
_NAMES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


def gguf_tokenizer(path: str | Path) -> HuggingFaceTokenizer:
    """Returns the tokenizer of a GGUF file, with its chat template.

    Raises:
      CheckpointError: the file is not a whole GGUF file, its tokenizer is not byte-level BPE, or
        its pre-tokenizer is not in PRE. Names the file and the key.
      DataError: the chat template cannot be cut into turns.
      ConfigError: the gguf package is not installed.
    """
    metadata, _ = open_gguf(path)
    if (model := metadata.get("tokenizer.ggml.model")) != "gpt2":
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model is {shown(model)}; "
            "accepted: 'gpt2', that is byte-level BPE"
        )
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre is {shown(pre)}; accepted: {', '.join(PRE)}"
        )
    tokens = _strings(path, metadata, "tokens")
    backend = _backend(path, metadata, tokens, pre)
    config = _config(path, metadata, tokens)
    return HuggingFaceTokenizer(backend, config, context=str(path))


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


def _backend(
    path: str | Path, metadata: Mapping[str, Any], tokens: list[str], pre: str
) -> tokenizers.Tokenizer:
    merges = _strings(path, metadata, "merges")
    kinds = _array(path, metadata, "token_type")
    _validate_kinds(path, tokens, kinds)
    vocabulary = {text: i for i, text in enumerate(tokens)}
    _validate_lengths(path, tokens, vocabulary, kinds)
    try:
        bpe = models.BPE(
            vocab=vocabulary,
            merges=[_split_merge(merge) for merge in merges],
            # Llama 3 keeps a word that is a token, whatever the merges would make of it.
            ignore_merges=pre.startswith("llama"),
        )
    except Exception as error:  # the library raises nothing more special
        why = first_line(error)
        raise CheckpointError(
            f"{path}: tokenizer.ggml.merges do not fit the tokens ({why})"
        ) from None
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = tokenizers.decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    for text, kind in zip(tokens, kinds, strict=True):
        token = AddedToken(text, normalized=False)
        if kind == _CONTROL:
            backend.add_special_tokens([token])
        elif kind == _USER_DEFINED:
            backend.add_tokens([token])
    return backend


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


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    # GPT-2's pattern (Radford et al. 2019).
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "gpt-2":
        return words
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, words])
    numbers = r"\p{N}" if pre == "qwen2" else r"\p{N}{1,3}"
    split = pre_tokenizers.Split(Regex(numbers.join(_WORDS)), behavior="isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, in_bytes])


def _config(
    path: str | Path, metadata: Mapping[str, Any], tokens: list[str]
) -> dict[str, Any]:
    """Returns a tokenizer_config.json: the special tokens by name, and the chat template."""
    config = {}
    if template := metadata.get("tokenizer.chat_template"):
        if not isinstance(template, str):
            raise CheckpointError(
                f"{path}: tokenizer.chat_template is {shown(template)}: expected text"
            )
        config["chat_template"] = template
    for name, key in _NAMES.items():
        i = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if i is None:
            continue
        if type(i) is not int or not 0 <= i < len(tokens):
            raise CheckpointError(
                f"{path}: tokenizer.ggml.{key}_token_id is {shown(i)}, of {len(tokens)} tokens"
            )
        config[name] = tokens[i]
    return config
