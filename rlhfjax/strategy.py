"""Strategies: one table of rules each, which mesh axes it has, and how `auto` picks one by arithmetic.

A strategy lays logical axis names over mesh axes. What each of its devices holds and says to the others:

  data          all parameters; gradients are all-reduced.
  fsdp          its part of every parameter (ZeRO-3, Rajbhandari et al. 2020); parameters are all-gathered, gradients
                reduce-scattered.
  fsdp_tensor   besides, its part of each layer's heads, MLP and vocabulary (Shoeybi et al. 2019); activations are
                all-reduced among `tensor`.
  context       besides, its part of each sequence; keys and values are all-gathered among `sequence`.
  hsdp          fsdp (and tensor, where given) within each replica, data parallelism between replicas, which are slices.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from rlhfjax.errors import ConfigError

AXES = ("replica", "data", "fsdp", "tensor", "sequence")
Rules = dict[str, tuple[str, ...]]


def table(
    batch: tuple[str, ...], *, embed: str = "", tensor: str = "", time: str = ""
) -> Rules:
    """Rules for every logical axis name, from the mesh axes of the four that are ever split."""
    over = {"batch": batch, "time": (time,), "embed": (embed,)} | dict.fromkeys(
        ("vocab", "heads", "kv_heads", "mlp"), (tensor,)
    )
    whole = dict.fromkeys(("head_dim", "layers", "positions"), ())
    return {name: tuple(filter(None, axes)) for name, axes in (over | whole).items()}


@dataclasses.dataclass(frozen=True)
class Strategy:
    """The axes that a strategy has (`fills` takes the devices that are left, `needs` must be given) and its rules."""

    fills: str
    axes: tuple[str, ...]
    rules: Rules
    needs: tuple[str, ...] = ()


GENERAL = table(
    ("replica", "data", "fsdp"), embed="fsdp", tensor="tensor", time="sequence"
)
STRATEGIES = {
    "data": Strategy("data", ("replica", "data"), table(("replica", "data"))),
    "fsdp": Strategy("fsdp", ("data", "fsdp"), table(("data", "fsdp"), embed="fsdp")),
    "fsdp_tensor": Strategy(
        "fsdp",
        ("data", "fsdp", "tensor"),
        table(("data", "fsdp"), embed="fsdp", tensor="tensor"),
        needs=("tensor",),
    ),
    "context": Strategy(
        "fsdp",
        ("data", "fsdp", "tensor", "sequence"),
        table(("data", "fsdp"), embed="fsdp", tensor="tensor", time="sequence"),
        needs=("sequence",),
    ),
    "hsdp": Strategy(
        "fsdp",
        ("replica", "data", "fsdp", "tensor"),
        table(("replica", "data", "fsdp"), embed="fsdp", tensor="tensor"),
        needs=("replica",),
    ),
}


def find(name: str) -> Strategy:
    """Raises ConfigError where there is none of that name."""
    if name not in STRATEGIES:
        known = ", ".join(["given", *STRATEGIES, "auto"])
        raise ConfigError(f"mesh.strategy={name!r} is unknown: accepted are {known}")
    return STRATEGIES[name]


def sizes(name: str, given: Mapping[str, int], slices: int = 1) -> dict[str, int]:
    """The mesh sizes of a strategy, from those that the config gives: 1 is "not given", for `data` -1 is.

    The axis that the strategy fills takes what is left (-1) unless it is given; hsdp's replicas are the slices.

    Raises:
      ConfigError: a size is given for an axis that the strategy has not, or is missing for one that it needs.
    """
    strategy, out = find(name), dict(given)
    if strategy.fills != "data" and out["data"] == -1 and out[strategy.fills] == 1:
        out["data"] = 1
    if out[strategy.fills] == 1 and -1 not in out.values():
        out[strategy.fills] = -1
    if "replica" in strategy.needs and out["replica"] == 1:
        out["replica"] = slices
    for axis, size in out.items():
        if axis not in strategy.axes and size != 1:
            raise ConfigError(
                f"mesh.{axis}={size}: strategy {name!r} has {', '.join(strategy.axes)}"
            )
        if axis in strategy.needs and size == 1:
            raise ConfigError(f"mesh.strategy={name!r} needs mesh.{axis} above 1")
    return out


# ---------------------------------------------------------------------- auto


@dataclasses.dataclass(frozen=True)
class Need:
    """What a stage asks of a mesh."""

    trained: int = 0  # parameters with gradients and moments
    frozen: int = 0  # parameters that are only read
    rows: int = 1  # of the smallest batch that is split over the mesh, a microbatch
    time: int = 1
    widths: tuple[int, ...] = ()  # of the models; fsdp splits them
    splits: tuple[
        int, ...
    ] = ()  # heads, keys' heads, MLP width and vocabulary: tensor splits them
    device_bytes: Callable[[Mapping[str, int]], float] = lambda sizes: (
        0.0
    )  # by the mesh's sizes


class Choice(NamedTuple):
    """A strategy with its sizes, and the sentence that says why."""

    strategy: str
    sizes: dict[str, int]
    why: str
    fits: bool


FULL = 0.9  # of the memory: the rest is the program's, the runtime's and fragments
MOST_TENSOR = 8  # devices among which activations are reduced in every layer: neighbors
GIB = 2.0**30


def choose(need: Need, devices: int, memory: float, slices: int = 1) -> Choice:
    """The first that fits, of data, fsdp (hsdp over slices), with the fewest `tensor`, then the fewest `sequence`.

    In this order because each says more to the others than the one before: gradients once a step; parameters in
    every layer; activations in every layer; keys and values besides. Where none fits it is the smallest a device.

    Args:
      memory: bytes of one device.
    Raises:
      ConfigError: no mesh shares this batch and this model among so many devices.
    """
    tried = [
        (name, s, need.device_bytes(s))
        for name, s in _candidates(need, devices, slices)
    ]
    if not tried:
        raise ConfigError(
            f"mesh.strategy='auto': no mesh of {devices} devices divides {need.rows} rows of {need.time} slots and "
            f"models of width {', '.join(map(str, need.widths))}; change the batch or give the sizes"
        )
    fitting = [t for t in tried if t[2] <= FULL * memory]
    name, chosen, size = fitting[0] if fitting else min(tried, key=lambda t: t[2])
    shape = (
        " x ".join(f"{axis} {n}" for axis, n in chosen.items() if n > 1) or "one device"
    )
    too_large = "; ".join(
        f"{t[0]}: {t[2] / GIB:.3g}"
        for t in tried[: tried.index(fitting[0]) if fitting else None]
    )
    why = (
        f"mesh.strategy=auto: {name} ({shape}): {size / GIB:.3g} GiB a device of {memory / GIB:.3g} "
        f"({need.trained:,} trained and {need.frozen:,} frozen parameters, {need.rows} rows of {need.time})"
    )
    if fitting:
        return Choice(
            name,
            chosen,
            why + (f"; too large, GiB: {too_large}" if too_large else ""),
            True,
        )
    return Choice(
        name,
        chosen,
        why + "; by this arithmetic nothing fits, it is the smallest of what was tried",
        False,
    )


def _candidates(
    need: Need, devices: int, slices: int
) -> Iterator[tuple[str, dict[str, int]]]:
    """Meshes that divide the batch and the model, the one that says least first."""
    one = dict.fromkeys(AXES, 1)
    if devices % slices == 0 and need.rows % devices == 0:
        yield "data", one | {"replica": slices, "data": devices // slices}
    within = devices // slices
    for sequence, tensor in itertools.product(
        _powers(within), _powers(min(within, MOST_TENSOR))
    ):
        fsdp = within // (tensor * sequence)
        if sequence > 1 and slices > 1:
            break  # context has no replicas
        if fsdp == 0 or within % (tensor * sequence) or need.time % sequence:
            continue
        if need.rows % (slices * fsdp) or any(n % fsdp for n in need.widths):
            continue
        if any(n % tensor for n in need.splits):
            continue
        if fsdp * tensor * sequence == 1 and devices > 1:
            continue
        name = (
            "context"
            if sequence > 1
            else "hsdp"
            if slices > 1
            else "fsdp_tensor"
            if tensor > 1
            else "fsdp"
        )
        yield (
            name,
            one
            | {"replica": slices, "fsdp": fsdp, "tensor": tensor, "sequence": sequence},
        )


def _powers(most: int) -> list[int]:
    return [2**i for i in range(int(math.log2(most)) + 1)]
