"""Stop texts: a response ends before the first of them, wherever its tokens are cut."""

from collections.abc import Iterable, Iterator, Sequence

from rlhfjax.data.tokenizer import Tokenizer


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Returns where the first stop text in a text begins; None if there is none.

    The first one is that which is complete first, and of several the longest. So it does not depend
    on what follows.
    """
    places = [(text.find(end), end) for end in stop]
    found = [(place + len(end), place) for place, end in places if place >= 0]
    return min(found)[1] if found else None


def cut_ids(tokenizer: Tokenizer, ids: list[int], stop: Sequence[str]) -> list[int]:
    """Returns the ids of a response before its first stop text; all if there is none.

    They decode to the text before the stop text. If a token holds the beginning of the stop text
    ("4.\\n" and stop "\\n"), what precedes it is encoded again, so the last ids may not have
    been sampled. A tokenizer that would put a blank before it loses it.
    """
    text = tokenizer.decode(ids)
    end = find_stop(text, stop)
    if end is None:
        return ids
    n = _count_within(tokenizer, ids, text[:end])
    begun = text[len(tokenizer.decode(ids[:n])) : end]
    cut = [*ids[:n], *tokenizer.encode(begun)]
    return cut if tokenizer.decode(cut) == text[:end] else ids[:n]


def _count_within(tokenizer: Tokenizer, ids: list[int], text: str) -> int:
    """Returns how many ids, from the first one on, spell a beginning of the text."""
    low, high = 0, len(ids)
    # More ids never have a shorter text.
    while low < high:
        middle = (low + high + 1) // 2
        if len(tokenizer.decode(ids[:middle])) <= len(text):
            low = middle
        else:
            high = middle - 1
    # The last character may be incomplete.
    while not text.startswith(tokenizer.decode(ids[:low])):
        low -= 1
    return low


class StopFinder:
    """Looks for the first stop text in a text that comes in pieces.

    What may be the beginning of a stop text is held back until the next piece decides.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop, self._held = stop, ""
        self.is_found = False
        """Whether a stop text came; no more pieces are needed then."""

    def push(self, piece: str) -> str:
        """Takes a piece; returns what is certain to stand before a stop text."""
        self._held += piece
        end = find_stop(self._held, self._stop)
        if end is not None:
            self.is_found = True
            return self._taken(end)
        return self._taken(len(self._held) - _begun(self._held, self._stop))

    def rest(self) -> str:
        """Returns what was held back, once no more pieces come."""
        return "" if self.is_found else self._taken(len(self._held))

    def _taken(self, size: int) -> str:
        shown, self._held = self._held[:size], self._held[size:]
        return shown


def until_stop(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Yields pieces of a text until the first stop text, as `StopFinder` finds it.

    After the stop text no more pieces are asked for.
    """
    finder = StopFinder(stop)
    for piece in pieces:
        if shown := finder.push(piece):
            yield shown
        if finder.is_found:
            return
    if rest := finder.rest():
        yield rest


def _begun(text: str, stop: Sequence[str]) -> int:
    """Returns the length of the longest end of a text with which a stop text begins."""
    longest = min(len(text), max((len(end) for end in stop), default=0))
    for size in range(longest, 0, -1):
        if any(end.startswith(text[-size:]) for end in stop):
            return size
    return 0
