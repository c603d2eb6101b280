"""Events are appended and kept; undo, skip and removal; a kill at any moment loses no label."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap

import pytest

from rlhfjax import paths
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.labeling import queue
from rlhfjax.labeling.store import Refused, Store
from tests.labeling.label_world import compare, label, new_store, skip


def test_a_label_is_kept_with_who_when_how_long_and_what_was_shown(tmp_path):
    store = new_store(tmp_path, "ann")
    item = compare()
    assert store.add([item, item]) == 1
    assert store.add([item]) == 0
    label(store, "ann", {"ranks": [2, 1]})
    store.close()
    (kept,) = Store(store.path).labels()
    assert (kept.who, kept.action, kept.seconds) == ("ann", "submit", 2.0)
    assert kept.value == {"ranks": [2, 1]}
    assert sorted(kept.shown["order"]) == [0, 1]
    assert kept.item == item.id
    assert abs(kept.at - os.stat(store.path).st_mtime) < 60


def test_undo_and_skip_are_events_and_the_state_follows_from_them(tmp_path):
    store = new_store(tmp_path, "ann")
    store.add([compare(0, priority=2.0), compare(1, priority=1.0)])
    first = label(store, "ann", {"ranks": [1, 2]})
    skip(store, "ann")
    assert store.label_count() == 1
    assert [one.action for one in store.labels()] == ["submit", "skip"]
    store.undo("ann")  # the skip
    store.undo("ann")  # the label
    assert store.labels() == []
    with pytest.raises(Refused, match="nothing to undo"):
        store.undo("ann")
    shown = queue.next_item(store, "ann", queue.Rules())
    assert (shown.item, shown.before) == (first, {"ranks": [1, 2]})
    with sqlite3.connect(store.path) as raw:
        actions = [
            row[0] for row in raw.execute("SELECT action FROM events ORDER BY id")
        ]
    assert actions == ["show", "submit", "show", "skip", "undo", "undo", "show"]


def test_a_label_that_is_sent_again_is_the_same_one(tmp_path):
    store = new_store(tmp_path, "ann", "bob")
    store.add([compare()])
    shown = queue.next_item(store, "ann", queue.Rules())
    first = store.append("ann", "submit", shown.event, {"ranks": [1, 2]}, 1.0)
    again = store.append("ann", "submit", shown.event, {"ranks": [2, 1]}, 1.0)
    assert first == again
    assert [one.value for one in store.labels()] == [{"ranks": [1, 2]}]
    with pytest.raises(Refused, match="nothing was shown to you"):
        store.append("bob", "submit", shown.event, {"ranks": [1, 2]}, 1.0)


def test_events_cannot_be_changed_and_the_file_is_private_and_durable(tmp_path):
    store = new_store(tmp_path, "ann")
    store.add([compare()])
    label(store, "ann", {"ranks": [1, 2]})
    with sqlite3.connect(store.path) as raw:
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        with pytest.raises(sqlite3.IntegrityError, match="only appended"):
            raw.execute("UPDATE events SET value = '{}'")
    with store.reading() as connection:
        synchronous = connection.exec_driver_sql("PRAGMA synchronous").scalar()
    assert synchronous == 2  # FULL
    assert os.stat(store.path).st_mode & 0o777 == 0o600


def test_a_removed_labeler_leaves_nothing_in_the_file(tmp_path):
    store = new_store(tmp_path, "ann", "bob")
    store.add([compare(0, overlap=2)])
    label(store, "bob", {"ranks": [1, 1]})
    shown = queue.next_item(store, "ann", queue.Rules())
    value = {"ranks": [1, 2], "note": "a-secret-of-ann"}
    store.append("ann", "submit", shown.event, value, 1.0)
    token = store.people()[0].token
    assert store.remove("ann") == 2  # the show and the label
    assert [one.who for one in store.labels()] == ["bob"]
    assert store.person(token) is None
    store.close()
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        assert b"a-secret-of-ann" not in content and token.encode() not in content
    with pytest.raises(ConfigError, match="no labeler 'ann'; known: bob"):
        store.remove("ann")


def test_pseudonyms_roles_and_files_that_cannot_be(tmp_path):
    store = new_store(tmp_path, "ann")
    assert store.invite("ann") == store.people()[0]  # the same link
    assert store.organizer().role == "organizer"
    for name in ("", "  ", "a\nb", "x" * 41):
        with pytest.raises(ConfigError, match="expected a pseudonym"):
            store.invite(name)
    with pytest.raises(ConfigError, match="is the organizer"):
        store.invite("organizer")
    (tmp_path / "x.sqlite").write_bytes(b"no database, but bytes" * 100)
    with pytest.raises(DataError, match="file is not a database"):
        Store(paths.path(tmp_path / "x.sqlite"))


@pytest.mark.slow
def test_a_bucket_is_no_place_for_a_database():
    with pytest.raises(ConfigError, match="local disk"):
        Store(paths.path("gs://bucket/labels.sqlite"))


WRITER = """
    import sys, threading
    from rlhfjax import paths
    from rlhfjax.labeling import queue
    from rlhfjax.labeling.store import Store

    store = Store(paths.path(sys.argv[1]))

    def work(who):
        while True:
            shown = queue.next_item(store, who, queue.Rules())
            store.append(who, "submit", shown.event, {"ranks": [1, 2]}, 1.0)
            sys.stdout.write(f"{who} {shown.item}\\n")
            sys.stdout.flush()

    for who in sys.argv[2:]:
        threading.Thread(target=work, args=(who,)).start()
"""


def test_a_kill_under_several_writers_loses_no_label_that_was_confirmed(tmp_path):
    names = ["a", "b", "c"]
    store = new_store(tmp_path, *names)
    store.add([compare(i) for i in range(2000)])
    store.close()
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(store.path), *names]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(30)]
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.read().splitlines(keepends=True)
    process.wait()
    confirmed = {tuple(line.split()) for line in lines if line.endswith("\n")}
    with sqlite3.connect(store.path) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    kept = [(one.who, one.item) for one in Store(store.path).labels()]
    assert len(confirmed) >= 30
    assert confirmed <= set(kept)
    assert len(kept) == len(set(kept))  # and none twice
