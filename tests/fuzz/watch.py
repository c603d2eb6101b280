"""Judges one call of a reader: its outcome, its seconds, its memory and what it prints."""

import contextlib
import os
import re
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlhfjax.errors import UserError

SECONDS = 2.0  # of the CPU, per call
MEMORY = 500 * 2**20  # bytes above what the process holds before the call
PRINTED = 10_000  # bytes on the standard error, per call: more is a storm of warnings
WARNINGS = 20
LONGEST = 1000  # characters of a message about a short input
HANG = 4 * SECONDS  # of the CPU; then Python is interrupted
_ASLEEP = 60.0  # seconds of a call that waits for something
ROOT = Path(__file__).parents[2]


class Hang(BaseException):
    """Raised in a call that does not end. Not an Exception, so that no reader catches it."""


class Finding(NamedTuple):
    """What is wrong with a call."""

    kind: str  # the exception's class, or "slow", "memory", "printed", "warnings"
    place: str  # the last line of our code that the exception passed through
    message: str

    @property
    def key(self) -> tuple[str, str]:
        return self.kind, self.place

    def __str__(self) -> str:
        return f"{self.kind} at {self.place}: {self.message}"


def judge(
    call: Callable[[bytes], Any], content: bytes, accepted: tuple[type, ...] = ()
) -> Finding | None:
    """Calls a reader and returns what is wrong, if anything.

    Args:
      accepted: classes of exceptions that are right beside UserError.
    """
    printed = [_written(1), _written(2)]
    start = time.process_time()
    try:
        with _limits(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(content)
    except (UserError, *accepted) as error:
        if finding := _hidden(error):
            return finding
        if finding := _wrong_message(error, content):
            return finding
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the call may raise anything
        return _finding(error)
    seconds = time.process_time() - start
    if seconds > SECONDS:
        return Finding("slow", "the call", f"{seconds:.1f} s of the CPU")
    if _written(1) > printed[0]:
        return Finding("printed", "the call", _last(1, printed[0]))
    if _written(2) > printed[1] + PRINTED:
        return Finding("printed", "the call", _last(2, printed[1]))
    if len(caught) > WARNINGS:
        return Finding("warnings", "the call", f"{len(caught)} warnings")
    return None


def _finding(error: BaseException) -> Finding:
    kind = "memory" if isinstance(error, MemoryError) else type(error).__name__
    lines = str(error).splitlines() or [""]
    return Finding(kind, _place(error), lines[0][:200])


def _hidden(error: BaseException) -> Finding | None:
    """Returns a MemoryError that the reader has turned into one of our errors."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return Finding("memory", _place(cause), f"told as: {error}"[:200])
        cause = cause.__cause__ or cause.__context__
    return None


def _wrong_message(error: BaseException, content: bytes) -> Finding | None:
    """Returns a message that is no single line, or far longer than its input.

    A line break of the input may be in it: the command line shows it as an escape.
    """
    message = str(error)
    breaks = re.search(b"[\r\n]|\\\\[rn]", content)
    if not message.strip():
        return Finding("message", _place(error), "it is empty")
    if len(message) > LONGEST + 2 * len(content):
        return Finding("message", _place(error), f"it has {len(message)} characters")
    if not breaks and re.search("[\r\n]", message.strip()):
        return Finding("message", _place(error), f"several lines: {message!r}"[:200])
    return None


def _place(error: BaseException) -> str:
    """Returns the last line in rlhfjax/ or launch/ that an exception passed through."""
    place = "outside"
    for frame in traceback.extract_tb(error.__traceback__):
        name = Path(frame.filename)
        if name.is_relative_to(ROOT) and not name.is_relative_to(ROOT / "tests"):
            place = f"{name.relative_to(ROOT)}:{frame.lineno} ({frame.name})"
    return place


def _written(descriptor: int) -> int:
    """Returns the bytes in the file that a standard stream is redirected to; else 0."""
    return os.fstat(descriptor).st_size


def _last(descriptor: int, start: int) -> str:
    """Returns the end of what was written from a place on."""
    size = _written(descriptor) - start
    text = os.pread(descriptor, size, start).decode(errors="replace")
    return f"{size} bytes, at last {text[-200:]!r}"


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Limits the memory and the time of a block.

    A call that is stuck outside of Python cannot be interrupted; then SIGPROF ends the process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    signal.signal(signal.SIGVTALRM, _hang)
    signal.signal(signal.SIGALRM, _hang)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, 2 * HANG)
    signal.setitimer(signal.ITIMER_REAL, _ASLEEP)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MEMORY, hard))
        yield
    finally:
        for timer in (signal.ITIMER_VIRTUAL, signal.ITIMER_REAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _hang(number: int, _frame: object) -> None:
    # A handler of the package may catch what is raised here once; it is raised again.
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.5)
    raise Hang(f"no end after {HANG:.0f} s of the CPU or {_ASLEEP:.0f} s of waiting")


def _data_bytes() -> int:
    """Returns the private writable memory of this process, which RLIMIT_DATA limits."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmData:"))
    return 1024 * int(line.split()[1])
