"""A function of one sample run in processes beside the accelerator: no sample is lost, and none can hang the run.

A call that raises, returns no finite number, takes longer than its time or kills its process becomes an outcome that
says so; its process is replaced and the other calls go on.
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
    """What became of one call."""

    value: float | None  # None where it failed
    error: str = ""  # why, one line


def find_function(name: str) -> Callable[..., Any]:
    """The function `package.module:function`.

    Raises:
      ConfigError: there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"rule {name!r}: expected package.module:function that can be imported ({first_line(error)})"
        ) from None
    if not callable(found):
        raise ConfigError(f"rule {name!r}: it is a {type(found).__name__}, no function")
    return found


def call(function: Callable[..., Any], arguments: Sequence[Any]) -> Outcome:
    """One call here and now, its exceptions as outcomes; True is 1 and False 0, and 0 is a score like any other."""
    try:
        value = function(*arguments)
        number = float(value)
    except Exception as error:
        return Outcome(None, f"{type(error).__name__}: {' '.join(str(error).split())}")
    return (
        Outcome(number)
        if math.isfinite(number)
        else Outcome(None, f"returned {number}")
    )


def _serve(connection: Connection, name: str) -> None:
    """A worker: says that it is ready, then answers calls until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    function = find_function(name)
    connection.send(None)
    try:
        while True:
            connection.send(call(function, connection.recv()))
    except (EOFError, OSError):
        pass


class _Worker:
    def __init__(self, name: str):
        context = multiprocessing.get_context(
            "spawn"
        )  # a fork would share the accelerator's threads and locks
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, name), daemon=True)
        self.process.start()
        theirs.close()
        self.item: int | None = None  # what it works on
        self.ready, self.deadline = False, time.monotonic() + STARTING

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class Pool:
    """Worker processes for one function, given by its name; they start with the first calls and end with the pool."""

    def __init__(self, name: str, *, workers: int, timeout: float):
        find_function(name)
        self._name, self._count, self._timeout = name, workers, timeout
        self._workers: list[_Worker] = []
        weakref.finalize(self, _stop_all, self._workers)

    def map(self, calls: Sequence[Sequence[Any]]) -> list[Outcome]:
        """The outcome of every call, in their order.

        Raises:
          DataError: a worker process does not come up.
        """
        outcomes: list[Outcome | None] = [None] * len(calls)
        waiting = deque(range(len(calls)))
        while len(self._workers) < min(self._count, len(calls)):
            self._workers.append(_Worker(self._name))
        while waiting or any(worker.item is not None for worker in self._workers):
            for worker in self._workers:
                if worker.ready and worker.item is None and waiting:
                    worker.item = waiting.popleft()
                    worker.deadline = time.monotonic() + self._timeout
                    worker.connection.send(calls[worker.item])
            self._listen(outcomes)
        return outcomes  # every one is filled: the loop ends when nothing waits and nobody works

    def _listen(self, outcomes: list[Outcome | None]) -> None:
        """Waits for the next answer or deadline, and takes down what there is."""
        active = {
            w.connection: w for w in self._workers if w.item is not None or not w.ready
        }
        left = min(worker.deadline for worker in active.values()) - time.monotonic()
        heard = wait(list(active), timeout=max(0.0, left))
        for connection, worker in active.items():
            if connection in heard:
                self._hear(worker, outcomes)
            elif time.monotonic() > worker.deadline:
                self._replace(
                    worker, outcomes, f"{TIMED_OUT} after {self._timeout:g} s"
                )

    def _hear(self, worker: _Worker, outcomes: list[Outcome | None]) -> None:
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(worker, outcomes, "its process died")
            return
        if worker.item is None:
            worker.ready = True
        else:
            outcomes[worker.item], worker.item = answer, None

    def _replace(
        self, worker: _Worker, outcomes: list[Outcome | None], error: str
    ) -> None:
        worker.stop()
        if not worker.ready:
            raise DataError(
                f"rule {self._name!r}: a process that should run it did not come up ({error})"
            )
        outcomes[worker.item] = Outcome(None, error)
        self._workers[self._workers.index(worker)] = _Worker(self._name)

    def close(self) -> None:
        """Ends the processes; a pool may be used again afterwards."""
        _stop_all(self._workers)


def _stop_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().stop()
