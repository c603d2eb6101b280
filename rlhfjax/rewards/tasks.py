"""Tasks whose answers a program can check: reasoning-gym's generators, as prompts and as a rule.

`stages/tasks.py` writes the prompts; their metadata say which task, seed, size and index each one is, and `score` makes
the same entry again, so that nothing of it has to survive being written as text.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rlhfjax.errors import ConfigError, DataError

RULE = "rlhfjax.rewards.tasks:score"


def gym() -> Any:
    """The reasoning_gym package. Raises DataError when it is not installed."""
    try:
        import reasoning_gym
    except ImportError:
        raise DataError(
            "tasks: reasoning-gym is not installed; pip install 'rlhfjax[tasks]'"
        ) from None
    return reasoning_gym


@functools.lru_cache(maxsize=64)
def dataset(task: str, size: int, seed: int) -> Any:
    """A generator's entries by index, the same on every machine.

    Raises:
      ConfigError: reasoning-gym has no task of that name.
    """
    package = gym()
    try:
        return package.create_dataset(task, size=size, seed=seed)
    except ValueError as error:
        raise ConfigError(f"tasks: {' '.join(str(error).split())}") from None


def rows(task: str, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Prompts with what `score` needs to know of each."""
    entries = dataset(task, size, seed)
    for index in range(size):
        entry = entries[index]
        metadata = {"task": task, "size": size, "seed": seed, "index": index}
        yield {"prompt": entry["question"], "answer": str(entry["answer"]), **metadata}


def score(prompt: str, response: str, metadata: Mapping[str, Any]) -> float:
    """The task's own score of an answer, in [0, 1]; partial credit where the task gives it.

    What stands between <answer> and </answer> is the answer, and where there is none the whole response.

    Raises:
      DataError: the entry made again asks another question: another version of reasoning-gym.
    """
    entries = dataset(metadata["task"], metadata["size"], metadata["seed"])
    entry = entries[metadata["index"]]
    if str(entry["answer"]) != metadata["answer"]:
        raise DataError(
            "the task has changed since the prompts were written; another version of reasoning-gym?"
        )
    return float(entries.score_answer(extract(response), entry))


def extract(response: str) -> str:
    found = re.findall(r"<answer>(.*?)</answer>", response, flags=re.DOTALL)
    return (found[-1] if found else response).strip()
