"""Structured output: which tokens may follow, so that a response has a given form.

A form is a JSON schema, a regular expression or a choice of texts. The package `llguidance` decides
which tokens may follow those of the response so far, in about 50 microseconds per token.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhfjax import json_text
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError, DataError, first_line, install
from rlhfjax.sampling.config import end_ids

# Without a limit, a model that likes blanks writes them until it is cut.
_BLANKS: Any = {"whitespace_pattern": r"[ \n]{0,16}"}


class Form(NamedTuple):
    """What a response must be."""

    kind: Literal["json", "regex", "choice"]
    value: Any  # a JSON schema, an expression (Rust's syntax, the whole response), or texts


ANY_OBJECT = Form("json", {"type": "object"})


class Structures:
    """Makes the constraints of responses that a tokenizer spells.

    Raises:
      ConfigError: the package `llguidance` is not installed.
    """

    def __init__(self, tokenizer: Tokenizer):
        validate_installed()
        from llguidance import LLTokenizer, TokenizerWrapper

        vocabulary = TokenizerWrapper(_Vocabulary(tokenizer))
        self._tokenizer = LLTokenizer(vocabulary, eos_token=list(end_ids(tokenizer)))

    def constraint(self, form: Form) -> "Structure":
        """Returns the constraint of one response.

        Raises:
          ConfigError: the form is invalid, or larger than the limits of `llguidance`.
        """
        from llguidance import LLMatcher

        grammar = _grammar(form)
        if mistake := LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise ConfigError(f"{form.kind}: {_in_one_line(mistake)}")
        return Structure(LLMatcher(self._tokenizer, grammar, log_level=0))


class Structure:
    """Which tokens may follow in one response; a `serve.requests.Constraint`."""

    def __init__(self, matcher: Any):
        self._matcher = matcher
        self._validate()

    def mask(self) -> np.ndarray:
        """Returns which ids may follow, uint32 [ceil(v / 32)]: id i is bit i % 32 of word i // 32.

        The ids that end a response may follow where it is whole.

        Raises:
          ConfigError: the form is too large for the limits of `llguidance`.
        """
        bits = self._matcher.compute_bitmask()
        self._validate()
        return np.frombuffer(bits, np.dtype("<u4"))

    def allowed(self, vocab_size: int) -> np.ndarray:
        """Returns `mask` as bool [vocab_size]."""
        bits = np.unpackbits(self.mask().view(np.uint8), bitorder="little")
        allowed = np.zeros(vocab_size, bool)
        n = min(vocab_size, len(bits))
        allowed[:n] = bits[:n]
        return allowed

    def accept(self, token: int) -> None:
        """Takes the token that was drawn. Raises ConfigError if it may not follow."""
        self._matcher.consume_token(token)
        self._validate()

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow but the end of the response."""
        return self._matcher.is_stopped()

    def _validate(self) -> None:
        if self._matcher.is_error():
            reason = _in_one_line(self._matcher.get_error())
            raise ConfigError(f"structured output: {reason}")


def validate_installed() -> None:
    """Raises ConfigError if the package `llguidance` is missing."""
    if importlib.util.find_spec("llguidance") is None:
        raise ConfigError(
            "structured output: the package llguidance is not installed; "
            + install("serve")
        )


class _Vocabulary:
    """A tokenizer as `llguidance` takes it."""

    def __init__(self, tokenizer: Tokenizer):
        self._encode = tokenizer.encode
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = tokenizer.token_bytes()
        self.special_token_ids = [i for i, text in enumerate(self.tokens) if not text]

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _grammar(form: Form) -> str:
    """Returns a form as `llguidance` takes it. Raises ConfigError."""
    from llguidance import LLMatcher

    if form.kind == "regex":
        return LLMatcher.grammar_from_regex(form.value)
    if form.kind == "choice":
        return LLMatcher.grammar_from_lark(_alternatives(form.value))
    try:
        return LLMatcher.grammar_from_json_schema(form.value, overrides=_BLANKS)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"json: {first_line(error)}") from None


def _alternatives(texts: Sequence[str]) -> str:
    """Returns a grammar in Lark's syntax whose words are some texts."""
    if not texts or "" in texts:
        raise ConfigError("choice: expected texts, none of them empty")
    try:
        return "start: " + " | ".join(json_text.encode(text, "") for text in texts)
    except (UnicodeEncodeError, DataError) as error:
        raise ConfigError(f"choice: {first_line(error)}") from None


def _in_one_line(message: str) -> str:
    """Returns a message of `llguidance`, whose first line says where and whose last says what."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("error:")]
    return reasons[0] if reasons else first_line(message)
