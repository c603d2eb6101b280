"""The modules of a PEFT folder: their tensors, and how our projections lie in them."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pydantic

from rlhfjax import ranges
from rlhfjax.errors import CheckpointError
from rlhfjax.interop import hf, hf_config, names, peft_config
from rlhfjax.interop.hf_tables import TABLES
from rlhfjax.interop.names import Row, Shape
from rlhfjax.interop.peft_config import CONFIG, AdapterConfig
from rlhfjax.interop.safetensors_file import open_safetensors
from rlhfjax.json_text import named, shown
from rlhfjax.models import Model
from rlhfjax.paths import Path

Params = dict[str, Any]
Adapter = tuple[np.ndarray, np.ndarray]  # lora_a [in..., r] and lora_b [r, out...]

WEIGHTS = "adapter_model.safetensors"
DTYPES = (*hf.DTYPES.values(), "F64")
PREFIX = "base_model.model."
SCORE = f"{PREFIX}score.weight"
LAYERS, KERNEL = "backbone/layers/", "/kernel"
# In the weights' metadata: the constant of a reward, which PEFT's score cannot express.
BIAS = "rlhfjax_reward_bias"
PICKLED = "adapter_model.bin"
_FLOAT32 = pydantic.TypeAdapter(ranges.Finite)


class Content(NamedTuple):
    """The content of a PEFT folder."""

    folder: Path
    config: AdapterConfig
    tensors: dict[str, np.ndarray]
    constant: float
    """The constant of a reward."""


class Modules(NamedTuple):
    """The adapters of a PEFT folder by the modules of a base model."""

    config: AdapterConfig
    pairs: list[tuple[Row, np.ndarray, np.ndarray]]
    """Each module's row, lora_A [r, in] and lora_B [out, r]."""
    head: Params
    """The scalar head of a reward model; empty if there is none."""
    shapes: Mapping[str, Shape]
    """Shapes of the base's parameters by path."""


def read(folder: Path) -> Content:
    """Returns the content of a PEFT folder.

    Raises:
      CheckpointError: a file is missing or damaged, or the adapter is of another kind.
    """
    validate_whole(folder)
    config = peft_config.read(folder / CONFIG)
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
    return Content(folder, config, tensors, constant)


def validate_whole(folder: Path) -> None:
    """Raises CheckpointError if one of the two files is missing."""
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


def modules_of(content: Content, model: Model) -> Modules:
    """Returns the adapters by the modules of a base model; their ranks and scales may differ.

    Raises:
      CheckpointError: the model has no place for a tensor, or it has another shape.
      ConfigError: no architecture that PEFT knows expresses the model.
    """
    config, tensors = content.config, dict(content.tensors)
    _, rows, shapes = projections(model, tensors)
    weights = content.folder / WEIGHTS
    pairs = []
    for row in rows:
        present = [name for name in tensor_names(row) if name in tensors]
        if len(present) == 2:
            a, b = (np.asarray(tensors.pop(name), np.float32) for name in present)
            _validate_shapes(weights, row, a, b, shapes)
            _validate_rank(weights, config, module_name(row), len(a))
            pairs.append((row, a, b))
    head = {}
    if model.head == "scalar" and SCORE in tensors:
        score = np.asarray(tensors.pop(SCORE), np.float32)
        _validate_shape(weights, SCORE, score, (1, model.config.d_model))
        head = {"head": {"kernel": score[0], "bias": np.float32(content.constant)}}
    if tensors:
        raise _no_place(weights, min(tensors), config)
    if not pairs:
        raise CheckpointError(f"{weights}: there is no adapter in it")
    return Modules(config, pairs, head, shapes)


def projections(
    model: Model, tensors: Collection[str] = ()
) -> tuple[str, list[Row], dict[str, Shape]]:
    """Returns the family, the rows of all kernels in layers, and their parameters' shapes.

    Args:
      tensors: names in a file. Families may compute the same and name their modules differently,
        as Llama and Phi-3 do; the first that has these modules counts, or else the first.
    """
    config = dataclasses.replace(model.config, scan_layers=False)
    shapes = names.shapes_of(Model(config))
    adapters = {name for name in tensors if ".lora_" in name}
    candidates = []
    for family, _ in hf_config.families_of(config):
        rows = _kernel_rows(TABLES[family], shapes)
        candidates.append((family, rows, shapes))
        if adapters <= {name for row in rows for name in tensor_names(row)}:
            return candidates[-1]
    return candidates[0]


def _kernel_rows(table: names.Table, shapes: Mapping[str, Shape]) -> list[Row]:
    return [
        row
        for row in names.rows(table, "lm", shapes)
        if row.params[0].startswith(LAYERS) and row.params[0].endswith(KERNEL)
    ]


def module_name(row: Row) -> str:
    """Returns the name of a linear layer in `transformers`."""
    return row.name.removesuffix(".weight")


def tensor_names(row: Row) -> list[str]:
    """Returns the names of lora_A and lora_B."""
    return [f"{PREFIX}{module_name(row)}.lora_{letter}.weight" for letter in "AB"]


def _validate_rank(path: Path, config: AdapterConfig, module: str, rank: int) -> None:
    """Raises CheckpointError if a module's tensors have another rank than the config says."""
    if rank != config.rank_of(module):
        raise CheckpointError(
            f"{path}: {module} has rank {rank}, and by {CONFIG} {config.rank_of(module)}"
        )


def _validate_shapes(
    path: Path, row: Row, a: np.ndarray, b: np.ndarray, shapes: Mapping[str, Shape]
) -> None:
    """Raises CheckpointError if the tensors are an adapter of another module."""
    parts = [shapes[name] for name in row.params]
    n_in = math.prod(parts[0][: row.inputs])
    n_out = sum(math.prod(part[row.inputs :]) for part in parts)
    rank = len(a) if a.ndim else 0
    name_a, name_b = tensor_names(row)
    _validate_shape(path, name_a, a, (max(rank, 1), n_in))
    _validate_shape(path, name_b, b, (n_out, rank))


def _validate_shape(path: Path, name: str, array: np.ndarray, shape: Shape) -> None:
    if array.shape != shape:
        raise CheckpointError(
            f"{path}: {name} is {list(array.shape)}, and by the model {list(shape)}"
        )


def _no_place(path: Path, name: str, config: AdapterConfig) -> CheckpointError:
    """Returns the error for a tensor that is left."""
    for module in config.modules_to_save:
        if f".{module}." in name:
            return CheckpointError(
                f"{path}: this model has no place for {named(name)}, which is there because "
                f"modules_to_save has {module!r}: accepted is the score of a reward model"
            )
    return CheckpointError(f"{path}: this model has no place for {named(name)}")


def shape_a(row: Row, a: np.ndarray, shape: Shape) -> np.ndarray:
    """Returns lora_A [r, in] as our lora_a [in..., r], given the shape of its kernel."""
    return a.T.reshape(*shape[: row.inputs], len(a))


def join(
    row: Row, parts: Sequence[Adapter | None], shapes: Mapping[str, Shape]
) -> Adapter:
    """Returns lora_A and lora_B of one module from our adapters; None where there is none."""
    present = [part for part in parts if part is not None]
    rank = len(present[0][1])
    blocks = []
    start = 0
    for path, part in zip(row.params, parts, strict=True):
        out = shapes[path][row.inputs :]
        block = np.zeros((rank * len(present), *out), np.float32)
        if part is not None:
            block[start : start + rank] = part[1]
            start += rank
        blocks.append(block)
    a = np.concatenate([a.reshape(-1, rank).T for a, _ in present])
    return np.ascontiguousarray(a), _b_row(row).join(blocks)


def split_b(
    row: Row, b: np.ndarray, shapes: Mapping[str, Shape]
) -> dict[str, np.ndarray]:
    """Returns lora_B [out, r] as our lora_b [r, out...] by the paths of the module's kernels."""
    rank = b.shape[1]
    b_shapes = [(rank, *shapes[path][row.inputs :]) for path in row.params]
    return dict(zip(row.params, _b_row(row).split(b, b_shapes), strict=True))


def _b_row(row: Row) -> Row:
    """Returns the row of lora_B: as the kernel's, but [out, r] in every family."""
    return dataclasses.replace(row, inputs=1, out_first=True)
