"""Adapters from and to PEFT's directories: adapter_config.json and adapter_model.safetensors.

    save_peft("adapter", model, adapters)          # PeftModel.from_pretrained(their_model, "adapter")
    model, adapters = load_peft("adapter", model)  # model: of the base; returned with the adapters' LoraConfig

Their lora_A [r, in] and lora_B [out, r] are our `lora_a` and `lora_b` transposed. Where a tensor of theirs holds
several of ours side by side (GPT-2's c_attn, GPT-NeoX's query_key_value), n adapters of rank r are one of rank n r:
  [A_q B_q | A_k B_k | A_v B_v] = [A_q A_k A_v] diag(B_q, B_k, B_v), exactly, and alpha is n times ours.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from rlhfjax import paths
from rlhfjax.config import build, write_json
from rlhfjax.errors import CheckpointError, ConfigError, first_line
from rlhfjax.interop import hf_config
from rlhfjax.interop.names import TABLES, Row, nested, shapes_of
from rlhfjax.models import Model, lora
from rlhfjax.models.lora import LoraConfig
from rlhfjax.paths import Path

Params = dict[str, Any]
Place = tuple[int, str]  # a layer, and a projection such as attention/query
Adapter = tuple[np.ndarray, np.ndarray]  # a [in…, r], b [r, out…]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SCORE = f"{PREFIX}score.weight"
BIAS = "rlhfjax_reward_bias"  # in the file's metadata: the constant of a reward, for which their score has no place
PLAIN = {
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "peft_type": "LORA",
}  # all that we read


@dataclasses.dataclass(frozen=True)
class _Module:
    """One of their linear layers: its name, what it holds of ours, and where that is."""

    name: str
    row: Row
    ours: tuple[Place, ...]

    def join(self, parts: list[Adapter | None]) -> Adapter:
        """Theirs, (lora_A, lora_B), from ours; None where ours has no adapter."""
        have = [part for part in parts if part is not None]
        rank, out = have[0][1].shape[0], have[0][1].shape[1:]
        blocks, segment = [], 0
        for part in parts:
            block = np.zeros((rank * len(have), *out), np.float32)
            if part is not None:
                block[segment : segment + rank] = part[1]
                segment += rank
            blocks.append(block)
        a = np.concatenate([part[0].reshape(-1, rank).T for part in have])
        return np.ascontiguousarray(a), self._row().join(blocks)

    def split(
        self, theirs: Adapter, rank: int, shapes: list[tuple[int, ...]]
    ) -> list[Adapter | None]:
        """The inverse of `join`; one of rank r that its parts share is an adapter of each of them."""
        a, b = theirs
        n = a.shape[0] // rank
        blocks = self._row().split(
            b, [(a.shape[0], *shape[self.row.inputs :]) for shape in shapes]
        )
        pieces = [block.reshape(n, rank, *block.shape[1:]) for block in blocks]
        used = [[i for i in range(n) if piece[i].any()] for piece in pieces]
        if not any(used):  # as it was born, with B = 0
            used = [[i] for i in range(n)] if n == len(pieces) else [[0]] * len(pieces)
        if a.shape[0] % rank or max(map(len, used)) > 1:
            raise CheckpointError(
                f"{self.name}: an adapter of rank {a.shape[0]} is not one of rank {rank} a part"
            )
        inputs = [shape[: self.row.inputs] for shape in shapes]
        return [
            (a[i[0] * rank : (i[0] + 1) * rank].T.reshape(*width, rank), piece[i[0]])
            if i
            else None
            for i, piece, width in zip(used, pieces, inputs, strict=True)
        ]

    def _row(self) -> Row:
        """How lora_B [out, r] lies: as the weight, but with the rank as its one input, and out first everywhere."""
        return dataclasses.replace(self.row, inputs=1, out_first=True)


def save_peft(
    folder: Path, model: Model, adapters: Params, base: str | None = None
) -> None:
    """Writes the adapters of a model, and a reward's head as the `score` that is saved with them.

    Args:
      model: with the LoraConfig of the adapters.
      adapters: what a stage with `lora` trains, in this process's memory; layers stacked or not.
      base: a name for the model that they belong to.
    Raises:
      ConfigError: no architecture that PEFT knows is such a model.
    """
    family, modules = _modules(model)
    found = _unstacked(model, adapters)
    tensors, ranks = {}, {}
    for module in modules:
        parts = [found.get(place) for place in module.ours]
        if any(part is not None for part in parts):
            a, b = module.join(parts)
            tensors |= {
                f"{PREFIX}{module.name}.lora_A.weight": a,
                f"{PREFIX}{module.name}.lora_B.weight": b,
            }
            ranks[module.name] = a.shape[0]
    metadata = {"format": "pt"}
    if model.head == "scalar":
        tensors[SCORE] = np.asarray(adapters["head"]["kernel"], np.float32)[None]
        metadata[BIAS] = repr(float(adapters["head"]["bias"]))
    paths.make_folder(folder)
    paths.write(folder / WEIGHTS, save(tensors, metadata))
    write_json(folder / CONFIG, _describe(model, family, ranks, base))


def load_peft(folder: str | Path, model: Model) -> tuple[Model, Params]:
    """The adapters in a PEFT directory for a model, in numpy, and the model with their LoraConfig.

    Raises:
      CheckpointError: a file is missing or damaged; adapters of a kind, rank or scale that ours are not; a tensor that
        the model has no place for. One line with the file and the name.
      ConfigError: no architecture that PEFT knows is such a model.
    """
    folder = paths.path(folder)
    said, tensors, bias = _read(folder)
    for key, value in PLAIN.items():
        if said.get(key, value) != value:
            raise CheckpointError(
                f"{folder / CONFIG}: {key} is {said[key]!r}: accepted is {value!r}"
            )
    rank, alpha = said["r"], said["lora_alpha"]
    shapes = _shapes(model)
    found: dict[Place, Adapter] = {}
    for module in _modules(model)[1]:
        names = [f"{PREFIX}{module.name}.lora_{letter}.weight" for letter in "AB"]
        if names[0] in tensors and names[1] in tensors:
            _check_scale(folder, module.name, said)
            theirs = tuple(np.asarray(tensors.pop(name), np.float32) for name in names)
            parts = module.split(
                theirs, rank, [shapes[name] for _, name in module.ours]
            )
            found |= {
                place: part
                for place, part in zip(module.ours, parts, strict=True)
                if part is not None
            }
    head = {}
    if model.head == "scalar" and SCORE in tensors:
        head = {
            "head": {
                "kernel": np.asarray(tensors.pop(SCORE), np.float32)[0],
                "bias": np.float32(bias),
            }
        }
    if tensors or not found:
        raise CheckpointError(
            f"{folder / WEIGHTS}: this model has no place for {next(iter(tensors), 'no adapter')}"
        )
    targets = _targets(model, set(found))
    values = {
        "rank": rank,
        "alpha": alpha,
        "targets": targets,
        "dropout": said.get("lora_dropout", 0.0),
    }
    config = build(LoraConfig, values, str(folder / CONFIG))
    return dataclasses.replace(model, lora=config), _stacked(model, found) | head


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], float]:
    try:
        said = json.loads((folder / CONFIG).read_text())
        weights = paths.local(folder / WEIGHTS)
        tensors, metadata = load_file(weights), _metadata(weights)
        return (
            {"r": said["r"], "lora_alpha": said["lora_alpha"], **said},
            tensors,
            float(metadata.get(BIAS, 0.0)),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise CheckpointError(
            f"{folder}: no whole PEFT adapter, {CONFIG} and {WEIGHTS} ({first_line(e)})",
        ) from None


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def _modules(model: Model) -> tuple[str, list[_Module]]:
    """The family, and every linear layer of it."""
    family, _ = hf_config.write(Model(model.config), "float32", {})
    table = TABLES[family]
    kernels = [row for row in table.layer if row.ours[0].endswith("/kernel")]
    return family, [
        _Module(
            table.prefix
            + table.layers.format(i=i)
            + row.theirs.removesuffix(".weight"),
            row,
            tuple((i, path.removesuffix("/kernel")) for path in row.ours),
        )
        for i in range(model.config.n_layers)
        for row in kernels
    ]


def _describe(
    model: Model, family: str, ranks: dict[str, int], base: str | None
) -> dict[str, Any]:
    c = model.lora
    names = {name.rsplit(".", 1)[-1] for name in ranks}
    every = [
        module.name
        for module in _modules(model)[1]
        if module.name.rsplit(".", 1)[-1] in names
    ]
    wider = {name: rank for name, rank in ranks.items() if rank != c.rank}
    return {
        **PLAIN,
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM" if model.head == "lm" else "SEQ_CLS",
        "r": c.rank,
        "lora_alpha": c.alpha,
        "lora_dropout": c.dropout,
        "target_modules": sorted(names) if len(every) == len(ranks) else list(ranks),
        "rank_pattern": wider,
        "alpha_pattern": {name: c.scale * rank for name, rank in wider.items()},
        "fan_in_fan_out": family in ("gpt2", "openai-gpt"),
        "modules_to_save": ["score"] if model.head == "scalar" else None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _check_scale(folder: Path, name: str, said: dict[str, Any]) -> None:
    def pattern(key, default):
        return next(
            (
                x
                for end, x in (said.get(key) or {}).items()
                if f".{name}".endswith(f".{end}")
            ),
            default,
        )

    scale = pattern("alpha_pattern", said["lora_alpha"]) / pattern(
        "rank_pattern", said["r"]
    )
    if not np.isclose(scale, said["lora_alpha"] / said["r"]):
        raise CheckpointError(
            f"{folder / CONFIG}: {name} has a scale of its own, {scale}, where ours have one for all"
        )


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Of the kernels of a layer, by projection."""
    start, shapes = (
        "backbone/layers/layer_0/",
        shapes_of(Model(dataclasses.replace(model.config, scan_layers=False))),
    )
    kernels = {
        path: shape
        for path, shape in shapes.items()
        if path.startswith(start) and path.endswith("/kernel")
    }
    return {
        path.removeprefix(start).removesuffix("/kernel"): shape
        for path, shape in kernels.items()
    }


def _targets(model: Model, places: set[Place]) -> str:
    """A regular expression that is found in the paths of exactly these projections."""
    names = {name for _, name in places}
    if len(places) == len(names) * model.config.n_layers:
        return "|".join(sorted(names))
    if model.config.scan_layers:
        raise ConfigError(
            "adapters in some layers alone do not go with scan_layers, where all layers are one"
        )
    return "|".join(sorted(f"layer_{i}/{name}$" for i, name in places))


def _unstacked(model: Model, adapters: Params) -> dict[Place, Adapter]:
    """Every adapter of a tree by its place."""
    layers = adapters["backbone"]["layers"]
    if model.config.scan_layers:
        found = dict(_pairs(layers, ()))
        return {
            (i, name): (a[i], b[i])
            for name, (a, b) in found.items()
            for i in range(model.config.n_layers)
        }
    return {
        (int(k.split("_")[1]), name): pair
        for k, layer in layers.items()
        for name, pair in _pairs(layer, ())
    }


def _pairs(tree: Params, path: tuple[str, ...]) -> Iterator[tuple[str, Adapter]]:
    if lora.NAMES[0] in tree:
        yield (
            "/".join(path),
            tuple(np.asarray(tree[name], np.float32) for name in lora.NAMES),
        )
        return
    for name, inner in tree.items():
        yield from _pairs(inner, (*path, name))


def _stacked(model: Model, found: dict[Place, Adapter]) -> Params:
    """The inverse of `_unstacked`."""
    if model.config.scan_layers:
        names, layers = {name for _, name in found}, range(model.config.n_layers)
        paths = {
            name: [
                np.stack(x) for x in zip(*(found[i, name] for i in layers), strict=True)
            ]
            for name in names
        }
    else:
        paths = {f"layer_{i}/{name}": pair for (i, name), pair in found.items()}
    leaves = {
        f"{path}/{name}": x
        for path, pair in paths.items()
        for name, x in zip(lora.NAMES, pair, strict=True)
    }
    return {"backbone": {"layers": nested(leaves)}}
