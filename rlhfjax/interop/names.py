"""The tensors of Hugging Face and GGUF files: which parameters each tensor holds, and how.

One table per family, used for reading and for writing: `Row.split` turns a tensor into parameters,
`Row.join` turns parameters into a tensor. Parameters that a model does not have (mostly biases)
have no row, so one table serves Llama and Qwen2.
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
    """Paths of the parameters. Several have one shape and lie side by side on the output axis."""
    inputs: int = 1
    """How many leading axes of a parameter are inputs; the tensor has one, or none (vectors)."""
    out_first: bool = True
    """[out, in], as in torch's Linear; else [in, out], as in GPT-2's Conv1D and embeddings."""
    by_head: bool = False
    """Parameters alternate: q, k and v of head 0, then of head 1, as in GPT-NeoX."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Returns the shape of the tensor, given the shapes of its parameters."""
        n_out = len(shapes) * math.prod(shapes[0][self.inputs :])
        if not self.inputs:
            return (n_out,)
        n_in = math.prod(shapes[0][: self.inputs])
        return (n_out, n_in) if self.out_first else (n_in, n_out)

    def split(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        """Returns the parameters in a tensor, as views where numpy can."""
        matrix = tensor.T if self.inputs and self.out_first else tensor
        matrix = self._grouped(matrix, shapes[0])
        parts = np.split(matrix, len(shapes), axis=-1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the tensor of some parameters, contiguous as safetensors requires."""
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
            if module.startswith("norm"):
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

_LLAMA = Table(
    prefix="model.",
    layers="layers.{i}.",
    trunk={"embed_tokens": "embed/tokens", "norm": "norm"},
    layer={
        "input_layernorm": "norm_1",
        "self_attn.q_proj": "attention/query",
        "self_attn.k_proj": "attention/key",
        "self_attn.v_proj": "attention/value",
        "self_attn.o_proj": "attention/out",
        "post_attention_layernorm": "norm_2",
        "mlp.gate_proj": "mlp/gate",
        "mlp.up_proj": "mlp/up",
        "mlp.down_proj": "mlp/down",
    },
    output="lm_head.weight",
    buffers=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)
_GPT2 = Table(
    prefix="transformer.",
    layers="h.{i}.",
    trunk={"wte": "embed/tokens", "wpe": "embed/positions", "ln_f": "norm"},
    layer={
        "ln_1": "norm_1",
        "attn.c_attn": QKV,
        "attn.c_proj": "attention/out",
        "ln_2": "norm_2",
        "mlp.c_fc": "mlp/up",
        "mlp.c_proj": "mlp/down",
    },
    output="lm_head.weight",
    buffers=(r"h\.\d+\.attn\.(masked_)?bias",),  # the causal mask
    out_first=False,
)
_GPT_NEOX = Table(
    prefix="gpt_neox.",
    layers="layers.{i}.",
    trunk={"embed_in": "embed/tokens", "final_layer_norm": "norm"},
    layer={
        "input_layernorm": "norm_1",
        "attention.query_key_value": QKV,
        "attention.dense": "attention/out",
        "post_attention_layernorm": "norm_2",
        "mlp.dense_h_to_4h": "mlp/up",
        "mlp.dense_4h_to_h": "mlp/down",
    },
    output="embed_out.weight",
    buffers=(r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),
    by_head=True,
)
TABLES: dict[str, Table] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "gpt2": _GPT2,
    "openai-gpt": dataclasses.replace(
        _GPT2,
        trunk={"tokens_embed": "embed/tokens", "positions_embed": "embed/positions"},
        buffers=(*_GPT2.buffers, "position_ids"),
    ),
    "gpt_neox": _GPT_NEOX,
}

# A Llama by llama.cpp's names (gguf-py/gguf/constants.py). gguf.py reorders the rows of Q and K.
GGUF = Table(
    prefix="",
    layers="blk.{i}.",
    trunk={"token_embd": "embed/tokens", "output_norm": "norm"},
    layer={
        "attn_norm": "norm_1",
        "attn_q": "attention/query",
        "attn_k": "attention/key",
        "attn_v": "attention/value",
        "attn_output": "attention/out",
        "ffn_norm": "norm_2",
        "ffn_gate": "mlp/gate",
        "ffn_up": "mlp/up",
        "ffn_down": "mlp/down",
    },
    output="output.weight",
)


def rows(
    table: Table, head: str, shapes: Mapping[str, Shape], prefix: str | None = None
) -> list[Row]:
    """Returns the rows of a whole model, layers unstacked, in the order of its parts.

    Args:
      head: "lm" or "scalar". The kernel [d_model] of a scalar head is `score.weight`
        [1, d_model]; its bias has no row.
      shapes: shapes of the parameters by path; a row whose parameters are absent is left out.
      prefix: replaces the table's.
    """
    prefix = table.prefix if prefix is None else prefix
    result = table.module_rows(table.trunk, prefix, "backbone/")
    for i in range(sum(path.endswith("norm_1/scale") for path in shapes)):
        start = prefix + table.layers.format(i=i)
        result += table.module_rows(table.layer, start, f"backbone/layers/layer_{i}/")
    output = "score.weight" if head == "scalar" else table.output
    result.append(Row(output, ("head/kernel",)))
    return [row for row in result if row.params[0] in shapes]


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
      shapes: shapes of the parameters by path.
      read: returns a tensor by name.
      put: returns the array to keep, given its path and the array as it was read.
    """
    params = {}
    for row in rows:
        params |= _read_row(row, shapes, read, put)
    return params


def _read_row(row, shapes, read, put):
    """Reads one tensor. A function of its own, so that the tensor is freed before the next."""
    arrays = row.split(read(row.name), [shapes[path] for path in row.params])
    return {
        path: put(path, array) for path, array in zip(row.params, arrays, strict=True)
    }


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
