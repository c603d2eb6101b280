"""Conversations as tokens, with the loss on the assistant's; how they are written is the tokenizer's chat template.

Ours, with SentencePiece:

    <bos> <|user|> Hi! <eos> <|assistant|> Hello. <eos> <|user|> ...

Every turn ends with eos, which is what the sampler stops on; bos stands once, at the start. Markers are single ids
that `Tokenizer.encode` never produces from text, so a message cannot open a turn of its own.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from rlhfjax.data.template import OURS
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


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
    """A whole conversation.

    Returns:
      tokens int32 [t], and the loss mask float32 [t]: 1 where the token is one the assistant has to produce.

    Raises:
      DataError: an unknown role, or what the chat template does not take.
    """
    tokens, mask = tokenizer.template.render(messages)
    return np.array(tokens, np.int32), np.array(mask, np.float32)


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int | None = None) -> np.ndarray:
    """A conversation up to the assistant's next word: int32 [t], ending with what opens the assistant's turn.

    With `max_tokens` the oldest turns go, whole, until the rest fits and starts with a user turn (a system message
    at the start stays); a last turn that is itself too long loses its beginning.
    """
    head = [m for m in messages[:1] if m["role"] == "system"]
    starts = [i for i, m in enumerate(messages) if m["role"] == "user"] or [len(head)]
    for start in starts:
        kept = [*head, *messages[start:]]
        tokens = tokenizer.template.render(kept, cue=True)[0]
        if max_tokens is None or len(tokens) <= max_tokens:
            return np.array(tokens, np.int32)
    before, after = tokenizer.template.edges(kept, len(kept) - 1, cue=True)
    if max_tokens < before + after:
        raise DataError("chat: the prompt length leaves no room for a single token of the last turn")
    return np.array([*tokens[:before], *tokens[len(tokens) - max_tokens + before :]], np.int32)


def answer_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """What the assistant has to produce after a prompt in order to say a text: its tokens and the end of the turn."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
    return [token for token, learnt in zip(*tokenizer.template.render(messages), strict=True) if learnt]


def prompt_text(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """A prompt's tokens as text for scorers and people: in our markers, whatever the tokenizer's chat template is."""
    if tokenizer.template.source == OURS:
        return tokenizer.decode(ids)
    return "".join(ROLES[turn["role"]] + turn["content"] for turn in tokenizer.template.messages(ids))


def to_text(messages: Sequence[Message]) -> str:
    """A conversation for people and for scorers of text: `User: ...` and `Assistant: ...`, a line a turn."""
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
