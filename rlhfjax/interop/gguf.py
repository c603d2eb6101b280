"""Weights from a GGUF file, the format of llama.cpp.

    config, params = load_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")

Reads the architecture "llama", in every tensor type that the `gguf` package dequantizes. Metadata
that our Transformer cannot express (a scaled RoPE, experts, biases) is an error.
`gguf_tokenizer` reads the tokenizer.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from rlhfjax import paths
from rlhfjax.config import build
from rlhfjax.errors import CheckpointError, ConfigError, first_line
from rlhfjax.interop import names
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
    reader, metadata = open_gguf(path)
    return _config(path, metadata, _tensors(reader))


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
    gguf = _package(path)
    reader, metadata = open_gguf(path)
    tensors = _tensors(reader)
    config = _config(path, metadata, tensors)
    shapes = names.shapes_of(Model(config))
    rows = names.rows(names.GGUF, "lm", shapes)
    if "rope_freqs.weight" in tensors:
        raise CheckpointError(
            f"{path}: our Transformer has no place for the tensor rope_freqs.weight: "
            "it scales the frequencies of RoPE"
        )
    names.validate_tensors(
        names.tensor_shapes(rows, shapes),
        {name: tuple(map(int, t.shape[::-1])) for name, t in tensors.items()},
        files=dict.fromkeys(tensors, path),
        context=path,
        source="the metadata",
    )

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            dequantized = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
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


def _tensors(reader: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in reader.tensors}


def _config(
    path: str | Path, metadata: dict[str, Any], tensors: dict[str, Any]
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
                f"{path}: llama.{name} is {found!r}: expected one {kind.__name__}"
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
        "vocab_size": value("vocab_size", metadata.get("tokenizer.ggml.tokens")),
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
    try:
        return build(TransformerConfig, fields, "model")
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _validate_metadata(path: str | Path, metadata: dict[str, Any]) -> None:
    """Raises CheckpointError if the file holds something else than a Llama, whole."""
    accepted = {"general.architecture": "llama", "general.type": "model"}
    # Old files have no type.
    given = {"general.architecture": None, "general.type": "model"} | metadata
    for key, value in accepted.items():
        if given[key] != value:
            raise CheckpointError(
                f"{path}: {key} is {given[key]!r}: accepted is {value!r}"
            )
    if (parts := metadata.get("split.count", 1)) > 1:
        raise CheckpointError(
            f"{path}: split.count is {parts}: merge the parts first (llama-gguf-split --merge)"
        )
    for key, value in metadata.items():
        name = key.removeprefix("llama.")
        if key == name or name in KEYS:
            continue
        if name not in NEUTRAL or value != NEUTRAL[name]:
            raise CheckpointError(
                f"{path}: our Transformer cannot do what {key} = {value!r} says"
            )


def open_gguf(
    path: str | Path, *, tokenizer: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Returns the reader of a file and its metadata.

    Args:
      tokenizer: read the tokenizer's values too; else metadata has only their lengths.
    Raises:
      CheckpointError: the file is not a whole GGUF file in this machine's byte order.
      ConfigError: the gguf package is not installed.
    """
    gguf = _package(path)
    try:
        reader = gguf.GGUFReader(paths.local(paths.path(path)))
        metadata = {}
        for key, field in reader.fields.items():
            whole = tokenizer or not key.startswith("tokenizer.")
            metadata[key] = field.contents() if whole else len(field.data)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    # The reader has no errors of its own.
    except (OSError, ValueError, LookupError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: not a whole GGUF file: {first_line(error)}"
        ) from None
    if reader.byte_order != "I":
        raise CheckpointError(
            f"{path}: its bytes are in the other order than this machine's"
        )
    return reader, metadata


def _package(path: str | Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            f"{path}: the gguf package is not installed; pip install 'rlhfjax[gguf]'"
        ) from None
    return gguf
