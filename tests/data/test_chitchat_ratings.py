"""Pairs of rated conversations: who is in which split, and what a row has."""

import itertools
import json
import os
import random

import numpy as np
import pytest

from rlhfjax.data import package_corpora
from rlhfjax.data.chitchat import Chitchat, ChitchatRatings, dialogue
from rlhfjax.data.rows import SPLITS, split_of
from rlhfjax.data.sources import open_source


@pytest.fixture(scope="module")
def rated():
    builder = ChitchatRatings()
    examples = list(builder.examples())  # read once, not once a split
    builder.examples = lambda: iter(examples)
    return {split: list(builder.rated(split)) for split in SPLITS}


def test_a_conversation_is_in_one_split(rated):
    keys = {split: {one.key for one in rows} for split, rows in rated.items()}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not keys[one] & keys[other]
    sizes = {split: len(rows) for split, rows in rated.items()}
    assert sum(map(len, keys.values())) == sum(sizes.values()) == 1958
    for split, share in {"train": 0.5, "validation": 0.1, "test": 0.4}.items():
        assert sizes[split] / 1958 == pytest.approx(share, abs=0.03)


def test_the_ratings_are_those_of_the_package_and_go_with_length(rated):
    file = package_corpora.package_file(*Chitchat.source)
    raw = json.loads(file.read_text(encoding="utf-8"))
    everything = [one for rows in rated.values() for one in rows]
    for one in random.Random(0).sample(everything, 50):
        ratings = raw[one.key]["ratings"]
        values = [int(ratings[name]) for name in ("witty", "upbeat", "interesting")]
        assert one.score == sum(values) / 3 and values != [5, 5, 5]
        assert one.opening == raw[one.key]["prompt"]
    scores = np.array([one.score for one in everything])
    lengths = np.log([len(one.text) for one in everything])
    assert np.corrcoef(scores, lengths)[0, 1] == pytest.approx(0.39, abs=0.02)


def test_a_dialogue_is_a_line_per_turn_with_both_speakers():
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello\nthere"},
        {"role": "user", "content": "bye"},
    ]
    assert dialogue(turns) == "A: hi\nB: hello\nthere\nA: bye"


def conversation(i, opening, ratings):
    turns = [
        [{"text": f"turn {t} of {i}", "sender": "ab"[t % 2]} for t in range(6)],
    ]
    names = ("witty", "upbeat", "interesting")
    rated = dict(zip(names, map(str, ratings), strict=True))
    return {"messages": turns, "prompt": opening, "ratings": rated}


def test_pairs_are_of_one_opening_and_two_points(tmp_path, monkeypatch):
    rng = random.Random(1)
    raw = {}
    for i in range(80):
        ratings = [rng.randint(1, 10) for _ in range(3)]
        raw[f"key {i}"] = conversation(i, f"opening {i % 2}?", ratings)
    raw["default"] = conversation(50, "opening 0?", [5, 5, 5])
    raw["no opening"] = conversation(51, None, [1, 1, 1])
    raw["short"] = conversation(52, "opening 0?", [1, 1, 1])
    raw["short"]["messages"][0] = raw["short"]["messages"][0][:5]
    package = tmp_path / "chitchat_dataset"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "dataset.json").write_text(json.dumps(raw))
    monkeypatch.syspath_prepend(tmp_path)
    for split in SPLITS:
        expected = set()
        for a, b in itertools.combinations(list(raw)[:80], 2):
            scores = [sum(map(int, raw[k]["ratings"].values())) / 3 for k in (a, b)]
            if (
                raw[a]["prompt"] == raw[b]["prompt"]
                and abs(scores[0] - scores[1]) >= 2
                and {split_of(k, 0.1, 0.4) for k in (a, b)} == {split}
            ):
                expected.add((a, b))
        found = dict(ChitchatRatings().examples_of(split))
        assert {tuple(row["conversations"]) for row in found.values()} == expected
    source = open_source("tfds:chitchat_ratings", data_dir=os.fspath(tmp_path / "data"))
    assert source.kind == "preferences" and len(source) > 20
    row = source[0]
    number = row["completions"][0].split()[4]  # of "A: turn 0 of 7"
    ratings = raw[f"key {number.strip()}"]["ratings"]
    assert row["scores"][0] == pytest.approx(sum(map(int, ratings.values())) / 3)
    assert row["prompt"] == raw[f"key {number.strip()}"]["prompt"]
