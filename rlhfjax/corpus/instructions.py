"""Instructions that a model writes after examples: its prompt, and how its response is read.

Source: Wang et al. 2022 (Self-Instruct), section 2.2 and table 5: eight examples, six of the seed
tasks and two that were generated; filters by words and by similarity to all instructions before.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from typing_extensions import TypedDict

from rlhfjax.corpus.similar import Nearest, Pool
from rlhfjax.corpus.words import words
from rlhfjax.endpoint import Reply
from rlhfjax.ranges import Count

TEMPLATE = """Come up with a series of tasks:
{examples}
Task {next}:"""
REASONS = ("empty", "words", "banned", "similar")
"""Why an instruction is not taken, in the order in which it is looked at."""

# The beginning of a numbered item: `Task 9:`, `9.`, `**9)**`.
_ITEM = re.compile(r"^[ \t#*]*(?:Task[ \t]*)?\d+[ \t]*[.:)]\**", re.MULTILINE)


class Rules(NamedTuple):
    """Which instructions are taken."""

    min_words: int
    max_words: int
    banned: tuple[str, ...]
    similarity: float


class Task(NamedTuple):
    """An instruction with its name."""

    name: str
    text: str


class Instruction(TypedDict):
    """An instruction that was taken, with its provenance."""

    id: str
    text: str
    model: str
    seed: Count
    round: Count
    examples: list[str]  # ids of what it was written after
    nearest: str  # id of the most similar one at that time
    similarity: float  # ROUGE-L with it


class Round(TypedDict):
    """What a round wrote."""

    taken: list[Instruction]
    counts: dict[str, Count]  # instructions by one of REASONS; "" if they were taken


def examples_of(
    seeds: Sequence[Task],
    generated: Sequence[Task],
    *,
    n_examples: int,
    n_generated: int,
    rng: np.random.Generator,
) -> list[Task]:
    """Returns the examples of one question, in random order; seeds where too few are generated."""
    n_generated = min(n_generated, len(generated))
    n_seeds = min(n_examples - n_generated, len(seeds))
    from_seeds = rng.choice(len(seeds), n_seeds, replace=False)
    from_generated = rng.choice(len(generated), n_generated, replace=False)
    chosen = [seeds[i] for i in from_seeds.tolist()]
    chosen += [generated[i] for i in from_generated.tolist()]
    return [chosen[i] for i in rng.permutation(len(chosen)).tolist()]


def question(template: str, examples: Sequence[Task]) -> str:
    """Returns what the model is asked."""
    listed = [f"Task {i}: {task.text}" for i, task in enumerate(examples, start=1)]
    values = {"examples": "\n".join(listed), "next": str(len(examples) + 1)}
    return re.sub(r"\{(examples|next)\}", lambda match: values[match[1]], template)


def parse(answer: str, is_cut: bool) -> list[str]:
    """Returns the instructions in a response, each in one line.

    Text before the first number is one, unless it introduces the list by a colon. The last one of
    a response that was cut is left out.
    """
    first, *items = _ITEM.split(answer)
    if not first.rstrip().endswith(":"):
        items = [first, *items]
    if is_cut:
        items = items[:-1]
    lines = [" ".join(item.split()) for item in items]
    return [line for line in lines if line]


def problem(instruction: str, rules: Rules, pool: Pool) -> tuple[str, Nearest]:
    """Returns which of REASONS speaks against an instruction, or "", and its nearest neighbor."""
    nobody = Nearest("", 0.0)
    tokens = words(instruction)
    if not tokens:
        return "empty", nobody
    if not rules.min_words <= len(tokens) <= rules.max_words:
        return "words", nobody
    banned = {word for phrase in rules.banned for word in words(phrase)}
    if banned & set(tokens):
        return "banned", nobody
    nearest = pool.nearest(instruction)
    return ("similar" if nearest.similarity >= rules.similarity else ""), nearest


def take(
    replies: Sequence[Reply],
    drawn: Sequence[Sequence[Task]],
    rules: Rules,
    pool: Pool,
    *,
    number: int,
    seed: int,
) -> Round:
    """Returns what is taken of a round's replies, and adds it to the pool.

    Args:
      drawn: the examples of each question.
      number: of the round.
    """
    result = Round(taken=[], counts={})
    for i, (examples, reply) in enumerate(zip(drawn, replies, strict=True)):
        for j, text in enumerate(parse(reply["text"], reply["is_cut"])):
            reason, nearest = problem(text, rules, pool)
            result["counts"][reason] = result["counts"].get(reason, 0) + 1
            if reason:
                continue
            instruction = Instruction(
                id=f"{number}-{i}-{j}",
                text=text,
                model=reply["model"],
                seed=seed,
                round=number,
                examples=[task.name for task in examples],
                nearest=nearest.name,
                similarity=round(nearest.similarity, 4),
            )
            result["taken"].append(instruction)
            pool.add(instruction["id"], text)
    return result
