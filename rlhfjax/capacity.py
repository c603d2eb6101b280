"""Validates that a run can fit at all: the bytes that it needs at least, and those that there are.

`footprint.py` estimates what a device needs. Here is what a stage cannot do without on any mesh:
a size that was mistyped is an error before anything is allocated, and no run that fits is one.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from rlhfjax import stages
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.footprint import Net, number_bytes, trained_nets
from rlhfjax.mesh import device_memory
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.size import Number, kv_cache_bytes
from rlhfjax.origins import Origins, roles_of
from rlhfjax.paths import Path
from rlhfjax.roles import Workload
from rlhfjax.sampling.config import SamplingConfig

# Where Linux has the limit of a container's memory, in bytes, or "max".
_CONTAINER = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def validate(
    configs: Mapping[str, Any], folders: Mapping[str, Path], done: str
) -> None:
    """Validates that the devices can hold what every stage needs at least.

    Args: as `references.validate` has them.

    Raises:
      ConfigError: for the first stage that cannot fit.
    """
    earlier: dict[str, Any] = {}
    for name, config in configs.items():
        if not (folders[name] / done).exists():
            needed = least(known_nets(config, Origins(earlier)), workload_of(config))
            validate_bytes(name, needed, "the model, batch_size or the lengths")
        earlier[str(folders[name])] = config


def known_nets(config: Any, origins: Origins) -> list[Net]:
    """Returns the models of a stage on the mesh of training; none if they are not known yet."""
    try:
        nets = origins.nets(roles_of(config), config.stage)
    except CheckpointError:
        return []
    if getattr(config, "frozen_mesh", None) is None:
        return nets
    return [net for net in nets if net.role.mesh == "train"]


def workload_of(config: Any) -> Workload:
    """Returns what a step of a stage computes, with the rows that a job samples at a time."""
    declared = getattr(stages.find(config.stage), "workload", None)
    if declared is None:
        return Workload(rows=0, batch=0, length=0)
    workload: Workload = declared(config)
    if workload.decoded or not isinstance(config, SamplingConfig):
        return workload
    rows = config.decode_batch
    if not rows:  # all responses of a batch together
        rows = config.batch_size * getattr(config, "samples_per_prompt", 1)
    return workload._replace(decoded=rows, sampled=config.max_new_tokens)


def least(nets: Sequence[Net], workload: Workload) -> dict[str, Number]:
    """Returns the bytes that a stage needs at least, over all devices, by part.

    They are the parameters, what the optimizer keeps, and the larger of two: the gradients with
    one input per layer and token of a microbatch and the attention scores of one layer, and the
    keys and values of sampled tokens. Models of one source count once.
    """
    if not nets:
        return {}
    frozen: dict[str, float] = {}
    for net in nets:
        source = f"{net.role.source} {net.role.head}"
        frozen[source] = max(net.frozen_bytes, frozen.get(source, 0.0))
    trained = sum(net.trained for net in nets)
    model = (trained_nets(nets) or nets)[0].config
    layers = model.n_layers if trained and model.remat != "offload" else 1
    inputs = layers * workload.rows * workload.length * model.d_model
    update: dict[str, Number] = {
        "gradients": 4.0 * trained,
        "activations": inputs * number_bytes(model),
        "attention scores": 0,
    }
    # A job that samples attends to one token at a time.
    if model.attention == "einsum" and (trained or not workload.decoded):
        scores = workload.rows * model.n_heads * workload.length**2
        update["attention scores"] = 4.0 * scores
    rollout = {"the KV cache": cache_bytes(model, workload.decoded, workload.sampled)}
    most = max(update, rollout, key=lambda parts: sum(parts.values()))
    return {
        "parameters": 4.0 * trained + sum(frozen.values()),
        "the optimizer": sum(4.0 * net.trained * net.kept for net in nets),
        **most,
    }


def cache_bytes(config: TransformerConfig, rows: int, tokens: int) -> Number:
    """Returns the bytes of the keys and values of `tokens` tokens in each of `rows` rows."""
    return kv_cache_bytes(config, rows, tokens, number_bytes(config))


def validate_bytes(context: str, needed: Mapping[str, Number], sizes: str) -> None:
    """Validates that all devices together have the bytes that all parts need.

    Args:
      context: what needs them, for an error.
      sizes: the options that make it less, for an error.

    Raises:
      ConfigError: they have less; the message has both numbers.
    """
    total, there = sum(needed.values()), devices_memory()
    if there is None or total <= there:
        return
    parts = ", ".join(f"{part} {shown(size)}" for part, size in needed.items() if size)
    devices = jax.device_count()
    raise ConfigError(
        f"{context}: needs at least {shown(total)} of memory ({parts});"
        f" {devices} device{'s' if devices > 1 else ''} here with {shown(there)}:"
        f" make {sizes} smaller"
    )


def devices_memory() -> float | None:
    """Returns the bytes of all devices; None if an accelerator does not know its own."""
    local = jax.local_devices()
    try:
        memory = device_memory(local)
    except ConfigError:
        return None
    if local[0].platform == "cpu":
        memory = min(memory, _container_memory() / len(local))
    return memory * jax.device_count()


def _container_memory() -> float:
    """Returns the bytes that the container of this process may use; infinity without a limit."""
    limits = [float("inf")]
    for name in _CONTAINER:
        with contextlib.suppress(OSError, ValueError), open(name) as file:
            limits.append(float(file.read()))
    return min(limits)


def shown(size: Number) -> str:
    """Returns a number of bytes with three digits and a unit."""
    units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"
