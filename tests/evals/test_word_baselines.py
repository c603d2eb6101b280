"""What single words and length predict of a labeler's preferences."""

import numpy as np
import pytest

from rlhfjax.evals.words import substitutes, word_baselines


def random_rows(prompts, k, seed=0, vocabulary=200, length=8):
    rng = np.random.default_rng(seed)
    names = np.array([f"w{i}" for i in range(vocabulary)])
    draws = rng.integers(0, vocabulary, (prompts, k, length))
    return [[" ".join(names[row]) for row in rows] for rows in draws], rng


def test_by_hand():
    """Prompts 0 and 2 give good 2, bad -1, day -1. Of 1 and 3 two pairs are right, one is wrong."""
    texts = [
        ["good bad", "bad day"],
        ["good thing", "some thing", "other thing"],
        ["good", "bad"],
        ["a good one", "a one"],
    ]
    labels = np.array([[1, 0, np.nan], [2, 1, 1], [1.0, 0, np.nan], [0, 1, np.nan]])
    found = word_baselines(texts, labels)
    assert found.chosen == (("good", 1), ("bad", -1), ("day", -1))
    assert found.pairs == 3
    assert found.word == pytest.approx(2 / 3) == found.ten


def test_a_word_list_in_disguise_is_found():
    """The labeler counts five words of 200; a response has eight words."""
    texts, _ = random_rows(400, 4)
    listed = {f"w{i}" for i in range(0, 50, 10)}
    labels = np.array(
        [[len(listed & set(text.split())) for text in row] for row in texts], np.float64
    )
    found = word_baselines(texts, labels)
    assert {word for word, _ in found.chosen[:5]} == listed
    assert all(sign == 1 for _, sign in found.chosen[:5])
    # The best ten have five words of chance, which vote where the five do not differ: ties are
    # dropped, so that of the rest nearly all are predicted.
    assert found.ten > 0.9 > found.word > 0.55


def test_disliked_words_count_too():
    texts, _ = random_rows(200, 2, vocabulary=20)
    labels = np.array([[-float("w3" in x.split()) for x in row] for row in texts])
    found = word_baselines(texts, labels)
    assert found.chosen[0] == ("w3", -1) and found.word == 1.0


def test_noise_is_not_predicted():
    """Words are chosen on one half: on the other they are right half of the time."""
    texts, rng = random_rows(600, 4)
    labels = rng.normal(size=(600, 4))
    found = word_baselines(texts, labels)
    assert found.pairs == 300 * 6
    # Pairs of a prompt share responses: about 3 sd of 900 independent pairs.
    assert abs(found.word - 0.5) < 0.02 and abs(found.ten - 0.5) < 0.05


def test_without_pairs_it_is_a_half():
    assert word_baselines([], np.zeros((0, 2))).ten == 0.5
    found = word_baselines([["a", "b"]] * 4, np.zeros((4, 2)))
    assert (found.word, found.pairs, found.chosen) == (0.5, 0, ())


def test_at_most_eight_responses_of_a_prompt_count():
    texts, rng = random_rows(4, 20)
    found = word_baselines(texts, rng.normal(size=(4, 20)))
    assert found.pairs == 2 * 28


def test_substitutes_by_hand():
    """Length orders two of three pairs; the third has no label."""
    texts = [["a", "b c", "d"], ["a", "b c", "d"]]
    lengths = np.array([[1, 2, 3], [1, 2, 1]])
    labels = np.array([[0.0, 1.0, 2.0], [1.0, 0.0, np.nan]])
    found = substitutes(texts, lengths, labels)
    assert found["length_accuracy"] == 0.75
    # From the first prompt: a is worse twice, d better twice, b and c neither. Two words are
    # ahead; a comes first. In the second prompt a is the better one.
    assert found["word_accuracy"] == 0.0 == found["ten_words_accuracy"]
