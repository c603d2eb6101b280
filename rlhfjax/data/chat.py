"""Conversations as tokens, with the loss on the assistant's turns.

The tokenizer's chat template decides the format. Ours, with SentencePiece:

    <bos> <|user|> Hi! <eos> <|assistant|> Hello. <eos> <|user|> ...

Every turn ends with eos, on which the sampler stops; bos stands once, at the start. Markers are
single ids that `Tokenizer.encode` never produces from text, so a message cannot open a turn.
"""

import contextlib
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from rlhfjax.data.built_in_templates import OURS
from rlhfjax.data.pieces import common_prefix
from rlhfjax.data.tokenizer import ASSISTANT, SYSTEM, USER, Tokenizer
from rlhfjax.data.tools import TOOL, adapted, is_plain
from rlhfjax.errors import DataError

ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}
Message = dict[str, str]
"""A turn: role and content; see `turns` for those of tools."""
_NAMES = "|".join(ROLES)
_MARKER = re.compile(rf"<\|({_NAMES})\|>")
_SPELLED = re.compile(rf"<(\\*\|(?:{_NAMES})\|>)")  # a marker, or one with backslashes


class Turns(list[Message]):
    """Messages, no two consecutive ones of which have the same role."""

    merged = 0
    """Number of messages that were joined to the one before them."""


def merge_turns(messages: Sequence[Message]) -> Turns:
    """Returns the messages with consecutive ones of the same role joined by a newline.

    Results of tools stay apart, and so do turns that call tools.
    """
    turns = Turns()
    for message in messages:
        same = turns and turns[-1]["role"] == message["role"]
        if same and _can_join(turns[-1], message):
            turns[-1]["content"] += "\n" + message["content"]
            turns.merged += 1
        else:
            turns.append(dict(message))
    return turns


def _can_join(first: Message, second: Message) -> bool:
    calls = "tool_calls" in first or "tool_calls" in second
    return not calls and first["role"] != TOOL


def render(
    tokenizer: Tokenizer, messages: Sequence[Message]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of a whole conversation and their loss mask.

    Returns:
      tokens int32 [t], and mask float32 [t]: 1 where the assistant has to produce the token.

    Raises:
      DataError: a role is unknown, or the chat template does not take the messages.
    """
    tokens, mask = tokenizer.template.render(messages)
    return np.array(tokens, np.int32), np.array(mask, np.float32)


def render_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int | None = None
) -> np.ndarray:
    """Returns the tokens of a conversation and of the generation prompt after it, int32 [t].

    With `max_tokens` the oldest turns are dropped, whole, until the rest fits and starts with a
    user turn. A system message at the start stays. A last turn that is itself too long loses its
    beginning.

    Raises:
      DataError: there is no room for a single token of the last turn.
    """
    limit = sys.maxsize if max_tokens is None else max_tokens
    for kept in without_oldest(messages):
        tokens = tokenizer.template.render(kept, cue=True)[0]
        if len(tokens) <= limit:
            return np.array(tokens, np.int32)
    before, after = tokenizer.template.edges(kept, len(kept) - 1, cue=True)
    if limit <= before + after:
        raise DataError(
            f"chat: a prompt length of {limit} leaves no room for a single token of the last turn, "
            f"beside {before + after} of a system message and of the template"
        )
    return np.array(_without_middle(tokens, before, limit), np.int32)


def validate_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    """Validates that the chat template takes a prompt, and what is left of it when it is cut.

    Raises:
      DataError: it does not.
    """
    *_, last = kept = list(without_oldest(messages))
    tokenizer.template.validate(kept[0], cue=True)
    if len(kept) > 1:
        tokenizer.template.validate(last, cue=True)


def shorten_prompt(
    tokenizer: Tokenizer, ids: Sequence[int], max_tokens: int
) -> list[int]:
    """Returns at most `max_tokens` ids of a rendered prompt, cut as `render_prompt` cuts.

    Turns are dropped only if rendering the parsed turns gives the same ids. Other prompts keep what
    stands before the first user's text (bos, a system message, the header), and their end.
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
    # Rendering fails without a template, for turns that the template does not take, and if its own
    # tokens leave no room.
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
    """Returns a prompt and the turns after it, shortened to `max_tokens` when rendered as a prompt.

    The prompt loses its oldest turns, then its last user turn loses its beginning. A system message
    and `rest` stay.

    Raises:
      DataError: there is no room for a single token of the prompt's last turn.
    """
    for shortened in without_oldest(prompt):
        kept = [*shortened, *rest]
        over = len(render_prompt(tokenizer, kept)) - max_tokens
        if over <= 0:
            return kept
    first = int(kept[0]["role"] == "system")
    turn = kept[first]
    words = tokenizer.encode(turn["content"])
    room = len(words)
    # Repeated, because the shortened text may be encoded as more tokens than were left of it.
    while over > 0 and room > over:
        room -= over
        kept[first] = turn | {"content": decode_part(tokenizer, words[-room:])}
        over = len(render_prompt(tokenizer, kept)) - max_tokens
    if over > 0:
        raise DataError(
            f"chat: {max_tokens} tokens leave no room for a single one of "
            f"{turn['content'][:30]!r}, beside the turns that follow it"
        )
    return kept


def without_oldest(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yields the conversation from its first user turn on, from its second, and so on.

    A system message at the start stays. Without a user turn, yields the whole conversation.
    """
    head = [message for message in messages[:1] if message["role"] == "system"]
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for start in starts or [len(head)]:
        yield [*head, *messages[start:]]


def decode_part(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Returns the text of a part of a text's ids, without characters that were cut through."""
    return tokenizer.decode(ids).strip("\ufffd")


def _without_middle(ids: Sequence[int], head: int, max_tokens: int) -> list[int]:
    """Returns the first `head` ids and the last ones, `max_tokens` in all."""
    return [*ids[:head], *ids[len(ids) - max_tokens + head :]]


def response_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a response to a prompt: its text and the end of the turn."""
    tokens, mask = tokenizer.template.render(_exchange(text))
    return [token for token, learned in zip(tokens, mask, strict=True) if learned]


def validate_response(tokenizer: Tokenizer, text: str) -> None:
    """Validates that the chat template takes a response. Raises DataError."""
    tokenizer.template.validate(_exchange(text))


def _exchange(response: str) -> list[Message]:
    return [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": response},
    ]


def prompt_text(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Returns a prompt as text for scorers and people, with our markers for any chat template.

    A marker that a message spells gets a backslash, `<\\|user|>`, so that every marker in the text
    opens a turn. `turns_of` reads such a text. Where the chat template itself marks turns by
    ordinary text (`Template.plain_markers`), ids cannot tell a message that spells it from a turn.
    """
    if tokenizer.template.source != OURS:
        turns = tokenizer.template.messages(ids)
        return "".join(
            ROLES[turn["role"]] + _escaped(turn["content"]) for turn in turns
        )
    specials = tokenizer.template.specials
    markers = {specials[text]: text for text in ROLES.values() if text in specials}
    parts = []
    for marker, run in itertools.groupby((int(i) for i in ids), key=markers.get):
        run = list(run)
        parts.append(marker * len(run) if marker else _escaped(tokenizer.decode(run)))
    return "".join(parts)


def turns_of(prompt: str) -> list[Message]:
    """Returns the turns of a `prompt_text`; text before the first marker has the role ""."""
    first, *rest = _MARKER.split(prompt)
    pairs = [("", first)] if first else []
    pairs += zip(rest[::2], rest[1::2], strict=True)
    return [{"role": role, "content": _unescaped(text)} for role, text in pairs]


def _escaped(content: str) -> str:
    return _SPELLED.sub(r"<\\\1", content)


def _unescaped(content: str) -> str:
    return re.sub(rf"<\\(\\*\|(?:{_NAMES})\|>)", r"<\1", content)


def to_text(messages: Sequence[Message]) -> str:
    """Returns a conversation as text, one line per turn: `User: ...` and `Assistant: ...`."""
    lines = []
    for message in messages:
        written = message if is_plain(message) else adapted(message, "")
        lines.append(f"{written['role'].capitalize()}: {written['content']}")
    return "\n".join(lines)
