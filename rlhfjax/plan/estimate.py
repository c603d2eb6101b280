"""Estimates by arithmetic what a stage needs and how long a step takes, in microseconds.

The compiler takes minutes and has the last word (`compiled.py`); the estimate says where a search
should begin and what a change would be worth. The bytes are those of `rlhfjax/footprint.py`, which
`mesh.strategy=auto` uses too.
"""

import dataclasses
import math

from rlhfjax import footprint
from rlhfjax.footprint import Net, Phase, batch_shards, number_bytes
from rlhfjax.models.config import TransformerConfig
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
    devices = math.prod(axes.values())
    trained = footprint.trained_nets(subject.nets)
    trains = training_programs(subject, completions)
    training_flops = forward_flops = 0.0
    for name, flops in step_flops(subject, completions).items():
        if name in trains:
            training_flops += flops
        else:
            forward_flops += flops
    training = Work(flops=flops_ratio(trained) * training_flops / devices)
    for net in trained:
        training += _weight_traffic(net, axes).times(workload.rounds)
    tensor_bytes = _tensor_all_reduces(subject.model, workload, axes)
    training += Work(ici_bytes=workload.rounds * tensor_bytes)
    phases = [training, Work(flops=forward_flops / devices)]
    if workload.decoded:
        token = _decode_traffic(trained[0], workload, axes)
        phases.append(token.times(workload.sampled))
    return float(sum(chips.roofline(phase, chip).seconds for phase in phases))


def _decode_traffic(policy: Net, workload: Workload, axes: Axes) -> Work:
    """Returns the traffic of one decode step: all weights, and a cache that is half full."""
    fsdp = axes["fsdp"]
    weights = policy.numbers * number_bytes(policy.config) / axes["tensor"]
    cache = footprint.cache_bytes(policy.config, workload, axes) / 2
    return Work(hbm_bytes=weights + cache, ici_bytes=weights * (fsdp - 1) / fsdp)


def _weight_traffic(net: Net, axes: Axes) -> Work:
    """Returns the traffic of weights and gradients in one microbatch.

    Weights are all-gathered in the forward and in the backward pass; gradients are
    reduce-scattered, and all-reduced over `data` and `replica`.
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


def _tensor_all_reduces(c: TransformerConfig, workload: Workload, axes: Axes) -> float:
    """Returns the bytes that Megatron's all-reduces send in one microbatch.

    There are two per layer in the forward and two in the backward pass, and two more where the
    forward pass is recomputed.
    """
    tensor = axes["tensor"]
    count = c.n_layers * (6 if c.remat == "full" else 4)
    rows = math.ceil(workload.rows / batch_shards(axes))
    activation = rows * workload.length * c.d_model * number_bytes(c)
    return count * 2 * (tensor - 1) / tensor * activation
