"""The collectives of a compiled program one by one, those in loops as often as the loop runs."""

import math
from typing import NamedTuple

from rlhfjax.plan.hlo import COLLECTIVES, Program, _called, group_size


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
    """All between two or more devices, the entry's first."""
    program = Program(text)
    found: list[Collective] = []
    _walk(program, program.entry, 1, found)
    return found


def _walk(
    program: Program, computation: str, times: int, found: list[Collective]
) -> None:
    lines = program.computations[computation]
    for i in lines.values():
        kind = i.op.removesuffix("-start")
        if kind in COLLECTIVES:
            n = group_size(i.attributes)
            if n > 1 or kind == "collective-permute":
                where = i.find(r'op_name="([^"]*)"') or i.name
                found.append(
                    Collective(kind, tuple(a.shape for a in i.result), n, times, where)
                )
        elif i.op == "while":
            rounds = program._rounds(i, lines) or 1
            _walk(program, i.find(r"body=%?([\w.\-]+)"), times * rounds, found)
            _walk(program, i.find(r"condition=%?([\w.\-]+)"), times * rounds, found)
        else:
            for name in _called(i):
                _walk(program, name, times, found)
