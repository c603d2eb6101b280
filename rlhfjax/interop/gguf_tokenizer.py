"""The tokenizer in a GGUF file: byte-level BPE with the pre-tokenizers of GPT-2, Llama 3, Qwen2 and SmolLM.

A file names its pre-tokenizer and does not describe it. Those here are the ones of the models' own tokenizer.json,
which llama.cpp's agree with but for one thing: Qwen2's normalizes text to NFC first, and llama.cpp does not.
"""

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from rlhfjax.data.hf_tokenizer import HuggingFaceTokenizer
from rlhfjax.errors import CheckpointError, first_line
from rlhfjax.interop.gguf import open_gguf
from rlhfjax.paths import Path

_CONTROL, _USER_DEFINED = (
    3,
    4,
)  # of tokenizer.ggml.token_type: a special token; a token found whole in a text
_WORDS = (  # Llama 3 and Qwen2, with the numbers between the two halves
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
PRE = ("gpt-2", "llama-bpe", "llama3", "llama-v3", "qwen2", "smollm")


def gguf_tokenizer(path: str | Path) -> HuggingFaceTokenizer:
    """The tokenizer and the chat template of a GGUF file.

    Raises:
      CheckpointError: not a whole GGUF file, a tokenizer that is not byte-level BPE, or a pre-tokenizer that is
        not in PRE; one line with the file and the key.
      DataError: a chat template that cannot be cut into turns.
      ConfigError: the gguf package is not installed.
    """
    _, metadata = open_gguf(path, tokenizer=True)
    if (model := metadata.get("tokenizer.ggml.model")) != "gpt2":
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model is {model!r}; accepted: 'gpt2', that is byte-level BPE"
        )
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre is {pre!r}; accepted: {', '.join(PRE)}"
        )
    return HuggingFaceTokenizer(
        _backend(path, metadata, pre), _config(path, metadata), where=str(path)
    )


def _backend(
    path: str | Path, metadata: dict[str, Any], pre: str
) -> tokenizers.Tokenizer:
    try:
        tokens, merges = (
            metadata["tokenizer.ggml.tokens"],
            metadata["tokenizer.ggml.merges"],
        )
        kinds = metadata["tokenizer.ggml.token_type"]
        vocabulary = {text: i for i, text in enumerate(tokens)}
        pairs = [
            (pair[: (cut := pair.index(" ", 1))], pair[cut + 1 :]) for pair in merges
        ]
        # Llama 3 takes a word that is a token as it is, whatever the merges would make of it.
        bpe = models.BPE(
            vocab=vocabulary, merges=pairs, ignore_merges=pre.startswith("llama")
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: there is no {error.args[0]}") from None
    except Exception as error:  # the library raises nothing more special
        why = first_line(error)
        message = f"{path}: tokenizer.ggml.merges do not fit the tokens ({why})"
        raise CheckpointError(message) from None
    if len(vocabulary) < len(tokens) or len(kinds) != len(tokens):
        raise CheckpointError(
            f"{path}: tokenizer.ggml: {len(tokens)} tokens, {len(vocabulary)} of them distinct, and {len(kinds)} types"
        )
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer, backend.decoder = (
        _pre_tokenizer(pre),
        tokenizers.decoders.ByteLevel(),
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    special = [
        text for text, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL
    ]
    whole = [
        text for text, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED
    ]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    backend.add_tokens([AddedToken(text, normalized=False) for text in whole])
    return backend


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )  # GPT-2's pattern (Radford et al. 2019)
    if pre == "gpt-2":
        return words
    if pre == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), words]
        )
    numbers = r"\p{N}" if pre == "qwen2" else r"\p{N}{1,3}"
    split = pre_tokenizers.Split(Regex(numbers.join(_WORDS)), behavior="isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _config(path: str | Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json would say: the names of the special tokens and the chat template."""
    keys = {
        "bos_token": "bos",
        "eos_token": "eos",
        "unk_token": "unknown",
        "pad_token": "padding",
    }
    tokens, config = metadata["tokenizer.ggml.tokens"], {}
    for name, key in keys.items():
        if (i := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            if not 0 <= i < len(tokens):
                raise CheckpointError(
                    f"{path}: tokenizer.ggml.{key}_token_id is {i}, of {len(tokens)} tokens"
                )
            config[name] = tokens[i]
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config
