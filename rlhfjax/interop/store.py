"""Our own models on disk: `config.json` (shape and head), `params/` (arrays) and the tokenizer's files."""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from rlhfjax import checkpoint, hosts, paths, state
from rlhfjax.config import build, write_json
from rlhfjax.data.tokenizer import Tokenizer, load_tokenizer
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop import foreign
from rlhfjax.mesh import Layout
from rlhfjax.models import quantized
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.kernels import PLATFORMS
from rlhfjax.models.transformer import Model, stacked, unstacked
from rlhfjax.paths import Path
from rlhfjax.types import PyTree

log = logging.getLogger("rlhfjax")
FOLDER = "model"
REWARD = (
    "reward.json"  # what a stage that describes a reward leaves: {"kind": ..., ...}
)


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A model with its parameters and the tokenizer that it speaks."""

    model: Model
    params: PyTree
    tokenizer: Tokenizer


def save(folder: Path, saved: SavedModel) -> None:
    """Writes a model; `config.json` comes last, so that a folder that has one is whole."""

    def begin() -> None:
        paths.make_folder(folder)
        (folder / "config.json").unlink(missing_ok=True)

    def end() -> None:
        saved.tokenizer.save(folder)
        description = {
            "head": saved.model.head,
            "transformer": dataclasses.asdict(saved.model.config),
        }
        write_json(folder / "config.json", description)

    hosts.share(begin)
    checkpoint.save_tree(folder / "params", saved.params)
    hosts.share(end)


class Opened(NamedTuple):
    """A model whose parameters are not read yet."""

    model: Model
    tokenizer: Tokenizer
    params: Callable[[], PyTree]  # reads them straight into their shards


def load(path: str | Path, layout: Layout) -> SavedModel:
    """Reads a model straight into its shards: its folder, the workdir of the stage that made it, or a foreign name.

    A model that was trained with a kernel which these devices lack is read as one with our own attention.

    Raises:
      CheckpointError: there is no whole model, or its parameters are damaged.
    """
    opened = open_model(path, layout)
    return SavedModel(opened.model, opened.params(), opened.tokenizer)


def open_model(
    path: str | Path,
    layout: Layout,
    changes: Mapping[str, Any] | None = None,
    context: str = "",
) -> Opened:
    """Returns the model that `load` would read, without its parameters.

    Args:
      changes: other options of its model_config; layers are stacked or taken apart as `scan_layers` says.
      context: where `changes` stand, for an error.
    Raises:
      ConfigError: an option that there is not, or one that makes another model of it.
      CheckpointError: as `load` does.
    """
    if there := foreign.find(path):
        model, tokenizer = there.model, there.tokenizer()

        def read() -> PyTree:
            return there.params(layout)
    else:
        folder = find(path)
        model, tokenizer = (
            _here(describe(folder), layout, folder),
            load_tokenizer(folder),
        )

        def read() -> PyTree:
            abstract = state.abstract(model.shapes(), model.axes(), layout)
            return checkpoint.load_tree(folder / "params", abstract)

    other = overridden(model, changes or {}, context)
    return Opened(other, tokenizer, lambda: _restacked(read(), model, other))


def _here(model: Model, layout: Layout, folder: Path) -> Model:
    kernel, platform = model.config.attention, layout.platform
    if platform in PLATFORMS[kernel]:
        return model
    log.warning(
        "%s: these %s devices have no %r attention; read as 'einsum', the same function",
        folder,
        platform,
        kernel,
    )
    return dataclasses.replace(
        model, config=dataclasses.replace(model.config, attention="einsum")
    )


def overridden(model: Model, changes: Mapping[str, Any], context: str) -> Model:
    """Returns the model with other options.

    Raises:
      ConfigError: an option that there is not, or one that makes another model of it.
    """
    if not changes:
        return model
    config = build(
        TransformerConfig, dataclasses.asdict(model.config) | dict(changes), context
    )
    other = dataclasses.replace(model, config=config)
    given = jax.eval_shape(
        lambda params: _restacked(params, model, other), model.shapes()
    )
    if other.shapes() != given:
        names = ", ".join(sorted(changes))
        raise ConfigError(
            f"{context}: {names} would make another model of it, of other parameters"
        )
    return other


def _restacked(params: PyTree, model: Model, other: Model) -> PyTree:
    """Returns the parameters of a model with its layers as `other` has them."""
    if model.config.scan_layers == other.config.scan_layers:
        return params
    return (stacked if other.config.scan_layers else unstacked)(params)


def int8(saved: SavedModel) -> SavedModel:
    """The model to sample from with int8 weights and an int8 cache; see `models.quantized`, which has the error."""
    params = jax.jit(lambda params: quantized.weights(params, saved.model.axes()))(
        saved.params
    )
    return SavedModel(
        dataclasses.replace(saved.model, int8_cache=True), params, saved.tokenizer
    )


def describe(path: str | Path) -> Model:
    """What `load` would read, without its parameters. Raises CheckpointError as it does."""
    if there := foreign.find(path):
        return there.model
    folder = find(path)
    description = json.loads((folder / "config.json").read_text())
    return Model(
        build(TransformerConfig, description["transformer"], f"{folder}/config.json"),
        description["head"],
    )


def described(path: str) -> dict[str, Any] | None:
    """Returns what a `reward.json` says; None where there is none."""
    file = paths.path(path) / REWARD
    return json.loads(file.read_text()) if file.is_file() else None


tokenizer = load_tokenizer  # with the functions above, what `roles.Sources` asks for


def found(path: str | Path) -> str:
    """Which model `load` would read, for people. Raises CheckpointError as it does."""
    return str(path) if foreign.find(path) else str(find(path))


def numbered(workdir: Path) -> list[Path]:
    """The folders NN_name of a recipe's stages, in order."""
    return [
        folder for folder in paths.children(workdir) if re.match(r"\d\d_", folder.name)
    ]


def find(path: str | Path) -> Path:
    """The folder of a model: the path itself, its `model/`, or that of the last stage of a recipe that has one.

    Raises:
      CheckpointError: none of them holds a model.
    """
    path = paths.path(path)
    candidates = [
        path,
        path / FOLDER,
        *(stage / FOLDER for stage in reversed(numbered(path))),
    ]
    for folder in candidates:
        if (folder / "config.json").exists() and (folder / "params").exists():
            return folder
    raise CheckpointError(
        f"{path}: no model here; expected a stage's workdir, a recipe's, or a folder with params/"
    )
