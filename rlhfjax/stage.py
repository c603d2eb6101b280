"""What a stage gives to the loop in `train.py`."""

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
    """An endless stream of batches of numpy arrays whose position can be saved.

    All hosts ask for the position at the same step, and it is the same for all: `set_state` takes
    it on any number of hosts.
    """

    def __next__(self) -> PyTree: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class Finished(NamedTuple):
    """What a stage leaves in its workdir, and its last metrics."""

    models: dict[str, Any]  # {folder: store.SavedModel}
    metrics: Metrics
    files: dict[str, Any]  # {file name: what `json_text.encode` takes}
    adapters: Mapping[str, Any] = types.MappingProxyType(
        {}
    )  # {folder: (model, adapters)}


class Data(NamedTuple):
    """A stage's datasets, open, and what is computed from them."""

    batches: Batches
    evals: Callable[[TrainState], Metrics]  # on held-out data
    finish: Callable[[TrainState], Finished]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage that trains. Nothing here reads a dataset before `open` is called.

    init: key -> TrainState, pure and jit-able; the arrays' first values when nothing is loaded.
    axes: logical axis names of every parameter, in the structure of TrainState.params.
    start: TrainState -> TrainState, run once on a fresh state: loads what `init_from` names.
    step: (state, batch, key) -> (state, metrics); it may donate the state.
    batch: completions -> shapes and dtypes of what `step` takes as its batch; completions of a prompt
      count where the data decides how many there are.
    open: opens the datasets.
    units: what one step consumes, for the rate, and `unit` its name.
    """

    init: Callable[[jax.Array], TrainState]
    axes: PyTree
    start: Callable[[TrainState], TrainState]
    step: Callable[[TrainState, PyTree, jax.Array], tuple[TrainState, Metrics]]
    batch: Callable[[int], PyTree]
    open: Callable[[], Data]
    units: int
    unit: str = "tokens"

    @functools.cached_property
    def data(self) -> Data:
        """The datasets, opened when they are first asked for."""
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
