"""The task, the random data, the step times and the report of a peer's script.

Only NumPy and the standard library are imported, since no peer's environment has rlhfjax.
"""

import importlib.metadata
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

PAD, EOS, FIRST_WORD = 0, 1, 2  # every other id is a word "w<id>"


def read_task(words: list[str]) -> SimpleNamespace:
    """Returns the task of words such as `batch=32`, `model.d_model=128`, `precision=bf16`.

    A dot makes a namespace: task.model.d_model. Values are integers, floats or text.
    """
    task = SimpleNamespace()
    for word in words:
        path, _, text = word.partition("=")
        *groups, name = path.split(".")
        place = task
        for group in groups:
            if not hasattr(place, group):
                setattr(place, group, SimpleNamespace())
            place = getattr(place, group)
        setattr(place, name, _value(text))
    return task


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class Stopwatch:
    """Records wall and CPU time at every step boundary."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def tick(self, *_: Any, **__: Any) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def ticking(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields the batches; a step lasts from one request for a batch to the next."""
        for batch in batches:
            self.tick()
            yield batch
        self.tick()


def random_ids(task: SimpleNamespace, *shape: int) -> np.ndarray:
    """Returns random ids other than PAD and EOS."""
    rng = np.random.default_rng(0)
    return rng.integers(FIRST_WORD, task.model.vocab_size, shape, dtype=np.int32)


def text_of(ids: Iterable[int]) -> str:
    """Returns the words of ids; one word is one token."""
    return " ".join(f"w{i}" for i in ids)


def even_share(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    """Returns the share of even ids in each response: the reward of grpo."""
    del prompts
    words = [text.split() for text in completions]
    return [sum(int(w[1:]) % 2 == 0 for w in row) / len(row) for row in words]


def main(peer: str, packages: tuple[str, ...], run: Callable[..., int]) -> None:
    """Runs the task of the command line and prints one JSON line.

    Args:
      run: (task, stopwatch) -> units per step. It makes warmup + steps steps.
    """
    task, stopwatch = read_task(sys.argv[1:]), Stopwatch()
    units = run(task, stopwatch)
    seconds, cpu_seconds = np.diff(stopwatch.times, axis=0).T
    measured = seconds[task.warmup :]
    assert len(measured) == task.steps, f"{len(measured)} steps, expected {task.steps}"
    median = statistics.median(measured)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = {
        "peer": peer,
        "workload": task.workload,
        "setting": task.setting,
        task.metric: round(units / median, 1),
        "n_steps": len(measured),
        "median": round(median, 4),
        "min": round(float(measured.min()), 4),
        "max": round(float(measured.max()), 4),
        "first_step_s": round(float(seconds[0]), 2),
        "cpu_s_median": round(statistics.median(cpu_seconds[task.warmup :]), 4),
        "peak_rss_mb": round(peak / 1024),
        "loadavg_1m": round(os.getloadavg()[0], 2),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    print(json.dumps(report, allow_nan=False), flush=True)
