"""The pieces that a rendered conversation is cut into, and placeholders that show the cuts."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence

from rlhfjax.data.thoughts import Shape, Turn

# Valid text has no lone surrogates, so templates and messages cannot contain these marks.
_OPEN, _CLOSE, RESPONSE = "\ud800", "\ud801", "\ud802"
FIRST_CODE = 0xD810  # characters from here on stand for special tokens
SURROGATE = re.compile("[\ud800-\udfff]")
_EDGE = "\u2003"  # a blank that trimming removes and that no template writes
PLACEHOLDER = f"{_EDGE}?{_OPEN}t?[0-9]{{1,9}}{_CLOSE}{_EDGE}?"
# Unicode's White_Space, which a special that swallows blanks swallows.
BLANKS = "".join(c for c in map(chr, range(0x3001)) if c.isspace()).translate(
    dict.fromkeys(range(0x1C, 0x20))
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a rendered conversation: template text, a special token, or text of a message."""

    text: str = ""
    token: int | None = None
    message: int | None = None
    """Index of the message whose content stands here: its thought, or its answer."""
    thought: bool = False
    trim: tuple[bool, bool] = (False, False)
    """Whether the content loses blanks on the left, and on the right."""
    response: int | None = None
    """Index of the message that the assistant has to produce with it; None: of none."""

    @property
    def learned(self) -> bool:
        """Whether the assistant has to produce it."""
        return self.response is not None

    def fill(self, turns: Sequence[Turn]) -> str:
        """Returns the text of this piece."""
        if self.message is None:
            return self.text
        turn = turns[self.message]
        content = turn.thought if self.thought else turn.answer
        content = content.lstrip() if self.trim[0] else content
        return content.rstrip() if self.trim[1] else content


def placeholder(message: int, *, thought: bool = False) -> str:
    """Returns what a message's content, or its thought, is rendered as to find where it stands."""
    name = f"t{message}" if thought else f"{message}"
    return f"{_EDGE}{_OPEN}{name}{_CLOSE}{_EDGE}"


def content_piece(part: str, response: int | None) -> Piece | None:
    """Returns the piece of a rendered placeholder; None for any other text."""
    if not re.fullmatch(PLACEHOLDER, part):
        return None
    name = part.strip(_EDGE)[1:-1]
    return Piece(
        message=int(name.removeprefix("t")),
        thought=name.startswith("t"),
        trim=(not part.startswith(_EDGE), not part.endswith(_EDGE)),
        response=response,
    )


def responses(pieces: Iterable[Piece]) -> dict[int, tuple[Piece, ...]]:
    """Returns what is learned of each response, by the index of its message."""
    runs = itertools.groupby(pieces, key=lambda piece: piece.response)
    return {message: tuple(run) for message, run in runs if message is not None}


def spelled(
    pieces: Iterable[Piece], codes: dict[int, str], swallows: frozenset[int]
) -> str:
    """Returns the text of pieces without contents, with a character for each special token.

    Args:
      swallows: the specials that swallow the blanks after them.
    """
    text = ""
    swallowing = False
    for piece in pieces:
        if piece.token is not None:
            text += codes[piece.token]
            swallowing = piece.token in swallows
        elif kept := piece.text.lstrip(BLANKS) if swallowing else piece.text:
            text += kept
            swallowing = False
    return text


def sequences(roles: Sequence[str], longest: int) -> Iterable[tuple[Shape, ...]]:
    """Returns all sequences of roles up to a length, of turns without thoughts."""
    shapes = [Shape(role) for role in roles]
    return itertools.chain.from_iterable(
        itertools.product(shapes, repeat=n) for n in range(longest + 1)
    )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the common prefix of two sequences."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
