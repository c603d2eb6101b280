"""Which item a labeler is shown next.

In this order: what is open, what was just undone, the screening test, a calibration item where one
is due, then work: the item of the highest priority that this labeler has not seen and that still
needs labels. An item that others were shown lately counts as labeled by them. An item is thus
labeled by `overlap` labelers before the next one begins, and nobody waits for anybody.
"""

import hashlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import sqlalchemy as sa

from rlhfjax.labeling import agreement, tasks
from rlhfjax.labeling.store import Item, Refused, Store, insert_event
from rlhfjax.labeling.tables import (
    CALIBRATION,
    SCREENING,
    SHOW,
    SUBMIT,
    UNDO,
    WORK,
    events,
    items,
    labels,
    open_items,
)

RESERVED_SECONDS = 30 * 60.0
"""For which what a labeler was shown is not given to others."""

WAITING, FINISHED, NOT_ADMITTED = "waiting", "finished", "not_admitted"


class Rules(NamedTuple):
    """How labelers are chosen and checked."""

    screening_agreement: float = 0.7
    """Share of the screening test's pairs that a labeler must rank as they are known."""
    calibration_every: int = 20
    """Labels of work between two calibration items; 0: none."""
    count: int = 0
    """Labels of work after which nothing begins; 0: until every item has its labels."""


class Showing(NamedTuple):
    """An item on a labeler's screen."""

    event: int
    item: str
    kind: str
    task: str
    content: dict[str, Any]
    order: list[int]  # of responses
    before: Any = None  # the label that was undone, in the item's order


def next_item(store: Store, who: str, rules: Rules) -> Showing | str:
    """Returns what a labeler is shown next, or why there is nothing.

    Returns:
      a Showing, which is an event of the store; "not_admitted" after a screening test that was
      not passed; "finished" if the collection is complete; "waiting" if others have what is left.
    """
    with store.writing() as connection:
        if opened := _opened(connection, who):
            return opened
        if is_complete(store, rules):
            return FINISHED
        if undone := _undone(connection, who):
            return _show(connection, who, *undone)
        item = _unseen(connection, who, SCREENING)
        if item is None and not is_admitted(store, who, rules):
            return NOT_ADMITTED
        if item is None and _is_calibration_due(connection, who, rules):
            item = _unseen(connection, who, CALIBRATION)
        item = item or _unseen(connection, who, WORK)
        if item is not None:
            return _show(connection, who, item)
    return WAITING


def shown_as(store: Store, who: str, event: int) -> tuple[Item, list[int]]:
    """Returns the item that a labeler was shown by an event, and the order of its responses.

    Raises:
      Refused: nothing was shown to this labeler by that event.
    """
    wanted = sa.select(items.c.task, items.c.content, items.c.kind, events.c.value)
    wanted = wanted.join_from(events, items, items.c.id == events.c.item)
    wanted = wanted.where(
        events.c.id == event, events.c.who == who, events.c.action == SHOW
    )
    with store.reading() as connection:
        row = connection.execute(wanted).first()
    if row is None:
        raise Refused(f"nothing was shown to you under the number {event}")
    return Item(row.task, row.content, row.kind), row.value["order"]


def wanted(store: Store, rules: Rules) -> int:
    """Returns the number of labels that end the collection; a count of 0 takes all there are."""
    if rules.count > 0:
        return rules.count
    return store.label_count() + left(store)


def is_complete(store: Store, rules: Rules) -> bool:
    """Returns whether there are enough labels, or the organizer has ended the collection."""
    if store.is_finished():
        return True
    enough = store.label_count() >= wanted(store, rules)
    return enough and store.item_count() > 0


def is_admitted(store: Store, who: str, rules: Rules) -> bool:
    """Returns whether a labeler has passed the screening test, or there is none."""
    if not store.item_count(SCREENING):
        return True
    own = store.labels(who=who, kinds=(SCREENING,))
    agreements, pairs = agreement.with_known(own)
    if len(own) < store.item_count(SCREENING):
        return False
    return agreements >= rules.screening_agreement * pairs


def left(store: Store) -> int:
    """Returns the number of labels of work that are still needed."""
    missing = items.c.overlap - _submitted()
    wanted = sa.select(sa.func.sum(sa.func.max(missing, 0))).where(items.c.kind == WORK)
    with store.reading() as connection:
        return int(connection.scalar(wanted) or 0)


# ------------------------------------------------------------------ priorities


def priorities(ids: Sequence[str], seed: int) -> list[float]:
    """Returns a number in [0, 1) per item: a random order, the same for all labelers."""
    digests = (hashlib.sha256(f"{seed} {item}".encode()).digest() for item in ids)
    return [int.from_bytes(digest[:6], "big") / 2**48 for digest in digests]


def disagreement(rewards: np.ndarray) -> float:
    """Returns how much the members of an ensemble disagree about the order of k responses.

    mean over pairs i < j of std_m (r_mi - r_mj)

    A constant that a member adds to all its rewards does not count.

    Args:
      rewards: [m, k].

    Source: Christiano et al. 2017, section 2.2.4 (queries with the highest variance over the
    ensemble).
    """
    i, j = np.triu_indices(rewards.shape[1], k=1)
    margins = rewards[:, i].astype(np.float64) - rewards[:, j]
    return float(margins.std(axis=0).mean())


def in_turn(new: Sequence[Item], overlap: int, share: float, seed: int) -> list[Item]:
    """Returns the items with an overlap: a random `share` of them with more than one labeler."""
    draws = priorities([item.id for item in new], seed + 1)
    pairs = zip(new, draws, strict=True)
    return [item._replace(overlap=overlap if x < share else 1) for item, x in pairs]


# ------------------------------------------------------------------ parts of `next_item`


def _opened(connection: sa.Connection, who: str) -> Showing | None:
    """Returns what the labeler was shown and has not finished."""
    wanted = sa.select(open_items.c.id, open_items.c.item, open_items.c.value)
    wanted = wanted.where(open_items.c.who == who).order_by(open_items.c.id.desc())
    row = connection.execute(wanted.limit(1)).first()
    if row is None:
        return None
    item = _item(connection, row.item)
    return _showing(row.id, item, row.value["order"], row.value.get("before"))


def _undone(connection: sa.Connection, who: str) -> tuple[sa.Row, Any] | None:
    """Returns the item whose label was the last thing that the labeler undid, and that label."""
    last = sa.select(events).where(events.c.who == who).order_by(events.c.id.desc())
    row = connection.execute(last.limit(1)).first()
    if row is None or row.action != UNDO:
        return None
    label = connection.execute(sa.select(events).where(events.c.id == row.about)).one()
    before = label.value if label.action == SUBMIT else None
    return _item(connection, row.item), before


def _unseen(connection: sa.Connection, who: str, kind: str) -> sa.Row | None:
    """Returns the next item of a kind that the labeler has neither labeled nor skipped."""
    own = sa.exists().where(labels.c.item == items.c.id, labels.c.who == who)
    wanted = sa.select(items).where(items.c.kind == kind, ~own)
    if kind == WORK:
        wanted = wanted.where(_submitted() + _reserved(who) < items.c.overlap)
    wanted = wanted.order_by(items.c.priority.desc(), items.c.position)
    return connection.execute(wanted.limit(1)).first()


def _submitted() -> Any:
    """Returns the number of labels of an item, as SQL."""
    counted = sa.select(sa.func.count()).select_from(labels)
    counted = counted.where(labels.c.item == items.c.id, labels.c.action == SUBMIT)
    return counted.scalar_subquery()


def _reserved(who: str) -> Any:
    """Returns the number of others who were shown an item lately and work on it, as SQL."""
    since = time.time() - RESERVED_SECONDS
    counted = sa.select(sa.func.count(open_items.c.who.distinct()))
    counted = counted.where(
        open_items.c.item == items.c.id,
        open_items.c.who != who,
        open_items.c.at > since,
    )
    return counted.scalar_subquery()


def _is_calibration_due(connection: sa.Connection, who: str, rules: Rules) -> bool:
    if not rules.calibration_every:
        return False
    counted = sa.select(items.c.kind, sa.func.count())
    counted = counted.join_from(labels, items, items.c.id == labels.c.item)
    counted = counted.where(labels.c.who == who).group_by(items.c.kind)
    counts = dict(connection.execute(counted).tuples().all())
    done = counts.get(CALIBRATION, 0) + 1
    return counts.get(WORK, 0) >= rules.calibration_every * done


def _item(connection: sa.Connection, item: str) -> sa.Row:
    return connection.execute(sa.select(items).where(items.c.id == item)).one()


def _show(
    connection: sa.Connection, who: str, item: sa.Row, before: Any = None
) -> Showing:
    """Appends that the labeler is shown an item."""
    count = len(item.content.get("responses", ()))
    order = tasks.order_for(item.id, who, count)
    value = {"order": order}
    if before is not None:
        value["before"] = before
    event = insert_event(connection, who, action=SHOW, item=item.id, value=value)
    return _showing(event, item, order, before)


def _showing(event: int, item: sa.Row, order: list[int], before: Any) -> Showing:
    return Showing(
        event=event,
        item=item.id,
        kind=item.kind,
        task=item.task,
        content=item.content,
        order=order,
        before=before,
    )
