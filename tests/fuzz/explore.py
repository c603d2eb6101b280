"""Gives a reader a separate process and many inputs, and collects what fails."""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from rlhfjax import process
from rlhfjax.errors import UserError
from tests.fuzz import watch
from tests.fuzz.watch import Finding

FOUND = Path(__file__).parent / "found"
LAST = "last_input"  # the file with the input of the call that is under way
_LARGEST = (
    2**22
)  # bytes of an input: the limits are on the work, not on the size of files
_ROUND = 200  # examples between two looks at the clock


class Found(NamedTuple):
    """A finding with the smallest input that has it."""

    finding: Finding
    content: bytes


def explore(
    name: str, seconds: float | None = None, start: int | None = None
) -> list[Found]:
    """Returns what a reader gets wrong, by inputs made in separate processes.

    Args:
      seconds: time to spend; None: the reader's fixed number of examples, always the same.
      start: seed of the first examples, if `seconds` is given.
    """
    end = time.monotonic() + (seconds or 0)
    found: dict[tuple[str, str], Found] = {}
    while True:
        left = None if seconds is None else max(1.0, end - time.monotonic())
        more, died = _explore_once(name, left, start)
        for one in more:
            found.setdefault(one.finding.key, one)
        # A process that died is followed by another while there is time.
        if not died or time.monotonic() >= end:
            return list(found.values())
        start = (start or 0) + _ROUND


def _explore_once(
    name: str, seconds: float | None, start: int | None
) -> tuple[list[Found], bool]:
    """Returns what one process finds, and whether it died of the last input."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        answer = _run(_explore_here, name, Path(folder), seconds, start)
        if not isinstance(answer, int):
            return answer, False
        last = Path(folder, LAST)
        content = last.read_bytes() if last.exists() else b""
        return [Found(_died(answer), content)], True


def judge(name: str, content: bytes) -> Finding | None:
    """Returns what is wrong with one input, tried in a separate process."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        answer = _run(_judge_here, name, Path(folder), content)
        return _died(answer) if isinstance(answer, int) else answer


def recorded(name: str) -> list[Path]:
    """Returns the files of a reader's inputs that once failed."""
    return sorted((FOUND / name).glob("*"))


def _died(code: int) -> Finding:
    if code == -signal.SIGPROF:
        return Finding("Hang", "outside of Python", "the call does not end")
    return Finding("crash", "outside of Python", f"the process ended with {code}")


def _run(work: Any, *arguments: Any) -> Any:
    """Returns what a function returns in a separate process, or that process's exit code.

    The processes are forked from a server that has imported the readers and started nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fuzz.readers"])
    ours, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=_send, args=(theirs, work, arguments))
    worker.start()
    theirs.close()
    try:
        answer, failure = ours.recv()
    except EOFError:
        worker.join()
        return worker.exitcode
    finally:
        worker.join()
        ours.close()
    if failure:
        raise RuntimeError(f"{arguments[0]}: a good input is not read:\n{failure}")
    return answer


def _send(pipe: Any, work: Any, arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send((work(*arguments), ""))
    except Exception:
        pipe.send((None, traceback.format_exc()))


# ------------------------------------------------------------------ in the process of a reader


@contextlib.contextmanager
def _ready(name: str, folder: Path) -> Iterator[tuple[Any, Any]]:
    """Yields a reader and its trial, after good inputs were read once; output goes to files."""
    from tests.fuzz.readers import find

    for descriptor in (1, 2):
        file = os.open(folder / f"output{descriptor}", os.O_RDWR | os.O_CREAT)
        os.dup2(file, descriptor)
    process._set_up_logging()
    work = folder / "work"
    work.mkdir()
    os.chdir(work)
    reader = find(name)
    trial = reader.make(work)
    for content in trial.seeds:
        # A good input has to be read. This also imports what is imported late.
        with contextlib.suppress(*(UserError, *reader.accepted) * trial.refusable):
            trial.call(content)
    yield reader, trial


def _judge_here(name: str, folder: Path, content: bytes) -> Finding | None:
    with _ready(name, folder) as (reader, trial):
        return watch.judge(trial.call, content, reader.accepted)


def _explore_here(
    name: str, folder: Path, seconds: float | None, start: int | None
) -> list[Found]:
    found: dict[tuple[str, str], Found] = {}
    with _ready(name, folder) as (reader, trial):

        def look(content: bytes) -> None:
            content = content[:_LARGEST]
            (folder / LAST).write_bytes(content)
            finding = watch.judge(trial.call, content, reader.accepted)
            if finding is None:
                return
            known = found.get(finding.key)
            if known is None or len(content) < len(known.content):
                found[finding.key] = Found(finding, content)

        if seconds is None:
            give_examples(trial.inputs, look, reader.examples, None)
        else:
            _until(time.monotonic() + seconds, trial.inputs, look, start or 0)
        return [_smaller(trial.call, reader.accepted, one) for one in found.values()]


def _until(end: float, inputs: Any, look: Any, start: int) -> None:
    number = start
    while time.monotonic() < end:
        give_examples(inputs, look, _ROUND, number)
        number += 1


def give_examples(
    inputs: st.SearchStrategy,
    look: Callable[[bytes], Any],
    count: int,
    number: int | None = None,
) -> None:
    """Calls `look` with examples; the same ones every time if there is no number."""
    checked = settings(
        max_examples=count,
        derandomize=number is None,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )(given(inputs)(lambda content: look(content)))
    if number is not None:
        checked = seed(number)(checked)
    checked()


def _smaller(
    call: Any, accepted: tuple[type, ...], found: Found, seconds: float = 3.0
) -> Found:
    """Returns a finding with an input from which parts were cut that do not matter."""
    content = found.content
    end = time.monotonic() + seconds
    size = len(content) // 2
    while size and time.monotonic() < end:
        at = 0
        while at < len(content) and time.monotonic() < end:
            shorter = content[:at] + content[at + size :]
            finding = watch.judge(call, shorter, accepted)
            if finding and finding.key == found.finding.key:
                content = shorter
            else:
                at += size
        size //= 2
    return Found(found.finding, content)
