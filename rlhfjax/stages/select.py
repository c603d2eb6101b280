"""Selection: the best answers to each prompt as conversations to fine-tune on (rejection sampling, expert iteration).

workdir/train.jsonl, validation.jsonl    {"messages", "prompt_tokens", "response_tokens", "score"}, an answer a row

`sft` on these files learns the sampled ids themselves, eos included where it was sampled, and nothing of the prompt.
collect -> select -> sft -> collect ... is expert iteration (Anthony et al. 2017; ReST, Gulcehre et al. 2023); with one
round it is Llama 2's rejection sampling (Touvron et al. 2023, section 3.2.3).
"""

import dataclasses
from typing import Any

import numpy as np

from rlhfjax.data import chat, examples
from rlhfjax.data.config import open_preferences
from rlhfjax.data.rows import Row
from rlhfjax.data.tokenizer import Tokenizer, load_tokenizer
from rlhfjax.errors import DataError
from rlhfjax.jsonl import write_jsonl
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.paths import Path
from rlhfjax.ranges import Finite, PositiveCount

SPLITS = ("train", "validation")

ON_ONE_HOST = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    stage: str = "select"
    preferences: tuple[str, ...] = ()  # folders that `collect` wrote, or jsonl: globs
    tokenizer: str  # file or folder: the one that the answers were sampled with
    keep: PositiveCount = 1  # answers to a prompt, the best ones
    min_score: Finite | None = None  # answers below it are left out, however few remain
    mesh: MeshConfig = MeshConfig()


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes the selected answers; returns how many there are and what selection did to their scores."""
    tokenizer = load_tokenizer(config.tokenizer)
    metrics: dict[str, float] = {}
    for split in SPLITS:
        source = open_preferences(config.preferences, split, "select")
        rows = [source[i] for i in range(len(source))]
        chosen = [
            best(row, keep=config.keep, min_score=config.min_score) for row in rows
        ]
        if not any(chosen):
            raise DataError(
                f"select: no answer of split {split!r} scores {config.min_score} or more"
            )
        selected = [
            selected_row(tokenizer, row, i)
            for row, some in zip(rows, chosen, strict=True)
            for i in some
        ]
        write_jsonl(workdir / f"{split}.jsonl", selected)
        if split == "train":
            metrics = _describe(rows, chosen, selected)
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def best(row: Row, *, keep: int, min_score: float | None) -> list[int]:
    """Which answers of a prompt to keep: the best `keep` distinct ones, best first; of equal scores the first.

    An answer without text (no more than an eos) is never kept: there is nothing in it to learn.
    """
    chosen: list[int] = []
    for i in np.argsort(-np.asarray(row["scores"]), kind="stable").tolist():
        enough = min_score is None or row["scores"][i] >= min_score
        repeated = any(row["completions"][i] == row["completions"][j] for j in chosen)
        if (
            enough
            and not repeated
            and row["completions"][i].strip()
            and len(chosen) < keep
        ):
            chosen.append(i)
    return chosen


def selected_row(tokenizer: Tokenizer, row: Row, index: int) -> dict[str, Any]:
    """One answer as a conversation for people, with the ids that it is for the model."""
    prompt, completions = examples.preference_ids(tokenizer, row)
    answer = {"role": "assistant", "content": row["completions"][index]}
    return {
        "messages": [*messages_of(tokenizer, prompt), answer],
        "prompt_tokens": prompt,
        "response_tokens": completions[index],
        "score": float(row["scores"][index]),
    }


def messages_of(tokenizer: Tokenizer, prompt: list[int]) -> list[chat.Message]:
    """The turns of a rendered prompt that say anything; ids without any marker are one user turn."""
    messages = tokenizer.template.messages(prompt)
    return [message for message in messages if message["content"].strip()]


def _describe(
    rows: list[Row], chosen: list[list[int]], selected: list[dict[str, Any]]
) -> dict[str, float]:
    return {
        "select/rows": float(len(selected)),
        "select/prompts": float(sum(map(bool, chosen))),
        "select/kept": len(selected) / sum(len(row["scores"]) for row in rows),
        "select/score": float(np.mean([row["score"] for row in selected])),
        "select/score_before": float(
            np.mean([score for row in rows for score in row["scores"]])
        ),
        "select/response_length": float(
            np.mean([len(row["response_tokens"]) for row in selected])
        ),
    }
