"""Device memory: what a run reaches, and what XLA planned for it on the same backend.

A GPU or TPU knows the most bytes that it has had in use since the process began; a CPU does not.
What was planned is read from the programs of the first step, which are compiled anyway: arguments,
temporaries and outputs of one program, and the arrays that are on the device beside it. `rlhfjax
plan --topology=here` computes the same without a run.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.programs import Program, observed

GIB = 2.0**30


def peak_bytes(devices: Sequence[Any]) -> float | None:
    """Returns the most bytes that one of these devices has had in use; None if none knows."""
    return _largest(devices, "peak_bytes_in_use")


def capacity(devices: Sequence[Any]) -> float | None:
    """Returns the bytes that one of these devices may use; None if none knows."""
    return _largest(devices, "bytes_limit")


def _largest(devices: Sequence[Any], name: str) -> float | None:
    values = [(device.memory_stats() or {}).get(name) for device in devices]
    return max((float(value) for value in values if value), default=None)


class Memory:
    """What the programs of a step were planned to need, and what the devices reached."""

    def __init__(self, devices: Sequence[Any] | None = None):
        self._devices = jax.local_devices() if devices is None else devices
        self.planned: dict[str, float] = {}  # bytes per device, by program

    def observing(self, wanted: bool = True) -> contextlib.AbstractContextManager[None]:
        """Reads, of every program that is called within, what XLA planned."""
        return observed(self._plan) if wanted else contextlib.nullcontext()

    @contextlib.contextmanager
    def _plan(
        self, program: Program, args: tuple[Any, ...], static: dict[str, Any]
    ) -> Iterator[None]:
        beside = bytes_beside(args)
        yield
        if not hasattr(program.function, "lower"):  # it is not jitted
            return
        # The call has compiled it: jax looks it up.
        compiled = program.function.lower(*args, **static).compile()
        needed = program_bytes(compiled.memory_analysis())
        if needed is not None:
            before = self.planned.get(program.name, 0.0)
            self.planned[program.name] = max(before, needed + beside)

    def metrics(self) -> dict[str, float]:
        """Returns peak_memory and planned_memory in GiB; {} if the devices do not know a peak."""
        peak = peak_bytes(self._devices)
        if peak is None:
            return {}
        values = {"peak_memory": peak / GIB}
        if self.planned:
            values["planned_memory"] = max(self.planned.values()) / GIB
        return values

    def describe(self) -> str:
        """Returns a line for the log; "" if nothing is known."""
        parts = []
        if self.planned:
            name = max(self.planned, key=lambda name: self.planned[name])
            parts.append(f"{_shown(self.planned[name])} planned by XLA, for {name}")
        if (peak := peak_bytes(self._devices)) is not None:
            parts.append(f"{_shown(peak)} reached")
        if parts and (room := capacity(self._devices)) is not None:
            parts.append(f"{_shown(room)} there")
        return f"memory per device: {'; '.join(parts)}" if parts else ""


def program_bytes(analysis: Any) -> float | None:
    """Returns the bytes per device of a program at its peak; None if the backend does not know."""
    if analysis is None:
        return None
    sizes = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    sizes += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    peak = getattr(analysis, "peak_memory_in_bytes", 0)
    return float(max(sizes, peak))


def bytes_beside(args: Any) -> float:
    """Returns the bytes of one device's arrays that are not among a program's arguments.

    The device is the first one of the arguments.
    """
    own = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
    if not own:
        return 0.0
    device = min(own[0].sharding.device_set, key=lambda device: device.id)
    ids = {id(x) for x in own}
    total = 0.0
    for x in jax.live_arrays():
        if id(x) in ids or x.is_deleted() or device not in x.sharding.device_set:
            continue
        total += _shard_bytes(x)
    return total


def _shard_bytes(x: jax.Array) -> float:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return 0.0
    return float(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize)


def _shown(size: float) -> str:
    return f"{size / GIB:.3g} GiB"
