"""Weights from a GGUF file, llama.cpp's format: `config, params = load_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")`.

The architecture "llama" alone, in every type that the `gguf` package dequantizes. What the file says and our
Transformer cannot do (a scaled RoPE, experts, biases) is an error, never left out. Tokenizer: gguf_tokenizer.py.
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

# What makes up the config: keys llama.*, each with its type.
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
# Other keys llama.* change nothing at these values; any other key or value is refused.
NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "tensor_data_layout": "Meta AI original pth",  # a name for the order of rows that `half_split` undoes
}

# Whose rows `half_split` puts back, and the number of their heads.
HALF_SPLIT = {"attn_q.weight": "n_heads", "attn_k.weight": "kv_heads"}


def describe_gguf(path: str | Path) -> TransformerConfig:
    """The shape of the model in a GGUF file. Raises CheckpointError and ConfigError as `load_gguf` does."""
    return _described(path, *open_gguf(path))


def load_gguf(path: str | Path) -> tuple[TransformerConfig, Params]:
    """The shape and the language model's parameters in a GGUF file: float32 arrays in the host's memory.

    Tensors are read and dequantized one at a time: beside the parameters, memory holds a few copies of one tensor and
    the file's metadata. Without `output.weight` the output is tied to the embedding, as in llama.cpp.

    Raises:
      CheckpointError: not a whole GGUF file of a model that our Transformer can be, or a tensor is missing, unexpected,
        of a wrong shape or of a type that cannot be dequantized; one line with the file and the key or tensor.
      ConfigError: the gguf package is not installed.
    """
    gguf = _package(path)
    reader, metadata = open_gguf(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _described(path, reader, metadata)
    _check(
        path,
        {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()},
        _shapes(config),
    )

    def read(name):
        tensor = tensors[name]
        try:  # a copy: float32 tensors come as views of the file
            return np.array(
                gguf.dequantize(tensor.data, tensor.tensor_type), np.float32
            )
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise CheckpointError(
                f"{path}: {tensor.name} is of type {kind}, which gguf cannot dequantize"
            ) from None

    shapes, rows = _rows(config)
    found = {}
    for row in rows:
        tensor = read(row.theirs)
        for ending, heads in HALF_SPLIT.items():
            if row.theirs.endswith(ending):
                tensor = half_split(tensor, getattr(config, heads))
        found[row.ours[0]] = np.ascontiguousarray(
            row.split(tensor, [shapes[row.ours[0]]])[0]
        )
    return config, names.nested(found)


def half_split(
    weight: Float[np.ndarray, "rows d"], heads: int
) -> Float[np.ndarray, "rows d"]:
    """A query or key matrix [out, in] with its rows put back from llama.cpp's order into ours.

    llama.cpp rotates neighbors, (x_0, x_1), (x_2, x_3), ...; we rotate halves, (x_i, x_{i + k/2}). So its converter
    (`LlamaModel.permute` in convert_hf_to_gguf.py) moves row i of half j of each head to 2 i + j, by
    w.reshape(heads, 2, k/2, d).swapaxes(1, 2); keys with the number of key heads. This is the way back.
    """
    rows, d = weight.shape
    return (
        weight.reshape(heads, rows // heads // 2, 2, d).swapaxes(1, 2).reshape(rows, d)
    )


def _rows(c: TransformerConfig) -> tuple[dict[str, names.Shape], list[names.Row]]:
    """The shapes of our arrays by path, and which tensor holds each."""
    shapes = names.shapes_of(Model(c))
    return shapes, names.rows(names.GGUF, "lm", shapes)


def _shapes(c: TransformerConfig) -> dict[str, names.Shape]:
    """Every tensor of such a model, [out, in]."""
    shapes, rows = _rows(c)
    return {row.theirs: row.shape([shapes[path] for path in row.ours]) for row in rows}


def _check(path, found, expected):
    """Exactly the expected tensors, each in its shape; before any of them is read."""
    for name in expected:
        if name not in found:
            raise CheckpointError(f"{path}: there is no tensor {name}")
    for name, shape in found.items():
        if name not in expected:
            why = (
                ": it scales the frequencies of RoPE"
                if name == "rope_freqs.weight"
                else ""
            )
            raise CheckpointError(
                f"{path}: our Transformer has no place for the tensor {name}{why}"
            )
        if shape != expected[name]:
            raise CheckpointError(
                f"{path}: {name} is {list(shape)}, and by the metadata {list(expected[name])}"
            )


def _config(
    path: str | Path, metadata: dict[str, Any], tied: bool
) -> TransformerConfig:
    """The config that the metadata describe; refuses what they say beyond it.

    Only llama.* bears on the model: general.* and the rest tell where a file came from, tokenizer.* is the tokenizer's.
    """
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise CheckpointError(
            f"{path}: general.architecture is {architecture!r}: accepted is 'llama'"
        )
    if (kind := metadata.get("general.type", "model")) != "model":
        raise CheckpointError(f"{path}: general.type is {kind!r}: accepted is 'model'")
    if (parts := metadata.get("split.count", 1)) > 1:
        raise CheckpointError(
            f"{path}: split.count is {parts}: merge the parts first (llama-gguf-split --merge)"
        )
    for key, value in metadata.items():
        name = key.removeprefix("llama.")
        if (
            key != name
            and name not in KEYS
            and (name not in NEUTRAL or value != NEUTRAL[name])
        ):
            raise CheckpointError(
                f"{path}: our Transformer cannot do what {key} = {value!r} says"
            )

    def value(name, default=None):
        found = metadata.get(f"llama.{name}", default)
        if found is None:
            raise CheckpointError(f"{path}: there is no llama.{name}")
        if type(found) is not KEYS[name]:  # lists of one number a layer, for one
            raise CheckpointError(
                f"{path}: llama.{name} is {found!r}: expected one {KEYS[name].__name__}"
            )
        # Stored as float32: the decimal that was meant, 1e-05 and not 9.999999747378752e-06.
        return float(str(np.float32(found))) if KEYS[name] is float else found

    d_model, n_heads = value("embedding_length"), value("attention.head_count")
    head_dim = value("attention.key_length", d_model // max(n_heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        if value(name, head_dim) != head_dim:
            raise CheckpointError(
                f"{path}: llama.{name} is {value(name)}, and the width of a head is {head_dim}"
            )
    try:
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
            "tie_embeddings": tied,
        }
        return build(TransformerConfig, fields, "model")
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _described(
    path: str | Path, reader: Any, metadata: dict[str, Any]
) -> TransformerConfig:
    return _config(
        path,
        metadata,
        tied=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )


def open_gguf(
    path: str | Path, *, tokenizer: bool = False
) -> tuple[Any, dict[str, Any]]:
    """The reader of a file and its metadata; of the tokenizer's keys the length alone, or with `tokenizer` these whole.

    Raises:
      CheckpointError: not a whole GGUF file in this machine's byte order.
      ConfigError: the gguf package is not installed.
    """
    gguf = _package(path)
    try:
        reader = gguf.GGUFReader(paths.local(paths.path(path)))
        metadata = {
            key: field.contents()
            if tokenizer or not key.startswith("tokenizer.")
            else len(field.data)
            for key, field in reader.fields.items()
        }
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except (
        OSError,
        ValueError,
        LookupError,
        OverflowError,
    ) as error:  # the reader has no errors of its own
        raise CheckpointError(
            f"{path}: not a whole GGUF file: {first_line(error)}"
        ) from None
    if reader.byte_order != "I":
        raise CheckpointError(
            f"{path}: its bytes are in the other order than this machine's"
        )
    return reader, metadata


def _package(path):
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            f"{path}: the gguf package is not installed; pip install 'rlhfjax[gguf]'"
        ) from None
    return gguf
