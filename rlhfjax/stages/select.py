"""Selects the best responses to each prompt as conversations to fine-tune on.

workdir/train.jsonl, validation.jsonl    one response per row:
                                         {"messages", "prompt_tokens", "response_tokens", "score"}

`sft` on these files trains on the sampled token ids themselves, eos included where it was sampled,
and not on the prompt. Repeating collect -> select -> sft is expert iteration (Anthony et al. 2017;
ReST, Gulcehre et al. 2023); one round is the rejection sampling of Llama 2 (Touvron et al. 2023,
section 3.2.3).
"""

import dataclasses
from typing import Any

import numpy as np

from rlhfjax.data import chat, examples
from rlhfjax.data.accepted import accepted, validate_preference
from rlhfjax.data.config import Preferences, open_preferences
from rlhfjax.data.counted import data_metrics
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
    """Which responses are selected."""

    stage: str = "select"
    """Name of the stage."""
    preferences: Preferences = ()
    """folders that `collect` wrote, specs, or sources with options"""
    tokenizer: str
    """file or folder of the tokenizer that the responses were sampled with"""
    keep: PositiveCount = 1
    """responses per prompt, the best ones"""
    min_score: Finite | None = None
    """lowest score of a selected response; None: no limit"""
    mesh: MeshConfig = MeshConfig()
    """not used: the stage computes on no device"""


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes the selected responses; returns their number and their scores before and after."""
    tokenizer = load_tokenizer(config.tokenizer)
    metrics: dict[str, float] = {}
    for split in SPLITS:
        source = open_preferences(config.preferences, split, "select")
        source = accepted(source, tokenizer, validate_preference)
        prompts, before, selected = 0, [], []
        for row in (source[i] for i in range(len(source))):
            indices = best(row, keep=config.keep, min_score=config.min_score)
            prompts += bool(indices)
            before += row["scores"]
            selected += [selected_row(tokenizer, row, i) for i in indices]
        if not selected:
            raise DataError(
                f"select.min_score={config.min_score}: no response of split {split!r}"
                " has this score or more"
            )
        write_jsonl(workdir / f"{split}.jsonl", selected)
        if split == "train":
            metrics = _selection_metrics(selected, before)
            metrics["select/prompts"] = float(prompts)
            metrics |= data_metrics(source, "select")
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def best(row: Row, *, keep: int, min_score: float | None) -> list[int]:
    """Returns the indices of the best `keep` distinct responses, best first.

    Of equal scores the first response comes first. A response without text (an eos alone) is never
    kept: there is nothing in it to learn.
    """
    scores, texts = row["scores"], row["completions"]
    chosen: list[int] = []
    for i in np.argsort(-np.asarray(scores), kind="stable").tolist():
        is_good = min_score is None or scores[i] >= min_score
        is_new = all(texts[i] != texts[j] for j in chosen)
        if is_good and is_new and texts[i].strip() and len(chosen) < keep:
            chosen.append(i)
    return chosen


def selected_row(tokenizer: Tokenizer, row: Row, index: int) -> dict[str, Any]:
    """Returns one response as a conversation, as text and as token ids."""
    prompt, completions = examples.preference_ids(tokenizer, row)
    response = {"role": "assistant", "content": row["completions"][index]}
    return {
        "messages": [*messages_of(tokenizer, prompt), response],
        "prompt_tokens": prompt,
        "response_tokens": completions[index],
        "score": float(row["scores"][index]),
    }


def messages_of(tokenizer: Tokenizer, prompt: list[int]) -> list[chat.Message]:
    """Returns the turns with text of a rendered prompt; ids without markers are one user turn."""
    messages = tokenizer.template.messages(prompt)
    return [message for message in messages if message["content"].strip()]


def _selection_metrics(
    selected: list[dict[str, Any]], before: list[float]
) -> dict[str, float]:
    """Returns the metrics of selected rows, and of the scores of all responses before."""
    lengths = [len(row["response_tokens"]) for row in selected]
    return {
        "select/rows": float(len(selected)),
        "select/kept": len(selected) / len(before),
        "select/score": float(np.mean([row["score"] for row in selected])),
        "select/score_before": float(np.mean(before)),
        "select/response_length": float(np.mean(lengths)),
    }
