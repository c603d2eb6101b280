"""The JSON objects of OpenAI's API, for chats and for plain completions."""

import math
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from rlhfjax import __version__
from rlhfjax.serve.pieces import Piece, Placed, joined, whole
from rlhfjax.serve.requests import Prompt, Token
from rlhfjax.serve.run import Reason
from rlhfjax.serve.served import Served

Json = dict[str, Any]
LEAST = -9999.0  # a log-probability of a token of probability 0; JSON has no infinity


@runtime_checkable
class Writer(Protocol):
    """Writes the responses to one request as choices."""

    def reply(self, choices: list[Json], usage: Json) -> Json:
        """Returns the whole reply."""
        ...

    def chunk(self, choices: list[Json]) -> Json:
        """Returns one event of a stream."""
        ...

    def choice(
        self, index: int, pieces: Iterable[Piece], prompt: Prompt | None, reason: Reason
    ) -> Json:
        """Returns a whole response."""
        ...

    def openings(self, index: int) -> list[Json]:
        """Returns what a stream of a response begins with."""
        ...

    def prompt(self, index: int, prompt: Prompt) -> list[Json]:
        """Returns the log-probabilities of the prompt, for a stream."""
        ...

    def piece(self, index: int, piece: Piece) -> list[Json]:
        """Returns a piece of a response, for a stream."""
        ...

    def end(self, index: int, reason: Reason) -> Json:
        """Returns the end of a response, for a stream."""
        ...


class _Base:
    """What both kinds of writers share.

    Args:
      kind: of the reply, such as "chat.completion".
      prefix: of the reply's id.
    """

    def __init__(self, served: Served, kind: str, chunk: str, prefix: str):
        self._served, self._kind, self._chunk = served, kind, chunk
        self._about = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": f"rlhfjax-{__version__}",
        }

    def reply(self, choices: list[Json], usage: Json) -> Json:
        return {
            **self._about,
            "object": self._kind,
            "choices": choices,
            "usage": usage,
        }

    def chunk(self, choices: list[Json]) -> Json:
        return {**self._about, "object": self._chunk, "choices": choices}


class ChatWriter(_Base):
    """Writes chat completions; the id that ends a turn has no text and is left out."""

    def __init__(self, served: Served, *, logprobs: bool, ends: frozenset[int]):
        super().__init__(served, "chat.completion", "chat.completion.chunk", "chatcmpl")
        self._logprobs, self._ends = logprobs, ends

    def choice(
        self, index: int, pieces: Iterable[Piece], prompt: Prompt | None, reason: Reason
    ) -> Json:
        piece = joined(pieces)
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs_of(piece.tokens),
            "finish_reason": reason,
        }

    def openings(self, index: int) -> list[Json]:
        return [self._delta(index, {"role": "assistant", "content": ""})]

    def prompt(self, index: int, prompt: Prompt) -> list[Json]:
        return []

    def piece(self, index: int, piece: Piece) -> list[Json]:
        logprobs = self._logprobs_of(piece.tokens)
        if not piece.text and not (logprobs and logprobs["content"]):
            return []
        return [self._delta(index, {"content": piece.text}, logprobs)]

    def end(self, index: int, reason: Reason) -> Json:
        return self._delta(index, {}) | {"finish_reason": reason}

    def _delta(self, index: int, delta: Json, logprobs: Json | None = None) -> Json:
        return {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": None,
        }

    def _logprobs_of(self, tokens: Sequence[Placed]) -> Json | None:
        if not self._logprobs:
            return None
        kept = [placed.token for placed in tokens if placed.token.id not in self._ends]
        return {"content": list(map(self._token, kept)), "refusal": None}

    def _token(self, token: Token) -> Json:
        top = [self._alternative(*pair) for pair in token.top]
        return self._alternative(token.id, token.logprob) | {"top_logprobs": top}

    def _alternative(self, token: int, logprob: float) -> Json:
        return {
            "token": self._served.text_of(token),
            "logprob": max(logprob, LEAST),
            "bytes": list(self._served.bytes_of(token)),
        }


class CompletionWriter(_Base):
    """Writes plain completions. With log-probabilities, the id that ends a response is among them.

    Args:
      logprobs: number of alternatives per token; None: no log-probabilities.
      echoes: the text that each response begins with, which is its prompt or empty.
    """

    def __init__(self, served: Served, *, logprobs: int | None, echoes: Sequence[str]):
        super().__init__(served, "text_completion", "text_completion", "cmpl")
        self._logprobs, self._echoes = logprobs, echoes

    def choice(
        self, index: int, pieces: Iterable[Piece], prompt: Prompt | None, reason: Reason
    ) -> Json:
        piece = joined(pieces)
        logprobs = self._logprobs_of(index, piece.tokens)
        if logprobs is not None and prompt is not None:
            logprobs = _both(self._prompt_logprobs(prompt), logprobs)
        text = self._echoes[index] + piece.text
        return self._written(index, text, logprobs, reason)

    def openings(self, index: int) -> list[Json]:
        echo = self._echoes[index]
        if not echo or self._logprobs is not None:  # `prompt` writes it
            return []
        return [self._written(index, echo)]

    def prompt(self, index: int, prompt: Prompt) -> list[Json]:
        echo = self._echoes[index]
        return [self._written(index, echo, self._prompt_logprobs(prompt))]

    def piece(self, index: int, piece: Piece) -> list[Json]:
        logprobs = self._logprobs_of(index, piece.tokens)
        if not piece.text and not (logprobs and logprobs["tokens"]):
            return []
        return [self._written(index, piece.text, logprobs)]

    def end(self, index: int, reason: Reason) -> Json:
        return self._written(index, "", None, reason)

    def _written(
        self,
        index: int,
        text: str,
        logprobs: Json | None = None,
        reason: Reason | None = None,
    ) -> Json:
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
        }

    def _prompt_logprobs(self, prompt: Prompt) -> Json:
        piece = whole(self._served.tokenizer, prompt.tokens)
        return self._columns(piece.tokens, 0)

    def _logprobs_of(self, index: int, tokens: Sequence[Placed]) -> Json | None:
        if self._logprobs is None:
            return None
        return self._columns(tokens, len(self._echoes[index]))

    def _columns(self, tokens: Sequence[Placed], start: int) -> Json:
        """Returns OpenAI's columns.

        Args:
          start: where the text of the tokens begins in that of the choice.
        """
        text_of = self._served.text_of
        return {
            "tokens": [text_of(placed.token.id) for placed in tokens],
            "token_logprobs": [_finite(placed.token.logprob) for placed in tokens],
            "top_logprobs": [self._top(placed.token) for placed in tokens],
            "text_offset": [start + placed.offset for placed in tokens],
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        """Returns the likeliest tokens and the token itself; None where there is none."""
        if math.isnan(token.logprob):
            return None
        top = {}
        for other, logprob in (*token.top, (token.id, token.logprob)):
            # Of two tokens with the same text the likelier one stays.
            top.setdefault(self._served.text_of(other), max(logprob, LEAST))
        return top


def _finite(logprob: float) -> float | None:
    return None if math.isnan(logprob) else max(logprob, LEAST)


def _both(first: Json, second: Json) -> Json:
    return {name: first[name] + second[name] for name in first}


def usage_of(prompt: int, sampled: int) -> Json:
    """Returns the counts of tokens."""
    total = prompt + sampled
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": total,
    }
