"""What a stage needs and how long a step takes, by arithmetic alone: microseconds where the compiler takes minutes.

Good enough to say where to begin looking, and what a change would be worth; `compiled.py` has the last word. The bytes
are those of `rlhfjax/footprint.py`, which `mesh.strategy=auto` goes by.
"""

import dataclasses
import math
from collections.abc import Mapping

from rlhfjax import footprint
from rlhfjax.footprint import Net
from rlhfjax.plan import chips
from rlhfjax.plan.chips import Chip, Work
from rlhfjax.plan.programs import passes, passes_of, step_flops
from rlhfjax.plan.shapes import Subject
from rlhfjax.roles import Workload


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes per device by part, of the moment that takes most; seconds of a step, at least."""

    parts: dict[str, float]
    seconds: float
    tokens: int

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())


def estimate(
    subject: Subject,
    axes: Mapping[str, int],
    chip: Chip,
    completions: int = 2,
    part: str = "",
) -> Estimate:
    """Returns the estimate of a stage on a mesh with these axes.

    FSDP gathers weights for every pass and scatters gradients once per microbatch, whole layers at a time.

    Args:
      completions: responses to a prompt, where the data decides that: reward and direct stages.
      part: "rollout" or "update", the moment that is meant; else the one that takes more.
    """
    workload = subject.workload(completions)
    nets = [net for net in subject.nets if net.role.mesh == "train"]
    parts = footprint.device_bytes(nets, workload, axes, part)
    return Estimate(
        parts, _seconds(subject, workload, axes, chip, completions), workload.units
    )


def smallest_batch(subject: Subject) -> int:
    """Returns the rows of one microbatch of all devices, which the data-like axes have to divide."""
    return subject.workload().batch


def _seconds(
    subject: Subject,
    workload: Workload,
    axes: Mapping[str, int],
    chip: Chip,
    completions: int,
) -> float:
    """Rooflines of the passes forward and backward, and of decoding, one after the other."""
    model, devices = subject.model, math.prod(axes.values())
    trained = footprint.trained_nets(subject.nets)
    trains = {one.program for one, _ in passes_of(subject, completions) if one.trains}
    flops = step_flops(subject, completions)
    training = sum(n for name, n in flops.items() if name in trains)
    work = Work(passes(trained) * training / devices, 0, 0, 0)
    for net in trained:
        work += _pass_bytes(net, axes).times(workload.rounds)
    work += Work(0, 0, workload.rounds * _tensor_bytes(subject, workload, axes), 0)
    rest = Work((sum(flops.values()) - training) / devices, 0, 0, 0)
    seconds = chips.roofline(work, chip).seconds + chips.roofline(rest, chip).seconds
    if workload.decoded:
        size = 2.0 if model.dtype == "bfloat16" else 4.0
        weights = trained[0].numbers * size / axes["tensor"]
        cache = (
            footprint.cache_bytes(model, workload, axes) / 2
        )  # half full, on average
        gather = weights * (axes["fsdp"] - 1) / axes["fsdp"]
        decoding = Work(0, weights + cache, gather, 0).times(workload.sampled)
        seconds += chips.roofline(decoding, chip).seconds
    return seconds


def _pass_bytes(net: Net, axes: Mapping[str, int]) -> Work:
    """Of one microbatch: weights are gathered forward and backward, gradients scattered, and summed over replicas."""
    size = 2.0 if net.config.dtype == "bfloat16" else 4.0
    n, fsdp, data = net.numbers / axes["tensor"], axes["fsdp"], axes["data"]
    ici = (
        n * (2 * size + 4.0) * (fsdp - 1) / fsdp
        + 2 * 4.0 * n / fsdp * (data - 1) / data
    )
    replica = axes["replica"]
    dcn = 2 * 4.0 * n / fsdp * (replica - 1) / replica
    return Work(0, 3 * n * size + 12.0 * n / fsdp, ici, dcn)


def _tensor_bytes(
    subject: Subject, workload: Workload, axes: Mapping[str, int]
) -> float:
    """Megatron's all-reduces: two per layer forward and two backward, and two more where it is computed again."""
    c, t = subject.model, axes["tensor"]
    rows = footprint.rows_per_device(workload, axes)
    size = 2.0 if c.dtype == "bfloat16" else 4.0
    times = 6 if c.remat == "full" else 4
    return (
        times * c.n_layers * 2 * (t - 1) / t * rows * workload.length * c.d_model * size
    )
