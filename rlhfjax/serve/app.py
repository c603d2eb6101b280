"""The HTTP API: completions and models as OpenAI has them, scores, comparisons, and the page."""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from rlhfjax import json_text
from rlhfjax.errors import UserError
from rlhfjax.serve import fields as forms
from rlhfjax.serve.comparisons import Comparisons
from rlhfjax.serve.fields import ChatFields, CommonFields, CompletionFields
from rlhfjax.serve.prepare import Prepared, prepare_chat, prepare_completion, turns_of
from rlhfjax.serve.refused import Refused
from rlhfjax.serve.replies import (
    CLIENT_GONE,
    EventStream,
    Streaming,
    collected,
    refusal,
)
from rlhfjax.serve.run import Run
from rlhfjax.serve.score import Scorer
from rlhfjax.serve.served import Served
from rlhfjax.serve.writers import ChatWriter, CompletionWriter, Writer
from rlhfjax.web.replies import error, page

log = logging.getLogger("rlhfjax")
PAGES = "rlhfjax.serve.pages"
FILES = ("chat.css", "chat.js", "stream.js", "icon.svg")
OPEN_PATHS = ("/", "/health", *(f"/{name}" for name in FILES))
"""Paths without secrets, which need no token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the server does besides answering."""

    seconds: float = 600.0
    """Of the longest response."""
    log_prompts: bool = False
    """Whether prompts and responses are logged."""


class Api:
    """Answers requests with some models.

    Args:
      scorer: scores conversations; None: /v1/score is not there.
      comparisons: where votes are stored; None: nowhere.
    """

    def __init__(
        self,
        models: Sequence[Served],
        *,
        settings: Settings = Settings(),
        scorer: Scorer | None = None,
        comparisons: Comparisons | None = None,
    ):
        self.models = {served.name: served for served in models}
        self._settings = settings
        self._scorer, self._comparisons = scorer, comparisons

    def app(self) -> Starlette:
        """Returns the application. Its end closes the engines."""
        routes = [
            Route("/", _file("chat.html")),
            *(Route(f"/{name}", _file(name)) for name in FILES),
            Route("/health", self.health),
            Route("/settings", self.settings),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.describe_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/score", self.score, methods=["POST"]),
            Route("/v1/comparisons", self.compare, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {
            UserError: _on_user_error,
            ClientDisconnect: _on_client_gone,
            HTTPException: _on_http_error,
            Exception: _on_unexpected,
        }
        return Starlette(
            routes=routes, exception_handlers=handlers, lifespan=self._lifespan
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: ASGIApp) -> AsyncIterator[None]:
        yield
        for served in self.models.values():
            await asyncio.to_thread(served.engine.close)

    # ------------------------------------------------------------------ about the server

    async def health(self, request: Request) -> Response:
        """Says that the server runs, and how busy its engines are."""
        return JSONResponse({"status": "ok", "models": self._stats()})

    def _stats(self) -> dict[str, Any]:
        stats = {}
        for name, served in self.models.items():
            stats[name] = served.engine.stats()._asdict()
        return stats

    async def settings(self, request: Request) -> Response:
        """Returns what the page has to know."""
        names = ("temperature", "top_p", "top_k", "min_p")
        models = []
        for served in self.models.values():
            defaults = {name: getattr(served.sampling, name) for name in names}
            about = {"name": served.name, "length": served.length}
            models.append({**about, "defaults": defaults})
        return JSONResponse(
            {"models": models, "stores_comparisons": self._comparisons is not None}
        )

    async def list_models(self, request: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": list(map(_described, self.models.values()))}
        )

    async def describe_model(self, request: Request) -> Response:
        return JSONResponse(_described(self._find(request.path_params["name"])))

    def _find(self, name: str | None) -> Served:
        """Returns a model by its name; the first one if none is given. Raises Refused."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            raise Refused(
                404,
                f"model {json_text.shown(name)} is unknown; known: {known}",
                code="model_not_found",
                param="model",
            )
        return self.models[name]

    # ------------------------------------------------------------------ responses

    async def chat(self, request: Request) -> Response:
        """Answers /v1/chat/completions."""
        fields = forms.read(await request.body(), ChatFields)
        served = self._find(fields.model)
        prepared = await asyncio.to_thread(prepare_chat, served, fields)
        ends = prepared.requests[0].stop_ids
        writer = ChatWriter(served, logprobs=fields.logprobs, ends=ends)
        return await self._respond(request, served, fields, prepared, writer)

    async def completions(self, request: Request) -> Response:
        """Answers /v1/completions."""
        fields = forms.read(await request.body(), CompletionFields)
        served = self._find(fields.model)
        prepared = await asyncio.to_thread(prepare_completion, served, fields)
        texts = [text if fields.echo else "" for text in prepared.prompts]
        echoes = [text for text in texts for _ in range(fields.n)]
        writer = CompletionWriter(served, logprobs=fields.logprobs, echoes=echoes)
        return await self._respond(request, served, fields, prepared, writer)

    async def _respond(
        self,
        request: Request,
        served: Served,
        fields: CommonFields,
        prepared: Prepared,
        writer: Writer,
    ) -> Response:
        self._log(request, served, prepared)
        run = Run(served, prepared, self._settings.seconds)
        if not fields.stream:
            return await collected(request, run, writer)
        options = fields.stream_options
        streaming = Streaming(
            choices=len(prepared.requests),
            usage=options is not None and options.include_usage,
        )
        return EventStream(run, writer, streaming)

    def _log(self, request: Request, served: Served, prepared: Prepared) -> None:
        shown = ""
        if self._settings.log_prompts:
            shown = f": {json_text.shown(prepared.prompts, 10_000)}"
        log.info(
            "%s %s: %d prompt tokens, %d responses%s",
            request.url.path,
            served.name,
            prepared.prompt_tokens,
            len(prepared.requests),
            shown,
        )

    # ------------------------------------------------------------------ scores, comparisons

    async def score(self, request: Request) -> Response:
        """Answers /v1/score with the reward model's score of each conversation."""
        if self._scorer is None:
            message = "there is no reward model here; --reward=MODEL loads one"
            raise Refused(404, message, code="model_not_found")
        fields = forms.read(await request.body(), forms.ScoreFields)
        several = isinstance(fields.messages[0], list)
        conversations = fields.messages if several else [fields.messages]
        given = [turns_of(_messages(one)) for one in conversations]
        start = time.monotonic()
        scored = await asyncio.to_thread(self._scorer.scores, given)
        log.info("/v1/score: %d in %.2f s", len(given), time.monotonic() - start)
        data = [
            {"object": "score", "index": i, "score": score}
            for i, score in enumerate(scored.scores)
        ]
        usage = {"prompt_tokens": scored.tokens, "total_tokens": scored.tokens}
        about = {"object": "list", "model": self._scorer.name}
        return JSONResponse({**about, "data": data, "usage": usage})

    async def compare(self, request: Request) -> Response:
        """Stores which of two responses is the better one."""
        if self._comparisons is None:
            message = "comparisons are not stored; --comparisons=FILE says where"
            raise Refused(404, message)
        fields = forms.read(await request.body(), forms.ComparisonFields)
        turns = turns_of(fields.messages)
        count = await asyncio.to_thread(self._comparisons.add, turns, fields)
        return JSONResponse({"object": "comparison", "stored": count}, 201)


def _messages(value: Any) -> list[dict[str, Any]]:
    """Returns one conversation of a request. Raises Refused."""
    if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
        message = "messages: expected a list of messages, or a list of such lists"
        raise Refused(400, message, param="messages")
    return value


def _described(served: Served) -> dict[str, Any]:
    """Returns a model as OpenAI describes it, with its length as vLLM does."""
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "rlhfjax",
        "max_model_len": served.length,
    }


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def reply(request: Request) -> Response:
        return page(PAGES, name)

    return reply


async def _on_user_error(request: Request, reason: Exception) -> Response:
    """Answers with one of our errors, which is the client's unless it says otherwise."""
    if isinstance(reason, Refused):
        return refusal(reason)
    return error(400, str(reason))


async def _on_client_gone(request: Request, reason: Exception) -> Response:
    """Ends a request whose client went before the server had read it."""
    return Response(status_code=CLIENT_GONE)


async def _on_http_error(request: Request, reason: Exception) -> Response:
    """Answers with an error of Starlette: a path or a method that is not there."""
    assert isinstance(reason, HTTPException)
    message = f"{request.method} {request.url.path}: {reason.detail}"
    headers = dict(reason.headers or {})
    return error(reason.status_code, message, headers=headers)


async def _on_unexpected(request: Request, reason: Exception) -> Response:
    """Answers with 500; the traceback is in the log."""
    return error(500, "the server failed; its log says why")
