"""What a stage takes of a device: the one memory model, which placement and `plan` share.

A device keeps 1 / (fsdp x tensor) of every model: parameters in float32 (a quantized base in fewer
bytes), and of what is trained gradients, the optimizer's moments and an average. Its activations
are those of its rows in one microbatch: with remat=full the inputs of all layers (2 t d bytes per
row and layer) and everything of one layer. Sampling takes a KV cache in the place of gradients and
activations. FSDP gathers the weights of a layer at a time.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from rlhfjax import optim
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.size import (
    activations,
    kv_cache_bytes,
    layer_activations,
    parameters,
)
from rlhfjax.models.transformer import Model
from rlhfjax.roles import Role, Workload
from rlhfjax.strategy import Need

CHUNK = (
    2**23 * 4.0 * 3
)  # bytes of the logits that live at a time: see models/logprobs.py
# Bytes per number of the layers of adapters' base; NF4 has a float32 scale per 64 numbers.
BASE_BYTES = {"float32": 4.0, "int8": 1.0, "nf4": 0.5 + 4.0 / 64}


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
        adapted = Model(self.config, self.role.head, self.role.lora).trained_shapes()
        return sum(math.prod(x.shape) for x in jax.tree.leaves(adapted))

    @property
    def frozen(self) -> int:
        """Returns how many frozen parameters this role adds; those that it shares count elsewhere."""
        if self.role.shares is not None:
            return 0
        return self.numbers if self.role.optim is None or self.role.lora.rank else 0

    @property
    def frozen_bytes(self) -> float:
        """Bytes of those; a quantized base has what is outside of its layers in float32."""
        if not self.frozen:
            return 0.0
        layers = self.config.n_layers * layer_parameters(self.config)
        return 4.0 * (self.frozen - layers) + BASE_BYTES[self.role.lora.base] * layers

    @property
    def kept(self) -> float:
        """Float32 numbers beside a trained parameter: the optimizer's moments and the average."""
        return (
            optim.moments_per_parameter(self.role.optim) + self.role.averaged
            if self.role.optim
            else 0.0
        )


def trained_nets(nets: Sequence[Net]) -> list[Net]:
    """Returns the models that have an optimizer and a trunk of their own."""
    return [
        net for net in nets if net.role.optim is not None and not net.role.head_alone
    ]


def device_bytes(
    nets: Sequence[Net], workload: Workload, axes: Mapping[str, int], moment: str = ""
) -> dict[str, float]:
    """Returns bytes per device by part, of the moment that takes most.

    Args:
      axes: sizes of the mesh's axes.
      moment: "rollout" or "update", the moment that is meant; else the one that takes more.
    """
    split = axes["fsdp"] * axes["tensor"]
    trained = trained_nets(nets)
    held = sum(4.0 * net.trained + net.frozen_bytes for net in nets)
    parts = {"parameters": held / split}
    if not trained:
        return parts
    parts["optimizer and average"] = (
        sum(4.0 * net.trained * net.kept for net in nets) / split
    )
    accumulators = 2 if workload.microbatches > 1 else 1
    gradients = accumulators * sum(4.0 * net.trained for net in nets) / split
    training = {"gradients": gradients} | _training(trained[0].config, workload, axes)
    cache = cache_bytes(trained[0].config, workload, axes)
    sampling = moment == "rollout" or (not moment and cache > sum(training.values()))
    return parts | ({"KV cache": cache} if sampling else training)


def layer_parameters(c: TransformerConfig) -> int:
    """Returns how many parameters one layer has."""
    return parameters(dataclasses.replace(c, n_layers=c.n_layers + 1)) - parameters(c)


def rows_per_device(workload: Workload, axes: Mapping[str, int]) -> int:
    """Returns the sequences of one device in one forward-backward pass."""
    return math.ceil(workload.rows / (axes["replica"] * axes["data"] * axes["fsdp"]))


def _training(
    c: TransformerConfig, workload: Workload, axes: Mapping[str, int]
) -> dict[str, float]:
    """Returns activations, one layer's weights whole, and the output matrix with its gradient."""
    tensor, fsdp = axes["tensor"], axes["fsdp"]
    size = 2.0 if c.dtype == "bfloat16" else 4.0
    rows, length = rows_per_device(workload, axes), workload.length
    kept = activations(c, rows, length, size)
    a_layer = sum(layer_activations(c, rows, length, size).values())
    layer = layer_parameters(c)
    output = c.vocab_size * c.d_model * (4.0 + 4.0) + CHUNK
    vocab_split = tensor if c.vocab_size % tensor == 0 else 1
    read = kept + a_layer / tensor if c.remat == "full" else kept / tensor
    gathered = layer * (2 * size + 4.0) / tensor if fsdp > 1 else 0.0
    return {
        "activations": read / axes["sequence"],
        "gathered layers": gathered,
        "output matrix": output / vocab_split,
    }


def cache_bytes(
    c: TransformerConfig, workload: Workload, axes: Mapping[str, int]
) -> float:
    """Returns the bytes of keys and values of what a device samples; 0 where nothing is sampled."""
    if not workload.decoded:
        return 0.0
    devices = axes["replica"] * axes["data"] * axes["fsdp"]
    size = 2.0 if c.dtype == "bfloat16" else 4.0
    heads = axes["tensor"] if c.kv_heads % axes["tensor"] == 0 else 1
    rows = math.ceil(workload.decoded / devices)
    return kv_cache_bytes(c, rows, workload.length, size) / heads


def need_of(nets: Sequence[Net], workload: Workload) -> Need:
    """Returns what `mesh.strategy=auto` asks of a mesh: those that share it, and a microbatch."""
    nets = [net for net in nets if net.role.mesh == "train"]
    widths = [
        n
        for net in nets
        for n in (
            net.config.n_heads,
            net.config.kv_heads,
            net.config.d_ff,
            net.config.vocab_size,
        )
    ]
    return Need(
        trained=sum(net.trained for net in nets),
        frozen=sum(net.frozen for net in nets),
        rows=workload.batch,
        time=workload.length,
        widths=tuple(net.config.d_model for net in nets),
        splits=tuple(widths),
        device_bytes=lambda axes: sum(device_bytes(nets, workload, axes).values()),
    )
