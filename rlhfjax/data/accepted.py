"""Rows that a chat template takes, found when a source is opened and not in the middle of a run.

Rendering a conversation is as cheap as reading it, so every row is rendered once and not encoded.
"""

import logging
from array import array
from collections.abc import Callable, Sequence

from rlhfjax.data import chat, examples
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Concatenated, Source
from rlhfjax.data.template import OURS
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
    known = getattr(source, "accepted_by", None)
    if known is not None and known[0] is tokenizer and known[1] == validate:
        return source
    return Accepted(source, tokenizer, validate)


class Accepted:
    """The rows of a source that a chat template takes, see `accepted`."""

    def __init__(self, source: Source, tokenizer: Tokenizer, validate: Validate):
        self.kind = source.kind
        self.accepted_by = (tokenizer, validate)
        self.skipped = source.skipped
        self._source = source
        self._indices: Sequence[int] = range(len(source))
        reasons: list[str] = []
        indices = array("q")
        for i in range(len(source)):
            row = source[i]
            try:
                validate(tokenizer, row)
            except DataError as error:
                reasons.append(f"{source.locate(i)}: {error}")
                if not leaves_out(source, i):
                    raise DataError(reasons[-1]) from None
            else:
                indices.append(i)
        if not reasons:
            return
        self._indices = indices
        self.skipped += len(reasons)
        if not indices:
            raise DataError(f"no row is left of {len(source)}; {reasons[0]}")
        log.warning(
            "%d rows are left out, which the chat template refuses; %s",
            len(reasons),
            reasons[0],
        )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Row:
        return self._source[self._indices[index]]

    def locate(self, index: int) -> str:
        return self._source.locate(self._indices[index])


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
    """Validates a conversation: whole, and each of its exchanges, which may be a window."""
    if "response_tokens" in row:
        return
    head, exchanges = examples.exchanges_of(row["messages"])
    for exchange in exchanges:
        tokenizer.template.validate([*head, *exchange])
    if len(exchanges) != 1:
        tokenizer.template.validate(row["messages"])


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
