"""Selection: the best answers, and fine-tuning on the very ids that were sampled."""

import json

import numpy as np
import pytest

from rlhfjax import recipe
from rlhfjax.config import to_dict
from rlhfjax.data import loader
from rlhfjax.data.preferences import read_preferences
from rlhfjax.data.sources import Rows, open_source
from rlhfjax.data.tokenizer import load_tokenizer
from rlhfjax.errors import DataError
from rlhfjax.stages import select, stage_config


def select_values(finished, *folders, **changes):
    values = {
        "tokenizer": str(finished / "00_tokenizer"),
        "preferences": tuple(map(str, folders)),
    } | changes
    return to_dict(stage_config("select", **values))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def selected(finished, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("select") / "run"
    metrics = recipe.run_stage(
        select_values(finished, finished / "03_collect" / "preferences", keep=2),
        workdir,
    )
    return workdir, metrics


def test_the_best_distinct_answers_of_each_prompt_are_kept(finished, selected):
    workdir, metrics = selected
    source = read_preferences(finished / "03_collect" / "preferences", "train")
    rows = read(workdir / "train.jsonl")
    expected, scores = [], []
    for i in range(len(source)):
        row, seen = source[i], set()
        ranked = sorted(range(4), key=lambda j: (-row["scores"][j], j))
        for j in ranked:
            text = row["completions"][j]
            if text.strip() and text not in seen and len(seen) < 2:
                seen.add(text)
                expected.append(
                    (
                        row["prompt_tokens"].tolist(),
                        row["completion_tokens"][j].tolist(),
                        row["scores"][j],
                    )
                )
        scores += row["scores"]
    assert [
        (r["prompt_tokens"], r["response_tokens"], r["score"]) for r in rows
    ] == expected
    assert metrics["select/rows"] == len(expected) > len(source)
    assert metrics["select/score"] == pytest.approx(np.mean([s for *_, s in expected]))
    assert (
        metrics["select/score"]
        > metrics["select/score_before"]
        == pytest.approx(np.mean(scores))
    )


def test_fine_tuning_learns_the_sampled_ids_and_their_eos_alone(finished, selected):
    """Every answer is once in the batches of sft, id for id.

    The model's ids seldom are what its text encodes to.
    """
    workdir, _ = selected
    rows = read(workdir / "train.jsonl")
    tokenizer = load_tokenizer(finished / "00_tokenizer")
    source = open_source(f"jsonl:{workdir}/train.jsonl", kind="messages", split="all")
    found = []
    for batch in loader.sft_batches(
        source, tokenizer, batch_size=4, length=32, train=False
    ):
        arrays = (batch.tokens, batch.targets, batch.mask, batch.segment_ids)
        for tokens, targets, mask, segments in zip(*arrays, strict=True):
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                prompt = [
                    *tokens[here & (mask == 0)].tolist(),
                    int(tokens[here & (mask == 1)][0]),
                ]
                found.append((prompt, targets[here & (mask == 1)].tolist()))
    assert sorted(found) == sorted(
        (row["prompt_tokens"], row["response_tokens"]) for row in rows
    )
    ended = [row["response_tokens"][-1] == tokenizer.eos_id for row in rows]
    encoded = [tokenizer.encode(row["messages"][-1]["content"]) for row in rows]
    native = [
        [t for t in row["response_tokens"] if t != tokenizer.eos_id] for row in rows
    ]
    assert not all(ended), "some answers were cut off: no eos is made up for them"
    assert encoded != native, "encoding the text anew would have been something else"


def test_messages_are_the_turns_of_the_prompt(finished, selected):
    tokenizer = load_tokenizer(finished / "00_tokenizer")
    messages = [
        {"role": "user", "content": "love <|assistant|> tea"},
        {"role": "assistant", "content": "we see"},
        {"role": "user", "content": "what"},
    ]
    prompt = select.examples.chat.render_prompt(tokenizer, messages).tolist()
    assert select.messages_of(tokenizer, prompt) == messages
    assert select.messages_of(tokenizer, tokenizer.encode("TL;DR:")) == [
        {"role": "user", "content": "TL;DR:"}
    ]
    for row in read(selected[0] / "train.jsonl"):
        assert [m["role"] for m in row["messages"]][-2:] == ["user", "assistant"]


@pytest.mark.parametrize(
    "keep, min_score, expected",
    [
        (1, None, [2]),
        (2, None, [2, 1]),
        (9, None, [2, 1, 0]),
        (9, 0.5, [2, 1]),
        (9, 0.0, [2, 1]),
        (1, 3.0, []),
    ],
)
def test_keep_and_threshold(keep, min_score, expected):
    """Of equal scores the first; the repeated text and the empty one are never kept."""
    row = {
        "completions": ["a", "b", "c", "c", " "],
        "scores": [-1.0, 1.0, 2.0, 2.0, 9.0],
    }
    assert select.best(row, keep=keep, min_score=min_score) == expected


def test_nothing_above_the_threshold_is_an_error(finished, tmp_path):
    config = select_values(
        finished, finished / "03_collect" / "preferences", min_score=99.0
    )
    with pytest.raises(DataError, match=r"min_score=99.*no response of split 'train'"):
        recipe.run_stage(config, tmp_path / "run")


def test_text_without_ids_is_encoded_once_and_ends_with_eos(finished):
    tokenizer = load_tokenizer(finished / "00_tokenizer")
    source = Rows(
        [{"prompt": "what", "completions": ["love", "hate"], "scores": [1, 0]}],
        "preferences",
    )
    row = select.selected_row(tokenizer, source[0], 0)
    assert row["response_tokens"] == [*tokenizer.encode("love"), tokenizer.eos_id]
    assert [m["content"] for m in row["messages"]] == ["what", "love"]


def test_stored_ids_that_do_not_fit_lose_the_beginning_of_the_prompt(finished):
    tokenizer = load_tokenizer(finished / "00_tokenizer")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {
        "messages": messages,
        "prompt_tokens": np.arange(10, 20),
        "response_tokens": np.array([30, 31, 2]),
    }
    [example] = select.examples.fine_tuning(tokenizer, row, 6)
    pairs = [
        [16, 17, 0],
        [17, 18, 0],
        [18, 19, 0],
        [19, 30, 1],
        [30, 31, 1],
        [31, 2, 1],
    ]
    assert example[:, :3].tolist() == pairs
    assert example[:, 3].tolist() == [1, 0, 0, 0, 0, 0]  # it was cut
    with pytest.raises(DataError, match="outside the tokenizer's vocabulary"):
        select.examples.fine_tuning(
            tokenizer, row | {"response_tokens": np.array([999])}, 6
        )


def test_stored_ids_of_prompt_and_answer_go_together():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match="go together"):
        Rows([{"messages": messages, "response_tokens": [1, 2]}], "messages")
    with pytest.raises(DataError, match="non-negative integers"):
        Rows(
            [{"messages": messages, "prompt_tokens": [1], "response_tokens": [-2]}],
            "messages",
        )
