"""The layout of a rollout on the devices of training: what is sharded over which mesh axis.

Under FSDP a decode step all-gathers all weights for one token per row. In the decode layout a
device keeps its share of every layer's heads, MLP width and vocabulary, and a step all-reduces the
activations of its rows instead (Shoeybi et al. 2019; Pope et al. 2022, section 3.2.1):

  mesh     fsdp = F becomes fsdp = F / n and a new axis, decode = n; no device moves
  weights  heads, MLP and vocabulary over tensor x sequence x decode, as far as these divide them
  batch    over replica, data and what is left of fsdp

The weights are resharded once per rollout. `choose` takes the n that moves the fewest bytes, or the
layout of training.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jax.sharding import AxisType, Mesh

from rlhfjax import footprint
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.size import number_bytes, parameters
from rlhfjax.roles import Workload
from rlhfjax.strategy import AXES, FULL, GIB, Axes, Rules

DECODE = "decode"  # the new mesh axis
MODEL_AXES = ("tensor", "sequence", DECODE)
# Bytes per second of HBM over those of ICI: 4.0 to 4.6 on v4, v5e, v5p and v6e (plan/chips.py).
HBM_OVER_ICI = 4.0


class Traffic(NamedTuple):
    """Bytes per device of a rollout."""

    hbm: float  # weights and cache, read by every decode step
    gathered: float  # weights sent by all decode steps
    resharded: float  # weights sent once
    reduced: float  # activations sent

    @property
    def ici(self) -> float:
        """All bytes that are sent."""
        return self.gathered + self.resharded + self.reduced

    @property
    def cost(self) -> float:
        """Bytes of HBM that take as long as everything, one after the other."""
        return self.hbm + HBM_OVER_ICI * self.ici


def sizes_of(layout: Layout) -> dict[str, int]:
    """Returns the sizes of a training mesh's axes; an axis that it lacks has size 1."""
    return {axis: layout.mesh.shape.get(axis, 1) for axis in AXES}


def decode_axes(axes: Axes, n: int) -> dict[str, int]:
    """Returns mesh axes with the same shards as the decode layout: its model axes are `tensor`."""
    tensor = axes["tensor"] * axes["sequence"] * n
    return {**axes, "fsdp": axes["fsdp"] // n, "tensor": tensor, "sequence": 1}


def traffic(
    c: TransformerConfig, workload: Workload, axes: Axes, n: int | None
) -> Traffic:
    """Returns what a rollout reads and sends: `sampled` decode steps after a prefill.

    Args:
      axes: of the training mesh.
      n: of the decode layout; None: the layout of training.
    """
    layout = axes if n is None else decode_axes(axes, n)
    tensor, fsdp, steps = layout["tensor"], layout["fsdp"], workload.sampled
    weights = parameters(c) * number_bytes(c) / tensor
    cache = footprint.cache_bytes(c, workload, layout)
    received = weights * (fsdp - 1) / fsdp
    rows = math.ceil(workload.decoded / footprint.batch_shards(layout))
    activations = rows * workload.length * c.d_model * number_bytes(c)
    return Traffic(
        hbm=steps * (weights + cache / 2),
        gathered=(steps + 1) * received if n is None else 0.0,
        resharded=0.0 if n is None else received,
        reduced=2 * c.n_layers * activations * 2 * (tensor - 1) / tensor,
    )


def divisors(c: TransformerConfig, axes: Axes) -> Iterator[int]:
    """Yields every n of a decode layout that divides the heads and the MLP width."""
    for n in range(1, axes["fsdp"] + 1):
        shards = decode_axes(axes, n)["tensor"]
        divides = c.n_heads % shards == 0 and c.d_ff % shards == 0
        if axes["fsdp"] % n == 0 and divides:
            yield n


def choose(
    c: TransformerConfig,
    workload: Workload,
    axes: Axes,
    held: float | None = None,
    memory: float | None = None,
) -> tuple[int | None, str]:
    """Returns the n of the decode layout with the least traffic, and a sentence with the reason.

    Args:
      held: bytes per device that stay there meanwhile; None: n must only divide the model. Else
        weights and cache must fit too, and None, the layout of training, may be the result.
      memory: bytes of one device; None: everything fits.
    """
    candidates: list[int | None] = []
    for n in divisors(c, axes):
        needed = (held or 0.0) + rollout_bytes(c, workload, axes, n)
        if held is None or memory is None or needed <= FULL * memory:
            candidates.append(n)
    if held is not None or not candidates:
        candidates.append(None)
    costs = {n: traffic(c, workload, axes, n).cost for n in candidates}
    best = min(candidates, key=lambda n: costs[n])
    return best, _why(c, workload, axes, best)


def given(c: TransformerConfig, axes: Axes, shards: int, stage: str) -> int:
    """Returns the n of the decode layout whose weights are split over `shards` devices.

    Raises:
      ConfigError: they do not divide the model or the mesh.
    """
    sizes = {decode_axes(axes, n)["tensor"]: n for n in divisors(c, axes)}
    if shards not in sizes:
        possible = ", ".join(map(str, sizes)) or "none"
        raise ConfigError(
            f"{stage}.rollout_tensor={shards}: must divide heads, MLP width and the training mesh; "
            f"possible here: {possible}"
        )
    return sizes[shards]


def rollout_bytes(
    c: TransformerConfig, workload: Workload, axes: Axes, n: int
) -> float:
    """Returns the bytes per device of the resharded weights and of the KV cache."""
    layout = decode_axes(axes, n)
    weights = parameters(c) * number_bytes(c) / layout["tensor"]
    return weights + footprint.cache_bytes(c, workload, layout)


def _why(c: TransformerConfig, workload: Workload, axes: Axes, n: int | None) -> str:
    """Returns the sentence that a run logs."""
    before = traffic(c, workload, axes, None)
    if n is None:
        return "rollouts: weights as in training, no other layout fits or pays"
    shards, after = decode_axes(axes, n)["tensor"], traffic(c, workload, axes, n)
    return (
        f"rollouts: weights over {shards} devices each; a device sends "
        f"{after.ici / GIB:,.2f} GiB per rollout, {after.resharded / GIB:,.2f} of them to reshard "
        f"the weights, where the layout of training sends {before.ici / GIB:,.2f}; "
        f"weights and cache take {rollout_bytes(c, workload, axes, n) / GIB:,.2f} GiB"
    )


def decode_layout(layout: Layout, c: TransformerConfig, n: int) -> Layout:
    """Returns the decode layout on the devices of a training mesh, in the same order."""
    axis = layout.mesh.axis_names.index("fsdp")
    names, devices = layout.mesh.axis_names, layout.mesh.devices
    shape = devices.shape
    split = (shape[axis] // n, n)
    devices = devices.reshape(*shape[:axis], *split, *shape[axis + 1 :])
    names = (*names[: axis + 1], DECODE, *names[axis + 1 :])
    mesh = Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))
    return dataclasses.replace(layout, mesh=mesh, rules=_rules(layout, mesh, c))


def _rules(layout: Layout, mesh: Mesh, c: TransformerConfig) -> Rules:
    """Returns the rules of decoding; `layers`, `expert` and others stay those of training."""
    widths = {"heads": c.n_heads, "kv_heads": c.kv_heads}
    widths |= {"mlp": c.d_ff, "vocab": c.vocab_size}
    rules: dict[str, Any] = dict(layout.rules)
    rules |= {name: _prefix(mesh, width) for name, width in widths.items()}
    batch = [axis for axis in layout.rules["batch"] if axis in mesh.axis_names]
    return {**rules, "batch": tuple(batch), "time": (), "embed": ()}


def _prefix(mesh: Mesh, width: int) -> Sequence[str]:
    """Returns as many of the model axes, from the first on, as divide a width together."""
    shards, axes = 1, []
    for axis in MODEL_AXES:
        shards *= mesh.shape[axis]
        if width % shards:
            break
        axes.append(axis)
    return tuple(axes)
