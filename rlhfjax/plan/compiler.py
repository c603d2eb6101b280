"""The TPU compiler, asked what it decides and stopped before it writes machine code.

libtpu optimizes a program, schedules it and assigns its buffers in seconds; then it spends minutes on machine code, of
which a plan needs nothing. What it has decided stands in the files of `xla_dump_to` by then: every buffer, and the
program in libtpu's own words. So each program is compiled in a process of its own, which is ended when they are whole.
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
from rlhfjax.plan.programs import layout_for, sketch
from rlhfjax.plan.shapes import Subject
from rlhfjax.plan.topology import quiet, target

HBM = "0"  # its number among the compiler's memory spaces
_POLL = 0.05  # seconds
_ALLOCATION = re.compile(
    r"^allocation \d+: size (\d+)(?:, color (\d+))?, page \d+, (.*):$", re.MULTILINE
)


class Job(NamedTuple):
    """One program of a stage, for a topology. It is made again in the process that compiles it."""

    subject: Subject
    topology: str
    slices: int
    completions: int
    program: str


class Memory(NamedTuple):
    """Bytes a device. `peak` is all of them, what is aliased once, or the compiler's own where that is more: on CPUs it
    leaves temporaries out."""

    arguments: float
    temporaries: float
    outputs: float
    aliased: float  # of the outputs, what takes the place of a donated argument
    peak: float


class Answer(NamedTuple):
    """What a compiler says of a program."""

    memory: Memory
    text: str  # the program, optimized and scheduled
    refused: str = ""  # its words, where the program does not fit
    live: tuple[
        tuple[str, float], ...
    ] = ()  # what lives at the moment of the most: (instruction{index}, bytes)


def ask(job: Job) -> Answer:
    """Compiles until memory is assigned.

    Raises:
      UserError: the compiler fails for another reason than memory, in its own words.
    """
    with (
        tempfile.TemporaryDirectory(prefix="rlhfjax-plan-") as name,
        _compiling(job, name) as (process, connection),
    ):
        folder, said = paths.path(name), None
        while said is None:
            if (answer := _whole(folder)) is not None:
                return answer
            if connection.poll(_POLL):
                said = _last_words(connection)
            elif not process.is_alive():
                said = (
                    _last_words(connection)
                    or f"its process ended with {process.exitcode}"
                )
        if not said and (answer := _whole(folder)) is not None:
            return answer
        if "RESOURCE_EXHAUSTED" in said and _find(folder, ""):
            return _decided(
                folder, first_line(said).removeprefix("RESOURCE_EXHAUSTED: ")
            )
        where = f"plan: the TPU compiler on {job.program} of {job.subject.name}"
        raise UserError(f"{where}: {first_line(said)}")


@contextlib.contextmanager
def _compiling(job: Job, folder: str) -> Iterator[tuple[BaseProcess, Connection]]:
    """A process that compiles into a folder; it ends with the context.

    Processes are forked off one that has imported all this and has no threads yet: libtpu's would not survive a fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_compile, args=(job, folder, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        ours.close()


def _compile(job: Job, folder: str, connection: Connection) -> None:
    """Sends what the compiler refuses, and nothing where it does not."""
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # a program that is found there has no files
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        layout = layout_for(job.subject, target(job.topology, job.slices))
        programs = {
            p.name: p for p in sketch(job.subject, layout, job.completions).programs
        }
        lowered = programs[job.program].lower()
        with quiet():
            lowered.compile(compiler_options=options(folder))
        connection.send("")
    except Exception as e:
        connection.send(str(e).strip() or first_line(e))


def options(folder: str) -> dict[str, str | bool]:
    """Returns libtpu's compile options: it writes the files that `ask` reads to `folder`."""
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def _last_words(connection: Connection) -> str:
    try:
        return connection.recv()
    except EOFError:
        return ""


def _whole(folder: Path) -> Answer | None:
    """What the compiler decided, once it has written all of it: its last file is that of the program again."""
    sizes = [
        path.stat().st_size
        for part in ("", "_after_buffer_assignment")
        for path in _find(folder, part)
    ]
    if len(sizes) < 2 or sizes[0] != sizes[1] or not sizes[0]:
        return None
    return _decided(folder)


def _decided(folder: Path, refused: str = "") -> Answer:
    assignment, text, ranges = (
        _find(folder, part)[0].read_text()
        for part in ("-buffer-assignment", "", "-live-range")
    )
    return Answer(_memory(assignment), text, refused, _peak(ranges))


def _find(folder: Path, part: str) -> list[Path]:
    return list(
        folder.glob(f"*.after_optimizations{part}.txt")
    )  # one, or none yet: one program is compiled


def _peak(ranges: str) -> tuple[tuple[str, float], ...]:
    """The values that live at the moment of the most, VMEM's among them, the largest first."""
    at = ranges.partition("(peak):")[2].partition("Stack trace")[0]
    return tuple(
        (name, float(size))
        for name, size in re.findall(r"^\s+(\S+): (\d+) bytes", at, re.MULTILINE)
    )


def _memory(assignment: str) -> Memory:
    """From the allocations in HBM: parameters, outputs (some in the place of parameters), temporaries.

    What is "thread-local" lies inside a fusion, on paper alone; constants are part of the machine code.
    """
    sizes = {"arguments": 0.0, "aliased": 0.0, "outputs": 0.0, "temporaries": 0.0}
    for size, space, what in _ALLOCATION.findall(assignment):
        if (space or HBM) != HBM:
            continue
        given, left = what.startswith("parameter"), "maybe-live-out" in what
        sizes["arguments"] += float(size) * given
        sizes["outputs"] += float(size) * left
        sizes["aliased"] += float(size) * (given and left)
        sizes["temporaries"] += float(size) * what.startswith("preallocated-temp")
    peak = (
        sizes["arguments"] + sizes["outputs"] + sizes["temporaries"] - sizes["aliased"]
    )
    return Memory(**sizes, peak=peak)
