"""Reads and writes people's rankings as JSON lines, one ranking per line:

    {"prompt": "…", "completions": ["…", "…", "…"], "ranking": [2, 1, 2], "labeler": "a",
     "time": "2025-03-01T10:00"}

`ranking[i]` is the rank of completion i: 1 is the best, completions with one rank are tied.
`prompt` is text (one user turn) or a list of messages. `labeler` and `time` (ISO 8601) may be left
out.
"""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhfjax import json_text
from rlhfjax.data import chat
from rlhfjax.data.files import matching
from rlhfjax.data.preferences import ranks_of
from rlhfjax.data.rows import BadRow, normalize
from rlhfjax.errors import DataError
from rlhfjax.jsonl import located_rows, write_jsonl
from rlhfjax.paths import Path
from rlhfjax.renamed import row_with_present_names

Prompt = str | list[chat.Message]
MOST_RANKED = 1000
"""Completions of a ranking; each is compared with each."""


class Ranking(NamedTuple):
    """One labeler's ranking of one prompt's completions."""

    prompt: Prompt
    completions: tuple[str, ...]
    ranks: tuple[int, ...]  # 1 is the best; equal ranks are ties
    labeler: str = ""
    time: str = ""  # ISO 8601

    @property
    def scores(self) -> list[float]:
        """Minus the ranks, so that higher is better."""
        return [-float(rank) for rank in self.ranks]

    @property
    def key(self) -> str:
        """Text that is the same for equal prompts."""
        if isinstance(self.prompt, str):
            return self.prompt
        return chat.to_text(self.prompt)


def read_rankings(pattern: str) -> list[Ranking]:
    """Returns the rankings in the files that match a glob, in order.

    Raises:
      DataError: no file matches, there is no ranking, or a line is malformed: `file:line: why`.
    """
    rankings = []
    for path in matching(pattern, "rankings"):
        for place, row in located_rows(path):
            try:
                rankings.append(_parse(row))
            except (ValueError, BadRow) as error:
                raise DataError(f"{place}: {error}") from None
    if not rankings:
        raise DataError(f"rankings: {pattern} holds no ranking")
    return rankings


def write_rankings(path: Path, rankings: Iterable[Ranking]) -> None:
    """Writes rankings as JSON lines, whole or not at all."""
    rows = []
    for ranking in rankings:
        row = {
            "prompt": ranking.prompt,
            "completions": list(ranking.completions),
            "ranking": list(ranking.ranks),
        }
        if ranking.labeler:
            row["labeler"] = ranking.labeler
        if ranking.time:
            row["time"] = ranking.time
        rows.append(row)
    write_jsonl(path, rows)


def from_row(row: Mapping[str, Any], labeler: str = "") -> Ranking:
    """Returns the ranking in a row of a preference dataset.

    Args:
      labeler: who labeled the row, if the row does not tell.
    """
    if "ranks" in row:
        ranks = [int(rank) for rank in row["ranks"]]
    else:
        ranks = ranks_of([float(score) for score in row["scores"]])
    return Ranking(
        prompt=row.get("messages") or row["prompt"],
        completions=tuple(row["completions"]),
        ranks=tuple(ranks),
        labeler=row.get("labeler") or labeler,
    )


def _parse(row: Mapping[str, Any]) -> Ranking:
    row = row_with_present_names(row)
    for name in ("prompt", "completions", "ranking"):
        if name not in row:
            found = ", ".join(row) or "nothing"
            raise ValueError(f"no {name!r}, found {found:.200}")
    completions, ranks = _texts(row["completions"]), row["ranking"]
    is_list = isinstance(ranks, list)
    if not is_list or any(type(rank) is not int or rank < 1 for rank in ranks):
        raise ValueError(
            "'ranking' must be a list of whole numbers from 1, the best;"
            f" got {json_text.shown(ranks)}"
        )
    if len(ranks) != len(completions) or not 2 <= len(ranks) <= MOST_RANKED:
        raise ValueError(
            f"{len(completions)} completions and {len(ranks)} ranks;"
            f" expected at least 2, at most {MOST_RANKED}, and one rank per completion"
        )
    if max(ranks) > MOST_RANKED:
        raise ValueError(f"'ranking' must hold ranks up to {MOST_RANKED}")
    labeler, time = (_text(row.get(name), name) for name in ("labeler", "time"))
    if time:
        datetime.datetime.fromisoformat(time)
    return Ranking(_prompt(row["prompt"]), completions, tuple(ranks), labeler, time)


def _text(value: Any, name: str) -> str:
    """Returns a text that may be left out."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name!r} must be text, got {json_text.shown(value)}")
    return value or ""


def _texts(values: Any) -> tuple[str, ...]:
    is_list = isinstance(values, list)
    if not is_list or not all(isinstance(value, str) for value in values):
        raise ValueError("'completions' must be a list of texts")
    return tuple(values)


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, list) or not all(map(_is_message, value)):
        raise ValueError(
            "'prompt' must be text or a list of messages with 'role' and 'content'"
        )
    normalize("prompt", {"prompt": value}, {})  # raises for malformed messages
    return value


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"role", "content"}


def by_labeler(rankings: Sequence[Ranking]) -> dict[str, list[Ranking]]:
    """Returns rankings by their labelers, in order of first appearance."""
    grouped: dict[str, list[Ranking]] = {}
    for ranking in rankings:
        grouped.setdefault(ranking.labeler, []).append(ranking)
    return grouped
