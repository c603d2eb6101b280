"""Models from and to Hugging Face directories: config.json and model.safetensors, in one file or in shards.

    model, params = load_hf("SmolLM2-135M", layout)
    save_hf("exported", model, params)                      # what `transformers` loads

GPT-2, GPT-1, Llama, Qwen2 and GPT-NeoX, language models and rewards; `hf_config` has their configs and `names` their
tensors. Reading leaves the tokenizer's files alone. Tensors are read one at a time, each straight into its shards.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhfjax import paths, state
from rlhfjax.config import write_json
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import CheckpointError, ConfigError, first_line
from rlhfjax.interop import hf_config, names
from rlhfjax.interop.names import Row, Shape
from rlhfjax.mesh import Layout
from rlhfjax.models import Model
from rlhfjax.paths import Path

Params = dict[str, Any]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
}  # ours, and safetensors' name of it
SHARD_BYTES = 5 * 10**9
COMPARED = 1024  # rows of two matrices that are looked at together


def load_hf(folder: str | Path, layout: Layout | None = None) -> tuple[Model, Params]:
    """The model in a Hugging Face directory, with float32 parameters (layers unstacked).

    Memory of the host holds about one tensor at a time beside the result: with a layout, arrays are born in their
    shards; without one they are numpy's. A reward model (`...ForSequenceClassification` with one label) becomes
    Model(config, "scalar"): its `score` is the head's kernel, the head's bias is 0 (or what `save_hf` dropped).

    Raises:
      CheckpointError: something that config.json says and our Transformer cannot do; a file that is missing or damaged;
        a tensor that is missing, unexpected, or of another shape or type; one line with the file and the key or tensor.
    """
    folder = paths.path(folder)
    family, model, constant = hf_config.read(folder / "config.json")
    shapes = names.shapes_of(model)
    files = _Files(folder)
    rows = _check(files, names.TABLES[family], model, shapes)
    put = _placing(model, layout)
    found = {}
    for row in rows:
        found |= _put_row(row, files, shapes, put)
    if model.head == "scalar":
        found["head/bias"] = put("head/bias", np.array(constant))
    return model, names.nested(found)


def save_hf(
    folder: str | Path,
    model: Model,
    params: Params,
    dtype: str = "float32",
    *,
    special_ids: Mapping[str, int | None] | None = None,
    tokenizer: Tokenizer | None = None,
    drop_bias: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a directory that `transformers` loads, of weights in `dtype`; the host holds one shard of it at a time.

    A scalar model is written as `...ForSequenceClassification` with one label, whose `score` has no bias. With a final
    LayerNorm ours goes into that one's: score . (y + b score / |score|^2) = score . y + b. RMSNorm has none, and there
    a constant is an error unless `drop_bias`: then scores are lower by it (their differences stay), and config.json
    keeps it for `load_hf`. `transformers` scores the last token that is not the padding's: so the pad id is needed, and
    may stand for nothing else. What only training knows (dropout, where a family has none) is left out.

    Args:
      params: on this process's devices or in its memory; layers stacked (config.scan_layers) or not.
      dtype: float32, bfloat16 or float16.
      special_ids: ids of "pad", "bos", "eos"; what is not given, or None, is null there.
      tokenizer: its files are written too.
      shard_bytes: files are at most so large, unless one tensor is larger.
    Raises:
      ConfigError: no architecture there is such a model; ids that cannot be; a reward's constant that has no place.
      CheckpointError: the folder exists or cannot be written, the parameters are not the model's, or one of their
        numbers is not finite in `dtype`.
    """
    folder = paths.path(folder)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}: accepted are {', '.join(DTYPES)}")
    if folder.exists():
        raise CheckpointError(f"{folder} exists already: choose another, or remove it")
    family, description = hf_config.write(model, dtype, special_ids or {})
    _check_params(names.leaves(params), names.shapes_of(model))
    if model.head == "scalar":
        params, constant = _without_bias(params, drop_bias)
        description |= {hf_config.REWARD_BIAS: constant} if constant else {}
    shapes, read = _reading(model.config.scan_layers, params)
    rows = names.rows(names.TABLES[family], model.head, shapes)
    sizes = {row.theirs: _bytes(row, shapes, dtype) for row in rows}
    parts = _parts(rows, sizes, shard_bytes)
    with _errors(folder), paths.replacing(folder, "config.json") as temporary:
        for file, part in parts.items():
            tensors = {
                row.theirs: _cast(row, [read(path) for path in row.ours], dtype)
                for row in part
            }
            save_file(tensors, temporary / file, metadata={"format": "pt"})
            del tensors  # before the next are made
        if len(parts) > 1:
            total = sum(sizes.values())
            files = {row.theirs: file for file, part in parts.items() for row in part}
            write_json(
                temporary / INDEX,
                {"metadata": {"total_size": total}, "weight_map": files},
            )
        write_json(temporary / "config.json", description)
        if tokenizer is not None:
            tokenizer.save(temporary)


# ------------------------------------------------------------------ reading


class _Files:
    """The tensors of a directory, by name; read when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file: dict[str, Path] = {}  # of each tensor
        self.open: dict[Path, Any] = {}
        index = None
        if (folder / WEIGHTS).exists():
            parts = [WEIGHTS]
        elif (folder / INDEX).exists():
            index = _read_index(folder / INDEX)
            parts = sorted(set(index.values()))
        else:
            raise CheckpointError(
                f"{folder}: there is no {WEIGHTS} and no {INDEX}; other formats are not read"
            )
        for part in parts:
            self._open(folder / part)
        for name in (self.file.keys() ^ index.keys()) if index else ():
            raise CheckpointError(
                f"{folder / INDEX}: {name} is not in both the index and its files"
            )

    def _open(self, path):
        try:
            self.open[path] = safe_open(paths.local(path), framework="numpy")
        except (OSError, SafetensorError) as error:
            why = first_line(error)
            raise CheckpointError(
                f"{path}: not a whole safetensors file: {why}"
            ) from None
        self.file |= dict.fromkeys(self.open[path].keys(), path)

    def slice(self, name: str) -> Any:
        return self.open[self.file[name]].get_slice(name)

    def read(self, name: str) -> np.ndarray:
        return self.open[self.file[name]].get_tensor(name)

    def same(self, a: str, b: str) -> bool:
        """Whether two matrices hold the same numbers."""
        a, b = self.slice(a), self.slice(b)
        if a.get_shape() != b.get_shape():
            return False
        rows = a.get_shape()[0]
        some = [slice(i, min(i + COMPARED, rows)) for i in range(0, rows, COMPARED)]
        return all(np.array_equal(a[rows], b[rows]) for rows in some)


def _read_index(path):
    try:
        found = json.loads(path.read_text())["weight_map"]
        if all(os.path.basename(file) == file for file in found.values()):
            return found
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise CheckpointError(
        f"{path}: expected a JSON object with weight_map: file names by tensor"
    )


def _check(
    files: _Files, table: names.Table, model: Model, shapes: Mapping[str, Shape]
) -> list[Row]:
    """The rows of a model, when the files hold exactly their tensors; before any of them is read."""
    bare = not any(name.startswith(table.prefix) for name in files.file)
    prefix = "" if bare else table.prefix
    rows = names.rows(table, model.head, shapes, prefix)
    expected = {
        row.theirs: row.shape([shapes[path] for path in row.ours]) for row in rows
    }
    for name in expected:
        if name not in files.file:
            raise CheckpointError(f"{files.folder}: there is no tensor {name}")
    for name, file in files.file.items():
        if name in expected:
            _check_tensor(file, name, files.slice(name), expected[name])
        elif not _needless(files, table, name, prefix, model):
            raise CheckpointError(
                f"{file}: our Transformer has no place for the tensor {name}"
            )
    return rows


def _check_tensor(file, name, tensor, shape):
    if tuple(tensor.get_shape()) != shape:
        raise CheckpointError(
            f"{file}: {name} is {tensor.get_shape()}, and by config.json {list(shape)}"
        )
    if tensor.get_dtype() not in DTYPES.values():
        kind, accepted = tensor.get_dtype(), ", ".join(DTYPES.values())
        raise CheckpointError(
            f"{file}: {name} is of type {kind}: accepted are {accepted}"
        )


def _needless(files, table, name, prefix, model):
    """Whether a tensor is a known buffer, or the output matrix once more where it is tied to the embedding."""
    if any(
        re.fullmatch(re.escape(prefix) + pattern, name) for pattern in table.buffers
    ):
        return True
    if name != table.output or model.head != "lm":
        return False
    embedding = prefix + table.trunk[0].theirs
    if not files.same(name, embedding):
        raise CheckpointError(
            f"{files.file[name]}: {name} differs from {embedding}, to which config.json ties it"
        )
    return True


def _put_row(row, files, shapes, put):
    """One tensor's arrays, put; the tensor is gone when they are."""
    arrays = row.split(files.read(row.theirs), [shapes[path] for path in row.ours])
    return {
        path: put(path, array) for path, array in zip(row.ours, arrays, strict=True)
    }


def _placing(model: Model, layout: Layout | None) -> Callable[[str, np.ndarray], Any]:
    """put(path, array): one array in its shards, each made float32 for itself, or in the host's memory."""
    if layout is None:
        return lambda _, array: np.ascontiguousarray(array, np.float32).reshape(
            array.shape
        )
    abstract = model.shapes()
    shardings = names.leaves(state.shardings(abstract, model.axes(), layout))

    def put(path, array):
        def shard(index):
            return np.ascontiguousarray(array[index], np.float32).reshape(
                array[index].shape
            )

        # Waited for: transfers under way would keep their tensors.
        return jax.block_until_ready(
            jax.make_array_from_callback(array.shape, shardings[path], shard)
        )

    return put


# ------------------------------------------------------------------ writing


def _reading(
    stacked: bool, params: Params
) -> tuple[dict[str, Shape], Callable[[str], np.ndarray]]:
    """The shapes of the arrays by path, layers taken apart, and what reads one into the host's memory."""
    leaves = names.leaves(params)
    where = {}  # path -> (path of the leaf, layer within it)
    for path, leaf in leaves.items():
        if stacked and path.startswith("backbone/layers/"):
            rest = path.removeprefix("backbone/layers/")
            where |= {
                f"backbone/layers/layer_{i}/{rest}": (path, i)
                for i in range(leaf.shape[0])
            }
        else:
            where[path] = path, None
    shapes = {
        name: leaves[path].shape[i is not None :] for name, (path, i) in where.items()
    }

    def read(name):
        path, i = where[name]
        leaf = leaves[path]
        if i is None or isinstance(leaf, np.ndarray):
            return np.asarray(leaf if i is None else leaf[i])
        return np.asarray(
            jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
        )  # one program for all layers

    return shapes, read


def _check_params(leaves, expected):
    for path in leaves.keys() | expected.keys():
        found = list(leaves[path].shape) if path in leaves else "absent"
        wanted = list(expected[path]) if path in expected else "absent"
        if found != wanted:
            raise CheckpointError(
                f"the parameters are not this model's: {path} is {found}, and in the model {wanted}"
            )
    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves.values()):
        raise CheckpointError(
            "the parameters lie on the devices of several processes: export them from one"
        )


def _without_bias(params: Params, drop: bool) -> tuple[Params, float]:
    """The parameters of a scalar model with its constant in the final norm, and what of it is left over."""
    head, bias = params["head"], float(params["head"]["bias"])
    norm = params["backbone"].get("norm", {})
    kernel = np.asarray(head["kernel"], np.float64)
    if bias and "bias" in norm and kernel.any():
        moved = np.asarray(norm["bias"], np.float64) + bias * kernel / kernel.dot(
            kernel
        )
        backbone = params["backbone"] | {
            "norm": norm | {"bias": moved.astype(np.float32)}
        }
        return {"backbone": backbone, "head": head}, 0.0
    if bias and not drop:
        raise ConfigError(
            f"the reward's constant, {bias:.6g}, has no place in a score without bias: pass drop_bias=True to drop it"
        )
    return params, bias


def _bytes(row: Row, shapes: Mapping[str, Shape], dtype: str) -> int:
    return np.dtype(dtype).itemsize * sum(math.prod(shapes[path]) for path in row.ours)


def _parts(
    rows: list[Row], sizes: Mapping[str, int], limit: int
) -> dict[str, list[Row]]:
    """Rows by file, in order, each file as full as its limit of bytes lets it be."""
    parts, size = [[]], 0
    for row in rows:
        if parts[-1] and size + sizes[row.theirs] > limit:
            parts.append([])
            size = 0
        parts[-1].append(row)
        size += sizes[row.theirs]
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    return {
        f"model-{i:05d}-of-{len(parts):05d}.safetensors": part
        for i, part in enumerate(parts, 1)
    }


def _cast(row: Row, arrays: list[np.ndarray], dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        tensor = row.join(arrays).astype(dtype, copy=False)
    if not np.isfinite(tensor).all():
        raise CheckpointError(
            f"{', '.join(row.ours)} ({row.theirs}): not all numbers are finite in {dtype}"
        )
    return tensor


@contextlib.contextmanager
def _errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} could not be written: {first_line(error)}"
        ) from error
