"""Validates that a run can fit at all: the bytes that it needs at least, and those that there are.

`footprint.py` estimates what a device needs. Here is what a stage cannot do without on any mesh:
a size that was mistyped is an error before anything is allocated, and no run that fits is one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhfjax import footprint, stages
from rlhfjax.device_bytes import validate_bytes
from rlhfjax.errors import CheckpointError
from rlhfjax.footprint import Net, trained_nets
from rlhfjax.models.size import Number, kv_cache_bytes, number_bytes
from rlhfjax.origins import Origins, roles_of
from rlhfjax.paths import Path
from rlhfjax.roles import Workload
from rlhfjax.sampling.config import SamplingConfig
from rlhfjax.strategy import Axes


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
    rows, tokens = workload.decoded, workload.sampled
    cache = kv_cache_bytes(model, rows, tokens, number_bytes(model))
    rollout = {"the KV cache": cache}
    most = max(update, rollout, key=lambda parts: sum(parts.values()))
    return {
        "parameters": 4.0 * trained + sum(frozen.values()),
        "the optimizer": sum(4.0 * net.trained * net.kept for net in nets),
        **most,
    }


def device_bytes(config: Any, nets: Sequence[Net], axes: Axes) -> float | None:
    """Returns the bytes per device at the stage's peak by hand; None if nothing is known."""
    nets = [net for net in nets if net.role.mesh == "train"]
    if not nets:
        return None
    workload = workload_of(config)
    parts = footprint.device_bytes(nets, workload, axes)
    if not trained_nets(nets):
        parts["KV cache"] = footprint.cache_bytes(nets[0].config, workload, axes)
    return sum(parts.values())
