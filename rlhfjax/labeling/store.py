"""labels.sqlite: who may label, what is labeled, and every action as an appended event.

A label is kept once the server has answered: SQLite writes its log to the disk before (WAL,
synchronous=FULL). Several threads and processes may use the file together. It needs a local disk.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.dialects import sqlite

from rlhfjax import json_text, paths
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.labeling import tables
from rlhfjax.labeling.tables import (
    FINISH,
    LABELER,
    ORGANIZER,
    SHOW,
    UNDO,
    WORK,
    events,
    items,
    labels,
    people,
)
from rlhfjax.paths import Path

FILE = "labels.sqlite"
BUSY_SECONDS = 30.0  # to wait for another process that writes
LONGEST_NAME = 40  # characters of a pseudonym
PRAGMAS = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    "PRAGMA secure_delete = ON",  # a removed labeler's data is overwritten
)


class Person(NamedTuple):
    """Who has a link to the page."""

    name: str
    role: str
    token: str


class Item(NamedTuple):
    """What labelers are shown. `content` and `known` are JSON values, see `tasks`."""

    task: str
    content: dict[str, Any]
    kind: str = WORK
    known: Any = None
    priority: float = 0.0
    overlap: int = 1

    @property
    def id(self) -> str:
        """A hash of the item; an item that is added again is the same one."""
        parts = [self.kind, self.task, self.content]
        text = json_text.encode(parts, "item", sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class Label(NamedTuple):
    """What one labeler submitted for one item, or skipped."""

    id: int
    at: float  # seconds since 1970
    who: str
    action: str  # submit or skip
    seconds: float
    value: Any
    shown: Any
    item: str
    kind: str
    task: str
    content: dict[str, Any]
    known: Any


class Refused(Exception):
    """An action that the state does not allow; the message is for the labeler."""


class Store:
    """The events of one workdir."""

    def __init__(self, path: Path):
        if paths.remote(path):
            raise ConfigError(f"label: {path}: SQLite needs a folder on a local disk")
        _create_private(os.fspath(path))
        self.path = path
        self._lock = (
            threading.Lock()
        )  # threads wait for it, and poll for other processes
        self._engine = sa.create_engine(
            sa.URL.create("sqlite", database=os.fspath(path)),
            connect_args={"timeout": BUSY_SECONDS},
        )
        event.listen(self._engine, "connect", _on_connect)
        event.listen(self._engine, "begin", _on_begin)
        try:
            with self.writing() as connection:
                tables.META.create_all(connection)
                for statement in tables.STATEMENTS:
                    connection.exec_driver_sql(statement)
        except exc.DatabaseError as error:
            raise DataError(f"{path}: {error.orig}") from None

    def close(self) -> None:
        """Closes all connections; the write-ahead log goes into the file."""
        self._engine.dispose()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """Yields a connection that alone may write; commits at the end, or rolls back."""
        with self._lock, self._engine.connect() as connection:
            connection = connection.execution_options(begin="BEGIN IMMEDIATE")
            with connection.begin():
                yield connection

    def reading(self) -> contextlib.AbstractContextManager[sa.Connection]:
        """Returns a connection that sees one state of the file."""
        return self._engine.connect()

    # -------------------------------------------------------------- people

    def invite(self, name: str, role: str = LABELER) -> Person:
        """Returns a person with a new token; who has that pseudonym already keeps the token.

        Raises:
          ConfigError: the pseudonym cannot be one, or has another role.
        """
        if not name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
            raise ConfigError(
                f"label: labeler {name[:LONGEST_NAME]!r}: expected a pseudonym of 1 to"
                f" {LONGEST_NAME} printable characters"
            )
        row = {
            "name": name,
            "role": role,
            "token": secrets.token_urlsafe(24),
            "invited": time.time(),
        }
        with self.writing() as connection:
            found = _person(connection, name)
            if found is None:
                connection.execute(people.insert(), row)
                found = Person(name=name, role=role, token=row["token"])
        if found.role != role:
            raise ConfigError(f"label: {name!r} is the {found.role}, not a {role}")
        return found

    def organizer(self) -> Person:
        """Returns the organizer, who is made at the first call."""
        return self.invite(ORGANIZER, ORGANIZER)

    def people(self, role: str = LABELER) -> list[Person]:
        """Returns who was invited, in order."""
        wanted = sa.select(people.c.name, people.c.role, people.c.token)
        wanted = wanted.where(people.c.role == role).order_by(people.c.invited)
        with self.reading() as connection:
            return [Person(*row) for row in connection.execute(wanted)]

    def person(self, token: str) -> Person | None:
        """Returns whose token it is; compared in a time that tells nothing about it."""
        found = None
        for role in (LABELER, ORGANIZER):
            for person in self.people(role):
                if hmac.compare_digest(person.token.encode(), token.encode()):
                    found = person
        return found

    def remove(self, name: str) -> int:
        """Deletes a labeler with all events, from the file's free pages too; returns their number.

        Raises:
          ConfigError: there is no such labeler.
        """
        with self.writing() as connection:
            found = _person(connection, name)
            if found is None or found.role != LABELER:
                known = ", ".join(person.name for person in self.people()) or "nobody"
                raise ConfigError(f"label: no labeler {name!r}; known: {known}")
            count = connection.execute(events.delete().where(events.c.who == name))
            connection.execute(people.delete().where(people.c.name == name))
        with contextlib.closing(self._engine.raw_connection()) as raw:
            for statement in ("VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
                raw.cursor().execute(statement)
        return count.rowcount

    # -------------------------------------------------------------- items

    def add(self, new: Sequence[Item]) -> int:
        """Adds the items that are not there yet, in order; returns how many those were."""
        rows = [{"id": item.id, **item._asdict()} for item in new]
        if not rows:
            return 0
        insert = sqlite.insert(items).on_conflict_do_nothing()
        with self.writing() as connection:
            before = _count(connection, items)
            connection.execute(insert, rows)
            return _count(connection, items) - before

    def item_count(self, kind: str = WORK) -> int:
        """Returns the number of items of a kind."""
        with self.reading() as connection:
            return _count(connection, items, items.c.kind == kind)

    def next_row(self) -> int:
        """Returns the number of the first prompt of a source that has no item, 0 at the start."""
        row = sa.func.json_extract(items.c.content, "$.row")
        with self.reading() as connection:
            last = connection.scalar(sa.select(sa.func.max(row)))
        return 0 if last is None else last + 1

    # -------------------------------------------------------------- events

    def append(
        self, who: str, action: str, about: int, value: Any, seconds: float
    ) -> int:
        """Appends a label or a skip of what was shown; returns the event's number.

        What is sent again, since its reply was lost, is not appended again.

        Raises:
          Refused: nothing was shown to this labeler under that number.
        """
        with self.writing() as connection:
            item = _shown_item(connection, who, about)
            done = sa.select(events.c.id).where(
                events.c.about == about, events.c.action.in_(("submit", "skip"))
            )
            if found := connection.scalar(done):
                return found
            row = {"action": action, "item": item, "about": about, "value": value}
            return insert_event(connection, who, seconds=seconds, **row)

    def undo(self, who: str) -> int:
        """Takes the labeler's last label back; returns the event's number.

        Raises:
          Refused: there is none.
        """
        last = sa.select(labels.c.id, labels.c.item).where(labels.c.who == who)
        last = last.order_by(labels.c.id.desc()).limit(1)
        with self.writing() as connection:
            found = connection.execute(last).first()
            if found is None:
                raise Refused("there is nothing to undo")
            return insert_event(
                connection, who, action=UNDO, item=found.item, about=found.id
            )

    def finish(self, who: str) -> None:
        """Appends that the organizer ends the collection."""
        with self.writing() as connection:
            insert_event(connection, who, action=FINISH)

    def is_finished(self) -> bool:
        """Returns whether the organizer has ended the collection."""
        with self.reading() as connection:
            return _count(connection, events, events.c.action == FINISH) > 0

    def label_count(self) -> int:
        """Returns the number of submitted labels of items of work."""
        wanted = sa.select(sa.func.count()).select_from(
            labels.join(items, items.c.id == labels.c.item)
        )
        wanted = wanted.where(items.c.kind == WORK, labels.c.action == "submit")
        with self.reading() as connection:
            return connection.scalar(wanted) or 0

    def counts(self, who: str) -> dict[tuple[str, str], int]:
        """Returns {(kind of item, submit or skip): number} of one labeler's labels."""
        wanted = sa.select(items.c.kind, labels.c.action, sa.func.count())
        wanted = wanted.join_from(labels, items, items.c.id == labels.c.item)
        wanted = wanted.where(labels.c.who == who)
        with self.reading() as connection:
            rows = connection.execute(wanted.group_by(items.c.kind, labels.c.action))
            return {(kind, action): count for kind, action, count in rows}

    def labels(self, *, who: str = "", kinds: Sequence[str] = ()) -> list[Label]:
        """Returns the labels and skips that were not undone, with their items, in order.

        Args:
          who: one labeler's; "" takes everybody's.
          kinds: of items; () takes all.
        """
        wanted = sa.select(
            *(labels.c.id, labels.c.at, labels.c.who, labels.c.action),
            *(labels.c.seconds, labels.c.value, labels.c.shown, labels.c.item),
            *(items.c.kind, items.c.task, items.c.content, items.c.known),
        ).join_from(labels, items, items.c.id == labels.c.item)
        if who:
            wanted = wanted.where(labels.c.who == who)
        if kinds:
            wanted = wanted.where(items.c.kind.in_(kinds))
        with self.reading() as connection:
            rows = connection.execute(wanted.order_by(labels.c.id))
            return [Label(*row) for row in rows]


def insert_event(connection: sa.Connection, who: str, **values: Any) -> int:
    """Appends an event of now; returns its number."""
    row = {"at": time.time(), "who": who, **values}
    added = events.insert().values(row).returning(events.c.id)
    return connection.execute(added).scalar_one()


def _shown_item(connection: sa.Connection, who: str, about: int) -> str:
    """Returns the item that a labeler was shown by an event. Raises Refused."""
    shown = sa.select(events.c.item).where(
        events.c.id == about, events.c.who == who, events.c.action == SHOW
    )
    item = connection.scalar(shown)
    if item is None:
        raise Refused(f"nothing was shown to you under the number {about}")
    return item


def _person(connection: sa.Connection, name: str) -> Person | None:
    wanted = sa.select(people.c.name, people.c.role, people.c.token)
    row = connection.execute(wanted.where(people.c.name == name)).first()
    return None if row is None else Person(*row)


def _count(connection: sa.Connection, table: sa.Table, *where: Any) -> int:
    counted = sa.select(sa.func.count()).select_from(table).where(*where)
    return connection.scalar(counted) or 0


def _create_private(path: str) -> None:
    """Creates the file if it is not there, for this user alone: it holds the tokens."""
    paths.make_folder(paths.path(path).parent)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def _on_connect(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin as `_on_begin` says
    for pragma in PRAGMAS:
        connection.execute(pragma).close()


def _on_begin(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    connection.exec_driver_sql(options.get("begin", "BEGIN"))
