"""Devices to a mesh, logical axis names to shardings: everything that knows about placement.

A model names the dimensions of its arrays ("batch", "embed", "heads", …); one table of rules, in the config,
says which mesh axes each name is laid over. The same program then runs on one CPU or on a pod.
"""

import contextlib
import contextvars
import dataclasses
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhfjax import hosts, strategy
from rlhfjax.errors import ConfigError
from rlhfjax.ranges import MeshSize
from rlhfjax.strategy import AXES, Need
from rlhfjax.types import PyTree

log = logging.getLogger("rlhfjax")
# FSDP over `fsdp`, Megatron over `tensor`; a batch is split over every data-like axis.
DEFAULT_RULES = strategy.GENERAL


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis; at most one axis is -1, which takes what is left.

    strategy: "given", these sizes under the general rules; "auto", sizes and rules by what the stage needs and the
    devices have; or one of strategy.STRATEGIES, its rules, and sizes that it completes.
    """

    replica: MeshSize = 1
    data: MeshSize = -1
    fsdp: MeshSize = 1
    tensor: MeshSize = 1
    sequence: MeshSize = 1
    rules: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # overrides of the strategy's table
    strategy: str = "given"
    devices: str = ""  # FIRST:END of all devices, such as "0:6" or "6:"; empty: all


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules that lay logical axis names over it."""

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]
    pool: tuple[
        Any, ...
    ] = ()  # the devices that there are, of which the mesh may have a part

    def spec(
        self, names: Sequence[str | None], shape: Sequence[int] | None = None
    ) -> PartitionSpec:
        """Logical names, one a dimension, to a PartitionSpec.

        A mesh axis shards one dimension only: the first that asks for it keeps it, so that an activation
        ("batch", "time", "embed") has its batch over `fsdp` and its embed whole, while a parameter's embed is split.

        Raises:
          ConfigError: a name that the rules lack, or a dimension that its mesh axes do not divide.
        """
        used: set[str] = set()
        spec: list[Any] = []
        for i, name in enumerate(names):
            if name is not None and name not in self.rules:
                raise ConfigError(
                    f"logical axis {name!r} is not in the mesh rules: {', '.join(sorted(self.rules))}"
                )
            axes = (
                tuple(a for a in self.rules[name] if a not in used)
                if name is not None
                else ()
            )
            size = math.prod(self.mesh.shape[a] for a in axes)
            if shape is not None and shape[i] % size:
                raise ConfigError(
                    f"axis {name!r} of size {shape[i]} is not divisible by the {size} devices of mesh axes {axes}"
                )
            used.update(axes)
            spec.append(None if size == 1 else axes if len(axes) > 1 else axes[0])
        return PartitionSpec(*spec)

    def sharding(self, *names: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(names))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def platform(self) -> str:
        """Of the devices: cpu, gpu, tpu."""
        return self.mesh.devices.flat[0].platform

    @property
    def batch_shards(self) -> int:
        return math.prod(self.mesh.shape[a] for a in self.rules["batch"])

    def put(self, batch: PyTree) -> PyTree:
        """Returns a batch of NumPy arrays as arrays on the devices, sharded over their rows.

        Every host passes arrays of the whole batch's shape, and reads only the rows of its own
        devices.
        """
        sharding = self.sharding("batch")
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__),
            batch,
        )

    def own_parts(self, size: int, parts: int) -> tuple[int, ...]:
        """Which of the `parts` equal parts of a batch have rows that `put` reads on this host."""
        held = self.sharding("batch").addressable_devices_indices_map((size,))
        spans = {rows.indices(size)[:2] for (rows,) in held.values()}
        edges = [(size * j // parts, size * (j + 1) // parts) for j in range(parts)]
        return tuple(
            j
            for j, (a, b) in enumerate(edges)
            if any(start < b and a < end for start, end in spans)
        )

    def put_rows(self, rows: Any) -> Any:
        """Returns an array with a row per row of the batch; what is on the devices already stays there."""
        if isinstance(rows, jax.Array):
            return rows
        if isinstance(rows, jax.ShapeDtypeStruct):
            sharding = rows.sharding or self.sharding("batch")
            return jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=sharding)
        return self.put(np.asarray(rows))

    def check_batch(self, size: int, what: str = "batch_size") -> None:
        if size % self.batch_shards:
            raise ConfigError(
                f"{what}={size} is not divisible by the {self.batch_shards} devices that share a batch (mesh axes "
                f"{', '.join(self.rules['batch'])})"
            )

    @contextlib.contextmanager
    def use(self) -> Iterator["Layout"]:
        """Within this context `constrain` applies the rules."""
        token = _CURRENT.set(self)
        try:
            with self.mesh:
                yield self
        finally:
            _CURRENT.reset(token)


_CURRENT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar(
    "layout", default=None
)


def make_layout(
    config: MeshConfig = MeshConfig(),
    devices: Sequence[jax.Device] | None = None,
    need: Need | None = None,
    memory: float | None = None,
) -> Layout:
    """The mesh over `devices` (all of them by default) and its rules.

    Args:
      need: what the stage asks, for strategy "auto"; None: no model, which is Need().
      memory: bytes of one device, where the devices themselves do not know it.
    Raises:
      ConfigError: the sizes do not multiply to the number of devices, a rule names an unknown mesh axis, or JAX does
        not see the hosts and accelerators that this job was given.
    """
    if devices is None:
        hosts.validate_process_count()
        hosts.validate_accelerators()
        devices = jax.devices()
    pool = tuple(devices)
    devices = _some(devices, config.devices)
    asked = {axis: getattr(config, axis) for axis in AXES}
    name = config.strategy
    if name == "auto":
        name, asked = _choose(asked, devices, need, memory)
    elif name != "given":
        asked = strategy.sizes(name, asked, _slices(devices))
    sizes = list(asked.values())
    if sizes.count(-1) > 1:
        raise ConfigError(f"mesh {asked}: at most one size is -1")
    fixed = math.prod(s for s in sizes if s != -1)
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        raise ConfigError(
            f"mesh {asked} does not fit the {len(devices)} devices at hand"
        )
    sizes = [len(devices) // fixed if s == -1 else s for s in sizes]
    table = DEFAULT_RULES if name == "given" else strategy.find(name).rules
    return Layout(_mesh(sizes, devices), _rules(table, config.rules), pool)


def _some(devices: Sequence[jax.Device], which: str) -> Sequence[jax.Device]:
    """The devices that `MeshConfig.devices` names."""
    if not which:
        return devices
    if hosts.count() > 1:
        raise ConfigError(
            f"mesh.devices={which!r}: with several hosts a mesh has all devices, a part of each host's"
        )
    if re.fullmatch(r"\d*:\d*", which):
        first, end = (int(x) if x else None for x in which.split(":"))
        if chosen := devices[first:end]:
            return chosen
    raise ConfigError(
        f"mesh.devices={which!r}: FIRST:END of the {len(devices)} devices at hand, such as '0:1' or '1:'"
    )


def _choose(
    given: Mapping[str, int],
    devices: Sequence[jax.Device],
    need: Need | None,
    memory: float | None,
) -> tuple[str, dict[str, int]]:
    """What `auto` picks, said in the log."""
    if any(size not in (1, -1) for size in given.values()):
        raise ConfigError(
            f"mesh.strategy='auto' picks the sizes itself, and {dict(given)} gives some"
        )
    if need is None:  # nothing is split but rows, if there are any
        return "data", dict(given) | {"data": -1}
    if memory is None:
        memory = device_memory(devices)
    picked = strategy.choose(need, len(devices), memory, _slices(devices))
    log.log(logging.INFO if picked.fits else logging.WARNING, picked.why)
    return picked.strategy, picked.sizes


def device_memory(devices: Sequence[jax.Device]) -> float:
    """Bytes of one device: what its runtime says, or an equal share of the host's memory, where CPUs are devices.

    Raises:
      ConfigError: it is known neither way.
    """
    if limit := (devices[0].memory_stats() or {}).get("bytes_limit"):
        return float(limit)
    if devices[0].platform != "cpu":
        raise ConfigError(
            f"mesh.strategy='auto': the memory of a {devices[0].device_kind} is not known; give the sizes"
        )
    return (
        float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        / jax.local_device_count()
    )


def _slices(devices: Sequence[jax.Device]) -> int:
    return len({getattr(device, "slice_index", None) for device in devices})


def _mesh(sizes: Sequence[int], devices: Sequence[jax.Device]) -> Mesh:
    """Neighbors along the axes within a slice; between slices, which only DCN connects, along `replica` alone.

    An axis lies along whole sides of a slice where that is possible, else along a part of one: 32 of 4 x 4 x 4 chips.
    """
    slices, parts = _slices(devices), {"allow_split_physical_axes": True}
    if sizes[0] % slices:
        raise ConfigError(
            f"mesh.replica={sizes[0]}: the devices are in {slices} slices, and replica lies across them"
        )
    if slices == 1:
        placed = mesh_utils.create_device_mesh(sizes, devices, **parts)
    else:
        within, across = (
            (sizes[0] // slices, *sizes[1:]),
            (slices, *(1 for _ in sizes[1:])),
        )
        placed = mesh_utils.create_hybrid_device_mesh(within, across, devices, **parts)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _rules(
    table: Mapping[str, tuple[str, ...]], overrides: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    rules = dict(table)
    for name, axes in overrides.items():
        axes = (axes,) if isinstance(axes, str) else axes
        axes = () if axes is None else axes
        if name not in rules:
            raise ConfigError(
                f"mesh.rules: unknown logical axis {name!r}; known: {', '.join(sorted(rules))}"
            )
        if not isinstance(axes, list | tuple):
            raise ConfigError(
                f"mesh.rules.{name}={axes!r}: expected a mesh axis, several or None"
            )
        if unknown := [axis for axis in axes if axis not in AXES]:
            raise ConfigError(
                f"mesh.rules.{name}: unknown mesh axes {unknown}; known: {', '.join(AXES)}"
            )
        rules[name] = tuple(axes)
    return rules


def in_use() -> Layout:
    """Returns the layout in use. Raises LookupError outside of `Layout.use`."""
    layout = _CURRENT.get()
    if layout is None:
        raise LookupError("no mesh is in use")
    return layout


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Lays an activation over the mesh in use; outside of `Layout.use` it does nothing.

    An axis of size 1 stays whole: the one slot of a decode step is not for several devices of `sequence`.
    """
    layout = _CURRENT.get()
    if layout is None or layout.mesh.size == 1:
        return x
    layout.spec(names)  # a wrong name is wrong at every size
    names = [
        name if size > 1 else None for name, size in zip(names, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(layout.mesh, layout.spec(names))
    )


def shards(name: str) -> int:
    """In how many parts the mesh in use cuts an axis of this name; 1 outside of `Layout.use`."""
    layout = _CURRENT.get()
    return (
        1
        if layout is None
        else math.prod(layout.mesh.shape[a] for a in layout.rules[name])
    )


def per_device(
    f: Callable[..., Any],
    arguments: Sequence[Sequence[str | None]],
    result: Sequence[str | None],
) -> Callable[..., Any]:
    """f run by every device on its own part of the arguments, laid over the mesh in use by the names of their axes.

    For kernels, which the compiler cannot cut. Without a mesh, or on one device, it is f itself.
    """
    layout = _CURRENT.get()
    if layout is None or layout.mesh.size == 1:
        return f
    specs = tuple(layout.spec(names) for names in arguments)
    return jax.shard_map(
        f,
        mesh=layout.mesh,
        in_specs=specs,
        out_specs=layout.spec(result),
        check_vma=False,
    )
