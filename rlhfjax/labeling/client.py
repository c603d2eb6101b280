"""A labeler that is a program: it opens the link of an invitation, as a browser would.

    client = Client("http://127.0.0.1:8100/TOKEN/")
    reply = client.next()                              # {"state": "item", "event": 7, "item": …}
    client.submit(reply["event"], {"ranks": [1, 2]}, seconds=3.5)

`label_by` ranks with a scorer of text, such as a gold reward, where people are simulated.
"""

import http.client
import threading
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

from rlhfjax import json_text
from rlhfjax.data import chat
from rlhfjax.data.preferences import ranks_of
from rlhfjax.errors import DataError
from rlhfjax.labeling.tasks import RANKED
from rlhfjax.rewards.responses import Scorer

TIMEOUT = 60.0  # seconds for a reply
POLL_SECONDS = 0.2


class Client:
    """One labeler's connection.

    Args:
      link: http://HOST:PORT/TOKEN/.
    """

    def __init__(self, link: str):
        parts = urllib.parse.urlsplit(link)
        self._path = parts.path.rstrip("/")
        self._connection = http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT)

    def next(self) -> dict[str, Any]:
        """Returns the item on this labeler's screen, or why there is none."""
        return self._ask("GET", "next")

    def submit(self, event: int, value: Any, seconds: float = 0.0) -> dict[str, Any]:
        """Labels what was shown as `event`."""
        body = {"event": event, "value": value, "seconds": seconds}
        return self._ask("POST", "submit", body)

    def skip(self, event: int, reason: str, note: str = "") -> dict[str, Any]:
        """Skips what was shown as `event`."""
        value = {"reason": reason, "note": note}
        return self._ask("POST", "skip", {"event": event, "value": value, "seconds": 0})

    def undo(self) -> dict[str, Any]:
        """Takes the last label back."""
        return self._ask("POST", "undo", {})

    def close(self) -> None:
        self._connection.close()

    def _ask(self, method: str, name: str, body: Any = None) -> dict[str, Any]:
        """Returns a reply. Raises DataError if the server refuses, OSError without a server."""
        text = None if body is None else json_text.encode(body, name)
        try:
            self._connection.request(method, f"{self._path}/api/{name}", text)
            reply = self._connection.getresponse()
            content = reply.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()  # the next request connects again
            raise ConnectionError(f"label: {name}: {error}") from None
        given = json_text.decode(content, f"label: {name}", json_text.Object)
        if reply.status != 200:
            message = given.get("error", {}).get("message", "")
            raise DataError(f"label: {name}: {reply.status}: {message}")
        return given


def label_by(scorer: Scorer, link: str, stop: threading.Event | None = None) -> int:
    """Labels with a scorer until the collection is complete; returns the number of labels.

    Args:
      scorer: of texts; equal scores are ties.
      stop: set, it ends the work after the current label.

    Raises:
      DataError: the server refuses, or an item is not one to rank or compare.
    """
    client, count = Client(link), 0
    try:
        while stop is None or not stop.is_set():
            reply = client.next()
            if reply["state"] == "waiting":
                time.sleep(POLL_SECONDS)
                continue
            if reply["state"] != "item":
                break
            ranks = ranked(scorer, reply["item"])
            client.submit(reply["event"], {"ranks": ranks})
            count += 1
    finally:
        client.close()
    return count


def ranked(scorer: Scorer, item: dict[str, Any]) -> list[int]:
    """Returns a scorer's ranks of the responses of an item, as the page has it."""
    if item["task"] not in RANKED:
        raise DataError(
            f"label: a program ranks and compares, it does not {item['task']}"
        )
    responses = item["responses"]
    prompts = [prompt_text(item["prompt"])] * len(responses)
    scores = scorer(prompts, responses)
    return ranks_of([float(score) for score in scores])


def prompt_text(messages: Sequence[chat.Message]) -> str:
    """Returns a prompt with our chat markers, as scorers get it."""
    turns = [f"<|{turn['role']}|>{turn['content']}" for turn in messages]
    return "".join([*turns, "<|assistant|>"])
