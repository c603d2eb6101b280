"""Every loss of the reward stage against a plain loop over pairs in float64, with ragged K and
ties.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import state
from rlhfjax.algos.preference import kwise_loss
from rlhfjax.config import build
from rlhfjax.errors import ConfigError
from rlhfjax.rewards.losses import LossConfig, make_loss

RNG = np.random.default_rng(0)
P, K = 8, 4
REWARDS = RNG.normal(size=(P, K)).astype(np.float32)
LABELS = RNG.integers(0, 3, size=(P, K)).astype(np.float32)  # ties
VALID = np.ones((P, K), np.float32)
VALID[1, 2:] = VALID[2, 3:] = VALID[5, 1:] = 0  # K = 2, 3 and 1
LABELS[6] = 1.0  # all tied
VALID_J = jnp.asarray(VALID)
NAMES = LossConfig.__annotations__["name"].__args__
CENTERED = [name for name in NAMES if name != "best_of_k"]


def log_sigmoid(x):
    return -np.log1p(np.exp(-x)) if x > -30 else x


def pairs_of(p, same):
    """(i, j) of valid completions with other tokens, i < j."""
    ids = [i for i in range(K) if VALID[p, i]]
    return [
        (i, j)
        for n, i in enumerate(ids)
        for j in ids[n + 1 :]
        if same is None or same[p, i] != same[p, j]
    ]


def reference(name, config, same=None):
    """(sum, weight) by loops."""
    total, weight = 0.0, 0
    for p in range(P):
        r, y = REWARDS[p].astype(float), LABELS[p].astype(float)
        ids = [i for i in range(K) if VALID[p, i]]
        if name == "best_of_k":
            best = [i for i in ids if y[i] == max(y[j] for j in ids)]
            ids = [
                i
                for i in ids
                if i == best[0] or same is None or same[p, i] != same[p, best[0]]
            ]
            if len(best) == 1 and len(ids) > 1:
                total += np.log(sum(np.exp(r[i]) for i in ids)) - r[best[0]]
                weight += 1
            continue
        if name == "plackett_luce":
            if any(y[i] != y[j] for i, j in pairs_of(p, same)):
                weight += 1
                for i in ids:
                    worse = [
                        j
                        for j in ids
                        if y[j] < y[i] and (same is None or same[p, j] != same[p, i])
                    ]
                    total += (
                        np.log(np.exp(r[i]) + sum(np.exp(r[j]) for j in worse)) - r[i]
                    )
            continue
        own, count = 0.0, 0
        for i, j in pairs_of(p, same):
            d, gap = r[i] - r[j], y[i] - y[j]
            if name in ("soft", "half_ties"):
                q = (
                    1 / (1 + np.exp(-config.label_scale * gap))
                    if name == "soft"
                    else (np.sign(gap) + 1) / 2
                )
                own, count = (
                    own - q * log_sigmoid(d) - (1 - q) * log_sigmoid(-d),
                    count + 1,
                )
                continue
            if name == "rao_kupper":
                wins, loses = (1 / (1 + np.exp(-(x - config.eta))) for x in (d, -d))
                own -= np.log(
                    wins if gap > 0 else loses if gap < 0 else 1 - wins - loses
                )
                count += 1
                continue
            if gap == 0:
                continue
            d = d if gap > 0 else -d
            count += 1
            if name == "smoothed":
                own -= (1 - config.smoothing) * log_sigmoid(
                    d
                ) + config.smoothing * log_sigmoid(-d)
            else:
                own -= log_sigmoid(
                    d - (config.margin * abs(gap) if name == "margin" else 0.0)
                )
        if name == "kwise":
            total, weight = (
                total + (own / count if count else 0.0),
                weight + bool(count),
            )
        else:
            total, weight = total + own, weight + count
    return total, weight


@pytest.mark.parametrize("name", NAMES)
def test_named_losses_are_what_loops_over_pairs_give(name):
    config = LossConfig(name=name, smoothing=0.2, margin=0.7, label_scale=0.4, eta=0.3)
    loss, metrics = jax.jit(make_loss(config))(REWARDS, LABELS, VALID)
    total, weight = reference(name, config)
    assert weight > 0
    np.testing.assert_allclose(metrics["loss"][0], total, rtol=2e-6)
    assert float(metrics["loss"][1]) == weight
    np.testing.assert_allclose(loss, total / weight, rtol=2e-6)


def test_the_default_is_instructgpts_loss_itself():
    assert make_loss(LossConfig()) is kwise_loss


@pytest.mark.parametrize("name", NAMES)
def test_pitfall_17_microbatches_of_unequal_pair_counts_accumulate_to_the_batch(name):
    features = RNG.normal(size=(P, K, 3)).astype(np.float32)
    batch = {
        "x": jnp.asarray(features),
        "labels": jnp.asarray(LABELS),
        "valid": jnp.asarray(VALID),
    }
    centering = 0.1 if name in CENTERED else 0.0
    loss = make_loss(LossConfig(name=name, centering=centering))

    def of_batch(params, part, key):
        return loss(part["x"] @ params["w"], part["labels"], part["valid"])

    params = {"w": jnp.asarray([0.3, -0.2, 0.5])}
    whole, pairs = state.gradients(of_batch, params, batch, None)
    for microbatches in (2, 4, 8):
        some, parts = state.gradients(
            of_batch, params, batch, None, microbatches=microbatches
        )
        np.testing.assert_allclose(some["w"], whole["w"], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(parts["loss"], pairs["loss"], rtol=1e-6)


def centering_by_loops(name, same=None):
    """(sum, weight) of (r_i + r_j)^2 over the pairs of a loss, tied ones where it has them."""
    total = weight = 0.0
    for p in range(P):
        r, y = REWARDS[p].astype(float), LABELS[p].astype(float)
        pairs = [
            (i, j)
            for i, j in pairs_of(p, same)
            if name in ("soft", "half_ties", "rao_kupper") or y[i] != y[j]
        ]
        squares = [(r[i] + r[j]) ** 2 for i, j in pairs]
        if name in ("kwise", "plackett_luce"):
            squares = [np.mean(squares)] if squares else []
        total, weight = total + sum(squares), weight + len(squares)
    return total, weight


@pytest.mark.parametrize("name", CENTERED)
def test_centering_adds_the_square_of_the_sum_of_each_pair(name):
    config = LossConfig(name=name, centering=0.3)
    for same in (None, TWINS):
        arrays = (REWARDS, LABELS, VALID, same)
        loss, metrics = jax.jit(make_loss(config))(*arrays)
        plain, _ = jax.jit(make_loss(LossConfig(name=name)))(*arrays)
        total, weight = centering_by_loops(name, same)
        np.testing.assert_allclose(loss, plain + 0.3 * total / weight, rtol=1e-5)
        np.testing.assert_allclose(metrics["centering"], (total, weight), rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"][1], weight, rtol=1e-6)


def test_centering_by_hand_decides_the_constant_that_a_comparison_leaves_open():
    # Rewards 3 and 1: -log sigmoid(2) = 0.126928 and 0.5 * 4^2 = 8; the slope of the shift is
    # 0.5 * 2 * 4 * 2 = 8.
    loss = make_loss(LossConfig(name="bradley_terry", centering=0.5))
    labels, valid = jnp.array([[1.0, 0.0]]), jnp.ones((1, 2))

    def shifted(c, loss):
        return loss(jnp.array([[3.0, 1.0]]) + c, labels, valid)[0]

    value, slope = jax.value_and_grad(shifted)(0.0, loss)
    np.testing.assert_allclose([value, slope], [8.126928, 8.0], rtol=1e-6)
    assert jax.grad(shifted)(-2.0, loss) == 0  # rewards 1 and -1
    assert jax.grad(shifted)(0.0, make_loss(LossConfig(name="bradley_terry"))) == 0


TWINS = np.arange(P * K, dtype=np.int32).reshape(P, K) % K
TWINS[0, 3] = TWINS[3, 1] = TWINS[4, 2] = TWINS[1, 1] = (
    0  # the last is a prompt of K = 2
)
TWINS[7, :] = 0
NO_TWINS = np.tile(np.arange(K, dtype=np.int32), (P, 1))


@pytest.mark.parametrize("name", NAMES)
def test_pitfall_39_a_pair_of_completions_with_the_same_tokens_weighs_nothing(name):
    """By the plain loops, which leave such pairs out; where all differ it is the loss without
    `same`, to the bit."""
    loss = jax.jit(make_loss(LossConfig(name=name)))
    _, metrics = loss(REWARDS, LABELS, VALID, TWINS)
    total, weight = reference(name, LossConfig(name=name), TWINS)
    np.testing.assert_allclose(metrics["loss"][0], total, rtol=2e-6)
    assert (
        float(metrics["loss"][1]) == weight < reference(name, LossConfig(name=name))[1]
    )
    without, given = (
        loss(REWARDS, LABELS, VALID),
        loss(REWARDS, LABELS, VALID, NO_TWINS),
    )
    assert float(without[0]) == float(given[0])
    pair = np.array([[1.0, -1.0]], np.float32)
    scalar, metrics = loss(pair, pair, np.ones_like(pair), np.zeros((1, 2), np.int32))
    assert float(scalar) == 0 and float(metrics["loss"][1]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_at_completions_that_do_not_exist_reaches_neither_loss_nor_gradient(
    name,
):
    loss = make_loss(LossConfig(name=name))
    junk_r, junk_l = (
        np.where(VALID > 0, x, np.float32(np.nan)) for x in (REWARDS, LABELS)
    )
    value, grad = jax.value_and_grad(lambda r, y: loss(r, y, VALID_J)[0])(
        jnp.asarray(REWARDS), jnp.asarray(LABELS)
    )
    junk_value, junk_grad = jax.value_and_grad(lambda r, y: loss(r, y, VALID_J)[0])(
        jnp.asarray(junk_r), jnp.asarray(junk_l)
    )
    np.testing.assert_array_equal(value, junk_value)
    np.testing.assert_array_equal(np.where(VALID > 0, junk_grad, 0), grad)
    assert np.all(np.isfinite(junk_grad))


def test_the_best_of_a_prompt_is_dropped_when_two_share_it():
    labels = jnp.array([[2.0, 2.0, 0.0], [2.0, 1.0, 0.0]])
    _, metrics = make_loss(LossConfig(name="best_of_k"))(
        jnp.zeros((2, 3)), labels, jnp.ones((2, 3))
    )
    assert float(metrics["loss"][1]) == 1
    np.testing.assert_allclose(metrics["loss"][0], np.log(3), rtol=1e-6)


def test_impossible_options_are_refused():
    with pytest.raises(
        ConfigError, match=r"loss\.eta=0\.0: expected float >= 1\.2e-38"
    ):
        build(LossConfig, {"name": "rao_kupper", "eta": 0.0}, "loss")
    with pytest.raises(
        ConfigError, match=r"loss\.smoothing=0\.6: expected float >= 0 and < 0\.5"
    ):
        build(LossConfig, {"name": "smoothed", "smoothing": 0.6}, "loss")
