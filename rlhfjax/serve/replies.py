"""Replies of HTTP with the responses of a run: whole, or as server-sent events."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from rlhfjax import json_text
from rlhfjax.serve.pieces import Piece
from rlhfjax.serve.refused import Refused
from rlhfjax.serve.requests import Prompt
from rlhfjax.serve.run import ClientGone, Ended, Run
from rlhfjax.serve.writers import Json, Writer, usage_of
from rlhfjax.web.replies import error

CLIENT_GONE = 499  # nginx's status; nobody reads it


class Streaming(NamedTuple):
    """What a stream has besides the responses."""

    choices: int
    usage: bool  # an event with the counts of tokens, before the last


def refusal(reason: Refused) -> JSONResponse:
    """Returns the reply to a request that is not answered."""
    return error(
        reason.status,
        str(reason),
        code=reason.code,
        param=reason.param,
        headers=reason.headers,
    )


async def collected(request: Request, run: Run, writer: Writer) -> Response:
    """Returns a reply with all responses. Raises Refused."""
    async with _watched(request.receive, run):
        try:
            choices = await _choices(run, writer)
        except ClientGone:
            return Response(status_code=CLIENT_GONE)
        usage = usage_of(run.prompt_tokens, run.sampled)
        return JSONResponse(writer.reply(choices, usage))


async def _choices(run: Run, writer: Writer) -> list[Json]:
    pieces: dict[int, list[Piece]] = {}
    prompts: dict[int, Prompt] = {}
    choices: dict[int, Json] = {}
    async for index, part in run.parts():
        if isinstance(part, Prompt):
            prompts[index] = part
        elif isinstance(part, Piece):
            pieces.setdefault(index, []).append(part)
        else:
            made = pieces.pop(index, [])
            prompt = prompts.pop(index, None)
            choices[index] = writer.choice(index, made, prompt, part.reason)
    return [choices[index] for index in sorted(choices)]


class EventStream(Response):
    """A reply of server-sent events: a chunk per piece, and `[DONE]`."""

    media_type = "text/event-stream"

    def __init__(self, run: Run, writer: Writer, streaming: Streaming):
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._run, self._writer, self._streaming = run, writer, streaming

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200}
        async with _watched(receive, self._run):
            # A client that is gone: nobody reads the rest.
            with contextlib.suppress(ClientGone, OSError):
                await send({**start, "headers": self.raw_headers})
                async for event in self._events():
                    await send(_body(event, more=True))
                await send(_body("", more=False))

    async def _events(self) -> AsyncIterator[str]:
        try:
            async for choices in self._choices():
                yield _event(self._chunk(choices))
        except Refused as reason:
            yield f"data: {bytes(refusal(reason).body).decode()}\n\n"
            return
        if self._streaming.usage:
            usage = usage_of(self._run.prompt_tokens, self._run.sampled)
            yield _event(self._writer.chunk([]) | {"usage": usage})
        yield "data: [DONE]\n\n"

    async def _choices(self) -> AsyncIterator[list[Json]]:
        """Yields what the next event has."""
        for index in range(self._streaming.choices):
            if choices := self._writer.openings(index):
                yield choices
        async for index, part in self._run.parts():
            if isinstance(part, Ended):
                choices = [self._writer.end(index, part.reason)]
            elif isinstance(part, Prompt):
                choices = self._writer.prompt(index, part)
            else:
                choices = self._writer.piece(index, part)
            if choices:
                yield choices

    def _chunk(self, choices: list[Json]) -> Json:
        chunk = self._writer.chunk(choices)
        return chunk | {"usage": None} if self._streaming.usage else chunk


def _event(value: Json) -> str:
    return f"data: {json_text.encode(value, 'reply')}\n\n"


def _body(text: str, *, more: bool) -> Json:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


@contextlib.asynccontextmanager
async def _watched(receive: Receive, run: Run) -> AsyncIterator[None]:
    """Tells a run when its client goes; on leaving, cancels what has not ended."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        run.gone()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        run.cancel()
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
