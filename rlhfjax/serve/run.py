"""The responses that an engine makes for one request of HTTP, as they come."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from typing import Literal, NamedTuple

from rlhfjax.errors import ConfigError
from rlhfjax.serve.pieces import Piece, TextStream
from rlhfjax.serve.prepare import Prepared
from rlhfjax.serve.refused import Refused
from rlhfjax.serve.requests import Closed, End, Event, Full, Prompt, Token
from rlhfjax.serve.served import Served, Ticket

RETRY_SECONDS = 1
MOST_AT_ONCE = 16  # responses of one request that the engine has at a time
Reason = Literal["stop", "length"]


class ClientGone(Exception):
    """The client closed the connection before the end of the reply."""


class Ended(NamedTuple):
    """The end of a response."""

    reason: Reason


class Run:
    """The responses to one request; each has the index of its `Prepared.requests`.

    Make it in the event loop. `parts` yields what comes; leave it by `cancel` in any case, which
    does nothing where all have ended.

    Raises:
      Refused: the engine's queue is full, or it does not take a request.
    """

    def __init__(self, served: Served, prepared: Prepared, seconds: float):
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()
        self._engine = served.engine
        self._waiting = list(enumerate(prepared.requests))
        self._waiting.reverse()
        self._streams = [
            TextStream(served.tokenizer, prepared.stop, request.stop_ids)
            for request in prepared.requests
        ]
        self.prompt_tokens, self.sampled = prepared.prompt_tokens, 0
        self._tickets: dict[int, Ticket] = {}  # of requests that have not ended
        self._timer: asyncio.TimerHandle | None = None
        self._submit()
        late = Refused(503, f"the response took longer than {seconds:g} seconds")
        self._timer = self._loop.call_later(seconds, self._queue.put_nowait, late)

    def _submit(self) -> None:
        """Submits requests, at most MOST_AT_ONCE, which leaves room in the queue for others.

        Those of a long list that find no room wait for an earlier one of this list.
        """
        while self._waiting and len(self._tickets) < MOST_AT_ONCE:
            index, request = self._waiting[-1]
            try:
                emit = functools.partial(self._emit, index)
                self._tickets[index] = self._engine.submit(request, emit)
            except Full:
                if not self._tickets:
                    message = "all lanes and the queue are full; try again later"
                    raise Refused(429, message, seconds=RETRY_SECONDS) from None
                return
            except Closed as error:
                self.cancel()
                raise Refused(503, str(error), seconds=RETRY_SECONDS) from None
            except (ConfigError, ValueError) as error:
                self.cancel()
                raise Refused(400, str(error)) from None
            self._waiting.pop()

    def _emit(self, index: int, event: Event) -> None:
        """Passes an event from the engine's thread to the event loop, if that still runs."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

    def gone(self) -> None:
        """Ends `parts` with ClientGone."""
        self._queue.put_nowait(ClientGone())

    def cancel(self) -> None:
        """Ends the responses that have not ended."""
        self._waiting.clear()
        for ticket in self._tickets.values():
            ticket.cancel()
        if self._timer is not None:
            self._timer.cancel()

    async def parts(self) -> AsyncIterator[tuple[int, Prompt | Piece | Ended]]:
        """Yields pieces of all responses until each has ended.

        Raises:
          Refused: it took too long, or the engine failed or was closed.
          ClientGone: `gone` was called.
        """
        running = set(range(len(self._streams)))
        while running:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            index, event = item
            if isinstance(event, End):
                self._tickets.pop(index, None)
                self._submit()
            if index not in running:  # what came after a stop text
                continue
            for part in self._parts_of(index, event):
                yield index, part
                if isinstance(part, Ended):
                    running.discard(index)

    def _parts_of(self, index: int, event: Event) -> list[Prompt | Piece | Ended]:
        if isinstance(event, Prompt):
            return [event]
        stream = self._streams[index]
        if isinstance(event, Token):
            self.sampled += 1
            piece = stream.push(event)
            if stream.is_stopped:
                if ticket := self._tickets.get(index):
                    ticket.cancel()
                return [piece, Ended("stop")]
            return [piece]
        rest = stream.rest()
        reason = "stop" if stream.is_stopped else _reason(event)
        return [rest, Ended(reason)]


def _reason(end: End) -> Reason:
    """Returns why a response ended. Raises Refused if it was not by itself."""
    if end.reason == "cancelled":
        raise Refused(503, "the server is closing")
    if end.reason == "error":
        raise Refused(500, "the engine failed" if end.message == "" else end.message)
    return end.reason
