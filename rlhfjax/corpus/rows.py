"""What filters see of a row: its text, its prompt, its identity and its user."""

from typing import Any, NamedTuple

import numpy as np

from rlhfjax import json_text
from rlhfjax.data import chat
from rlhfjax.data.examples import prompt_of
from rlhfjax.data.rows import Row, split_key, split_of
from rlhfjax.errors import DataError

KINDS = ("text", "messages", "prompt", "preferences", "unpaired", "steps")
USER = "user"  # the column with a user's id
# Columns of responses and of their scores or labels.
_JUDGED = {
    "preferences": ("completions", "scores"),
    "unpaired": ("response", "desirable"),
    "steps": ("steps", "labels"),
}


class Item(NamedTuple):
    """A row as filters see it."""

    text: str  # all that is written in it
    identity: str  # equal for equal rows
    prompt: str  # its turns without system messages; of a conversation, those before a response
    user: str  # "" if the row has none


def item_of(kind: str, row: Row) -> Item:
    """Returns what filters see of a row of one of KINDS."""
    user = str(row[USER]) if row.get(USER) is not None else ""
    if kind == "text":
        return Item(text=row["text"], identity=row["text"], prompt="", user=user)
    messages = prompt_of(row)
    texts = [message["content"] for message in messages]
    identity: list[Any] = messages
    if kind not in ("messages", "prompt"):
        texts += _responses(row)
        identity = [messages, *(row[name] for name in _JUDGED[kind])]
    return Item(
        text="\n".join(texts),
        identity=json_text.encode(identity, "a row"),
        prompt=_prompt(kind, messages),
        user=user,
    )


def _responses(row: Row) -> list[str]:
    """Returns the responses of a row that judges them, in one of them the steps."""
    if "response" in row:
        return [row["response"]]
    return row["completions"] if "completions" in row else row["steps"]


def _prompt(kind: str, messages: list[chat.Message]) -> str:
    """Returns the turns that a prompt is told by; of a conversation, those before a response."""
    turns = [message for message in messages if message["role"] != "system"]
    if kind == "messages":
        roles = [turn["role"] for turn in turns]
        end = roles.index("assistant") if "assistant" in roles else len(turns)
        turns = turns[:end]
    return "\n".join(turn["content"] for turn in turns)


def split_of_row(kind: str, row: Row, validation: float, test: float) -> str:
    """Returns the split of a row: by its user if it has one, else by its text or first user turn.

    Source: Ouyang et al. 2022, section 3.2 (splits by user id).
    """
    user = row.get(USER)
    key = split_key(kind, row) if user is None else f"user {user}"
    return split_of(key, validation=validation, test=test)


def as_json(kind: str, row: Row) -> dict[str, Any]:
    """Returns a row as a source of its kind reads it."""
    plain = {name: _plain(value) for name, value in row.items()}
    if kind in ("prompt", "preferences") and "messages" in plain:
        plain["prompt"] = plain.pop("messages")
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, list):  # the tokens of several completions
        return [_plain(one) for one in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def validate_users(source: Any, spec: str, option: str) -> None:
    """Raises DataError if the first row of a source has no user."""
    if source[0].get(USER) is None:
        raise DataError(
            f"{option}: rows of {json_text.named(spec, 200)} have no column {USER!r};"
            f' columns={{"{USER}": NAME}} of the source names it'
        )
