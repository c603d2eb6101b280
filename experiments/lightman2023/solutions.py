"""Writes solutions of sums, some with a wrong step, labeled by a rule.

Command: python experiments/lightman2023/solutions.py runs/lightman2023/data

A problem asks for the last digit of a sum of a digit and four numbers from 1 to 3. A solution adds
them one by one, a step per line. In half of the solutions one step, any with equal probability, has
a wrong digit, and the steps after it continue from that digit. A step is right (label 1) if it and
all before it are. No problem is in both splits.

    steps/SPLIT.jsonl      a label per step
    outcome/SPLIT.jsonl    the same solutions as one step each, with the label of the last one
    text.txt               problems and solutions as text, for a tokenizer
"""

import itertools
import pathlib
import random
import sys
from typing import Any

from rlhfjax import json_text

SIZES = {"train": 8000, "validation": 1000}
ADDED = (
    1,
    2,
    3,
)  # all hundred sums of digits take a model of this size longer than minutes
ADDITIONS = 4
SHARE = 0.8  # of the problems for training


def problems() -> dict[str, list[tuple[int, ...]]]:
    """Returns the problems of each split."""
    every = list(itertools.product(range(10), *[ADDED] * ADDITIONS))
    random.Random(0).shuffle(every)
    count = int(SHARE * len(every))
    return {"train": every[:count], "validation": every[count:]}


def solution(rng: random.Random, numbers: tuple[int, ...]) -> dict[str, Any]:
    """Returns a solution of a problem as a row of kind steps."""
    wrong = rng.randrange(ADDITIONS) if rng.random() < 0.5 else None
    total, is_right = numbers[0], True
    steps, labels = [], []
    for i, number in enumerate(numbers[1:]):
        result = (total + number) % 10
        if i == wrong:
            result = (result + rng.randrange(1, 10)) % 10
            is_right = False
        steps.append(f"{total} + {number} = {result}")
        labels.append(float(is_right))
        total = result
    question = " + ".join(map(str, numbers)) + " = ?"
    messages = [{"role": "user", "content": question}]
    return {"messages": messages, "steps": steps, "labels": labels}


def outcome(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the same solution as one step: only the label of the whole is known."""
    return row | {"steps": ["\n".join(row["steps"])], "labels": row["labels"][-1:]}


def main(folder: pathlib.Path) -> None:
    for number, (split, size) in enumerate(SIZES.items()):
        rng = random.Random(number + 1)
        own = problems()[split]
        rows = [solution(rng, rng.choice(own)) for _ in range(size)]
        kinds = {"steps": rows, "outcome": list(map(outcome, rows))}
        for kind, of_kind in kinds.items():
            file = folder / kind / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = [json_text.encode(row, str(file)) + "\n" for row in of_kind]
            file.write_text("".join(lines))
        if split == "train":
            (folder / "text.txt").write_text("\n".join(map(plain, rows)))


def plain(row: dict[str, Any]) -> str:
    return "\n".join([row["messages"][0]["content"], *row["steps"]])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
