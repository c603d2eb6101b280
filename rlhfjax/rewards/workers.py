"""Runs a function of one sample in processes beside the accelerator.

A call that raises, returns no finite number, exceeds its time or kills its process becomes an
outcome that tells why. Its process is replaced if needed, and the other calls continue: no sample
is lost, and none can hang the run.
"""

import contextlib
import multiprocessing
import os
import signal
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from rlhfjax import user_code
from rlhfjax.errors import ConfigError
from rlhfjax.ranges import LARGEST

STARTING = 120.0  # seconds for a process to import the function
TIMED_OUT = "timed out"


class Outcome(NamedTuple):
    """The result of one call."""

    value: float | None  # None: the call failed
    error: str = ""  # why it failed, one line


def find_function(name: str) -> Callable[..., Any]:
    """Returns the rule `package.module:function`.

    Raises:
      ConfigError: it cannot be imported, or is no function of (prompt, response, metadata).
    """
    return user_code.validate_rule(user_code.load(name, "rule", user_code.RULE), name)


def validate_function(name: str) -> None:
    """Validates a rule in a separate process, which the rule's module may hang or end.

    Raises:
      ConfigError: it cannot be imported, or is no function of (prompt, response, metadata).
    """
    user_code.split(name, "rule", user_code.RULE)
    worker = _Worker(name)
    try:
        worker.wait_until_ready()
    finally:
        worker.stop()


def call(function: Callable[..., Any], arguments: Sequence[Any]) -> Outcome:
    """Returns the outcome of one call in this process; True counts as 1 and False as 0."""
    try:
        value = function(*arguments)
        if isinstance(value, str | bytes | bytearray) or getattr(value, "ndim", 0):
            return Outcome(None, f"returned a {type(value).__name__}, not a number")
        number = float(value)
    except BaseException as error:  # sys.exit in a rule is its failure, not our end
        return Outcome(None, user_code.describe(error))
    if not abs(number) <= LARGEST:
        return Outcome(None, f"returned {number:g}, not a finite float32")
    return Outcome(number)


def _serve(connection: Connection, name: str) -> None:
    """Runs a worker: sends "" when it is ready, then an outcome per call until the end.

    If the function is invalid, it sends the reason and ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.dup2(2, 1)  # what a rule prints is not part of the command's output
    _die_first_without_memory()
    try:
        function = find_function(name)
    except ConfigError as error:
        connection.send(str(error))
        return
    except BaseException as error:
        connection.send(f"rule {name!r}: {user_code.describe(error)}")
        return
    connection.send("")
    try:
        while True:
            connection.send(call(function, connection.recv()))
    except (EOFError, OSError):
        pass


def _die_first_without_memory() -> None:
    """Makes Linux end this process, and not the run, when memory is short."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


class _Worker:
    """A process, and the call that it is running."""

    def __init__(self, name: str):
        self.name = name
        # A fork would share the accelerator's threads and locks.
        context = multiprocessing.get_context("spawn")
        self.connection, other_end = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(other_end, name), daemon=True
        )
        self.process.start()
        other_end.close()
        self.item: int | None = None  # index of the call
        self.ready = False
        self.deadline = time.monotonic() + STARTING

    def wait_until_ready(self) -> None:
        """Waits until the function is imported.

        Raises:
          ConfigError: it cannot be imported, or is no rule.
        """
        if not self.connection.poll(max(0.0, self.deadline - time.monotonic())):
            raise ConfigError(self._not_started(f"within {STARTING:g} s"))
        try:
            problem = self.connection.recv()
        except (EOFError, OSError):
            raise ConfigError(self._not_started(f"({self.death()})")) from None
        if problem:
            raise ConfigError(problem)
        self.ready = True

    def _not_started(self, why: str) -> str:
        return (
            f"rule {self.name!r}: its module was not imported {why};"
            f" expected {user_code.RULE}"
        )

    def death(self) -> str:
        """Returns how the process ended."""
        self.process.join(timeout=1.0)  # it may have closed its connection alone
        code = self.process.exitcode or 0
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"its process died, {how}"

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class Pool:
    """Worker processes for one function. They start with the first calls and end with the pool."""

    def __init__(self, name: str, *, workers: int, timeout: float):
        self._name, self._count, self._timeout = name, workers, timeout
        self._workers: list[_Worker] = []
        weakref.finalize(self, _stop_all, self._workers)

    def map(self, calls: Sequence[Sequence[Any]]) -> list[Outcome]:
        """Returns the outcome of every call, in order.

        Raises:
          ConfigError: the function cannot be imported, or is no rule.
        """
        outcomes: dict[int, Outcome] = {}
        waiting = deque(range(len(calls)))
        while len(self._workers) < min(self._count, len(calls)):
            self._workers.append(_Worker(self._name))
        while len(outcomes) < len(calls):
            for worker in self._workers:
                if worker.ready and worker.item is None and waiting:
                    worker.item = waiting.popleft()
                    worker.deadline = time.monotonic() + self._timeout
                    worker.connection.send(calls[worker.item])
            self._wait(outcomes)
        return [outcomes[i] for i in range(len(calls))]

    def _wait(self, outcomes: dict[int, Outcome]) -> None:
        """Waits for the next result or deadline and adds the outcomes that there are."""
        active = [w for w in self._workers if w.item is not None or not w.ready]
        left = min(worker.deadline for worker in active) - time.monotonic()
        connections = [worker.connection for worker in active]
        received = wait(connections, timeout=max(0.0, left))
        for worker in active:
            if worker.connection in received or time.monotonic() > worker.deadline:
                self._receive(worker, outcomes)

    def _receive(self, worker: _Worker, outcomes: dict[int, Outcome]) -> None:
        """Takes the result of a worker, and replaces one that died or is late."""
        if worker.item is None:
            worker.wait_until_ready()
            return
        outcome = Outcome(None, f"{TIMED_OUT} after {self._timeout:g} s")
        lost = not worker.connection.poll()
        if not lost:
            try:
                outcome = worker.connection.recv()
            except (EOFError, OSError):
                outcome, lost = Outcome(None, worker.death()), True
        outcomes[worker.item] = outcome
        worker.item = None
        if lost:
            worker.stop()
            self._workers[self._workers.index(worker)] = _Worker(self._name)

    def close(self) -> None:
        """Ends the processes; a pool may be used again afterwards."""
        _stop_all(self._workers)


def _stop_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().stop()
