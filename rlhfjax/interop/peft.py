"""Adapters from and to PEFT folders: adapter_config.json and adapter_model.safetensors.

    save_peft("adapter", model, adapters)          # PeftModel.from_pretrained(base, "adapter")
    model, adapters = load_peft("adapter", model)  # the base in, the base with a LoraConfig out

PEFT's lora_A [r, in] and lora_B [out, r] are our `lora_a` and `lora_b` transposed. Where one of its
modules holds several of our projections (GPT-2's c_attn, GPT-NeoX's query_key_value), n adapters of
rank r are one adapter of rank n r, exactly, with n times our alpha:
  [A_q B_q | A_k B_k | A_v B_v] = [A_q A_k A_v] diag(B_q, B_k, B_v)
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pydantic
from safetensors.numpy import save

from rlhfjax import json_text, paths, ranges
from rlhfjax.config import build, write_json
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop import hf, hf_config, names
from rlhfjax.interop.names import Row, Shape
from rlhfjax.interop.safetensors_file import open_safetensors
from rlhfjax.json_text import named, shown
from rlhfjax.models import Model, lora
from rlhfjax.models.lora import LoraConfig
from rlhfjax.models.transformer import stacked
from rlhfjax.paths import Path

Params = dict[str, Any]
Adapter = tuple[np.ndarray, np.ndarray]  # lora_a [in..., r] and lora_b [r, out...]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DTYPES = (*hf.DTYPES.values(), "F64")
PREFIX = "base_model.model."
SCORE = f"{PREFIX}score.weight"
LAYERS, KERNEL = "backbone/layers/", "/kernel"
# In the weights' metadata: the constant of a reward, which PEFT's score cannot express.
BIAS = "rlhfjax_reward_bias"
PICKLED = "adapter_model.bin"
# Options of PEFT with the one value that we read and write.
PLAIN = {"bias": "none", "use_dora": False, "use_rslora": False, "peft_type": "LORA"}
# Options that change what an adapter computes; we read adapters without them and write none.
ABSENT = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
}
_FLOAT32 = pydantic.TypeAdapter(ranges.Finite)


# What is read of an adapter_config.json, and its types. Other options change nothing.
READ = {
    "r": ranges.Size,
    "lora_alpha": ranges.Positive,
    "lora_dropout": ranges.ShareBelow1 | None,
    "rank_pattern": dict[str, ranges.Size] | None,
    "alpha_pattern": dict[str, ranges.Positive] | None,
    "modules_to_save": list[str] | None,
}


def save_peft(
    folder: Path, model: Model, adapters: Params, base: str | None = None
) -> None:
    """Writes a model's adapters, and a reward model's head as the `score` saved with them.

    Args:
      model: its `lora` describes the adapters.
      adapters: what a stage with `lora` trains, in this process's memory, layers stacked or not.
      base: name of the base model.
    Raises:
      ConfigError: no architecture that PEFT knows expresses the model.
    """
    family, rows, _ = _projections(model)
    by_kernel = _by_kernel(model, adapters)
    tensors, ranks = {}, {}
    for row in rows:
        parts = [by_kernel.get(path) for path in row.params]
        if any(part is not None for part in parts):
            a, b = _join(row, parts)
            name_a, name_b = _tensor_names(row)
            tensors[name_a] = a
            tensors[name_b] = b
            ranks[_module(row)] = len(a)
    metadata = {"format": "pt"}
    if model.head == "scalar":
        tensors[SCORE] = np.asarray(adapters["head"]["kernel"], np.float32)[None]
        metadata[BIAS] = repr(float(adapters["head"]["bias"]))
    modules = [_module(row) for row in rows]
    config = _describe(model, modules, ranks)
    config["fan_in_fan_out"] = family in ("gpt2", "openai-gpt")
    config["base_model_name_or_path"] = base
    paths.make_folder(folder)
    paths.write(folder / WEIGHTS, save(tensors, metadata))
    write_json(folder / CONFIG, config)


def load_peft(folder: str | Path, model: Model) -> tuple[Model, Params]:
    """Returns the model with a LoraConfig, and the numpy adapters in a PEFT folder.

    Raises:
      CheckpointError: a file is missing or damaged; an adapter has a kind, rank or scale that ours
        cannot have; the model has no place for a tensor. Names the file and the tensor.
      ConfigError: no architecture that PEFT knows expresses the model.
    """
    folder = paths.path(folder)
    config, tensors, bias = _read(folder)
    rank = config["r"]
    _, rows, shapes = _projections(model)
    weights = folder / WEIGHTS
    by_kernel: dict[str, Adapter] = {}
    for row in rows:
        pair = [name for name in _tensor_names(row) if name in tensors]
        if len(pair) == 2:
            _validate_scale(folder, _module(row), config)
            a, b = (np.asarray(tensors.pop(name), np.float32) for name in pair)
            _validate_shapes(weights, row, a, b, shapes)
            by_kernel |= _split(weights, row, a, b, rank, shapes)
    head = {}
    if model.head == "scalar" and SCORE in tensors:
        score = np.asarray(tensors.pop(SCORE), np.float32)
        _validate_shape(weights, SCORE, score, (1, model.config.d_model))
        head = {"head": {"kernel": score[0], "bias": np.float32(bias)}}
    if tensors:
        raise _no_place(weights, min(tensors), config)
    if not by_kernel:
        raise CheckpointError(f"{weights}: there is no adapter in it")
    options = {
        "rank": rank,
        "alpha": config["lora_alpha"],
        "targets": _targets(model, by_kernel),
        "dropout": config.get("lora_dropout") or 0.0,
    }
    adapted = build(LoraConfig, options, str(folder / CONFIG))
    return dataclasses.replace(model, lora=adapted), _tree(model, by_kernel) | head


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], float]:
    """Returns the config, the tensors by name, and the constant of a reward."""
    if not (folder / WEIGHTS).exists() and (folder / PICKLED).exists():
        raise CheckpointError(
            f"{folder / PICKLED}: pickles are not read; in Python with peft: "
            "PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(NEW_FOLDER)"
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).exists():
            raise CheckpointError(
                f"{folder}: no whole PEFT adapter, {CONFIG} and {WEIGHTS}: there is no {name}"
            )
    config = _read_config(folder / CONFIG)
    file = open_safetensors(folder / WEIGHTS)
    tensors = {}
    for name in list(file.keys()):
        kind = file.get_slice(name).get_dtype()
        if kind not in DTYPES:
            accepted = ", ".join(DTYPES)
            raise CheckpointError(
                f"{folder / WEIGHTS}: {named(name)} is of type {kind}: accepted are {accepted}"
            )
        tensors[name] = file.get_tensor(name)
    bias = (file.metadata() or {}).get(BIAS, "0.0")
    try:
        constant = _FLOAT32.validate_strings(bias)
    except pydantic.ValidationError:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {BIAS} is {shown(bias)}: expected a float32"
        ) from None
    return config, tensors, constant


def _read_config(path: Path) -> dict[str, Any]:
    """Returns an adapter_config.json of an adapter that ours can express."""
    content = json_text.read_object(path, error=CheckpointError)
    for key, value in (PLAIN | ABSENT).items():
        given = content.get(key)
        if given is not None and (given != value or type(given) is not type(value)):
            raise CheckpointError(
                f"{path}: {key} is {shown(given)}: accepted is {value!r}"
            )
    for key in ("r", "lora_alpha"):
        if key not in content:
            raise CheckpointError(f"{path}: there is no {key}")
    return {
        key: json_text.validate(
            content.get(key), f"{path}: {key}", hint, error=CheckpointError
        )
        for key, hint in READ.items()
    }


def _projections(model: Model) -> tuple[str, list[Row], dict[str, Shape]]:
    """Returns the family, the rows of all kernels in layers, and their parameters' shapes."""
    plain = Model(dataclasses.replace(model.config, scan_layers=False))
    family, _ = hf_config.write(plain, "float32", {})
    shapes = names.shapes_of(plain)
    rows = [
        row
        for row in names.rows(names.TABLES[family], "lm", shapes)
        if row.params[0].startswith(LAYERS) and row.params[0].endswith(KERNEL)
    ]
    return family, rows, shapes


def _module(row: Row) -> str:
    """Returns the name of a linear layer in `transformers`."""
    return row.name.removesuffix(".weight")


def _tensor_names(row: Row) -> list[str]:
    """Returns the names of lora_A and lora_B."""
    return [f"{PREFIX}{_module(row)}.lora_{letter}.weight" for letter in "AB"]


def _join(row: Row, parts: Sequence[Adapter | None]) -> Adapter:
    """Returns lora_A and lora_B of one module from our adapters; None where there is none."""
    present = [part for part in parts if part is not None]
    rank, *out = present[0][1].shape
    blocks = []
    start = 0
    for part in parts:
        block = np.zeros((rank * len(present), *out), np.float32)
        if part is not None:
            block[start : start + rank] = part[1]
            start += rank
        blocks.append(block)
    a = np.concatenate([a.reshape(-1, rank).T for a, _ in present])
    return np.ascontiguousarray(a), _b_row(row).join(blocks)


def _validate_shapes(
    path: Path, row: Row, a: np.ndarray, b: np.ndarray, shapes: Mapping[str, Shape]
) -> None:
    """Raises CheckpointError if the tensors are an adapter of another module."""
    parts = [shapes[name] for name in row.params]
    n_in = math.prod(parts[0][: row.inputs])
    n_out = len(parts) * math.prod(parts[0][row.inputs :])
    rank = len(a) if a.ndim else 0
    name_a, name_b = _tensor_names(row)
    _validate_shape(path, name_a, a, (max(rank, 1), n_in))
    _validate_shape(path, name_b, b, (n_out, rank))


def _validate_shape(path: Path, name: str, array: np.ndarray, shape: Shape) -> None:
    if array.shape != shape:
        raise CheckpointError(
            f"{path}: {name} is {list(array.shape)}, and by the model {list(shape)}"
        )


def _no_place(path: Path, name: str, config: Mapping[str, Any]) -> CheckpointError:
    """Returns the error for a tensor that is left."""
    for module in config.get("modules_to_save") or ():
        if f".{module}." in name:
            return CheckpointError(
                f"{path}: this model has no place for {named(name)}, which is there because "
                f"modules_to_save has {module!r}: accepted is the score of a reward model"
            )
    return CheckpointError(f"{path}: this model has no place for {named(name)}")


def _split(
    file: Path,
    row: Row,
    a: np.ndarray,
    b: np.ndarray,
    rank: int,
    shapes: Mapping[str, Shape],
) -> dict[str, Adapter]:
    """Returns the adapters in one module by the path of their kernel; the inverse of `_join`.

    An adapter of rank r on a whole fused module is an adapter of each of its projections.
    """
    total = len(a)
    if total % rank:
        raise _other_rank(file, row, total, rank)
    n = total // rank
    b_shapes = [(total, *shapes[path][row.inputs :]) for path in row.params]
    blocks = [
        block.reshape(n, rank, *block.shape[1:])
        for block in _b_row(row).split(b, b_shapes)
    ]
    # Which of the n parts of rank r each projection uses.
    used = [[i for i in range(n) if block[i].any()] for block in blocks]
    if not any(used):  # fresh adapters, with B = 0
        used = [[i] for i in range(n)] if n == len(blocks) else [[0]] * len(blocks)
    if max(map(len, used)) > 1:
        raise _other_rank(file, row, total, rank)
    adapters = {}
    for path, block, indices in zip(row.params, blocks, used, strict=True):
        for i in indices:
            part = a[i * rank : (i + 1) * rank]
            inputs = shapes[path][: row.inputs]
            adapters[path] = part.T.reshape(*inputs, rank), block[i]
    return adapters


def _other_rank(path: Path, row: Row, total: int, rank: int) -> CheckpointError:
    return CheckpointError(
        f"{path}: {_module(row)}: an adapter of rank {total} is not one of rank {rank} per part"
    )


def _b_row(row: Row) -> Row:
    """Returns the row of lora_B: as the kernel's, but [out, r] in every family."""
    return dataclasses.replace(row, inputs=1, out_first=True)


def _describe(
    model: Model, modules: Sequence[str], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """Returns an adapter_config.json.

    Args:
      modules: all linear layers.
      ranks: rank of each that has an adapter.
    """
    config = model.lora
    ends = {name.rsplit(".", 1)[-1] for name in ranks}
    matching = [name for name in modules if name.rsplit(".", 1)[-1] in ends]
    wider = {name: rank for name, rank in ranks.items() if rank != config.rank}
    return {
        **PLAIN,
        "task_type": "CAUSAL_LM" if model.head == "lm" else "SEQ_CLS",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(ends) if len(matching) == len(ranks) else list(ranks),
        "rank_pattern": wider,
        "alpha_pattern": {name: config.scale * rank for name, rank in wider.items()},
        "modules_to_save": ["score"] if model.head == "scalar" else None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _validate_scale(folder: Path, module: str, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a module's alpha / r is not that of all."""

    def pattern(key: str, default: str) -> float:
        for end, value in (config.get(key) or {}).items():
            if f".{module}".endswith(f".{end}"):
                return float(value)
        return float(config[default])

    scale = pattern("alpha_pattern", "lora_alpha") / pattern("rank_pattern", "r")
    if not np.isclose(scale, config["lora_alpha"] / config["r"]):
        raise CheckpointError(
            f"{folder / CONFIG}: {module} has its own scale, {scale}, "
            "where ours have one for all"
        )


def _targets(model: Model, kernels: Collection[str]) -> str:
    """Returns a regular expression that matches the paths of exactly these projections."""
    paths = [path.removeprefix(LAYERS).removesuffix(KERNEL) for path in kernels]
    in_layer = {path.partition("/")[2] for path in paths}
    if len(paths) == len(in_layer) * model.config.n_layers:
        return "|".join(sorted(in_layer))
    if model.config.scan_layers:
        raise ConfigError(
            "scan_layers stacks all layers: adapters in only some of them need scan_layers=False"
        )
    return "|".join(sorted(f"{path}$" for path in paths))


def _by_kernel(model: Model, adapters: Params) -> dict[str, Adapter]:
    """Returns the adapters in a tree by the path of their kernel, layers unstacked."""
    shapes, read = hf.unstacked_reader(model.config.scan_layers, adapters)
    name_a, name_b = (f"/{name}" for name in lora.NAMES)
    by_kernel = {}
    for path in shapes:
        start, is_a, _ = path.partition(name_a)
        if is_a:
            a, b = (
                np.asarray(read(start + name), np.float32) for name in (name_a, name_b)
            )
            by_kernel[start + KERNEL] = a, b
    return by_kernel


def _tree(model: Model, adapters: Mapping[str, Adapter]) -> Params:
    """Returns the tree of adapters; the inverse of `_by_kernel`."""
    leaves = {}
    for path, pair in adapters.items():
        start = path.removesuffix(KERNEL)
        for name, array in zip(lora.NAMES, pair, strict=True):
            leaves[f"{start}/{name}"] = array
    tree = names.nested(leaves)
    return jax.device_get(stacked(tree)) if model.config.scan_layers else tree
