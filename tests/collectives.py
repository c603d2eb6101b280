"""Lists the collectives of a compiled program; those in loops count as often as the loop runs."""

import math
from typing import NamedTuple

from rlhfjax.plan.hlo import COLLECTIVES, Module, group_size


class Collective(NamedTuple):
    """One collective instruction of a device's program."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]  # of what it returns, on one device
    devices: int  # that take part together
    times: int  # how often a run of the program does it
    where: str  # the operation of the source that it came from

    @property
    def elements(self) -> int:
        """Of its result, all arrays together."""
        return sum(math.prod(shape) for shape in self.shapes)


def collectives(text: str) -> list[Collective]:
    """Returns the collectives between two or more devices, the entry's first."""
    module = Module(text)
    found: list[Collective] = []
    _walk(module, module.entry, 1, found)
    return found


def _walk(
    module: Module, computation: str, times: int, found: list[Collective]
) -> None:
    lines = module.computations[computation]
    for i in lines.values():
        kind = i.op.removesuffix("-start")
        if kind in COLLECTIVES:
            n = group_size(i.attributes)
            if n > 1 or kind == "collective-permute":
                shapes = tuple(array.shape for array in i.result)
                found.append(Collective(kind, shapes, n, times, i.source))
        elif i.op == "while":
            rounds = module.trip_count(i) or 1
            _walk(module, i.computation("body"), times * rounds, found)
            _walk(module, i.computation("condition"), times * rounds, found)
        else:
            for name in i.called:
                _walk(module, name, times, found)
