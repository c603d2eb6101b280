"""Jitted functions with names, and a recorder that runs a step on shapes.

A stage's step calls `Program`s, and between them a few host functions. In a run a program is its
jitted function. Under a `Recorder` nothing is computed: a program returns shapes with the shardings
that it declares, and the recorder keeps what is needed to lower it. So `plan` compiles what a run
would.
"""

import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhfjax.mesh import Layout, in_use
from rlhfjax.types import PyTree

Rows = (
    jax.Array | np.ndarray | jax.ShapeDtypeStruct
)  # an array, or its shape where a step is recorded
ROWS, WHOLE = ("batch",), ()  # logical axes of an output: rows of the batch, replicated
STATE = "state"  # an output that takes the place of the argument of that name: the same shardings


class Held(jax.ShapeDtypeStruct):
    """The shape of an array that stays on the devices from step to step.

    owner: the role whose array it is, or "state".
    path: where it stands in the owner's tree.
    """

    def __init__(self, shape: Any, dtype: Any, *, sharding: Any, owner: str, path: str):
        super().__init__(shape, dtype, sharding=sharding)
        self.owner, self.path = owner, path


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with a name.

    outputs: logical axes of what it returns, a prefix of the tree: ROWS, WHOLE, STATE; or a
      function of the arguments that returns the shapes, where tracing takes long.
    """

    name: str
    function: Any
    outputs: Any = WHOLE

    def __call__(self, *args: Any, **static: Any) -> Any:
        recorder = _RECORDER.get()
        if recorder is not None:
            return recorder.call(self, args, static)
        with jax.profiler.TraceAnnotation(self.name):
            return self.function(*args, **static)


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
        return [
            x for x in jax.tree.leaves(self.args) if isinstance(x, jax.ShapeDtypeStruct)
        ]


class Recorder:
    """Keeps the programs that are called while it records, in their order."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.held: list[Held] = []  # frozen parameters

    @contextmanager
    def record(self) -> Iterator["Recorder"]:
        token = _RECORDER.set(self)
        try:
            yield self
        finally:
            _RECORDER.reset(token)

    def call(
        self, program: Program, args: tuple[Any, ...], static: Mapping[str, Any]
    ) -> PyTree:
        layout = in_use()
        self.calls.append(Call(program.name, program.function, args, static, layout))
        if callable(program.outputs):
            return program.outputs(*args, **static)
        shapes = program.function.eval_shape(*args, **static)
        return _placed(shapes, program.outputs, layout, args)


_RECORDER: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar(
    "recorder", default=None
)


def _placed(
    shapes: PyTree, outputs: Any, layout: Layout, args: tuple[Any, ...]
) -> PyTree:
    """Returns shapes with the shardings that `outputs` declares."""
    if isinstance(outputs, list):
        parts = zip(shapes, outputs, strict=True)
        return tuple(_placed(part, axes, layout, args) for part, axes in parts)
    if outputs == STATE:
        before = next(
            arg for arg in args if jax.tree.structure(arg) == jax.tree.structure(shapes)
        )
        return jax.tree.map(lambda old, new: _like(old, new), before, shapes)
    return jax.tree.map(lambda x: placed(x, layout.sharding(*outputs)), shapes)


def _like(old: jax.ShapeDtypeStruct, new: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
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
    """Returns parameters that stay on the devices until the end, of which a recorder takes note."""
    recorder = _RECORDER.get()
    if recorder is not None:
        recorder.held += jax.tree.leaves(tree)
    return tree


def recording() -> bool:
    """Whether a step is run on shapes."""
    return _RECORDER.get() is not None


def small(function: Callable[..., Any], outputs: Any = WHOLE) -> Callable[..., Any]:
    """Returns a function of a few scalars, keys or rows that is too small to be planned."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if not recording():
            return function(*args)
        return _placed(jax.eval_shape(function, *args), outputs, in_use(), args)

    return run


def on_host(
    function: Callable[..., Any], shapes: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns a function that runs on the host; on shapes `shapes` of its arguments stands for it."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        return shapes(*args) if recording() else function(*args)

    return run


def reshard(tree: PyTree, shardings: Any) -> PyTree:
    """Moves arrays to one sharding, or each to its own; arrays on shapes stay shapes."""
    if not recording():
        return jax.device_put(tree, shardings)
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda x: placed(x, shardings), tree)
    return jax.tree.map(placed, tree, shardings)


def on_mesh(
    there: Layout | None, here: Layout, function: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns a function whose parameters live on another mesh.

    The rows of a batch are sent there, and rows and scalars of the result come back. Nothing waits:
    what is dispatched on either mesh goes on meanwhile. None: no other mesh, the function itself.
    """
    if there is None:
        return function

    def home(x: Any) -> Any:
        return reshard(
            x, here.sharding("batch") if getattr(x, "ndim", 0) else here.replicated
        )

    def run(*rows: Any) -> Any:
        moved = reshard(rows, there.sharding("batch"))
        with there.use():
            out = function(*moved)
        return jax.tree.map(home, out)

    return run


def host_value(x: Any, planned: int) -> int:
    """Returns an integer array's value on the host; on shapes the one that is planned for."""
    return planned if recording() else int(x)
