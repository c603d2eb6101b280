import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algos import direct
from tests.jitted import jitted

direct = jitted(direct)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def random_pairs(n=6):
    rng = np.random.default_rng(9)
    columns = [-rng.gamma(3, 4, n).astype(np.float32) for _ in range(4)]
    return [*columns, np.array([1, 1, 0, 1, 1, 0], np.float32)]


def loop(function, columns, weight):
    losses = [
        function(*map(float, row))
        for row, w in zip(zip(*columns, strict=True), weight, strict=True)
        if w
    ]
    return sum(losses) / len(losses)


def gap(w, l, ref_w, ref_l):
    return (w - ref_w) - (l - ref_l)


def test_sequence_and_mean_logprobs():
    logprobs, mask = (
        jnp.array([[-1.0, -2.0, -9.0], [-4.0, -1.0, -1.0]]),
        jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]),
    )
    np.testing.assert_allclose(direct.sequence_logprobs(logprobs, mask), [-3, -6])
    np.testing.assert_allclose(direct.mean_logprobs(logprobs, mask), [-1.5, -2])


def test_dpo_by_hand():
    # beta = 1/2; chosen rose by 2 nats, rejected fell by 1: rewards 1 and -1/2, -log sigmoid(1.5) =
    # 0.201413.
    loss, metrics = direct.dpo_loss(
        jnp.array([-8.0]),
        jnp.array([-6.0]),
        jnp.array([-10.0]),
        jnp.array([-5.0]),
        jnp.ones(1),
        beta=0.5,
    )
    np.testing.assert_allclose(loss, 0.2014133, rtol=1e-5)
    found = {name: float(total / weight) for name, (total, weight) in metrics.items()}
    assert (found["accuracy"], found["margin"]) == (1, 1.5)
    assert (found["chosen_reward"], found["rejected_reward"]) == (1, -0.5)


def test_dpo_at_the_reference_is_log_2_with_gradient_beta_over_2():
    w, l = jnp.array([-8.0]), jnp.array([-6.0])
    loss, gradient = jax.value_and_grad(
        lambda x: direct.dpo_loss(x, l, w, l, jnp.ones(1), beta=0.3)[0]
    )(w)
    np.testing.assert_allclose([loss, gradient[0]], [math.log(2), -0.15], rtol=1e-6)


CASES = {
    "dpo": (
        lambda *x: direct.dpo_loss(*x, beta=0.2),
        lambda *x: -log_sigmoid(0.2 * gap(*x)),
    ),
    "cdpo": (
        lambda *x: direct.cdpo_loss(*x, beta=0.2, smoothing=0.1),
        lambda *x: (
            -0.9 * log_sigmoid(0.2 * gap(*x)) - 0.1 * log_sigmoid(-0.2 * gap(*x))
        ),
    ),
    "ipo": (
        lambda *x: direct.ipo_loss(*x, beta=0.2),
        lambda *x: (gap(*x) - 1 / 0.4) ** 2,
    ),
    "simpo": (
        lambda w, l, rw, rl, m: direct.simpo_loss(w, l, m, beta=2.0, margin=1.6),
        lambda w, l, rw, rl: -log_sigmoid(2 * w - 2 * l - 1.6),
    ),
    "orpo": (
        lambda w, l, rw, rl, m: direct.orpo_loss(w, l, m, beta=0.1),
        lambda w, l, rw, rl: (
            -w
            - 0.1
            * log_sigmoid(
                math.log(math.exp(w) / (1 - math.exp(w)))
                - math.log(math.exp(l) / (1 - math.exp(l)))
            )
        ),
    ),
}


def implicit(name, logprob, ref):
    """The reward of a response: beta log pi/rho; without a reference, what the loss compares."""
    if name == "simpo":
        return 2.0 * logprob
    if name == "orpo":
        return 0.1 * math.log(math.exp(logprob) / (1 - math.exp(logprob)))
    return 0.2 * (logprob - ref)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_loop(name):
    """The loss, and the rewards that are logged."""
    function, reference = CASES[name]
    *columns, weight = random_pairs()
    loss, metrics = function(*map(jnp.array, (*columns, weight)))
    np.testing.assert_allclose(loss, loop(reference, columns, weight), rtol=1e-5)
    assert float(metrics["loss"][1]) == 4
    rewards = {
        "chosen_reward": lambda w, l, rw, rl: implicit(name, w, rw),
        "rejected_reward": lambda w, l, rw, rl: implicit(name, l, rl),
        "margin": lambda w, l, rw, rl: implicit(name, w, rw) - implicit(name, l, rl),
        "accuracy": lambda w, l, rw, rl: float(
            implicit(name, w, rw) > implicit(name, l, rl)
        ),
    }
    for metric, of_pair in rewards.items():
        total, pairs = metrics[metric]
        np.testing.assert_allclose(
            total / pairs, loop(of_pair, columns, weight), rtol=1e-5
        )


def test_cdpo_has_its_minimum_at_the_log_odds():
    # -(1 - eps) log sigmoid(m) - eps log sigmoid(-m) is least at m = log((1 - eps) / eps): dpo has
    # no minimum.
    zero = jnp.zeros(1)
    gradient = jax.grad(
        lambda x: direct.cdpo_loss(
            x, zero, zero, zero, jnp.ones(1), beta=1.0, smoothing=0.1
        )[0]
    )
    np.testing.assert_allclose(gradient(jnp.array([math.log(9)])), 0, atol=1e-6)


def test_ipo_has_its_minimum_at_a_gap_of_half_a_beta_inverse():
    zero = jnp.zeros(1)
    loss, gradient = jax.value_and_grad(
        lambda x: direct.ipo_loss(x, zero, zero, zero, jnp.ones(1), beta=0.1)[0]
    )(jnp.array([5.0]))
    np.testing.assert_allclose([loss, gradient[0]], [0, 0], atol=1e-5)


@pytest.mark.parametrize("p", [1e-6, 0.25, 0.5, 0.999])
def test_log_odds(p):
    expected = math.log(p) - math.log1p(-p)
    np.testing.assert_allclose(
        direct.log_odds(jnp.log(jnp.array([p]))),
        [expected],
        rtol=1e-3 if p > 0.99 else 1e-5,
    )


def test_pitfall_37_log_odds_of_a_certain_response_are_80():
    # log(-log p) is -80 at log p = -e^-80 = -1.8e-35. Below it the log odds are -log(-log p) and
    # have the slope 1 / -log p.
    log_p = jnp.array([0.0, -1e-36, -1e-30, -1e4])
    expected = [80, 80, 30 * math.log(10), -1e4]
    np.testing.assert_allclose(direct.log_odds(log_p), expected, rtol=1e-6)
    gradient = jax.grad(lambda x: direct.log_odds(x).sum())(log_p)
    np.testing.assert_allclose(gradient, [0, 0, 1e30, 1], rtol=1e-5)


def test_pitfall_37_orpo_with_an_empty_response_by_hand():
    # The mean over no tokens is log P = 0. The other response has P = 1/2, log odds 0.
    empty = direct.mean_logprobs(jnp.full((1, 3), -1.0), jnp.zeros((1, 3)))
    half, weight = jnp.log(jnp.array([0.5])), jnp.ones(1)
    value_and_grad = jax.value_and_grad(direct.orpo_loss, argnums=(0, 1), has_aux=True)
    (loss, metrics), gradients = value_and_grad(half, empty, weight, beta=0.1)
    np.testing.assert_allclose(loss, math.log(2) + 0.1 * 80, rtol=1e-6)
    # d log odds / d log P = 1 / (1 - P) = 2
    np.testing.assert_allclose(gradients[0], -1 - 0.1 * 2, rtol=1e-6)
    np.testing.assert_array_equal(gradients[1], 0)
    assert [float(x) for x in metrics["odds_clamped"]] == [1, 1]
    (loss, _), _ = value_and_grad(empty, half, weight, beta=0.1)
    np.testing.assert_allclose(loss, 0, atol=1e-6)


def test_reference_logprobs_are_constants():
    *columns, weight = map(jnp.array, random_pairs())
    gradients = jax.grad(
        lambda rw, rl: direct.dpo_loss(*columns[:2], rw, rl, weight, beta=0.2)[0],
        argnums=(0, 1),
    )(*columns[2:])
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def test_kto_by_hand():
    # beta 1/2, z = 2 nats -> beta z = 1.
    # Desirable, log ratio 4: r = 2, lambda_D (1 - sigmoid(2 - 1)) = 1.5 * 0.268941 = 0.403412
    # Undesirable, log ratio 4: lambda_U (1 - sigmoid(1 - 2)) = 1 - 0.268941 = 0.731059
    loss, metrics = direct.kto_loss(
        jnp.array([-1.0, -1.0, jnp.nan]),
        jnp.array([-5.0, -5.0, 0.0]),
        jnp.array([1.0, 0.0, 1.0]),
        jnp.array([1.0, 1.0, 0.0]),
        kl=2.0,
        beta=0.5,
        desirable_weight=1.5,
    )
    np.testing.assert_allclose(loss, (0.4034121 + 0.7310586) / 2, rtol=1e-5)
    assert [float(x) for x in metrics["desirable_reward"]] == [2, 1]
    assert [float(x) for x in metrics["undesirable_reward"]] == [2, 1]


def test_pitfall_34_kto_of_a_clear_response_keeps_its_digits():
    # r = 25, z = 0: 1 - sigmoid(25) = e^-25 / (1 + e^-25), not 1 - 1. Its slope is minus itself.
    ones = jnp.ones(1)

    def loss(x, desirable):
        return direct.kto_loss(
            x, jnp.zeros(1), desirable * ones, ones, kl=0.0, beta=1.0
        )[0]

    for desirable, r in ((1.0, 25.0), (0.0, -25.0)):
        found, slope = jax.value_and_grad(loss)(jnp.array([r]), desirable)
        np.testing.assert_allclose(found, math.exp(-25), rtol=1e-5)
        np.testing.assert_allclose(
            slope[0], -math.copysign(math.exp(-25), r), rtol=1e-5
        )


def test_kto_moves_the_two_kinds_apart():
    gradient = jax.grad(
        lambda x: direct.kto_loss(
            x, jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.ones(2), kl=0.0, beta=0.1
        )[0]
    )(jnp.zeros(2))
    np.testing.assert_allclose(
        gradient, [-0.1 / 4 / 2, 0.1 / 4 / 2], rtol=1e-5
    )  # beta sigmoid'(0), over 2


def test_kto_reference_point():
    a, b = jnp.array([-1.0, -2.0, 50.0]), jnp.array([-2.0, -4.0, 0.0])
    weight = jnp.array([1.0, 1.0, 0.0])
    np.testing.assert_allclose(direct.kto_kl(a, b, weight), 1.5)
    np.testing.assert_allclose(direct.kto_kl(b, a, weight), 0.0)  # never negative
    np.testing.assert_array_equal(jax.grad(direct.kto_kl)(a, b, weight), 0)


def test_dpo_on_all_preferences_has_the_tilted_reference_as_its_optimum():
    # A bandit of 5 arms, preferences of every pair in the proportions of Bradley-Terry with reward
    # r: DPO's minimizer is pi* = rho exp(r / beta) / Z (Rafailov et al. 2023, section 4), reached
    # here by gradient descent.
    beta, rng = 0.5, np.random.default_rng(10)
    reference = jax.nn.log_softmax(jnp.array(rng.normal(size=5), jnp.float32))
    reward = jnp.array(rng.normal(size=5), jnp.float32)
    w, l = (jnp.array(x) for x in np.nonzero(~np.eye(5, dtype=bool)))
    weight = jax.nn.sigmoid(reward[w] - reward[l])

    def loss(logits):
        p = jax.nn.log_softmax(logits)
        return direct.dpo_loss(
            p[w], p[l], reference[w], reference[l], weight, beta=beta
        )[0]

    logits = jax.lax.fori_loop(
        0, 1000, lambda _, x: x - 10.0 * jax.grad(loss)(x), reference
    )
    np.testing.assert_allclose(
        jax.nn.softmax(logits), jax.nn.softmax(reference + reward / beta), rtol=1e-3
    )
