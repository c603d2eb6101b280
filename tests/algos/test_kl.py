import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algos import kl

P = np.array([0.5, 0.3, 0.2], np.float32)
Q = np.array([0.25, 0.25, 0.5], np.float32)
EXACT = float(np.sum(P * np.log(P / Q)))  # 0.21803, while KL(Q || P) = 0.23951


def test_by_hand():
    # pi = 1/2, rho = 1/4: log ratio ln 2; k2 = ln(2)^2 / 2; k3 = 1/2 - 1 + ln 2.
    pi, rho = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
    np.testing.assert_allclose(kl.k1(pi, rho), [0.6931472], rtol=1e-6)
    np.testing.assert_allclose(kl.k2(pi, rho), [0.2402265], rtol=1e-6)
    np.testing.assert_allclose(kl.k3(pi, rho), [0.1931472], rtol=1e-6)


@pytest.mark.parametrize("estimator", [kl.k1, kl.k3])
def test_pitfall_16_the_expectation_is_the_kl_to_the_reference_and_not_its_inverse(
    estimator,
):
    expectation = np.sum(P * np.array(estimator(jnp.log(P), jnp.log(Q))))
    np.testing.assert_allclose(expectation, EXACT, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("estimator", [kl.k1, kl.k2, kl.k3])
def test_pitfall_16_low_precision_is_refused(estimator, dtype):
    with pytest.raises(TypeError, match="float32"):
        estimator(jnp.zeros(2, dtype), jnp.zeros(2, jnp.float32))
    with pytest.raises(TypeError, match="float32"):
        estimator(jnp.zeros(2, jnp.float32), jnp.zeros(2, dtype))


def test_pitfall_16_no_clamp_kills_the_gradient():
    # d k3 / d log pi = 1 - rho/pi, also where the two are far apart; d k2 = log ratio; d k1 = 1.
    log_ratio = jnp.array([-15.0, -3.0, 0.5, 30.0])
    gradient = jax.grad(lambda x: kl.k3(x, jnp.zeros(4)).sum())(log_ratio)
    np.testing.assert_allclose(gradient, 1 - np.exp(-np.array(log_ratio)), rtol=1e-5)
    np.testing.assert_allclose(
        jax.grad(lambda x: kl.k2(x, jnp.zeros(4)).sum())(log_ratio), log_ratio
    )


def test_pitfall_37_k3_is_clamped_where_it_would_overflow_and_nowhere_else():
    # At -100, e^80 - 1 - 80 with no gradient. On the other side it is linear: 100 - 1, slope 1.
    log_ratio = jnp.array([-100.0, -79.0, 100.0])
    estimates = kl.k3(log_ratio, jnp.zeros(3))
    gradient = jax.grad(lambda x: kl.k3(x, jnp.zeros(3)).sum())(log_ratio)
    np.testing.assert_allclose(estimates, [np.exp(80.0), np.exp(79.0), 99.0], rtol=1e-5)
    np.testing.assert_allclose(gradient, [0, -np.exp(79.0), 1], rtol=1e-5)


@pytest.mark.parametrize(
    "loss, at_limit",
    [(kl.kl_loss_k1, -100.0), (kl.kl_loss_k3, np.exp(40.0) - 1 - 40)],
)
def test_pitfall_37_a_ratio_times_a_ratio_is_finite_and_counted(loss, at_limit):
    # log pi/pi_old = 100 and log pi/rho = -100: e^40 times the estimate; float32 has no e^200.
    # The second token is at pi = pi_old = rho and has 0; the third does not count.
    logprobs, old, reference = (
        jnp.array([[x, -1.0, 0.0]]) for x in (-100.0, -200.0, 0.0)
    )
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    mask = jnp.array([[1.0, 1.0, 0.0]])
    (value, metrics), gradient = value_and_grad(logprobs, old, reference, mask)
    np.testing.assert_allclose(value, np.exp(40.0) * at_limit / 2, rtol=1e-5)
    assert np.isfinite(gradient).all()
    assert [float(x) for x in metrics["kl_clamped"]] == [1, 2]


def test_k3_of_a_tiny_step_is_not_rounding_noise():
    # (e^-x - 1 + x) = x^2 / 2 - x^3 / 6 + ...; exp(-x) - 1 + x in float32 would be off by 10 times
    # at x = 1e-4.
    x = jnp.array([1e-4, -1e-4, 1e-3])
    np.testing.assert_allclose(
        kl.k3(x, jnp.zeros(3)), np.array(x, np.float64) ** 2 / 2, rtol=5e-3
    )


@hypothesis.given(st.lists(st.floats(-20, 0, width=32), min_size=6, max_size=6))
@hypothesis.settings(max_examples=30, deadline=None)
def test_k2_and_k3_are_never_negative(values):
    x = jnp.array(values, jnp.float32)
    assert jnp.all(kl.k3(x[:3], x[3:]) >= 0)
    assert jnp.all(kl.k2(x[:3], x[3:]) >= 0)


def test_pitfall_15_the_controller_is_fed_the_sum_over_the_sequence():
    # Row 1: 1 + 2, row 2: 4, the rest is padding or a hole. Mean per sequence 3.5, a token mean
    # would be 7/3.
    values = jnp.array([[1.0, 2.0, 50.0], [jnp.nan, 4.0, 9.0]])
    mask = jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    np.testing.assert_allclose(kl.sequence_kl(values, mask), [3.0, 4.0])


@pytest.mark.parametrize(
    "measured, factor",
    [
        (9.0, 1 + 0.2 * 512 / 10000),  # 9/6 - 1 = 0.5, clipped to 0.2: 1.01024
        (6.0, 1.0),
        (5.7, 1 - 0.05 * 512 / 10000),  # 5.7/6 - 1 = -0.05: 0.99744
        (0.0, 1 - 0.2 * 512 / 10000),
    ],
)
def test_pitfall_15_adaptive_controller_by_hand(measured, factor):
    beta = kl.adaptive_kl(0.15, measured, target=6.0, horizon=10000.0, episodes=512)
    np.testing.assert_allclose(beta, 0.15 * factor, rtol=1e-6)


def test_pitfall_15_horizon_counts_episodes():
    # A batch of 64 with the paper's horizon moves beta by 0.13 % at most; with 16 batches as
    # horizon by 1.25 %.
    small = kl.adaptive_kl(1.0, 100.0, target=6.0, horizon=10000.0, episodes=64)
    scaled = kl.adaptive_kl(1.0, 100.0, target=6.0, horizon=16.0 * 64, episodes=64)
    np.testing.assert_allclose([small, scaled], [1.00128, 1.0125], rtol=1e-6)


@pytest.mark.parametrize("target", [3.0, 6.0, 10.0])
def test_adaptive_controller_reaches_its_target(target):
    # A policy whose KL answers to beta as 0.6 / beta (so that 6 nats need beta = 0.1), K_beta =
    # 0.1, 400 updates.
    beta = jnp.float32(0.15)
    for _ in range(400):
        beta = kl.adaptive_kl(
            beta, 0.6 / beta, target=target, horizon=10000.0, episodes=1000
        )
    np.testing.assert_allclose(0.6 / beta, target, rtol=0.01)
