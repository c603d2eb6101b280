import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.algos import tamer

STARTS, ENDS = jnp.array([0.0, 0.3, 0.6, 0.9]), jnp.array([0.3, 0.6, 0.9, 1.2])


def test_uniform_credit_by_hand():
    # Feedback at 1.0 s, delays 0.2 .. 0.8 s: it points at 0.2 .. 0.8 s. Step 1 holds 0.1 s of it,
    # step 2 0.3 s, step 3 0.2 s, of 0.6 s.
    credit = tamer.uniform_credit(STARTS, ENDS, jnp.array([1.0]), low=0.2, high=0.8)
    np.testing.assert_allclose(credit, [[1 / 6, 3 / 6, 2 / 6, 0]], rtol=1e-5, atol=1e-6)


def test_gamma_credit_equals_the_integral_of_the_density():
    # Gamma(2, 0.28): f(x) = x e^(-x / s) / s^2, integrated over each step by the midpoint rule.
    scale, time = 0.28, 1.0
    expected = []
    for start, end in zip(np.array(STARTS), np.array(ENDS), strict=True):
        grid = np.linspace(start, end, 2001)
        delay = np.maximum(time - (grid[1:] + grid[:-1]) / 2, 0)
        expected.append(
            np.sum(delay * np.exp(-delay / scale) / scale**2 * np.diff(grid))
        )
    credit = tamer.gamma_credit(STARTS, ENDS, jnp.array([time]), shape=2.0, scale=scale)
    np.testing.assert_allclose(credit[0], expected, rtol=1e-3, atol=1e-5)


def test_pitfall_34_gamma_credit_of_late_feedback_keeps_its_digits():
    # Gamma(2, 0.28): P(delay > x) = (1 + x / s) e^(-x / s). Steps of 5 s and more ago, in float64.
    scale, time = 0.28, 6.2
    ages = (time - np.array([STARTS, ENDS], np.float64)) / scale
    beyond = (1 + ages) * np.exp(-ages)
    credit = tamer.gamma_credit(STARTS, ENDS, jnp.array([time]), shape=2.0, scale=scale)
    np.testing.assert_allclose(credit[0], beyond[1] - beyond[0], rtol=2e-4)


def test_credit_adds_up_to_1_over_a_long_past_and_the_future_has_none():
    starts = jnp.arange(-20.0, 20.0, 0.25)
    for credit in (
        tamer.uniform_credit(
            starts, starts + 0.25, jnp.array([1.1]), low=0.2, high=0.8
        ),
        tamer.gamma_credit(
            starts, starts + 0.25, jnp.array([1.1]), shape=2.0, scale=0.28
        ),
    ):
        np.testing.assert_allclose(credit.sum(), 1, rtol=1e-4)
        assert np.all(np.array(credit)[0, np.array(starts) > 1.1] == 0)


def test_losses_by_hand():
    predictions, credit = (
        jnp.array([1.0, 3.0]),
        jnp.array([[0.5, 0.5], [0.0, 1.0], [1.0, 0.0]]),
    )
    feedback, weight = jnp.array([1.0, 5.0, jnp.nan]), jnp.array([1.0, 1.0, 0.0])
    # Together: 1 - 2 = -1 and 5 - 3 = 2: (1 + 4) / 2.
    loss, metrics = tamer.tamer_loss(predictions, credit, feedback, weight)
    np.testing.assert_allclose(loss, 2.5)
    np.testing.assert_allclose(metrics["error"][0], 3.0)
    # Each on its own: 0.5 (1 - 1)^2 + 0.5 (3 - 1)^2 + 1 (3 - 5)^2 = 6, over a credit of 2.
    loss, metrics = tamer.deep_tamer_loss(predictions, credit, feedback, weight)
    np.testing.assert_allclose(loss, 3.0)
    np.testing.assert_allclose(metrics["error"][0], 0.5 * 0 + 0.5 * 2 + 1 * 2)


def test_delayed_feedback_is_credited_to_the_action_that_earned_it():
    # 4 actions, one random action every 0.3 s; a human rates each by `true`, 0.5 s after it began
    # (on average). The regression over the delay window finds the ratings; without the window
    # (credit to the step under way) it cannot.
    rng = np.random.default_rng(13)
    true = np.array([1.0, -1.0, 0.5, 0.0])
    actions = rng.integers(0, 4, 400)
    starts = jnp.array(0.3 * np.arange(400), jnp.float32)
    times = starts + 0.3 + jnp.array(rng.uniform(0.2, 0.8, 400), jnp.float32) - 0.15
    feedback, weight = jnp.array(true[actions], jnp.float32), jnp.ones(400)

    def fit(credit):
        step = jax.jit(
            jax.grad(
                lambda h: tamer.tamer_loss(h[actions], credit, feedback, weight)[0]
            )
        )
        h = jnp.zeros(4)
        for _ in range(100):
            h = h - 0.3 * step(h)
        return np.array(h)

    window = fit(tamer.uniform_credit(starts, starts + 0.3, times, low=0.2, high=0.8))
    at_once = fit(tamer.uniform_credit(starts, starts + 0.3, times, low=0.0, high=0.01))
    assert np.corrcoef(window, true)[0, 1] > 0.95
    assert np.linalg.norm(window - true) < 0.6 * np.linalg.norm(at_once - true)


def test_tamer_rl_by_hand():
    np.testing.assert_allclose(
        tamer.reward_addition(
            jnp.array([1.0, 0.0]), jnp.array([-1.0, 2.0]), weight=0.5
        ),
        [0.5, 1],
    )
    # 2, then half of it, then half of that.
    weights = [float(tamer.annealed(2.0, factor=0.5, iteration=i)) for i in range(3)]
    assert weights == [2.0, 1.0, 0.5]
