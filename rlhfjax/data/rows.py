"""Rows of four kinds: each is validated and brought into one form, whatever its source looks like.

text         {"text": str}
messages     {"messages": [{"role": str, "content": str}, ...]}, one entry per turn; also
             prompt_tokens and response_tokens if the last turn was sampled: the ids to learn it by
prompt       {"messages": [...]} that ends with a user turn; a plain string is one user turn
preferences  {"prompt": str, "completions": [str] * k, "scores": [float] * k}, k >= 2; also the
             tokens if stored, and the messages if the prompt was a conversation
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhfjax import json_text
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

MOST_COMPLETIONS = 10_000
"""Completions of a prompt; every row of a batch has room for as many as the largest row has."""
_MOST_ID = int(np.iinfo(np.int32).max)
# Types of whole numbers; a bool is none.
_WHOLE = frozenset(
    [int, *(kind for kind in np.sctypeDict.values() if issubclass(kind, np.integer))]
)
_MOST_SCORE = float(np.finfo(np.float32).max)
# What a conversation as JSON begins with, and hardly any other text.
_CONVERSATION = re.compile(r'\s*\[\s*\{\s*"(role|content)"\s*:')


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
    """Raises ConfigError for an unknown kind, or for a senseless name of a column."""
    if kind not in COLUMNS:
        raise ConfigError(f"source: kind {kind!r} is none of {', '.join(COLUMNS)}")
    for name, column in columns.items():
        if not isinstance(name, str) or not name:
            raise ConfigError(f"source: columns: {name!r} must be one of our columns")
        if not isinstance(column, str) or not column:
            raise ConfigError(
                f"source: columns[{name!r}] must be the name of a column, got {column!r}"
            )
    twice = {"completions", "scores"} & set(columns) if "chosen" in columns else set()
    if kind == "preferences" and twice:
        raise ConfigError(
            f"source: columns[{min(twice)!r}] follows from 'chosen' and 'rejected'"
        )
    if kind == "prompt" and "messages" in columns:
        raise ConfigError("source: columns['messages'] follows from 'prompt'")


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
    if not isinstance(raw, Mapping):
        raise BadRow(f"expected columns by name, got {type(raw).__name__}")
    raw = row_with_present_names(raw)
    for name in required_columns(kind, columns):
        if name not in raw:
            raise BadRow(f"no column {name!r}, found {_names(raw)}")
    row = {name: _plain(raw[column]) for name, column in columns.items()}
    for name in (*COLUMNS[kind], *_STORED.get(kind, ())):
        if name not in row and name in raw:
            row[name] = _plain(raw[name])
    return _NORMALIZERS[kind](row)


def _names(raw: Mapping[str, Any]) -> str:
    """Returns the columns of a row for an error message."""
    found = ", ".join(map(str, itertools.islice(raw, 20))) or "none"
    found = found if found.isprintable() else repr(found)
    return found if len(found) <= 200 else f"{found[:200]}…"


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
        if _CONVERSATION.match(value):
            value = _parsed(value, "prompt")
        else:
            value = _messages(value) or [
                {"role": "user", "content": _string(value, "prompt")}
            ]
    return _turns(value, "prompt")


def _messages(text: str) -> list[dict[str, Any]]:
    """Returns the objects of a JSON list; [] for other text, which may begin with a bracket."""
    if not text.lstrip().startswith("["):
        return []
    try:
        parsed = json_text.parse(text)
    except json_text.NotJson:
        return []
    return parsed if all(isinstance(part, dict) for part in parsed) else []


def _normalize_preferences(row: Row) -> Row:
    if "chosen" in row:
        row["completions"] = [row.pop("chosen"), row.pop("rejected")]
        row["scores"] = [1.0, 0.0]
    completions = _list(row["completions"], "completions")
    if not 2 <= len(completions) <= MOST_COMPLETIONS:
        raise BadRow(
            f"a prompt needs at least 2 completions, got {len(completions)}"
            + ("" if len(completions) < 2 else f"; at most {MOST_COMPLETIONS}")
        )
    completions = [_string(text, "completions", empty=True) for text in completions]
    scores = [_number(score) for score in _list(row["scores"], "scores")]
    if len(scores) != len(completions):
        raise BadRow(f"{len(completions)} completions but {len(scores)} scores")
    if not isinstance(row["prompt"], str):
        row["messages"] = _normalize_prompt(dict(row))["messages"]
        row["prompt"] = chat.to_text(row["messages"])
    row["prompt"] = _string(row["prompt"], "prompt")
    row["completions"] = completions
    row["scores"] = scores
    _validate_ranking(row, len(completions))
    return row | _stored_tokens(row, len(completions))


def _validate_ranking(row: Row, k: int) -> None:
    """Validates the ranks of a row and its labeler, if they are stored."""
    if "ranks" in row:
        ranks = _ids(row["ranks"], "ranks")
        if len(ranks) != k or ranks.min() < 1:
            raise BadRow(
                f"column 'ranks' must hold {k} whole numbers from 1, the best,"
                f" got {json_text.shown(ranks.tolist())}"
            )
    if row.get("labeler") is not None:
        row["labeler"] = _string(row["labeler"], "labeler", empty=True)


def _stored_tokens(row: Row, k: int) -> Row:
    """Returns the stored ids of the prompt and of each completion; nothing if none are stored."""
    _validate_together(row, "tokens", "token_counts")
    if "token_counts" in row:  # how ArrayRecord holds lists of unequal length
        counts = _ids(row.pop("token_counts"), "token_counts")
        tokens = _ids(row.pop("tokens"), "tokens")
        ends = np.cumsum(counts, dtype=np.int64)
        total = ends[-1] if len(ends) else 0
        if total != len(tokens):
            raise BadRow(f"token_counts add up to {total} of {len(tokens)} tokens")
        row["completion_tokens"] = np.split(tokens, ends[:-1])
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
        return json_text.parse(value)
    except json_text.NotJson as error:
        raise BadRow(
            f"column {column!r} is neither a list of messages nor its JSON ({error})"
        ) from None


def _turns(value: Any, column: str) -> list[chat.Message]:
    """Returns the turns of a conversation, given as a list of messages or as two lists."""
    if _is_message(value):  # TFDS reads a sequence of dicts as a dict of sequences
        roles = _list(value["role"], column)
        contents = _list(value["content"], column)
        if len(roles) != len(contents):
            raise BadRow(
                f"column {column!r} has {len(roles)} roles for {len(contents)} contents"
            )
        value = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=True)
        ]
    turns = [_message(message, column) for message in _list(value, column)]
    if not turns:
        raise BadRow(f"column {column!r} has no messages")
    return chat.merge_turns(turns)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _message(value: Any, column: str) -> chat.Message:
    if not _is_message(value):
        raise BadRow(
            f"column {column!r}: a message needs 'role' and 'content',"
            f" got {json_text.shown(value)}"
        )
    role = _string(value["role"], "role")
    if role not in chat.ROLES:
        raise BadRow(
            f"column {column!r}: role {json_text.shown(role)} is none of "
            + ", ".join(chat.ROLES)
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
    if type(value) is not str:
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
    is_list = isinstance(value, list | tuple)
    if not is_list and not (isinstance(value, np.ndarray) and value.ndim):
        raise BadRow(f"column {column!r} must be a list, got {type(value).__name__}")
    return list(value)


def _number(value: Any) -> float:
    numeric = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    # False for NaN too.
    if not numeric or not -_MOST_SCORE <= value <= _MOST_SCORE:
        raise BadRow(
            "column 'scores' must hold finite numbers in the range of float32,"
            f" got {json_text.shown(value)}"
        )
    return float(value)


def _ids(value: Any, column: str) -> np.ndarray:
    """Returns whole numbers as int32 [n]."""
    low, high = 0, 0
    if isinstance(value, np.ndarray):
        # NumPy gives an empty list the type of floats.
        whole = value.ndim == 1 and (value.dtype.kind in "iu" or not value.size)
        if whole and value.size:
            low, high = value.min(), value.max()
    else:
        value = _list(value, column)
        whole = _WHOLE.issuperset(map(type, value))
        if whole and value:
            low, high = min(value), max(value)
    if not whole or low < 0 or high > _MOST_ID:
        raise BadRow(
            f"column {column!r} must hold non-negative integers of 32 bits,"
            f" got {json_text.shown(value)}"
        )
    return np.array(value, np.int32)


_NORMALIZERS: dict[str, Callable[[Row], Row]] = {
    "text": _normalize_text,
    "messages": _normalize_messages,
    "prompt": _normalize_prompt,
    "preferences": _normalize_preferences,
}
