"""From the ids of a rendered conversation back to its turns."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping

from rlhfjax.data import thoughts
from rlhfjax.data.pieces import FIRST_CODE, SURROGATE, Piece, spelled

Separator = tuple[Piece, ...]
"""What a template writes between two contents."""


class Reader:
    """Reads the turns of ids that a template rendered.

    Args:
      speakers: the role that speaks after each separator; None after the end of a turn that nobody
        follows.
      specials: text of each special token -> id.
      swallows: ids of specials that swallow the blanks after them.
      decode: returns the text of some ids.
    """

    def __init__(
        self,
        speakers: Mapping[Separator, str | None],
        *,
        specials: Mapping[str, int],
        swallows: frozenset[int],
        decode: Callable[[list[int]], str],
    ):
        self._decode = decode
        pieces = itertools.chain.from_iterable(speakers)
        used = {piece.token for piece in pieces if piece.token is not None}
        # A character per special token.
        self._codes = {
            token: chr(FIRST_CODE + i) for i, token in enumerate(sorted(used))
        }
        roles = {
            spelled(separator, self._codes, swallows): role
            for separator, role in speakers.items()
        }
        roles |= self._after_cut_responses(roles)
        longest_first = sorted(filter(None, roles), key=len, reverse=True)
        self._roles = {text: roles[text] for text in longest_first}
        patterns = "|".join(map(self._found, self._roles)) or "(?!)"
        self._pattern = re.compile(f"({patterns})")
        self._marks = {
            self._codes[specials[mark]]: mark
            for mark in thoughts.MARKS
            if specials.get(mark) in self._codes
        }

    @property
    def tokens(self) -> frozenset[int]:
        """The special tokens of the separators."""
        return frozenset(self._codes)

    @property
    def plain_markers(self) -> list[str]:
        """The markers that a message can spell: those of a turn without a special token."""
        texts = [text.strip() for text, role in self._roles.items() if role]
        return [text for text in texts if len(text) > 1 and not SURROGATE.search(text)]

    def messages(self, ids: Iterable[int]) -> list[dict[str, str]]:
        """Returns the turns, see `Template.messages`."""
        text = ""
        for code, run in itertools.groupby((int(i) for i in ids), key=self._codes.get):
            tokens = list(run)
            text += code * len(tokens) if code else self._decode(tokens)
        first, *rest = self._pattern.split(text)
        turns = [{"role": "user", "content": first}] if first.strip() else []
        for separator, content in zip(rest[::2], rest[1::2], strict=True):
            role = self._roles[separator]
            if role or not turns:
                turns.append({"role": role or "user", "content": content})
            else:
                turns[-1]["content"] += content
        for turn in turns:
            turn["content"] = self._without_codes(turn["content"])
        return turns

    def _after_cut_responses(
        self, roles: Mapping[str, str | None]
    ) -> dict[str, str | None]:
        """Returns the openings of turns that follow at once a response that was cut off."""
        codes = self._codes.values()
        ends = [text for text, role in roles.items() if text and role is None]
        ends.sort(key=len, reverse=True)
        openings: dict[str, str | None] = {}
        for text, role in roles.items():
            end = next((end for end in ends if text.startswith(end)), None)
            opening = text.removeprefix(end) if end else ""
            if opening and opening[0] in codes and opening not in roles:
                openings.setdefault(opening, role)
        return openings

    def _found(self, separator: str) -> str:
        """Returns the pattern of a separator.

        The end of a turn without a special token, a newline say, is one at the very end only.
        """
        is_plain_end = self._roles[separator] is None and not SURROGATE.search(
            separator
        )
        return re.escape(separator) + (r"\Z" if is_plain_end else "")

    def _without_codes(self, text: str) -> str:
        """Returns a content with the marks of thoughts spelled, and without other specials."""
        for code, mark in self._marks.items():
            text = text.replace(code, mark)
        return SURROGATE.sub("", text)
