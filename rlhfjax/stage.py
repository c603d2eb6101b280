"""What a stage that trains gives to the loop in `train.py`."""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from rlhfjax.state import TrainState
from rlhfjax.types import Metrics, PyTree


@runtime_checkable
class Batches(Protocol):
    """An endless stream of batches of NumPy arrays, whose position can be saved.

    All hosts ask for the position at the same step and get the same one. A position can be restored
    on any number of hosts.
    """

    def __next__(self) -> PyTree: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


@runtime_checkable
class Samples(Protocol):
    """Keeps some of what a step samples, for people to read."""

    wanted: bool
    """Whether the next step keeps its samples."""

    def take(self) -> Any:
        """Returns what the step kept, still on the devices; None if nothing."""
        ...

    def rows(self, kept: Any, count: int) -> list[dict[str, Any]]:
        """Returns `count` samples as rows of a JSONL file."""
        ...


class Finished(NamedTuple):
    """What a stage writes into its workdir, and its last metrics."""

    models: dict[str, Any]  # a store.SavedModel by name of the folder
    metrics: Metrics
    files: dict[str, Any]  # JSON values by name of the file
    adapters: Mapping[str, Any] = types.MappingProxyType({})
    """(model, adapters) by name of the folder."""


class Data(NamedTuple):
    """The opened datasets of a stage, and what is computed from them."""

    batches: Batches
    evals: Callable[[TrainState], Metrics]  # on held-out data
    finish: Callable[[TrainState], Finished]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage that trains. No dataset is read before `open` is called.

    init: key -> the TrainState before anything is loaded; pure and jit-able.
    axes: logical axis names of every parameter, in the structure of TrainState.params.
    start: TrainState -> TrainState, called once on a fresh state: loads pretrained parameters.
    step: (state, batch, key) -> (state, metrics); it may donate the state.
    batch: completions -> shapes and dtypes of a batch. `completions` is the number of completions
      per prompt, in stages where the data decides it.
    open: opens the datasets.
    units: number of units, such as tokens, that a step consumes, for the rate.
    unit: name of the unit.
    samples: what a step samples; None if it samples nothing.
    """

    init: Callable[[jax.Array], TrainState]
    axes: PyTree
    start: Callable[[TrainState], TrainState]
    step: Callable[[TrainState, PyTree, jax.Array], tuple[TrainState, Metrics]]
    batch: Callable[[int], PyTree]
    open: Callable[[], Data]
    units: int
    unit: str = "tokens"
    samples: Samples | None = None

    @functools.cached_property
    def data(self) -> Data:
        """The datasets, which are opened at the first access."""
        return self.open()

    @property
    def batches(self) -> Batches:
        return self.data.batches

    @property
    def evals(self) -> Callable[[TrainState], Metrics]:
        return self.data.evals

    @property
    def finish(self) -> Callable[[TrainState], Finished]:
        return self.data.finish
