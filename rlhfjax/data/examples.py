"""Turns rows into token arrays: documents, conversations, ranked completions."""

from collections.abc import Sequence

import numpy as np

from rlhfjax.data import chat
from rlhfjax.data.batches import PreferenceBatch
from rlhfjax.data.padding import pad_right
from rlhfjax.data.rows import Row
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.data.tools import TOOL
from rlhfjax.errors import DataError

Turns = tuple[list[int], list[float]]  # token ids, and 1 where the assistant wrote them


# ------------------------------------------------------------------ pretraining


def document(tokenizer: Tokenizer, row: Row) -> np.ndarray:
    """Returns a document for pretraining, int32 [t]: the text, and what ends a document.

    Before the text stands bos, if the vocabulary begins documents with one. A conversation is
    rendered in the chat template, so that fine-tuning starts from a model that knows its turns.
    """
    if "messages" in row:
        return chat.render(tokenizer, row["messages"])[0]
    text = tokenizer.encode(row["text"])
    tokens = [*tokenizer.document_start, *text, tokenizer.document_end]
    return np.array(tokens, np.int32)


def shifted(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the inputs, targets and target mask of a sequence as int32 [t - 1, 3].

    Args:
      tokens: int32 [t].
      mask: [t], 1 where the token is a target that counts.
    """
    return np.stack([tokens[:-1], tokens[1:], mask[1:].astype(np.int32)], axis=1)


# ------------------------------------------------------------------ fine-tuning


def with_documents(
    tokenizer: Tokenizer, row: Row, length: int, context: str = "sft"
) -> list[np.ndarray]:
    """Returns the training examples of a conversation or a document, each int32 [t, 5].

    The first four columns are those of `fine_tuning`. The fifth is 1 in an example of a document.

    The targets of a document are all its tokens but the first, as in pretraining. A document ends
    as documents do in pretraining, see `document`, so that prose does not teach the end of a turn
    where the tokenizer has another token for that. One that is longer than `length` is split into
    pieces: each begins at position 0, and no target is lost.
    """
    if "messages" in row:
        found = fine_tuning(tokenizer, row, length, context)
        return [np.pad(example, ((0, 0), (0, 1))) for example in found]
    tokens = document(tokenizer, row)
    whole = shifted(tokens, np.ones(len(tokens)))
    marks = np.broadcast_to(np.array([0, 1], np.int32), (len(whole), 2))
    example = np.concatenate([whole, marks], axis=1)
    return [example[i : i + length] for i in range(0, len(example), length)]


def prompt_room(length: int, longest: int) -> int:
    """Returns how many of a row's `length` tokens a prompt may take.

    The prompt may take all that a response of `longest` tokens leaves, and at least half of the
    row. A response that is longer than a row loses its end rather than its prompt.
    """
    return max(length // 2, length - longest)


def fine_tuning(
    tokenizer: Tokenizer, row: Row, length: int, context: str = "sft"
) -> list[np.ndarray]:
    """Returns the training examples of a conversation, each int32 [t, 4] with t <= length.

    The first three columns are those of `shifted`. The fourth is 1 in the first position of an
    example that lost tokens. Without stored ids the examples are the conversation's `windows`.

    With stored ids there is one example, whose only targets are the response's. Nothing is encoded
    anew, and no eos is added to a response that the sampler cut off. If prompt and response do not
    fit, the prompt keeps its head and as much of its end as `prompt_room` allows, and the response
    keeps its beginning.

    Raises:
      DataError: a stored id is outside the vocabulary.
    """
    if "response_tokens" not in row:
        return windows(tokenizer, row["messages"], length)
    prompt = row["prompt_tokens"].tolist()
    response = row["response_tokens"].tolist()
    _validate_ids(tokenizer, [*prompt, *response], context)
    was = len(prompt) + len(response)
    if not response or was < 2:
        return []
    room = prompt_room(length + 1, len(response))
    prompt = chat.shorten_prompt(tokenizer, prompt, room)
    tokens = [*prompt, *response][: length + 1]
    mask = [float(i >= len(prompt)) for i in range(len(tokens))]
    return [_example(tokens, mask, was=was)]


def windows(
    tokenizer: Tokenizer, messages: Sequence[chat.Message], length: int
) -> list[np.ndarray]:
    """Returns a conversation as training examples, see `fine_tuning`.

    A long conversation is cut between an assistant turn and the next user turn. Every window
    starts with bos and the system message, so that each assistant turn is a target exactly once
    and always follows its question. If a single exchange is too long, the question loses its
    beginning, down to half of the window, and then the response its end. No eos is added to a
    response that lost its end. Windows without a target are dropped.

    If the chat template leaves thoughts out of earlier responses, every response has a window of
    its own, in which it is the last turn and the only target.
    """
    head, exchanges = exchanges_of(messages)
    if head:
        question = {"role": "user", "content": "?"}
        _edges(tokenizer, [*head, question], 1, length + 1)  # validates its length

    if not tokenizer.template.keeps_responses(messages):
        ends = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
        return [
            _last_response_window(tokenizer, messages[: i + 1], length) for i in ends
        ]

    # A group is as many exchanges as fit into a window, at least one.
    groups: list[tuple[list[chat.Message], Turns]] = []
    for exchange in exchanges:
        joined = [*(groups[-1][0] if groups else head), *exchange]
        turns = tokenizer.template.render(joined)
        if groups and len(turns[0]) <= length + 1:
            groups[-1] = (joined, turns)
        else:
            alone = [*head, *exchange]
            groups.append((alone, tokenizer.template.render(alone)))

    examples = []
    for group, turns in groups:
        if any(turns[1]):
            tokens, mask = _cut(tokenizer, group, turns, length + 1, len(head))
            examples.append(_example(tokens, mask, was=len(turns[0])))
    return examples


def _last_response_window(
    tokenizer: Tokenizer, messages: Sequence[chat.Message], length: int
) -> np.ndarray:
    """Returns a conversation as an example whose target is its last response.

    The oldest exchanges are dropped, whole, until the rest fits.
    """
    for kept in chat.without_oldest(messages):
        tokens, mask = tokenizer.template.render(kept)
        if len(tokens) <= length + 1:
            break
    start = len(mask) - mask[::-1].index(1.0)
    while start and mask[start - 1]:
        start -= 1
    mask = [0.0] * start + mask[start:]
    first = int(kept[0]["role"] == "system")
    was = len(tokens)
    tokens, mask = _cut(tokenizer, kept, (tokens, mask), length + 1, first)
    return _example(tokens, mask, was=was)


def exchanges_of(
    messages: Sequence[chat.Message],
) -> tuple[list[chat.Message], list[list[chat.Message]]]:
    """Returns a system message, if the first one is, and the exchanges of a conversation.

    An exchange is a user turn and the turns of assistant and tools after it.
    """
    head = [message for message in messages[:1] if message["role"] == "system"]
    exchanges: list[list[chat.Message]] = []
    for message in messages[len(head) :]:
        if message["role"] in ("assistant", TOOL) and exchanges:
            exchanges[-1].append(message)
        else:
            exchanges.append([message])
    return head, exchanges


def _example(tokens: Sequence[int], mask: Sequence[float], *, was: int) -> np.ndarray:
    """Returns an example of fine-tuning, int32 [t, 4].

    Args:
      was: number of tokens before truncation.
    """
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
    """Returns one exchange in at most `room` tokens, see `windows`.

    Args:
      first: index of the exchange's first message.
    """
    tokens, mask = turns
    over = len(tokens) - room
    without_question = messages[first]["role"] == "assistant"
    if over <= 0 or without_question:
        return tokens[:room], mask[:room]
    before, after = _edges(tokenizer, messages, first, room)
    # The question's words and the `after` tokens of the template up to the response.
    question = mask.index(1.0) - before
    drop = min(over, question - after, question - (room - before + 1) // 2)
    drop = max(0, drop)
    keep = [*range(before), *range(before + drop, len(tokens))][:room]
    return [tokens[i] for i in keep], [mask[i] for i in keep]


def _edges(
    tokenizer: Tokenizer, messages: Sequence[chat.Message], first: int, room: int
) -> tuple[int, int]:
    """Returns the numbers of tokens before and after the words of message `first`.

    Raises:
      DataError: they leave no room for a word.
    """
    before, after = tokenizer.template.edges(messages, first)
    if room <= before + after:
        raise DataError(
            f"sft: a system message of {before} tokens leaves no room in length {room - 1}"
        )
    return before, after


# ------------------------------------------------------------------ preferences


def preference(
    tokenizer: Tokenizer,
    row: Row,
    *,
    k: int,
    length: int,
    context: str = "preferences",
) -> PreferenceBatch:
    """Returns the completions of a prompt as a row of a PreferenceBatch, with index -1.

    A prompt that leaves too little room for the longest completion is shortened as
    `chat.shorten_prompt` does, to `prompt_room` tokens and equally for all completions. Then
    completions lose their ends.

    Raises:
      DataError: there are more than k completions, or an id is outside the vocabulary.
    """
    prompt, completions = preference_ids(tokenizer, row)
    if len(completions) > k:
        raise DataError(f"{context}: {len(completions)} completions, more than k={k}")
    ids = [token for completion in completions for token in completion]
    _validate_ids(tokenizer, [*prompt, *ids], context)
    room = prompt_room(length, max(map(len, completions)))
    fitted = chat.shorten_prompt(tokenizer, prompt, room)
    kept = [completion[: length - len(fitted)] for completion in completions]
    rows = [[*fitted, *completion] for completion in kept]
    rows += [[]] * (k - len(rows))
    tokens, attention_mask = pad_right(rows, length=length, pad_id=tokenizer.pad_id)
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
    first: dict[tuple[int, ...], int] = {}  # the first completion with these tokens
    for i, completion in enumerate(completions):
        example.scores[i] = row["scores"][i]
        example.valid[i] = 1.0
        example.lengths[i] = len(kept[i])
        example.cut[i] = len(rows[i]) < len(prompt) + len(completion)
        example.same[i] = first.setdefault(tuple(kept[i]), i)
    return example


def preference_ids(tokenizer: Tokenizer, row: Row) -> tuple[list[int], list[list[int]]]:
    """Returns the ids of the prompt and of each completion of a row of kind preferences.

    Stored ids are returned as they are. Without them the prompt is the row's messages, or its text
    as one user turn, and every completion ends with eos.
    """
    if "prompt_tokens" in row:
        completions = [ids.tolist() for ids in row["completion_tokens"]]
        return row["prompt_tokens"].tolist(), completions
    prompt = chat.render_prompt(tokenizer, prompt_of(row)).tolist()
    completions = [chat.response_tokens(tokenizer, text) for text in row["completions"]]
    return prompt, completions


def prompt_of(row: Row) -> list[chat.Message]:
    """Returns the prompt of a row of kind preferences as a conversation."""
    return row.get("messages") or [{"role": "user", "content": row["prompt"]}]


def last_response(
    messages: Sequence[chat.Message],
) -> tuple[Sequence[chat.Message], str] | None:
    """Returns the last response to a user turn, after the turns before it; None if none is."""
    roles = [message["role"] for message in messages]
    for i in reversed(range(1, len(roles))):
        if roles[i - 1 : i + 1] == ["user", "assistant"]:
            return messages[:i], messages[i]["content"]
    return None


def _validate_ids(tokenizer: Tokenizer, ids: Sequence[int], context: str) -> None:
    """Raises DataError if an id is outside the tokenizer's vocabulary."""
    top = max(ids, default=0)
    if top >= tokenizer.vocab_size:
        raise DataError(
            f"{context}: token id {top} is outside the tokenizer's vocabulary of "
            f"{tokenizer.vocab_size}"
        )
