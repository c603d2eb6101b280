"""Solutions in steps: where a step ends, what its label is, what is cut."""

import re

import numpy as np
import pytest

from rlhfjax.data import chat, loader, steps
from rlhfjax.data.rows import BadRow, normalize
from rlhfjax.data.sources import Rows, open_source
from rlhfjax.data.tokenizer import train_sentencepiece
from rlhfjax.errors import CheckpointError, ConfigError, DataError

USER = [{"role": "user", "content": "two and two"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    text = ["the cat sat on the mat", "a dog ran"] * 9
    return train_sentencepiece(text, tmp_path_factory.mktemp("t"), vocab_size=280)


def row(*texts, labels=None):
    labels = [1.0] * len(texts) if labels is None else labels
    return {"messages": USER, "steps": list(texts), "labels": labels}


def example(tokenizer, given, length=64, separator="\n\n", neutral=None):
    return steps.step_example(
        tokenizer, given, length=length, separator=separator, neutral=neutral
    )


@pytest.mark.parametrize("separator", ["\n\n", "\n", " ki ", ";"])
def test_a_step_ends_where_its_separator_is_complete_and_the_last_with_the_response(
    separator, tokenizer
):
    texts = ["the cat sat", "a dog", "ran; on" if separator != ";" else "ran on"]
    if separator == "\n\n":
        texts[1] = "a\ndog"  # one newline ends no step
    ids = chat.response_tokens(tokenizer, separator.join(texts))
    ends = steps.step_ends(tokenizer, ids, separator)
    assert len(ends) == 3
    assert ends[-1] == len(ids) - 1
    for count, end in enumerate(ends[:-1], 1):
        # Token by token: the first prefix with so many separators.
        assert tokenizer.decode(ids[: end + 1]).count(separator) == count
        assert tokenizer.decode(ids[:end]).count(separator) == count - 1


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("one\n\ntwo\n\n", 2),  # what follows the last separator is blank
        ("\n\none\n\ntwo", 2),
        ("one\n\n\n\ntwo", 2),
        ("one\n\n \n\ntwo\n\nthree", 3),
        ("", 1),
        ("\n\n", 1),
    ],
)
def test_blank_parts_of_a_sampled_response_are_no_steps(text, count, tokenizer):
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    ends = steps.step_ends(tokenizer, ids, "\n\n")
    assert len(ends) == count
    assert ends[-1] == len(ids) - 1
    assert steps.step_ends(tokenizer, [], "\n\n") == []


def test_labels_stand_at_the_last_tokens_of_steps(tokenizer):
    found = example(tokenizer, row("the cat", "a dog", "ran", labels=[1.0, 0.25, 0.0]))
    prompt = chat.render_prompt(tokenizer, USER)
    places = np.flatnonzero(found.ends)
    assert found.labels[places].tolist() == [1, 0.25, 0]
    np.testing.assert_array_equal(found.ends, found.weight)
    size = int(found.attention_mask.sum())
    assert places[-1] == size - 1
    assert found.tokens[size - 1] == tokenizer.eos_id
    first = found.tokens[len(prompt) : places[0] + 1].tolist()
    assert tokenizer.decode(first) == "the cat\n\n"
    assert not found.labels[np.setdiff1d(np.arange(64), places)].any()


@pytest.mark.parametrize(
    ("neutral", "label", "expected"),
    [
        (None, 0.3, (0.3, 1)),
        (None, 0, (0, 1)),
        ("positive", 0, (1, 1)),
        ("negative", 0, (0, 1)),
        ("masked", 0, (0, 0)),
        ("masked", 1, (1, 1)),
        ("positive", -1, (0, 1)),
    ],
)
def test_what_a_label_means(neutral, label, expected):
    assert steps.label_and_weight(float(label), neutral) == expected


def test_a_masked_step_has_an_end_and_no_weight(tokenizer):
    given = row("the cat", "a dog", "ran", labels=[1.0, 0.0, -1.0])
    found = example(tokenizer, given, neutral="masked")
    places = np.flatnonzero(found.ends)
    assert found.weight[places].tolist() == [1, 0, 1]
    assert found.labels[places].tolist() == [1, 0, 0]


def test_pitfall_39_steps_that_were_cut_off_have_no_label(tokenizer):
    given = row("the cat", "the mat " * 20, "ran", labels=[1.0, 0.0, 1.0])
    found = example(tokenizer, given, length=24)
    assert found.ends.sum() == found.weight.sum() == 1
    assert found.cut == 1
    assert example(tokenizer, given, length=256).cut == 0


@pytest.mark.parametrize(
    ("given", "neutral", "message"),
    [
        (row("a\n\nb", "c"), None, "step 1 contains the separator"),
        (row("a", labels=[-1.0]), None, "label -1: expected 0 to 1"),
        (row("a", labels=[0.5]), "masked", "label 0.5: with `neutral`, expected -1"),
    ],
)
def test_rows_that_cannot_be_used_are_named_or_left_out(
    given, neutral, message, tokenizer, tmp_path
):
    def open_batches(source):
        return loader.step_batches(
            source,
            tokenizer,
            batch_size=1,
            length=32,
            separator="\n\n",
            neutral=neutral,
            train=False,
        )

    good = row("the cat", labels=[1.0])
    with pytest.raises(DataError, match=f"row 1: {re.escape(message)}"):
        open_batches(Rows([good, given], "steps"))
    source = Rows([given, good], "steps")
    source.on_bad_row = "skip"
    batches = open_batches(source)
    assert batches.skipped == 1
    assert len(list(batches)) == 1


def test_batches_are_filled_and_their_position_knows_the_separator(tokenizer):
    def open_batches(separator, train=True):
        return loader.step_batches(
            Rows([row("the cat", "a dog")] * 3, "steps"),
            tokenizer,
            batch_size=2,
            length=32,
            separator=separator,
            train=train,
        )

    *_, last = list(open_batches("\n\n", train=False))
    assert last.valid.tolist() == [1, 0]
    assert last.weight.sum(1).tolist() == [2, 0]
    batches = open_batches("\n\n")
    next(batches)
    position = batches.get_state()
    expected = next(batches)
    batches.set_state(position)
    np.testing.assert_array_equal(next(batches).tokens, expected.tokens)
    with pytest.raises(CheckpointError, match="separator"):
        open_batches("\n").set_state(position)


def test_other_kinds_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="needs rows of kind steps, got text"):
        loader.step_batches(
            Rows([{"text": "a"}], "text"),
            tokenizer,
            batch_size=1,
            length=32,
            separator="\n",
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [1]}, "2 steps and 1 labels; expected as many, at least one"),
        ({"steps": [], "labels": []}, "0 steps and 0 labels"),
        ({"labels": [1, 2]}, "'labels' must hold numbers from -1 to 1, got 2"),
        ({"labels": [1, "x"]}, "'labels' must hold numbers from -1 to 1"),
        ({"labels": [1, float("nan")]}, "'labels' must hold numbers from -1 to 1"),
        ({"steps": ["a", " "]}, "'steps' is empty"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "end with a user turn"),
    ],
)
def test_malformed_rows_are_named(changes, message):
    with pytest.raises(BadRow, match=re.escape(message)):
        normalize("steps", row("a", "b") | changes, {})


def test_rows_of_a_file_are_split_by_their_prompt(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(
        '{"messages": "two and two", "steps": ["a"], "labels": [true]}\n' * 3
    )
    source = open_source(f"jsonl:{path}", kind="steps", split="all")
    assert source[0] == row("a", labels=[1.0])
