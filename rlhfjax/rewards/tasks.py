"""Tasks with verifiable answers: reasoning-gym's generators, as prompts and as a rule.

`stages/tasks.py` writes the prompts with their task, seed, size and index as metadata. `score`
generates the same entry again from these, so that no entry has to be stored as text.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rlhfjax.errors import ConfigError, DataError, install

RULE = "rlhfjax.rewards.tasks:score"


def gym() -> Any:
    """Returns the reasoning_gym package.

    Raises:
      DataError: it is not installed.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise DataError(
            f"tasks: reasoning-gym is not installed; {install('tasks')}"
        ) from None
    return reasoning_gym


@functools.lru_cache(maxsize=64)
def dataset(task: str, size: int, seed: int) -> Any:
    """Returns a generator's entries by index, the same on every machine.

    Raises:
      ConfigError: reasoning-gym has no task of that name.
    """
    package = gym()
    try:
        return package.create_dataset(task, size=size, seed=seed)
    except ValueError as error:
        raise ConfigError(f"tasks: {' '.join(str(error).split())}") from None


def rows(task: str, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields prompts with the metadata that `score` needs."""
    entries = dataset(task, size, seed)
    for index in range(size):
        entry = entries[index]
        yield {
            "prompt": entry["question"],
            "answer": str(entry["answer"]),
            "task": task,
            "size": size,
            "seed": seed,
            "index": index,
        }


def score(prompt: str, response: str, metadata: Mapping[str, Any]) -> float:
    """Returns the task's own score of an answer, in [0, 1], with partial credit in some tasks.

    The answer is the text between <answer> and </answer>, or else the whole response.

    Raises:
      DataError: the generated entry has another answer: another version of reasoning-gym.
    """
    entries = dataset(metadata["task"], metadata["size"], metadata["seed"])
    entry = entries[metadata["index"]]
    if str(entry["answer"]) != metadata["answer"]:
        raise DataError(
            "the task has changed since the prompts were written;"
            " another version of reasoning-gym?"
        )
    return float(entries.score_answer(extract(response), entry))


def extract(response: str) -> str:
    """Returns the last text between <answer> and </answer>, or else the response, stripped."""
    answers = re.findall(r"<answer>(.*?)</answer>", response, flags=re.DOTALL)
    return (answers[-1] if answers else response).strip()
