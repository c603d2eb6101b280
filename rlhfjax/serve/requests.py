"""What the engine is asked for and what it answers: a request, its tokens, and its end."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from rlhfjax.errors import ConfigError

MOST_TOP = 20  # alternatives per token at most, as in OpenAI's API


@runtime_checkable
class Constraint(Protocol):
    """What a response may be: a schema, an expression, a choice. It belongs to one request.

    The engine calls it from its thread, `mask` before and `accept` after every token.
    """

    def mask(self) -> np.ndarray:
        """Returns which ids may follow: bool [v], or bits packed into 32-bit words [ceil(v / 32)].

        Id i is bit i % 32, from the least significant, of word i // 32. Ids behind the end of the
        array may not follow. At least one id may.
        """
        ...

    def accept(self, token: int) -> None:
        """Takes the token that was drawn. It is not called for a token of `stop_ids`."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether no token may follow; the response ends with the reason "stop"."""
        ...


class Request(NamedTuple):
    """A prompt, and how to sample one response to it."""

    tokens: tuple[int, ...]
    """The prompt, at least one token."""
    max_tokens: int
    """Tokens of the longest response; 0 draws none, which is of use with `prompt_logprobs`."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this probability; 1 is off."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 is off."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the likeliest; 0 is off."""
    seed: int = 0
    """Token j is drawn by uniform(fold_in(key(seed), j)), as by `generate`; modulo 2^32."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the response; the one that does is emitted too."""
    logprobs: int = 0
    """Number of alternatives per token, the likeliest first; 0: only the token's own logprob."""
    prompt_logprobs: bool = False
    """Whether a Prompt with the log-probabilities of the prompt's tokens comes first."""
    constraint: Constraint | None = None
    """What the response may be; None: anything."""


class Token(NamedTuple):
    """A token and its log-probability (nats).

    It is the one of the model: at temperature 1, before truncation and constraint. `generate`
    reports that of the distribution drawn from, which is the same if the request is greedy, or has
    temperature 1 without truncation and constraint.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob), the likeliest first


class Prompt(NamedTuple):
    """The tokens of the prompt; emitted once, first, if `prompt_logprobs`."""

    tokens: tuple[Token, ...]  # the first has no logprob: nan


class End(NamedTuple):
    """The end of a response; emitted exactly once, last."""

    reason: Literal["stop", "length", "cancelled", "error"]
    message: str = ""  # of an error, in one line


Event = Prompt | Token | End
Emit = Callable[[Event], None]


class Full(Exception):
    """The engine's queue has no room for another request."""


class Closed(Exception):
    """The engine takes no more requests."""


def validate_request(request: Request, length: int, vocab_size: int) -> None:
    """Validates a request. Raises ConfigError.

    Args:
      length: tokens of prompt and response together, at most.
      vocab_size: number of ids that the model has embeddings of.
    """
    n = len(request.tokens)
    if not n:
        raise ConfigError("tokens: the prompt is empty, must have at least one token")
    if not (min(request.tokens) >= 0 and max(request.tokens) < vocab_size):
        raise ConfigError(f"tokens: every id must be >= 0 and < {vocab_size}")
    if request.max_tokens < 0:
        raise ConfigError(f"max_tokens={request.max_tokens}: must be >= 0")
    if n + request.max_tokens > length:
        raise ConfigError(
            f"a prompt of {n} and a response of {request.max_tokens} tokens "
            f"exceed the {length} tokens that there is room for"
        )
    if not 0 <= request.temperature < math.inf:
        raise ConfigError(
            f"temperature={request.temperature}: must be >= 0 (0: greedy)"
        )
    if not 0 < request.top_p <= 1:
        raise ConfigError(f"top_p={request.top_p}: must be > 0 and <= 1 (1: off)")
    if not 0 <= request.top_k < 2**31:
        raise ConfigError(
            f"top_k={request.top_k}: must be >= 0 and < 2147483648 (0: off)"
        )
    if not 0 <= request.min_p <= 1:
        raise ConfigError(f"min_p={request.min_p}: must be >= 0 and <= 1 (0: off)")
    if not 0 <= request.logprobs <= MOST_TOP:
        raise ConfigError(
            f"logprobs={request.logprobs}: must be >= 0 and <= {MOST_TOP}"
        )
