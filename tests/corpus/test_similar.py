"""ROUGE-L and the instructions that are taken."""

import random

import numpy as np
import pytest

from rlhfjax.corpus import instructions
from rlhfjax.corpus.instructions import Rules, Task
from rlhfjax.corpus.similar import Pool

RULES = Rules(min_words=3, max_words=8, banned=("image",), similarity=0.7)


def longest_common(a, b):
    """The length of the longest common subsequence, by the textbook's table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else best
    return table[-1][-1]


def test_similarity_is_rouge_l():
    """2 LCS / (m + n) with words as units, against the table of dynamic programming."""
    rng = random.Random(0)
    for _ in range(50):
        a, b = (rng.choices("abcd", k=rng.randint(1, 9)) for _ in range(2))
        pool = Pool()
        pool.add("one", " ".join(a))
        expected = 2 * longest_common(a, b) / (len(a) + len(b))
        assert pool.nearest(" ".join(b)).similarity == pytest.approx(expected)


def test_the_nearest_is_the_most_similar_one():
    pool = Pool()
    assert pool.nearest("x") == ("", 0.0)
    pool.add("first", "write a poem about rain")
    pool.add("second", "write a short poem about snow")
    name, similarity = pool.nearest("Write a poem about snow!")
    assert name == "second" and similarity == pytest.approx(2 * 5 / (5 + 6))


def test_why_an_instruction_is_not_taken():
    pool = Pool()
    pool.add("seed", "write a poem about rain")
    asked = {
        "?!": "empty",
        "write poems": "words",
        "one two three four five six seven eight nine": "words",
        "Describe this Image please": "banned",
        "describe images of cats": "",
        "write a poem about snow": "similar",  # 2 * 4 / 10 = 0.8
        "write the poem on snow": "",  # 2 * 2 / 10
    }
    found = {text: instructions.problem(text, RULES, pool)[0] for text in asked}
    assert found == asked


def test_an_answer_is_taken_apart_by_its_numbers():
    answer = " Name a fruit.\nTask 10: Sort\n  these  words.\n11) Add 2 and 2."
    expected = ["Name a fruit.", "Sort these words.", "Add 2 and 2."]
    assert instructions.parse(answer, False) == expected
    assert instructions.parse(answer, True) == expected[:-1]
    listed = "Here are more tasks:\n\n**9.** Name a fruit.\n## 10: Sing."
    assert instructions.parse(listed, False) == ["Name a fruit.", "Sing."]
    assert instructions.parse("Say 3.5 words", False) == ["Say 3.5 words"]
    assert instructions.parse("", False) == []


def test_examples_are_of_seeds_and_of_what_was_generated():
    seeds = [Task(f"seed-{i}", f"s{i}") for i in range(9)]
    generated = [Task(f"0-{i}-0", f"g{i}") for i in range(5)]
    rng = np.random.default_rng(0)
    options = {"n_examples": 6, "n_generated": 2, "rng": rng}
    for _ in range(20):
        drawn = instructions.examples_of(seeds, generated, **options)
        kinds = [task.name.startswith("seed") for task in drawn]
        assert (len(drawn), sum(kinds)) == (6, 4)
        assert len(set(drawn)) == 6
    none = instructions.examples_of(seeds, [], **options)
    assert len(none) == 6 and {task.name[:4] for task in none} == {"seed"}


def test_the_question_numbers_its_examples():
    examples = [Task("a", "Say {next}."), Task("b", "Sing.")]
    question = instructions.question(instructions.TEMPLATE, examples)
    assert question == (
        "Come up with a series of tasks:\nTask 1: Say {next}.\nTask 2: Sing.\nTask 3:"
    )


def test_what_is_taken_of_a_round_knows_where_it_is_from():
    pool = Pool()
    pool.add("seed-0", "write a poem about rain")
    replies = [
        {
            "text": "Name three red fruits\n2. name three red fruits",
            "is_cut": False,
            "model": "m",
        },
        {"text": "Write a poem about rain now", "is_cut": False, "model": "m"},
    ]
    drawn = [[Task("seed-0", "x")], [Task("seed-0", "x"), Task("1-0-0", "y")]]
    result = instructions.take(replies, drawn, RULES, pool, number=4, seed=7)
    assert result["counts"] == {"": 1, "similar": 2}
    (one,) = result["taken"]
    assert one == {
        "id": "4-0-0",
        "text": "Name three red fruits",
        "model": "m",
        "seed": 7,
        "round": 4,
        "examples": ["seed-0"],
        "nearest": "seed-0",
        "similarity": 0.0,
    }
    assert pool.nearest("name three red fruits") == ("4-0-0", 1.0)
