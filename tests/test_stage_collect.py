"""Labelers: one protocol, agreement in `collect`, and people's rankings to and from datasets."""

import json
import re
from collections import Counter

import jax
import numpy as np
import pytest
import sentencepiece

from rlhfjax import recipe
from rlhfjax.data.preferences import read_preferences
from rlhfjax.data.tokenizer import load_tokenizer, train_sentencepiece
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.rewards.agreement import agreement
from rlhfjax.rewards.labelers import Answers, Labeler, RankingsLabeler, make_answers
from rlhfjax.rewards.load import load_labeler
from rlhfjax.rewards.rankings import Ranking, from_row, read_rankings, write_rankings
from rlhfjax.stages import collect, stage_config
from rlhfjax.stages.import_rankings import opinions_of
from tests import tiny
from tests.test_stages import run_steps, stage_values

ONE = make_layout(MeshConfig(), jax.devices()[:1])
LENGTH = "rule:tests.rewards.some_rules:words?workers=1"


def read(folder, split="train"):
    source = read_preferences(folder, split)
    return [source[i] for i in range(len(source))]


def ids(row):
    return [
        row["prompt_tokens"].tolist(),
        *(one.tolist() for one in row["completion_tokens"]),
    ]


@pytest.fixture(scope="module")
def folder(finished):
    return finished / "03_collect" / "preferences"


def collected(conversations, finished, workdir, **changes):
    values = stage_values("collect", conversations, finished, **changes)
    return recipe.run(values, workdir), read(workdir / "preferences")


def test_other_labelers_change_no_data_and_their_agreement_is_reported(
    conversations, finished, folder, tmp_path
):
    others = (LENGTH, str(finished / "04_reward"))
    metrics, rows = collected(conversations, finished, tmp_path, others=others)
    for row, before in zip(rows, read(folder), strict=True):
        assert ids(row) == ids(before)
        assert row["scores"] == before["scores"]
    rule = np.array(
        [[len(text.split()) for text in row["completions"]] for row in rows], np.float64
    )
    gold = np.array([row["scores"] for row in rows])
    two, _ = collected(conversations, finished, tmp_path / "two", others=(LENGTH,))
    for name, value in agreement([gold, rule]).items():
        assert two[f"collect/{name}"] == pytest.approx(value, rel=1e-9)
    assert metrics["collect/agreement"] != two["collect/agreement"]
    assert metrics["collect/agreement_pairs"] == 24 * 6


def test_what_predicts_the_labels_is_reported():
    """The longer response is better in one of two pairs, the one with "good" in both."""
    rows = [
        {
            "completions": texts,
            "scores": [1.0, 0.0],
            "completion_tokens": [[1] * len(text) for text in texts],
            "cut": 0.0,
        }
        for texts in (["good", "x"], ["good", "a longer one"])
    ]
    metrics = collect._describe(rows)
    assert metrics["collect/response_length"] == (4 + 1 + 4 + 12) / 4
    assert metrics["collect/length_accuracy"] == 0.5
    assert metrics["collect/word_accuracy"] == 1.0
    assert metrics["collect/ten_words_accuracy"] == 1.0


def test_a_reward_model_labels(conversations, finished, tmp_path):
    _, rows = collected(
        conversations, finished, tmp_path, labeler=str(finished / "04_reward")
    )
    assert len({score for row in rows for score in row["scores"]}) > 30


def test_answers_of_a_fixed_length_cut_at_a_token(conversations, finished, tmp_path):
    tokenizer = load_tokenizer(finished / "00_tokenizer")
    whole = [
        ids(row)[1:]
        for row in collected(
            conversations, finished, tmp_path / "a", stop_at_eos=False
        )[1]
    ]
    assert {len(answer) for row in whole for answer in row} == {
        tiny.SAMPLING["max_new_tokens"]
    }
    assert any(tokenizer.eos_id in answer[:-1] for row in whole for answer in row)
    often = Counter(
        token
        for row in whole
        for answer in row
        for token in answer[3:-1]
        if token != tokenizer.eos_id
    )
    stop = often.most_common(1)[0][0]
    truncate = {"token": piece(finished, stop), "after": 3}
    options = {"stop_at_eos": False, "truncate": truncate}
    short = [
        ids(row)[1:]
        for row in collected(conversations, finished, tmp_path / "b", **options)[1]
    ]
    cut = [
        [
            answer[: answer.index(stop, 3) + 1] if stop in answer[3:] else answer
            for answer in row
        ]
        for row in whole
    ]
    assert short == cut != whole


def test_responses_end_before_a_stop_text(conversations, finished, tmp_path):
    """The stored ids and texts are those of the whole responses, cut before the first stop text."""
    before = collected(conversations, finished, tmp_path / "a")[1]
    texts = [text for row in before for text in row["completions"]]
    stop = Counter(text[2:4] for text in texts if len(text) > 4).most_common(1)[0][0]
    tokenizer = load_tokenizer(finished / "00_tokenizer")
    after = collected(conversations, finished, tmp_path / "b", stop=(stop, "never"))[1]
    cut = [text.partition(stop)[0] for text in texts]
    assert [text for row in after for text in row["completions"]] == cut != texts
    for row, old in zip(after, before, strict=True):
        spelled = [
            tokenizer.decode(answer.tolist()) for answer in row["completion_tokens"]
        ]
        assert spelled == row["completions"]
        for answer, whole, text in zip(
            ids(row)[1:], ids(old)[1:], old["completions"], strict=True
        ):
            assert stop in text or answer == whole
    with pytest.raises(ConfigError, match=r"collect.stop: a text must not be empty"):
        collected(conversations, finished, tmp_path / "c", stop=("",))


def test_min_p_and_the_penalty_change_what_is_collected(
    conversations, finished, tmp_path
):
    """min_p 1 leaves the likeliest token alone, so that all responses to a prompt are equal."""
    rows = collected(conversations, finished, tmp_path / "a", min_p=1.0)[1]
    assert all(len({tuple(answer) for answer in ids(row)[1:]}) == 1 for row in rows)
    penalty = {"min_p": 1.0, "repetition_penalty": 1e4, "stop_at_eos": False}
    rows = collected(conversations, finished, tmp_path / "b", **penalty)[1]
    for row in rows:
        prompt, answer, *_ = ids(row)
        assert len({*prompt, *answer}) == len({*prompt}) + len(answer)


def piece(finished, token):
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(finished / "00_tokenizer" / "tokenizer.model")
    )
    return model.id_to_piece(token)


def exported(folder, workdir):
    recipe.run(
        stage_config(
            "export_rankings", preferences=(str(folder),), time="2025-03-01T10:00"
        ),
        workdir,
    )
    return workdir / "rankings.jsonl"


def test_export_then_import_keeps_native_ids_order_and_ties(finished, folder, tmp_path):
    path = exported(folder, tmp_path / "out")
    rankings = read_rankings(str(path))
    rows = read(folder) + read(folder, "validation")
    assert [one.ranks for one in rankings] == [tuple(row["ranks"]) for row in rows]
    assert {(one.labeler, one.time) for one in rankings} == {
        ("gold:sentiment", "2025-03-01T10:00")
    }
    config = stage_config(
        "import_rankings",
        rankings=str(path),
        tokenizer=str(finished / "00_tokenizer"),
        answers=(str(folder),),
        validation=0.3,
    )
    metrics = recipe.run(config, tmp_path / "in")
    back = read(tmp_path / "in" / "preferences") + read(
        tmp_path / "in" / "preferences", "validation"
    )
    assert sorted(map(ids, back)) == sorted(map(ids, rows))
    by_ids = {str(ids(row)): row for row in rows}
    for row in back:
        before = by_ids[str(ids(row))]
        assert list(row["ranks"]) == list(before["ranks"])
        np.testing.assert_array_equal(
            np.sign(np.subtract.outer(row["scores"], row["scores"])),
            np.sign(np.subtract.outer(before["scores"], before["scores"])),
        )
        assert row["labeler"] == "gold:sentiment"
    assert metrics["import_rankings/rankings"] == 32


def test_people_are_labelers_of_the_answers_they_ranked(
    conversations, finished, folder, tmp_path
):
    """`collect` with the same seed samples the same answers.

    The file's labels then are the gold ones.
    """
    path = exported(folder, tmp_path / "out")
    metrics, rows = collected(
        conversations,
        finished,
        tmp_path / "again",
        labeler=f"rankings:{path}",
        others=("gold:sentiment",),
    )
    assert [list(row["ranks"]) for row in rows] == [
        list(row["ranks"]) for row in read(folder)
    ]
    assert metrics["collect/agreement"] == metrics["collect/agreement_kappa"] == 1
    with pytest.raises(
        DataError, match=r"it has no opinion about response \d of prompt \d+$"
    ):
        collected(
            conversations, finished, tmp_path / "c", labeler=f"rankings:{path}", seed=5
        )


def test_every_labeler_follows_the_protocol(finished, folder, tmp_path):
    tokenizer = load_tokenizer(finished / "02_sft" / "model")
    path = exported(folder, tmp_path)
    tokens = (
        np.random.default_rng(0).integers(4, tiny.VOCAB, size=(6, 16)).astype(np.int32)
    )
    answers = make_answers(
        tokens, np.ones_like(tokens), np.ones((6, 8), np.float32), 3, tokenizer
    )
    answers = answers._replace(
        **{
            name: jax.numpy.asarray(getattr(answers, name))
            for name in ("tokens", "attention_mask", "mask")
        }
    )
    for name in (
        "gold:sentiment",
        LENGTH,
        str(finished / "04_reward"),
        f"rankings:{path}",
    ):
        labeler = load_labeler(name, ONE, tokenizer)
        assert isinstance(labeler, Labeler)
        assert labeler(answers).shape == (2, 3)


ANN = {
    "prompt": "hi",
    "completions": ["a", "b", "c"],
    "ranking": [1, 2, 2],
    "labeler": "ann",
    "time": "2025-03-01T10:00",
}
BOB = {"prompt": "hi", "completions": ["c", "a"], "ranking": [1, 2], "labeler": "bob"}


def test_rankings_of_several_people_are_rows_of_their_own(
    finished, conversations, tmp_path
):
    more = [
        {
            "prompt": f"q {i}\u2028x",
            "completions": ["a b", "c"],
            "ranking": [1 + i % 2, 1],
        }
        for i in range(30)
    ]
    (tmp_path / "r.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (ANN, BOB, *more))
    )
    config = stage_config(
        "import_rankings",
        rankings=f"{tmp_path}/r*.jsonl",
        tokenizer=str(finished / "00_tokenizer"),
        validation=0.3,
    )
    metrics = recipe.run(config, tmp_path / "in")
    folder = tmp_path / "in" / "preferences"
    rows = {
        row["labeler"]: row
        for row in read(folder) + read(folder, "validation")
        if row["prompt"] == "hi"
    }
    assert list(rows["ann"]["ranks"]) == [1, 2, 2]
    tokenizer = load_tokenizer(finished / "00_tokenizer")
    assert ids(rows["bob"])[1:] == [
        [*tokenizer.encode(text), tokenizer.eos_id] for text in ("c", "a")
    ]
    # ann: a > c; bob: c > a. They share that one pair and nothing else.
    assert metrics["import_rankings/agreement"] == 0
    assert metrics["import_rankings/agreement_pairs"] == 1
    assert metrics["import_rankings/labelers"] == 3
    values = stage_values(
        "reward",
        conversations,
        finished,
        preferences=(str(folder),),
        loss={"name": "rao_kupper"},
    )
    assert np.isfinite(
        run_steps("reward", values, ONE, steps=1)[0][0]["loss"]
    )  # K differs between prompts


def test_pitfall_41_rankings_of_one_prompt_are_in_one_split(tmp_path):
    """As a text, as one user turn, and as a conversation that begins with it; by two labelers."""
    train_sentencepiece(
        ["the cat sat on the mat"] * 9, tmp_path / "tokenizer", vocab_size=275
    )
    rows = []
    for i in range(40):
        user = {"role": "user", "content": f"hi {i}"}
        more = [
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "no"},
        ]
        for prompt in (f"hi {i}", [user], [user, *more]):
            rows.append(
                {
                    "prompt": prompt,
                    "completions": ["a", "b"],
                    "ranking": [1, 2],
                    "labeler": f"{i % 2}",
                }
            )
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "rankings": f"{tmp_path}/r.jsonl",
        "tokenizer": str(tmp_path / "tokenizer"),
        "validation": 0.3,
    }
    recipe.run(stage_config("import_rankings", **options), tmp_path / "in")
    found = [
        [
            re.search(r"hi \d+", row["prompt"])[0]
            for row in read(tmp_path / "in" / "preferences", split)
        ]
        for split in ("train", "validation")
    ]
    assert sum(map(len, found)) == 120 and not set(found[0]) & set(found[1])
    assert all(found[1].count(prompt) == 3 for prompt in found[1]) and len(found[1]) > 9


def test_opinions_are_of_pairs_within_one_ranking():
    """a > b in one ranking and b > c in another say nothing of a and c.

    A pair has one direction, whoever is first.
    """
    some = [
        Ranking("hi", ("b", "a"), (2, 1)),
        Ranking("hi", ("b", "c"), (1, 2)),
        Ranking("yo", ("b", "a"), (1, 1)),
    ]
    assert opinions_of(some) == {
        ("hi", "a", "b"): 1.0,
        ("hi", "b", "c"): 1.0,
        ("yo", "a", "b"): 0.0,
    }
    assert (
        opinions_of([*some, Ranking("hi", ("a", "b"), (2, 1))])["hi", "a", "b"] == -1.0
    )


def test_one_prompt_ranked_twice_is_looked_up_in_the_ranking_that_holds_the_answers():
    rankings = [Ranking("hi", ("a", "b"), (1, 2)), Ranking("hi", ("b", "c"), (1, 2))]
    answers = Answers(
        None, None, None, ["hi", "hi", "yo"], [["b", "c"], ["b", "a"], ["a", "b"]]
    )
    labels = RankingsLabeler(rankings)(answers)
    np.testing.assert_array_equal(labels, [[-1, -2], [-2, -1], [np.nan, np.nan]])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"ranking": [1, 2]}, "3 completions and 2 ranks"),
        ({"ranking": [0, 1, 2]}, "whole numbers from 1"),
        ({"ranking": [1, True, 2]}, "whole numbers from 1"),
        ({"completions": "abc"}, "list of texts"),
        ({"prompt": ""}, "'prompt' must be"),
        ({"prompt": [{"role": "robot", "content": "x"}]}, "role 'robot' is none of"),
        ({"time": "yesterday"}, "yesterday"),
        ({"labeler": 3}, "'labeler' must be text"),
    ],
)
def test_malformed_rankings_are_named_by_line(change, why, tmp_path):
    (tmp_path / "r.jsonl").write_text(
        json.dumps(BOB) + "\n\n" + json.dumps(ANN | change) + "\n"
    )
    with pytest.raises(DataError, match=rf"r\.jsonl:3: .*{why}"):
        read_rankings(str(tmp_path / "r.jsonl"))


def test_rankings_survive_the_round_trip(tmp_path):
    some = [
        Ranking(
            [{"role": "user", "content": "é\u2028"}],
            ("x", ""),
            (2, 1),
            "ann",
            "2025-03-01",
        ),
        from_row(
            {"prompt": "p", "completions": ["a", "b", "c"], "scores": [0.5, 2.0, 0.5]},
            "gold",
        ),
    ]
    assert some[1].ranks == (2, 1, 2)
    write_rankings(tmp_path / "r.jsonl", some)
    assert read_rankings(str(tmp_path / "r.jsonl")) == some


def test_several_people_in_one_file_have_to_be_named(finished, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(ANN) + "\n" + json.dumps(BOB) + "\n")
    tokenizer = load_tokenizer(finished / "00_tokenizer")
    with pytest.raises(ConfigError, match="name one of ann, bob"):
        load_labeler(f"rankings:{path}", ONE, tokenizer)
    assert isinstance(load_labeler(f"rankings:{path}@bob", ONE, tokenizer), Labeler)
