"""A tokenizer as the metadata of a GGUF file, which `gguf_tokenizer` reads.

tokenizer        in the file  tokens are                    and merged by
---------------  -----------  ----------------------------  -------------------------------
byte-level BPE   "gpt2"       spelled in GPT-2's alphabet   merges; the pre-tokenizer's name
SentencePiece,   "llama"      spelled in characters,        the score of the merged token
BPE with bytes                U+2581 being a blank
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhfjax import json_text
from rlhfjax.data import sentencepiece_json
from rlhfjax.data.hf_tokenizer import HuggingFaceTokenizer
from rlhfjax.data.tokenizer import MARKERS, SentencePieceTokenizer, Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import gguf_pre

# Values of tokenizer.ggml.token_type, which are SentencePiece's.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # how a file with scores spells a blank
_KEY = "tokenizer.ggml."


def describe(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """Returns the metadata of a tokenizer.

    Args:
      size: the model's vocabulary; a file has a token for each of its ids.
    Raises:
      ConfigError: llama.cpp has no such tokenizer.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        described = _sentencepiece(tokenizer.model)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        described = _hugging_face(tokenizer)
    else:
        raise _refused(f"its class is {type(tokenizer).__name__}")
    tokens = described["tokens"]
    for i in range(len(tokens), size):
        tokens.append(f"[PAD{i}]")
        described["token_type"].append(UNUSED)
        if "scores" in described:
            described["scores"].append(0.0)
    for name, i in _special_ids(tokenizer, described["token_type"]).items():
        described[f"{name}_token_id"] = i
    described["add_eos_token"] = False
    metadata = {_KEY + name: value for name, value in described.items()}
    if template := tokenizer.template.source:
        metadata["tokenizer.chat_template"] = template
    return metadata


def _special_ids(tokenizer: Tokenizer, kinds: Sequence[int]) -> dict[str, int]:
    """Returns the ids of the special tokens by GGUF's names."""
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    if kinds[tokenizer.pad_id] != NORMAL:  # else a byte that no text contains
        ids["padding"] = tokenizer.pad_id
    if tokenizer.unk_id != tokenizer.pad_id:
        ids["unknown"] = tokenizer.unk_id
    return ids


def _refused(why: str) -> ConfigError:
    return ConfigError(f"llama.cpp cannot have the model's tokenizer: {why}")


def _sentencepiece(model: bytes) -> dict[str, Any]:
    if why := sentencepiece_json.obstacle(model):
        raise _refused(why)
    pieces = sentencepiece_json.parsed(model).pieces
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.piece for piece in pieces],
        "scores": [piece.score for piece in pieces],
        # A control token is found in a prompt, and never in the text of a message.
        "token_type": [
            CONTROL if piece.piece in MARKERS else piece.type for piece in pieces
        ],
        "add_bos_token": True,
        "add_space_prefix": False,
    }


def _hugging_face(tokenizer: HuggingFaceTokenizer) -> dict[str, Any]:
    data = tokenizer.content()
    model = data["model"]
    by_bytes = "ByteLevel" in json_text.encode(data["decoder"], "tokenizer")
    ids = model["vocab"] | {
        token["content"]: token["id"] for token in data["added_tokens"]
    }
    tokens = [f"[PAD{i}]" for i in range(1 + max(ids.values()))]
    kinds = [UNUSED] * len(tokens)
    for text, i in ids.items():
        tokens[i], kinds[i] = text, NORMAL
    for token in data["added_tokens"]:
        is_read = not token["special"] or token["id"] in tokenizer.template.written
        if is_read and (token["lstrip"] or token["rstrip"]):
            raise _refused(f"{token['content']!r} swallows the blanks beside it")
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    merges = [_pair(merge) for merge in model["merges"]]
    described = {
        "tokens": tokens,
        "token_type": kinds,
        "add_bos_token": bool(tokenizer.document_start),
    }
    if by_bytes:
        pre = gguf_pre.name_of(data)
        if pre is None:
            raise _refused("its pre-tokenizer is none of those that it has names for")
        if not merges:
            raise _refused("it has no merges")
        spelled = [" ".join(pair) for pair in merges]
        return described | {"model": "gpt2", "pre": pre, "merges": spelled}
    if model.get("unk_token") in ids:
        kinds[ids[model["unk_token"]]] = UNKNOWN
    for i in range(256):
        kinds[ids[sentencepiece_json.BYTE.format(i)]] = BYTE
    normal = [
        token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL
    ]
    scores = _scores(merges, normal)
    return described | {
        "model": "llama",
        "pre": "default",
        "tokens": [text.replace(" ", SPACE) for text in tokens],
        "scores": [scores.get(text, 0.0) for text in tokens],
        "add_space_prefix": _adds_blank(data),
    }


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Returns the two halves of a merge, which older files have as one text."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _scores(
    merges: Sequence[tuple[str, str]], tokens: Sequence[str]
) -> dict[str, float]:
    """Returns scores of tokens that give these merges; see `sentencepiece_json.merges`."""
    scores = dict.fromkeys(tokens, -float(len(merges)))
    for rank, (left, right) in reversed(list(enumerate(merges))):
        scores[left + right] = -float(rank)
    if set(sentencepiece_json.merges(scores)) != set(merges):
        raise _refused("its merges are not those of scores, as SentencePiece has them")
    return scores


def _adds_blank(data: Mapping[str, Any]) -> bool:
    """Returns whether a blank is put before each text between special tokens."""
    parts = json_text.encode(
        {name: data[name] for name in ("normalizer", "pre_tokenizer")}, "tokenizer"
    )
    if '"prepend_scheme": "first"' in parts:
        raise _refused("it puts a blank before the first text alone")
    return '"prepend_scheme": "always"' in parts or '"Prepend"' in parts
