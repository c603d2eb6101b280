"""Rows that a chat template takes, found when a source is opened and not in the middle of a run.

Rendering a conversation is as cheap as reading it, so every row is rendered once and not encoded.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhfjax.data import chat, examples, verdicts
from rlhfjax.data.built_in_templates import OURS
from rlhfjax.data.mixture import Mixed
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Concatenated, Source, merged_turns
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import DataError

log = logging.getLogger("rlhfjax")

Validate = Callable[[Tokenizer, Row], None]
"""Renders what a loader renders of a row. Raises DataError."""


def accepted(source: Source, tokenizer: Tokenizer, validate: Validate) -> Source:
    """Returns the rows that the tokenizer's chat template takes.

    Raises:
      DataError: the template refuses a row of a source with on_bad_row="error", or every row.
    """
    if tokenizer.template.source == OURS:  # it takes every row
        return source
    if isinstance(source, Mixed):
        parts = [accepted(part, tokenizer, validate) for part in source.sources]
        return Mixed(parts, source.weights)
    known = getattr(source, "accepted_by", None)
    if known is not None and known[0] is tokenizer and known[1] == validate:
        return source
    return Accepted(source, tokenizer, validate)


class Accepted:
    """The rows of a source that `validate` takes, such as those that a chat template takes."""

    def __init__(self, source: Source, tokenizer: Tokenizer, validate: Validate):
        """Validates every row. Raises as `accepted` does."""
        self.kind = source.kind
        self.accepted_by = (tokenizer, validate)
        self.skipped = source.skipped
        self.merged = merged_turns(source)
        self._source = source
        self._indices: Sequence[int] | np.ndarray = range(len(source))
        is_refused = refusals(source, tokenizer, validate)
        refused = np.flatnonzero(is_refused)
        if not len(refused):
            return
        for i in map(int, refused):
            if not leaves_out(source, i):
                raise DataError(_reason(source, i, tokenizer, validate))
        reason = _reason(source, int(refused[0]), tokenizer, validate)
        self._indices = np.flatnonzero(~is_refused).astype(np.uint32)
        self.skipped += len(refused)
        if not len(self._indices):
            raise DataError(f"no row is left of {len(source)}; {reason}")
        log.warning(
            "%d rows are left out, which cannot be used; %s",
            len(refused),
            reason,
        )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Row:
        return self._source[int(self._indices[index])]

    def locate(self, index: int) -> str:
        return self._source.locate(int(self._indices[index]))

    def of_chosen(
        self, indices: np.ndarray, name: str, dtype: Any, measure: verdicts.Measure
    ) -> np.ndarray:
        """Returns what `verdicts.of_chosen` does."""
        if not isinstance(self._indices, range):
            indices = np.asarray(self._indices)[indices]
        return verdicts.of_chosen(self._source, indices, name, dtype, measure)


def refusals(source: Source, tokenizer: Tokenizer, validate: Validate) -> np.ndarray:
    """Returns for every row whether the template refuses it: bool [rows]."""

    def measure(row: Row) -> int:
        try:
            validate(tokenizer, row)
        except DataError:
            return 1
        return 0

    name = f"{_name_of(validate)} {tokenizer.template.identity}"
    return verdicts.per_row(source, name, np.uint8, measure).astype(bool)


def _name_of(validate: Validate) -> str:
    """Returns what tells a function from others, its bound arguments included."""
    if isinstance(validate, functools.partial):
        return f"{validate.func.__name__} {sorted(validate.keywords.items())}"
    return validate.__name__


def _reason(source: Source, i: int, tokenizer: Tokenizer, validate: Validate) -> str:
    """Returns where a refused row stands, and why it is refused."""
    try:
        validate(tokenizer, source[i])
    except DataError as error:
        return f"{source.locate(i)}: {error}"
    raise DataError(f"{source.locate(i)}: the row has changed")


def leaves_out(source: Source, index: int) -> bool:
    """Returns whether a bad row is left out, or ends the run."""
    if isinstance(source, Concatenated):
        return leaves_out(*source.find(index))
    return getattr(source, "on_bad_row", "error") == "skip"


# ------------------------------------------------------------------ what the loaders render


def validate_document(tokenizer: Tokenizer, row: Row) -> None:
    """Validates a document for pretraining."""
    if "messages" in row:
        tokenizer.template.validate(row["messages"])


def validate_fine_tuning(tokenizer: Tokenizer, row: Row) -> None:
    """Validates a conversation: whole, and each part that may be a window; a document always is."""
    if "response_tokens" in row or "messages" not in row:
        return
    messages = row["messages"]
    if not tokenizer.template.keeps_responses(messages):
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                for kept in chat.without_oldest(messages[: i + 1]):
                    tokenizer.template.validate(kept)
        return
    head, exchanges = examples.exchanges_of(messages)
    for exchange in exchanges:
        tokenizer.template.validate([*head, *exchange])
    if len(exchanges) != 1:
        tokenizer.template.validate(messages)


def validate_prompt(tokenizer: Tokenizer, row: Row) -> None:
    """Validates a prompt: as it is, and with its last turn alone."""
    chat.validate_prompt(tokenizer, row["messages"])


def validate_preference(tokenizer: Tokenizer, row: Row) -> None:
    """Validates the prompt and the completions of a row without stored tokens."""
    if "prompt_tokens" in row:
        return
    chat.validate_prompt(tokenizer, examples.prompt_of(row))
    for text in row["completions"]:
        chat.validate_response(tokenizer, text)


def validate_demonstration(tokenizer: Tokenizer, row: Row) -> None:
    """Validates the last response of a conversation, and its prompt."""
    if found := examples.last_response(row["messages"]):
        prompt, response = found
        chat.validate_prompt(tokenizer, prompt)
        chat.validate_response(tokenizer, response)
