"""Runs commands as processes, a few at a time; one that fails does not stop the others.

A command that exits with `Preempted.exit_code` has saved its state and is started again. SIGINT and
SIGTERM are passed on as SIGTERM, on which a run saves; a second signal kills the processes. They
are not in the terminal's foreground group, so that Ctrl-C reaches them only through this module.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, NamedTuple

from rlhfjax import paths
from rlhfjax.errors import ConfigError, Preempted
from rlhfjax.metrics import UPLOAD_EVERY
from rlhfjax.paths import Path
from rlhfjax.progress import duration

LOCK, LOGS = "sweep.lock", "logs"
SLOT = "{slot}"
POLL = 0.2  # seconds
GRACE = 600.0  # seconds a run has to save


def run_all(
    commands: Mapping[str, Sequence[str]],
    folder: Path,
    parallel: int = 1,
    say: Callable[[str], None] = print,
) -> dict[str, int]:
    """Runs every command, at most `parallel` at a time; output is appended to its log file.

    The log file of a command is `folder/logs/NAME.txt`.

    `{slot}` in a command stands for a number below `parallel` that no other command has while it
    runs.

    Returns:
      {name: exit code}.
    Raises:
      ConfigError: processes of an earlier call still run in this folder.
      Preempted: SIGTERM was received. KeyboardInterrupt: Ctrl-C. All processes have ended.
    """
    here = paths.Mirror(folder, [f"{LOGS}/{name}.txt" for name in commands])
    paths.make_folder(here.folder / LOGS)
    waiting, running, codes = deque(commands), {}, {}
    slots = list(range(parallel))
    with _locked(folder) as lock, _signals() as received:
        try:
            while (waiting or running) and not received.came.wait(
                POLL if running else 0
            ):
                here.sync(UPLOAD_EVERY)
                for name, code, slot, seconds in _ended(running):
                    slots.append(slot)
                    if code == Preempted.exit_code:
                        say(f"{name}: preempted after {duration(seconds)}; restarting")
                        waiting.append(name)
                        continue
                    codes[name] = code
                    outcome = "done"
                    if code:
                        log = log_of(folder, name)
                        outcome = f"failed with {describe(code)}, see {log};"
                    count = f"[{len(codes)}/{len(commands)}]"
                    say(f"{count} {name}: {outcome} after {duration(seconds)}")
                while waiting and len(running) < parallel:
                    name = waiting.popleft()
                    slot = slots.pop(0)
                    command = [_with_slot(word, slot) for word in commands[name]]
                    process = _start(command, log_of(here.folder, name), lock)
                    running[name] = _Running(process, slot, time.monotonic())
        finally:
            if running:
                say(
                    f"stopping {len(running)} of {len(commands)} runs; "
                    "press Ctrl-C again to kill them"
                )
            _stop([run.process for run in running.values()], received)
            here.close()
    if received.all:
        if received.all[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise Preempted("the sweep stopped; run the same command to resume")
    return codes


class Verbatim(str):
    """A word of a command in which `{slot}` stands for itself."""


def _with_slot(word: str, slot: int) -> str:
    return word if isinstance(word, Verbatim) else word.replace(SLOT, str(slot))


def log_of(folder: Path, name: str) -> Path:
    return folder / LOGS / f"{name}.txt"


def describe(code: int) -> str:
    """Describes an exit code; negative ones are signals."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _start(command: Sequence[str], log: Path, lock: IO) -> subprocess.Popen:
    with log.open("a") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[
                lock.fileno()
            ],  # held until the last process has ended, also where this one is killed
        )


class _Running(NamedTuple):
    process: subprocess.Popen
    slot: int
    began: float  # by the monotonic clock


def _ended(running: dict[str, _Running]) -> Iterator[tuple[str, int, int, float]]:
    """Removes ended processes from `running`; yields (name, exit code, slot, seconds) of each."""
    for name, run in list(running.items()):
        if (code := run.process.poll()) is not None:
            del running[name]
            yield name, code, run.slot, time.monotonic() - run.began


def _stop(processes: Sequence[subprocess.Popen], received: "_Received") -> None:
    """Sends SIGTERM to all processes and waits until they have ended.

    After GRACE seconds, or on a further signal, it sends SIGKILL.
    """
    before = len(received.all)
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline or len(received.all) > before:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        time.sleep(POLL / 4)


class _Received:
    """Collects the signals that were received; the first one sets `came`."""

    def __init__(self) -> None:
        self.all: list[int] = []
        self.came = threading.Event()

    def __call__(self, number: int, _frame: object) -> None:
        self.all.append(number)
        self.came.set()


@contextlib.contextmanager
def _signals() -> Iterator[_Received]:
    """Collects SIGINT and SIGTERM, which then have no other effect. Only the main thread may."""
    received = _Received()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {
        number: signal.signal(number, received)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[IO]:
    with paths.lock_file(folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: a sweep is running here; wait for it, or stop its processes"
            ) from None
        yield file
