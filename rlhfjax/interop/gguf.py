"""Weights from a GGUF file, the format of llama.cpp.

    config, params = load_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")

Reads the architecture "llama", in every tensor type that the `gguf` package dequantizes. Metadata
that our Transformer cannot express (a scaled RoPE, experts, biases) is an error.
`gguf_tokenizer` reads the tokenizer.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from rlhfjax.errors import CheckpointError
from rlhfjax.interop import names
from rlhfjax.interop.gguf_file import Tensor, open_gguf, package
from rlhfjax.interop.names import build_config
from rlhfjax.json_text import named, shown
from rlhfjax.models import Model, TransformerConfig
from rlhfjax.paths import Path

Params = dict[str, Any]

# The llama.* keys that describe the model, and their types.
KEYS = {
    "block_count": int,
    "context_length": int,
    "embedding_length": int,
    "feed_forward_length": int,
    "attention.head_count": int,
    "attention.head_count_kv": int,
    "attention.key_length": int,
    "attention.value_length": int,
    "attention.layer_norm_rms_epsilon": float,
    "rope.dimension_count": int,
    "rope.freq_base": float,
    "vocab_size": int,
}
# Fields of TransformerConfig and their keys, for errors.
FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "d_ff": "feed_forward_length",
    "max_length": "context_length",
    "n_kv_heads": "attention.head_count_kv",
    "d_head": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}
# llama.* keys that are accepted with these values, which change nothing. Others are errors.
NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    # This names the order of rows that `half_split` undoes.
    "tensor_data_layout": "Meta AI original pth",
}
# Tensors whose rows `half_split` reorders, and the field with their number of heads.
HALF_SPLIT = {"attn_q.weight": "n_heads", "attn_k.weight": "kv_heads"}


def describe_gguf(path: str | Path) -> TransformerConfig:
    """Returns the config of the model in a GGUF file. Raises the errors of `load_gguf`."""
    metadata, tensors = open_gguf(path)
    return _config(path, metadata, tensors)


def load_gguf(path: str | Path) -> tuple[TransformerConfig, Params]:
    """Returns the config and the parameters in a GGUF file, as float32 arrays on the host.

    Tensors are read and dequantized one at a time: besides the parameters, the host holds a few
    copies of one tensor and the file's metadata. A file without `output.weight` has a tied output.

    Raises:
      CheckpointError: the file is not a whole GGUF file of a model that our Transformer can
        express, or a tensor is missing, unexpected, of a wrong shape or of a type that cannot be
        dequantized. The message names the file and the key or tensor.
      ConfigError: the gguf package is not installed.
    """
    gguf = package(path)
    metadata, tensors = open_gguf(path)
    config = _config(path, metadata, tensors)
    names.validate_depth(names.GGUF, "", config.n_layers, tensors, context=path)
    shapes = names.shapes_of(Model(config))
    rows = names.rows(names.GGUF, "lm", shapes)
    if "rope_freqs.weight" in tensors:
        raise CheckpointError(
            f"{path}: our Transformer has no place for the tensor rope_freqs.weight: "
            "it scales the frequencies of RoPE"
        )
    names.validate_tensors(
        names.tensor_shapes(rows, shapes),
        {name: tensor.shape for name, tensor in tensors.items()},
        files=dict.fromkeys(tensors, path),
        context=path,
        source="the metadata",
    )

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            dequantized = gguf.dequantize(tensor.data, tensor.kind)
        except NotImplementedError:
            kind = tensor.kind.name
            raise CheckpointError(
                f"{path}: {name} is of type {kind}, which gguf cannot dequantize"
            ) from None
        # A copy, because float32 tensors are views of the file.
        weight = np.array(dequantized, np.float32)
        for ending, heads in HALF_SPLIT.items():
            if name.endswith(ending):
                return half_split(weight, getattr(config, heads))
        return weight

    return config, names.nested(names.read_params(rows, shapes, read, names.on_host))


def half_split(
    weight: Float[np.ndarray, "rows d"], heads: int
) -> Float[np.ndarray, "rows d"]:
    """Returns a query or key matrix [out, in] with its rows moved from llama.cpp's order to ours.

    llama.cpp rotates neighbors, (x_0, x_1), (x_2, x_3), ...; we rotate halves, (x_i, x_{i + k/2}).
    Its converter (`LlamaModel.permute` in convert_hf_to_gguf.py) moves row i of half j of each head
    to 2 i + j by w.reshape(heads, 2, k/2, d).swapaxes(1, 2), with the number of key heads for keys.
    This function is the inverse.
    """
    rows, d = weight.shape
    return (
        weight.reshape(heads, rows // heads // 2, 2, d).swapaxes(1, 2).reshape(rows, d)
    )


def _config(
    path: str | Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> TransformerConfig:
    """Returns the config that the metadata describe. Raises CheckpointError for anything else.

    Only llama.* describes the model: general.* is about the file, tokenizer.* about the tokenizer.
    """
    _validate_metadata(path, metadata)

    def value(name, default=None):
        found = metadata.get(f"llama.{name}", default)
        if found is None:
            raise CheckpointError(f"{path}: there is no llama.{name}")
        kind = KEYS[name]
        if type(found) is not kind:  # for example a list with one number per layer
            raise CheckpointError(
                f"{path}: llama.{name} is {shown(found)}: expected one {kind.__name__}"
            )
        # Read the float32 as the decimal that was meant: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(found))) if kind is float else found

    d_model = value("embedding_length")
    n_heads = value("attention.head_count")
    head_dim = value("attention.key_length", d_model // max(n_heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        width = value(name, head_dim)
        if width != head_dim:
            raise CheckpointError(
                f"{path}: llama.{name} is {width}, and the width of a head is {head_dim}"
            )
    fields = {
        "vocab_size": value("vocab_size", _vocabulary_size(metadata)),
        "d_model": d_model,
        "n_layers": value("block_count"),
        "n_heads": n_heads,
        "d_ff": value("feed_forward_length"),
        "max_length": value("context_length"),
        "n_kv_heads": value("attention.head_count_kv", n_heads),
        "d_head": None if head_dim * n_heads == d_model else head_dim,
        "rope_theta": value("rope.freq_base", 10000.0),
        "norm_eps": value("attention.layer_norm_rms_epsilon"),
        "tie_embeddings": "output.weight" not in tensors,
    }
    spelled = {field: f"llama.{key}" for field, key in FIELDS.items()}
    return build_config(fields, spelled, path)


def _vocabulary_size(metadata: Mapping[str, Any]) -> int | None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else None


def _validate_metadata(path: str | Path, metadata: Mapping[str, Any]) -> None:
    """Raises CheckpointError if the file holds something else than a Llama, whole."""
    # The parts after the first say nothing but this.
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise CheckpointError(
            f"{path}: split.count is {shown(parts)}: "
            "merge the parts first (llama-gguf-split --merge FIRST-PART MERGED)"
        )
    accepted = {"general.architecture": "llama", "general.type": "model"}
    # Old files have no type.
    given = {"general.architecture": None, "general.type": "model", **metadata}
    for key, value in accepted.items():
        if given[key] != value:
            raise CheckpointError(
                f"{path}: {key} is {shown(given[key])}: accepted is {value!r}"
            )
    for key, value in metadata.items():
        name = key.removeprefix("llama.")
        if key == name or name in KEYS:
            continue
        if name not in NEUTRAL or value != NEUTRAL[name]:
            raise CheckpointError(
                f"{path}: our Transformer cannot do what {named(key)} = {shown(value)} says"
            )
