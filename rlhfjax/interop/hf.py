"""Models from and to Hugging Face folders: config.json and model.safetensors, one file or shards.

    model, params = load_hf("SmolLM2-135M", layout)
    save_hf("exported", model, params)                      # a folder that `transformers` loads

Language models and reward models of the families in `hf_families`. `hf_config` reads and writes
their configs; `names` lists their tensors. Tensors are read one at a
time, straight into their shards. The tokenizer's files are read by `data.hf_tokenizer`.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from rlhfjax import paths, state
from rlhfjax.config import write_json
from rlhfjax.errors import CheckpointError, ConfigError, first_line
from rlhfjax.interop import hf_config, names
from rlhfjax.interop.hf_tables import TABLES
from rlhfjax.interop.names import Row, Shape
from rlhfjax.interop.safetensors_file import INDEX, WEIGHTS, Folder
from rlhfjax.mesh import Layout
from rlhfjax.models import Model
from rlhfjax.paths import Path

Params = dict[str, Any]

# Our dtypes and what safetensors calls them.
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SHARD_BYTES = 5 * 10**9


def load_hf(folder: str | Path, layout: Layout | None = None) -> tuple[Model, Params]:
    """Returns the model in a Hugging Face folder and its float32 parameters, layers unstacked.

    The host holds about one tensor at a time besides the result. A reward model
    (`...ForSequenceClassification` with one label) becomes Model(config, "scalar"): its `score` is
    the head's kernel, the head's bias is 0, or what `save_hf` dropped.

    Args:
      layout: puts arrays into their shards; without it they are numpy arrays.
    Raises:
      CheckpointError: our Transformer cannot express the model; a file is missing or damaged; a
        tensor is missing, unexpected, or of another shape or type. Names the file and the key or
        tensor.
    """
    folder = paths.path(folder)
    family, model, constant = hf_config.read(folder / "config.json")
    files = Folder(folder)
    table = TABLES[family]
    prefix = _prefix(files, table)
    n_layers = model.config.n_layers
    names.validate_depth(table, prefix, n_layers, files.file, context=folder)
    shapes = names.by_expert(names.shapes_of(model))
    rows = _rows(files, table, prefix, model, shapes)
    put = names.on_host if layout is None else _put_into_shards(model, layout)
    params = names.read_params(rows, shapes, files.read, put)
    if model.head == "scalar":
        params["head/bias"] = put("head/bias", np.array(constant))
    return model, names.nested(params)


def save_hf(
    folder: str | Path,
    model: Model,
    params: Params,
    dtype: str = "float32",
    *,
    special_ids: hf_config.SpecialIds | None = None,
    write_others: Callable[[Path], None] | None = None,
    drop_bias: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that `transformers` loads; the host holds one shard of it at a time.

    A scalar model is written as `...ForSequenceClassification` with one label, whose `score` has no
    bias. The bias of the final LayerNorm can carry ours:
    score . (y + b score / |score|^2) = score . y + b. RMSNorm has no bias, and there ours is an
    error unless `drop_bias`: then scores are lower by a constant (their differences stay), which
    config.json keeps for `load_hf`. `transformers` scores the last token that is not padding, so a
    scalar model needs a pad id that is neither bos nor eos. What only training needs (for example
    dropout, where a family has none) is left out.

    Args:
      params: on this process's devices or in its memory, layers stacked or not.
      dtype: float32, bfloat16 or float16.
      special_ids: ids of "pad", "bos" and "eos", of which several may end a text; absent ones are
        written as null.
      write_others: writes further files into the folder, such as the tokenizer's.
      shard_bytes: maximum size of a file, unless a single tensor is larger.
    Raises:
      ConfigError: no architecture expresses the model, an id is invalid, or a reward's constant
        cannot be written.
      CheckpointError: the folder exists or cannot be written, the parameters are not the model's,
        or a number is not finite in `dtype`.
    """
    folder = paths.path(folder)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}: accepted are {', '.join(DTYPES)}")
    if folder.exists():
        raise CheckpointError(f"{folder} exists already: choose another, or remove it")
    family, description = hf_config.write(model, dtype, special_ids or {})
    validate_params(names.leaves(params), names.shapes_of(model))
    if model.head == "scalar":
        params, constant = _without_bias(params, drop_bias)
        description |= {hf_config.REWARD_BIAS: constant} if constant else {}
    whole, read = unstacked_reader(model.config.scan_layers, params)
    shapes = names.by_expert(whole)
    rows = names.rows(TABLES[family], model.head, shapes)
    tensors = names.tensor_shapes(rows, shapes)
    sizes = {
        name: np.dtype(dtype).itemsize * math.prod(shape)
        for name, shape in tensors.items()
    }
    shards = _shards(rows, sizes, shard_bytes)
    try:
        with paths.replacing(folder, "config.json") as temporary:
            for file, part in shards.items():
                _write_shard(temporary / file, part, read, dtype)
            if len(shards) > 1:
                write_json(temporary / INDEX, _index(shards, sizes))
            write_json(temporary / "config.json", description)
            if write_others is not None:
                write_others(temporary)
    except (OSError, SafetensorError) as error:
        why = first_line(error)
        raise CheckpointError(f"{folder} could not be written: {why}") from error


# ------------------------------------------------------------------ reading


def _prefix(files: Folder, table: names.Table) -> str:
    """Returns the prefix of all names but the output's."""
    bare = not any(name.startswith(table.prefix) for name in files.file)
    return "" if bare else table.prefix


def _rows(
    files: Folder,
    table: names.Table,
    prefix: str,
    model: Model,
    shapes: Mapping[str, Shape],
) -> list[Row]:
    """Returns the rows of a model after validating that the files hold exactly their tensors."""
    rows = names.rows(table, model.head, shapes, prefix)
    expected = names.tensor_shapes(rows, shapes)
    # Files may repeat the output matrix although it is tied to the embedding.
    embedding, output = rows[0].name, table.output
    tied = model.head == "lm" and output in files.file and output not in expected
    if tied:
        expected[output] = expected[embedding]
    buffer = re.compile(f"{re.escape(prefix)}({'|'.join(table.buffers)})")
    found = {
        name: tuple(files.slice(name).get_shape())
        for name in files.file
        if not buffer.fullmatch(name)
    }
    names.validate_tensors(
        expected,
        found,
        files=files.file,
        context=files.folder,
        source="config.json",
    )
    if tied and not np.array_equal(files.read(output), files.read(embedding)):
        raise CheckpointError(
            f"{files.file[output]}: {output} differs from {embedding}, "
            "to which config.json ties it"
        )
    for name in expected:
        kind = files.slice(name).get_dtype()
        if kind not in DTYPES.values():
            accepted = ", ".join(DTYPES.values())
            raise CheckpointError(
                f"{files.file[name]}: {name} is of type {kind}: accepted are {accepted}"
            )
    return rows


def _put_into_shards(
    model: Model, layout: Layout
) -> Callable[[str, np.ndarray], jax.Array]:
    """Returns put(path, array), which makes each shard float32 on its own."""
    shardings = names.leaves(state.shardings(model.shapes(), model.axes(), layout))

    def put(path: str, array: np.ndarray) -> jax.Array:
        placed = jax.make_array_from_callback(
            array.shape,
            shardings[path],
            lambda index: names.on_host(path, array[index]),
        )
        # A transfer under way would keep its tensor in memory.
        return jax.block_until_ready(placed)

    return put


# ------------------------------------------------------------------ writing


def validate_params(leaves: Mapping[str, Any], expected: Mapping[str, Shape]) -> None:
    """Raises CheckpointError unless the parameters are a model's, and all in this process."""
    for path in leaves.keys() | expected.keys():
        found = list(leaves[path].shape) if path in leaves else "absent"
        wanted = list(expected[path]) if path in expected else "absent"
        if found != wanted:
            raise CheckpointError(
                f"the parameters are not this model's: {path} is {found}, "
                f"and in the model {wanted}"
            )
    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves.values()):
        raise CheckpointError(
            "the parameters lie on the devices of several processes: export them from one"
        )


def _without_bias(params: Params, drop: bool) -> tuple[Params, float]:
    """Returns a scalar model's parameters with the head's bias moved into the final norm.

    Second is what cannot be moved.
    """
    head = params["head"]
    bias = float(head["bias"])
    norm = params["backbone"].get("norm", {})
    kernel = np.asarray(head["kernel"], np.float64)
    if bias and "bias" in norm and kernel.any():
        shift = bias * kernel / kernel.dot(kernel)
        moved = np.asarray(norm["bias"], np.float64) + shift
        norm = norm | {"bias": moved.astype(np.float32)}
        return {"backbone": params["backbone"] | {"norm": norm}, "head": head}, 0.0
    if bias and not drop:
        raise ConfigError(
            f"the reward's constant, {bias:.6g}, has no place in a score without bias: "
            "--drop_bias (in Python drop_bias=True) leaves it out"
        )
    return params, bias


def unstacked_reader(
    stacked: bool, params: Params
) -> tuple[dict[str, Shape], Callable[[str], np.ndarray]]:
    """Returns the shapes of the parameters by path, layers unstacked, and read(path).

    `read` copies one parameter to the host, also a single expert by its path (`names.by_expert`).
    """
    leaves = names.leaves(params)
    shapes = {}
    places = {}  # path -> (path of the leaf, (layer within it,) or ())
    for path, leaf in leaves.items():
        start, layers, rest = path.partition("backbone/layers/")
        if not (stacked and layers):
            places[path] = path, ()
            shapes[path] = leaf.shape
            continue
        for i in range(leaf.shape[0]):
            name = f"{start}{layers}layer_{i}/{rest}"
            places[name] = path, (i,)
            shapes[name] = leaf.shape[1:]

    def read(name: str) -> np.ndarray:
        module, is_expert, rest = name.partition("/expert_")
        expert, _, kind = rest.partition("/")
        path, indices = places[f"{module}/{kind}" if is_expert else name]
        leaf = leaves[path]
        for i in (*indices, int(expert)) if is_expert else indices:
            if isinstance(leaf, np.ndarray):
                leaf = leaf[i]
            else:  # one program serves all layers
                leaf = jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
        return np.asarray(leaf)

    return shapes, read


def _shards(
    rows: list[Row], sizes: Mapping[str, int], limit: int
) -> dict[str, list[Row]]:
    """Returns the rows of each file, in order; each file is as full as `limit` (bytes) allows."""
    parts = [[]]
    size = 0
    for row in rows:
        if parts[-1] and size + sizes[row.name] > limit:
            parts.append([])
            size = 0
        parts[-1].append(row)
        size += sizes[row.name]
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    return {
        f"model-{i:05d}-of-{len(parts):05d}.safetensors": part
        for i, part in enumerate(parts, 1)
    }


def _write_shard(
    file: Path, rows: list[Row], read: Callable[[str], np.ndarray], dtype: str
) -> None:
    tensors = {}
    for row in rows:
        with np.errstate(over="ignore"):
            joined = row.join([read(path) for path in row.params])
            tensor = joined.astype(dtype, copy=False)
        if not np.isfinite(tensor).all():
            raise CheckpointError(
                f"{', '.join(row.params)} ({row.name}): not all numbers are finite in {dtype}"
            )
        tensors[row.name] = tensor
    # The library creates files that only their owner can read.
    with paths.usual_mode(file):
        save_file(tensors, file, metadata={"format": "pt"})


def _index(shards: Mapping[str, list[Row]], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Returns the content of the index file."""
    files = {row.name: file for file, part in shards.items() for row in part}
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
