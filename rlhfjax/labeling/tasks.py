"""The five tasks: what an item holds, what a labeler sees of it, and what a label must be.

task          content                                      label, as it is stored
demonstrate   prompt, or nothing with both_sides           {"messages": [the whole conversation]}
rank          prompt, responses (K)                        {"ranks", "ratings", "flags"}, K of each
compare       prompt, responses (2)                        {"ranks"}
edit          prompt, response                             {"text"}
feedback      prompt, response, pieces, seconds_per_token  {"feedback": [[seconds, value], …]}

Responses are shown in an order that is drawn per labeler; a label is stored in the item's order.
Ranks count from 1, the best; equal ranks are ties. Ratings go from 1 to 7, or are null.

Source: Ouyang et al. 2022, section 3.4 and appendix B (ranking, the 1 to 7 scale, flags); Knox &
Stone 2009 (feedback in time).
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhfjax.data import chat

DEMONSTRATE, RANK, COMPARE, EDIT, FEEDBACK = TASKS = (
    "demonstrate",
    "rank",
    "compare",
    "edit",
    "feedback",
)
RANKED = (RANK, COMPARE)

FLAGS = {
    "fails_instruction": "Fails to follow the instruction",
    "hallucination": "States something false or made up",
    "harmful": "Gives harmful advice",
    "violent_or_sexual": "Violent or sexual content",
    "denigrates": "Denigrates a protected group",
    "not_an_assistant": "Inappropriate for an assistant",
}
"""Flags of a response, each a separate column; after Ouyang et al. 2022, table 3."""

REASONS = {
    "unclear": "The prompt is unclear",
    "no_knowledge": "I do not know enough about it",
    "language": "I do not know the language",
    "distressing": "I would rather not see this",
    "other": "Another reason",
}
"""Reasons to skip an item."""

HIGHEST_RATING = 7
MOST_RESPONSES = 9  # K of the largest ranking (InstructGPT: 4 to 9)
MOST_CHARACTERS = 100_000  # of a text that a labeler writes
MOST_TURNS = 100
MOST_FEEDBACK = 10_000  # pieces of feedback about one response
AFTER_SECONDS = 60.0  # for which feedback may follow the last token
MOST_SECONDS = 24 * 60 * 60.0


class Invalid(ValueError):
    """Why a label is none; the message is for the labeler."""


def messages_of(prompt: Any) -> list[chat.Message]:
    """Returns a prompt as turns: messages, a text with chat markers, or one user turn."""
    if not isinstance(prompt, str):
        return [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    turns = chat.turns_of(prompt)
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns = turns[:-1]  # the marker after which the response begins
    turns = [turn for turn in turns if turn["role"] or turn["content"].strip()]
    return [
        {"role": turn["role"] or "user", "content": turn["content"]} for turn in turns
    ]


def order_for(item: str, who: str, count: int) -> list[int]:
    """Returns the order in which a labeler sees responses, the same one each time."""
    digest = hashlib.sha256(f"{item} {who}".encode()).digest()
    seed = int.from_bytes(digest[:8], "big")
    return np.random.default_rng(seed).permutation(count).tolist()


def shown(task: str, content: dict[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """Returns what the page gets of an item: texts alone, responses in the given order."""
    page: dict[str, Any] = {
        "task": task,
        "prompt": messages_of(content.get("prompt", [])),
    }
    if task == DEMONSTRATE:
        page["both_sides"] = bool(content.get("both_sides"))
    elif task in RANKED:
        page["responses"] = [content["responses"][i] for i in order]
    elif task == EDIT:
        page["response"] = content["response"]
    else:
        page["pieces"] = content["pieces"]
        page["seconds_per_token"] = content["seconds_per_token"]
    return page


def stored(
    task: str, content: dict[str, Any], order: Sequence[int], given: Any
) -> dict[str, Any]:
    """Returns a label as it is stored, given what the page sent.

    Raises:
      Invalid: it is no label of this task.
    """
    if not isinstance(given, dict):
        raise Invalid("a label must be an object")
    return _STORED[task](content, order, given)


def as_shown(task: str, order: Sequence[int], value: Any) -> Any:
    """Returns a stored label in the order of the page, the inverse of `stored`."""
    if task not in RANKED:
        return value
    return {name: [column[i] for i in order] for name, column in value.items()}


# ------------------------------------------------------------------ one function per task


def _demonstration(
    content: dict[str, Any], order: Sequence[int], given: dict[str, Any]
) -> dict[str, Any]:
    prompt = messages_of(content.get("prompt", []))
    if not content.get("both_sides"):
        text = _text(given, "text")
        return {"messages": [*prompt, {"role": "assistant", "content": text}]}
    turns = given.get("messages")
    if not isinstance(turns, list) or not 2 <= len(turns) <= MOST_TURNS:
        raise Invalid(f"a conversation has 2 to {MOST_TURNS} turns")
    written = []
    for i, turn in enumerate(turns):
        role = "assistant" if i % 2 else "user"
        if not isinstance(turn, dict) or turn.get("role") != role:
            raise Invalid(f"turn {i + 1} must be the {role}'s")
        written.append({"role": role, "content": _text(turn, "content")})
    if len(written) % 2:
        raise Invalid("the last turn must be the assistant's")
    system = [turn for turn in prompt if turn["role"] == "system"]
    return {"messages": [*system, *written]}


def _ranking(
    content: dict[str, Any], order: Sequence[int], given: dict[str, Any]
) -> dict[str, Any]:
    count = len(content["responses"])
    no_flags: list[list[str]] = [[] for _ in range(count)]
    columns = {
        "ranks": _column(given, "ranks", count, _is_rank),
        "ratings": _column(given, "ratings", count, _is_rating, [None] * count),
        "flags": _column(given, "flags", count, _are_flags, no_flags),
    }
    return {name: _in_item_order(column, order) for name, column in columns.items()}


def _comparison(
    content: dict[str, Any], order: Sequence[int], given: dict[str, Any]
) -> dict[str, Any]:
    ranks = _column(given, "ranks", len(content["responses"]), _is_rank)
    return {"ranks": _in_item_order(ranks, order)}


def _edit(
    content: dict[str, Any], order: Sequence[int], given: dict[str, Any]
) -> dict[str, Any]:
    text = _text(given, "text")
    if text == content["response"]:
        raise Invalid("nothing was changed; skip a response that needs no change")
    return {"text": text}


def _timed_feedback(
    content: dict[str, Any], order: Sequence[int], given: dict[str, Any]
) -> dict[str, Any]:
    pairs = given.get("feedback")
    if not isinstance(pairs, list) or not 1 <= len(pairs) <= MOST_FEEDBACK:
        raise Invalid("press + or − at least once while the response appears")
    last = len(content["pieces"]) * content["seconds_per_token"] + AFTER_SECONDS
    for pair in pairs:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(map(_is_number, pair))
        ):
            raise Invalid("feedback must be pairs of seconds and a value")
        if not 0 <= pair[0] <= last or pair[1] not in (-1, 1):
            raise Invalid(f"feedback must be +1 or -1, from 0 to {last:g} seconds")
    return {"feedback": sorted([float(at), float(value)] for at, value in pairs)}


_STORED: dict[str, Callable[[dict, Sequence[int], dict], dict[str, Any]]] = {
    DEMONSTRATE: _demonstration,
    RANK: _ranking,
    COMPARE: _comparison,
    EDIT: _edit,
    FEEDBACK: _timed_feedback,
}


# ------------------------------------------------------------------ parts of a label


def _in_item_order(column: Sequence[Any], order: Sequence[int]) -> list[Any]:
    """Returns values of the shown responses, in the order of the item."""
    placed: list[Any] = [None] * len(order)
    for value, i in zip(column, order, strict=True):
        placed[i] = value
    return placed


def _column(
    given: dict[str, Any],
    name: str,
    count: int,
    is_valid: Callable[[Any, int], bool],
    default: list[Any] | None = None,
) -> list[Any]:
    """Returns one value per response. Raises Invalid."""
    column = given.get(name, default)
    if not isinstance(column, list) or len(column) != count:
        raise Invalid(f"{name}: one is needed for each of the {count} responses")
    if not all(is_valid(value, count) for value in column):
        raise Invalid(f"{name}: a value is missing, or is none that can be given")
    return column


def _is_rank(value: Any, count: int) -> bool:
    return type(value) is int and 1 <= value <= count


def _is_rating(value: Any, count: int) -> bool:
    return value is None or (type(value) is int and 1 <= value <= HIGHEST_RATING)


def _are_flags(value: Any, count: int) -> bool:
    if not isinstance(value, list) or len(value) > len(FLAGS):
        return False
    return all(isinstance(flag, str) and flag in FLAGS for flag in value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _text(given: dict[str, Any], name: str) -> str:
    """Returns a text that a labeler wrote. Raises Invalid."""
    text = given.get(name)
    if not isinstance(text, str) or not text.strip():
        raise Invalid("there is no text yet")
    if len(text) > MOST_CHARACTERS:
        raise Invalid(f"the text has more than {MOST_CHARACTERS} characters")
    return text.strip()


def reason(given: Any) -> dict[str, str]:
    """Returns why an item is skipped, as it is stored. Raises Invalid."""
    given = given if isinstance(given, dict) else {}
    name, note = given.get("reason"), given.get("note", "")
    if name not in REASONS:
        raise Invalid(f"a reason is needed: {', '.join(REASONS)}")
    if not isinstance(note, str) or len(note) > MOST_CHARACTERS:
        raise Invalid(f"the note must be text of at most {MOST_CHARACTERS} characters")
    return {"reason": name, "note": note.strip()}


def seconds(given: Any) -> float:
    """Returns how long a labeler worked, from 0 to a day. Raises Invalid."""
    if not _is_number(given) or given < 0:
        raise Invalid("seconds must be a number from 0")
    return min(float(given), MOST_SECONDS)
