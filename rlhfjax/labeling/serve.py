"""Serves the pages of a collection until it is complete."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import sqlalchemy as sa

from rlhfjax.labeling import queue
from rlhfjax.labeling.app import MOST_BYTES, Collection, application
from rlhfjax.labeling.client import label_by
from rlhfjax.labeling.store import Store
from rlhfjax.labeling.tables import open_items
from rlhfjax.rewards.responses import Scorer
from rlhfjax.web import access
from rlhfjax.web.guard import guarded
from rlhfjax.web.server import Server

SIMULATED = "simulated"
POLL_SECONDS = 0.5
LEAST_WAITING = 20  # labels that are needed, below which more responses are sampled


def until_complete(
    collection: Collection,
    host: str,
    port: int,
    labelers: Sequence[str],
    *,
    grace: float = 60.0,
    refill: Callable[[], bool] | None = None,
    scorer: Scorer | None = None,
) -> None:
    """Serves the pages until there are enough labels.

    Args:
      labelers: pseudonyms to invite.
      grace: seconds that labelers have for what is on their screens, once there are enough labels.
      refill: adds items and returns whether there may be more; called while labelers work.
      scorer: labels in place of people, by the name SIMULATED.

    Raises:
      ConfigError: the address cannot be bound.
    """
    store, rules = collection.store, collection.rules
    organizer = store.organizer()
    access.validate(host, port, organizer.token)
    for name in labelers:
        store.invite(name)
    app = guarded(application(collection), host=host, most_bytes=MOST_BYTES)
    with Server(app, host, port) as server, _simulated(scorer, store, server.url):
        _print_links(store, server.url)
        while not queue.is_complete(store, rules):
            if refill is not None and queue.left(store) < LEAST_WAITING:
                refill = refill if refill() else None
            else:
                time.sleep(POLL_SECONDS)
        deadline = time.time() + grace
        while time.time() < deadline and _at_work(store):
            time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _simulated(scorer: Scorer | None, store: Store, url: str) -> Iterator[None]:
    """Labels with a scorer in a separate thread, through the server."""
    if scorer is None:
        yield
        return
    link = f"{url}/{store.invite(SIMULATED).token}/"
    stop = threading.Event()
    thread = threading.Thread(target=label_by, args=(scorer, link, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _print_links(store: Store, url: str) -> None:
    """Prints the links that let people in. They are secrets, and no part of the log."""
    organizer = store.organizer()
    print(f"organizer: {url}/{organizer.token}/", flush=True)
    for person in store.people():
        print(f"{person.name}: {url}/{person.token}/", flush=True)


def _at_work(store: Store) -> bool:
    """Returns whether a labeler has had an item on the screen for less than half an hour."""
    since = time.time() - queue.RESERVED_SECONDS
    wanted = sa.select(open_items.c.id).where(open_items.c.at > since).limit(1)
    with store.reading() as connection:
        return connection.execute(wanted).first() is not None
