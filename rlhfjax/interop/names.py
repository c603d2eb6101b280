"""Which of our arrays each tensor of a Hugging Face or GGUF file holds: one table a family, read in both directions.

A row names a tensor of theirs and the arrays of ours in it, and says how they lie there; `split` and `join` are the two
ways across. Rows of arrays that a model does not have (biases, mostly) are left out, so Llama's table is Qwen2's too.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlhfjax.models import Model

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of theirs, and what it holds of ours.

    ours: paths in the parameter tree. Several are of one shape and lie side by side along the output axis: one after
      the other, or head by head (`by_head`: q, k and v of head 0, then of head 1, ..., as GPT-NeoX has them).
    inputs: how many leading axes of ours are inputs; theirs has one, or none for a vector.
    out_first: theirs is [out, in], as torch's Linear, or [in, out], as GPT-2's Conv1D and every embedding.
    """

    theirs: str
    ours: tuple[str, ...]
    inputs: int = 1
    out_first: bool = True
    by_head: bool = False

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Of theirs, given those of ours."""
        n_out = len(shapes) * math.prod(shapes[0][self.inputs :])
        if not self.inputs:
            return (n_out,)
        n_in = math.prod(shapes[0][: self.inputs])
        return (n_out, n_in) if self.out_first else (n_in, n_out)

    def split(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        """Ours, from theirs; views where numpy can."""
        matrix = tensor.T if self.inputs and self.out_first else tensor
        n_in = math.prod(shapes[0][: self.inputs])
        parts = np.split(
            matrix.reshape(n_in, self._groups(shapes[0]), -1), len(shapes), axis=-1
        )
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Theirs, from ours; contiguous, which safetensors takes for granted."""
        n_in = math.prod(arrays[0].shape[: self.inputs])
        parts = [array.reshape(n_in, self._groups(array.shape), -1) for array in arrays]
        matrix = (
            parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        ).reshape(n_in, -1)
        tensor = matrix.T if self.inputs and self.out_first else matrix
        return np.ascontiguousarray(
            tensor.reshape(self.shape([array.shape for array in arrays]))
        )

    def _groups(self, shape):
        return shape[self.inputs] if self.by_head else 1


def _dense(
    theirs: str,
    *ours: str,
    inputs: int = 1,
    out_first: bool = True,
    by_head: bool = False,
) -> tuple[Row, Row]:
    """A projection: weight and bias."""
    return (
        Row(
            f"{theirs}.weight",
            tuple(f"{path}/kernel" for path in ours),
            inputs,
            out_first,
            by_head,
        ),
        Row(
            f"{theirs}.bias",
            tuple(f"{path}/bias" for path in ours),
            inputs=0,
            by_head=by_head,
        ),
    )


def _conv1d(theirs: str, *ours: str, inputs: int = 1) -> tuple[Row, Row]:
    return _dense(theirs, *ours, inputs=inputs, out_first=False)


def _norm(theirs: str, ours: str) -> tuple[Row, Row]:
    return Row(f"{theirs}.weight", (f"{ours}/scale",), inputs=0), Row(
        f"{theirs}.bias", (f"{ours}/bias",), inputs=0
    )


def _embedding(theirs: str, ours: str) -> Row:
    return Row(f"{theirs}.weight", (f"embed/{ours}",), out_first=False)


QKV = ("attention/query", "attention/key", "attention/value")


@dataclasses.dataclass(frozen=True)
class Table:
    """The tensors of a family; names within `prefix`, and within a layer, are relative."""

    prefix: str  # of the trunk's tensors; files saved from a bare trunk lack it
    layers: str  # of a layer's, within the prefix
    trunk: tuple[Row, ...]
    layer: tuple[Row, ...]
    output: str  # the language model's output matrix, [v, d]
    buffers: tuple[
        str, ...
    ] = ()  # patterns of what old files hold beside parameters, within the prefix


_LLAMA = Table(
    prefix="model.",
    layers="layers.{i}.",
    trunk=(_embedding("embed_tokens", "tokens"), *_norm("norm", "norm")),
    layer=(
        *_norm("input_layernorm", "norm_1"),
        *_dense("self_attn.q_proj", "attention/query"),
        *_dense("self_attn.k_proj", "attention/key"),
        *_dense("self_attn.v_proj", "attention/value"),
        *_dense("self_attn.o_proj", "attention/out", inputs=2),
        *_norm("post_attention_layernorm", "norm_2"),
        *_dense("mlp.gate_proj", "mlp/gate"),
        *_dense("mlp.up_proj", "mlp/up"),
        *_dense("mlp.down_proj", "mlp/down"),
    ),
    output="lm_head.weight",
    buffers=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)
_GPT_LAYER = (
    *_norm("ln_1", "norm_1"),
    *_conv1d("attn.c_attn", *QKV),
    *_conv1d("attn.c_proj", "attention/out", inputs=2),
    *_norm("ln_2", "norm_2"),
    *_conv1d("mlp.c_fc", "mlp/up"),
    *_conv1d("mlp.c_proj", "mlp/down"),
)
_GPT_BUFFERS = (r"h\.\d+\.attn\.(masked_)?bias",)  # the causal mask

TABLES: dict[str, Table] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "gpt2": Table(
        prefix="transformer.",
        layers="h.{i}.",
        trunk=(
            _embedding("wte", "tokens"),
            _embedding("wpe", "positions"),
            *_norm("ln_f", "norm"),
        ),
        layer=_GPT_LAYER,
        output="lm_head.weight",
        buffers=_GPT_BUFFERS,
    ),
    "openai-gpt": Table(
        prefix="transformer.",
        layers="h.{i}.",
        trunk=(
            _embedding("tokens_embed", "tokens"),
            _embedding("positions_embed", "positions"),
        ),
        layer=_GPT_LAYER,
        output="lm_head.weight",
        buffers=(*_GPT_BUFFERS, "position_ids"),
    ),
    "gpt_neox": Table(
        prefix="gpt_neox.",
        layers="layers.{i}.",
        trunk=(_embedding("embed_in", "tokens"), *_norm("final_layer_norm", "norm")),
        layer=(
            *_norm("input_layernorm", "norm_1"),
            *_dense("attention.query_key_value", *QKV, by_head=True),
            *_dense("attention.dense", "attention/out", inputs=2),
            *_norm("post_attention_layernorm", "norm_2"),
            *_dense("mlp.dense_h_to_4h", "mlp/up"),
            *_dense("mlp.dense_4h_to_h", "mlp/down"),
        ),
        output="embed_out.weight",
        buffers=(r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),
    ),
}

# A Llama's tensors by llama.cpp's names (gguf-py/gguf/constants.py); the rows of Q and K lie in another order there.
GGUF = Table(
    prefix="",
    layers="blk.{i}.",
    trunk=(_embedding("token_embd", "tokens"), *_norm("output_norm", "norm")),
    layer=(
        *_norm("attn_norm", "norm_1"),
        *_dense("attn_q", "attention/query"),
        *_dense("attn_k", "attention/key"),
        *_dense("attn_v", "attention/value"),
        *_dense("attn_output", "attention/out", inputs=2),
        *_norm("ffn_norm", "norm_2"),
        *_dense("ffn_gate", "mlp/gate"),
        *_dense("ffn_up", "mlp/up"),
        *_dense("ffn_down", "mlp/down"),
    ),
    output="output.weight",
)


def rows(
    table: Table, head: str, shapes: Mapping[str, Shape], prefix: str | None = None
) -> list[Row]:
    """The rows of a whole model, layers unstacked, in the order of its parts.

    Args:
      head: "lm" or "scalar"; the kernel [d] of a scalar one is `score.weight` [1, d], its bias has no row.
      shapes: of our arrays by path; a row whose arrays are not there is left out.
      prefix: in place of the table's.
    """
    prefix = table.prefix if prefix is None else prefix
    found = [_within(row, prefix, "backbone/") for row in table.trunk]
    for i in range(sum(path.endswith("norm_1/scale") for path in shapes)):
        found += [
            _within(
                row, prefix + table.layers.format(i=i), f"backbone/layers/layer_{i}/"
            )
            for row in table.layer
        ]
    found.append(
        Row("score.weight" if head == "scalar" else table.output, ("head/kernel",))
    )
    return [row for row in found if row.ours[0] in shapes]


def _within(row, theirs, ours):
    return dataclasses.replace(
        row, theirs=theirs + row.theirs, ours=tuple(ours + path for path in row.ours)
    )


def leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a parameter tree by path, keys joined by "/"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def nested(found: Mapping[str, Any]) -> dict[str, Any]:
    """The parameter tree of leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in found.items():
        *folders, name = path.split("/")
        functools.reduce(
            lambda level, folder: level.setdefault(folder, {}), folders, tree
        )[name] = leaf
    return tree


def shapes_of(model: Model) -> dict[str, Shape]:
    """The shapes of a model's parameters by path."""
    return {path: leaf.shape for path, leaf in leaves(model.shapes()).items()}
