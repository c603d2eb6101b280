"""Sharding strategies: mesh axes, rules, and the choice of one by arithmetic (`auto`).

A strategy maps logical axis names to mesh axes. What each device keeps and communicates:

  data          all parameters; gradients are all-reduced.
  fsdp          its shard of every parameter (ZeRO-3, Rajbhandari et al. 2020); parameters are
                all-gathered, gradients reduce-scattered.
  fsdp_tensor   also its shard of each layer's heads, MLP and vocabulary (Shoeybi et al. 2019);
                activations are all-reduced over `tensor`.
  context       also its part of each sequence; keys and values are all-gathered over `sequence`.
  expert        as fsdp_tensor, and its share of a mixture's experts; outputs are all-reduced over
                `expert`.
  hsdp          fsdp (and tensor, if given) within each replica, data parallelism between replicas,
                which are slices.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from rlhfjax.errors import ConfigError
from rlhfjax.json_text import shown

AXES = ("replica", "data", "fsdp", "tensor", "sequence", "expert")
Axes = Mapping[str, int]  # the size of every mesh axis
Rules = dict[str, tuple[str, ...]]


def rules_of(axes: Sequence[str]) -> Rules:
    """Returns the mesh axes of every logical axis name, given the mesh axes that are in use."""

    def used(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if name in axes)

    return {
        "batch": used("replica", "data", "fsdp"),
        "time": used("sequence"),
        "embed": used("fsdp"),
        "expert": used("expert"),
        **dict.fromkeys(("vocab", "heads", "kv_heads", "mlp"), used("tensor")),
        **dict.fromkeys(("head_dim", "layers", "positions", "router"), ()),
    }


class Strategy(NamedTuple):
    """The mesh axes of a strategy."""

    axes: tuple[str, ...]
    fills: str = "fsdp"  # the axis that takes the devices that are left
    needs: str = ""  # the axis whose size must be given

    @property
    def rules(self) -> Rules:
        return rules_of(self.axes)


GENERAL = rules_of(AXES)
STRATEGIES = {
    "data": Strategy(("replica", "data"), fills="data"),
    "fsdp": Strategy(("data", "fsdp")),
    "fsdp_tensor": Strategy(("data", "fsdp", "tensor"), needs="tensor"),
    "context": Strategy(("data", "fsdp", "tensor", "sequence"), needs="sequence"),
    "expert": Strategy(("data", "fsdp", "tensor", "expert"), needs="expert"),
    "hsdp": Strategy(("replica", "data", "fsdp", "tensor"), needs="replica"),
}


def find(name: str) -> Strategy:
    """Returns the strategy of a name. Raises ConfigError if there is none."""
    if name not in STRATEGIES:
        known = ", ".join(["given", *STRATEGIES, "auto"])
        raise ConfigError(
            f"mesh.strategy={shown(name)} is unknown: accepted are {known}"
        )
    return STRATEGIES[name]


def sizes(name: str, given: Axes, slices: int = 1) -> dict[str, int]:
    """Completes the axis sizes of a config for a strategy.

    A size of 1 means "not given", and so does -1 for `data`. The axis that the strategy fills takes
    what is left (-1) unless it is given; the replicas of hsdp are the slices.

    Raises:
      ConfigError: a size is given for an axis that the strategy does not have, or is missing for
        one that it needs.
    """
    strategy = find(name)
    fills, needs = strategy.fills, strategy.needs
    completed = dict(given)
    if fills == "fsdp" and completed["data"] == -1 and completed["fsdp"] == 1:
        completed["data"] = 1
    if completed[fills] == 1 and -1 not in completed.values():
        completed[fills] = -1
    if needs == "replica" and completed["replica"] == 1:
        completed["replica"] = slices
    for axis, size in completed.items():
        if axis not in strategy.axes and size != 1:
            axes = ", ".join(strategy.axes)
            raise ConfigError(f"mesh.{axis}={size}: strategy {name!r} has {axes}")
    if needs and completed[needs] == 1:
        raise ConfigError(f"mesh.strategy={name!r} needs mesh.{needs} above 1")
    return completed


def fill(given: Axes, devices: int) -> dict[str, int] | None:
    """Replaces the size -1 by the devices that are left; None if the sizes do not divide them."""
    fixed = math.prod(size for size in given.values() if size != -1)
    if devices % fixed or (-1 not in given.values() and fixed != devices):
        return None
    left = devices // fixed
    return {axis: left if size == -1 else size for axis, size in given.items()}


# ---------------------------------------------------------------------- auto


@dataclasses.dataclass(frozen=True)
class Need:
    """What `auto` needs to know of a stage."""

    trained: int = 0  # parameters with gradients and moments
    frozen: int = 0  # parameters without
    rows: int = 1  # of a microbatch, the smallest batch that is split over the mesh
    time: int = 1  # tokens per row
    widths: tuple[int, ...] = ()  # of the models; fsdp divides them
    splits: tuple[
        int, ...
    ] = ()  # heads, KV heads, MLP widths, vocabularies, for tensor
    device_bytes: Callable[[Axes], float] = lambda axes: 0.0
    held_bytes: Callable[[Axes], float] = lambda axes: 0.0
    """Bytes per device that stay there while the stage samples, without the KV cache."""


class Choice(NamedTuple):
    """A strategy with its axis sizes, and a sentence with the reason."""

    strategy: str
    sizes: dict[str, int]
    why: str
    fits: bool


FULL = 0.9  # of the memory: the rest is for the program, the runtime and fragmentation
MOST_TENSOR = 8  # activations are all-reduced in every layer, so `tensor` stays small
GIB = 2.0**30


def choose(need: Need, devices: int, memory: float, slices: int = 1) -> Choice:
    """Returns the first strategy that fits: data, fsdp (hsdp over slices), fsdp_tensor, context.

    Each communicates more than the one before: gradients once per step; parameters in every layer;
    activations in every layer; keys and values too. The smallest `tensor` and `sequence` come
    first. If none fits, it is the one with the fewest bytes per device.

    Args:
      memory: bytes of one device.
    Raises:
      ConfigError: no mesh of this number of devices divides the batch and the models.
    """
    tried = []
    for name, axes in _candidates(need, devices, slices):
        tried.append((name, axes, need.device_bytes(axes)))
    if not tried:
        widths = ", ".join(map(str, need.widths))
        raise ConfigError(
            f"mesh.strategy='auto': no mesh of {devices} devices divides {need.rows} rows of "
            f"{need.time} tokens and models of width {widths}; change the batch or give the sizes"
        )
    fitting = [candidate for candidate in tried if candidate[2] <= FULL * memory]
    chosen = fitting[0] if fitting else min(tried, key=lambda candidate: candidate[2])
    name, axes, size = chosen
    described = " x ".join(f"{axis} {n}" for axis, n in axes.items() if n > 1)
    why = (
        f"mesh.strategy=auto: {name} ({described or 'one device'}): "
        f"{size / GIB:.3g} GiB per device of {memory / GIB:.3g} "
        f"({need.trained:,} trained and {need.frozen:,} frozen parameters, "
        f"{need.rows} rows of {need.time} tokens)"
    )
    if not fitting:
        why += "; by this estimate nothing fits, and this needs least"
    elif larger := tried[: tried.index(chosen)]:
        sizes = "; ".join(f"{name}: {size / GIB:.3g}" for name, _, size in larger)
        why += f"; too large, GiB: {sizes}"
    return Choice(strategy=name, sizes=axes, why=why, fits=bool(fitting))


def _candidates(
    need: Need, devices: int, slices: int
) -> Iterator[tuple[str, dict[str, int]]]:
    """Yields meshes that divide batch and models, ordered by communication volume, least first."""
    replicated = dict.fromkeys(AXES, 1) | {"replica": slices}
    per_slice = devices // slices
    if devices % slices == 0 and need.rows % devices == 0:
        yield "data", replicated | {"data": per_slice}
    # `context` has no replicas, so the sequence stays whole on several slices.
    sequences = _powers_of_2(per_slice) if slices == 1 else [1]
    tensors = _powers_of_2(min(per_slice, MOST_TENSOR))
    for sequence, tensor in itertools.product(sequences, tensors):
        fsdp = per_slice // (tensor * sequence)
        sizes = {"fsdp": fsdp, "tensor": tensor, "sequence": sequence}
        divides = (
            fsdp * tensor * sequence == per_slice
            and need.time % sequence == 0
            and need.rows % (slices * fsdp) == 0
            and all(n % fsdp == 0 for n in need.widths)
            and all(n % tensor == 0 for n in need.splits)
        )
        if not divides or (per_slice == 1 and devices > 1):
            continue
        if sequence > 1:
            name = "context"
        elif slices > 1:
            name = "hsdp"
        else:
            name = "fsdp_tensor" if tensor > 1 else "fsdp"
        yield name, replicated | sizes


def _powers_of_2(most: int) -> list[int]:
    return [2**i for i in range(int(math.log2(most)) + 1)]
