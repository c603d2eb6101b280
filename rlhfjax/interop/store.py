"""Our own models on disk.

config.json      model_config and head
params/          the weights, with a checksum per array
checksums.json   checksums of all other files
…                the tokenizer's files
"""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
from typing_extensions import TypedDict

from rlhfjax import checkpoint, hosts, json_text, paths, state, sums, workdirs
from rlhfjax.config import build, write_json
from rlhfjax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from rlhfjax.errors import CheckpointError, ConfigError, DataError
from rlhfjax.interop import foreign
from rlhfjax.interop.adapted import adapted
from rlhfjax.interop.foreign import Foreign
from rlhfjax.mesh import Layout
from rlhfjax.models import quantized
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.kernels import PLATFORMS
from rlhfjax.models.transformer import Model, stacked, unstacked
from rlhfjax.paths import Path
from rlhfjax.types import PyTree

log = logging.getLogger("rlhfjax")
FOLDER, CONFIG = "model", "config.json"
# Options of a model that may change when it is trained further: its context, regularization,
# precision, layout and speed. The others say what its parameters are, or compute.
CHANGEABLE = (
    "attention",
    "dropout",
    "dtype",
    "init_std",
    "max_length",
    "remat",
    "rope_scaling",
    "rope_theta",
    "scale_residual_init",
    "scan_layers",
)
# Written by a stage that describes a reward: {"kind": ..., ...}.
REWARD = "reward.json"


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A model with its parameters and its tokenizer."""

    model: Model
    params: PyTree
    tokenizer: Tokenizer


def save(folder: Path, saved: SavedModel) -> None:
    """Writes a model. `config.json` comes last, so that a folder that has one is whole."""

    def begin() -> None:
        paths.make_folder(folder)
        (folder / CONFIG).unlink(missing_ok=True)

    def end() -> None:
        saved.tokenizer.save(folder)
        description = {
            "head": saved.model.head,
            "transformer": dataclasses.asdict(saved.model.config),
        }
        sums.write(folder, tokenizer_files(folder), description)
        write_json(folder / CONFIG, description)

    hosts.share(begin)
    checkpoint.save_tree(folder / "params", saved.params)
    hosts.share(end)


class Opened(NamedTuple):
    """A model whose parameters are not read yet."""

    model: Model
    tokenizer: Tokenizer
    params: Callable[[], PyTree]  # reads them straight into their shards


def load(path: str | Path, layout: Layout, adapter: str = "") -> SavedModel:
    """Returns a model, its arrays read straight into their shards.

    A model trained with an attention kernel that these devices lack is read as one with "einsum".

    Args:
      path: the model's folder, the workdir of the stage that made it, or a foreign name.
      adapter: a PEFT folder, which is merged into the model; empty: none.
    Raises:
      CheckpointError: there is no whole model, or its parameters are damaged.
    """
    opened = open_model(path, layout, adapter=adapter)
    return SavedModel(opened.model, opened.params(), opened.tokenizer)


def open_model(
    path: str | Path,
    layout: Layout,
    changes: Mapping[str, Any] | None = None,
    context: str = "",
    adapter: str = "",
) -> Opened:
    """Returns the model that `load` would read, without its parameters.

    A language model samples only ids that its tokenizer has.

    Args:
      changes: options that replace those of its model_config. Layers are stacked or unstacked to
        match `scan_layers`.
      context: where `changes` stand, for an error.
      adapter: a PEFT folder, which is merged into the model; empty: none.
    Raises:
      ConfigError: an option does not exist or would change the parameters.
      CheckpointError: as `load` does.
    """
    found = _find(path)
    if adapter:
        found = adapted(found, adapter)
    model = _with_available_kernel(found.model, layout, path)
    other = overridden(model, changes or {}, context)
    if differences := _differences(model.config, other.config):
        log.info("%s: read with %s", path, differences)

    def params() -> PyTree:
        return _restacked(found.params(layout), model, other)

    tokenizer = found.tokenizer()
    if other.head == "lm":
        other = other.restricted(tokenizer.vocab_size)
    return Opened(other, tokenizer, params)


def _find(path: str | Path) -> Foreign:
    """Returns one of our models or a foreign one, of which no array is read yet."""
    if imported := foreign.find(path):
        return imported
    folder = find(path)
    model = _read_model(folder)

    def params(layout: Layout) -> PyTree:
        abstract = state.abstract(model.shapes(), model.axes(), layout)
        return checkpoint.load_tree(folder / "params", abstract)

    return Foreign(model, params, functools.partial(load_tokenizer, folder))


class _Description(TypedDict):
    """The content of a model's config.json."""

    head: Literal["lm", "scalar"]
    transformer: json_text.Object


def _read_model(folder: Path) -> Model:
    """Returns the model that config.json describes.

    Raises:
      CheckpointError: the file is damaged, or describes another model than was saved.
    """
    file = folder / CONFIG
    try:
        model = _model(json_text.read(file, json_text.Object), str(file))
        saved = sums.read(folder)
        if saved is None or "model" not in saved:
            return model
        expected = _model(saved["model"], f"{folder / sums.FILE}: model")
        _validate_same(model, expected, file)
    except (ConfigError, DataError) as error:
        message = str(error)
        if str(folder) not in message:  # two options that do not fit each other
            message = f"{file}: {message}"
        raise CheckpointError(f"{message}; {sums.RESTORE}") from None
    return model


def _model(description: json_text.Object, context: str) -> Model:
    json_text.validate(description, context, _Description)
    options = description["transformer"]
    return Model(build(TransformerConfig, options, context), description["head"])


def _validate_same(model: Model, expected: Model, file: Path) -> None:
    """Raises DataError if two models differ, with the first option that does."""
    options = {"head": model.head, **dataclasses.asdict(model.config)}
    saved = {"head": expected.head, **dataclasses.asdict(expected.config)}
    for name, value in options.items():
        if value != saved[name]:
            raise DataError(
                f"{file}: {name} is {value!r}, and was {saved[name]!r} when the model was saved"
            )


def _with_available_kernel(model: Model, layout: Layout, path: str | Path) -> Model:
    kernel = model.config.attention
    if layout.platform in PLATFORMS[kernel]:
        return model
    log.warning(
        "%s: these %s devices have no %r attention; read as 'einsum', the same function",
        path,
        layout.platform,
        kernel,
    )
    config = dataclasses.replace(model.config, attention="einsum")
    return dataclasses.replace(model, config=config)


def overridden(model: Model, changes: Mapping[str, Any], context: str) -> Model:
    """Returns the model with other options.

    Raises:
      ConfigError: an option does not exist, would change the parameters, or what they compute.
    """
    if not changes:
        return model
    options = dataclasses.asdict(model.config) | dict(changes)
    config = build(TransformerConfig, options, context)
    other = dataclasses.replace(model, config=config)
    restacked = jax.eval_shape(lambda x: _restacked(x, model, other), model.shapes())
    if other.shapes() != restacked:
        names = ", ".join(sorted(changes))
        raise ConfigError(
            f"{context}: {names} would make another model of it, with other parameters"
        )
    for name in sorted(changes):
        is_same = getattr(config, name) == getattr(model.config, name)
        if name not in CHANGEABLE and not is_same:
            raise ConfigError(
                f"{context}: {name} belongs to the parameters: accepted are "
                f"{', '.join(CHANGEABLE)}"
            )
    return other


def _differences(before: TransformerConfig, after: TransformerConfig) -> str:
    """Returns the options that differ, for people: "max_length=64 (was 32), …"; "" if none do."""
    old, new = (
        json_text.leaves(dataclasses.asdict(config)) for config in (before, after)
    )
    return ", ".join(
        f"{name}={value} (was {old.get(name)})"
        for name, value in new.items()
        if value != old.get(name)
    )


def _restacked(params: PyTree, model: Model, other: Model) -> PyTree:
    """Returns the parameters of a model with layers stacked or unstacked as in `other`."""
    if model.config.scan_layers == other.config.scan_layers:
        return params
    return (stacked if other.config.scan_layers else unstacked)(params)


def int8(saved: SavedModel, cache: bool = True) -> SavedModel:
    """Returns the model with int8 weights and perhaps an int8 cache, for sampling.

    `models.quantized` states its error.
    """
    quantize = jax.jit(lambda params: quantized.weights(params, saved.model.axes()))
    model = dataclasses.replace(saved.model, int8_cache=cache)
    return SavedModel(model, quantize(saved.params), saved.tokenizer)


def describe(path: str | Path) -> Model:
    """Returns the model that `load` would read. Raises CheckpointError as `load` does."""
    return _find(path).model


def described(path: str) -> dict[str, Any] | None:
    """Returns the content of a folder's `reward.json`; None if there is none."""
    folder = paths.path(path)
    remedy = "restore it from a copy, or run its stage again in a new --workdir"
    description = workdirs.read(folder / REWARD, json_text.Object, remedy)
    if description is not None:
        sums.verify(folder, [REWARD], remedy)
    return description


# With the functions above this makes the module a `roles.Sources`.
tokenizer = load_tokenizer


def found(path: str | Path) -> str:
    """Returns the folder or foreign name that `load` would read, for people.

    Raises CheckpointError as `load` does.
    """
    return str(path) if foreign.find(path) else str(find(path))


def numbered(workdir: Path) -> list[Path]:
    """Returns the folders NN_name of a recipe's stages, in order."""
    return [
        folder for folder in paths.children(workdir) if re.match(r"\d\d_", folder.name)
    ]


def find(path: str | Path) -> Path:
    """Returns the folder of a model: the path, its `model/`, or that of a recipe's last stage.

    Raises:
      CheckpointError: none of them holds a model.
    """
    path = paths.path(path)
    stages = reversed(numbered(path))
    for folder in (path, path / FOLDER, *(stage / FOLDER for stage in stages)):
        if paths.exists(folder / CONFIG) and paths.exists(folder / "params"):
            return folder
    # Stages of the same recipe that do have one: of this folder, or beside it.
    beside = [
        str(stage)
        for stage in (*numbered(path), *numbered(path.parent))
        if paths.exists(stage / FOLDER / CONFIG)
    ]
    others = f"; models are in {', '.join(beside)}" if beside else ""
    raise CheckpointError(
        f"{path}: no model here; expected a stage's workdir, a recipe's, or a folder with "
        f"params/{others}"
    )
