"""Models from and to GGUF files, the format of llama.cpp.

    config, params = load_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
    save_gguf("policy.gguf", model, params, tokenizer)

Reads every tensor type that the `gguf` package dequantizes. `gguf_families` lists the
architectures; metadata that our Transformer cannot express (shared experts, other scalings of RoPE)
are an error. `gguf_tokenizer` reads the tokenizer, and `gguf_vocabulary` describes it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from rlhfjax import paths
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop import gguf_config, gguf_vocabulary, hf, names
from rlhfjax.interop.gguf_families import ARCHITECTURES, ROPE_FACTORS, Architecture
from rlhfjax.interop.gguf_file import Tensor, open_gguf, package
from rlhfjax.interop.gguf_write import DTYPES, Source, write_gguf
from rlhfjax.models import Model, TransformerConfig
from rlhfjax.paths import Path

Params = dict[str, Any]
_Change = Callable[[np.ndarray], np.ndarray]
_ROTATED = ("attention/query", "attention/key")


def describe_gguf(path: str | Path) -> TransformerConfig:
    """Returns the config of the model in a GGUF file. Raises the errors of `load_gguf`."""
    return _described(path, *open_gguf(path))[1]


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
    metadata, tensors = open_gguf(path)
    architecture, config = _described(path, metadata, tensors)
    table = architecture.table
    names.validate_depth(table, "", config.n_layers, tensors, context=path)
    shapes = names.shapes_of(Model(config))
    rows = names.rows(table, "lm", shapes)
    names.validate_tensors(
        names.tensor_shapes(rows, shapes),
        {name: x.shape for name, x in tensors.items() if name != ROPE_FACTORS},
        files=dict.fromkeys(tensors, path),
        context=path,
        source="the metadata",
    )

    def read(name: str) -> np.ndarray:
        return _dequantized(path, name, tensors[name])

    def put(name: str, array: np.ndarray) -> np.ndarray:
        change = _changes(architecture, config, name)[0]
        return names.on_host(name, change(array))

    return config, names.nested(names.read_params(rows, shapes, read, put))


def save_gguf(
    path: str | Path,
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    dtype: str = "float16",
) -> None:
    """Writes a model with its tokenizer and chat template as a file for llama.cpp.

    The host holds one tensor at a time.

    Args:
      params: on this process's devices or in its memory, layers stacked or not.
      dtype: one of DTYPES; see `write_gguf`.
    Raises:
      ConfigError: llama.cpp cannot express the model or the tokenizer, or the gguf package is not
        installed.
      CheckpointError: the file exists or cannot be written, the parameters are not the model's, or
        a number is not finite in `dtype`.
    """
    path = paths.path(path)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}: accepted are {', '.join(DTYPES)}")
    if model.head != "lm":
        raise ConfigError(f"{path}: a GGUF file holds a language model, not a reward")
    if path.exists():
        raise CheckpointError(f"{path} exists already: choose another, or remove it")
    architecture, metadata, rope_factors = gguf_config.describe(model.config)
    metadata |= gguf_vocabulary.describe(tokenizer, model.config.vocab_size)
    hf.validate_params(names.leaves(params), names.shapes_of(model))
    tensors = _sources(ARCHITECTURES[architecture], model, params)
    if rope_factors is not None:
        tensors[ROPE_FACTORS] = rope_factors.shape, lambda: rope_factors
    write_gguf(path, metadata, tensors, dtype)


def half_split(x: Float[np.ndarray, "*b k"]) -> Float[np.ndarray, "*b k"]:
    """Returns queries or keys of heads of k with their last axis in our order, not llama.cpp's.

    Where llama.cpp rotates neighbors, (x_0, x_1), (x_2, x_3), ..., we rotate halves,
    (x_i, x_{i + k/2}). Its converter (`LlamaModel.permute` in convert_hf_to_gguf.py) moves number i
    of half j of each head to 2 i + j. This function is the inverse.
    """
    return x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)


def neighbors(x: Float[np.ndarray, "*b k"]) -> Float[np.ndarray, "*b k"]:
    """Returns queries or keys with their last axis in llama.cpp's order; see `half_split`."""
    return x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)


def _described(
    path: str | Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Architecture, TransformerConfig]:
    """Returns the architecture and the config of a file."""
    factors = None
    if ROPE_FACTORS in tensors:
        factors = _dequantized(path, ROPE_FACTORS, tensors[ROPE_FACTORS]).ravel()
    return gguf_config.read(path, metadata, tensors, factors)


def _dequantized(path: str | Path, name: str, tensor: Tensor) -> np.ndarray:
    """Returns a tensor as float32, a copy: float32 tensors are views of the file."""
    try:
        dequantized = package(path).dequantize(tensor.data, tensor.kind)
    except NotImplementedError:
        raise CheckpointError(
            f"{path}: {name} is of type {tensor.kind.name}, which gguf cannot dequantize"
        ) from None
    return np.array(dequantized, np.float32)


def _changes(
    architecture: Architecture, config: TransformerConfig, name: str
) -> tuple[_Change, _Change]:
    """Returns what makes our parameter of a file's, and the inverse."""
    module, _, leaf = name.rpartition("/")
    if architecture.neighbors and module.endswith(_ROTATED):
        return half_split, neighbors
    if config.norm_plus_one and leaf == "scale":  # a file has 1 + scale
        return (lambda x: x - 1), (lambda x: x + 1)
    return (lambda x: x), (lambda x: x)


def _sources(
    architecture: Architecture, model: Model, params: Params
) -> dict[str, Source]:
    """Returns the tensors of a file by name."""
    shapes, read = hf.unstacked_reader(model.config.scan_layers, params)

    def changed(name: str) -> np.ndarray:
        return _changes(architecture, model.config, name)[1](read(name))

    def joined(row: names.Row) -> np.ndarray:
        return row.join([changed(name) for name in row.params])

    rows = names.rows(architecture.table, "lm", shapes)
    tensor_shapes = names.tensor_shapes(rows, shapes)
    return {
        row.name: (tensor_shapes[row.name], functools.partial(joined, row))
        for row in rows
    }
