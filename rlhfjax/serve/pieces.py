"""The text of one response as its tokens come: whole characters, up to the first stop text."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.sampling.detokenizer import Detokenizer
from rlhfjax.sampling.stop import StopFinder
from rlhfjax.serve.requests import Token


class Placed(NamedTuple):
    """A token, and where its text begins in the text of the response."""

    token: Token
    offset: int  # characters


class Piece(NamedTuple):
    """A piece of a response."""

    text: str = ""
    tokens: tuple[Placed, ...] = ()  # those whose text begins in it, or before the next


class TextStream:
    """Makes pieces of the tokens of one response.

    Text that may be the beginning of a stop text is held back, and its tokens with it. The pieces
    together are the text before the first stop text, and the tokens that begin in it.

    Args:
      stop: texts that end the response.
      ends: ids that end it; they have no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        ends: frozenset[int] = frozenset(),
    ):
        self._detokenizer, self._finder = Detokenizer(tokenizer), StopFinder(stop)
        self._ends = ends
        self._decoded = self._shown = 0  # characters
        self._held: list[Placed] = []

    @property
    def is_stopped(self) -> bool:
        """Whether a stop text came: no more tokens are needed."""
        return self._finder.is_found

    def push(self, token: Token) -> Piece:
        """Takes a token; returns what is certain to belong to the response."""
        self._held.append(Placed(token, self._decoded))
        if token.id in self._ends:
            return Piece()
        return self._piece(self._finder.push(self._counted(token.id)))

    def rest(self) -> Piece:
        """Returns what was held back, once no more tokens come."""
        if self.is_stopped:
            return Piece()
        text = self._detokenizer.rest()
        self._decoded += len(text)
        shown = self._finder.push(text)
        piece = self._piece(shown + self._finder.rest())
        if self.is_stopped:
            return piece
        held, self._held = self._held, []
        return Piece(piece.text, (*piece.tokens, *held))

    def _counted(self, token: int) -> str:
        text = self._detokenizer.push(token)
        self._decoded += len(text)
        return text

    def _piece(self, text: str) -> Piece:
        """Returns a text with the tokens that begin in it."""
        self._shown += len(text)
        count = sum(placed.offset < self._shown for placed in self._held)
        tokens, self._held = self._held[:count], self._held[count:]
        return Piece(text, tuple(tokens))


def joined(pieces: Iterable[Piece]) -> Piece:
    """Returns pieces as one."""
    pieces = list(pieces)
    text = "".join(piece.text for piece in pieces)
    tokens = [placed for piece in pieces for placed in piece.tokens]
    return Piece(text, tuple(tokens))


def whole(tokenizer: Tokenizer, tokens: Sequence[Token]) -> Piece:
    """Returns tokens as one piece, such as those of a prompt."""
    stream = TextStream(tokenizer)
    return joined([*map(stream.push, tokens), stream.rest()])
