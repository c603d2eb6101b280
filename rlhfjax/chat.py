"""A conversation with a model in the terminal: turns, streamed tokens, `/reset`, `/quit`."""

import io
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import capacity
from rlhfjax.data.chat import Message, render_prompt
from rlhfjax.data.padding import pad_left
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import make_layout
from rlhfjax.paths import Path
from rlhfjax.redact import printable
from rlhfjax.sampling import Sampling, stream

BUCKET = 32  # prompts are padded to multiples of this, so that few lengths are compiled
HELP = "/reset forgets the conversation, /quit ends it"


class Chat:
    """A conversation: the messages so far, and the model that responds."""

    def __init__(self, saved: store.SavedModel, sampling: Sampling, *, seed: int):
        if saved.model.head != "lm":
            raise ConfigError(
                f"chat: needs a language model, this one has a {saved.model.head} head"
            )
        max_length = saved.model.config.max_length
        if sampling.max_new_tokens >= max_length:
            raise ConfigError(
                f"--max_new_tokens={sampling.max_new_tokens}: "
                f"must be less than the model's context of {max_length}"
            )
        cache = capacity.cache_bytes(saved.model.config, 1, sampling.max_new_tokens)
        needed = {"the KV cache": cache}
        capacity.validate_bytes("chat", needed, "--max_new_tokens")
        self.model, self.params = saved.model, saved.params
        self.tokenizer, self.sampling = saved.tokenizer, sampling
        self._key, self._turns = jax.random.key(seed), 0
        self.messages: list[Message] = []

    def reset(self) -> None:
        self.messages = []

    def respond(self, text: str) -> Iterator[str]:
        """Yields the pieces of the response as they come, and adds both turns to the messages."""
        self.messages.append({"role": "user", "content": text})
        tokens, attention_mask = self._prompt()
        key = jax.random.fold_in(self._key, self._turns)
        self._turns += 1
        ids = stream(
            self.model,
            self.params,
            jnp.asarray(tokens),
            jnp.asarray(attention_mask),
            key,
            self.sampling,
        )
        pieces = []
        for piece in decode_stream(self.tokenizer, ids):
            pieces.append(piece)
            yield piece
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _prompt(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the conversation, left-padded; the oldest turns go if it is too long."""
        room = self.model.config.max_length - self.sampling.max_new_tokens
        ids = render_prompt(self.tokenizer, self.messages, max_tokens=room)
        length = min(room, -(-len(ids) // BUCKET) * BUCKET)
        return pad_left([ids], length=length, pad_id=self.tokenizer.pad_id)


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yields text as its tokens arrive; bytes of an unfinished character are held back."""
    seen, shown = [], 0
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)
        if not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
    rest = tokenizer.decode(seen)[shown:]
    if rest:
        yield rest


def run(
    path: str | Path,
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    int8: bool = False,
    inputs: io.TextIOBase | None = None,
    out: io.TextIOBase | None = None,
) -> None:
    """Responds to one line after the other, until the input ends.

    Args:
      path: a model's folder or workdir, or a foreign name (see `interop.foreign`).
      int8: whether weights and cache are int8.
    Raises:
      CheckpointError: there is no model.
    """
    source: Any = inputs or sys.stdin
    target: Any = out or sys.stdout
    if source is sys.stdin and sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history)
    saved = store.load(path, make_layout())
    saved = store.int8(saved) if int8 else saved
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        eos_id=saved.tokenizer.eos_id,
        pad_id=saved.tokenizer.pad_id,
        temperature=temperature,
    )
    chat = Chat(saved, sampling, seed=seed)
    print(f"{store.found(path)}  ({HELP})", file=target)
    for line in _lines(source, target):
        if line == "/quit":
            return
        if line == "/reset":
            chat.reset()
            print("(a new conversation)", file=target)
        elif line.startswith("/"):
            print(f"({printable(line)} is unknown: {HELP})", file=target)
        elif line:
            for piece in chat.respond(line):
                print(_shown(piece), end="", file=target, flush=True)
            print(file=target)


def _shown(piece: str) -> str:
    """Returns a piece of a response without the escapes that a terminal would obey."""
    return "".join(char if char in "\n\t" else printable(char) for char in piece)


def _lines(source: Any, target: Any) -> Iterator[str]:
    """Yields the lines of the input, with a prompt before each if it is a terminal."""
    if source is sys.stdin:
        try:
            while True:
                yield input("> ").strip()
        except EOFError:
            print(file=target)
    else:
        yield from (line.strip() for line in source)
