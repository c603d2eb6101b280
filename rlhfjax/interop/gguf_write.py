"""Writes GGUF files: metadata, and tensors that are encoded one at a time.

The `gguf` package lays out the file and encodes the numbers.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rlhfjax import paths
from rlhfjax.errors import CheckpointError
from rlhfjax.interop.gguf_file import package
from rlhfjax.interop.names import Shape
from rlhfjax.paths import Path

# Our dtypes, what gguf calls them, and the number of a file of mostly such tensors.
DTYPES = {
    "float32": ("F32", 0),
    "float16": ("F16", 1),
    "bfloat16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
}
Source = tuple[Shape, Callable[[], np.ndarray]]
"""The shape of a tensor, in numpy's order, and what reads it."""


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Source],
    dtype: str,
) -> None:
    """Writes a file, completely or not at all.

    Vectors are float32 whatever `dtype` is, as llama.cpp's converter has them. With q8_0, a matrix
    whose rows are no multiple of 32 is float16.

    Args:
      metadata: values by key; the type of an int is uint32, that of a float is float32.
      dtype: one of DTYPES.
    Raises:
      CheckpointError: a number is not finite in its type, or the file cannot be written.
      ConfigError: the gguf package is not installed.
    """
    gguf = package(path)
    described = {**metadata, "general.file_type": DTYPES[dtype][1]}
    described["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    kinds = {name: _kind(gguf, dtype, shape) for name, (shape, _) in tensors.items()}
    try:
        paths.make_folder(path.parent)
        with paths.replacing_file(path) as temporary:
            writer = gguf.GGUFWriter(temporary, described["general.architecture"])
            try:
                _add_metadata(gguf, writer, described)
                for name, (shape, _) in tensors.items():
                    size = _size(gguf, shape, kinds[name])
                    float32 = np.dtype(np.float32)
                    writer.add_tensor_info(name, shape, float32, size, kinds[name])
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for name, (_, read) in tensors.items():
                    encoded = _encoded(gguf, path, name, read(), kinds[name])
                    writer.write_tensor_data(encoded)
            finally:
                writer.close()
    except OSError as error:
        why = error.strerror or error
        raise CheckpointError(f"{path} could not be written: {why}") from error


def _add_metadata(gguf: Any, writer: Any, metadata: Mapping[str, Any]) -> None:
    kinds = {
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
        str: gguf.GGUFValueType.STRING,
        list: gguf.GGUFValueType.ARRAY,
    }
    for key, value in metadata.items():
        if key != "general.architecture":  # the writer adds it
            writer.add_key_value(key, value, kinds[type(value)])


def _kind(gguf: Any, dtype: str, shape: Shape) -> Any:
    """Returns the type of a tensor."""
    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    kind = gguf.GGMLQuantizationType[DTYPES[dtype][0]]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return gguf.GGMLQuantizationType.F16 if shape[-1] % block else kind


def _size(gguf: Any, shape: Shape, kind: Any) -> int:
    """Returns the number of bytes of a tensor."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * block_bytes


def _encoded(
    gguf: Any, path: Path, name: str, tensor: np.ndarray, kind: Any
) -> np.ndarray:
    """Returns the bytes of a tensor."""
    tensor = np.ascontiguousarray(tensor, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        encoded = gguf.quantize(tensor, kind)
    if not np.isfinite(gguf.dequantize(encoded.view(np.uint8), kind)).all():
        raise CheckpointError(
            f"{path}: {name}: not all numbers are finite in {kind.name}"
        )
    return encoded
