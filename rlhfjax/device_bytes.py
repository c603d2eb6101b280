"""How many bytes the devices have, and an error where they are fewer than what is needed."""

import contextlib
from collections.abc import Mapping

import jax

from rlhfjax.errors import ConfigError
from rlhfjax.mesh import device_memory
from rlhfjax.models.size import Number

# Where Linux has the limit of a container's memory, in bytes, or "max".
_CONTAINER = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def validate_bytes(context: str, needed: Mapping[str, Number], sizes: str) -> None:
    """Validates that all devices together have the bytes that all parts need.

    Args:
      context: what needs them, for an error.
      sizes: the options that make it less, for an error.

    Raises:
      ConfigError: they have less; the message has both numbers.
    """
    total, there = sum(needed.values()), devices_memory()
    if there is None or total <= there:
        return
    parts = ", ".join(f"{part} {shown(size)}" for part, size in needed.items() if size)
    devices = jax.device_count()
    raise ConfigError(
        f"{context}: needs at least {shown(total)} of memory ({parts});"
        f" {devices} device{'s' if devices > 1 else ''} here with {shown(there)}:"
        f" make {sizes} smaller"
    )


def devices_memory() -> float | None:
    """Returns the bytes of all devices; None if an accelerator does not know its own."""
    local = jax.local_devices()
    try:
        memory = device_memory(local)
    except ConfigError:
        return None
    if local[0].platform == "cpu":
        memory = min(memory, _container_memory() / len(local))
    return memory * jax.device_count()


def _container_memory() -> float:
    """Returns the bytes that the container of this process may use; infinity without a limit."""
    limits = [float("inf")]
    for name in _CONTAINER:
        with contextlib.suppress(OSError, ValueError), open(name) as file:
            limits.append(float(file.read()))
    return min(limits)


def shown(size: Number) -> str:
    """Returns a number of bytes with three digits and a unit."""
    units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"
