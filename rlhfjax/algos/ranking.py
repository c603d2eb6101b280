"""Other likelihoods of human choices, given a reward of each response.

Pairs are [n] arrays with a `weight` that is 0 on padding. Sets of K completions are [p, k] with
`valid`, as in preference.py, which has InstructGPT's `kwise_loss`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from rlhfjax.algos.masked import divide, masked_sum, weighted_mean
from rlhfjax.algos.preference import pair_metrics, reward_differences, untied_pairs
from rlhfjax.types import Loss, Scalar


def bradley_terry_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    weight: Float[Array, "n"],
) -> Loss:
    """Returns -log sigmoid(r_w - r_l), mean over pairs; metrics loss, accuracy, margin.

    Source: Bradley & Terry 1952; Stiennon et al. 2020, section 3.4.
    """
    return _pair_loss(lambda d: -jax.nn.log_sigmoid(d), chosen, rejected, weight)


def margin_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    margin: Float[Array, "n"],
    weight: Float[Array, "n"],
) -> Loss:
    """Returns -log sigmoid(r_w - r_l - m), mean over pairs; metrics loss, accuracy, margin.

    m is a column of the data, larger the clearer the labeler's preference is.

    Source: Touvron et al. 2023 (Llama 2), eq. 2 and table 27 (m = 1, 2/3, 1/3, 0).
    """
    return _pair_loss(
        lambda d: -jax.nn.log_sigmoid(d - margin), chosen, rejected, weight
    )


def smoothed_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    weight: Float[Array, "n"],
    *,
    smoothing: Scalar,
) -> Loss:
    """Returns the loss of labels that are wrong with probability eps, mean over pairs.

      -(1 - eps) log sigmoid(r_w - r_l) - eps log sigmoid(r_l - r_w)

    Metrics loss, accuracy, margin.

    Source: Wang et al. 2024, "Secrets of RLHF II"; Mitchell 2023.
    """

    def loss(d):
        right = -(1 - smoothing) * jax.nn.log_sigmoid(d)
        return right - smoothing * jax.nn.log_sigmoid(-d)

    return _pair_loss(loss, chosen, rejected, weight)


def _pair_loss(
    function: Callable[[Array], Array],
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    weight: Float[Array, "n"],
) -> Loss:
    difference = jnp.where(weight > 0, chosen - rejected, 0)
    total, count = weighted_mean(function(difference), weight)
    mean = divide(total, count)
    return mean, {"loss": (total, count), **pair_metrics(difference, weight)}


def soft_label_loss(
    a: Float[Array, "n"],
    b: Float[Array, "n"],
    probability: Float[Array, "n"],
    weight: Float[Array, "n"],
) -> Loss:
    """Returns the loss of soft labels, mean over pairs.

      -p log sigmoid(r_a - r_b) - (1 - p) log sigmoid(r_b - r_a)

    p is the probability that a is better; a tie is 1/2. The metrics accuracy and margin count the
    pairs with p != 1/2, and compare the likelier response with the other.

    Source: Nakano et al. 2021 (WebGPT; ties as soft 50 % labels); Bai et al. 2022, Constitutional
    AI.
    """
    difference = jnp.where(weight > 0, a - b, 0)
    a_better = -probability * jax.nn.log_sigmoid(difference)
    loss = a_better - (1 - probability) * jax.nn.log_sigmoid(-difference)
    return _outcome_loss(loss, difference, probability, weight)


def rao_kupper_loss(
    a: Float[Array, "n"],
    b: Float[Array, "n"],
    outcome: Float[Array, "n"],
    weight: Float[Array, "n"],
    *,
    eta: Scalar,
) -> Loss:
    """Returns the loss of the Bradley-Terry model with ties, mean over pairs.

    It is minus the log of the outcome's probability. With d = r_a - r_b and eta > 0:
      P(a wins) = sigmoid(d - eta)
      P(b wins) = sigmoid(-d - eta)
      P(tie) = (e^{2 eta} - 1) P(a wins) P(b wins)

    Args:
      a, b: rewards of the two responses.
      outcome: 1 (a wins), 1/2 (tie), 0 (b wins).
      weight: 1 on pairs that exist.
      eta: rewards closer than about eta are called equal; the three probabilities add up to 1. At
        0 ties are impossible.

    Source: Rao & Kupper 1967 (eta = log theta).
    """
    difference = jnp.where(weight > 0, a - b, 0)
    a_wins = jax.nn.log_sigmoid(difference - eta)
    b_wins = jax.nn.log_sigmoid(-difference - eta)
    tie = jnp.log(jnp.expm1(2 * jnp.asarray(eta, difference.dtype))) + a_wins + b_wins
    loss = -jnp.where(outcome > 0.5, a_wins, jnp.where(outcome < 0.5, b_wins, tie))
    return _outcome_loss(loss, difference, outcome, weight)


def _outcome_loss(
    loss: Float[Array, "n"],
    difference: Float[Array, "n"],
    outcome: Float[Array, "n"],
    weight: Float[Array, "n"],
) -> Loss:
    """Returns the mean loss, with accuracy and margin of the pairs whose outcome is not 1/2."""
    total, count = weighted_mean(loss, weight)
    sign = jnp.where(weight > 0, jnp.sign(outcome - 0.5), 0)
    mean = divide(total, count)
    metrics = pair_metrics(sign * difference, weight * jnp.abs(sign))
    return mean, {"loss": (total, count), **metrics}


def centering_loss(
    rewards: Float[Array, "p k"],
    pairs: Float[Array, "p k k"],
) -> Loss:
    """Returns (r_i + r_j)^2, the weighted mean over pairs, which is least for rewards around 0.

    The losses of comparisons leave a constant of all rewards open. This term, times a coefficient,
    determines it during training.

    Args:
      rewards: r(x, y_i); where all weights of a completion are 0, it may hold anything.
      pairs: weight of the pair of completions i and j at [p, i, j].

    Returns:
      squared reward; metrics loss, its weight that of the pairs.

    Source: Eisenstein et al. 2023, "Helping or Herding?", appendix; TRL
    `center_rewards_coefficient`.
    """
    sums = rewards[:, :, None] + rewards[:, None, :]
    squares = jnp.where(pairs > 0, sums, 0) ** 2
    total, weight = masked_sum(squares, pairs), jnp.sum(pairs)
    return divide(total, weight), {"loss": (total, weight)}


def best_of_k_loss(
    rewards: Float[Array, "p k"],
    best: Int[Array, "p"],
    valid: Float[Array, "p k"],
) -> Loss:
    """Returns -log softmax_k(r)[best], mean over prompts: the labeler picks the best of K.

    Metrics loss, accuracy (the largest reward is that of the best). A prompt whose best is not
    valid, or without another completion, has weight 0.

    Source: Ziegler et al. 2019, eq. 1.
    """
    logits = jnp.where(valid > 0, rewards, -jnp.inf)
    picked = jax.nn.one_hot(best, valid.shape[1], dtype=valid.dtype)
    has_best = jnp.sum(picked * valid, axis=1) > 0
    has_other = jnp.sum(valid > 0, axis=1) > 1
    usable = has_best & has_other
    logits = jnp.where(usable[:, None], logits, 0)
    log_p = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(log_p, best[:, None], axis=1)[:, 0]
    weight = usable.astype(valid.dtype)
    total, count = weighted_mean(loss, weight)
    correct = (jnp.argmax(logits, axis=1) == best).astype(valid.dtype)
    mean = divide(total, count)
    accuracy = masked_sum(correct, weight), count
    return mean, {"loss": (total, count), "accuracy": accuracy}


def plackett_luce_loss(
    rewards: Float[Array, "p k"],
    labels: Float[Array, "p k"],
    valid: Float[Array, "p k"],
    same: Int[Array, "p k"] | None = None,
) -> Loss:
    """Returns minus the log-likelihood of the whole ranking, mean over prompts.

      sum_i -log( e^{r_i} / (e^{r_i} + sum_{j worse than i} e^{r_j}) )

    The best is drawn from all, the next from the rest, and so on. Completions that are tied or have
    the same tokens do not compete with each other. Without those this is Plackett-Luce exactly, and
    Bradley-Terry for K = 2. Only prompts with a pair that competes count.

    Args:
      rewards: r(x, y_i).
      labels: the labeler's, higher is better.
      valid: 1 on completions that exist.
      same: equal where completions have the same tokens.

    Returns:
      nats per prompt; metrics loss (weight: prompts), accuracy and margin (weight: pairs).

    Source: Plackett 1975; Luce 1959; Rafailov et al. 2023, appendix A.3.
    """
    pairs = untied_pairs(labels, valid, same)
    differences = reward_differences(rewards, valid)
    worse = jnp.where(pairs > 0, -differences, -jnp.inf)
    # log(e^{r_i} + sum_worse e^{r_j}) - r_i = logsumexp(0, r_j - r_i of the worse); 0 is i itself.
    own = jnp.zeros_like(worse[:, :, :1])
    against = jnp.concatenate([own, worse], axis=2)
    nll = jnp.sum(jax.nn.logsumexp(against, axis=2), axis=1)
    usable = jnp.any(pairs > 0, axis=(1, 2)).astype(nll.dtype)
    total, count = weighted_mean(nll, usable)
    mean = divide(total, count)
    return mean, {"loss": (total, count), **pair_metrics(differences, pairs)}
