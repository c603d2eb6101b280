"""Rows to token arrays: documents, windows of a conversation, prompts, ranked completions."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhfjax.data import chat
from rlhfjax.data.batches import PreferenceBatch
from rlhfjax.data.padding import pad_right
from rlhfjax.data.rows import Row
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError, DataError

Turns = tuple[list[int], list[float]]


class Encoded:
    """A source seen through an encoder, each row encoded once: what was encoded is kept up to `max_items` numbers."""

    def __init__(
        self, source: Source, encode: Callable[[int, Row], Any], max_items: int = 2**27
    ):
        self.source = source
        self._encode, self._room = encode, max_items
        self._kept: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        index = int(index)
        if index not in self._kept:
            value = self._encode(index, self.source[index])
            size = (
                sum(part.size for part in value)
                if isinstance(value, list)
                else getattr(value, "size", 0)
            )
            if size > self._room:
                return value
            self._room -= size
            self._kept[index] = value
        return self._kept[index]


def document(tokenizer: Tokenizer, row: Row) -> np.ndarray:
    """One document for pretraining, int32 [t]: bos, text, eos; a conversation in the chat template.

    Pretraining in the template is what lets fine-tuning start from a model that knows its turns.
    """
    if "messages" in row:
        return chat.render(tokenizer, row["messages"])[0]
    return np.array(
        [tokenizer.bos_id, *tokenizer.encode(row["text"]), tokenizer.eos_id], np.int32
    )


def shifted(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Inputs, targets and target mask of a sequence as int32 [t - 1, 3]; `mask` is given by token."""
    return np.stack([tokens[:-1], tokens[1:], mask[1:].astype(np.int32)], axis=1)


def prompt_room(length: int, longest: int) -> int:
    """Returns how many of a row's `length` tokens a prompt may take beside a response of `longest`
    tokens.

    All that the response leaves, and at least half of the row: a response that is longer than a row
    loses its end and does not take the prompt, without which it is a response to nothing.
    """
    return max(length // 2, length - longest)


def windows(
    tokenizer: Tokenizer, messages: Sequence[chat.Message], length: int
) -> list[np.ndarray]:
    """A conversation as training examples of at most `length` inputs, each int32 [t, 4].

    The columns are those of `shifted`, and 1 in the first row of an example that lost tokens.

    A long conversation is cut between an assistant turn and the next user turn, and every window starts with bos (and
    the system message), so that each assistant turn is a target exactly once and always has its question before it.
    Where one exchange alone is too long, the question loses its beginning, down to half of the window, and then the
    answer its end: no eos is put where the text goes on. Windows without a target are dropped.
    """
    head = [message for message in messages[:1] if message["role"] == "system"]
    if head:
        _edges(tokenizer, [*head, {"role": "user", "content": "?"}], 1, length + 1)
    exchanges: list[list[chat.Message]] = []
    for message in messages[len(head) :]:
        if message["role"] == "assistant" and exchanges:
            exchanges[-1].append(message)
        else:
            exchanges.append([message])
    groups: list[tuple[list[chat.Message], Turns]] = []
    for exchange in exchanges:
        joined = [*(groups[-1][0] if groups else head), *exchange]
        turns = tokenizer.template.render(joined)
        if groups and len(turns[0]) <= length + 1:
            groups[-1] = (joined, turns)
        else:
            groups.append(
                ([*head, *exchange], tokenizer.template.render([*head, *exchange]))
            )
    return [
        _example(
            *_cut(tokenizer, group, turns, length + 1, len(head)), was=len(turns[0])
        )
        for group, turns in groups
        if any(turns[1])
    ]


def fine_tuning(
    tokenizer: Tokenizer, row: Row, length: int, where: str = "sft"
) -> list[np.ndarray]:
    """Training examples of a conversation: its `windows`, or the one answer that was stored with its own ids.

    Stored ids are learnt as they are, the answer alone: nothing is encoded anew, and no eos is
    added to an answer that was cut off. Where the two do not fit, the prompt keeps its head and the
    end that there is room for (`prompt_room`), and the answer its beginning.
    """
    if "response_tokens" not in row:
        return windows(tokenizer, row["messages"], length)
    prompt, response = row["prompt_tokens"].tolist(), row["response_tokens"].tolist()
    top = max([*prompt, *response], default=0)
    if top >= tokenizer.vocab_size:
        raise DataError(
            f"{where}: token id {top} is outside the tokenizer's vocabulary of {tokenizer.vocab_size}"
        )
    was = len(prompt) + len(response)
    if not response or was < 2:
        return []
    prompt = chat.shorten_prompt(
        tokenizer, prompt, prompt_room(length + 1, len(response))
    )
    tokens = [*prompt, *response][: length + 1]
    mask = [float(i >= len(prompt)) for i in range(len(tokens))]
    return [_example(tokens, mask, was=was)]


class Prompts:
    """Prompts out of conversations: prefixes that end with a user turn.

    Args:
      source: rows of kind messages.
      per_conversation: how many prefixes of one conversation, at most, chosen by a hash of the seed; None for all.
    """

    kind = "prompt"

    def __init__(
        self, source: Source, *, per_conversation: int | None = 1, seed: int = 0
    ):
        if source.kind != "messages":
            raise ConfigError(
                f"prompts are cut from rows of kind messages, not {source.kind}"
            )
        self.source, self.skipped = source, source.skipped
        self._index: list[tuple[int, int]] = []
        for i in range(len(source)):
            ends = [
                j + 1
                for j, turn in enumerate(source[i]["messages"])
                if turn["role"] == "user"
            ]
            chosen = sorted(
                ends,
                key=lambda end, i=i: hashlib.sha256(
                    f"{seed}/{i}/{end}".encode()
                ).digest(),
            )
            self._index += [(i, end) for end in sorted(chosen[:per_conversation])]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Row:
        row, end = self._index[index]
        return {"messages": self.source[row]["messages"][:end]}

    def where(self, index: int) -> str:
        row, end = self._index[index]
        return f"{self.source.where(row)}, first {end} turns"


def preference(
    tokenizer: Tokenizer,
    row: Row,
    *,
    k: int,
    length: int,
    context: str = "preferences",
) -> PreferenceBatch:
    """Returns one prompt's completions as a row of a PreferenceBatch, with index -1.

    Stored ids are used as they are, never text encoded anew; without them the prompt is its
    messages or one user turn, and every completion ends with eos. A prompt that leaves too little
    room for the longest completion is cut as `chat.shorten_prompt` does, to `prompt_room` tokens,
    the same for all k; then completions lose their ends.

    Raises:
      DataError: more than k completions, or an id outside the vocabulary.
    """
    prompt, completions = native(tokenizer, row)
    if len(completions) > k:
        raise DataError(f"{context}: {len(completions)} completions, more than k={k}")
    top = max([*prompt, *(token for ids in completions for token in ids)], default=0)
    if top >= tokenizer.vocab_size:
        raise DataError(
            f"{context}: token id {top} is outside the tokenizer's vocabulary of {tokenizer.vocab_size}"
        )
    fitted = chat.shorten_prompt(
        tokenizer, prompt, prompt_room(length, max(map(len, completions)))
    )
    room = length - len(fitted)
    kept = [completion[:room] for completion in completions]
    rows = [[*fitted, *completion] for completion in kept]
    rows += [[]] * (k - len(rows))
    tokens, attention_mask = pad_right(rows, length=length, pad_id=tokenizer.pad_id)
    first: dict[tuple[int, ...], int] = {}  # completion -> where it stands first
    example = PreferenceBatch(
        tokens=tokens,
        attention_mask=attention_mask,
        scores=np.zeros(k, np.float32),
        valid=np.zeros(k, np.float32),
        lengths=np.zeros(k, np.int32),
        cut=np.zeros(k, np.float32),
        same=np.arange(k, dtype=np.int32),
        index=np.int32(-1),
    )
    for i, completion in enumerate(completions):
        example.scores[i] = row["scores"][i]
        example.valid[i] = 1.0
        example.lengths[i] = len(kept[i])
        example.cut[i] = len(rows[i]) < len(prompt) + len(completion)
        example.same[i] = first.setdefault(tuple(kept[i]), i)
    return example


def native(tokenizer: Tokenizer, row: Row) -> tuple[list[int], list[list[int]]]:
    """Ids of a preference row's prompt and of each completion: those stored, or its text encoded and ended with eos."""
    if "prompt_tokens" in row:
        return row["prompt_tokens"].tolist(), [
            ids.tolist() for ids in row["completion_tokens"]
        ]
    prompt = chat.render_prompt(
        tokenizer, row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    )
    return prompt.tolist(), [
        chat.answer_tokens(tokenizer, text) for text in row["completions"]
    ]


def _example(tokens: Sequence[int], mask: Sequence[float], *, was: int) -> np.ndarray:
    """An example of fine-tuning, int32 [t, 4], out of tokens of which there were `was`; see
    `windows`."""
    example = shifted(np.array(tokens, np.int32), np.array(mask))
    marks = np.zeros((len(example), 1), np.int32)
    marks[0] = len(tokens) < was
    return np.concatenate([example, marks], axis=1)


def _cut(
    tokenizer: Tokenizer,
    messages: Sequence[chat.Message],
    turns: Turns,
    room: int,
    first: int,
) -> Turns:
    """The one exchange that starts with message `first`, in at most `room` tokens; see `windows`."""
    tokens, mask = turns
    over = len(tokens) - room
    if (
        over <= 0 or messages[first]["role"] == "assistant"
    ):  # there is no question to cut
        return tokens[:room], mask[:room]
    before, after = _edges(tokenizer, messages, first, room)
    question = mask.index(1.0) - before  # with what follows it up to the answer
    drop = max(0, min(over, question - after, question - (room - before + 1) // 2))
    keep = [*range(before), *range(before + drop, len(tokens))][:room]
    return [tokens[i] for i in keep], [mask[i] for i in keep]


def _edges(
    tokenizer: Tokenizer, messages: Sequence[chat.Message], first: int, room: int
) -> tuple[int, int]:
    before, after = tokenizer.template.edges(messages, first)
    if room <= before + after:
        raise DataError(
            f"sft: a system message of {before} tokens leaves no room in length {room - 1}"
        )
    return before, after
