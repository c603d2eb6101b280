"""Devices to compile for: a TPU topology by name, which needs no TPU, or those of this machine."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jaxlib import xla_client

from rlhfjax.errors import ConfigError, first_line, install
from rlhfjax.mesh import Devices
from rlhfjax.plan.chips import TPUS, Chip

HERE = "here"
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Any type: without one libtpu warns. The topology decides.
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    # libtpu's lock is for the chips of a host, and none is used here.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Target(NamedTuple):
    """The devices that a program is compiled for."""

    name: str
    devices: Devices
    chip: Chip | None  # None if its speed is unknown: a CPU, an unlisted GPU
    capacity: float | None  # bytes per device; None if unknown
    topology: str = ""  # of a TPU; "" for the devices of this machine
    slices: int = 1

    @property
    def chips(self) -> float:
        return len(self.devices) / (self.chip.devices if self.chip else 1)

    @property
    def compiler(self) -> str:
        """The compiler and its version: with another libtpu a run may need other memory."""
        package = "libtpu" if self.topology else "jaxlib"
        return f"{package} {importlib.metadata.version(package)}"


def target(topology: str, slices: int = 1) -> Target:
    """Returns the devices of a TPU topology such as `v5e:4x4`, or those of this machine (`here`).

    Args:
      slices: how many slices of this topology.
    Raises:
      ConfigError: the chip or the shape is unknown, or libtpu is not installed.
    """
    if topology == HERE:
        return _here()
    family, colon, _ = topology.partition(":")
    if family not in TPUS or not colon:
        raise ConfigError(
            f"--topology={topology}: expected CHIP:SHAPE such as v5e:4x4 or v5p:4x4x4, or {HERE}; "
            f"chips are {', '.join(TPUS)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"plan: compiling for a TPU needs its compiler: {install('plan')}"
        )
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if family == "v4":  # as JAX itself does on v4: both cores of a chip are one device
        options["chip_config_name"] = "megacore"
    try:
        with quiet():
            _load_libtpu()
            devices = topologies.get_topology_desc(
                platform="tpu", topology_name=topology, **options
            ).devices
    except Exception as e:  # libtpu raises several types
        raise ConfigError(f"--topology={topology}: {first_line(e)}") from None
    places = {(getattr(d, "slice_index", 0), *d.coords) for d in devices}
    chip = dataclasses.replace(TPUS[family], devices=len(devices) // len(places))
    name = topology if slices == 1 else f"{slices} x {topology}"
    return Target(
        name=name,
        devices=devices,
        chip=chip,
        capacity=chip.hbm / chip.devices,
        topology=topology,
        slices=slices,
    )


def _load_libtpu() -> None:
    """Loads the compiler and leaves its profiler out.

    JAX would register it too, and where no TPU is started it ends the process at a later
    `jax.profiler.start_trace`, such as that of `log.profile`.
    """
    if not xla_client.pjrt_plugin_loaded("tpu"):
        import libtpu

        xla_client.load_pjrt_plugin_dynamically("tpu", libtpu.get_library_path())


def _here() -> Target:
    devices = jax.devices()
    name = f"{len(devices)} x {devices[0].device_kind}"
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    capacity = float(limit) if limit else None
    return Target(name, devices, chip=None, capacity=capacity)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Sets an environment in which libtpu prints nothing and looks for no chip; then restores it.

    Otherwise libtpu would ask Google's metadata server which TPU this machine has. JAX computes on
    the CPU. libtpu reads XLA_FLAGS too, and ends the process at a flag of another backend; the CPU
    has read its own flags before.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.devices()
    before = dict(os.environ)
    flags = before.get("XLA_FLAGS", "").split()
    flags = [f for f in flags if not f.startswith(("--xla_cpu", "--xla_gpu"))]
    os.environ.update(_QUIET | before | {"XLA_FLAGS": " ".join(flags)})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
