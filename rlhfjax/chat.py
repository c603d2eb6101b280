"""A conversation with a model: turns, streamed responses, retry and undo.

`chat_terminal` is `rlhfjax chat`, which reads and prints them.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.chat_settings import validate_length, validate_template
from rlhfjax.data.chat import Message, render_prompt
from rlhfjax.data.padding import pad_left
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.device_bytes import validate_bytes
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.models.size import kv_cache_bytes, number_bytes
from rlhfjax.sampling import Sampling, stream
from rlhfjax.sampling.config import end_ids
from rlhfjax.sampling.detokenizer import Detokenizer
from rlhfjax.sampling.stop import until_stop
from rlhfjax.sampling.structured import Form, Structures

# A prompt of a new length, and a cache of a new one, is a new program to compile.
BUCKET = (
    64  # the shortest length that prompts are padded to; the others are its doubles
)
ENTRIES = 512  # of the smallest cache; the others have 4 times, 16 times, … as many


@dataclasses.dataclass
class Response:
    """How a response came about."""

    tokens: int = 0
    """Sampled tokens, the eos included."""
    seconds: float = 0.0
    """From the second token to the last: programs are compiled for the first two."""
    end: str = "stopped"
    """`eos`, `stop` (a stop text), `max_new_tokens`, or `stopped` from outside."""


class Prompt(NamedTuple):
    """What the model is given."""

    ids: np.ndarray  # int32 [t]
    dropped: int = 0  # oldest messages that are left out
    is_cut: bool = False  # the last message lost its beginning too


class Chat:
    """A conversation: the messages so far, and the model that responds.

    Args:
      system: system message that stands before the conversation; "" for none.
      note: is called with what a user should know while a response is made.
    Raises:
      ConfigError: the model does not write text, or its context is too short for a response.
      DataError: there is no chat template, or it takes no system message.
    """

    def __init__(
        self,
        saved: store.SavedModel,
        sampling: Sampling,
        *,
        seed: int,
        system: str = "",
        note: Callable[[str], None] = lambda text: None,
    ):
        if saved.model.head != "lm":
            raise ConfigError(
                f"chat: needs a language model, this one has a {saved.model.head} head"
            )
        self.model, self.params = saved.model, saved.params
        self.tokenizer, self.sampling = saved.tokenizer, sampling
        validate_length(self.context, sampling, "--")
        config = saved.model.config
        size = number_bytes(config)
        cache = kv_cache_bytes(config, 1, sampling.max_new_tokens, size)
        validate_bytes("chat", {"the KV cache": cache}, "--max_new_tokens")
        self._key, self._turns = jax.random.key(seed), 0
        self._note = note
        self._compiled: set[tuple[int, int]] = set()
        self.messages: list[Message] = []
        self.system = ""
        self.set_system(system)
        self._dropped = 0
        self._form: Form | None = None
        self.last = Response()

    @property
    def context(self) -> int:
        """Tokens that a prompt and its response have room for together."""
        return self.model.config.max_length

    def reset(self) -> None:
        """Forgets the conversation, but not the system message."""
        self.messages = []
        self._dropped = 0

    def set_system(self, text: str) -> None:
        """Replaces the system message; "" removes it.

        Raises:
          DataError: the chat template takes no system message.
        """
        validate_template(self.tokenizer, text)
        self.system = text

    def set_sampling(self, **changes: Any) -> None:
        """Changes settings of the sampler.

        Raises:
          ConfigError: a setting is out of its range; nothing is changed.
        """
        sampling = dataclasses.replace(self.sampling, **changes)
        validate_length(self.context, sampling)
        self.sampling = sampling

    @functools.cached_property
    def _structures(self) -> Structures:
        return Structures(self.tokenizer)

    def set_form(self, form: Form | None) -> None:
        """Sets what responses must be; None: anything.

        Raises:
          ConfigError: the form is invalid, or `llguidance` is not installed; nothing is changed.
        """
        if form is not None:
            self._structures.constraint(form)
        self._form = form

    def undo(self) -> str:
        """Removes the last turn of the user and what follows it. Returns its text; "" if none."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return ""

    def respond(self, text: str) -> Iterator[str]:
        """Yields the pieces of the response as they come, and adds both turns to the messages.

        When the generator is closed early, the pieces so far are the response; a turn without any
        is removed again.

        Raises:
          DataError: the chat template does not take the messages, or there is no room for them.
        """
        self.messages.append({"role": "user", "content": text})
        self.last = Response()
        pieces: list[str] = []
        decoded = decode_stream(self.tokenizer, self._sampled())
        try:
            for piece in until_stop(decoded, self.sampling.stop):
                pieces.append(piece)
                yield piece
            if self.last.end == "stopped":  # nothing more was asked for
                self.last.end = "stop"
        finally:
            if pieces or self.last.end in ("eos", "stop"):
                content = "".join(pieces)
                self.messages.append({"role": "assistant", "content": content})
            else:
                self.undo()

    def _sampled(self) -> Iterator[int]:
        """Yields the tokens of a response without the one that ends it; fills `self.last`."""
        tokens, attention_mask = self._padded(self._noted_prompt())
        key = jax.random.fold_in(self._key, self._turns)
        self._turns += 1
        self._note_compiling(tokens.shape[1])
        start = 0.0
        structure = self._form and self._structures.constraint(self._form)
        for token in stream(
            self.model,
            self.params,
            jnp.asarray(tokens),
            jnp.asarray(attention_mask),
            key,
            self.sampling,
            entries=self._entries(tokens.shape[1]),
            structure=structure,
        ):
            self.last.tokens += 1
            if self.last.tokens == 2:
                start = time.monotonic()
            elif self.last.tokens > 2:
                self.last.seconds = time.monotonic() - start
            if token in end_ids(self.sampling):
                self.last.end = "eos"
                return
            yield token
        is_whole = structure is not None and structure.is_complete
        self.last.end = "eos" if is_whole else "max_new_tokens"

    def _note_compiling(self, length: int) -> None:
        program = (length, self.sampling.max_new_tokens)
        if program not in self._compiled:
            self._compiled.add(program)
            self._note(f"compiling for prompts of up to {length} tokens…")

    def prompt(self) -> Prompt:
        """Returns the conversation as tokens; the oldest turns go if it is too long.

        Raises:
          DataError: the chat template does not take the messages, or there is no room for them.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        room = self.context - self.sampling.max_new_tokens
        ids = render_prompt(self.tokenizer, [*system, *self.messages], max_tokens=room)
        starts = [i for i, turn in enumerate(self.messages) if turn["role"] == "user"]
        for start in starts:
            kept = [*system, *self.messages[start:]]
            if np.array_equal(render_prompt(self.tokenizer, kept), ids):
                return Prompt(ids, dropped=start)
        if not starts:
            return Prompt(ids)
        return Prompt(ids, dropped=starts[-1], is_cut=True)

    def _noted_prompt(self) -> np.ndarray:
        """Returns the prompt; notes what is new of what it leaves out."""
        prompt = self.prompt()
        room = self.context - self.sampling.max_new_tokens
        if prompt.dropped > self._dropped:
            self._note(
                f"the conversation is longer than the {room} tokens that there is room for: "
                f"the oldest {prompt.dropped} messages are left out"
            )
        self._dropped = prompt.dropped
        if prompt.is_cut:
            self._note(
                f"your message alone is longer than the {room} tokens that there is room for: "
                "its beginning is left out"
            )
        return prompt.ids

    def _padded(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns a prompt left-padded to one of a few lengths, and its attention mask."""
        room = self.context - self.sampling.max_new_tokens
        length = BUCKET
        while length < len(ids):
            length *= 2
        length = min(room, length)
        return pad_left([ids], length=length, pad_id=self.tokenizer.pad_id)

    def _entries(self, length: int) -> int:
        """Returns how many entries the cache has for prompts padded to a length."""
        entries = ENTRIES
        while entries < length + self.sampling.max_new_tokens - 1:
            entries *= 4
        return min(self.context, entries)


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yields text as its tokens arrive; bytes of an unfinished character are held back."""
    detokenizer = Detokenizer(tokenizer)
    for token in ids:
        if piece := detokenizer.push(token):
            yield piece
    if rest := detokenizer.rest():
        yield rest
