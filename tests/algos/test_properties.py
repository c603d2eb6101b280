"""Properties that hold for every mask, length, group size and pool: hypothesis looks for one for
which they do not.
"""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algos import (
    advantages,
    best_of_n,
    group,
    masked,
    preference,
    ranking,
    shaping,
)
from rlhfjax.algos.advantages import gae
from tests.algos.test_every_loss import CASES, B, T
from tests.jitted import jitted

advantages, group, masked, preference, ranking, shaping = map(
    jitted, (advantages, group, masked, preference, ranking, shaping)
)
any_gae = jax.jit(lambda r, v, m, gamma, lam: gae(r, v, m, gamma=gamma, lam=lam))
quick = hypothesis.settings(max_examples=40, deadline=None)
few = hypothesis.settings(max_examples=20, deadline=None)


def floats(count, low=-5.0, high=5.0):
    return st.lists(st.floats(low, high, width=32), min_size=count, max_size=count)


def array(rows, columns, element):
    entries = st.lists(element, min_size=rows * columns, max_size=rows * columns)
    return entries.map(lambda x: np.array(x, np.float32).reshape(rows, columns))


def masks(rows, columns):
    """Any holes; and, as often, responses: a prefix of every row."""
    prefix = st.lists(st.integers(0, columns), min_size=rows, max_size=rows).map(
        lambda lengths: (np.arange(columns)[None] < np.array(lengths)[:, None]).astype(
            np.float32
        )
    )
    return st.one_of(array(rows, columns, st.booleans()), prefix)


def chosen(x, mask):
    """The counted entries of each row, in float64."""
    return [
        [float(x[i, j]) for j in range(x.shape[1]) if mask[i, j] > 0]
        for i in range(x.shape[0])
    ]


# ------------------------------------------------------------------ masked means and whitening


@hypothesis.given(array(4, 5, st.floats(-50, 50, width=32)), masks(4, 5))
@quick
def test_the_three_means_are_those_of_the_counted_tokens(x, mask):
    rows = [row for row in chosen(x, mask) if row]
    tokens = sum(map(len, rows))
    expected = {
        "token_mean": (sum(map(sum, rows)), tokens),
        "sequence_mean": (sum(map(sum, rows)), len(rows)),
        "sequence_token_mean": (sum(sum(row) / len(row) for row in rows), len(rows)),
    }
    for name, (total, weight) in expected.items():
        found = getattr(masked, name)(jnp.array(x), jnp.array(mask))
        np.testing.assert_allclose(found[0], total, rtol=1e-5, atol=1e-3)
        assert float(found[1]) == weight
        mean = masked.divide(*found)
        np.testing.assert_allclose(
            mean, total / weight if weight else 0, rtol=1e-5, atol=1e-3
        )


@hypothesis.given(array(4, 5, st.floats(-50, 50, width=32)), masks(4, 5))
@quick
def test_whitening_is_that_of_the_counted_entries_and_of_no_others(x, mask):
    """Against numpy in float64 where there is a variance; finite, and 0 behind the mask, whatever
    stands there.
    """
    entries = np.array([v for row in chosen(x, mask) for v in row])
    spoilt = jnp.array(np.where(mask > 0, x, np.nan), jnp.float32)
    shifted, kept = (
        f(spoilt, jnp.array(mask)) for f in (masked.whiten, masked.whiten_keep_mean)
    )
    for found in (shifted, kept):
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(np.asarray(found)[mask == 0], 0)
    if len(entries) and entries.std() > 0.1:
        expected = (entries - entries.mean()) / entries.std()
        np.testing.assert_allclose(
            np.asarray(shifted)[mask > 0], expected, rtol=2e-3, atol=2e-3
        )
        np.testing.assert_allclose(
            np.asarray(kept)[mask > 0], expected + entries.mean(), rtol=2e-3, atol=2e-3
        )


# ------------------------------------------------------------------ along a response


@hypothesis.given(
    array(3, 7, st.floats(-5, 5, width=32)),
    array(3, 7, st.floats(-5, 5, width=32)),
    masks(3, 7),
    st.floats(0, 1),
    st.floats(0, 1),
)
@quick
def test_gae_of_a_row_with_holes_is_that_of_its_tokens_alone(
    rewards, values, mask, gamma, lam
):
    """A row packed to the left has the same advantages; the last one is r - V."""
    order = np.argsort(-mask, axis=1, kind="stable")
    packed = [np.take_along_axis(x, order, axis=1) for x in (rewards, values, mask)]
    spread = any_gae(*map(jnp.array, (rewards, values, mask)), gamma, lam)
    together = any_gae(*map(jnp.array, packed), gamma, lam)
    for a, b in zip(spread, together, strict=True):
        np.testing.assert_allclose(
            np.take_along_axis(np.asarray(a), order, axis=1), b, rtol=1e-5, atol=1e-5
        )
    last = mask * np.asarray(masked.last_token(jnp.array(mask)))
    np.testing.assert_allclose(
        spread[0] * last, (rewards - values) * last, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(np.asarray(spread[0])[mask == 0], 0)


@hypothesis.given(
    array(3, 6, st.floats(-3, 3, width=32)),
    masks(3, 6),
    floats(3),
    st.sampled_from([0.0, 0.1, 2.0]),
)
@quick
def test_rewards_on_tokens_add_up_to_the_sequences_reward(kls, mask, score, beta):
    """Also in value: a response's return with gamma = 1 is its score minus beta times its KL,
    whatever its length.
    """
    score = np.array(score, np.float32)
    per_token = shaping.token_rewards(
        jnp.array(score), jnp.array(kls), jnp.array(mask), beta=beta
    )
    whole = score - beta * (kls * mask).sum(1)
    real = mask.any(axis=1)
    np.testing.assert_allclose(
        per_token.sum(1)[real], whole[real], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_array_equal(np.asarray(per_token)[~real], 0)
    zeros = jnp.zeros_like(per_token)
    to_go, _ = advantages.gae(per_token, zeros, jnp.array(mask), gamma=1.0, lam=1.0)
    first = mask * (np.cumsum(mask, axis=1) == 1)
    np.testing.assert_allclose(
        (to_go * first).sum(1)[real], whole[real], rtol=1e-4, atol=1e-4
    )


# ------------------------------------------------------------------ every loss on any mask


def pairs_of(mask):
    """{name: (scalar, metrics)} of every loss with this mask [B, T], or with its first column where
    a row is a pair.
    """
    out = {}
    for name, case in CASES.items():
        *arrays, own = case.arrays()
        out[name] = case.loss(*arrays, mask if own.ndim == 2 else mask[:, 0])
    return out


@hypothesis.given(masks(B, T))
@few
def test_every_loss_is_a_sum_over_rows_on_any_mask(mask):
    """The whole batch's (sum, weight) is the sum of those of its rows, each alone; what is empty is
    0 and finite.
    """
    whole = EVERY_LOSS(jnp.array(mask))
    rows = [
        EVERY_LOSS(jnp.array(mask * (np.arange(B) == i)[:, None])) for i in range(B)
    ]
    for name, (scalar, metrics) in whole.items():
        parts = np.array([row[name][1]["loss"] for row in rows], np.float64).sum(0)
        np.testing.assert_allclose(
            metrics["loss"], parts, rtol=1e-4, atol=1e-4, err_msg=name
        )
        assert all(np.isfinite(value) for pair in metrics.values() for value in pair), (
            name
        )
        mean = parts[0] / parts[1] if parts[1] else 0
        np.testing.assert_allclose(scalar, mean, rtol=1e-4, atol=1e-4, err_msg=name)


EVERY_LOSS = jax.jit(pairs_of)


# ------------------------------------------------------------------ groups


REWARD_LEVELS = st.sampled_from(
    [-1.6, 0.0, 0.1, 0.7, 3.0]
)  # few, so that groups of equal rewards come up


@hypothesis.given(st.integers(2, 5).flatmap(lambda k: array(3, k, REWARD_LEVELS)))
@quick
def test_group_advantages_for_any_group_size(rewards):
    """By plain loops over the others; a group's add up to 0; equal rewards give exactly 0; order
    does not matter.
    """
    k = rewards.shape[1]
    found = {
        f: np.asarray(getattr(group, f"{f}_advantages")(jnp.array(rewards)))
        for f in ("rloo", "grpo", "dr_grpo")
    }
    for p, row in enumerate(rewards.astype(np.float64)):
        spread = math.sqrt(sum((r - row.mean()) ** 2 for r in row) / (k - 1))
        for i in range(k):
            others = [row[j] for j in range(k) if j != i]
            np.testing.assert_allclose(
                found["rloo"][p, i], row[i] - np.mean(others), rtol=1e-5, atol=1e-6
            )
            np.testing.assert_allclose(
                found["dr_grpo"][p, i], row[i] - row.mean(), rtol=1e-5, atol=1e-6
            )
            if spread > 0.01:
                expected = (row[i] - row.mean()) / (spread + 1e-4)
                np.testing.assert_allclose(
                    found["grpo"][p, i], expected, rtol=1e-4, atol=1e-5
                )
        if len(set(row)) == 1:
            np.testing.assert_array_equal(found["grpo"][p], 0)
            np.testing.assert_allclose(
                [found["rloo"][p], found["dr_grpo"][p]], 0, atol=1e-6
            )
    assert np.asarray(group.informative(jnp.array(rewards))).tolist() == [
        len(set(row)) > 1 for row in rewards.tolist()
    ]
    turned = {
        f: np.asarray(
            getattr(group, f"{f}_advantages")(jnp.array(rewards[:, ::-1].copy()))
        )
        for f in found
    }
    for f in found:
        np.testing.assert_allclose(found[f].sum(1), 0, atol=1e-5)
        np.testing.assert_allclose(turned[f][:, ::-1], found[f], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo"])
def test_a_group_of_one_has_no_baseline(name):
    with pytest.raises(ValueError, match="at least 2 responses"):
        getattr(group, f"{name}_advantages")(jnp.array([[0.7], [-1.6]]))


# ------------------------------------------------------------------ K answers to a prompt


K, P = 5, 3
RANKINGS = (
    array(P, K, st.floats(-3, 3, width=32)),
    array(P, K, st.integers(0, 2)),
    masks(P, K),
)


def log_sigmoid(d):
    return -float(np.logaddexp(0, -d))


@hypothesis.given(*RANKINGS)
@quick
def test_kwise_and_plackett_luce_for_any_number_of_answers(rewards, labels, valid):
    """Zero to five answers a prompt, ties among them: by loops over what exists."""
    pairwise, listwise = [], []
    for i in range(P):
        there = [j for j in range(K) if valid[i, j] > 0]
        r = {j: float(rewards[i, j]) for j in there}
        pairs = [(w, l) for w in there for l in there if labels[i, w] > labels[i, l]]
        if pairs:
            pairwise.append(
                -sum(log_sigmoid(r[w] - r[l]) for w, l in pairs) / len(pairs)
            )
            worse = {
                w: [l for l in there if labels[i, w] > labels[i, l]] for w in there
            }
            listwise.append(
                sum(
                    math.log(math.exp(r[w]) + sum(math.exp(r[l]) for l in worse[w]))
                    - r[w]
                    for w in there
                )
            )
    spoilt = [
        jnp.array(np.where(valid > 0, x, np.nan), jnp.float32)
        for x in (rewards, labels)
    ]
    for function, losses in (
        (preference.kwise_loss, pairwise),
        (ranking.plackett_luce_loss, listwise),
    ):
        loss, metrics = function(*spoilt, jnp.array(valid))
        np.testing.assert_allclose(
            loss, np.mean(losses) if losses else 0, rtol=1e-4, atol=1e-5
        )
        assert float(metrics["loss"][1]) == len(losses)


@hypothesis.given(
    RANKINGS[0], st.lists(st.integers(0, K - 1), min_size=P, max_size=P), RANKINGS[2]
)
@quick
def test_best_of_k_for_any_number_of_answers(rewards, best, valid):
    losses = []
    for i in range(P):
        there = [j for j in range(K) if valid[i, j] > 0]
        if best[i] in there and len(there) > 1:
            r = np.array([rewards[i, j] for j in there], np.float64)
            losses.append(float(np.log(np.exp(r).sum()) - rewards[i, best[i]]))
    loss, metrics = ranking.best_of_k_loss(
        jnp.array(rewards), jnp.array(best, jnp.int32), jnp.array(valid)
    )
    np.testing.assert_allclose(
        loss, np.mean(losses) if losses else 0, rtol=1e-4, atol=1e-5
    )
    assert float(metrics["loss"][1]) == len(losses)


# ------------------------------------------------------------------ the best of n


@hypothesis.given(
    st.integers(1, 6).flatmap(
        lambda size: st.tuples(
            st.lists(REWARD_LEVELS, min_size=size, max_size=size), floats(size)
        )
    )
)
@quick
def test_best_of_n_is_the_mean_over_all_subsets_of_any_pool(pool):
    """For every n up to the pool's size; of equal proxies the later one is taken, as its docstring
    has it.
    """
    proxy, gold = (np.array(x, np.float32) for x in pool)
    for n in range(1, len(proxy) + 1):
        subsets = itertools.combinations(range(len(proxy)), n)
        best = [
            float(gold[max(subset, key=lambda i: (proxy[i], i))]) for subset in subsets
        ]
        found = best_of_n.best_of_n_reward(jnp.array(proxy), jnp.array(gold), n=n)
        np.testing.assert_allclose(found, np.mean(best), rtol=1e-4, atol=1e-4)


@hypothesis.given(
    st.lists(st.integers(1, 5), min_size=4, max_size=4),
    st.lists(REWARD_LEVELS, min_size=4, max_size=4),
)
@few
def test_the_best_of_any_n_is_a_distribution_within_its_kl(weights, rewards):
    """It adds up to 1, its KL is at most log n - (n - 1) / n and does not fall with n, and neither
    does the reward.
    """
    p, rewards = (
        np.array(weights, np.float32) / sum(weights),
        np.array(rewards, np.float32),
    )
    spent, earned = [], []
    for n in (1, 2, 4, 7):
        q = np.asarray(DISTRIBUTION(jnp.array(p), jnp.array(rewards), n=n), np.float64)
        np.testing.assert_allclose(q.sum(), 1, atol=1e-5)
        taken = q > 1e-9
        spent.append(float((q[taken] * np.log(q[taken] / p[taken])).sum()))
        earned.append(float((q * rewards).sum()))
        assert spent[-1] <= best_of_n.best_of_n_kl(n) + 1e-5
    assert all(b >= a - 1e-5 for a, b in itertools.pairwise(spent))
    assert all(b >= a - 1e-5 for a, b in itertools.pairwise(earned))


DISTRIBUTION = jax.jit(best_of_n.best_of_n_distribution, static_argnames="n")
