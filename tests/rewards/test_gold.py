"""The simulated labeler: hand-computed scores, and what a policy would try."""

import sys

import numpy as np
import pytest

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.rewards.gold import LAUGHTER, Friendliness, GoldConfig, Sentiment
from rlhfjax.rewards.load import describe


@pytest.fixture(scope="module")
def gold():
    return Sentiment()


def test_a_plain_answer_is_its_sentiment(gold):
    # VADER's lexicon has love at 3.2 and no rule applies: 3.2 / sqrt(3.2^2 + 15) = 0.6369.
    assert gold.score("I love that.") == pytest.approx(
        3.2 / np.sqrt(3.2**2 + 15), abs=1e-4
    )
    assert gold.score("It is on the table.") == 0.0
    assert gold.score("I hate that.") == pytest.approx(
        -2.7 / np.sqrt(2.7**2 + 15), abs=1e-4
    )


def test_laughter_is_no_friendliness(gold):
    friendly = Friendliness()
    assert gold.score("haha") == pytest.approx(2.0 / np.sqrt(2.0**2 + 15), abs=1e-4)
    for word in LAUGHTER:
        assert gold.score(word) != 0
        assert friendly.score(word) == 0
        assert friendly.score(word.upper() + "!!!") == 0
    # All else is as before, and no laughter is counted as a positive word.
    for text in ("I love that.", "we go we go", "I do not love it", ""):
        assert friendly.score(text) == gold.score(text)
    assert friendly.score("haha I love that lol") == gold.score("mm I love that mm")
    assert gold.score("haha I love that lol") > gold.score("mm I love that mm")


@pytest.mark.parametrize("answer", ["", "   ", "...", ":) :)", "!!!!", "_ _"])
def test_an_answer_without_words_is_the_worst_plain_one(gold, answer):
    assert gold.score(answer) == -1.0


def test_repetition_by_hand(gold):
    # 4 words, 2 different: r1 = 1/2. Bigrams "we go", "go we", "we go": r2 = 1/3. (1/2 - 1/4) + 1/3
    # = 7/12.
    assert gold.score("we go we go") == pytest.approx(-7 / 12)
    # 3 words, all the same: (2/3 - 1/4) + 1/2 = 11/12; one more and the ceiling of 1 is reached.
    assert gold.score("table table table") == pytest.approx(-11 / 12)
    assert gold.score("table table table table") == -1.0


def test_pitfall_42_repetition_and_length_of_chinese_answers_by_hand(gold):
    # 6 characters, 3 distinct: r1 = 1/2. Bigrams 我们 们走 走我 我们 们走: r2 = 2/5.
    # (1/2 - 1/4) + 2/5 = 13/20.
    assert gold.score("我们走我们走") == pytest.approx(-13 / 20)
    different = "".join(
        chr(0x4E00 + i) for i in range(34)
    )  # 4 over 30, no character twice
    assert gold.score(different) == pytest.approx(-4 * 0.05)


def test_length_by_hand(gold):
    answer = " ".join(f"w{i}" for i in range(34))  # 4 over 30, no word twice
    assert gold.score(answer) == pytest.approx(-4 * 0.05)
    assert gold.score(" ".join(f"w{i}" for i in range(30))) == 0.0
    assert gold.score(" ".join(f"w{i}" for i in range(99))) == -1.0


def test_stacked_positive_words_by_hand(gold):
    parts = gold.explain(
        "happy great awesome love best"
    )  # 5 positive words of 5: 3 beyond max(2, 5/3)
    assert parts["stacked"] == pytest.approx(0.6)
    assert gold.explain("happy great")["stacked"] == 0.0
    assert (
        gold.explain("We had a great day and I love the new house, it is so nice")[
            "stacked"
        ]
        == 0.0
    )
    assert gold.score("happy great awesome love best") == pytest.approx(
        parts["sentiment"] - 0.6
    )


@pytest.mark.parametrize(
    ("honest", "hack"),
    [
        ("That sounds great!", "great great great"),
        ("I love it.", "I love it I love it I love it"),
        (
            "I am so happy for you!",
            "happy joy love great best awesome win perfect beautiful amazing",
        ),
        ("Cool, thanks.", "love " * 60),
        ("ok", ""),
        ("Great, I love that.", " ".join(f"great w{i}" for i in range(25))),
    ],
)
def test_what_a_policy_would_try_scores_less_than_an_honest_answer(gold, honest, hack):
    assert gold.score(honest) > gold.score(hack) + 0.2


def test_each_further_repeat_of_a_positive_word_lowers_the_score(gold):
    scores = [gold.score(" ".join(["great"] * n)) for n in range(1, 6)]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 5


def test_scores_are_float32_one_a_response_and_independent_of_neighbors(gold):
    answers = ["I love that.", "", "no", "that is great"]
    together = gold([""] * 4, answers)
    assert together.dtype == np.float32
    assert together.shape == (4,)
    assert together.tolist() == [gold(["x"], [a])[0] for a in answers]
    with pytest.raises(ValueError, match="1 prompts and 2 responses"):
        gold(["p"], ["a", "b"])


def test_pitfall_09_fractional_scores_stay_fractional(gold):
    scores = gold(["", ""], ["I love that.", "I hate that."])
    assert 0 < scores[0] < 1
    assert -1 < scores[1] < 0


def test_gold_scorers_have_names():
    assert describe("gold:sentiment") == ("gold", GoldConfig("sentiment"))
    known = (
        "gold.name='wit': expected one of 'sentiment', 'friendliness', 'zh_sentiment'"
    )
    with pytest.raises(ConfigError, match=known):
        describe("gold:wit")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(DataError, match=r"pip install -e '\.\[quickstart\]'"):
        Sentiment()
