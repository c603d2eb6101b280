"""Asks the TPU compiler what it decides, and stops it before it writes machine code.

libtpu optimizes a program, schedules it and assigns its buffers in seconds. Then it spends minutes
on machine code, which a plan does not need. By then the files of `xla_dump_to` have every buffer
and the scheduled program. So each program is compiled in a separate process, which is killed
once these files are complete.
"""

import contextlib
import multiprocessing
import re
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import jax

from rlhfjax import paths
from rlhfjax.errors import UserError, first_line
from rlhfjax.paths import Path
from rlhfjax.plan.programs import layout_for, step_programs
from rlhfjax.plan.shapes import Subject
from rlhfjax.plan.topology import quiet, target

HBM = "0"  # its number among the compiler's memory spaces
_POLL = 0.05  # seconds
_ALLOCATION = re.compile(
    r"^allocation \d+: size (\d+)(?:, color (\d+))?, page \d+, (.*):$", re.MULTILINE
)
_LIVE_VALUE = re.compile(r"^\s+(\S+): (\d+) bytes", re.MULTILINE)


class Request(NamedTuple):
    """One program of a stage, for a topology. The compiling process builds the program anew."""

    subject: Subject
    topology: str
    slices: int
    completions: int
    program: str


class Memory(NamedTuple):
    """Bytes per device."""

    arguments: float
    temporaries: float
    outputs: float
    aliased: float  # outputs that take the place of donated arguments
    peak: float
    """All of them, aliased bytes once; or the compiler's own peak if that is more, as on CPUs,
    where `temporaries` is incomplete."""


class CompilerOutput(NamedTuple):
    """What a compiler says about a program."""

    memory: Memory
    text: str  # the HLO of the program, optimized and scheduled
    error: str = ""  # the compiler's message if the program does not fit
    live: tuple[tuple[str, float], ...] = ()
    """The buffers that are live at the peak: (instruction{index}, bytes)."""


def compile_program(request: Request) -> CompilerOutput:
    """Compiles a program for a TPU until its memory is assigned.

    Raises:
      UserError: the compiler fails for another reason than memory; it has the compiler's message.
    """
    with tempfile.TemporaryDirectory(prefix="rlhfjax-plan-") as name:
        folder = paths.path(name)
        with _compiling(request, name) as (process, connection):
            message = None
            while message is None:
                if (output := _complete_output(folder)) is not None:
                    return output
                if connection.poll(_POLL):
                    message = _receive(connection)
                elif not process.is_alive():
                    message = _receive(connection)
                    message = message or f"its process ended with {process.exitcode}"
        if not message and (output := _complete_output(folder)) is not None:
            return output
        error = first_line(message)
        if "RESOURCE_EXHAUSTED" in message and _find(folder, ""):
            return _read_output(folder, error.removeprefix("RESOURCE_EXHAUSTED: "))
    raise UserError(
        f"plan: the TPU compiler on {request.program} of {request.subject.name}: {error}"
    )


@contextlib.contextmanager
def _compiling(
    request: Request, folder: str
) -> Iterator[tuple[BaseProcess, Connection]]:
    """Starts a process that compiles into a folder, and kills it when the context ends.

    Processes are forked off one that has imported all this and has no threads yet: libtpu's threads
    would not survive a fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_compile, args=(request, folder, sender), daemon=True
    )
    process.start()
    sender.close()
    try:
        yield process, receiver  # pyright: ignore[reportReturnType]  # typeshed's own class
    finally:
        process.kill()
        process.join()
        receiver.close()


def _compile(request: Request, folder: str, connection: Connection) -> None:
    """Compiles in the child process; sends the compiler's error, or "" if there is none."""
    # A program found in the compilation cache would write no files.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        subject = request.subject
        layout = layout_for(subject, target(request.topology, request.slices))
        step = step_programs(subject, layout, request.completions)
        programs = {program.name: program for program in step.programs}
        lowered = programs[request.program].lower()
        with quiet():
            lowered.compile(compiler_options=options(folder))
        connection.send("")
    except Exception as e:
        connection.send(str(e).strip() or first_line(e))


def options(folder: str) -> dict[str, str | bool]:
    """Returns libtpu's options that make it write the files that `compile_program` reads."""
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def _receive(connection: Connection) -> str:
    """Returns the child's message; "" if it ended without one."""
    try:
        return connection.recv()
    except EOFError:
        return ""


def _complete_output(folder: Path) -> CompilerOutput | None:
    """Returns the output once its last file, a copy of the program, is complete; None before."""
    files = _find(folder, "") + _find(folder, "_after_buffer_assignment")
    # The files are local.
    sizes = [file.stat().st_size for file in files]  # pyright: ignore[reportAttributeAccessIssue]
    if len(sizes) < 2 or sizes[0] != sizes[1] or not sizes[0]:
        return None
    return _read_output(folder)


def _read_output(folder: Path, error: str = "") -> CompilerOutput:
    assignment, text, ranges = (
        _find(folder, part)[0].read_text()
        for part in ("-buffer-assignment", "", "-live-range")
    )
    return CompilerOutput(
        memory=_memory(assignment),
        text=text,
        error=error,
        live=_live_at_peak(ranges),
    )


def _find(folder: Path, part: str) -> list[Path]:
    """Returns the file with this part of its name in a list; an empty list if there is none yet."""
    return list(folder.glob(f"*.after_optimizations{part}.txt"))


def _live_at_peak(ranges: str) -> tuple[tuple[str, float], ...]:
    """Returns the values that are live at the peak, those in VMEM among them, the largest first."""
    peak = ranges.partition("(peak):")[2].partition("Stack trace")[0]
    return tuple((name, float(size)) for name, size in _LIVE_VALUE.findall(peak))


def _memory(assignment: str) -> Memory:
    """Adds up the allocations in HBM: parameters, outputs and temporaries.

    Thread-local allocations lie inside of fusions and take no HBM; constants are part of the
    machine code.
    """
    arguments = outputs = aliased = temporaries = 0.0
    for digits, space, kind in _ALLOCATION.findall(assignment):
        if (space or HBM) != HBM:
            continue
        size = float(digits)
        is_argument = kind.startswith("parameter")
        is_output = "maybe-live-out" in kind
        arguments += size * is_argument
        outputs += size * is_output
        aliased += size * (is_argument and is_output)
        temporaries += size * kind.startswith("preallocated-temp")
    return Memory(
        arguments=arguments,
        temporaries=temporaries,
        outputs=outputs,
        aliased=aliased,
        peak=arguments + outputs + temporaries - aliased,
    )
