"""The chat template: messages to tokens, with the loss on the assistant's tokens.

    <bos> <|user|> Hi! <eos> <|assistant|> Hello. <eos> <|user|> ...

Every turn ends with eos, which is what the sampler stops on; bos stands once, at the start. Markers are single ids
that `Tokenizer.encode` never produces from text, so a message cannot open a turn of its own.
"""

from collections.abc import Sequence

import numpy as np

from rlhfjax.data.tokenizer import ASSISTANT, SYSTEM, USER, Tokenizer
from rlhfjax.errors import DataError

ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}
Message = dict[str, str]


def merge_turns(messages: Sequence[Message], separator: str = "\n") -> list[Message]:
    """Joins consecutive messages of one role into one turn."""
    turns: list[Message] = []
    for message in messages:
        if turns and turns[-1]["role"] == message["role"]:
            turns[-1]["content"] += separator + message["content"]
        else:
            turns.append({"role": message["role"], "content": message["content"]})
    return turns


def turn_tokens(tokenizer: Tokenizer, message: Message) -> list[int]:
    """One turn: marker, content, eos. Raises DataError for an unknown role."""
    if message["role"] not in ROLES:
        raise DataError(f"chat: role {message['role']!r} is none of {', '.join(ROLES)}")
    return [tokenizer.token_id(ROLES[message["role"]]), *tokenizer.encode(message["content"]), tokenizer.eos_id]


def turn_mask(message: Message, tokens: Sequence[int]) -> list[float]:
    """1 on what the assistant says and on its eos; 0 on its marker, which the template gives."""
    return [0.0, *[float(message["role"] == "assistant")] * (len(tokens) - 1)]


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
    """A whole conversation.

    Returns:
      tokens int32 [t], and the loss mask float32 [t]: 1 where the token is one the assistant has to produce.
    """
    tokens, mask = [tokenizer.bos_id], [0.0]
    for message in messages:
        turn = turn_tokens(tokenizer, message)
        tokens += turn
        mask += turn_mask(message, turn)
    return np.array(tokens, np.int32), np.array(mask, np.float32)


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int | None = None) -> np.ndarray:
    """A conversation up to the assistant's next word: int32 [t], ending with the assistant's marker.

    With `max_tokens` the oldest turns go, whole, until the rest fits and starts with a user turn (a system message
    at the start stays); a last turn that is itself too long loses its beginning.
    """
    head = [m for m in messages[:1] if m["role"] == "system"]
    turns = [turn_tokens(tokenizer, m) for m in messages[len(head) :]]
    starts = [i for i, m in enumerate(messages[len(head) :]) if m["role"] == "user"] or [0]
    first = [tokenizer.bos_id, *(t for m in head for t in turn_tokens(tokenizer, m))]
    last = [tokenizer.token_id(ASSISTANT)]
    for start in starts:
        body = [token for turn in turns[start:] for token in turn]
        if max_tokens is None or len(first) + len(body) + 1 <= max_tokens:
            return np.array(first + body + last, np.int32)
    return np.array(first + _tail(body, max_tokens - len(first) - 1) + last, np.int32)


def to_text(messages: Sequence[Message]) -> str:
    """A conversation for people and for scorers of text: `User: ...` and `Assistant: ...`, a line a turn."""
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def _tail(turn: list[int], room: int) -> list[int]:
    if room < 2:
        raise DataError("chat: the prompt length leaves no room for a single token of the last turn")
    return [turn[0], *turn[len(turn) - room + 1 :]]
