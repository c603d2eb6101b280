"""Writes labels as the rows that training reads; everything is written anew each time.

workdir/rankings.jsonl                           import_rankings, and the dataset preferences/
workdir/demonstrations/{train,validation}.jsonl  sft: rows of kind messages
workdir/feedback/{train,validation}.jsonl        tamer
workdir/skipped.jsonl                            items that were skipped, with the reasons
workdir/events.jsonl                             every action, also what was undone

Rankings have a column `ratings` and one column per flag, with a value per completion. An edited
response is a demonstration, and a ranking of the edit above the response. Items of the screening
test and of calibration are in events.jsonl alone.
"""

import datetime
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from rlhfjax.data.rows import opening, split_of
from rlhfjax.jsonl import write_jsonl
from rlhfjax.labeling import tasks
from rlhfjax.labeling.store import Label, Store
from rlhfjax.labeling.tables import SUBMIT, WORK, events, items
from rlhfjax.labeling.tasks import DEMONSTRATE, EDIT, FEEDBACK, FLAGS, RANKED
from rlhfjax.paths import Path, make_folder

RANKINGS, SKIPPED, EVENTS = "rankings.jsonl", "skipped.jsonl", "events.jsonl"
DEMONSTRATIONS = "demonstrations"
SPLITS = ("train", "validation")
Row = dict[str, Any]


def write(store: Store, workdir: Path, validation: float) -> dict[str, int]:
    """Writes all files of which there are rows; returns the number of rows by kind.

    Args:
      validation: share of the prompts in the validation split.
    """
    labels = store.labels(kinds=(WORK,))
    submitted = [label for label in labels if label.action == SUBMIT]
    rows = {
        "rankings": [*map(ranking_row, submitted)],
        "demonstrations": [*map(demonstration_row, submitted)],
        "feedback": [*map(feedback_row, submitted)],
        "skipped": [skip_row(label) for label in labels if label.action != SUBMIT],
        "events": event_rows(store),
    }
    kept = {name: [row for row in found if row] for name, found in rows.items()}
    _write_whole(workdir / RANKINGS, kept["rankings"])
    _write_whole(workdir / SKIPPED, kept["skipped"])
    _write_whole(workdir / EVENTS, kept["events"])
    for name in (DEMONSTRATIONS, FEEDBACK):
        _write_splits(workdir / name, kept[name], validation)
    return {name: len(found) for name, found in kept.items()}


def ranking_row(label: Label) -> Row | None:
    """Returns a label as a row of rankings.jsonl; None of other tasks."""
    content, value = label.content, label.value
    if label.task == EDIT:
        texts = [value["text"], content["response"]]
        return _row(label, completions=texts, ranking=[1, 2])
    if label.task not in RANKED:
        return None
    row = _row(label, completions=content["responses"], ranking=dense(value["ranks"]))
    row["shown"] = label.shown["order"]
    if "ratings" in value:
        row["ratings"] = value["ratings"]
        for flag in FLAGS:
            row[flag] = [flag in flags for flags in value["flags"]]
    return row


def dense(ranks: Sequence[int]) -> list[int]:
    """Returns ranks from 1 without gaps: 1, 1, 3 becomes 1, 1, 2."""
    distinct = sorted(set(ranks))
    return [distinct.index(rank) + 1 for rank in ranks]


def demonstration_row(label: Label) -> Row | None:
    """Returns a label as a row of kind messages; None of other tasks."""
    if label.task == DEMONSTRATE:
        return {"messages": label.value["messages"], **_origin(label)}
    if label.task == EDIT:
        prompt = tasks.messages_of(label.content["prompt"])
        edited = {"role": "assistant", "content": label.value["text"]}
        return {"messages": [*prompt, edited], **_origin(label)}
    return None


def feedback_row(label: Label) -> Row | None:
    """Returns a label as a row that `tamer` reads; None of other tasks."""
    if label.task != FEEDBACK:
        return None
    content = label.content
    return {
        "prompt": tasks.messages_of(content["prompt"]),
        "response": content["response"],
        "feedback": label.value["feedback"],
        "seconds_per_token": content["seconds_per_token"],
        **_origin(label),
    }


def skip_row(label: Label) -> Row:
    """Returns a skipped item with the reason."""
    return {"task": label.task, "item": label.item, **label.value, **_origin(label)}


def event_rows(store: Store) -> list[Row]:
    """Returns every event, the ones that were undone too, with the kind and task of its item."""
    wanted = sa.select(events, items.c.kind, items.c.task)
    wanted = wanted.join_from(events, items, items.c.id == events.c.item, isouter=True)
    with store.reading() as connection:
        found = connection.execute(wanted.order_by(events.c.id)).mappings()
        return [{**row, "at": iso(row["at"])} for row in found]


def iso(at: float) -> str:
    """Returns a time as ISO 8601 in UTC, in whole seconds."""
    moment = datetime.datetime.fromtimestamp(at, datetime.UTC)
    return moment.isoformat(timespec="seconds")


def _row(label: Label, completions: list[str], ranking: list[int]) -> Row:
    return {
        "prompt": label.content["prompt"],
        "completions": completions,
        "ranking": ranking,
        **_origin(label),
    }


def _origin(label: Label) -> Row:
    """Returns who gave a label, when, and in how many seconds."""
    return {
        "labeler": label.who,
        "time": iso(label.at),
        "seconds": round(label.seconds or 0.0, 1),
    }


def both_splits(
    keyed: Sequence[tuple[str, Row]], validation: float
) -> dict[str, list[Row]]:
    """Returns rows by split; a split without rows gets those of one prompt of the other.

    Args:
      keyed: each row with the text that decides its split, so that equal prompts stay together.
      validation: share of the prompts in validation, by a stable hash.

    Returns:
      {"train": rows, "validation": rows}; {} if all rows are of fewer than two prompts.
    """
    prompts = sorted({key for key, _ in keyed})
    if len(prompts) < 2:
        return {}
    split = {key: split_of(key, validation=validation, test=0.0) for key in prompts}
    for i, name in enumerate(SPLITS):
        if name not in split.values():
            split[prompts[-i]] = name
    return {name: [row for key, row in keyed if split[key] == name] for name in SPLITS}


def _write_splits(folder: Path, rows: list[Row], validation: float) -> None:
    keyed = [(opening(row.get("messages") or row["prompt"]), row) for row in rows]
    splits = both_splits(keyed, validation) or {"train": rows, "validation": []}
    for split, own in splits.items():
        _write_whole(folder / f"{split}.jsonl", own, there=bool(rows))


def _write_whole(path: Path, rows: list[Row], there: bool = False) -> None:
    """Writes a file; without rows only in place of an older one, or if it has to be there."""
    if rows or there or path.exists():
        make_folder(path.parent)
        write_jsonl(path, rows)
