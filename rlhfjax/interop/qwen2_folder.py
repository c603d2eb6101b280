"""Qwen2 folders for transformers 5, whose AutoTokenizer treats them specially.

Of a folder of that family it takes vocabulary and merges from tokenizer.json, and puts Qwen2's own
normalizer, pre-tokenizer and decoder in place of the file's, whatever class the folder names. Only
Qwen2's tokenizer has its ids then. A model with another tokenizer is written as a Llama, which has
an output bias in attention too: zeros.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from rlhfjax import json_text
from rlhfjax.data.hf_tokenizer import HuggingFaceTokenizer
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import hf_config, names
from rlhfjax.interop.store import SavedModel
from rlhfjax.models import Model

NOTE = (
    "written as a Llama with output biases of zero: AutoTokenizer would read the tokenizer of a "
    "Qwen2 folder with Qwen2's pre-tokenizer"
)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Keys of tokenizer.json that decide ids, besides vocabulary, merges and added tokens.
_PARTS = ("normalizer", "pre_tokenizer", "decoder")
_OPTIONS = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
    "ignore_merges",
)


def for_transformers(saved: SavedModel) -> SavedModel:
    """Returns the model to export: as a Llama where AutoTokenizer would give other ids.

    A model that no Llama is, because of a sliding window for example, stays a Qwen2.
    """
    if _family(saved.model) != "qwen2" or is_qwen2(saved.tokenizer):
        return saved
    config = dataclasses.replace(
        saved.model.config, qkv_bias=False, attention_bias=True
    )
    model = Model(config, saved.model.head)
    if _family(model) != "llama":
        return saved
    given = names.leaves(saved.params)
    leaves = {
        path: given.get(path, np.zeros(leaf.shape, leaf.dtype))
        for path, leaf in names.leaves(model.shapes()).items()
    }
    return SavedModel(model, names.nested(leaves), saved.tokenizer)


def is_qwen2(tokenizer: Tokenizer) -> bool:
    """Returns whether a tokenizer differs from Qwen2's in its vocabulary and tokens only."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return False
    expected = Backend(models.BPE())
    expected.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    expected.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    expected.decoder = decoders.ByteLevel()
    parsed = json_text.parse(expected.to_str())
    return _deciding(tokenizer.content()) == _deciding(parsed)


def _deciding(content: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name: _without_offsets(content[name]) for name in _PARTS}
    if content["decoder"]["type"] == "ByteLevel":  # without options that matter
        parts["decoder"] = "ByteLevel"
    options = {name: content["model"].get(name) or None for name in _OPTIONS}
    return {**parts, **options}


def _without_offsets(part: Any) -> Any:
    """Returns a part without the option that only moves the reported offsets."""
    if isinstance(part, Mapping):
        kept = {key: value for key, value in part.items() if key != "trim_offsets"}
        return {key: _without_offsets(value) for key, value in kept.items()}
    return list(map(_without_offsets, part)) if isinstance(part, list) else part


def _family(model: Model) -> str:
    """Returns the family of an export; "" if there is none."""
    ids = {"pad": 0, "eos": 1}
    try:
        return hf_config.write(model, "float32", ids)[0]
    except ConfigError:
        return ""
