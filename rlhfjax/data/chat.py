"""Conversations as tokens, with the loss on the assistant's; how they are written is the tokenizer's chat template.

Ours, with SentencePiece:

    <bos> <|user|> Hi! <eos> <|assistant|> Hello. <eos> <|user|> ...

Every turn ends with eos, which is what the sampler stops on; bos stands once, at the start. Markers are single ids
that `Tokenizer.encode` never produces from text, so a message cannot open a turn of its own.
"""

import contextlib
from collections.abc import Iterable, Sequence

import numpy as np

from rlhfjax.data.template import OURS, common_prefix
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


def render(
    tokenizer: Tokenizer, messages: Sequence[Message]
) -> tuple[np.ndarray, np.ndarray]:
    """A whole conversation.

    Returns:
      tokens int32 [t], and the loss mask float32 [t]: 1 where the token is one the assistant has to produce.

    Raises:
      DataError: an unknown role, or what the chat template does not take.
    """
    tokens, mask = tokenizer.template.render(messages)
    return np.array(tokens, np.int32), np.array(mask, np.float32)


def render_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int | None = None
) -> np.ndarray:
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
    if max_tokens <= before + after:
        raise DataError(
            f"chat: a prompt length of {max_tokens} leaves no room for a single token "
            f"of the last turn, beside {before + after} of a system message and of the template"
        )
    return np.array(_without_middle(tokens, before, max_tokens), np.int32)


def shorten_prompt(
    tokenizer: Tokenizer, ids: Sequence[int], max_tokens: int
) -> list[int]:
    """Returns the ids of a rendered prompt, at most `max_tokens` of them, as `render_prompt` cuts a
    conversation.

    Nothing is encoded anew: turns are only told apart where rendering them gives the very same ids.
    Of other prompts what stands before the first user's words (bos, a system message, the header)
    stays, and then the end.
    """
    ids = list(ids)
    if len(ids) <= max_tokens:
        return ids
    head = int(ids[0] == tokenizer.bos_id)
    turns = [
        turn for turn in tokenizer.template.messages(ids) if turn["content"].strip()
    ]
    if not turns:
        return _without_middle(ids, head, max_tokens)
    # It fails without a template, for turns that it does not take, and without room for what it
    # writes around them.
    with contextlib.suppress(DataError):
        rendered = render_prompt(tokenizer, turns).tolist()
        first = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), 0)
        before, _ = tokenizer.template.edges(turns, first, cue=True)
        head = min(common_prefix(ids, rendered), before)
        if rendered == ids:
            return render_prompt(tokenizer, turns, max_tokens).tolist()
    return _without_middle(ids, min(head, max_tokens // 2), max_tokens)


def shorten_conversation(
    tokenizer: Tokenizer,
    prompt: Sequence[Message],
    rest: Sequence[Message],
    max_tokens: int,
) -> list[Message]:
    """Returns a prompt and the turns after it, shortened until `render_prompt` fits into
    `max_tokens`.

    The prompt loses its oldest turns, then its last user turn its beginning; a system message and
    `rest` stay.

    Raises:
      DataError: there is no room for a single token of the prompt's last turn.
    """
    head = [turn for turn in prompt[:1] if turn["role"] == "system"]
    starts = [i for i, turn in enumerate(prompt) if turn["role"] == "user"] or [
        len(head)
    ]
    for start in starts:
        kept = [*head, *prompt[start:], *rest]
        over = len(render_prompt(tokenizer, kept)) - max_tokens
        if over <= 0:
            return kept
    turn = kept[len(head)]
    words = tokenizer.encode(turn["content"])
    room = len(words)
    while (
        over > 0 and room > over
    ):  # again, where the cut words take more tokens than they did
        room -= over
        kept[len(head)] = dict(turn) | {
            "content": decode_part(tokenizer, words[-room:])
        }
        over = len(render_prompt(tokenizer, kept)) - max_tokens
    if over > 0:
        raise DataError(
            f"chat: {max_tokens} tokens leave no room for a single one of "
            f"{turn['content'][:30]!r}, beside the turns that follow it"
        )
    return kept


def decode_part(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of a part of a text's ids; what is left of characters that were cut through is
    dropped."""
    return tokenizer.decode(ids).strip("\ufffd")


def _without_middle(ids: Sequence[int], head: int, max_tokens: int) -> list[int]:
    """The first `head` ids and the last ones, `max_tokens` in all."""
    return [*ids[:head], *ids[len(ids) - max_tokens + head :]]


def answer_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """What the assistant has to produce after a prompt in order to say a text: its tokens and the end of the turn."""
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": text},
    ]
    return [
        token
        for token, learnt in zip(*tokenizer.template.render(messages), strict=True)
        if learnt
    ]


def prompt_text(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """A prompt's tokens as text for scorers and people: in our markers, whatever the tokenizer's chat template is."""
    if tokenizer.template.source == OURS:
        return tokenizer.decode(ids)
    return "".join(
        ROLES[turn["role"]] + turn["content"]
        for turn in tokenizer.template.messages(ids)
    )


def to_text(messages: Sequence[Message]) -> str:
    """A conversation for people and for scorers of text: `User: ...` and `Assistant: ...`, a line a turn."""
    return "\n".join(
        f"{message['role'].capitalize()}: {message['content']}" for message in messages
    )
