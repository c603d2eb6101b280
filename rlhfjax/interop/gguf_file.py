"""Reads GGUF files: the metadata, and the tensors as they are stored.

    metadata, tensors = open_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")

The `gguf` package knows the types of tensors and dequantizes them. Its own reader of files believes
every count: 40 bytes that promise 2^63 strings keep it busy until memory is full. This one compares
each count and length with the file before it reads on.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from rlhfjax import paths
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.json_text import named, shown
from rlhfjax.paths import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Limits. The largest published vocabularies have 262,144 tokens, in three arrays of this length.
MOST_BYTES = 2**25
"""Bytes before the first tensor."""
MOST_ELEMENTS = 3 * 2**19
"""Elements of all arrays."""
MOST_NAMES = 2**16
"""Keys, and tensors."""
LONGEST_NAME = 128  # of a tensor; llama.cpp accepts 63
MOST_DIMS = 4  # GGML_MAX_DIMS

# Types of values, as `struct` has them.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
# Bytes of the smallest key with its value, and of the smallest description of a tensor.
_SMALLEST_KEY, _SMALLEST_TENSOR = 13, 24
_LENGTH = struct.Struct("<Q")


class _Info(NamedTuple):
    """What a file says of a tensor."""

    dims: tuple[int, ...]  # the fastest axis first
    code: int  # number of its type
    offset: int  # from the end of all that describes tensors, bytes


class Tensor(NamedTuple):
    """A tensor of a file. Nothing of it is read yet."""

    kind: Any
    """Its `gguf.GGMLQuantizationType`."""
    shape: tuple[int, ...]
    """Its shape in numpy's order; a file lists the fastest axis first."""
    data: np.ndarray
    """View of the file, uint8 [..., bytes per row]."""


def open_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the metadata and the tensors of a file. An array of strings is a list of bytes.

    Raises:
      CheckpointError: the file is not a whole GGUF file in this machine's byte order, or its
        metadata are beyond the limits above. Names the file and the key or tensor.
      ConfigError: the gguf package is not installed.
    """
    gguf = package(path)
    data = _mapped(path)
    cursor = _Cursor(data, path)
    n_tensors, n_keys = _counts(cursor)
    metadata = _metadata(cursor, n_keys)
    infos = {}
    for _ in range(n_tensors):
        name, info = _tensor_info(cursor)
        if name in infos:
            raise CheckpointError(f"{path}: the tensor {name} is there twice")
        infos[name] = info
    alignment = _alignment(path, metadata)
    start = -(-cursor.at // alignment) * alignment
    tensors = {
        name: _located(path, name, info, data[start + info.offset :], gguf)
        for name, info in infos.items()
    }
    _validate_places(path, infos, tensors, alignment)
    return metadata, tensors


def package(path: str | Path) -> Any:
    """Returns the gguf module. Raises ConfigError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            f"{path}: the gguf package is not installed; pip install 'rlhfjax[gguf]'"
        ) from None
    return gguf


def _mapped(path: str | Path) -> np.ndarray:
    """Returns the bytes of a file, which are read when they are used."""
    try:
        file = paths.local(paths.path(path))
        paths.validate_regular(file, CheckpointError)
        if not file.stat().st_size:
            raise CheckpointError(f"{path}: not a whole GGUF file: it is empty")
        return np.asarray(np.memmap(file, np.uint8, "r"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # a name with NUL
        raise CheckpointError(f"{shown(str(path))}: {error}") from None


class _Cursor:
    """A place in the part of a file that describes the tensors."""

    def __init__(self, data: np.ndarray, path: str | Path):
        self.path = path
        self.at = 0
        self.elements = 0  # of the arrays so far
        self._size = len(data)
        self._head = data[:MOST_BYTES].tobytes()

    @property
    def left(self) -> int:
        return len(self._head) - self.at

    def whole(self, size: int, what: str) -> None:
        """Raises CheckpointError if the file ends within the next bytes."""
        if size <= self.left:
            return
        if self.at + size > self._size:
            raise self.cut(f"{what} needs {size} bytes at byte {self.at}")
        raise CheckpointError(
            f"{self.path}: {what}: the metadata have more than {MOST_BYTES} bytes"
        )

    def cut(self, why: str) -> CheckpointError:
        """Returns the error for a file that promises more than it holds."""
        return CheckpointError(
            f"{self.path}: not a whole GGUF file: {why}, and the file has {self._size}"
        )

    def take(self, layout: str, what: str) -> tuple[Any, ...]:
        """Returns the next numbers, described as `struct` does."""
        layout = f"<{layout}"
        self.whole(struct.calcsize(layout), what)
        numbers = struct.unpack_from(layout, self._head, self.at)
        self.at += struct.calcsize(layout)
        return numbers

    def content(self, size: int, what: str) -> bytes:
        self.whole(size, what)
        self.at += size
        return self._head[self.at - size : self.at]

    def text(self, what: str) -> str:
        (size,) = self.take("Q", what)
        content = self.content(size, what)
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise CheckpointError(
                f"{self.path}: {what} is not UTF-8: {shown(content)}"
            ) from None

    def strings(self, count: int, what: str) -> list[bytes]:
        """Returns the next strings. There are 100,000s of them, so it calls little."""
        result = []
        head, at = self._head, self.at
        for _ in range(count):
            self.at = at
            if at + _LENGTH.size > len(head):
                self.whole(_LENGTH.size, what)
            (size,) = _LENGTH.unpack_from(head, at)
            start = at + _LENGTH.size
            at = start + size
            if at > len(head):
                self.whole(_LENGTH.size + size, what)
            result.append(head[start:at])
        self.at = at
        return result


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """Returns the numbers of tensors and of keys that the first bytes promise."""
    magic = cursor.content(4, "the magic number")
    if magic != MAGIC:
        raise CheckpointError(
            f"{cursor.path}: not a whole GGUF file: it starts with {magic!r}, not {MAGIC!r}"
        )
    (version,) = cursor.take("I", "the version")
    if version and version % 2**16 == 0:
        raise CheckpointError(
            f"{cursor.path}: its bytes are in the other order than this machine's"
        )
    if version not in VERSIONS:
        raise CheckpointError(
            f"{cursor.path}: version {version} of GGUF: accepted are 2 and 3"
        )
    n_tensors, n_keys = cursor.take("QQ", "the numbers of tensors and keys")
    smallest = n_tensors * _SMALLEST_TENSOR + n_keys * _SMALLEST_KEY
    cursor.whole(smallest, f"the list of {n_tensors} tensors and {n_keys} keys")
    for count, what in ((n_tensors, "tensors"), (n_keys, "keys")):
        if count > MOST_NAMES:
            raise CheckpointError(
                f"{cursor.path}: {count} {what}: accepted are {MOST_NAMES}"
            )
    return n_tensors, n_keys


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata = {}
    for i in range(count):
        key = cursor.text(f"key {i}")
        if key in metadata:
            raise CheckpointError(f"{cursor.path}: {named(key)} is there twice")
        (kind,) = cursor.take("I", named(key))
        metadata[key] = _value(cursor, kind, key)
    return metadata


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    """Returns the next value, of a type."""
    key = named(key)
    if kind == _STRING:
        return cursor.text(key)
    if kind == _ARRAY:
        return _array(cursor, key)
    if kind not in _SCALARS:
        raise CheckpointError(f"{cursor.path}: {key} is of the unknown type {kind}")
    return cursor.take(_SCALARS[kind], key)[0]


def _array(cursor: _Cursor, key: str) -> list[Any]:
    kind, count = cursor.take("IQ", key)
    if kind != _STRING and kind not in _SCALARS:
        what = "arrays" if kind == _ARRAY else f"the unknown type {kind}"
        raise CheckpointError(f"{cursor.path}: {key} is an array of {what}")
    layout = _SCALARS.get(kind, "Q")  # a string has at least its length
    cursor.whole(count * struct.calcsize(layout), f"{key}, {count} elements,")
    cursor.elements += count
    if cursor.elements > MOST_ELEMENTS:
        raise CheckpointError(
            f"{cursor.path}: {key}: all arrays together have more than {MOST_ELEMENTS} elements"
        )
    if kind == _STRING:
        return cursor.strings(count, key)
    return list(cursor.take(f"{count}{layout}", key))


def _tensor_info(cursor: _Cursor) -> tuple[str, _Info]:
    """Returns a tensor's name and what the file says of it."""
    name = cursor.text("a tensor's name")
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise CheckpointError(
            f"{cursor.path}: a tensor is called {shown(name)}: "
            f"accepted are {LONGEST_NAME} printable characters"
        )
    what = f"the tensor {name}"
    (n_dims,) = cursor.take("I", what)
    if n_dims > MOST_DIMS:
        raise CheckpointError(
            f"{cursor.path}: {what} has {n_dims} axes: accepted are {MOST_DIMS}"
        )
    dims = cursor.take(f"{n_dims}Q", what)
    if 0 in dims:
        raise CheckpointError(f"{cursor.path}: {what} has an axis of length 0")
    code, offset = cursor.take("IQ", what)
    return name, _Info(dims, code, offset)


def _alignment(path: str | Path, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or value not in (2**i for i in range(3, 21)):
        raise CheckpointError(
            f"{path}: general.alignment is {shown(value)}: accepted are powers of 2 from 8"
        )
    return value


def _located(
    path: str | Path, name: str, info: _Info, data: np.ndarray, gguf: Any
) -> Tensor:
    """Returns a tensor.

    Args:
      data: the file's bytes from the tensor's first one on.
    """
    try:
        kind = gguf.GGMLQuantizationType(info.code)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, LookupError):
        raise CheckpointError(
            f"{path}: {name} is of the unknown type {info.code}"
        ) from None
    row, *others = info.dims or (1,)
    if row % block:
        raise CheckpointError(
            f"{path}: {name} has rows of {row}: {kind.name} has blocks of {block}"
        )
    stored = (*reversed(others), row // block * block_bytes)
    size = math.prod(stored)
    if size > len(data):
        raise CheckpointError(
            f"{path}: not a whole GGUF file: {name} needs {size} bytes, and {len(data)} are left"
        )
    return Tensor(kind, info.dims[::-1], data[:size].reshape(stored))


def _validate_places(
    path: str | Path,
    infos: Mapping[str, _Info],
    tensors: Mapping[str, Tensor],
    alignment: int,
) -> None:
    """Raises CheckpointError if a tensor is not aligned, or starts within another."""
    end, before = 0, ""
    for name, info in sorted(infos.items(), key=lambda item: item[1].offset):
        if info.offset % alignment:
            raise CheckpointError(
                f"{path}: {name} starts at {info.offset}: must be a multiple of {alignment}"
            )
        if info.offset < end:
            raise CheckpointError(f"{path}: {name} overlaps {before}")
        end = info.offset + tensors[name].data.size
        before = name
