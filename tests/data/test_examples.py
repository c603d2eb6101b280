"""Conversations cut into windows: what is kept, where it is cut, and what is never made up."""

import random

import numpy as np
import pytest

from rlhfjax.data import chat
from rlhfjax.data.examples import fine_tuning, preference, windows
from rlhfjax.errors import DataError


def answers(window):
    """Target ids of each run of counted targets."""
    runs, before = [], 0
    for _, target, counts, _ in window.tolist():
        if counts and not before:
            runs.append([])
        if counts:
            runs[-1].append(target)
        before = counts
    return runs


@pytest.mark.parametrize("length", [40, 64, 200])
def test_windows_hold_each_answer_once_after_its_question(tokenizer, talk, length):
    rng = random.Random(length)
    for _ in range(20):
        messages = talk(rng, rng.randint(1, 14), longest=6)
        made = windows(tokenizer, messages, length)
        expected = [
            [*tokenizer.encode(m["content"]), tokenizer.eos_id]
            for m in messages
            if m["role"] == "assistant"
        ]
        assert [run for window in made for run in answers(window)] == expected
        for window in made:
            assert len(window) <= length
            assert window[0, 0] == tokenizer.bos_id and window[
                1, 0
            ] == tokenizer.token_id(chat.ROLES["user"])
            assert window[1:, 0].tolist() == window[:-1, 1].tolist()


def test_a_conversation_that_fits_is_left_whole(tokenizer, talk):
    messages = talk(random.Random(0), 8)
    tokens, mask = chat.render(tokenizer, messages)
    (window,) = windows(tokenizer, messages, len(tokens) - 1)
    assert (
        window[:, 0].tolist() == tokens[:-1].tolist()
        and window[:, 1].tolist() == tokens[1:].tolist()
    )
    assert window[:, 2].tolist() == mask[1:].tolist()
    assert (
        len(windows(tokenizer, messages, len(tokens) - 2)) == 2
    )  # one token less, and it is cut


def test_the_system_message_stands_in_every_window(tokenizer, talk):
    system = {"role": "system", "content": "we sang."}
    made = windows(tokenizer, [system, *talk(random.Random(0), 12)], 60)
    head = chat.render(tokenizer, [system])[0].tolist()
    assert len(made) > 1
    assert all(window[: len(head), 0].tolist() == head for window in made)
    with pytest.raises(DataError, match="leaves no room in length 8"):
        windows(tokenizer, [system | {"content": "we sang on the tree on the mat."}], 8)


def test_pitfall_24_a_truncated_answer_gets_no_eos(tokenizer):
    question, answer = (
        {"role": "user", "content": "who?"},
        {"role": "assistant", "content": "the cat sat. " * 30},
    )
    (window,) = windows(tokenizer, [question, answer], 20)
    tokens, mask = chat.render(tokenizer, [question, answer])
    assert len(window) == 20
    assert window[:, 1].tolist() == tokens[1:21].tolist()  # simply the first tokens
    assert (
        window[:, 2].tolist() == mask[1:21].tolist()
        and window[-1, 1] != tokenizer.eos_id
    )


def test_a_question_that_is_too_long_loses_its_beginning_first(tokenizer):
    question, answer = (
        {"role": "user", "content": "the cat sat. " * 30},
        {"role": "assistant", "content": "who?"},
    )
    (window,) = windows(tokenizer, [question, answer], 20)
    tokens, mask = chat.render(tokenizer, [question, answer])
    assert len(window) == 20
    assert window[:2, 0].tolist() == tokens[:2].tolist()  # bos and the marker stay
    assert (
        window[1:, 1].tolist() == tokens[-19:].tolist()
    )  # then the end of the question and the whole answer
    assert window[:, 2].tolist() == [0, *mask[-19:].tolist()]


def cut_row(tokenizer, prompt, completions, length):
    """A preference row with these ids, as arrays."""
    row = {
        "prompt": "p",
        "completions": ["a"] * len(completions),
        "scores": [0.0] * len(completions),
    }
    row |= {
        "prompt_tokens": np.array(prompt),
        "completion_tokens": [np.array(ids) for ids in completions],
    }
    return preference(tokenizer, row, k=len(completions) + 1, length=length)


def markup(tokenizer):
    user, assistant = (
        tokenizer.token_id(chat.ROLES[role]) for role in ("user", "assistant")
    )
    return [tokenizer.bos_id, user], [tokenizer.eos_id, assistant]


def test_pitfall_39_a_long_response_does_not_take_the_prompt(tokenizer):
    """Length 128, 50 tokens of prompt, responses of 10 and 300: both have the whole prompt, the
    second 78 tokens."""
    head, tail = markup(tokenizer)
    prompt = [*head, *range(20, 66), *tail]
    short, long = list(range(70, 80)), list(range(10, 310))
    made = cut_row(tokenizer, prompt, [short, long], 128)
    assert made.tokens[0].tolist() == prompt + short + [tokenizer.pad_id] * 68
    assert made.tokens[1].tolist() == prompt + long[:78]
    assert made.attention_mask.sum(1).tolist() == [60, 128, 0]
    assert made.lengths.tolist() == [10, 78, 0]
    assert made.cut.tolist() == [0, 1, 0]


def test_pitfall_39_a_long_prompt_keeps_its_head_and_half_of_the_row(tokenizer):
    head, tail = markup(tokenizer)
    words = list(range(20, 116))
    prompt, long = [*head, *words, *tail], list(range(10, 310))  # 100 tokens
    made = cut_row(
        tokenizer, prompt, [[70], long], 128
    )  # 64 of them: head, the last 60 words, tail
    assert [row[:64].tolist() for row in made.tokens[:2]] == [
        [*head, *words[-60:], *tail]
    ] * 2
    assert made.lengths.tolist() == [1, 64, 0] and made.cut.tolist() == [1, 1, 0]
    made = cut_row(
        tokenizer, prompt, [[70], long[:40]], 128
    )  # a response of 40 leaves 88
    assert [row[:88].tolist() for row in made.tokens[:2]] == [
        [*head, *words[-84:], *tail]
    ] * 2
    assert made.lengths.tolist() == [1, 40, 0]
    made = cut_row(tokenizer, prompt, [[70], long[:28]], 128)  # and one of 28 all of it
    assert made.cut.tolist() == [0, 0, 0]


def test_pitfall_39_completions_that_became_equal_are_known(tokenizer):
    start = list(range(20, 40))
    made = cut_row(
        tokenizer, [1, 7], [[*start, 50], [*start, 51], start, [60], [60]], 20
    )
    assert made.same.tolist() == [
        0,
        0,
        0,
        3,
        3,
        5,
    ]  # 18 tokens of each; two were equal all along
    assert made.cut.tolist() == [1, 1, 1, 0, 0, 0]


def test_pitfall_39_stored_ids_of_fine_tuning_keep_their_prompt(tokenizer):
    head, tail = markup(tokenizer)
    prompt, response = [*head, *range(20, 66), *tail], list(range(10, 310))
    row = {"prompt_tokens": np.array(prompt), "response_tokens": np.array(response)}
    (example,) = fine_tuning(tokenizer, row, 127)  # 128 tokens
    assert example[:, 0].tolist() == (prompt + response)[:127]
    assert example[:, 1].tolist() == (prompt + response)[1:128]
    assert example[:, 2].tolist() == [0] * 49 + [1] * 78
    assert example[:, 3].tolist() == [1] + [0] * 126
    row["response_tokens"] = np.array([70])
    (example,) = fine_tuning(tokenizer, row, 127)
    assert example[:, 0].tolist() == prompt and not example[:, 3].any()
    assert (
        fine_tuning(tokenizer, row | {"response_tokens": np.array([], np.int32)}, 127)
        == []
    )


def test_pitfall_39_a_conversation_says_whether_it_lost_tokens(tokenizer):
    talk = [
        {"role": "user", "content": "who sat?"},
        {"role": "assistant", "content": "the cat sat. " * 9},
    ]
    size = len(chat.render(tokenizer, talk)[0])
    assert [
        windows(tokenizer, talk, length)[0][:, 3].sum()
        for length in (size - 1, size - 2)
    ] == [
        0,
        1,
    ]


def test_a_conversation_without_an_answer_makes_no_window(tokenizer):
    assert windows(tokenizer, [{"role": "user", "content": "who sat?"}], 32) == []
