"""Compiles the programs of a stage for a target and reads from the compiler what they need and do."""

import dataclasses
import re
import time
from typing import Any

import jax
import numpy as np

from rlhfjax.plan import chips
from rlhfjax.plan.chips import Roofline, Work
from rlhfjax.plan.hlo import Cost
from rlhfjax.plan.hlo import Program as Module
from rlhfjax.plan.programs import Program
from rlhfjax.plan.topology import Target

# "...memory required for HLO temporaries (29.85G) exceeds available HBM (15.75G)", of libtpu; G is GiB
_OUT_OF_MEMORY = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a device. `peak` is all of them, what is aliased once, or the compiler's own where that is more: on TPUs it
    counts the program and what the runtime reserves, on CPUs it leaves temporaries out."""

    arguments: float
    temporaries: float
    outputs: float
    aliased: float  # of the outputs, what takes the place of a donated argument
    peak: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """One program as the compiler has it, a device."""

    name: str
    memory: Memory
    capacity: float | None
    fits: bool | None
    cost: Cost | None  # None where it does not fit: then there is no program
    buffers: list[tuple[str, float]]
    roofline: Roofline | None
    model_flops: float
    compile_seconds: float
    refused: str = ""  # what the compiler said where it refused
    elsewhere: float = 0.0  # bytes a device that other programs of the step hold meanwhile: frozen models, state
    unread: str = ""  # why nothing is known of its work, where it was compiled and cannot be read


def measure(program: Program, target: Target, held: Any = ()) -> Measured:
    """Lowers and compiles one program.

    Args:
      held: shapes of what is on the devices all the time. What of it is no argument of this program takes room beside
        it, which the compiler of one program cannot know.
    """
    began = time.monotonic()
    lowered = program.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        found = _OUT_OF_MEMORY.search(str(e))
        if found is None:
            raise
        return _refused(program, str(e).splitlines()[0], found, time.monotonic() - began, beside(program, held))
    memory, elsewhere = _memory(compiled.memory_analysis()), beside(program, held)
    module, unread = _read(compiled)
    cost = module.cost() if module else None
    work = _work(cost, program.model_flops / len(target.devices)) if cost else None
    return Measured(
        program.name,
        memory,
        target.capacity,
        None if target.capacity is None else memory.peak + elsewhere <= target.capacity,
        cost,
        module.buffers() if module else largest(program),
        chips.roofline(work, target.chip) if work and target.chip else None,
        program.model_flops,
        time.monotonic() - began,
        elsewhere=elsewhere,
        unread=unread,
    )


def _work(cost: Cost, least: float) -> Work:
    """What the program says, of products at least what the mathematics needs: loops of unknown length count once."""
    return Work(max(cost.flops, least), cost.hbm, cost.link("ici"), cost.link("dcn"))


def _read(compiled: Any) -> tuple[Module | None, str]:
    """The program's text, parsed; or why there is none.

    libtpu may be newer than jaxlib, and then some of its asynchronous operations (seen: v5p) have no text in jaxlib.
    """
    try:
        return Module(compiled.as_text()), ""
    except jax.errors.JaxRuntimeError as e:
        return None, str(e).splitlines()[0]


def beside(program: Program, held: Any) -> float:
    """Bytes a device of what is held and is no argument of the program."""
    own = {id(x) for x in jax.tree.leaves(program.inputs)}
    return sharded_bytes({id(x): x for x in jax.tree.leaves(held) if id(x) not in own})


def largest(program: Program, most: int = 8) -> list[tuple[str, float]]:
    """The largest arguments, where nothing else is known."""
    sizes = ((_label(x), sharded_bytes(x)) for x in jax.tree.leaves(program.inputs))
    return sorted(sizes, key=lambda b: -b[1])[:most]


def _memory(stats: Any) -> Memory:
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    temporaries, aliased = stats.temp_size_in_bytes, stats.alias_size_in_bytes
    peak = max(arguments + temporaries + outputs - aliased, getattr(stats, "peak_memory_in_bytes", 0))
    return Memory(*map(float, (arguments, temporaries, outputs, aliased, peak)))


def _refused(program: Program, said: str, found: re.Match, seconds: float, elsewhere: float) -> Measured:
    """What does not fit is no program, but the compiler says how much it would have taken."""
    temporaries, available = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
    arguments = sharded_bytes(program.inputs)
    memory = Memory(arguments, temporaries, 0.0, 0.0, arguments + temporaries)
    rest = (available, False, None, largest(program), None, program.model_flops, seconds)
    said = re.sub(r"^RESOURCE_EXHAUSTED: ", "", said)
    return Measured(program.name, memory, *rest, refused=said, elsewhere=elsewhere)


def sharded_bytes(tree: Any) -> float:
    """Bytes a device of shapes with shardings."""
    return float(
        sum(
            np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
            if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        )
    )


def _label(x: Any) -> str:
    return f"{x.dtype}{list(x.sharding.shard_shape(x.shape))} argument"
