"""The tables of labels.sqlite: people, items, and events that are only ever appended.

    people   who may open the page: a pseudonym, a role, the token of the link
    items    what is labeled: a task, its texts, and how many labelers it is for
    events   who did what and when; a label is an event, and so are undo and skip

What holds now is a view over the events: `labels` are the submitted and skipped items that were not
undone, `open_items` what was shown and is neither submitted nor skipped.
"""

import sqlalchemy as sa

META = sa.MetaData()

LABELER, ORGANIZER = "labeler", "organizer"
WORK, SCREENING, CALIBRATION = "work", "screening", "calibration"
SHOW, SUBMIT, SKIP, UNDO, FINISH = "show", "submit", "skip", "undo", "finish"

people = sa.Table(
    "people",
    META,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("role", sa.String, nullable=False),
    sa.Column("token", sa.String, nullable=False, unique=True),
    sa.Column("invited", sa.Float, nullable=False),  # seconds since 1970
)

items = sa.Table(
    "items",
    META,
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("id", sa.String, nullable=False, unique=True),  # hash of kind and content
    sa.Column("kind", sa.String, nullable=False),  # work, screening, calibration
    sa.Column("task", sa.String, nullable=False),
    sa.Column("content", sa.JSON, nullable=False),
    sa.Column("known", sa.JSON),  # the label that is known to be right
    sa.Column("priority", sa.Float, nullable=False),  # the highest is next
    sa.Column("overlap", sa.Integer, nullable=False),  # labelers per item
    sa.Index("items_in_turn", "kind", sa.text("priority DESC"), "position"),
)

events = sa.Table(
    "events",
    META,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", sa.Float, nullable=False),  # seconds since 1970
    sa.Column("who", sa.String, nullable=False, index=True),
    sa.Column("action", sa.String, nullable=False),
    sa.Column("item", sa.String, index=True),
    # The event that this one is about: of a label, the show; of an undo, the label.
    sa.Column("about", sa.Integer, index=True),
    sa.Column("seconds", sa.Float),  # that the labeler worked, as the page counts them
    sa.Column("value", sa.JSON),  # of a show: the order; of a label: what was given
    sqlite_autoincrement=True,  # an id is never used twice, also not after a removal
)

# One label per showing: a label that is sent again is the same one.
ONE_LABEL = """
CREATE UNIQUE INDEX IF NOT EXISTS one_label ON events (about)
WHERE action IN ('submit', 'skip', 'undo')
"""

LABELS = """
CREATE VIEW IF NOT EXISTS labels AS
SELECT done.*, shown.value AS shown, shown.at AS shown_at
FROM events AS done JOIN events AS shown ON shown.id = done.about
WHERE done.action IN ('submit', 'skip')
AND NOT EXISTS (
  SELECT 1 FROM events AS undone
  WHERE undone.about = done.id AND undone.action = 'undo'
)
"""

OPEN_ITEMS = """
CREATE VIEW IF NOT EXISTS open_items AS
SELECT shown.* FROM events AS shown
WHERE shown.action = 'show'
AND NOT EXISTS (
  SELECT 1 FROM events AS done
  WHERE done.about = shown.id AND done.action IN ('submit', 'skip')
)
"""

APPEND_ONLY = """
CREATE TRIGGER IF NOT EXISTS append_only BEFORE UPDATE ON events
BEGIN SELECT RAISE(ABORT, 'events are only appended'); END
"""

STATEMENTS = (ONE_LABEL, LABELS, OPEN_ITEMS, APPEND_ONLY)

# The views as SQLAlchemy reads them.
labels = sa.table(
    "labels",
    sa.column("id", sa.Integer),
    sa.column("at", sa.Float),
    sa.column("who", sa.String),
    sa.column("action", sa.String),
    sa.column("item", sa.String),
    sa.column("about", sa.Integer),
    sa.column("seconds", sa.Float),
    sa.column("value", sa.JSON),
    sa.column("shown", sa.JSON),
    sa.column("shown_at", sa.Float),
)

open_items = sa.table(
    "open_items",
    sa.column("id", sa.Integer),
    sa.column("at", sa.Float),
    sa.column("who", sa.String),
    sa.column("item", sa.String),
    sa.column("value", sa.JSON),
)
