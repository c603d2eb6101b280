"""An OpenAI-compatible endpoint: chat completions over HTTP, of OpenAI, vLLM, llama.cpp and others.

The key is read from an environment variable and stands in no file. Requests that fail for a while
(no connection, 408, 409, 429, 5xx) are repeated with growing pauses by the `openai` package.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NotRequired

from typing_extensions import TypedDict

from rlhfjax import json_text
from rlhfjax.errors import ConfigError, DataError, first_line, install
from rlhfjax.ranges import Count, Seconds, Size
from rlhfjax.redact import HIDDEN, redact

Conversation = Sequence[dict[str, str]]
_NO_KEY = "none"  # servers of one's own ask for no key; the client wants one


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """A server with models, and how it is asked."""

    url: str
    """Base URL, such as http://localhost:8000/v1."""
    model: str
    """The server's name of the model."""
    key: str = "OPENAI_API_KEY"
    """Environment variable with the key; it may be unset for a server that asks for none."""
    timeout: Seconds = 120.0
    """Seconds until a request counts as failed."""
    retries: Count = 5
    """Times that a request is repeated which failed for a while."""
    concurrency: Size = 8
    """Requests at a time."""

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"endpoint.url={json_text.shown(redact(self.url))}:"
                " expected http://… or https://…"
            )


class Reply(TypedDict):
    """The text that a model wrote."""

    text: str
    is_cut: bool  # it has as many tokens as it may have
    model: str  # as the server names it


class _Message(TypedDict):
    content: NotRequired[str | None]


class _Choice(TypedDict):
    message: _Message
    finish_reason: NotRequired[str | None]


class _Body(TypedDict):
    """What is read of a chat completion."""

    choices: list[_Choice]
    model: NotRequired[str | None]


class Endpoint:
    """A server with models.

    Raises:
      ConfigError: the `openai` package is not installed.
    """

    def __init__(self, config: EndpointConfig):
        validate_installed()
        from openai import OpenAI

        self._config = config
        self._key = os.environ.get(config.key) or _NO_KEY
        self._client = OpenAI(
            api_key=self._key,
            base_url=config.url,
            timeout=config.timeout,
            max_retries=config.retries,
        )

    def answer(
        self,
        questions: Sequence[Conversation],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[Reply]:
        """Returns the model's replies, in order. Question i is sent with seed + i.

        Raises:
          DataError: a request failed for good, or a reply has another form.
        """

        def ask(index: int) -> Reply:
            options = {
                "max_tokens": max_new_tokens,
                "temperature": temperature,
                "seed": seed + index,
            }
            return self._ask(questions[index], options)

        with ThreadPoolExecutor(self._config.concurrency) as pool:
            return list(pool.map(ask, range(len(questions))))

    def _ask(self, question: Conversation, options: dict[str, Any]) -> Reply:
        import openai

        create = self._client.chat.completions.with_raw_response.create
        messages: Any = list(question)
        try:
            reply = create(model=self._config.model, messages=messages, **options)
        except openai.AuthenticationError as error:
            hint = f"; the key is read from the environment variable {self._config.key}"
            raise DataError(self._hidden(error) + hint) from None
        except openai.OpenAIError as error:
            raise DataError(self._hidden(error)) from None
        return reply_of(reply.content, self._config.url, self._config.model)

    def _hidden(self, error: Exception) -> str:
        """Returns an error in one line, without the key."""
        text = f"{self._config.url}: {first_line(error, kind=True)}"
        if self._key != _NO_KEY:
            text = text.replace(self._key, HIDDEN)
        return redact(text)


def reply_of(content: bytes, url: str, model: str) -> Reply:
    """Returns the reply in the body of a chat completion.

    Args:
      url, model: of the endpoint, for errors and for a server that does not name its model.

    Raises:
      DataError: the body has another form.
    """
    body = json_text.decode(content, redact(url), _Body)
    if not body["choices"]:
        raise DataError(f"{redact(url)}: the reply has no choices")
    choice = body["choices"][0]
    return Reply(
        text=choice["message"].get("content") or "",
        is_cut=choice.get("finish_reason") == "length",
        model=body.get("model") or model,
    )


def validate_installed() -> None:
    """Raises ConfigError if the `openai` package is missing."""
    if importlib.util.find_spec("openai") is None:
        raise ConfigError(
            f"endpoint: the package openai is not installed; {install('synthesize')}"
        )
