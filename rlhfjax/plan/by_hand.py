"""A plan by arithmetic alone, for what cannot be compiled here: GPUs.

The compiler of a TPU needs no TPU; that of a GPU needs the GPU. So memory and time are those of
`estimate.py`: what a stage needs at least, and a lower bound of the time.
"""

import dataclasses
from typing import Any, NamedTuple

from rlhfjax import footprint, strategy
from rlhfjax.errors import ConfigError, cut
from rlhfjax.mesh import MeshConfig, axis_sizes
from rlhfjax.plan import chips
from rlhfjax.plan.chips import GPUS, Chip
from rlhfjax.plan.estimate import Estimate, estimate
from rlhfjax.plan.price import Cost, cost
from rlhfjax.plan.programs import step_flops
from rlhfjax.plan.shapes import Subject
from rlhfjax.plan.variants import Divisors
from rlhfjax.strategy import FULL, Axes

BY_HAND = "by hand, not compiled"


class Cluster(NamedTuple):
    """GPUs in nodes of `chip.node`."""

    name: str  # h100:64
    chip: Chip
    count: int

    @property
    def nodes(self) -> int:
        return -(-self.count // self.chip.node)


def cluster(topology: str) -> Cluster | None:
    """Returns the GPUs that a topology such as `h100:64` names; None if it names none.

    Raises:
      ConfigError: the count is no number, or does not fill its nodes.
    """
    family, _, count = topology.partition(":")
    if family not in GPUS:
        return None
    chip = GPUS[family]
    n = int(count) if count.isdecimal() and len(count) < 7 else 0
    if n < 1 or (n > chip.node and n % chip.node):
        raise ConfigError(
            f"--topology={cut(topology)}: expected {family}:COUNT, up to {chip.node} GPUs of one "
            f"node or a multiple of {chip.node}"
        )
    return Cluster(topology, chip, n)


@dataclasses.dataclass(frozen=True)
class HandPlan:
    """What a stage needs and how long it takes, by arithmetic."""

    subject: Subject
    cluster: Cluster
    mesh: Axes
    expected: Estimate
    model_flops: float  # of a step on all devices
    price: float | None = None  # of a chip-hour

    @property
    def capacity(self) -> float:
        """Bytes of one GPU."""
        return self.cluster.chip.hbm

    @property
    def fits(self) -> bool:
        return self.expected.bytes <= FULL * self.capacity

    @property
    def mfu(self) -> float:
        chip, count = self.cluster.chip, self.cluster.count
        return float(chips.mfu(self.model_flops, self.expected.seconds, count, chip))

    @property
    def cost(self) -> Cost:
        """Of all steps."""
        seconds = self.expected.seconds * self.subject.config.steps
        return cost(seconds, self.cluster.count, self.price)

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON values; bytes are per device."""
        return {
            "stage": self.subject.name,
            "kind": self.subject.config.stage,
            "target": self.cluster.name,
            "compiler": BY_HAND,
            "devices": self.cluster.count,
            "chips": self.cluster.count,
            "mesh": dict(self.mesh),
            "fits": self.fits,
            "expected_bytes": self.expected.parts,
            "capacity": self.capacity,
            "steps": self.subject.config.steps,
            "tokens_per_step": self.expected.tokens,
            "step_seconds": self.expected.seconds,
            "tokens_per_second": self.expected.tokens / self.expected.seconds,
            "mfu": self.mfu,
            "hours": 24 * self.cost.days,
            **self.cost.as_dict(),
        }


def plan_by_hand(
    subject: Subject,
    cluster: Cluster,
    completions: int = 2,
    price: float | None = None,
) -> HandPlan:
    """Returns the plan of a stage on the mesh that its config asks for.

    Raises:
      ConfigError: no mesh of this number of GPUs divides the stage.
    """
    axes = axes_of(subject, cluster.count, cluster.chip.hbm)
    _validate_divides(subject, axes)
    return HandPlan(
        subject=subject,
        cluster=cluster,
        mesh=axes,
        expected=estimate(subject, axes, cluster.chip, completions),
        model_flops=sum(step_flops(subject, completions).values()),
        price=price,
    )


def _validate_divides(subject: Subject, axes: Axes) -> None:
    """Validates that the mesh divides the batch and the models. Raises ConfigError."""
    mesh = dataclasses.replace(subject.config.mesh, **axes)
    checked = Divisors(subject).checked(mesh)
    above_1 = {axis: n for axis, n in axes.items() if n > 1}
    if checked is None:
        raise ConfigError(
            f"{subject.name}: mesh {above_1} does not divide the {subject.workload().batch} rows "
            "of a microbatch, or heads, widths and MLPs of the models"
        )
    if checked.rules != mesh.rules:
        raise ConfigError(
            f"{subject.name}: mesh.tensor={mesh.tensor} does not divide a vocabulary: set "
            "mesh.rules={'vocab': ()}"
        )


def axes_of(subject: Subject, devices: int, memory: float) -> Axes:
    """Returns the axis sizes that a run on the devices of one slice or node would have.

    Args:
      memory: bytes of a device.
    Raises:
      ConfigError: the config's sizes do not multiply to the number of devices.
    """
    config: MeshConfig = subject.config.mesh
    if config.devices:
        raise ConfigError(
            f"mesh.devices={config.devices!r}: a plan by hand has all devices"
        )
    given = axis_sizes(config)
    if config.strategy == "auto":
        need = footprint.need_of(subject.nets, subject.workload())
        return strategy.choose(need, devices, memory).sizes
    if config.strategy != "given":
        given = strategy.sizes(config.strategy, given)
    sizes = strategy.fill(given, devices)
    if sizes is None:
        raise ConfigError(f"mesh {given} does not fit {devices} devices")
    return sizes
