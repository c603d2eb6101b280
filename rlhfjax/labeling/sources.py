"""Items from what `collect` wrote, from JSON lines, from sampled responses, and from prompts.

A row is {"prompt": text or messages, "completions": [texts]}, and where responses were sampled also
their `prompt_tokens` and `completion_tokens`, which the labels keep. A task makes items of it:

    demonstrate   one, of the prompt
    rank          one, of all responses
    compare       one per disjoint pair of responses
    edit          one per response
    feedback      one per response, cut into the tokens of the tokenizer

Responses that are all equal are left out: there is nothing to rank.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhfjax import json_text, paths
from rlhfjax.data import chat
from rlhfjax.data.files import matching
from rlhfjax.data.preferences import read_preferences
from rlhfjax.data.rows import BadRow, normalize
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.jsonl import located_rows
from rlhfjax.labeling import tasks
from rlhfjax.labeling.store import Item
from rlhfjax.labeling.tables import WORK
from rlhfjax.labeling.tasks import COMPARE, DEMONSTRATE, EDIT, MOST_RESPONSES, RANK
from rlhfjax.rewards.rankings import Ranking, read_rankings

Row = Mapping[str, Any]
SPLITS = ("train", "validation")


def items_of(
    row: Row,
    task: str,
    tokenizer: Tokenizer | None = None,
    seconds_per_token: float = 0.25,
) -> list[Item]:
    """Returns the items that a task makes of a row.

    Raises:
      DataError: the row has too few or too many responses for the task.
    """
    prompt = row.get("messages") or row["prompt"]
    if task == DEMONSTRATE:
        return [Item(task, {"prompt": prompt})]
    completions = list(row.get("completions", ()))
    if task in (EDIT, tasks.FEEDBACK):
        if not completions:
            raise DataError("no 'completions'")
        responses = _each(row, prompt, completions)
        if task == EDIT:
            return [Item(task, response) for response in responses]
        if tokenizer is None:
            raise ConfigError(f"label.task={task!r}: it needs label.tokenizer")
        return [
            _timed(response, tokenizer, seconds_per_token) for response in responses
        ]
    return list(_ranked(row, task, prompt, completions))


def _each(row: Row, prompt: Any, completions: list[str]) -> list[dict[str, Any]]:
    """Returns the content of one item per response."""
    contents = []
    for i, text in enumerate(completions):
        content = {"prompt": prompt, "response": text}
        contents.append(content | _sampled(row, [i]))
    return contents


def _sampled(row: Row, group: Sequence[int]) -> dict[str, Any]:
    """Returns what an item keeps of sampled responses: token ids, and the prompt's number."""
    kept: dict[str, Any] = {}
    if "completion_tokens" in row:
        ids = row["completion_tokens"]
        kept["prompt_tokens"] = [int(token) for token in row["prompt_tokens"]]
        kept["completion_tokens"] = [[int(token) for token in ids[i]] for i in group]
    if "row" in row:
        kept["row"] = row["row"]
    return kept


def _timed(
    response: dict[str, Any], tokenizer: Tokenizer, seconds_per_token: float
) -> Item:
    ids = chat.response_tokens(tokenizer, response["response"])
    timing = {"pieces": pieces(tokenizer, ids), "seconds_per_token": seconds_per_token}
    return Item(tasks.FEEDBACK, response | timing)


def _ranked(row: Row, task: str, prompt: Any, completions: list[str]) -> Iterator[Item]:
    count = len(completions)
    if not 2 <= count <= MOST_RESPONSES:
        raise DataError(f"{count} completions: {task} needs 2 to {MOST_RESPONSES}")
    groups = [list(range(count))]
    if task == COMPARE:
        groups = [[i, i + 1] for i in range(0, count - 1, 2)]
    for group in groups:
        content: dict[str, Any] = {"prompt": prompt}
        content["responses"] = [completions[i] for i in group]
        if len(set(content["responses"])) > 1:
            yield Item(task, content | _sampled(row, group))


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Returns the text that each token adds; they join to the text of all.

    A character of several tokens belongs to the last one of them.
    """
    texts = [""]
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        whole = text.rstrip("\ufffd") if end < len(ids) else text
        texts.append(whole if whole.startswith(texts[-1]) else texts[-1])
    pairs = itertools.pairwise(texts)
    return [after[len(before) :] for before, after in pairs]


# ------------------------------------------------------------------ rows


def collected(folder: str) -> Iterator[tuple[str, Row]]:
    """Yields the rows of a folder that `collect` wrote, each with its place for errors."""
    for split in SPLITS:
        source = read_preferences(folder, split)
        for i in range(len(source)):
            yield f"{folder}: {split} row {i}", source[i]


def lines(pattern: str) -> Iterator[tuple[str, Row]]:
    """Yields the rows of JSON lines, each with its place for errors.

    Raises:
      DataError: no file matches, or a row is malformed.
    """
    for path in matching(pattern, "label.items"):
        for place, row in located_rows(paths.path(path)):
            yield place, _checked(row, place)


def _checked(row: dict[str, Any], place: str) -> Row:
    prompt = row.get("prompt", row.get("messages"))
    completions = row.get("completions", [])
    is_list = isinstance(completions, list)
    if not is_list or not all(isinstance(text, str) for text in completions):
        shown = json_text.shown(completions)
        raise DataError(f"{place}: 'completions' must be a list of texts, got {shown}")
    try:
        messages = [{"role": "user", "content": prompt}] if _is_text(prompt) else prompt
        normalize("prompt", {"prompt": messages}, {})
    except BadRow as error:
        raise DataError(f"{place}: {error}") from None
    return {"prompt": prompt, "completions": completions}


def _is_text(prompt: Any) -> bool:
    return isinstance(prompt, str) and bool(prompt.strip())


def known_items(pattern: str, kind: str) -> list[Item]:
    """Returns the items of a screening test or of calibration, from rankings that are right.

    Raises:
      DataError: the files hold no rankings, or one has no or too many completions.
    """
    return [_known(ranking, kind) for ranking in read_rankings(pattern)]


def _known(ranking: Ranking, kind: str) -> Item:
    count = len(ranking.completions)
    if count > MOST_RESPONSES:
        raise DataError(
            f"{kind}: prompt {ranking.key[:60]!r} has {count} completions;"
            f" at most {MOST_RESPONSES} are accepted"
        )
    content = {"prompt": ranking.prompt, "responses": list(ranking.completions)}
    task = COMPARE if count == 2 else RANK
    return Item(task, content, kind, known={"ranks": list(ranking.ranks)})


def located_items(
    rows: Iterator[tuple[str, Row]],
    task: str,
    tokenizer: Tokenizer | None,
    seconds_per_token: float,
) -> list[Item]:
    """Returns the items of all rows. Raises DataError, with the place of the row."""
    found: list[Item] = []
    for place, row in rows:
        try:
            found += items_of(row, task, tokenizer, seconds_per_token)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
    return found


def blank_conversations(count: int) -> list[Item]:
    """Returns items in which a labeler writes both sides of a conversation."""
    return [
        Item(DEMONSTRATE, {"both_sides": True, "number": i}, WORK) for i in range(count)
    ]
