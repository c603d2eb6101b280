"""The pre-tokenizers that GGUF files name: how byte-level BPE cuts a text into words.

A file names its pre-tokenizer and does not describe it. Those here are of the models' own
tokenizer.json; llama.cpp's agree with them, except that Qwen2's normalizes text to NFC first, which
llama.cpp does not.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from rlhfjax import json_text


class Pre(NamedTuple):
    """A pre-tokenizer, and what belongs to it."""

    pattern: str = ""
    """Regular expression of a word; "": GPT-2's, which the library has (Radford et al. 2019)."""
    digits: bool = False
    """Each digit is a separate word; the pattern is applied afterwards."""
    ignore_merges: bool = False
    """A word that is a token is kept, whatever the merges would make of it."""
    nfc: bool = False
    """A text is normalized first."""
    adds_bos: bool = False
    """Value of an absent tokenizer.ggml.add_bos_token."""


# The pattern of Llama 3, Qwen2 and others, with the numbers between the two halves.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_UP_TO_3_DIGITS = r"\p{N}{1,3}".join(_WORDS)
_LLAMA3 = Pre(_UP_TO_3_DIGITS, ignore_merges=True, adds_bos=True)
# OpenAI's o200k, in which case matters; Mistral's has no contractions and single digits.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%(contraction)s|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%(contraction)s|"
    r"%(numbers)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = _CASED % {
    "contraction": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    "numbers": r"\p{N}{1,3}",
}
_TEKKEN = _CASED % {"contraction": "", "numbers": r"\p{N}"}
# Of two equal ones, an export writes the first.
PRE = {
    "gpt-2": Pre(),
    "smollm": Pre(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": Pre(r"\p{N}".join(_WORDS), nfc=True),
    "dbrx": Pre(_UP_TO_3_DIGITS),  # OLMo 2, Phi-4
    "smaug-bpe": Pre(_UP_TO_3_DIGITS),  # SmolLM3
    "gpt-4o": Pre(_O200K),  # Phi-4-mini
    "tekken": Pre(_TEKKEN, ignore_merges=True),  # Mistral NeMo
}


def apply(backend: Tokenizer, pre: Pre) -> None:
    """Gives a tokenizer its pre-tokenizer and its normalizer."""
    backend.pre_tokenizer = _pre_tokenizer(pre)
    if pre.nfc:
        backend.normalizer = normalizers.NFC()


def name_of(data: Mapping[str, Any]) -> str | None:
    """Returns the name of a tokenizer.json's pre-tokenizer; None if it has none.

    NFC normalization alone gets no separate name, since llama.cpp does not normalize.
    """
    for name, pre in PRE.items():
        backend = Tokenizer(models.BPE(ignore_merges=pre.ignore_merges))
        apply(backend, pre)
        if _cuts(json_text.parse(backend.to_str())) == _cuts(data):
            return name
    return None


def _cuts(data: Mapping[str, Any]) -> tuple[str, bool]:
    """Returns what decides on the words of a text."""
    parts = [_words(data["pre_tokenizer"]), data["normalizer"]]
    text = json_text.encode(parts, "tokenizer")
    return text, bool(data["model"].get("ignore_merges"))


def _words(part: Any) -> Any:
    """Returns a pre-tokenizer, spelled in one way, without what decides on offsets alone."""
    if isinstance(part, list):
        return [_words(element) for element in part]
    if not isinstance(part, dict):
        return part
    same = {"trim_offsets": True}
    if part.get("behavior") == "Removed" and part.get("invert"):
        # The patterns match every character: what is between matches is empty.
        same |= {"behavior": "Isolated", "invert": False}
    return {key: same.get(key, _words(part[key])) for key in sorted(part)}


def _pre_tokenizer(pre: Pre) -> pre_tokenizers.PreTokenizer:
    if pre.pattern:
        split = pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated")
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, in_bytes])
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre.digits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, words])
    return words
