"""Tokens to text as they arrive, in the same time for every token."""

from rlhfjax.data.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # how bytes of an unfinished character are decoded


class Detokenizer:
    """Decodes the tokens of one response; the pieces of text are those of the whole.

    Some tokenizers write a word's blank only if something stands before it. So the new tokens are
    decoded together with those of the piece before them. Bytes of an unfinished character are held
    back until it is finished.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._before: list[int] = []  # tokens of the last piece
        self._new: list[int] = []  # tokens that no piece has yet

    def push(self, token: int) -> str:
        """Takes a token; returns the text that it finishes, which may be empty."""
        self._new.append(token)
        text = self._text()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._before, self._new = self._new, []
        return text

    def rest(self) -> str:
        """Returns what was held back, once no more tokens come."""
        text = self._text()
        self._before, self._new = self._new, []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode([*self._before, *self._new])[len(before) :]
