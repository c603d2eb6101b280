"""Rows of six kinds: each is validated and brought into one shape, whatever its source looks like.

text         {"text": str}
messages     {"messages": [{"role": str, "content": str}, ...]}, one entry per turn; also
             prompt_tokens and response_tokens if the last turn was sampled: the ids to learn it by
prompt       {"messages": [...]} that ends with a user turn; a plain string is one user turn
preferences  {"prompt": str, "completions": [str] * k, "scores": [float] * k}, k >= 2; also the
             tokens if stored, and the messages if the prompt was a conversation
unpaired     {"messages": [...] that ends with a user turn, "response": str, "desirable": bool}
steps        {"messages": [...] that ends with a user turn, "steps": [str] * n,
             "labels": [float] * n}, n >= 1: how good each step of a response is, from -1 to 1

`normalize` reads rows with the columns above; `forms` brings rows of other forms to them.
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhfjax import json_text
from rlhfjax.data import chat
from rlhfjax.data.columns import (
    BadRow,
    as_list,
    flag,
    number,
    plain,
    string,
    whole_numbers,
)
from rlhfjax.data.tools import DEFINITIONS
from rlhfjax.data.turns import parsed, read_definitions, read_turns, with_definitions
from rlhfjax.errors import ConfigError
from rlhfjax.renamed import row_with_present_names

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")
COLUMNS = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt": ("prompt",),
    "preferences": ("prompt", "completions", "scores"),
    "unpaired": ("messages", "response", "desirable"),
    "steps": ("messages", "steps", "labels"),
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
# What a conversation as JSON begins with, and hardly any other text.
_CONVERSATION = re.compile(r'\s*\[\s*\{\s*"(role|content)"\s*:')


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


def optional_columns(kind: str) -> tuple[str, ...]:
    """Returns the columns that are kept where a row has them."""
    return () if kind == "text" else (*_STORED.get(kind, ()), DEFINITIONS)


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
            raise BadRow(f"no column {name!r}, found {names_of(raw)}")
    row = {name: plain(raw[column]) for name, column in columns.items()}
    for name in (*COLUMNS[kind], *optional_columns(kind)):
        if name not in row and name in raw:
            row[name] = plain(raw[name])
    return finish(kind, row)


def finish(kind: str, row: Row) -> Row:
    """Returns a row with the columns of its kind as `normalize` does. Raises BadRow."""
    if kind == "text" or DEFINITIONS not in row:
        return _NORMALIZERS[kind](row)
    definitions = read_definitions(row.pop(DEFINITIONS))
    row = _NORMALIZERS[kind](row)
    return _with_definitions(row, definitions) if definitions else row


def _with_definitions(row: Row, definitions: str) -> Row:
    """Returns a row whose conversation has definitions of tools in its system message."""
    messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    messages = with_definitions(messages, definitions)
    changed: Row = {"messages": messages}
    if "prompt" in row:
        changed["prompt"] = chat.to_text(messages)
    return row | changed


def names_of(raw: Mapping[str, Any]) -> str:
    """Returns the columns of a row for an error message."""
    found = ", ".join(map(str, itertools.islice(raw, 20))) or "none"
    found = found if found.isprintable() else repr(found)
    return found if len(found) <= 200 else f"{found[:200]}…"


def _normalize_text(row: Row) -> Row:
    return row | {"text": string(row["text"], "text")}


def _normalize_messages(row: Row) -> Row:
    messages = read_turns(parsed(row["messages"], "messages"), "messages")
    _validate_together(row, "prompt_tokens", "response_tokens")
    tokens = {
        name: whole_numbers(row[name], name)
        for name in _STORED["messages"]
        if name in row
    }
    return row | {"messages": messages} | tokens


def _normalize_prompt(row: Row) -> Row:
    return row | {"messages": _asked(_prompt_turns(row.pop("prompt")), "prompt")}


def _asked(turns: list[chat.Message], column: str) -> list[chat.Message]:
    """Returns turns that a response can follow."""
    if turns[-1]["role"] != "user":
        raise BadRow(
            f"{column} must end with a user turn, ends with {turns[-1]['role']}"
        )
    return turns


def _prompt_turns(value: Any) -> list[chat.Message]:
    """Returns a conversation, given as such or as JSON; any other text is one user turn."""
    if isinstance(value, str):
        if _CONVERSATION.match(value):
            value = parsed(value, "prompt")
        else:
            value = _messages(value) or [
                {"role": "user", "content": string(value, "prompt")}
            ]
    return read_turns(value, "prompt")


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
    completions = as_list(row["completions"], "completions")
    if not 2 <= len(completions) <= MOST_COMPLETIONS:
        raise BadRow(
            f"a prompt needs at least 2 completions, got {len(completions)}"
            + ("" if len(completions) < 2 else f"; at most {MOST_COMPLETIONS}")
        )
    completions = [string(text, "completions", empty=True) for text in completions]
    scores = [number(score) for score in as_list(row["scores"], "scores")]
    if len(scores) != len(completions):
        raise BadRow(f"{len(completions)} completions but {len(scores)} scores")
    if not isinstance(row["prompt"], str):
        row["messages"] = _normalize_prompt(dict(row))["messages"]
        row["prompt"] = chat.to_text(row["messages"])
    row["prompt"] = string(row["prompt"], "prompt")
    row["completions"] = completions
    row["scores"] = scores
    _validate_ranking(row, len(completions))
    return row | _stored_tokens(row, len(completions))


def _validate_ranking(row: Row, k: int) -> None:
    """Validates the ranks of a row and its labeler, if they are stored."""
    if "ranks" in row:
        ranks = whole_numbers(row["ranks"], "ranks")
        if len(ranks) != k or ranks.min() < 1:
            raise BadRow(
                f"column 'ranks' must hold {k} whole numbers from 1, the best,"
                f" got {json_text.shown(ranks.tolist())}"
            )
    if row.get("labeler") is not None:
        row["labeler"] = string(row["labeler"], "labeler", empty=True)


def _stored_tokens(row: Row, k: int) -> Row:
    """Returns the stored ids of the prompt and of each completion; nothing if none are stored."""
    _validate_together(row, "tokens", "token_counts")
    if "token_counts" in row:  # how ArrayRecord holds lists of unequal length
        counts = whole_numbers(row.pop("token_counts"), "token_counts")
        tokens = whole_numbers(row.pop("tokens"), "tokens")
        ends = np.cumsum(counts, dtype=np.int64)
        total = ends[-1] if len(ends) else 0
        if total != len(tokens):
            raise BadRow(f"token_counts add up to {total} of {len(tokens)} tokens")
        row["completion_tokens"] = np.split(tokens, ends[:-1])
    _validate_together(row, "prompt_tokens", "completion_tokens")
    if "prompt_tokens" not in row:
        return {}
    completions = [
        whole_numbers(tokens, "completion_tokens")
        for tokens in as_list(row["completion_tokens"], "completion_tokens")
    ]
    if len(completions) != k:
        raise BadRow(f"{k} completions but {len(completions)} completion_tokens")
    prompt = whole_numbers(row["prompt_tokens"], "prompt_tokens")
    return {"prompt_tokens": prompt, "completion_tokens": completions}


def _validate_together(row: Row, first: str, second: str) -> None:
    if (first in row) != (second in row):
        raise BadRow(f"{first} and {second} go together, found one alone")


def _normalize_unpaired(row: Row) -> Row:
    return row | {
        "messages": _asked(_prompt_turns(row["messages"]), "messages"),
        "response": string(row["response"], "response", empty=True),
        "desirable": flag(row["desirable"], "desirable"),
    }


def _normalize_steps(row: Row) -> Row:
    steps = [string(step, "steps") for step in as_list(row["steps"], "steps")]
    labels = [_label(label) for label in as_list(row["labels"], "labels")]
    if len(steps) != len(labels) or not steps:
        raise BadRow(
            f"{len(steps)} steps and {len(labels)} labels; expected as many, at least one"
        )
    messages = _asked(_prompt_turns(row["messages"]), "messages")
    return row | {"messages": messages, "steps": steps, "labels": labels}


def _label(value: Any) -> float:
    is_number = isinstance(value, bool | int | float | np.number | np.bool_)
    if not is_number or not -1 <= value <= 1:  # False for NaN too
        raise BadRow(
            "column 'labels' must hold numbers from -1 to 1,"
            f" got {json_text.shown(value)}"
        )
    return float(value)


_NORMALIZERS: dict[str, Callable[[Row], Row]] = {
    "text": _normalize_text,
    "messages": _normalize_messages,
    "prompt": _normalize_prompt,
    "preferences": _normalize_preferences,
    "unpaired": _normalize_unpaired,
    "steps": _normalize_steps,
}
