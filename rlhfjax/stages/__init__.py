"""One file a stage of the recipe.

A stage's module has a frozen dataclass `Config` and one of two functions:
  `build(config, layout) -> Stage` for what trains, run by the loop in `train.py`;
  `run(config, workdir, layout) -> {metric: value}` for a job that writes its output whole (tokenizer, collect, …).
One with `ON_ONE_HOST = True` computes on no device: its `run` is called on the first host alone.
It may have `check(config, layout, shape)`, which raises ConfigError for what cannot be meant before any stage of a
recipe has begun; `shape` is the TransformerConfig of the model that the stage starts from, None where it is not known.
"""

import dataclasses
import importlib
import pkgutil
import types
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from ml_collections import ConfigDict, config_dict

from rlhfjax.config import defaults
from rlhfjax.errors import ConfigError
from rlhfjax.state import TrainState

PyTree = Any
Pairs = Mapping[str, tuple[Any, Any]]  # {name: (sum, weight)}


@runtime_checkable
class Batches(Protocol):
    """An endless stream of batches of numpy arrays whose position can be saved.

    All hosts ask for the position at one place, and it is the same for all: `set_state` takes it on any number of them.
    """

    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class Finished(NamedTuple):
    """What a stage leaves behind: models and JSON files by their names in the workdir, and last metrics."""

    models: dict[str, Any]  # {folder: store.SavedModel}
    pairs: Pairs
    files: dict[str, Any]  # {file name: what `json_text.encode` takes}
    adapters: Mapping[str, Any] = types.MappingProxyType({})  # {folder: (model, adapters)}


@dataclasses.dataclass(frozen=True)
class Stage:
    """What the loop needs to know of a stage that trains.

    init: key -> TrainState, pure and jit-able; the arrays' first values when nothing is loaded.
    axes: logical axis names of every parameter, in the shape of TrainState.params.
    start: TrainState -> TrainState, run once on a fresh state: loads what `init_from` names.
    batches: the training data.
    step: (state, batch, key) -> (state, pairs); it may donate the state.
    evals: state -> pairs, on held-out data.
    finish: state -> what is written into the workdir at the end.
    units: what one step consumes, for the rate, and `unit` its name.
    """

    init: Callable[[jax.Array], TrainState]
    axes: PyTree
    start: Callable[[TrainState], TrainState]
    batches: Batches
    step: Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, Pairs]]
    evals: Callable[[TrainState], Pairs]
    finish: Callable[[TrainState], Finished]
    units: int
    unit: str = "tokens"


def names() -> list[str]:
    """The stages there are: the modules of this folder."""
    return [m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg]


def find(name: str) -> ModuleType:
    """The module of a stage.

    Raises:
      ConfigError: there is none of that name.
    """
    if name not in names():
        raise ConfigError(f"stage {name!r} is unknown; known: {', '.join(names())}")
    return importlib.import_module(f"rlhfjax.stages.{name}")


def config_class(name: str) -> type:
    return find(name).Config


def stage_config(stage: str, **values: Any) -> ConfigDict:
    """A stage's config with every option present, so that each can be overridden and config.json is complete.

    Raises:
      ConfigError: an option that the stage does not have.
    """
    return config_dict.create(**defaults(config_class(stage), {"stage": stage, **values}, where=stage))
