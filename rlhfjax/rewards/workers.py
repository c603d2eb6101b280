"""Runs a function of one sample in processes beside the accelerator.

A call that raises, returns no finite number, exceeds its time or kills its process becomes an
outcome that tells why. Its process is replaced if needed, and the other calls continue: no sample
is lost, and none can hang the run.
"""

import importlib
import math
import multiprocessing
import signal
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from rlhfjax.errors import ConfigError, DataError, first_line

STARTING = 120.0  # seconds for a process to import the function
TIMED_OUT = "timed out"


class Outcome(NamedTuple):
    """The result of one call."""

    value: float | None  # None: the call failed
    error: str = ""  # why it failed, one line


def find_function(name: str) -> Callable[..., Any]:
    """Returns the function `package.module:function`.

    Raises:
      ConfigError: it cannot be imported, or is no function.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"rule {name!r}: expected package.module:function that can be imported"
            f" ({first_line(error)})"
        ) from None
    if not callable(function):
        kind = type(function).__name__
        raise ConfigError(f"rule {name!r}: expected a function, got {kind}")
    return function


def call(function: Callable[..., Any], arguments: Sequence[Any]) -> Outcome:
    """Returns the outcome of one call in this process; True counts as 1 and False as 0."""
    try:
        number = float(function(*arguments))
    except Exception as error:
        return Outcome(None, f"{type(error).__name__}: {' '.join(str(error).split())}")
    if not math.isfinite(number):
        return Outcome(None, f"returned {number}")
    return Outcome(number)


def _serve(connection: Connection, name: str) -> None:
    """Runs a worker: sends None when it is ready, then an outcome per call until the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    function = find_function(name)
    connection.send(None)
    try:
        while True:
            connection.send(call(function, connection.recv()))
    except (EOFError, OSError):
        pass


class _Worker:
    """A process, and the call that it is running."""

    def __init__(self, name: str):
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

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class Pool:
    """Worker processes for one function. They start with the first calls and end with the pool."""

    def __init__(self, name: str, *, workers: int, timeout: float):
        find_function(name)
        self._name, self._count, self._timeout = name, workers, timeout
        self._workers: list[_Worker] = []
        weakref.finalize(self, _stop_all, self._workers)

    def map(self, calls: Sequence[Sequence[Any]]) -> list[Outcome]:
        """Returns the outcome of every call, in order.

        Raises:
          DataError: a worker process does not start.
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
            if worker.connection in received:
                self._receive(worker, outcomes)
            elif time.monotonic() > worker.deadline:
                error = f"{TIMED_OUT} after {self._timeout:g} s"
                self._replace(worker, outcomes, error)

    def _receive(self, worker: _Worker, outcomes: dict[int, Outcome]) -> None:
        try:
            outcome = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(worker, outcomes, "its process died")
            return
        if worker.item is None:
            worker.ready = True
        else:
            outcomes[worker.item] = outcome
            worker.item = None

    def _replace(
        self, worker: _Worker, outcomes: dict[int, Outcome], error: str
    ) -> None:
        worker.stop()
        if worker.item is None:
            raise DataError(
                f"rule {self._name!r}: a worker process did not start ({error})"
            )
        outcomes[worker.item] = Outcome(None, error)
        self._workers[self._workers.index(worker)] = _Worker(self._name)

    def close(self) -> None:
        """Ends the processes; a pool may be used again afterwards."""
        _stop_all(self._workers)


def _stop_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().stop()
