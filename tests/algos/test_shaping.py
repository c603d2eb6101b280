import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algos import masked, shaping

MASKS = st.lists(st.booleans(), min_size=18, max_size=18).map(
    lambda m: np.array(m, np.float32).reshape(3, 6)
)


def loop_token_rewards(score, kl, mask, beta):
    rewards = np.zeros(kl.shape)
    for i in range(kl.shape[0]):
        last = None
        for j in range(kl.shape[1]):
            if mask[i, j] > 0:
                rewards[i, j] = -beta * kl[i, j]
                last = j
        if last is not None:
            rewards[i, last] += score[i]
    return rewards


@hypothesis.given(MASKS)
@hypothesis.settings(max_examples=40, deadline=None)
def test_token_rewards_equal_the_loop_on_any_mask(mask):
    rng = np.random.default_rng(1)
    score, kl = (
        rng.normal(size=3).astype(np.float32),
        rng.normal(size=(3, 6)).astype(np.float32),
    )
    rewards = shaping.token_rewards(
        jnp.array(score), jnp.array(kl), jnp.array(mask), beta=0.3
    )
    np.testing.assert_allclose(
        rewards, loop_token_rewards(score, kl, mask, 0.3), rtol=1e-5, atol=1e-6
    )


def test_token_rewards_by_hand():
    rewards = shaping.token_rewards(
        jnp.array([2.0]),
        jnp.array([[0.5, -1.0, 2.0]]),
        jnp.array([[1.0, 1.0, 0.0]]),
        beta=0.1,
    )
    np.testing.assert_allclose(rewards, [[-0.05, 2.1, 0.0]], rtol=1e-6)


def test_pitfall_09_fractional_rewards_stay_fractional():
    rewards = shaping.token_rewards(
        jnp.array([0.7, -1.6]), jnp.zeros((2, 3)), jnp.ones((2, 3)), beta=0.1
    )
    assert jnp.issubdtype(rewards.dtype, jnp.floating)
    np.testing.assert_allclose(rewards[:, -1], [0.7, -1.6], rtol=1e-6)
    np.testing.assert_allclose(rewards.sum(), -0.9, rtol=1e-6)


def test_pitfall_09_an_integer_score_is_refused():
    with pytest.raises(
        TypeError
    ):  # by the types of the signature, which the test run checks
        shaping.token_rewards(
            jnp.array([1, 2]), jnp.zeros((2, 3)), jnp.ones((2, 3)), beta=0.1
        )


@pytest.mark.parametrize(
    "mask, last",
    [
        ([1, 1, 1, 1], 3),
        ([1, 1, 0, 0], 1),
        ([0, 1, 1, 0], 2),
        ([1, 0, 1, 0], 2),
        ([1, 0, 0, 0], 0),
    ],
)
def test_pitfall_10_the_score_is_on_the_last_response_token_alone(mask, last):
    rewards = shaping.token_rewards(
        jnp.array([3.0]), jnp.zeros((1, 4)), jnp.array([mask], jnp.float32), beta=0.5
    )
    expected = np.zeros((1, 4))
    expected[0, last] = 3
    np.testing.assert_array_equal(rewards, expected)


def test_pitfall_11_a_score_of_zero_is_a_score():
    # 0.0 stays 0.0 where the response ended, and is replaced (or lowered) like any other where it
    # did not.
    score, ended = jnp.array([0.0, 0.0]), jnp.array([True, False])
    np.testing.assert_array_equal(
        shaping.replace_missing_eos(score, ended, value=-1.0), [0.0, -1.0]
    )
    np.testing.assert_array_equal(
        shaping.penalize_missing_eos(score, ended, penalty=2.5), [0.0, -2.5]
    )
    np.testing.assert_array_equal(shaping.reject(score, ended, value=-1.0), [0.0, -1.0])
    rewards = shaping.token_rewards(score, jnp.ones((2, 2)), jnp.ones((2, 2)), beta=0.1)
    np.testing.assert_allclose(rewards, -0.1 * np.ones((2, 2)), rtol=1e-6)


def test_pitfall_14_missing_eos_is_penalized_before_whitening():
    # Scores 3 (ended) and 5 (cut off, hence -1), no KL, one token each: rewards 3 and -1, mean 1,
    # std 2. Whitened without shifting the mean: (3 - 1) / 2 + 1 = 2 and (-1 - 1) / 2 + 1 = 0. A
    # penalty after whitening would give -1.
    tokens, mask = jnp.array([[4, 2], [4, 4]]), jnp.ones((2, 2))
    ended = shaping.has_token(tokens, mask, 2)
    score = shaping.replace_missing_eos(jnp.array([3.0, 5.0]), ended, value=-1.0)
    rewards = shaping.token_rewards(score, jnp.zeros((2, 2)), mask, beta=0.0)
    np.testing.assert_array_equal(rewards, [[0.0, 3.0], [0.0, -1.0]])
    white = masked.whiten_keep_mean(rewards[:, 1:], mask[:, 1:])
    np.testing.assert_allclose(white, [[2.0], [0.0]], atol=1e-6)


def test_pitfall_08_an_eos_in_the_padding_is_no_end():
    tokens = jnp.array([[4, 2, 2], [4, 4, 2], [2, 2, 2]])
    mask = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(
        shaping.has_token(tokens, mask, 2), [True, False, False]
    )


def test_any_of_several_ends_is_an_end():
    tokens = jnp.array([[4, 2, 9], [4, 7, 9], [4, 4, 7], [4, 4, 9]])
    mask = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0] * 3])
    ended = shaping.has_token(tokens, mask, 2, 7)
    np.testing.assert_array_equal(ended, [True, True, False, False])
    np.testing.assert_array_equal(
        shaping.is_any(tokens, (9, 2)), np.isin(tokens, [2, 9])
    )


def test_clip_score():
    np.testing.assert_array_equal(
        shaping.clip_score(jnp.array([-7.0, 0.5, 7.0]), limit=5.0), [-5, 0.5, 5]
    )


def loop_truncate(tokens, mask, token_id, after):
    kept, found = np.zeros_like(mask), []
    for i in range(tokens.shape[0]):
        position, stopped = 0, False
        for j in range(tokens.shape[1]):
            if mask[i, j] == 0 or stopped:
                continue
            kept[i, j] = 1
            stopped = tokens[i, j] == token_id and position >= after
            position += 1
        found.append(stopped)
    return kept, np.array(found)


@hypothesis.given(
    MASKS, st.lists(st.integers(0, 2), min_size=18, max_size=18), st.integers(0, 6)
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_truncation_equals_the_loop(mask, tokens, after):
    tokens = np.array(tokens, np.int32).reshape(3, 6)
    kept, found = shaping.truncate_mask(
        jnp.array(tokens), jnp.array(mask), token_id=1, after=after
    )
    expected_kept, expected_found = loop_truncate(tokens, mask, 1, after)
    np.testing.assert_array_equal(kept, expected_kept)
    np.testing.assert_array_equal(found, expected_found)


def test_truncation_and_rejection_by_hand():
    # A full stop (13) at position 1 is too early for after = 2; the one at 3 ends row 1; row 2 has
    # none in time.
    tokens = jnp.array([[5, 13, 5, 13, 5, 13], [5, 13, 5, 5, 5, 5]])
    mask, found = shaping.truncate_mask(tokens, jnp.ones((2, 6)), token_id=13, after=2)
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(
        shaping.reject(jnp.array([0.25, 9.0]), found, value=-1.0), [0.25, -1.0]
    )


def test_overlong_penalty_by_hand():
    # limit 10, soft 4: nothing up to 6, -(8 - 6) / 4 at 8, -1 at 10 and beyond.
    lengths = np.array([0, 6, 8, 10, 12])
    mask = jnp.array(np.arange(12)[None, :] < lengths[:, None], jnp.float32)
    np.testing.assert_allclose(
        shaping.overlong_penalty(mask, limit=10, soft=4), [0, 0, -0.5, -1, -1]
    )
