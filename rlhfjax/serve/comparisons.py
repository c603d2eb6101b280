"""Votes for one of two responses, stored as rows that `reward` and `direct` read.

    {"prompt": [messages], "completions": [first, second], "scores": [1.0, 0.0],
     "models": [names], "labeler": "chat page"}

That is the form `preferences` of docs/data.md; `models` is for people.
"""

import threading
from collections.abc import Sequence

from rlhfjax import json_text, paths
from rlhfjax.data.columns import BadRow
from rlhfjax.data.rows import normalize
from rlhfjax.paths import Path
from rlhfjax.serve.fields import ComparisonFields
from rlhfjax.serve.refused import Refused

SCORES = {"first": [1.0, 0.0], "second": [0.0, 1.0], "tie": [0.5, 0.5]}


class Comparisons:
    """A file of JSON lines that votes are appended to, local or in a bucket."""

    def __init__(self, file: Path):
        self.file = file
        paths.make_folder(file.parent)
        self._mirror = paths.Mirror(file.parent, [file.name])
        self._lock, self._stored = threading.Lock(), 0

    def add(self, messages: Sequence[dict[str, str]], vote: ComparisonFields) -> int:
        """Appends a vote; returns the number of votes that this server has stored.

        Args:
          messages: the conversation that both responses answer.
        Raises:
          Refused: the stages could not read the row.
        """
        row = {
            "prompt": list(messages),
            "completions": vote.completions,
            "scores": SCORES[vote.preferred],
            "models": vote.models,
            "labeler": vote.labeler,
        }
        _validate(row)
        line = json_text.encode(row, self.file) + "\n"
        with self._lock:
            local = self._mirror.folder / self.file.name
            with open(local, "a", encoding="utf-8") as lines:
                lines.write(line)
            self._mirror.sync()
            self._stored += 1
            return self._stored


def _validate(row: dict) -> None:
    """Raises Refused if a row is none of the kind `preferences`."""
    try:
        normalize("preferences", row, {})
    except BadRow as error:
        raise Refused(400, str(error)) from None
