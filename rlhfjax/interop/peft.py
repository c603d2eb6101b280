"""Adapters from and to PEFT folders: adapter_config.json and adapter_model.safetensors.

    save_peft("adapter", model, adapters)          # PeftModel.from_pretrained(base, "adapter")
    model, adapters = load_peft("adapter", model)  # the base in, the base with a LoraConfig out

PEFT's lora_A [r, in] and lora_B [out, r] are our `lora_a` and `lora_b` transposed. Where one of its
modules holds several of our projections (GPT-2's c_attn, GPT-NeoX's query_key_value), n adapters of
rank r are one adapter of rank n r, exactly, with n times our alpha:
  [A_q B_q | A_k B_k | A_v B_v] = [A_q A_k A_v] diag(B_q, B_k, B_v)
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save

from rlhfjax import paths
from rlhfjax.config import build, write_json
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop import hf, names
from rlhfjax.interop.names import Row, Shape
from rlhfjax.interop.peft_config import CONFIG, PLAIN, AdapterConfig
from rlhfjax.interop.peft_modules import (
    BIAS,
    KERNEL,
    LAYERS,
    SCORE,
    WEIGHTS,
    Adapter,
    Params,
    join,
    module_name,
    modules_of,
    projections,
    read,
    shape_a,
    split_b,
    tensor_names,
)
from rlhfjax.models import Model, lora
from rlhfjax.models.lora import LoraConfig
from rlhfjax.models.transformer import stacked
from rlhfjax.paths import Path

MERGE = "`rlhfjax import --adapter=…` merges them into their base"


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
    family, rows, shapes = projections(model)
    by_kernel = _by_kernel(model, adapters)
    tensors, ranks = {}, {}
    for row in rows:
        parts = [by_kernel.get(path) for path in row.params]
        if any(part is not None for part in parts):
            a, b = join(row, parts, shapes)
            name_a, name_b = tensor_names(row)
            tensors[name_a] = a
            tensors[name_b] = b
            ranks[module_name(row)] = len(a)
    metadata = {"format": "pt"}
    if model.head == "scalar":
        tensors[SCORE] = np.asarray(adapters["head"]["kernel"], np.float32)[None]
        metadata[BIAS] = repr(float(adapters["head"]["bias"]))
    modules = [module_name(row) for row in rows]
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
    content = read(paths.path(folder))
    config, pairs, head, shapes = modules_of(content, model)
    by_kernel: dict[str, Adapter] = {}
    for row, a, b in pairs:
        _validate_scale(config, module_name(row))
        by_kernel |= _split(config, row, a, b, shapes)
    options = {
        "rank": config.rank,
        "alpha": config.plain_alpha,
        "targets": _targets(model, by_kernel),
        "dropout": config.dropout,
    }
    adapted = build(LoraConfig, options, str(config.path))
    return dataclasses.replace(model, lora=adapted), tree_of(model, by_kernel) | head


def _split(
    config: AdapterConfig,
    row: Row,
    a: np.ndarray,
    b: np.ndarray,
    shapes: Mapping[str, Shape],
) -> dict[str, Adapter]:
    """Returns the adapters in one module by the path of their kernel; the inverse of `join`.

    An adapter of rank r on a whole fused module is an adapter of each of its projections.
    """
    rank = config.rank
    if len(a) % rank:
        raise _other_rank(config, row, len(a))
    n = len(a) // rank
    blocks = [
        block.reshape(n, rank, *block.shape[1:])
        for block in split_b(row, b, shapes).values()
    ]
    # Which of the n parts of rank r each projection uses.
    used = [[i for i in range(n) if block[i].any()] for block in blocks]
    if not any(used):  # fresh adapters, with B = 0
        used = [[i] for i in range(n)] if n == len(blocks) else [[0]] * len(blocks)
    if max(map(len, used)) > 1:
        raise _other_rank(config, row, len(a))
    adapters = {}
    for path, block, indices in zip(row.params, blocks, used, strict=True):
        for i in indices:
            part = a[i * rank : (i + 1) * rank]
            adapters[path] = shape_a(row, part, shapes[path]), block[i]
    return adapters


def _other_rank(config: AdapterConfig, row: Row, total: int) -> CheckpointError:
    return CheckpointError(
        f"{config.path}: {module_name(row)}: an adapter of rank {total} is not one of rank "
        f"{config.rank} per part; {MERGE}"
    )


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
        "use_rslora": False,
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


def _validate_scale(config: AdapterConfig, module: str) -> None:
    """Raises CheckpointError if a module's scale is not that of all."""
    scale = config.scale_of(module)
    if not np.isclose(scale, config.scale):
        raise CheckpointError(
            f"{config.path}: {module} has its own scale, {scale}, where adapters that are trained "
            f"have one for all; {MERGE}"
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


def tree_of(model: Model, adapters: Mapping[str, Adapter]) -> Params:
    """Returns the tree of adapters; the inverse of `_by_kernel`."""
    leaves = {}
    for path, pair in adapters.items():
        start = path.removesuffix(KERNEL)
        for name, array in zip(lora.NAMES, pair, strict=True):
            leaves[f"{start}/{name}"] = array
    tree = names.nested(leaves)
    return jax.device_get(stacked(tree)) if model.config.scan_layers else tree
