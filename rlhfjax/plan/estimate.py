"""What a stage needs and how long a step takes, by arithmetic alone: microseconds where the compiler takes minutes.

Good enough to say where to begin looking, and what a change would be worth; `compiled.py` has the last word.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from rlhfjax import optim
from rlhfjax.models.config import TransformerConfig
from rlhfjax.plan import chips, memory
from rlhfjax.plan.chips import Chip, Work
from rlhfjax.plan.programs import RANKED, passes, step_flops, trained_models
from rlhfjax.plan.shapes import Subject

CHUNK = 2**23 * 4.0 * 3  # bytes of the logits that live at a time: see models/logprobs.py


class Net(NamedTuple):
    """A model of a stage: its size, and what is kept of it beside the weights."""

    shape: TransformerConfig
    head: str
    trained: float  # numbers that have a gradient: all of them, or the adapters
    moments: float  # float32 numbers of the optimiser a trained number; one in bfloat16 is half of one
    averaged: bool = False

    @property
    def numbers(self) -> int:
        return memory.parameters(self.shape, self.head)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes a device by part, of the moment that takes most; seconds of a step, at least."""

    parts: dict[str, float]
    seconds: float
    tokens: int

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())


def estimate(subject: Subject, axes: Mapping[str, int], chip: Chip, completions: int = 2, part: str = "") -> Estimate:
    """A stage on a mesh with these axes.

    A device keeps 1 / (fsdp x tensor) of float32 parameters, gradients and moments; of frozen models the parameters.
    Its activations are those of its rows in one microbatch: with remat=full the inputs of all layers (2 t d bytes a row
    and layer) and everything of one. Sampling takes a KV cache in the place of gradients and activations. FSDP gathers
    weights for every pass and scatters gradients once a microbatch, whole layers at a time.

    Args:
      completions: answers to a prompt, where the data decides that: reward and direct stages.
      part: "rollout" or "update", the moment that is meant; else the one that takes more.
    """
    nets, split = networks(subject), axes["fsdp"] * axes["tensor"]
    rows, length = _rows(subject, axes, completions)
    parts = {
        "parameters": sum(4.0 * net.numbers for net in nets) / split,
        "optimiser and average": sum(4.0 * net.trained * (net.moments + net.averaged) for net in nets) / split,
    }
    gradients = _accumulators(subject) * sum(4.0 * net.trained for net in nets) / split
    training = {"gradients": gradients} | _training(subject, rows, length, axes)
    cache = _cache(subject, axes)
    sampling = part == "rollout" or (not part and cache > sum(training.values()))
    parts |= {"KV cache": cache} if sampling else training
    seconds = _seconds(subject, nets, axes, chip, completions)
    return Estimate(parts, seconds, _tokens(subject, completions))


def networks(subject: Subject) -> list[Net]:
    """The models that are on the devices."""
    c, model = subject.config, subject.model
    moments = optim.kept(c.optim)
    if c.stage not in ("ppo", "group"):
        head = "scalar" if c.stage == "reward" else "lm"
        referred = c.stage == "direct" and c.loss.needs_reference and not c.lora.rank
        reference = [Net(model, head, 0.0, 0.0)] if referred else []
        return [Net(model, head, _trained(model, head, c.lora.rank), moments), *reference]
    policy = Net(model, "lm", _trained(model, "lm", c.lora.rank), moments, bool(c.ema))
    nets = [policy]
    if not c.lora.rank:  # with adapters the base is the reference
        nets.append(Net(model, "lm", 0.0, 0.0))
    if subject.reward is not None:
        nets.append(Net(subject.reward, "scalar", 0.0, 0.0))
    for trunk in trained_models(subject)[1:]:
        nets.append(Net(trunk, "scalar", _trained(trunk, "scalar", c.lora.rank), optim.kept(c.value_optim)))
    return nets


def smallest_batch(subject: Subject) -> int:
    """Sequences of one microbatch of all devices, which the data-like axes have to divide."""
    c = subject.config
    return getattr(c, "episodes", c.batch_size) // getattr(c, "minibatches", 1) // c.microbatches


def _trained(c: TransformerConfig, head: str, rank: int) -> float:
    """All numbers, or those of adapters on every projection of a layer: an upper bound, `targets` may name fewer."""
    if not rank:
        return float(memory.parameters(c, head))
    d, mlp = c.d_model, 3 if c.mlp == "swiglu" else 2
    return float(c.n_layers * rank * (4 * 2 * d + mlp * (d + c.d_ff)))


def _rows(subject: Subject, axes: Mapping[str, int], completions: int) -> tuple[int, int]:
    """Sequences of one device in one forward-backward pass, and their length."""
    c, devices = subject.config, axes["replica"] * axes["data"] * axes["fsdp"]
    if c.stage in ("ppo", "group"):
        text = c.ptx.ratio if c.ptx.coefficient else 1
        return math.ceil(c.episodes * text / (c.minibatches * c.microbatches * devices)), c.prompt_length + c.max_new
    sequences = c.batch_size * (completions if c.stage in RANKED else 1)
    return math.ceil(sequences / (c.microbatches * devices)), c.length


def _accumulators(subject: Subject) -> int:
    return 2 if subject.config.microbatches > 1 else 1


def _training(subject: Subject, rows: int, length: int, axes: Mapping[str, int]) -> dict[str, float]:
    """Activations, one layer's weights whole, and the output matrix with its gradient."""
    c, tensor, fsdp = subject.model, axes["tensor"], axes["fsdp"]
    size = 2.0 if c.dtype == "bfloat16" else 4.0
    kept = memory.activations(c, rows, length, size)
    a_layer = sum(memory.layer_activations(c, rows, length, size).values())
    layer = (memory.parameters(c) - 2 * c.vocab_size * c.d_model) / c.n_layers
    output = c.vocab_size * c.d_model * (4.0 + 4.0) + CHUNK
    vocab_split = tensor if c.vocab_size % tensor == 0 else 1
    activations = kept + a_layer / tensor if c.remat == "full" else kept / tensor
    gathered = max(layer, 0) * (2 * size + 4.0) / tensor if fsdp > 1 else 0.0
    return {"activations": activations, "gathered layers": gathered, "output matrix": output / vocab_split}


def _cache(subject: Subject, axes: Mapping[str, int]) -> float:
    """Keys and values of what a device samples."""
    c, m = subject.config, subject.model
    if c.stage not in ("ppo", "group"):
        return 0.0
    devices = axes["replica"] * axes["data"] * axes["fsdp"]
    size = 2.0 if m.dtype == "bfloat16" else 4.0
    heads = axes["tensor"] if m.kv_heads % axes["tensor"] == 0 else 1
    decoded = c.slots if c.slots > 0 else c.episodes
    rows = math.ceil(decoded / devices)
    return memory.kv_cache_bytes(m, rows, c.prompt_length + c.max_new, size) / heads


def _tokens(subject: Subject, completions: int) -> int:
    c = subject.config
    if c.stage in ("ppo", "group"):
        return c.episodes * c.max_new
    return c.batch_size * c.length * (completions if c.stage in RANKED else 1)


def _seconds(subject: Subject, nets: list[Net], axes: Mapping[str, int], chip: Chip, completions: int) -> float:
    """Rooflines of the passes forward and backward, and of decoding, one after the other."""
    c, model = subject.config, subject.model
    devices = math.prod(axes.values())
    flops = step_flops(subject, completions)
    policy_stage = c.stage in ("ppo", "group")
    rounds = (c.epochs * c.minibatches if policy_stage else 1) * c.microbatches
    rounds *= 2 if policy_stage and c.ptx.coefficient else 1
    trained = [net for net in nets if net.trained]
    again = passes(c.lora.rank, *(net.shape for net in trained))
    work = Work(again * flops["update"] / devices, 0, 0, 0)
    for net in trained:
        work += _pass_bytes(net, axes).times(rounds)
    work += Work(0, 0, rounds * _tensor_bytes(subject, axes, completions), 0)
    rest = Work(sum(n for name, n in flops.items() if name != "update") / devices, 0, 0, 0)
    seconds = chips.roofline(work, chip).seconds + chips.roofline(rest, chip).seconds
    if policy_stage:
        size = 2.0 if model.dtype == "bfloat16" else 4.0
        weights = nets[0].numbers * size / axes["tensor"]
        cache = _cache(subject, axes) / 2  # half full, on average
        gather = weights * (axes["fsdp"] - 1) / axes["fsdp"]
        seconds += chips.roofline(Work(0, weights + cache, gather, 0).times(c.max_new), chip).seconds
    return seconds


def _pass_bytes(net: Net, axes: Mapping[str, int]) -> Work:
    """Of one microbatch: weights are gathered forward and backward, gradients scattered, and summed over replicas."""
    size = 2.0 if net.shape.dtype == "bfloat16" else 4.0
    n, fsdp, data = net.numbers / axes["tensor"], axes["fsdp"], axes["data"]
    ici = n * (2 * size + 4.0) * (fsdp - 1) / fsdp + 2 * 4.0 * n / fsdp * (data - 1) / data
    replica = axes["replica"]
    dcn = 2 * 4.0 * n / fsdp * (replica - 1) / replica
    return Work(0, 3 * n * size + 12.0 * n / fsdp, ici, dcn)


def _tensor_bytes(subject: Subject, axes: Mapping[str, int], completions: int) -> float:
    """Megatron's all-reduces: two a layer forward and two backward, and two more where it is computed again."""
    c, t = subject.model, axes["tensor"]
    rows, length = _rows(subject, axes, completions)
    size = 2.0 if c.dtype == "bfloat16" else 4.0
    times = 6 if c.remat == "full" else 4
    return times * c.n_layers * 2 * (t - 1) / t * rows * length * c.d_model * size
