"""Places arrays on devices: devices to a mesh, logical axis names to shardings.

A model names the dimensions of its arrays ("batch", "embed", "heads", ...). One table of rules, in
the config, says over which mesh axes each name is sharded. So the same program runs on one CPU or
on a pod.
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
from rlhfjax.strategy import AXES, Axes, Need, Rules
from rlhfjax.types import PyTree

log = logging.getLogger("rlhfjax")
# FSDP over `fsdp`, Megatron over `tensor`; a batch is split over every data-like axis.
DEFAULT_RULES = strategy.GENERAL
Devices = Sequence[Any]  # of jax.Device, which type checkers take for a variable


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each axis; at most one axis is -1, which takes the rest."""

    replica: MeshSize = 1
    """Devices along `replica`: whole copies, across slices that only the network connects."""
    data: MeshSize = -1
    """Devices along `data`: the batch is split, the parameters are not."""
    fsdp: MeshSize = 1
    """Devices along `fsdp`: the batch and the parameters are split."""
    tensor: MeshSize = 1
    """Devices along `tensor`: heads, MLP width and vocabulary are split."""
    sequence: MeshSize = 1
    """Devices along `sequence`: the tokens of a row are split."""
    expert: MeshSize = 1
    """Devices along `expert`: the experts of a mixture are split, the batch is not."""
    rules: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Mesh axes by logical axis, laid over the strategy's rules: {"vocab": ["tensor", "fsdp"]}."""
    strategy: str = "given"
    """given: the sizes above under the general rules; auto: sizes and rules chosen by the stage's
    models and the devices; or one of strategy.STRATEGIES, which completes the sizes."""
    devices: str = ""
    """Which devices, FIRST:END such as "0:6" or "6:"; empty: all."""

    def __post_init__(self):
        if self.rules:
            _rules(DEFAULT_RULES, self.rules)


def axis_sizes(config: MeshConfig) -> dict[str, int]:
    """Returns the sizes of a config's mesh axes by name, -1 included."""
    return {axis: getattr(config, axis) for axis in AXES}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules that map logical axis names to its axes."""

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]
    pool: tuple[Any, ...] = ()  # all devices; the mesh may have only some of them
    need: Need | None = None  # of the stage, if strategy "auto" chose the mesh
    memory: float | None = None  # bytes of one device, likewise

    def spec(
        self, names: Sequence[str | None], shape: Sequence[int] | None = None
    ) -> PartitionSpec:
        """Returns the PartitionSpec of an array whose dimensions have these logical names.

        A mesh axis shards one dimension only, the first that asks for it: an activation ("batch",
        "time", "embed") has its batch sharded over `fsdp` and its embed whole, while a parameter's
        embed is sharded.

        Args:
          names: one per dimension; None is replicated.
          shape: the array's shape, if it should be checked.
        Raises:
          ConfigError: the rules lack a name, or mesh axes do not divide a dimension.
        """
        used: set[str] = set()
        spec: list[Any] = []
        for i, name in enumerate(names):
            if name is not None and name not in self.rules:
                known = ", ".join(sorted(self.rules))
                raise ConfigError(
                    f"logical axis {name!r} is not in the mesh rules: {known}"
                )
            rule = self.rules[name] if name is not None else ()
            axes = [axis for axis in rule if axis not in used]
            size = self._size(axes)
            if shape is not None and shape[i] % size:
                raise ConfigError(
                    f"axis {name!r} of size {shape[i]} is not divisible by the {size} devices "
                    f"of mesh axes {tuple(axes)}"
                )
            used.update(axes)
            if size == 1:
                spec.append(None)
            else:
                spec.append(tuple(axes) if len(axes) > 1 else axes[0])
        return PartitionSpec(*spec)

    def _size(self, axes: Sequence[str]) -> int:
        """Returns how many devices these mesh axes have together."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def sharding(self, *names: str | None) -> NamedSharding:
        """Returns the sharding of an array whose dimensions have these logical names."""
        return NamedSharding(self.mesh, self.spec(names))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def platform(self) -> str:
        """The platform of the devices: cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform

    @property
    def batch_shards(self) -> int:
        """Over how many devices a batch is split."""
        return self._size(self.rules["batch"])

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
        """Returns which of `parts` equal parts of a batch have rows on this host's devices.

        Args:
          size: rows of the batch.
        """
        sharding = self.sharding("batch")
        indices = sharding.addressable_devices_indices_map((size,)).values()
        spans = {index[0].indices(size)[:2] for index in indices if index}
        own = []
        for part in range(parts):
            first, last = size * part // parts, size * (part + 1) // parts
            if any(start < last and first < end for start, end in spans):
                own.append(part)
        return tuple(own)

    def put_rows(self, rows: Any) -> Any:
        """Returns an array with one row per row of a batch; one on the devices stays there."""
        if isinstance(rows, jax.Array):
            return rows
        if isinstance(rows, jax.ShapeDtypeStruct):
            sharding = rows.sharding or self.sharding("batch")
            return jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=sharding)
        return self.put(np.asarray(rows))

    def validate_batch(self, size: int, what: str = "batch_size") -> None:
        """Raises ConfigError if the devices do not divide a batch.

        Args:
          what: the option that has the size.
        """
        if size % self.batch_shards:
            axes = ", ".join(self.rules["batch"])
            raise ConfigError(
                f"{what}={size} is not divisible by the {self.batch_shards} devices that share "
                f"a batch (mesh axes {axes})"
            )

    @contextlib.contextmanager
    def use(self) -> Iterator["Layout"]:
        """Makes `constrain` apply the rules within this context."""
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
    devices: Devices | None = None,
    need: Need | None = None,
    memory: float | None = None,
) -> Layout:
    """Returns the mesh that a config asks for, and its rules.

    Args:
      devices: jax devices; all of them by default.
      need: what strategy "auto" needs to know of the stage; None if it has no model.
      memory: bytes of one device, if the devices themselves do not know it.
    Raises:
      ConfigError: the sizes do not multiply to the number of devices, a rule names an unknown mesh
        axis, or JAX does not see the hosts and accelerators that this job was given.
    """
    if devices is None:
        hosts.validate_process_count()
        hosts.validate_accelerators()
        devices = jax.devices()
    pool = tuple(devices)
    devices = _select(devices, config.devices)
    given = axis_sizes(config)
    name = config.strategy
    if name == "auto":
        name, given = _choose(given, devices, need, memory)
    elif name != "given":
        given = strategy.sizes(name, given, _slices(devices))
    if list(given.values()).count(-1) > 1:
        raise ConfigError(f"mesh {given}: at most one size is -1")
    sizes = strategy.fill(given, len(devices))
    if sizes is None:
        raise ConfigError(
            f"mesh {given} does not fit the {len(devices)} devices at hand"
        )
    table = DEFAULT_RULES if name == "given" else strategy.find(name).rules
    mesh = _mesh(sizes, devices)
    rules = {
        name: tuple(axis for axis in axes if axis in mesh.axis_names)
        for name, axes in _rules(table, config.rules).items()
    }
    if need is not None and memory is None:
        memory = device_memory(devices)
    return Layout(mesh, rules, pool, need, memory)


def _select(devices: Devices, selection: str) -> Devices:
    """Returns the devices that `MeshConfig.devices` selects."""
    if not selection:
        return devices
    if hosts.count() > 1:
        raise ConfigError(
            f"mesh.devices={selection!r}: with several hosts a mesh has all devices, "
            "some of each host"
        )
    if re.fullmatch(r"\d*:\d*", selection):
        first, end = (int(x) if x else None for x in selection.split(":"))
        if chosen := devices[first:end]:
            return chosen
    raise ConfigError(
        f"mesh.devices={selection!r}: FIRST:END of the {len(devices)} devices at hand, "
        "such as '0:1' or '1:'"
    )


def _choose(
    given: Axes, devices: Devices, need: Need | None, memory: float | None
) -> tuple[str, dict[str, int]]:
    """Returns the strategy and the sizes that `auto` chooses, and logs the reason."""
    if any(size not in (1, -1) for size in given.values()):
        raise ConfigError(
            f"mesh.strategy='auto' chooses the sizes itself, and {dict(given)} gives some"
        )
    if need is None:  # without a model, only rows can be split
        return "data", {**given, "data": -1}
    if memory is None:
        memory = device_memory(devices)
    choice = strategy.choose(need, len(devices), memory, _slices(devices))
    log.log(logging.INFO if choice.fits else logging.WARNING, choice.why)
    return choice.strategy, choice.sizes


def device_memory(devices: Devices) -> float:
    """Returns the bytes of one device; of a CPU, an equal share of the host's memory.

    Raises:
      ConfigError: an accelerator's runtime does not know its memory.
    """
    device = devices[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return float(limit)
    if device.platform != "cpu":
        raise ConfigError(
            f"mesh.strategy='auto': the memory of a {device.device_kind} is not known; "
            "give the sizes"
        )
    host_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return float(host_memory) / jax.local_device_count()


def _slices(devices: Devices) -> int:
    return len({getattr(device, "slice_index", None) for device in devices})


def _mesh(given: Axes, devices: Devices) -> Mesh:
    """Places devices: neighbors along the axes of a slice; `replica` alone lies across slices.

    The mesh has an axis `expert` only if several devices lie along it.

    Only DCN connects slices. Within one, an axis lies along whole sides of the slice if possible,
    else along a part of one: 32 of 4 x 4 x 4 chips.
    """
    slices = _slices(devices)
    axes = [axis for axis in AXES if axis != "expert" or given[axis] > 1]
    sizes = [given[axis] for axis in axes]
    replicas, *others = sizes
    if replicas % slices:
        raise ConfigError(
            f"mesh.replica={replicas}: the devices are in {slices} slices, and replica lies "
            "across them"
        )
    if slices == 1:
        placed = mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=True
        )
    else:
        placed = mesh_utils.create_hybrid_device_mesh(
            mesh_shape=(replicas // slices, *others),
            dcn_mesh_shape=(slices, *(1 for _ in others)),
            devices=devices,
            allow_split_physical_axes=True,
        )
    return Mesh(placed, axes, axis_types=(AxisType.Auto,) * len(axes))


def _rules(table: Mapping[str, tuple[str, ...]], overrides: Mapping[str, Any]) -> Rules:
    """Returns a table of rules with the overrides of `MeshConfig.rules`."""
    rules = dict(table)
    for name, axes in overrides.items():
        if isinstance(axes, str):
            axes = (axes,)
        elif axes is None:
            axes = ()
        if name not in rules:
            known = ", ".join(sorted(rules))
            raise ConfigError(
                f"mesh.rules.{name}: unknown logical axis; known: {known}"
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
    """Shards an activation by the rules of the mesh in use; does nothing outside of `Layout.use`.

    A dimension of size 1, such as the one token of a decode step, is not sharded.
    """
    layout = _CURRENT.get()
    if layout is None or layout.mesh.size == 1:
        return x
    layout.spec(names)  # an unknown name is an error at every size
    names = [
        name if size > 1 else None for name, size in zip(names, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, layout.sharding(*names))


def shards(name: str) -> int:
    """Returns over how many devices a logical axis is sharded; 1 outside of `Layout.use`."""
    layout = _CURRENT.get()
    return 1 if layout is None else layout._size(layout.rules[name])


def disjoint(*names: str) -> Rules:
    """Returns rules of the mesh in use by which no mesh axis shards two of these logical axes.

    An axis goes to the first name that it would shard. All are empty outside of `Layout.use`.
    """
    layout = _CURRENT.get()
    rules: Rules = dict.fromkeys(names, ())
    if layout is None:
        return rules
    used: set[str] = set()
    for name in names:
        axes = [axis for axis in layout.rules[name] if axis not in used]
        rules[name] = tuple(axis for axis in axes if layout.mesh.shape[axis] > 1)
        used.update(axes)
    return rules


def per_device(
    f: Callable[..., Any],
    arguments: Sequence[Sequence[str | None]],
    result: Sequence[str | None],
    rules: Rules | None = None,
) -> Callable[..., Any]:
    """Returns f run by every device on its own shards of the arguments.

    For kernels, which the compiler cannot split. Without a mesh, or on one device, it is f itself.

    Args:
      arguments: the logical axis names of each argument.
      result: those of the result.
      rules: laid over those of the mesh in use.
    """
    layout = _CURRENT.get()
    if layout is None or layout.mesh.size == 1:
        return f
    if rules is not None:
        layout = dataclasses.replace(layout, rules={**layout.rules, **rules})
    specs = tuple(layout.spec(names) for names in arguments)
    return jax.shard_map(
        f,
        mesh=layout.mesh,
        in_specs=specs,
        out_specs=layout.spec(result),
        check_vma=False,
    )
