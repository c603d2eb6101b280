"""Bytes that a device sends in collectives: within its slice or node, and beyond it.

Devices are in the order of the mesh, whose last axis has neighbors. All chips of a TPU slice are
joined by ICI, and `replica` alone lies across slices. GPUs are joined by NVLink within a node; an
axis that is longer than what is left of a node lies across nodes.
"""

import math

from rlhfjax.plan.chips import Work
from rlhfjax.strategy import AXES, Axes


def gather(size: float, axis: str, axes: Axes, node: int = 0) -> Work:
    """Returns what each device sends so that all devices along an axis have the whole.

    A reduce-scatter sends as much, and an all-reduce twice as much. Across nodes, each of an axis's
    devices in a node receives its part of what the node lacks, and the node shares it.

    Args:
      size: bytes of the whole.
      node: GPUs of a node; 0: a TPU.
    """
    if not node:
        n = axes.get(axis, 1)
        sent = size * (n - 1) / n
        if axis == "replica":
            return Work(dcn_bytes=sent)
        return Work(ici_bytes=sent)
    inside, outside = span(axis, axes, node)
    received = size * (inside - 1) / inside
    lacking = size * (outside - 1) / outside
    return Work(
        ici_bytes=received,
        dcn_bytes=lacking / inside,
    )


def send(size: float, axis: str, axes: Axes, node: int = 0) -> Work:
    """Returns `gather` of an array, given the bytes that each device would send within a slice."""
    n = axes.get(axis, 1)
    if n == 1:
        return Work()
    whole = size * n / (n - 1)
    return gather(whole, axis, axes, node)


def span(axis: str, axes: Axes, node: int) -> tuple[int, int]:
    """Returns how many devices of an axis are in one node, and over how many nodes it lies."""
    size = axes.get(axis, 1)
    position = AXES.index(axis)
    stride = 1
    for later in AXES[position + 1 :]:
        stride *= axes.get(later, 1)
    room = max(1, node // stride)
    inside = math.gcd(size, room)
    return inside, size // inside
