"""The tensors of Hugging Face and GGUF files: which parameters each tensor holds, and how.

A family has one table (`hf_tables`, `gguf_families`), used for reading and for writing: `Row.split`
turns a tensor into parameters, `Row.join` turns parameters into a tensor. Parameters that a model
does not have (mostly biases) have no row, so one table serves Llama, Qwen2 and Qwen3.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlhfjax.config import build
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.json_text import named
from rlhfjax.models import Model, TransformerConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a file and the parameters in it."""

    name: str
    """Name of the tensor."""
    params: tuple[str, ...]
    """Paths of the parameters. Several have the same inputs and lie side by side on the output
    axis; their widths may differ."""
    inputs: int = 1
    """How many leading axes of a parameter are inputs; the tensor has one, or none (vectors)."""
    out_first: bool = True
    """[out, in], as in torch's Linear; else [in, out], as in GPT-2's Conv1D and embeddings."""
    by_head: bool = False
    """Parameters alternate: q, k and v of head 0, then of head 1, as in GPT-NeoX."""
    stacked: bool = False
    """The matrices of all experts in one tensor, [experts, out, in]; ours is [experts, in, out]."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Returns the shape of the tensor, given the shapes of its parameters."""
        if self.stacked:
            n_experts, n_in, n_out = shapes[0]
            return (n_experts, n_out, n_in)
        n_out = sum(math.prod(shape[self.inputs :]) for shape in shapes)
        if not self.inputs:
            return (n_out,)
        n_in = math.prod(shapes[0][: self.inputs])
        return (n_out, n_in) if self.out_first else (n_in, n_out)

    def split(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        """Returns the parameters in a tensor, as views where numpy can."""
        if self.stacked:
            return [tensor.swapaxes(1, 2)]
        matrix = tensor.T if self.inputs and self.out_first else tensor
        matrix = self._grouped(matrix, shapes[0])
        widths = [math.prod(shape) // matrix[..., 0].size for shape in shapes]
        parts = np.split(matrix, np.cumsum(widths)[:-1], axis=-1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the tensor of some parameters, contiguous as safetensors requires."""
        if self.stacked:
            return np.ascontiguousarray(arrays[0].swapaxes(1, 2))
        parts = [self._grouped(array, array.shape) for array in arrays]
        joined = np.concatenate(parts, axis=-1)
        matrix = joined.reshape(len(joined), -1)
        tensor = matrix.T if self.inputs and self.out_first else matrix
        shape = self.shape([array.shape for array in arrays])
        return np.ascontiguousarray(tensor.reshape(shape))

    def _grouped(self, array: np.ndarray, shape: Shape) -> np.ndarray:
        """Returns an array as [in, heads or 1, out], `shape` being that of one parameter."""
        n_in = math.prod(shape[: self.inputs])
        return array.reshape(n_in, shape[self.inputs] if self.by_head else 1, -1)


@dataclasses.dataclass(frozen=True)
class Table:
    """The modules of a family: name in the file -> path in the parameter tree.

    A module of the file can hold several of ours side by side: then the value is their paths,
    separated by blanks. See `module_rows`.
    """

    prefix: str
    """Prefix of all names but the output's; files saved from a bare trunk lack it."""
    layers: str
    """Prefix of a layer's names, after `prefix`."""
    trunk: Mapping[str, str]
    """Modules outside the layers."""
    layer: Mapping[str, str]
    """Modules of one layer."""
    output: str
    """Name of the language model's output matrix, [vocab_size, d_model]."""
    buffers: tuple[str, ...] = ()
    """Patterns of names, after `prefix`, of what old files hold besides parameters."""
    out_first: bool = True
    """Whether projections are [out, in]; see Row."""
    by_head: bool = False
    """Whether fused parameters alternate; see Row."""
    experts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Modules of one expert `{e}` of a layer."""
    stacked: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Modules of all experts of a layer together; see Row."""

    def module_rows(
        self, modules: Mapping[str, str], start: str, folder: str
    ) -> list[Row]:
        """Returns the rows of some modules: each has a weight, and all but embeddings a bias.

        Args:
          start: prefix of the tensors' names.
          folder: prefix of the parameters' paths.
        """
        result = []
        for name, module in modules.items():
            weight, bias = f"{start}{name}.weight", f"{start}{name}.bias"
            paths = [folder + path for path in module.split()]
            if module.startswith("embed/"):
                result.append(_row(weight, paths, "", out_first=False))
                continue
            if "norm" in module.rpartition("/")[2]:
                result.append(_row(weight, paths, "/scale", inputs=0))
            else:
                kernel = _row(
                    weight,
                    paths,
                    "/kernel",
                    inputs=2 if module == "attention/out" else 1,  # [heads, head_dim]
                    out_first=self.out_first,
                    by_head=self.by_head,
                )
                result.append(kernel)
            result.append(_row(bias, paths, "/bias", inputs=0, by_head=self.by_head))
        return result


def _row(name: str, modules: Sequence[str], leaf: str, **layout: Any) -> Row:
    """Returns the row of one leaf of each module."""
    return Row(name, tuple(f"{module}{leaf}" for module in modules), **layout)


QKV = "attention/query attention/key attention/value"


def rows(
    table: Table, head: str, shapes: Mapping[str, Shape], prefix: str | None = None
) -> list[Row]:
    """Returns the rows of a whole model, layers unstacked, in the order of its parts.

    Args:
      head: "lm" or "scalar". The kernel [d_model] of a scalar head is `score.weight`
        [1, d_model]; its bias has no row.
      shapes: shapes of the parameters by path, experts by themselves (`by_expert`) unless the
        table has them stacked; a row whose parameters are absent is left out.
      prefix: replaces the table's.
    """
    prefix = table.prefix if prefix is None else prefix
    result = table.module_rows(table.trunk, prefix, "backbone/")
    for i in range(sum(path.endswith("norm_1/scale") for path in shapes)):
        start = prefix + table.layers.format(i=i)
        folder = f"backbone/layers/layer_{i}/"
        result += table.module_rows(table.layer, start, folder)
        for name, module in table.experts.items():
            for e in range(count_experts(shapes, f"{folder}{module}")):
                paths = [f"{folder}{module}/expert_{e}"]
                result.append(
                    _row(f"{start}{name.format(e=e)}.weight", paths, "/kernel")
                )
        for name, module in table.stacked.items():
            paths = [f"{folder}{module}"]
            row = _row(f"{start}{name}.weight", paths, "/kernel", stacked=True)
            result.append(row)
    output = "score.weight" if head == "scalar" else table.output
    result.append(Row(output, ("head/kernel",)))
    return [row for row in result if _has(shapes, row)]


def _has(shapes: Mapping[str, Shape], row: Row) -> bool:
    """Returns whether the parameters of a row are among some shapes by path."""
    path = row.params[0]
    if path not in shapes:
        return False
    return row.stacked == _is_stack(path, shapes[path])


def tensor_shapes(rows: Sequence[Row], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Returns the shape of every tensor by name, given the parameters' by path."""
    return {row.name: row.shape([shapes[path] for path in row.params]) for row in rows}


def validate_tensors(
    expected: Mapping[str, Shape],
    found: Mapping[str, Shape],
    *,
    files: Mapping[str, Any],
    context: Any,
    source: str,
) -> None:
    """Validates that the expected tensors and no others are there, each of its shape.

    Args:
      files: the file of each tensor found, for errors.
      context: the file or folder in which a tensor is missing.
      source: what the expected shapes follow from.
    Raises:
      CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    for name in expected:
        if name not in found:
            raise CheckpointError(f"{context}: there is no tensor {name}")
    for name, shape in found.items():
        if name in expected and shape != expected[name]:
            wanted = list(expected[name])
            raise CheckpointError(
                f"{files[name]}: {name} is {list(shape)}, and by {source} {wanted}"
            )
        if name not in expected:
            raise CheckpointError(
                f"{files[name]}: our Transformer has no place for the tensor {named(name)}"
            )


def validate_depth(
    table: Table, prefix: str, n_layers: int, found: Collection[str], *, context: Any
) -> None:
    """Validates that the last layer is there, before the shapes of 1000 layers are computed.

    Args:
      prefix: prefix of all names.
      found: names of all tensors.
    Raises:
      CheckpointError: its first tensor is missing.
    """
    start = prefix + table.layers.format(i=n_layers - 1)
    first = f"{start}{next(iter(table.layer))}.weight"
    if first not in found:
        raise CheckpointError(f"{context}: there is no tensor {first}")


def build_config(
    fields: Mapping[str, Any], keys: Mapping[str, str], context: Any
) -> TransformerConfig:
    """Returns the TransformerConfig that a file describes.

    Args:
      fields: values by field.
      keys: names of fields in the file, for errors.
      context: the file.
    Raises:
      CheckpointError: a value is out of range, or values do not fit together.
    """
    try:
        return build(TransformerConfig, fields, "model")
    except ConfigError as error:
        named = dict.fromkeys(re.findall(r"model\.(\w+)", str(error)))
        known = [f"model.{name} is {keys[name]}" for name in named if name in keys]
        meant = f" ({', '.join(known)})" if known else ""
        raise CheckpointError(f"{context}: {error}{meant}") from None


def read_params(
    rows: Sequence[Row],
    shapes: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
    put: Callable[[str, np.ndarray], Any],
) -> dict[str, Any]:
    """Reads tensors one at a time and returns the parameters in them by path.

    Args:
      shapes: shapes of the parameters by path, experts by themselves (`by_expert`).
      read: returns a tensor by name.
      put: returns the array to keep, given its path and the array as it was read.
    """
    params: dict[str, Any] = {}
    experts: list[np.ndarray] = []  # of one parameter, in order

    def put_or_collect(path: str, array: np.ndarray) -> Any:
        module, is_expert, _ = path.partition("/expert_")
        if not is_expert:
            params[path] = put(path, array)
            return
        experts.append(on_host(path, array))
        if len(experts) == count_experts(shapes, module):
            whole = f"{module}/kernel"
            params[whole] = put(whole, np.stack(experts))
            experts.clear()

    for row in rows:
        _read_row(row, shapes, read, put_or_collect)
    return params


def _read_row(row, shapes, read, put):
    """Reads one tensor. A function of its own, so that the tensor is freed before the next."""
    arrays = row.split(read(row.name), [shapes[path] for path in row.params])
    for path, array in zip(row.params, arrays, strict=True):
        put(path, array)


def on_host(_: str, array: np.ndarray) -> np.ndarray:
    """Returns a contiguous float32 array; a `put` for `read_params`."""
    # ascontiguousarray makes a scalar [1].
    return np.ascontiguousarray(array, np.float32).reshape(array.shape)


def leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a parameter tree by path, keys joined by "/"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def nested(by_path: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameter tree with these leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in by_path.items():
        *folders, name = path.split("/")
        level = tree
        for folder in folders:
            level = level.setdefault(folder, {})
        level[name] = leaf
    return tree


def shapes_of(model: Model) -> dict[str, Shape]:
    """Returns the shapes of a model's parameters by path."""
    return {path: leaf.shape for path, leaf in leaves(model.shapes()).items()}


def by_expert(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Returns shapes by path with the kernels [e, x, y] of a layer's experts by themselves.

    Their paths are ".../mlp/gate/expert_0/kernel" and so on.
    """
    result = {}
    for path, shape in shapes.items():
        module, _, name = path.rpartition("/")
        if not _is_stack(path, shape):
            result[path] = shape
            continue
        for e in range(shape[0]):
            result[f"{module}/expert_{e}/{name}"] = shape[1:]
    return result


def _is_stack(path: str, shape: Shape) -> bool:
    """Returns whether a parameter holds the kernels [experts, in, out] of a layer's experts."""
    is_kernel = path.endswith("/kernel") and "/mlp/" in path
    return is_kernel and len(shape) == 3


def count_experts(shapes: Mapping[str, Shape], module: str) -> int:
    """Returns how many experts a module has in the result of `by_expert`."""
    count = 0
    while f"{module}/expert_{count}/kernel" in shapes:
        count += 1
    return count
