"""What the rows of a source are: counts, lengths in tokens, what is cut, what is there twice.

Memory holds 8 bytes per row for its hash and 4 for its length, however long the rows are.
"""

import hashlib
from array import array
from collections.abc import Sequence

import numpy as np

from rlhfjax import json_text
from rlhfjax.data import chat, examples
from rlhfjax.data.forms import prompt_in
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.data.turns import merged_in
from rlhfjax.errors import DataError

REASONS = 3
"""Reasons of skipped rows that are kept, the first ones."""
PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
# Columns that a row is compared by; stored tokens and columns beyond the kind's own are not.
_CONTENT = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt": ("messages",),
    "preferences": ("prompt", "completions", "scores"),
    "unpaired": ("messages", "response", "desirable"),
    "steps": ("messages", "steps", "labels"),
}

Part = tuple[list[int], list[float]]
"""Token ids, and the loss mask: 1 where a token is learned or scored."""


class Survey:
    """Counts of a source's rows, collected in one pass.

    Args:
      source: rows that are validated when they are read.
      tokenizer: None: no lengths.
      length: tokens of a training example; 0: nothing is cut.
      limit: rows to read, the first ones; 0: all.
    """

    def __init__(
        self, source: Source, tokenizer: Tokenizer | None, length: int, limit: int = 0
    ):
        self.rows = 0
        self.skipped = 0
        self.reasons: list[str] = []
        self.merged = 0
        self.cut = 0
        self.examples = 0  # of which `cut` lose tokens
        self._lengths = array("I")
        self._hashes = array("Q")
        count = len(source) if limit == 0 else min(limit, len(source))
        for index in range(count):
            try:
                row = source[index]
                if tokenizer is not None:
                    self._measure(tokenizer, source.kind, row, length)
            except DataError as reason:
                self._skip(source.locate(index), str(reason))
                continue
            self.rows += 1
            self.merged += merged_in(row)
            self._hashes.append(content_hash(source.kind, row))

    def _measure(self, tokenizer: Tokenizer, kind: str, row: Row, length: int) -> None:
        parts = encoded(tokenizer, kind, row)
        self._lengths.append(max(len(tokens) for tokens, _ in parts))
        if length:
            cut, total = lost(tokenizer, kind, row, length)
            self.cut += cut
            self.examples += total

    def _skip(self, place: str, reason: str) -> None:
        self.skipped += 1
        if len(self.reasons) < REASONS:
            prefix = f"{place}: "
            self.reasons.append(prefix + reason.removeprefix(prefix))

    @property
    def hashes(self) -> np.ndarray:
        """The distinct hashes of the rows, in order, uint64 [n]."""
        return np.unique(np.array(self._hashes, np.uint64))

    @property
    def duplicates(self) -> int:
        """Rows that are equal to an earlier one."""
        return self.rows - len(self.hashes)

    def percentiles(self) -> list[int]:
        """Returns `PERCENTILES` of the rows' lengths in tokens; [] without a tokenizer."""
        if not self._lengths:
            return []
        lengths = np.array(self._lengths)
        return np.percentile(lengths, PERCENTILES, method="nearest").tolist()


def content_hash(kind: str, row: Row) -> int:
    """Returns a hash of 64 bits of what is in a row, equal for equal rows."""
    content = [row[name] for name in _CONTENT[kind]]
    text = json_text.encode(content, "row", sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def encoded(tokenizer: Tokenizer, kind: str, row: Row) -> list[Part]:
    """Returns the sequences of a row as training has them, each with its loss mask.

    A text is a document, a conversation one sequence, a prompt ends with the generation prompt. A
    row of preferences has a sequence per completion. The steps of a response follow each other.

    Raises:
      DataError: the chat template does not take the row.
    """
    if kind == "text":
        tokens = examples.document(tokenizer, row).tolist()
        return [(tokens, [0.0, *[1.0] * (len(tokens) - 1)])]
    if kind == "messages":
        if "response_tokens" in row:
            parts = row["prompt_tokens"].tolist(), row["response_tokens"].tolist()
            return [_answered(*parts)]
        return [tokenizer.template.render(row["messages"])]
    if kind == "preferences":
        prompt, completions = examples.preference_ids(tokenizer, row)
        return [_answered(prompt, completion) for completion in completions]
    prompt = chat.render_prompt(tokenizer, prompt_in(row)).tolist()
    if kind == "unpaired":
        return [_answered(prompt, chat.response_tokens(tokenizer, row["response"]))]
    if kind == "steps":
        response = "\n".join(row["steps"])
        return [_answered(prompt, chat.response_tokens(tokenizer, response))]
    return [_answered(prompt, [])]


def _answered(prompt: Sequence[int], response: Sequence[int]) -> Part:
    return [*prompt, *response], [0.0] * len(prompt) + [1.0] * len(response)


def lost(tokenizer: Tokenizer, kind: str, row: Row, length: int) -> tuple[int, int]:
    """Returns how many examples of a row lose tokens at a length, and how many there are.

    Conversations are cut as `sft` cuts them, preferences as `reward` and `direct` do. A text loses
    nothing; a longer one is counted because it is split.
    """
    if kind == "messages":
        windows = examples.fine_tuning(tokenizer, row, length)
        return sum(int(window[0, 3]) for window in windows), len(windows)
    parts = encoded(tokenizer, kind, row)
    return sum(len(tokens) > length for tokens, _ in parts), len(parts)


def shared(first: np.ndarray, second: np.ndarray) -> int:
    """Returns how many hashes two splits have in common."""
    return len(np.intersect1d(first, second, assume_unique=True))
