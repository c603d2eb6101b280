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


def measure(program: Program, target: Target) -> Measured:
    """Lowers and compiles one program."""
    began = time.monotonic()
    lowered = program.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        found = _OUT_OF_MEMORY.search(str(e))
        if found is None:
            raise
        return _refused(program, target, str(e).splitlines()[0], found, time.monotonic() - began)
    memory = _memory(compiled.memory_analysis())
    module = Module(compiled.as_text())
    cost = module.cost()
    work = Work(cost.flops, cost.hbm, cost.link("ici"), cost.link("dcn"))
    return Measured(
        program.name,
        memory,
        target.capacity,
        None if target.capacity is None else memory.peak <= target.capacity,
        cost,
        module.buffers(),
        chips.roofline(work, target.chip) if target.chip else None,
        program.model_flops,
        time.monotonic() - began,
    )


def _memory(stats: Any) -> Memory:
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    temporaries, aliased = stats.temp_size_in_bytes, stats.alias_size_in_bytes
    peak = max(arguments + temporaries + outputs - aliased, getattr(stats, "peak_memory_in_bytes", 0))
    return Memory(*map(float, (arguments, temporaries, outputs, aliased, peak)))


def _refused(program: Program, target: Target, said: str, found: re.Match, seconds: float) -> Measured:
    """What does not fit is no program, but the compiler says how much it would have taken."""
    temporaries, available = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
    arguments = sharded_bytes(program.inputs)
    memory = Memory(arguments, temporaries, 0.0, 0.0, arguments + temporaries)
    largest = sorted(((_label(x), sharded_bytes(x)) for x in jax.tree.leaves(program.inputs)), key=lambda b: -b[1])
    said = re.sub(r"^RESOURCE_EXHAUSTED: ", "", said)
    return Measured(program.name, memory, available, False, None, largest[:8], None, program.model_flops, seconds, said)


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
