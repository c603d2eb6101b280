import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algos import masked

MASKS = st.lists(st.booleans(), min_size=20, max_size=20).map(
    lambda m: np.array(m, np.float32).reshape(4, 5)
)
VALUES = st.lists(st.floats(-50, 50, width=32), min_size=20, max_size=20).map(
    lambda x: np.array(x, np.float32).reshape(4, 5)
)
X = jnp.array([[1.0, 2.0, 3.0, 100.0]])
MASK = jnp.array([[1.0, 1.0, 1.0, 0.0]])


def counted(x, mask):
    return [
        float(x[i, j])
        for i in range(x.shape[0])
        for j in range(x.shape[1])
        if mask[i, j] > 0
    ]


def loop_moments(values):
    if not values:
        return 0.0, 0.0, 0.0
    total = 0.0
    for v in values:
        total += v
    mean = total / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return total, mean, variance


@hypothesis.given(VALUES, MASKS)
@hypothesis.settings(max_examples=50, deadline=None)
def test_reductions_are_those_of_the_counted_entries(x, mask):
    total, mean, variance = loop_moments(counted(x, mask))
    x, mask = jnp.array(x), jnp.array(mask)
    np.testing.assert_allclose(masked.masked_sum(x, mask), total, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(masked.masked_mean(x, mask), mean, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(
        masked.masked_var(x, mask), variance, rtol=1e-4, atol=1e-2
    )
    largest = max(counted(x, mask), default=0.0)
    np.testing.assert_allclose(masked.masked_max(x, mask), largest, rtol=1e-6)


@hypothesis.given(MASKS)
@hypothesis.settings(max_examples=50, deadline=None)
def test_last_token_is_the_last_counted_token(mask):
    expected = np.zeros_like(mask)
    for i in range(mask.shape[0]):
        for j in reversed(range(mask.shape[1])):
            if mask[i, j]:
                expected[i, j] = 1
                break
    np.testing.assert_array_equal(masked.last_token(jnp.array(mask)), expected)


def test_axis():
    # Row 1: (1 + 3) / 2 = 2; row 2 has nothing.
    x, mask = (
        jnp.array([[1.0, 9.0, 3.0], [4.0, 5.0, 6.0]]),
        jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]),
    )
    np.testing.assert_allclose(masked.masked_mean(x, mask, axis=1), [2.0, 0.0])
    np.testing.assert_allclose(masked.masked_sum(x, mask, axis=0), [1.0, 0.0, 3.0])


def test_whiten_by_hand():
    # Mean 2, biased variance ((-1)^2 + 0 + 1^2) / 3 = 2/3, std 0.8165: -1 / 0.8165 = -1.2247.
    np.testing.assert_allclose(
        masked.whiten(X, MASK), [[-1.224745, 0.0, 1.224745, 0.0]], rtol=1e-5, atol=1e-6
    )


def test_pitfall_12_variance_is_biased():
    np.testing.assert_allclose(
        masked.masked_var(X, MASK), 2 / 3, rtol=1e-6
    )  # the unbiased one would be 1
    np.testing.assert_allclose(masked.masked_std(X, MASK), 0.8164966, rtol=1e-6)


def test_pitfall_12_rewards_keep_their_mean_and_advantages_lose_it():
    kept, shifted = masked.whiten_keep_mean(X, MASK), masked.whiten(X, MASK)
    np.testing.assert_allclose(
        kept, [[2 - 1.224745, 2.0, 2 + 1.224745, 0.0]], rtol=1e-5
    )
    np.testing.assert_allclose(masked.masked_mean(kept, MASK), 2.0, rtol=1e-6)
    np.testing.assert_allclose(masked.masked_mean(shifted, MASK), 0.0, atol=1e-6)


@pytest.mark.parametrize("function", [masked.whiten, masked.whiten_keep_mean])
def test_pitfall_12_whitening_is_over_the_whole_batch_without_padding(function):
    # Two rows of 3 and 1 tokens are one population of 4: mean 4, biased variance (9 + 4 + 1 + 36) /
    # 4 = 12.5.
    x = jnp.array([[1.0, 2.0, 3.0], [10.0, jnp.nan, -1e30]])
    mask = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    expected = np.array([[-3.0, -2.0, -1.0], [6.0, 0.0, 0.0]]) / np.sqrt(12.5)
    if function is masked.whiten_keep_mean:
        expected += 4 * np.array(mask)
    np.testing.assert_allclose(function(x, mask), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "function, one", [(masked.whiten, 0.0), (masked.whiten_keep_mean, 7.0)]
)
def test_pitfall_12_one_token_has_no_variance_to_divide_by(function, one):
    np.testing.assert_allclose(
        function(jnp.array([[7.0, 3.0]]), jnp.array([[1.0, 0.0]])),
        [[one, 0.0]],
        rtol=1e-6,
        atol=1e-6,
    )


@hypothesis.given(VALUES, MASKS)
@hypothesis.settings(max_examples=30, deadline=None)
def test_whitened_values_have_mean_0_and_std_1(x, mask):
    values = counted(x, mask)
    hypothesis.assume(len(values) > 1 and loop_moments(values)[2] > 1e-2)
    white = masked.whiten(jnp.array(x), jnp.array(mask))
    _, mean, variance = loop_moments(counted(white, mask))
    np.testing.assert_allclose([mean, variance], [0, 1], atol=1e-3)
    assert not np.any(np.array(white)[mask == 0])


@pytest.mark.parametrize(
    "function",
    [
        masked.masked_sum,
        masked.masked_mean,
        masked.masked_var,
        masked.masked_max,
        lambda x, m: masked.whiten(x, m).sum(),
        lambda x, m: masked.whiten_keep_mean(x, m).sum(),
        lambda x, m: masked.divide(*masked.sequence_token_mean(x, m)),
        lambda x, m: masked.divide(*masked.sequence_mean(x, m)),
    ],
)
def test_pitfall_23_an_all_zero_mask_gives_zero_and_a_zero_gradient(function):
    x, mask = jnp.array([[1.0, jnp.inf], [2.0, 3.0]]), jnp.zeros((2, 2))
    value, gradient = jax.value_and_grad(function)(x, mask)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_three_means_of_unequal_rows():
    # Rows [1, 2, 3] and [10]. Tokens: 16 / 4. Sums of rows: (6 + 10) / 2. Means of rows: (2 + 10) /
    # 2. The third row is empty and has no weight.
    x = jnp.array([[1.0, 2.0, 3.0], [10.0, 5.0, 5.0], [7.0, 7.0, 7.0]])
    mask = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert [float(v) for v in masked.token_mean(x, mask)] == [16, 4]
    assert [float(v) for v in masked.sequence_mean(x, mask)] == [16, 2]
    assert [float(v) for v in masked.sequence_token_mean(x, mask)] == [12, 2]
