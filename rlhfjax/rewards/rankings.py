"""People's rankings as JSON lines, one a line:

    {"prompt": "…", "completions": ["…", "…", "…"], "ranking": [2, 1, 2], "labeler": "a", "time": "2025-03-01T10:00"}

`ranking[i]` is the rank of completion i: 1 is the best, completions of one rank are tied. `prompt` is text (one user
turn) or a list of messages. `labeler` and `time` (ISO 8601) may be left out.
"""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhfjax import paths
from rlhfjax.data import chat
from rlhfjax.data.preferences import ranks_of
from rlhfjax.errors import DataError
from rlhfjax.jsonl import located_rows, write_jsonl
from rlhfjax.paths import Path
from rlhfjax.renamed import row_with_present_names

Prompt = str | list[chat.Message]


class Ranking(NamedTuple):
    """One labeler's ranking of one prompt's completions."""

    prompt: Prompt
    completions: tuple[str, ...]
    ranks: tuple[int, ...]  # 1 is the best; equal ranks are ties
    labeler: str = ""
    time: str = ""  # ISO 8601

    @property
    def scores(self) -> list[float]:
        """Higher is better: minus the rank."""
        return [-float(rank) for rank in self.ranks]

    @property
    def key(self) -> str:
        """The same for equal prompts."""
        return (
            self.prompt if isinstance(self.prompt, str) else chat.to_text(self.prompt)
        )


def read_rankings(pattern: str) -> list[Ranking]:
    """Every ranking of the files that match a glob, in order.

    Raises:
      DataError: no file matches, or a line is malformed: `file:line: why`.
    """
    found = paths.glob(pattern)
    if not found:
        raise DataError(f"rankings: no file matches {pattern}")
    rankings = []
    for path in found:
        for place, row in located_rows(path):
            try:
                rankings.append(_parse(row))
            except (ValueError, TypeError) as why:
                raise DataError(f"{place}: {why}") from why
    if not rankings:
        raise DataError(f"rankings: {pattern} holds no ranking")
    return rankings


def write_rankings(path: Path, rankings: Iterable[Ranking]) -> None:
    """Writes rankings as JSON lines, whole or not at all."""
    rows = []
    for one in rankings:
        row = {
            "prompt": one.prompt,
            "completions": list(one.completions),
            "ranking": list(one.ranks),
        }
        row |= {
            name: value for name in ("labeler", "time") if (value := getattr(one, name))
        }
        rows.append(row)
    write_jsonl(path, rows)


def from_row(row: Mapping[str, Any], labeler: str = "") -> Ranking:
    """The ranking in a row of a preference folder (or of its twin in JSON lines)."""
    ranks = (
        [int(rank) for rank in row["ranks"]]
        if "ranks" in row
        else ranks_of([float(x) for x in row["scores"]])
    )
    prompt = row.get("messages") or row["prompt"]
    return Ranking(
        prompt, tuple(row["completions"]), tuple(ranks), row.get("labeler") or labeler
    )


def _parse(row: Mapping[str, Any]) -> Ranking:
    row = row_with_present_names(row)
    if missing := [
        name for name in ("prompt", "completions", "ranking") if name not in row
    ]:
        raise ValueError(f"no {missing[0]!r}, found {', '.join(row) or 'nothing'}")
    completions, ranks = _texts(row["completions"]), row["ranking"]
    if not isinstance(ranks, list) or any(
        type(rank) is not int or rank < 1 for rank in ranks
    ):
        raise ValueError(
            f"'ranking' must be a list of whole numbers from 1, the best; got {ranks!r}"
        )
    if len(ranks) != len(completions) or len(ranks) < 2:
        raise ValueError(
            f"{len(completions)} completions and {len(ranks)} ranks; at least 2, and one each, are needed"
        )
    labeler, time = row.get("labeler", ""), row.get("time", "")
    if not isinstance(labeler, str):
        raise ValueError(f"'labeler' must be text, got {labeler!r}")
    if time:
        datetime.datetime.fromisoformat(time)
    return Ranking(_prompt(row["prompt"]), completions, tuple(ranks), labeler, time)


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or any(
        not isinstance(value, str) for value in values
    ):
        raise ValueError("'completions' must be a list of texts")
    return tuple(values)


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(_is_message(one) for one in value):
        return value
    raise ValueError(
        "'prompt' must be text or a list of messages with 'role' and 'content'"
    )


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") in chat.ROLES
        and isinstance(value.get("content"), str)
        and set(value) == {"role", "content"}
    )


def by_labeler(rankings: Sequence[Ranking]) -> dict[str, list[Ranking]]:
    """Rankings by who made them, in order of first appearance."""
    out: dict[str, list[Ranking]] = {}
    for one in rankings:
        out.setdefault(one.labeler, []).append(one)
    return out
