"""A pool of processes that returns results in order and holds few of them at a time."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from rlhfjax.errors import DataError

A = TypeVar("A")
B = TypeVar("B")
_WAITING = 2  # tasks per process that are begun before the first result is taken
_state: Any = None  # of this worker


def ordered(
    function: Callable[[Any, A], B], state: Any, tasks: Iterable[A], workers: int
) -> Iterator[B]:
    """Yields function(state, task) for every task, in the order of the tasks.

    Args:
      function: of a module's top level, so that a process can import it.
      state: sent once to each process.
      workers: processes; 0: this one.

    Raises:
      DataError: a process was killed.
    """
    if not workers:
        for task in tasks:
            yield function(state, task)
        return
    # A fork would share the accelerator's threads and locks.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin, (state,))
    pending: deque[Future[B]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(_call, function, task))
            if len(pending) >= _WAITING * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process died, perhaps for want of memory;"
            " the same command continues, with fewer `workers` if memory is short"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(state: Any) -> None:
    """Keeps the state in this worker, which ends with the process that started it.

    Ctrl-C is for that process alone.
    """
    global _state
    _state = state
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _call(function: Callable[[Any, Any], Any], task: Any) -> Any:
    return function(_state, task)
