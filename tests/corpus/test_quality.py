"""The quality filter: Pareto's rule by its probability, and a classifier that learns."""

import random

import numpy as np
import pytest
from scipy import stats

from rlhfjax.corpus import quality

N = 20_000


@pytest.mark.parametrize("score", [0.0, 0.5, 0.9, 1.0])
def test_a_document_is_kept_with_the_probability_of_the_pareto_rule(score):
    """P(pareto(9) > 1 - s) = (2 - s)^-9, within 4 standard deviations."""
    kept = np.mean([quality.is_kept(f"text {i}", score, 9.0, 0) for i in range(N)])
    expected = (2 - score) ** -9
    assert abs(kept - expected) <= 4 * np.sqrt(expected * (1 - expected) / N)


def test_draws_have_numpys_distribution():
    draws = [quality.lomax(f"text {i}", 9.0, 3) for i in range(N)]
    ours = stats.kstest(draws, stats.lomax(9.0).cdf)
    numpys = np.random.default_rng(0).pareto(9.0, N)
    assert ours.pvalue > 0.01
    assert stats.ks_2samp(draws, numpys).pvalue > 0.01


def test_a_draw_depends_on_the_text_and_the_seed_alone():
    draw = quality.lomax("text", 9.0, 0)
    assert draw == quality.lomax("text", 9.0, 0)
    assert draw != quality.lomax("texts", 9.0, 0)
    assert draw != quality.lomax("text", 9.0, 1)


def documents(vocabulary, n, seed):
    rng = random.Random(seed)
    return [" ".join(rng.choices(vocabulary, k=30)) for _ in range(n)]


def test_the_classifier_tells_the_reference_from_raw_text():
    good = documents(["the", "of", "and", "proof", "theorem", "lemma"], 60, 0)
    bad = documents(["the", "of", "and", "click", "buy", "now"], 90, 1)
    classifier = quality.train(good, bad)
    assert classifier.auc == 1.0
    assert min(quality.score(classifier, text) for text in good) > 0.9
    assert max(quality.score(classifier, text) for text in bad) < 0.1
    unknown = quality.score(classifier, "")
    assert unknown == pytest.approx(1 / (1 + np.exp(-classifier.intercept)))


def test_the_auc_is_of_documents_that_were_held_out():
    """Reference and raw documents of one kind cannot be told apart, but learned by heart."""
    words = [f"w{i}" for i in range(2000)]
    classifier = quality.train(documents(words, 200, 0), documents(words, 200, 1))
    assert classifier.auc < 0.8


def test_indices_are_spread_evenly():
    assert list(quality.spread(10, 4)) == [0, 2, 5, 7]
    assert list(quality.spread(3, 10)) == [0, 1, 2]
