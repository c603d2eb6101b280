"""Estimates by arithmetic what a stage needs and how long a step takes, in microseconds.

The compiler takes minutes and has the last word (`compiled.py`); the estimate says where a search
should begin and what a change would be worth. The bytes are those of `rlhfjax/footprint.py`, which
`mesh.strategy=auto` uses too.
"""

import dataclasses
import math
from collections.abc import Sequence

from rlhfjax import footprint
from rlhfjax.footprint import Net, Phase, batch_shards
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.size import number_bytes
from rlhfjax.plan import chips, links
from rlhfjax.plan.chips import Chip, Work
from rlhfjax.plan.programs import flops_ratio, step_flops, training_programs
from rlhfjax.plan.shapes import Subject
from rlhfjax.roles import Workload
from rlhfjax.sampling import layout as layouts
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
    n = decode_size(subject, workload, axes)
    if n is not None:
        rollout = _decode_bytes(nets, workload, axes, n)
        is_larger = sum(rollout.values()) > sum(parts.values())
        if phase == "rollout" or (not phase and is_larger):
            parts = rollout
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
        training += _weight_traffic(net, axes, chip.node).times(workload.rounds)
    reduces = _tensor_all_reduces(subject.model, workload, axes, chip.node)
    training += reduces.times(workload.rounds)
    phases = [training, Work(flops=forward_flops / devices)]
    if workload.decoded:
        phases.append(_rollout_work(subject, workload, axes, chip.node))
    return float(sum(chips.roofline(phase, chip).seconds for phase in phases))


def decode_size(subject: Subject, workload: Workload, axes: Axes) -> int | None:
    """Returns the n of the decode layout that a config asks for; None: that of training."""
    config = subject.config
    if getattr(config, "rollout_layout", "") != "decode" or axes["fsdp"] == 1:
        return None
    if config.rollout_tensor:
        return layouts.given(subject.model, axes, config.rollout_tensor, config.stage)
    return layouts.choose(subject.model, workload, axes)[0]


def _decode_bytes(
    nets: Sequence[Net], workload: Workload, axes: Axes, n: int
) -> dict[str, float]:
    """Returns the bytes per device during a rollout, when the weights are there twice."""
    model = nets[0].config
    parts = footprint.device_bytes(nets, workload, axes, "rollout")
    decode_axes = layouts.decode_axes(axes, n)
    cache = footprint.cache_bytes(model, workload, decode_axes)
    total = layouts.rollout_bytes(model, workload, axes, n)
    return parts | {"KV cache": cache, "weights of rollouts": total - cache}


def _rollout_work(subject: Subject, workload: Workload, axes: Axes, node: int) -> Work:
    """Returns the traffic of a rollout: that of its decode steps, and of resharding the weights."""
    policy = footprint.trained_nets(subject.nets)[0]
    n = decode_size(subject, workload, axes)
    if n is None:
        token = _decode_traffic(policy, workload, axes, node)
        return token.times(workload.sampled)
    layout = layouts.decode_axes(axes, n)
    traffic = layouts.traffic(policy.config, workload, axes, n)
    work = Work(hbm_bytes=traffic.hbm)
    work += links.send(traffic.resharded, "fsdp", layout, node)
    return work + links.send(traffic.reduced, "tensor", layout, node)


def _decode_traffic(policy: Net, workload: Workload, axes: Axes, node: int) -> Work:
    """Returns the traffic of one decode step: all weights, and a cache that is half full."""
    n = policy.numbers * footprint.expert_share(policy, axes)
    weights = n * number_bytes(policy.config) / axes["tensor"]
    cache = footprint.cache_bytes(policy.config, workload, axes) / 2
    return Work(hbm_bytes=weights + cache) + links.gather(weights, "fsdp", axes, node)


def _weight_traffic(net: Net, axes: Axes, node: int) -> Work:
    """Returns the traffic of weights and gradients in one microbatch.

    Weights are all-gathered in the forward and in the backward pass; gradients are
    reduce-scattered, and all-reduced over `data` and `replica`.
    """
    size, fsdp = number_bytes(net.config), axes["fsdp"]
    n = net.numbers * footprint.expert_share(net, axes) / axes["tensor"]
    shard = 4.0 * n / fsdp  # bytes of a device's gradients, in float32
    traffic = Work(hbm_bytes=3 * n * size + 3 * shard)
    traffic += links.gather(n * (2 * size + 4.0), "fsdp", axes, node)
    for axis in ("data", "replica"):
        traffic += links.gather(2 * shard, axis, axes, node)
    return traffic


def _tensor_all_reduces(
    c: TransformerConfig, workload: Workload, axes: Axes, node: int
) -> Work:
    """Returns the traffic that Megatron's all-reduces are in one microbatch.

    There are two per layer in the forward and two in the backward pass, and two more where the
    forward pass is recomputed. Over `expert` only those of the experts' outputs are sent, half as
    many.
    """
    count = c.n_layers * (6 if c.remat == "full" else 4)
    rows = math.ceil(workload.rows / batch_shards(axes))
    activations = count * rows * workload.length * c.d_model * number_bytes(c)
    tensor = links.gather(2 * activations, "tensor", axes, node)
    return tensor + links.gather(activations, "expert", axes, node)
