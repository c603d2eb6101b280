"""A conversation with a model in the terminal: several turns, tokens as they are drawn, `/reset`, `/quit`."""

import io
import sys
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.data.chat import Message, render_prompt
from rlhfjax.data.padding import pad_left
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import make_layout
from rlhfjax.paths import Path
from rlhfjax.sampling.generate import stream

BUCKET = 32  # prompts are padded to multiples of this, so that few lengths are compiled
HELP = "/reset forgets the conversation, /quit ends it"


class Chat:
    """One conversation: the messages so far and the model that answers."""

    def __init__(
        self,
        saved: store.SavedModel,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
    ):
        if saved.model.head != "lm":
            raise ConfigError(
                f"chat: this model has a {saved.model.head} head and cannot speak"
            )
        if max_new_tokens >= saved.model.config.max_length:
            raise ConfigError(
                f"--max_new_tokens={max_new_tokens} leaves no room in a context of {saved.model.config.max_length}"
            )
        self.model, self.params = saved.model, saved.params
        self.tokenizer = saved.tokenizer
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self._key, self._turns = jax.random.key(seed), 0
        self.messages: list[Message] = []

    def reset(self) -> None:
        self.messages = []

    def answer(self, text: str) -> Iterator[str]:
        """Yields the pieces of the answer as they come, and remembers the turn."""
        self.messages.append({"role": "user", "content": text})
        tokens, segments = self._prompt()
        key = jax.random.fold_in(self._key, self._turns)
        self._turns += 1
        limits = {
            "max_new_tokens": self.max_new_tokens,
            "eos_id": self.tokenizer.eos_id,
        }
        rows = (jnp.asarray(tokens), jnp.asarray(segments))
        drawn = stream(
            self.model, self.params, *rows, key, temperature=self.temperature, **limits
        )
        pieces = []
        for piece in decode_stream(self.tokenizer, drawn):
            pieces.append(piece)
            yield piece
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _prompt(self) -> tuple[np.ndarray, np.ndarray]:
        """The conversation as one left-padded row; its oldest turns go when the context is full."""
        room = self.model.config.max_length - self.max_new_tokens
        ids = render_prompt(self.tokenizer, self.messages, max_tokens=room)
        length = min(room, -(-len(ids) // BUCKET) * BUCKET)
        return pad_left([ids], length=length, pad_id=self.tokenizer.pad_id)


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text as its tokens arrive; bytes of an unfinished character are held back."""
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
    """Reads a line, answers it, until the end of the input.

    Args:
      path: a model's folder or workdir, or a foreign name (see `interop.foreign`).
      int8: whether its weights and its cache are int8.
    Raises:
      CheckpointError: there is no model.
    """
    inputs, out = inputs or sys.stdin, out or sys.stdout
    if inputs is sys.stdin and sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history)
    layout = make_layout()
    saved = store.load(path, layout)
    saved = store.int8(saved) if int8 else saved
    chat = Chat(
        saved, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed
    )
    print(f"{store.found(path)}  ({HELP})", file=out)
    for line in _lines(inputs, out):
        if line == "/quit":
            return
        if line == "/reset":
            chat.reset()
            print("(a new conversation)", file=out)
        elif line.startswith("/"):
            print(f"({line} is unknown: {HELP})", file=out)
        elif line:
            for piece in chat.answer(line):
                print(piece, end="", file=out, flush=True)
            print(file=out)


def _lines(inputs: io.TextIOBase, out: io.TextIOBase) -> Iterator[str]:
    if inputs is sys.stdin:
        try:
            while True:
                yield input("> ").strip()
        except EOFError:
            print(file=out)
    else:
        yield from (line.strip() for line in inputs)
