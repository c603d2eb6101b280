"""Estimates by arithmetic what a stage needs and how long a step takes, in microseconds.

The compiler takes minutes and has the last word (`compiled.py`); the estimate says where a search
should begin and what a change would be worth. The bytes are those of `rlhfjax/footprint.py`, which
`mesh.strategy=auto` uses too.
"""

import dataclasses
import math

from rlhfjax import footprint
from rlhfjax.footprint import Net, Phase, batch_shards, number_bytes
from rlhfjax.plan import chips
from rlhfjax.plan.chips import Chip, Work
from rlhfjax.plan.programs import flops_ratio, step_flops, training_programs
from rlhfjax.plan.shapes import Subject
from rlhfjax.roles import Workload
from rlhfjax.strategy import Axes


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a stage needs per device at its peak, and a lower bound of the time per step."""

    parts: dict[str, float]  # bytes
    seconds: float
    tokens: int

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())


def estimate(
    subject: Subject,
    axes: Axes,
    chip: Chip,
    completions: int = 2,
    phase: Phase = "",
) -> Estimate:
    """Returns the estimate of a stage on a mesh with these axis sizes.

    FSDP all-gathers weights for every pass and reduce-scatters gradients once per microbatch, a
    layer at a time.

    Args:
      completions: responses per prompt of a reward or direct stage, which its data decides.
      phase: "rollout" or "update"; "" is the one that needs more memory.
    """
    workload = subject.workload(completions)
    nets = [net for net in subject.nets if net.role.mesh == "train"]
    parts = footprint.device_bytes(nets, workload, axes, phase)
    seconds = _seconds(subject, workload, axes, chip, completions)
    return Estimate(parts, seconds, workload.units)


def _seconds(
    subject: Subject, workload: Workload, axes: Axes, chip: Chip, completions: int
) -> float:
    """Adds up the rooflines of training, of forward passes and of decoding."""
    model, devices = subject.model, math.prod(axes.values())
    trained = footprint.trained_nets(subject.nets)
    trains = training_programs(subject, completions)
    flops = step_flops(subject, completions)
    training = sum(n for name, n in flops.items() if name in trains)
    work = Work(flops=flops_ratio(trained) * training / devices)
    for net in trained:
        work += _weight_traffic(net, axes).times(workload.rounds)
    tensor_bytes = _tensor_all_reduces(subject, workload, axes)
    work += Work(ici_bytes=workload.rounds * tensor_bytes)
    rest = Work(flops=(sum(flops.values()) - training) / devices)
    seconds = chips.roofline(work, chip).seconds + chips.roofline(rest, chip).seconds
    if workload.decoded:
        weights = trained[0].numbers * number_bytes(model) / axes["tensor"]
        # The cache is half full on average.
        cache = footprint.cache_bytes(model, workload, axes) / 2
        gather = weights * (axes["fsdp"] - 1) / axes["fsdp"]
        token = Work(hbm_bytes=weights + cache, ici_bytes=gather)
        seconds += chips.roofline(token.times(workload.sampled), chip).seconds
    return seconds


def _weight_traffic(net: Net, axes: Axes) -> Work:
    """Returns the traffic of weights and gradients in one microbatch.

    Weights are all-gathered in the forward and in the backward pass; gradients are reduce-scattered,
    and all-reduced over `data` and `replica`.
    """
    size, fsdp = number_bytes(net.config), axes["fsdp"]
    n = net.numbers / axes["tensor"]
    shard = 4.0 * n / fsdp  # bytes of a device's gradients, in float32

    def all_reduce(axis: str) -> float:
        return 2 * shard * (axes[axis] - 1) / axes[axis]

    gathers = n * (2 * size + 4.0) * (fsdp - 1) / fsdp
    return Work(
        hbm_bytes=3 * n * size + 3 * shard,
        ici_bytes=gathers + all_reduce("data"),
        dcn_bytes=all_reduce("replica"),
    )


def _tensor_all_reduces(subject: Subject, workload: Workload, axes: Axes) -> float:
    """Returns the bytes that Megatron's all-reduces send in one microbatch.

    There are two per layer in the forward and two in the backward pass, and two more where the
    forward pass is recomputed.
    """
    c, tensor = subject.model, axes["tensor"]
    count = c.n_layers * (6 if c.remat == "full" else 4)
    rows = math.ceil(workload.rows / batch_shards(axes))
    activation = rows * workload.length * c.d_model * number_bytes(c)
    return count * 2 * (tensor - 1) / tensor * activation
