"""Solutions in steps, as token arrays with a label at the last token of each step.

The text of a solution is its steps joined by a separator. The last token of a step is the one that
completes the separator after it; of the last step it is the response's last token, its eos. The
same rule finds the steps of a sampled response, so that a model is asked where it was trained.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from rlhfjax.data import chat
from rlhfjax.data.batches import StepBatch
from rlhfjax.data.examples import prompt_room
from rlhfjax.data.padding import pad_right
from rlhfjax.data.rows import Row
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import DataError

Neutral = Literal["positive", "negative", "masked"] | None
_RATINGS = {  # (label, weight) of a rating of 0
    "positive": (1.0, 1.0),
    "negative": (0.0, 1.0),
    "masked": (0.0, 0.0),
}


def step_ends(tokenizer: Tokenizer, ids: Sequence[int], separator: str) -> list[int]:
    """Returns the index of the last token of each step of a response, in order.

    Steps are the parts between separators that are not blank. The last one ends with the response.
    """
    if not ids:
        return []
    parts = tokenizer.decode(ids).split(separator)
    spoken = [i for i, part in enumerate(parts) if part.strip()]
    ends = [_completes(tokenizer, ids, separator, i + 1) for i in spoken[:-1]]
    return sorted({*ends, len(ids) - 1})


def _completes(
    tokenizer: Tokenizer, ids: Sequence[int], separator: str, count: int
) -> int:
    """Returns the index of the token that completes the separator with number `count`, from 1."""
    low, high = 0, len(ids) - 1
    # More ids never have fewer separators.
    while low < high:
        middle = (low + high) // 2
        if tokenizer.decode(ids[: middle + 1]).count(separator) >= count:
            high = middle
        else:
            low = middle + 1
    return low


def validate_steps(
    tokenizer: Tokenizer, row: Row, *, separator: str, neutral: Neutral
) -> None:
    """Validates a row of kind steps: the prompt, the separators and the labels.

    Raises:
      DataError: a step contains the separator, a label has no meaning, or the chat template does
        not take the prompt.
    """
    chat.validate_prompt(tokenizer, row["messages"])
    for number, step in enumerate(row["steps"], 1):
        if separator in step:
            raise DataError(
                f"step {number} contains the separator {separator!r}, which ends steps; "
                "expected it between steps alone"
            )
    for label in row["labels"]:
        label_and_weight(label, neutral)


def label_and_weight(label: float, neutral: Neutral) -> tuple[float, float]:
    """Returns the label in [0, 1] that is learned, and whether it counts.

    Args:
      neutral: None: labels are probabilities from 0 to 1. Else they are PRM800K's ratings -1, 0
        and 1, and this is what 0 is: positive, negative, or masked.

    Raises:
      DataError: the label is not one of those.
    """
    if neutral is None:
        if not 0 <= label <= 1:
            raise DataError(
                f"label {label:g}: expected 0 to 1; ratings -1, 0 and 1 need `neutral`"
            )
        return float(label), 1.0
    if label not in (-1, 0, 1):
        raise DataError(f"label {label:g}: with `neutral`, expected -1, 0 or 1")
    return _RATINGS[neutral] if label == 0 else (float(label > 0), 1.0)


def step_example(
    tokenizer: Tokenizer, row: Row, *, length: int, separator: str, neutral: Neutral
) -> StepBatch:
    """Returns a solution as a row of a StepBatch.

    Prompts and solutions that are longer than `length` together are truncated as those of rankings,
    see `examples.prompt_room`. Steps whose end is cut off have no label.

    Raises:
      DataError: the tokenizer's text does not have as many steps as the row.
    """
    prompt = chat.render_prompt(tokenizer, row["messages"]).tolist()
    response = chat.response_tokens(tokenizer, separator.join(row["steps"]))
    ends = step_ends(tokenizer, response, separator)
    if len(ends) != len(row["steps"]):
        raise DataError(
            f"{len(row['steps'])} steps, and their text has {len(ends)} between separators "
            f"{separator!r}; expected a separator that the tokenizer keeps and no step begins or "
            "ends with"
        )
    kept_prompt = chat.shorten_prompt(
        tokenizer, prompt, prompt_room(length, len(response))
    )
    ids = [*kept_prompt, *response][:length]
    (tokens,), (attention_mask,) = pad_right(
        [ids], length=length, pad_id=tokenizer.pad_id
    )
    at_ends, labels, weight = np.zeros((3, length), np.float32)
    for end, label in zip(ends, row["labels"], strict=True):
        position = len(kept_prompt) + end
        if position < length:
            at_ends[position] = 1.0
            labels[position], weight[position] = label_and_weight(label, neutral)
    return StepBatch(
        tokens=tokens,
        attention_mask=attention_mask,
        ends=at_ends,
        labels=labels,
        weight=weight,
        cut=np.float32(len(ids) < len(prompt) + len(response)),
        valid=np.float32(1.0),
    )
