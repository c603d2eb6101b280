"""What the programs of a stage need and do on a target, read from what its compiler says of them."""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rlhfjax.plan import chips
from rlhfjax.plan.chips import Roofline, Work
from rlhfjax.plan.compiler import Answer, Memory
from rlhfjax.plan.hlo import Cost
from rlhfjax.plan.hlo import Program as Module
from rlhfjax.plan.programs import Program
from rlhfjax.plan.topology import Target
from rlhfjax.programs import Held

# "...memory required for HLO temporaries (29.85G) exceeds available HBM (15.75G)", of libtpu; G is GiB
_AVAILABLE = re.compile(r"exceeds available HBM \(([\d.]+)G\)")
Compile = Callable[[Program], Answer]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One program as the compiler has it, a device."""

    name: str
    memory: Memory
    capacity: float | None
    fits: bool | None
    cost: Cost | None  # None where it does not fit: then there is nothing to run
    buffers: list[tuple[str, float]]
    roofline: Roofline | None
    model_flops: float
    compile_seconds: float
    refused: str = ""  # what the compiler said where it refused
    elsewhere: float = 0.0  # bytes a device that other programs of the step hold meanwhile: frozen models, state


def measure(
    program: Program, target: Target, ask: Compile, held: Sequence[Held] = ()
) -> Measured:
    """Has one program compiled, and reads the answer.

    Args:
      held: shapes of what is on the devices all the time. What of it is no argument of this program takes room beside
        it, which the compiler of one program cannot know.
    """
    began = time.monotonic()
    answer = ask(program)
    module, elsewhere = Module(answer.text), beside(program, held)
    room = target.capacity
    if answer.refused and (said := _AVAILABLE.search(answer.refused)):
        room = float(said[1]) * 2**30
    enough = None if room is None else answer.memory.peak + elsewhere <= room
    cost = None if answer.refused else module.cost()
    work = (
        _work(cost, program.passes * program.model_flops / program.devices)
        if cost
        else None
    )
    return Measured(
        program.name,
        answer.memory,
        room,
        False if answer.refused else enough,
        cost,
        module.buffers(answer.live),
        chips.roofline(work, target.chip) if work and target.chip else None,
        program.model_flops,
        time.monotonic() - began,
        answer.refused,
        elsewhere,
    )


def here(program: Program) -> Answer:
    """Compiles for the devices at hand, to the end."""
    compiled = program.lower().compile()
    stats = compiled.memory_analysis()
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    temporaries, aliased = stats.temp_size_in_bytes, stats.alias_size_in_bytes
    peak = max(
        arguments + temporaries + outputs - aliased,
        getattr(stats, "peak_memory_in_bytes", 0),
    )
    return Answer(
        Memory(*map(float, (arguments, temporaries, outputs, aliased, peak))),
        compiled.as_text(),
    )


def _work(cost: Cost, least: float) -> Work:
    """What the program says, of products at least what training computes: loops of unknown length count once."""
    return Work(max(cost.flops, least), cost.hbm, cost.link("ici"), cost.link("dcn"))


def beside(program: Program, held: Sequence[Held]) -> float:
    """Returns bytes per device of what is held on the program's devices and is no argument of it."""
    own = {_place(x) for x in jax.tree.leaves(program.inputs) if isinstance(x, Held)}
    devices = {
        device
        for x in jax.tree.leaves(program.inputs)
        for device in x.sharding.device_set
    }
    others = {
        _place(x): x
        for x in held
        if _place(x) not in own and not devices.isdisjoint(x.sharding.device_set)
    }
    return sharded_bytes(others)


def _place(x: Held) -> tuple[str, str]:
    return x.owner, x.path


def sharded_bytes(tree: Any) -> float:
    """Bytes a device of shapes with shardings."""
    return float(
        sum(
            np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
            if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        )
    )
