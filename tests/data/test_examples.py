"""Conversations cut into windows: what is kept, where it is cut, and what is never made up."""

import random

import pytest

from rlhfjax.data import chat
from rlhfjax.data.examples import windows
from rlhfjax.errors import DataError


def answers(window):
    """Target ids of each run of counted targets."""
    runs, before = [], 0
    for _, target, counts in window.tolist():
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
        expected = [[*tokenizer.encode(m["content"]), tokenizer.eos_id] for m in messages if m["role"] == "assistant"]
        assert [run for window in made for run in answers(window)] == expected
        for window in made:
            assert len(window) <= length
            assert window[0, 0] == tokenizer.bos_id and window[1, 0] == tokenizer.token_id(chat.ROLES["user"])
            assert window[1:, 0].tolist() == window[:-1, 1].tolist()


def test_a_conversation_that_fits_is_left_whole(tokenizer, talk):
    messages = talk(random.Random(0), 8)
    tokens, mask = chat.render(tokenizer, messages)
    (window,) = windows(tokenizer, messages, len(tokens) - 1)
    assert window[:, 0].tolist() == tokens[:-1].tolist() and window[:, 1].tolist() == tokens[1:].tolist()
    assert window[:, 2].tolist() == mask[1:].tolist()
    assert len(windows(tokenizer, messages, len(tokens) - 2)) == 2  # one token less, and it is cut


def test_the_system_message_stands_in_every_window(tokenizer, talk):
    system = {"role": "system", "content": "we sang."}
    made = windows(tokenizer, [system, *talk(random.Random(0), 12)], 60)
    head = chat.render(tokenizer, [system])[0].tolist()
    assert len(made) > 1
    assert all(window[: len(head), 0].tolist() == head for window in made)
    with pytest.raises(DataError, match="leaves no room in length 8"):
        windows(tokenizer, [system | {"content": "we sang on the tree on the mat."}], 8)


def test_pitfall_24_a_truncated_answer_gets_no_eos(tokenizer):
    question, answer = {"role": "user", "content": "who?"}, {"role": "assistant", "content": "the cat sat. " * 30}
    (window,) = windows(tokenizer, [question, answer], 20)
    tokens, mask = chat.render(tokenizer, [question, answer])
    assert len(window) == 20
    assert window[:, 1].tolist() == tokens[1:21].tolist()  # simply the first tokens
    assert window[:, 2].tolist() == mask[1:21].tolist() and window[-1, 1] != tokenizer.eos_id


def test_a_question_that_is_too_long_loses_its_beginning_first(tokenizer):
    question, answer = {"role": "user", "content": "the cat sat. " * 30}, {"role": "assistant", "content": "who?"}
    (window,) = windows(tokenizer, [question, answer], 20)
    tokens, mask = chat.render(tokenizer, [question, answer])
    assert len(window) == 20
    assert window[:2, 0].tolist() == tokens[:2].tolist()  # bos and the marker stay
    assert window[1:, 1].tolist() == tokens[-19:].tolist()  # then the end of the question and the whole answer
    assert window[:, 2].tolist() == [0, *mask[-19:].tolist()]


def test_a_conversation_without_an_answer_makes_no_window(tokenizer):
    assert windows(tokenizer, [{"role": "user", "content": "who sat?"}], 32) == []
