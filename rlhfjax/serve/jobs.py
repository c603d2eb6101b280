"""A request that was submitted, and the lane that it runs in; on the host."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import takewhile

import numpy as np

from rlhfjax.sampling.lanes import Drawn
from rlhfjax.serve.requests import Constraint, Emit, End, Event, Prompt, Request, Token

UNSCORED = Token(id=-1, logprob=math.nan)


class Ticket:
    """A request that was submitted."""

    def __init__(self, request: Request, emit: Emit, wake: Callable[[], None]):
        self.request = request
        self.is_cancelled = False
        self._emit, self._wake = emit, wake

    def cancel(self) -> None:
        """Ends the request soon, with the reason "cancelled", unless it has ended already."""
        self.is_cancelled = True
        self._wake()

    def emit(self, event: Event) -> None:
        """Passes an event on; called by the engine alone."""
        self._emit(event)


@dataclasses.dataclass
class Lane:
    """A row of the cache: the tokens that its first entries hold, and the request that it runs."""

    index: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    """Prompt and response so far; of a free lane, the tokens that are in the cache."""
    cached: int = 0
    """How many of the tokens are in the cache."""
    ticket: Ticket | None = None
    """None: the lane is free."""
    taken: int = 0
    """Grows from request to request: when the lane was taken last."""
    is_reported: bool = False
    """Whether the engine has seen that the prompt is in the cache."""
    scores: list[Token] = dataclasses.field(default_factory=list)
    """The prompt's tokens with their log-probabilities, where they are asked for."""

    @property
    def request(self) -> Request:
        """The request that the lane runs."""
        assert self.ticket is not None
        return self.ticket.request

    @property
    def drawn(self) -> int:
        """Number of tokens of the response so far."""
        return len(self.tokens) - len(self.request.tokens)

    @property
    def rest(self) -> list[int]:
        """The tokens of the prompt that are not in the cache; the last one is run by decoding."""
        return self.tokens[self.cached :]

    @property
    def is_prefilling(self) -> bool:
        """Whether some of the prompt is not in the cache."""
        return self.ticket is not None and self.cached < len(self.tokens) - 1

    @property
    def is_decoding(self) -> bool:
        """Whether the lane is ready for the next token, and there is one."""
        if self.ticket is None or self.is_prefilling:
            return False
        return self.drawn < self.request.max_tokens

    def take(self, ticket: Ticket, order: int) -> int:
        """Takes a request. Returns the number of its tokens that are in the cache already."""
        request = ticket.request
        common = self.common(request.tokens)
        self.cached = 0 if request.prompt_logprobs else common
        self.tokens = list(request.tokens)
        self.ticket, self.taken, self.is_reported = ticket, order, False
        self.scores = [UNSCORED._replace(id=self.tokens[0])]
        return self.cached

    def free(self) -> None:
        """Gives the request up, and keeps what is in the cache."""
        del self.tokens[self.cached :]
        self.ticket = None

    def common(self, prompt: Sequence[int]) -> int:
        """Returns how many tokens in the cache a prompt begins with, its last one left out."""
        pairs = zip(self.tokens[: self.cached], prompt[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def score(self, drawn: Drawn, count: int) -> None:
        """Adds the log-probabilities of the prompt's next tokens, the first rows."""
        alternatives = self.request.logprobs
        self.scores += [token_of(drawn, row, alternatives) for row in range(count)]

    def prompt(self) -> Prompt:
        """Returns the prompt's log-probabilities."""
        return Prompt(tuple(self.scores))

    def draw(self, drawn: Drawn) -> tuple[Token, End | None]:
        """Adds the next token of the response. Returns it, and the end if it is the last.

        Raises:
          ValueError: the model's output is not finite, or the constraint does not take the token.
        """
        token = token_of(drawn, self.index, self.request.logprobs)
        if math.isnan(token.logprob):
            raise ValueError("the model's output is not finite")
        self.cached += 1
        self.tokens.append(token.id)
        return token, self._end(token.id)

    def _end(self, token: int) -> End | None:
        request = self.request
        if token in request.stop_ids:
            return End("stop")
        if request.constraint is not None:
            request.constraint.accept(token)
            if request.constraint.is_complete:
                return End("stop")
        return End("length") if self.drawn >= request.max_tokens else None


def best_lane(free: Sequence[Lane], prompt: Sequence[int]) -> Lane:
    """Returns the free lane that has most of a prompt, of equal ones the one unused for longest."""
    return max(free, key=lambda lane: (lane.common(prompt), -lane.taken))


def best_source(lanes: Sequence[Lane], lane: Lane) -> tuple[Lane, int]:
    """Returns the lane that has most of another's prompt in the cache, and how much it has."""
    source = max(lanes, key=lambda other: other.common(lane.tokens))
    return source, source.common(lane.tokens)


def token_of(drawn: Drawn, row: int, alternatives: int) -> Token:
    """Returns a token of what was drawn."""
    ids = drawn.top[row, :alternatives].tolist()
    logprobs = drawn.top_logprob[row, :alternatives].tolist()
    top = tuple(zip(ids, logprobs, strict=True))
    return Token(int(drawn.token[row]), float(drawn.logprob[row]), top)


def packed_mask(constraint: Constraint, words: int) -> np.ndarray:
    """Returns the ids that a constraint allows, as 32-bit words.

    Raises:
      ValueError: it allows none.
    """
    mask = np.asarray(constraint.mask()).reshape(-1)
    if mask.dtype == np.bool_:
        padded = np.zeros(32 * words, bool)
        padded[: mask.size] = mask[: padded.size]
        packed = np.packbits(padded, bitorder="little").view(np.uint32)
    else:
        packed = np.zeros(words, np.uint32)
        packed[: mask.size] = mask[:words].view(np.uint32)
    if not packed.any():
        raise ValueError("the constraint allows no token")
    return packed
