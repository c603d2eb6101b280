"""Jitted functions with names, and a recorder that runs a step on shapes.

A stage's step calls `Program`s and, between them, a few host functions. In a run, a program is its
jitted function. Under a `Recorder` nothing is computed: a program returns shapes with the shardings
that it declares, and the recorder keeps what is needed to lower it. So `plan` compiles exactly what
a run would.
"""

import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhfjax.mesh import Layout, in_use
from rlhfjax.types import PyTree

# One row per row of the batch: an array, or its shape while a step is recorded.
Rows = jax.Array | np.ndarray | jax.ShapeDtypeStruct
# Logical axes of an output: rows of the batch, or replicated.
ROWS, WHOLE = ("batch",), ()
STATE = "state"  # an output with the shardings of the argument that it replaces
Function = Callable[..., Any]


class Held(jax.ShapeDtypeStruct):
    """The shape of an array that stays on the devices from step to step.

    Attributes:
      owner: the role whose array it is, or "state".
      path: where it is in the owner's tree.
    """

    def __init__(self, shape: Any, dtype: Any, *, sharding: Any, owner: str, path: str):
        super().__init__(shape, dtype, sharding=sharding)
        self.owner, self.path = owner, path


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with a name."""

    name: str
    function: Any
    outputs: Any = WHOLE
    """Logical axes of the outputs, a prefix of their tree: ROWS, WHOLE, STATE. Or a function of the
    arguments that returns the shapes, if tracing takes long."""

    def __call__(self, *args: Any, **static: Any) -> Any:
        recorder = _RECORDER.get()
        if recorder is not None:
            return recorder.call(self, args, static)
        observer = _OBSERVER.get()
        context = _NOTHING if observer is None else observer(self, args, static)
        with context, jax.profiler.TraceAnnotation(self.name):
            return self.function(*args, **static)


# Returns a context in which a program is called, with its arguments and static ones.
Observer = Callable[[Program, tuple[Any, ...], dict[str, Any]], Any]
_NOTHING = nullcontext()
_OBSERVER: contextvars.ContextVar[Observer | None] = contextvars.ContextVar(
    "observer", default=None
)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Calls every program within this context in one that the observer returns."""
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


class Call(NamedTuple):
    """A program with the shapes that a step calls it with."""

    name: str
    function: Any
    args: tuple[Any, ...]
    static: Mapping[str, Any]
    layout: Layout

    def lower(self) -> Any:
        """Returns the lowered program (jax.stages.Lowered)."""
        with self.layout.use():
            return self.function.lower(*self.args, **self.static)

    @property
    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """The arrays among the arguments."""
        leaves = jax.tree.leaves(self.args)
        return [x for x in leaves if isinstance(x, jax.ShapeDtypeStruct)]


class Recorder:
    """Records the programs that are called, in their order."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.held: list[Held] = []  # frozen parameters

    @contextmanager
    def record(self) -> Iterator["Recorder"]:
        """Records within this context."""
        token = _RECORDER.set(self)
        try:
            yield self
        finally:
            _RECORDER.reset(token)

    def call(
        self, program: Program, args: tuple[Any, ...], static: Mapping[str, Any]
    ) -> PyTree:
        """Records a call and returns the shapes of its outputs."""
        layout = in_use()
        call = Call(
            name=program.name,
            function=program.function,
            args=args,
            static=static,
            layout=layout,
        )
        self.calls.append(call)
        if callable(program.outputs):
            return program.outputs(*args, **static)
        shapes = program.function.eval_shape(*args, **static)
        return _place(shapes, program.outputs, layout, args)


_RECORDER: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar(
    "recorder", default=None
)


def recording() -> bool:
    """Whether the step runs on shapes."""
    return _RECORDER.get() is not None


def _place(
    shapes: PyTree, outputs: Any, layout: Layout, args: tuple[Any, ...]
) -> PyTree:
    """Returns shapes with the shardings that `outputs` declares."""
    if isinstance(outputs, list):
        parts = zip(shapes, outputs, strict=True)
        return tuple(_place(part, axes, layout, args) for part, axes in parts)
    if outputs == STATE:
        structure = jax.tree.structure(shapes)
        before = next(arg for arg in args if jax.tree.structure(arg) == structure)
        return jax.tree.map(_same_shape, before, shapes)
    return jax.tree.map(lambda x: placed(x, layout.sharding(*outputs)), shapes)


def _same_shape(
    old: jax.ShapeDtypeStruct, new: jax.ShapeDtypeStruct
) -> jax.ShapeDtypeStruct:
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        raise AssertionError(
            f"a program returns a state of other shapes: {old} became {new}"
        )
    return old


def placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array with a sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


# ------------------------------------------------------------------ between programs


def keep(tree: PyTree) -> PyTree:
    """Returns parameters that stay on the devices until the end; a recorder notes them."""
    recorder = _RECORDER.get()
    if recorder is not None:
        recorder.held += jax.tree.leaves(tree)
    return tree


def small(function: Function, outputs: Any = WHOLE) -> Function:
    """Returns a function of a few scalars, keys or rows that is too small to be planned."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if not recording():
            return function(*args)
        return _place(jax.eval_shape(function, *args), outputs, in_use(), args)

    return run


def on_host(function: Function, shapes: Function) -> Function:
    """Returns a function that runs on the host.

    Args:
      shapes: replaces it while a step is recorded; returns the shapes of its results.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        return shapes(*args) if recording() else function(*args)

    return run


def reshard(tree: PyTree, shardings: Any) -> PyTree:
    """Moves arrays to one sharding, or each to its own; shapes stay shapes."""
    if not recording():
        return jax.device_put(tree, shardings)
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda x: placed(x, shardings), tree)
    return jax.tree.map(placed, tree, shardings)


def on_mesh(other: Layout | None, home: Layout, function: Function) -> Function:
    """Returns a function whose parameters live on another mesh.

    It sends the rows of a batch to that mesh, and brings rows and scalars of the result back.
    Nothing waits: both meshes go on with what was dispatched.

    Args:
      other: the mesh of the parameters; None if it is `home`, and then this is `function` itself.
    """
    if other is None:
        return function

    def bring_home(x: Any) -> Any:
        is_rows = getattr(x, "ndim", 0) > 0
        return reshard(x, home.sharding("batch") if is_rows else home.replicated)

    def run(*rows: Any) -> Any:
        moved = reshard(rows, other.sharding("batch"))
        with other.use():
            result = function(*moved)
        return jax.tree.map(bring_home, result)

    return run


def host_value(x: Any, planned: int) -> int:
    """Returns an integer array's value on the host; `planned` while a step is recorded."""
    return planned if recording() else int(x)
