"""The memory that a stage needs on a device: the one model, which placement and `plan` share.

A device keeps 1 / (fsdp x tensor) of every model, of experts 1 / expert of that: parameters in
float32 (a quantized base in fewer bytes) and, for what is trained, gradients, the optimizer's
moments and an EMA. Its activations are those of its rows in one microbatch: with `remat=full` the
inputs of all layers (2 t d bytes per row and layer) and everything of one layer. Sampling needs a
KV cache instead of gradients and activations. FSDP gathers the weights of one layer at a time.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax

from rlhfjax import optim
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.size import (
    activations,
    expert_parameters,
    kv_cache_bytes,
    layer_activations,
    number_bytes,
    parameters,
)
from rlhfjax.models.transformer import Model
from rlhfjax.roles import Role, Workload
from rlhfjax.strategy import Axes, Need

# Bytes of the logits that are alive at a time, see models/logprobs.py.
CHUNK = 2**23 * 4.0 * 3
# Bytes per number in the layers of adapters' base; NF4 has a float32 scale per 64 numbers.
BASE_BYTES = {"float32": 4.0, "int8": 1.0, "nf4": 0.5 + 4.0 / 64}
Phase = Literal["", "rollout", "update"]  # "": the one that needs more memory


class Net(NamedTuple):
    """A role whose model_config is known."""

    name: str
    role: Role
    config: TransformerConfig

    @property
    def numbers(self) -> int:
        """All parameters that a pass through the model reads."""
        return parameters(self.config, self.role.head)

    @property
    def trained(self) -> int:
        """Parameters that have a gradient."""
        if self.role.optim is None:
            return 0
        if self.role.head_alone:
            return self.config.d_model + 1
        if not self.role.lora.rank:
            return self.numbers
        same = dataclasses.replace(self.config, remat="none", dtype="float32")
        adapted = Model(same, self.role.head, self.role.lora).trained_shapes()
        return sum(math.prod(x.shape) for x in jax.tree.leaves(adapted))

    @property
    def frozen(self) -> int:
        """Frozen parameters that this role adds; those that it shares count for the other role."""
        if self.role.shares is not None:
            return 0
        return self.numbers if self.role.optim is None or self.role.lora.rank else 0

    @property
    def frozen_bytes(self) -> float:
        """Bytes of the frozen parameters; outside of its layers a quantized base is float32."""
        if not self.frozen:
            return 0.0
        layers = self.config.n_layers * layer_parameters(self.config)
        return 4.0 * (self.frozen - layers) + BASE_BYTES[self.role.lora.base] * layers

    @property
    def kept(self) -> float:
        """Float32 numbers kept per trained parameter: the optimizer's moments and the EMA."""
        if self.role.optim is None:
            return 0.0
        return optim.moments_per_parameter(self.role.optim) + self.role.averaged


def expert_share(net: Net, axes: Axes) -> float:
    """Returns the share of a model that a device has along `expert`, which splits only experts."""
    experts = expert_parameters(net.config) / net.numbers
    return 1.0 - experts * (1 - 1 / axes.get("expert", 1))


def trained_nets(nets: Sequence[Net]) -> list[Net]:
    """Returns the models that have an optimizer and a trunk of their own."""
    return [
        net for net in nets if net.role.optim is not None and not net.role.head_alone
    ]


def device_bytes(
    nets: Sequence[Net], workload: Workload, axes: Axes, phase: Phase = ""
) -> dict[str, float]:
    """Returns the bytes per device by part, at the peak of a phase."""
    shards = axes["fsdp"] * axes["tensor"]
    parameter_bytes = gradients = kept = 0.0
    for net in nets:
        share = expert_share(net, axes)
        trained_bytes = 4.0 * net.trained * (1.0 if net.role.lora.rank else share)
        parameter_bytes += trained_bytes + net.frozen_bytes * share
        gradients += trained_bytes
        kept += trained_bytes * net.kept
    parts = {"parameters": parameter_bytes / shards}
    trained = trained_nets(nets)
    if not trained:
        return parts
    parts["optimizer and average"] = kept / shards
    if workload.microbatches > 1:
        gradients *= 2  # those of a microbatch, and their sum
    model = trained[0].config
    training = {"gradients": gradients / shards}
    training |= _training(model, workload, axes)
    cache = cache_bytes(model, workload, axes)
    if phase == "rollout" or (not phase and cache > sum(training.values())):
        return parts | {"KV cache": cache}
    return parts | training


def layer_parameters(c: TransformerConfig) -> int:
    """Returns how many parameters one layer has."""
    return parameters(dataclasses.replace(c, n_layers=c.n_layers + 1)) - parameters(c)


def batch_shards(axes: Axes) -> int:
    """Returns over how many devices a batch is split."""
    return axes["replica"] * axes["data"] * axes["fsdp"]


def _training(c: TransformerConfig, workload: Workload, axes: Axes) -> dict[str, float]:
    """Returns the bytes of activations, a gathered layer, the output matrix and its gradient."""
    tensor, size = axes["tensor"], number_bytes(c)
    rows = math.ceil(workload.rows / batch_shards(axes))
    kept = activations(c, rows, workload.length, size)
    one_layer = sum(layer_activations(c, rows, workload.length, size).values())
    output = c.vocab_size * c.d_model * (4.0 + 4.0) + CHUNK
    vocab_shards = tensor if c.vocab_size % tensor == 0 else 1
    read = kept + one_layer / tensor if c.remat == "full" else kept / tensor
    gathered = 0.0
    if axes["fsdp"] > 1:
        experts = expert_parameters(c) / c.n_layers
        layer = layer_parameters(c) - experts * (1 - 1 / axes.get("expert", 1))
        gathered = layer * (2 * size + 4.0) / tensor
    return {
        "activations": read / axes["sequence"],
        "gathered layers": gathered,
        "output matrix": output / vocab_shards,
    }


def cache_bytes(c: TransformerConfig, workload: Workload, axes: Axes) -> float:
    """Returns the bytes of a device's KV cache; 0 if nothing is sampled."""
    if not workload.decoded:
        return 0.0
    rows = math.ceil(workload.decoded / batch_shards(axes))
    head_shards = math.gcd(c.kv_heads, axes["tensor"])
    return kv_cache_bytes(c, rows, workload.length, number_bytes(c)) / head_shards


def need_of(nets: Sequence[Net], workload: Workload) -> Need:
    """Returns what `mesh.strategy=auto` needs to know of the models that share the mesh."""
    nets = [net for net in nets if net.role.mesh == "train"]
    splits: list[int] = []
    for net in nets:
        c = net.config
        splits += [c.n_heads, c.kv_heads, c.d_ff, c.vocab_size]
    return Need(
        trained=sum(net.trained for net in nets),
        frozen=sum(net.frozen for net in nets),
        rows=workload.batch,
        time=workload.length,
        widths=tuple(net.config.d_model for net in nets),
        splits=tuple(splits),
        device_bytes=lambda axes: sum(device_bytes(nets, workload, axes).values()),
        held_bytes=lambda axes: _held_bytes(nets, workload, axes),
    )


def _held_bytes(nets: Sequence[Net], workload: Workload, axes: Axes) -> float:
    """Returns the bytes per device of parameters, moments and averages."""
    parts = device_bytes(nets, workload, axes, "rollout")
    return sum(size for part, size in parts.items() if part != "KV cache")
