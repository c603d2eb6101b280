"""A model that is served: its engine, its tokenizer, and the settings of who gives none."""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.sampling import Sampling
from rlhfjax.sampling.structured import Form, Structures
from rlhfjax.serve.requests import Constraint, Emit, Request


@runtime_checkable
class Ticket(Protocol):
    """A request that an engine has taken."""

    def cancel(self) -> None: ...


@runtime_checkable
class AnyEngine(Protocol):
    """What the API needs of `engine.Engine`."""

    @property
    def length(self) -> int:
        """Tokens of prompt and response together, at most."""
        ...

    def submit(self, request: Request, emit: Emit) -> Ticket: ...

    def stats(self) -> Any: ...

    def close(self) -> None: ...


@dataclasses.dataclass
class Served:
    """A model with its name in the API."""

    name: str
    engine: AnyEngine
    tokenizer: Tokenizer
    sampling: Sampling
    """What a request leaves out: temperature, top_p, top_k, min_p, stop."""
    most_tokens: int | None = None
    """Tokens of a response, at most; None: those that there is room for."""
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    """Held while a prompt is rendered: chat templates keep what they have seen."""

    @property
    def length(self) -> int:
        """Tokens of prompt and response together, at most."""
        return self.engine.length

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes of each id; of a special token, those of its name."""
        texts = list(self.tokenizer.token_bytes())
        for name, token in self.tokenizer.template.specials.items():
            texts[token] = texts[token] or name.encode()
        return texts

    def bytes_of(self, token: int) -> bytes:
        """Returns the bytes of an id; none for ids that the tokenizer does not have."""
        return self.token_bytes[token] if token < len(self.token_bytes) else b""

    def text_of(self, token: int) -> str:
        r"""Returns the text of an id; as OpenAI, `bytes:\xe2\x82` for a part of a character."""
        text = self.bytes_of(token)
        try:
            return text.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)

    @functools.cached_property
    def structures(self) -> Structures:
        """Makes constraints. Raises ConfigError if `llguidance` is not installed."""
        return Structures(self.tokenizer)

    def constraint(self, form: Form | None) -> Callable[[], Constraint | None]:
        """Returns what makes the constraint of a response.

        Raises:
          ConfigError: the form is invalid.
        """
        if form is None:
            return lambda: None
        self.structures.constraint(form)
        return functools.partial(self.structures.constraint, form)
