"""Reads from a compiled program what it needs and does on each device of a target."""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.plan import chips
from rlhfjax.plan.chips import Roofline, Work
from rlhfjax.plan.compiler import CompilerOutput, Memory
from rlhfjax.plan.hlo import Module
from rlhfjax.plan.hlo_cost import Cost, module_cost
from rlhfjax.plan.programs import PlannedProgram
from rlhfjax.plan.topology import Target
from rlhfjax.programs import Held
from rlhfjax.types import PyTree

# libtpu: "...memory required for HLO temporaries (29.85G) exceeds available HBM (15.75G)"; G is GiB
_AVAILABLE = re.compile(r"exceeds available HBM \(([\d.]+)G\)")
Compile = Callable[[PlannedProgram], CompilerOutput]


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """What one program needs and does, per device."""

    name: str
    memory: Memory
    capacity: float | None  # bytes of a device; None if unknown
    fits: bool | None  # None if the capacity is unknown
    cost: Cost | None  # None if the compiler rejects the program
    buffers: list[tuple[str, float]]  # the largest ones: (description, bytes)
    roofline: Roofline | None
    model_flops: float  # of all devices
    compile_seconds: float
    error: str = ""  # the compiler's message if it rejects the program
    held_by_others: float = 0.0
    """Bytes that other programs of the step keep on the device meanwhile: frozen models, state."""

    @property
    def needed(self) -> float:
        """Bytes of a device that are in use at the program's peak."""
        return self.memory.peak + self.held_by_others


def analyze(
    program: PlannedProgram,
    target: Target,
    compile_program: Compile,
    held: Sequence[Held] = (),
) -> CompiledProgram:
    """Compiles one program and reads its memory, cost and roofline.

    Args:
      held: shapes of the arrays that are always on the devices. Those that are not arguments of
        this program take memory beside it; a compiler that sees one program cannot know them.
    """
    began = time.monotonic()
    output = compile_program(program)
    module = Module(output.text)
    others = held_by_others(program, held)
    capacity = target.capacity
    if available := _AVAILABLE.search(output.error):
        capacity = float(available[1]) * 2**30
    fits = cost = roofline = None
    if output.error:
        fits = False
    else:
        if capacity is not None:
            fits = output.memory.peak + others <= capacity
        cost = module_cost(module)
        if target.chip:
            least_flops = program.flops_ratio * program.model_flops / program.devices
            roofline = chips.roofline(_work(cost, least_flops), target.chip)
    return CompiledProgram(
        name=program.name,
        memory=output.memory,
        capacity=capacity,
        fits=fits,
        cost=cost,
        buffers=module.buffers(output.live),
        roofline=roofline,
        model_flops=program.model_flops,
        compile_seconds=time.monotonic() - began,
        error=output.error,
        held_by_others=others,
    )


def compile_here(program: PlannedProgram) -> CompilerOutput:
    """Compiles a program for the devices of this machine."""
    compiled = program.lower().compile()
    stats = compiled.memory_analysis()
    arguments = float(stats.argument_size_in_bytes)
    temporaries = float(stats.temp_size_in_bytes)
    outputs = float(stats.output_size_in_bytes)
    aliased = float(stats.alias_size_in_bytes)
    peak = float(getattr(stats, "peak_memory_in_bytes", 0))
    memory = Memory(
        arguments=arguments,
        temporaries=temporaries,
        outputs=outputs,
        aliased=aliased,
        peak=max(arguments + temporaries + outputs - aliased, peak),
    )
    return CompilerOutput(memory, compiled.as_text())


def _work(cost: Cost, least_flops: float) -> Work:
    """Returns the work of a program, at least the FLOPs that training needs.

    Loops of unknown length count once in `cost`, which may then have too few FLOPs.
    """
    flops = max(cost.flops, least_flops)
    return Work(
        flops=flops,
        hbm_bytes=cost.hbm,
        ici_bytes=cost.link("ici"),
        dcn_bytes=cost.link("dcn"),
    )


def held_by_others(program: PlannedProgram, held: Sequence[Held]) -> float:
    """Returns the bytes per device of held arrays that are not arguments of the program.

    An array on devices that the program does not use counts 0; one that several roles share counts
    once.
    """
    arguments = jax.tree.leaves(program.inputs)
    own = {(x.owner, x.path) for x in arguments if isinstance(x, Held)}
    devices = {device for x in arguments for device in x.sharding.device_set}
    others: dict[tuple[str, str], Held] = {}
    for x in held:
        shares_devices = not devices.isdisjoint(x.sharding.device_set)
        if shares_devices and (x.owner, x.path) not in own:
            others[x.owner, x.path] = x
    return sharded_bytes(list(others.values()))


def sharded_bytes(tree: PyTree) -> float:
    """Returns the bytes per device of shapes with shardings; PRNG keys do not count."""
    total = 0.0
    for x in jax.tree.leaves(tree):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            total += np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return float(total)
