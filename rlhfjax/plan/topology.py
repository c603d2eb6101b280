"""Devices to compile for: a TPU topology by name, which needs no TPU, or the devices at hand."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from rlhfjax.errors import ConfigError, first_line
from rlhfjax.plan.chips import CHIPS, Chip

HERE = "here"
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any: without one it warns; the topology decides
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock is for the chips of a host: none is used here
}


class Target(NamedTuple):
    """What a program is compiled for."""

    name: str
    devices: Sequence[jax.Device]
    chip: (
        Chip | None
    )  # None where nothing is known of the speed: a CPU, an unlisted GPU
    capacity: float | None  # bytes a device, None where unknown
    topology: str = ""  # of a TPU that need not be here; empty: the devices at hand
    slices: int = 1

    @property
    def chips(self) -> float:
        return len(self.devices) / (self.chip.devices if self.chip else 1)

    @property
    def compiler(self) -> str:
        """The compiler and its version: a run with another libtpu may need another amount of memory."""
        package = "libtpu" if self.topology else "jaxlib"
        return f"{package} {importlib.metadata.version(package)}"


def target(topology: str, slices: int = 1) -> Target:
    """The devices of `v5e:4x4` and the like, of several such slices, or those `here`.

    Raises:
      ConfigError: an unknown chip or shape, or libtpu is not installed.
    """
    if topology == HERE:
        return _here()
    family = topology.partition(":")[0]
    if family not in CHIPS or ":" not in topology:
        raise ConfigError(
            f"--topology={topology}: expected CHIP:SHAPE such as v5e:4x4 or v5p:4x4x4, or {HERE}; "
            f"chips are {', '.join(CHIPS)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "plan: compiling for a TPU needs its compiler: pip install 'rlhfjax[plan]'"
        )
    options = {"num_slices": slices} if slices > 1 else {}
    if family == "v4":  # JAX's own choice on v4: both cores of a chip as one device
        options["chip_config_name"] = "megacore"
    try:
        with quiet():
            devices = topologies.get_topology_desc(
                platform="tpu", topology_name=topology, **options
            ).devices
    except Exception as e:  # libtpu answers with several types
        raise ConfigError(f"--topology={topology}: {first_line(e)}") from None
    places = {(getattr(d, "slice_index", 0), *d.coords) for d in devices}
    chip = dataclasses.replace(CHIPS[family], devices=len(devices) // len(places))
    name = topology if slices == 1 else f"{slices} x {topology}"
    return Target(name, devices, chip, chip.hbm / chip.devices, topology, slices)


def _here() -> Target:
    devices = jax.devices()
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    return Target(
        f"{len(devices)} x {devices[0].device_kind}",
        devices,
        None,
        float(limit) if limit else None,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """An environment in which libtpu says nothing and looks for no chip; afterwards it is as it was.

    libtpu would otherwise ask Google's metadata server which TPU this machine has; JAX computes on the CPU. It reads
    XLA_FLAGS too, and ends the process at a flag of another backend: the CPU's has read them before.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.devices()
    before = dict(os.environ)
    flags = [
        f
        for f in before.get("XLA_FLAGS", "").split()
        if not f.startswith(("--xla_cpu", "--xla_gpu"))
    ]
    os.environ.update(_QUIET | before | {"XLA_FLAGS": " ".join(flags)})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
