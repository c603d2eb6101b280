"""What the assistant thinks before it answers, `<think>…</think>`, as a part of its message.

Templates such as Qwen3's write the thought of the last response, and leave out those of earlier
ones. `docs/reasoning.md` says how such conversations are trained on.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

MARKS = ("<think>", "</think>")
_OPEN, _CLOSE = MARKS
# A template may open the thought in its generation prompt: then the response has no <think>.
_THOUGHT = re.compile(
    rf"(?P<opening>(?:{_OPEN})?\n*)(?P<thought>.*?)(?P<ending>\n*{_CLOSE}\n*)(?P<answer>.*)",
    re.DOTALL,
)


class Shape(NamedTuple):
    """What decides how a template writes a turn, besides the texts themselves."""

    role: str
    thinks: bool = False  # there is a thought that is not empty
    opening: str = ""  # what stands before the thought, <think> and newlines
    ending: str = ""  # what stands between thought and answer
    extra: str = ""  # JSON of calls of tools, or of a result's name; see `tools`
    empty: bool = False  # it calls tools and says nothing


class Turn(NamedTuple):
    """A message in parts. A thought has no newlines at its ends."""

    shape: Shape
    answer: str
    thought: str = ""


def whole(message: Mapping[str, str]) -> Turn:
    """Returns a message as a turn without a thought, whatever it contains."""
    return Turn(Shape(message["role"]), message["content"])


def split(message: Mapping[str, str]) -> Turn:
    """Returns a message as a turn; that of the assistant has a thought if it has </think>."""
    found = None
    if message["role"] == "assistant":
        found = _THOUGHT.fullmatch(message["content"])
    if found is None:
        return whole(message)
    opening, thought, ending, answer = found.group(
        "opening", "thought", "ending", "answer"
    )
    return Turn(Shape("assistant", bool(thought), opening, ending), answer, thought)


def join(thought: str, answer: str) -> str:
    """Returns the content of a message with a thought, as Qwen3's template writes it."""
    return f"{_OPEN}\n{thought}\n{_CLOSE}\n\n{answer}"
