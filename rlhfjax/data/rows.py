"""Rows of four kinds: each is validated and brought into one form, whatever its source looks like.

text         {"text": str}
messages     {"messages": [{"role": str, "content": str}, ...]}, one entry per turn; also
             prompt_tokens and response_tokens if the last turn was sampled: the ids to learn it by
prompt       {"messages": [...]} that ends with a user turn; a plain string is one user turn
preferences  {"prompt": str, "completions": [str] * k, "scores": [float] * k}, k >= 2; also the
             tokens if stored, and the messages if the prompt was a conversation
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhfjax.data import chat
from rlhfjax.errors import ConfigError
from rlhfjax.renamed import row_with_present_names

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")
COLUMNS = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt": ("prompt",),
    "preferences": ("prompt", "completions", "scores"),
}
PAIR = ("prompt", "chosen", "rejected")
# Columns that are kept if they are there.
_STORED = {
    "preferences": (
        "prompt_tokens",
        "completion_tokens",
        "tokens",
        "token_counts",
        "ranks",
        "labeler",
    ),
    "messages": ("prompt_tokens", "response_tokens"),
}


class BadRow(Exception):
    """Why a row cannot be used; the source adds where the row stands."""


def split_of(key: str | bytes, validation: float = 0.05, test: float = 0.05) -> str:
    """Returns the split of a document from a hash of its key, the same on every machine."""
    digest = hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < test:
        return "test"
    return "validation" if share < test + validation else "train"


def split_key(kind: str, row: Row) -> str:
    """Returns the text that decides a row's split: all of a text, the opening of a conversation.

    Rows with equal keys are in one split: equal documents, equal prompts, and prompts that are
    prefixes of one conversation. A preference row's prompt that is plain text is one user turn.
    """
    if kind == "text":
        return row["text"]
    return opening(row["messages"]) if "messages" in row else row["prompt"]


def opening(messages: Sequence[chat.Message]) -> str:
    """Returns the first user turn of a conversation, or its first turn if there is no user."""
    users = (turn for turn in messages if turn["role"] == "user")
    return next(users, messages[0])["content"]


def validate_kind(kind: str, columns: Mapping[str, str]) -> None:
    """Raises ConfigError for an unknown kind, or for an empty column name."""
    if kind not in COLUMNS:
        raise ConfigError(f"source: kind {kind!r} is none of {', '.join(COLUMNS)}")
    for name, column in columns.items():
        if not isinstance(column, str) or not column:
            raise ConfigError(
                f"source: columns[{name!r}] must be the name of a column, got {column!r}"
            )


def required_columns(kind: str, columns: Mapping[str, str]) -> list[str]:
    """Returns the columns that a source must have, by the source's names."""
    pair = kind == "preferences" and "chosen" in columns
    own = PAIR if pair else COLUMNS[kind]
    extra = [name for name in columns if name not in own]
    return [columns.get(name, name) for name in (*own, *extra)]


def normalize(kind: str, raw: Mapping[str, Any], columns: Mapping[str, str]) -> Row:
    """Returns one row in the form of its kind.

    Args:
      columns: our column names to the source's. Columns beyond the kind's own are passed through.
    Raises:
      BadRow: a column is missing, of the wrong type or empty.
    """
    raw = row_with_present_names(raw)
    for name in required_columns(kind, columns):
        if name not in raw:
            found = ", ".join(map(str, raw)) or "none"
            raise BadRow(f"no column {name!r}, found {found}")
    row = {name: _plain(raw[column]) for name, column in columns.items()}
    for name in (*COLUMNS[kind], *_STORED.get(kind, ())):
        if name not in row and name in raw:
            row[name] = _plain(raw[name])
    return _NORMALIZERS[kind](row)


def _normalize_text(row: Row) -> Row:
    return row | {"text": _string(row["text"], "text")}


def _normalize_messages(row: Row) -> Row:
    messages = _turns(_parsed(row["messages"], "messages"), "messages")
    _validate_together(row, "prompt_tokens", "response_tokens")
    tokens = {
        name: _ids(row[name], name) for name in _STORED["messages"] if name in row
    }
    return row | {"messages": messages} | tokens


def _normalize_prompt(row: Row) -> Row:
    turns = _prompt_turns(row.pop("prompt"))
    if turns[-1]["role"] != "user":
        raise BadRow(f"prompt must end with a user turn, ends with {turns[-1]['role']}")
    return row | {"messages": turns}


def _prompt_turns(value: Any) -> list[chat.Message]:
    """Returns a conversation, given as such or as JSON; any other text is one user turn."""
    if isinstance(value, str):
        # Text may well begin with a bracket.
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = None
        messages = parsed if isinstance(parsed, list) else []
        if messages and all(isinstance(message, dict) for message in messages):
            value = messages
        else:
            value = [{"role": "user", "content": _string(value, "prompt")}]
    return _turns(value, "prompt")


def _normalize_preferences(row: Row) -> Row:
    if "chosen" in row:
        row["completions"] = [row.pop("chosen"), row.pop("rejected")]
        row["scores"] = [1.0, 0.0]
    completions = [
        _string(text, "completions", empty=True)
        for text in _list(row["completions"], "completions")
    ]
    scores = [_number(score) for score in _list(row["scores"], "scores")]
    if len(completions) < 2:
        raise BadRow(f"a prompt needs at least 2 completions, got {len(completions)}")
    if len(scores) != len(completions):
        raise BadRow(f"{len(completions)} completions but {len(scores)} scores")
    if not isinstance(row["prompt"], str):
        row["messages"] = _normalize_prompt(dict(row))["messages"]
        row["prompt"] = chat.to_text(row["messages"])
    row["prompt"] = _string(row["prompt"], "prompt")
    row["completions"] = completions
    row["scores"] = scores
    return row | _stored_tokens(row, len(completions))


def _stored_tokens(row: Row, k: int) -> Row:
    """Returns the stored ids of the prompt and of each completion; nothing if none are stored."""
    if "token_counts" in row:  # how ArrayRecord holds lists of unequal length
        ends = np.cumsum(row.pop("token_counts"))
        row["completion_tokens"] = np.split(np.asarray(row.pop("tokens")), ends[:-1])
    _validate_together(row, "prompt_tokens", "completion_tokens")
    if "prompt_tokens" not in row:
        return {}
    completions = [
        _ids(ids, "completion_tokens")
        for ids in _list(row["completion_tokens"], "completion_tokens")
    ]
    if len(completions) != k:
        raise BadRow(f"{k} completions but {len(completions)} completion_tokens")
    prompt = _ids(row["prompt_tokens"], "prompt_tokens")
    return {"prompt_tokens": prompt, "completion_tokens": completions}


def _validate_together(row: Row, first: str, second: str) -> None:
    if (first in row) != (second in row):
        raise BadRow(f"{first} and {second} go together, found one alone")


def _parsed(value: Any, column: str) -> Any:
    """Returns the value of a column that may be JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise BadRow(
            f"column {column!r} is neither a list of messages nor its JSON ({error.msg})"
        ) from error


def _turns(value: Any, column: str) -> list[chat.Message]:
    """Returns the turns of a conversation, given as a list of messages or as two lists."""
    if _is_message(value):  # TFDS reads a sequence of dicts as a dict of sequences
        roles = _list(value["role"], column)
        contents = _list(value["content"], column)
        value = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=True)
        ]
    turns = [_message(message, column) for message in _list(value, column)]
    if not turns:
        raise BadRow(f"column {column!r} has no messages")
    return chat.merge_turns(turns)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and {"role", "content"} <= set(value)


def _message(value: Any, column: str) -> chat.Message:
    if not _is_message(value):
        raise BadRow(
            f"column {column!r}: a message needs 'role' and 'content', got {str(value)[:60]!r}"
        )
    role = _string(value["role"], "role")
    if role not in chat.ROLES:
        raise BadRow(
            f"column {column!r}: role {role!r} is none of {', '.join(chat.ROLES)}"
        )
    return {"role": role, "content": _string(value["content"], "content")}


def _plain(value: Any) -> Any:
    """Returns text where TFDS has bytes, and any other value as it is."""
    if not isinstance(value, bytes | np.bytes_):
        return value
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"invalid UTF-8 at byte {error.start}") from error


def _string(value: Any, column: str, empty: bool = False) -> str:
    value = _plain(value)
    if not isinstance(value, str):
        raise BadRow(f"column {column!r} must be text, got {type(value).__name__}")
    if not empty and not value.strip():
        raise BadRow(f"column {column!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise BadRow(
            f"column {column!r} has a lone surrogate at character {error.start}"
        ) from error
    return value


def _list(value: Any, column: str) -> list:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
        raise BadRow(f"column {column!r} must be a list, got {type(value).__name__}")
    return list(value)


def _number(value: Any) -> float:
    numeric = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not numeric or not math.isfinite(value):
        raise BadRow(f"column 'scores' must hold finite numbers, got {value!r}")
    return float(value)


def _ids(value: Any, column: str) -> np.ndarray:
    array = np.asarray(value if hasattr(value, "__len__") else None)
    if array.size and (
        array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0
    ):
        raise BadRow(f"column {column!r} must hold non-negative integers")
    return array.astype(np.int32).reshape(-1)


_NORMALIZERS: dict[str, Callable[[Row], Row]] = {
    "text": _normalize_text,
    "messages": _normalize_messages,
    "prompt": _normalize_prompt,
    "preferences": _normalize_preferences,
}
