"""The draw itself: inverse CDF, top-k, top-p, by enumeration of u and by frequencies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.sampling import Sampling
from rlhfjax.sampling import choose as module
from rlhfjax.sampling.choose import (
    choose,
    inverse_cdf,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_seen,
)

cdf = jax.jit(inverse_cdf)


@functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))
def drawn(logits, u, **settings):
    return choose(logits, u, sampling(**settings))


def sampling(**settings):
    return Sampling(max_new_tokens=1, eos_id=1, pad_id=0, **settings)


def grid(n):
    return (np.arange(n, dtype=np.float32) + 0.5) / n


def rows(logits, n):
    """The same logits n times."""
    return np.broadcast_to(np.asarray(logits, np.float32), (n, len(logits)))


@pytest.mark.parametrize("vocab", [3, 64, 65, 200])
def test_inverse_cdf_measures_are_the_probabilities(vocab):
    """Over an even grid of u, token i is drawn on an interval of length p_i, and the tokens come in
    order.
    """
    logits = 2 * np.random.default_rng(0).normal(size=vocab)
    n = 20_000
    tokens = np.asarray(cdf(rows(logits, n), grid(n)))
    share, p = np.bincount(tokens, minlength=vocab) / n, np.exp(logits)
    np.testing.assert_allclose(share, p / p.sum(), atol=1.5 / n + 1e-6)
    assert (np.diff(tokens) >= 0).all()


def test_a_removed_token_is_never_drawn():
    """Not at u = 0, not just below 1, and not where rounding leaves the CDF's end below u times the
    total.
    """
    logits = np.full(200, -np.inf)
    logits[[5, 70, 130]] = 0.0, 1.0, -20.0
    u = np.concatenate(
        [[0.0, 1e-30, np.nextafter(np.float32(1), np.float32(0))], grid(1000)]
    ).astype(np.float32)
    tokens = np.asarray(cdf(rows(logits, len(u)), u))
    assert set(tokens.tolist()) <= {5, 70, 130}
    assert tokens[0] == 5


def test_first_above_falls_back_to_the_last_that_adds():
    ends = rows([0.0, 0.5, 0.5, 0.9, 0.9], 5)
    got = jax.jit(module._first_above)(ends, jnp.array([0.0, 0.49, 0.5, 0.9, 2.0]))
    assert got.tolist() == [1, 1, 3, 3, 3]


def test_frequencies_match_probabilities():
    """Chi-square of 20,000 draws over 6 tokens, 5 degrees of freedom: 20.5 is exceeded once in a
    thousand.
    """
    p = np.array([0.4, 0.25, 0.15, 0.1, 0.07, 0.03])
    n = 20_000
    u = jax.random.uniform(jax.random.key(0), (n,))
    token, logprob = drawn(rows(np.log(p), n), u, temperature=1.0, top_k=0, top_p=1.0)
    seen = np.bincount(np.asarray(token), minlength=6)
    assert ((seen - n * p) ** 2 / (n * p)).sum() < 20.5
    np.testing.assert_allclose(logprob, np.log(p)[np.asarray(token)], rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_a_power_of_the_probabilities(temperature):
    p = np.array([0.6, 0.3, 0.1])
    expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    n = 5000
    token, logprob = drawn(
        rows(np.log(p), n), grid(n), temperature=temperature, top_k=0, top_p=1.0
    )
    np.testing.assert_allclose(np.bincount(np.asarray(token)) / n, expected, atol=1e-3)
    np.testing.assert_allclose(np.exp(logprob), expected[np.asarray(token)], rtol=1e-5)


# p = .40 .30 .15 .10 .05 in a shuffled order
SHUFFLED = np.array([0.10, 0.40, 0.05, 0.30, 0.15])


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (1, 1.0, [1]),
        (2, 1.0, [1, 3]),
        (9, 1.0, [0, 1, 2, 3, 4]),
        (0, 0.39, [1]),
        (0, 0.41, [1, 3]),
        (0, 0.69, [1, 3]),
        (0, 0.84, [1, 3, 4]),
        (0, 0.999, [0, 1, 2, 3, 4]),
        (3, 0.80, [1, 3]),  # top-k first: .40 / .85 + .30 / .85 = .82 >= .80
    ],
)
def test_truncation_is_exactly_renormalized(top_k, top_p, kept):
    """Which tokens are ever drawn, how often, and their logprobs: those of the distribution sampled
    from.
    """
    n = 4000
    token, logprob = drawn(
        rows(np.log(SHUFFLED), n), grid(n), temperature=1.0, top_k=top_k, top_p=top_p
    )
    expected = np.where(np.isin(np.arange(5), kept), SHUFFLED, 0)
    expected /= expected.sum()
    np.testing.assert_allclose(
        np.bincount(np.asarray(token), minlength=5) / n, expected, atol=1e-3
    )
    np.testing.assert_allclose(np.exp(logprob), expected[np.asarray(token)], rtol=1e-5)


def test_ties_stay_together():
    kept = jax.jit(lambda x: (keep_top_k(x, 1), keep_top_p(x, 0.3)))(
        rows(np.log([0.25] * 4), 1)
    )
    assert np.isfinite(kept).all()


def test_greedy_is_the_first_largest_with_its_plain_logprob():
    logits = jnp.array([[0.0, 2.0, 2.0], [3.0, 0.0, 1.0]])
    token, logprob = drawn(
        logits, jnp.array([0.9, 0.9]), temperature=0.0, top_k=2, top_p=0.5
    )
    assert token.tolist() == [1, 0]
    expected = [2 - np.log(1 + 2 * np.exp(2)), 3 - np.log(np.exp(3) + 1 + np.exp(1))]
    np.testing.assert_allclose(logprob, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: must be >= 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1: must be >= 0"),
        ({"top_p": 0.0}, "top_p=0.0: must be > 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": 1.1}, "min_p=1.1: must be >= 0 and <= 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: must be > 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty=nan"),
        ({"stop": ("a", "")}, "stop='': must not be empty"),
    ],
)
def test_impossible_settings_say_why(settings, words):
    with pytest.raises(ConfigError, match=words):
        sampling(**settings)


def test_min_p_keeps_what_is_at_least_so_many_times_as_likely():
    p = np.array([[0.5, 0.25, 0.15, 0.1], [0.25, 0.25, 0.25, 0.25]])
    kept = np.isfinite(keep_min_p(jnp.log(p), 0.3))
    assert kept.tolist() == [[True, True, True, False], [True] * 4]
    logits = jnp.log(p)
    assert keep_min_p(logits, 0.0) is logits
    only = np.isfinite(keep_min_p(logits, 1.0))
    assert only[0].tolist() == [True, False, False, False]


def test_min_p_counts_after_temperature_and_in_the_logprob():
    """At temperature 2 the odds of 0.8 to 0.1 are sqrt(8) to 1, and min_p 0.3 keeps them."""
    logits = jnp.asarray(rows(np.log([0.8, 0.1, 0.1]), 3))
    u = jnp.array([0.1, 0.7, 0.9])
    tokens, logprobs = choose(logits, u, sampling(temperature=2.0, min_p=0.3))
    assert tokens.tolist() == [0, 1, 2]
    weights = np.sqrt([0.8, 0.1, 0.1])
    picked = np.log(weights / weights.sum())
    np.testing.assert_allclose(logprobs, picked, rtol=1e-5)


def test_the_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits = jnp.array([[3.0, -1.0, 0.0, 3.0], [2.0, -2.0, 1.0, -3.0]])
    seen = jnp.array([[True, True, True, False], [False, True, True, False]])
    expected = [[2.0, -1.5, 0.0, 3.0], [2.0, -3.0, 1 / 1.5, -3.0]]
    np.testing.assert_allclose(penalize_seen(logits, seen, 1.5), expected, rtol=1e-6)


def test_the_repetition_penalty_comes_before_temperature_and_is_in_the_logprob():
    """Logits 4 and 2 of a seen and a new token: penalty 2 makes them equal, at any temperature."""
    logits = jnp.asarray(rows([4.0, 2.0], 2))
    seen = jnp.asarray(rows([True, False], 2), bool)
    u = jnp.array([0.49, 0.51])
    settings = sampling(temperature=0.5, repetition_penalty=2.0)
    tokens, logprobs = choose(logits, u, settings, seen)
    assert tokens.tolist() == [0, 1]
    np.testing.assert_allclose(logprobs, np.log(0.5), rtol=1e-6)
    greedy = sampling(temperature=0.0, repetition_penalty=4.0)
    tokens, logprobs = choose(logits, u, greedy, seen)
    assert tokens.tolist() == [1, 1]
    np.testing.assert_allclose(logprobs, -np.log1p(np.exp(-1)), rtol=1e-6)


def test_top_k_and_top_p_keep_what_a_loop_over_the_tokens_keeps():
    """With ties, both zeros, and tokens that were removed before."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 40)).astype(np.float32) * 3
    logits[0] = np.round(logits[0])
    logits[1, ::3], logits[1, 1::3] = 0.0, -0.0
    logits[2, ::2] = -np.inf
    logits[3] = 1e-30 * np.arange(40)
    keep = jax.jit(lambda x: (keep_top_k(x, 7), keep_top_p(x, 0.6)))
    by_k, by_p = (np.asarray(kept) > -np.inf for kept in keep(jnp.asarray(logits)))
    for row, kept_k, kept_p in zip(logits, by_k, by_p, strict=True):
        p = np.exp(row.astype(np.float64) - row.max())
        p /= p.sum()
        for i, x in enumerate(row):
            is_drawn = x > -np.inf
            assert kept_k[i] == (is_drawn and (row > x).sum() < 7)
            assert kept_p[i] == (is_drawn and p[row > x].sum() < 0.6)
