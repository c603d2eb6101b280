"""The gcloud calls of launch.tpu: each function returns the words of one call and runs nothing."""

import dataclasses
import re
from collections.abc import Sequence

from absl import flags

# Software of the TPU VM by chip, https://cloud.google.com/tpu/docs/runtimes.
RUNTIMES = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
# A VM that was lost is noticed within a minute.
ALIVE = ("--ssh-flag=-oServerAliveInterval=15", "--ssh-flag=-oServerAliveCountMax=4")


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A queued resource: its name, its place, and what is asked for.

    extra: flags of gcloud's own for `create` and for `ssh` (which `scp` gets too).
    """

    name: str
    zone: str
    project: str | None = None
    accelerator: str | None = None
    runtime: str | None = None
    slices: int = 1
    spot: bool = False
    reserved: bool = False
    network: str | None = None
    service_account: str | None = None
    valid_until: str | None = None
    track: str | None = None
    extra: dict[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    @property
    def nodes(self) -> list[str]:
        """The names of its TPU VMs, one per slice."""
        if self.slices == 1:
            return [self.name]
        return [f"{self.name}-{i}" for i in range(self.slices)]


def runtime_of(accelerator: str) -> str:
    """The runtime version for an accelerator type such as v5litepod-16.

    Raises:
      flags.IllegalFlagValueError: the chip is unknown, or is not served by the Cloud TPU API.
    """
    chip = accelerator.rpartition("-")[0].lower()
    if re.fullmatch(r"(tpu|v)7.*", chip):
        raise flags.IllegalFlagValueError(
            f"--accelerator={accelerator}: the Cloud TPU API does not serve tpu7x; use launch.gke"
        )
    if chip not in RUNTIMES:
        known = ", ".join(f"{name}-N" for name in RUNTIMES)
        raise flags.IllegalFlagValueError(
            f"--accelerator={accelerator}: its runtime is unknown; expected {known}, or --runtime"
        )
    return RUNTIMES[chip]


def create(tpu: Tpu) -> list[str]:
    options = {"accelerator-type": tpu.accelerator, "runtime-version": tpu.runtime}
    if tpu.slices == 1:
        options["node-id"] = tpu.name
    else:
        options |= {"node-count": tpu.slices, "node-prefix": tpu.name}
    options |= {"network": tpu.network, "service-account": tpu.service_account}
    options["valid-until-duration"] = tpu.valid_until
    words = [f"--{key}={value}" for key, value in options.items() if value is not None]
    words += [f"--{key}" for key in ("spot", "reserved") if getattr(tpu, key)]
    head = _tpus(tpu.track, "queued-resources", "create", tpu.name, *_place(tpu))
    return [*head, *words, *tpu.extra.get("create", ()), "--quiet"]


def describe(tpu: Tpu) -> list[str]:
    words = _tpus(None, "queued-resources", "describe", tpu.name, *_place(tpu))
    return [*words, "--format=json(state)"]


def describe_node(tpu: Tpu, node: str) -> list[str]:
    words = _tpus(None, "tpu-vm", "describe", node, *_place(tpu))
    return [*words, "--format=json(state,networkEndpoints,networkConfigs)"]


def delete(tpu: Tpu) -> list[str]:
    words = _tpus(None, "queued-resources", "delete", tpu.name, *_place(tpu))
    return [*words, "--force", "--quiet"]


def lists(tpu: Tpu) -> list[list[str]]:
    """The calls that show what exists in the zone: requests, then TPU VMs."""
    place = _place(tpu)
    return [
        _tpus(None, group, "list", *place) for group in ("queued-resources", "tpu-vm")
    ]


def copy(tpu: Tpu, node: str, files: Sequence[str]) -> list[str]:
    """Copies files into the home folder of every worker of a node."""
    words = _tpus(tpu.track, "tpu-vm", "scp", *files, f"{node}:", *_place(tpu))
    return [*words, "--worker=all", *tpu.extra.get("ssh", ()), "--quiet"]


def ssh(tpu: Tpu, node: str, command: str, worker: str = "all") -> list[str]:
    words = _tpus(tpu.track, "tpu-vm", "ssh", node, *_place(tpu))
    more = [*ALIVE, *tpu.extra.get("ssh", ()), "--quiet", f"--command={command}"]
    return [*words, f"--worker={worker}", *more]


def _tpus(track: str | None, *words: str) -> list[str]:
    return ["gcloud", *([track] if track else []), "compute", "tpus", *words]


def _place(tpu: Tpu) -> list[str]:
    return [
        f"--zone={tpu.zone}",
        *([f"--project={tpu.project}"] if tpu.project else []),
    ]
