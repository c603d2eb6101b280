"""Other likelihoods of human choices, given a reward of each response.

Pairs are [n] arrays with a `weight` that is 0 on padding; sets of K are [p, k] with `valid`, see preference.py, whose
`kwise_loss` is InstructGPT's.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from rlhfjax.algos.masked import divide, masked_sum
from rlhfjax.algos.preference import pair_metrics, reward_differences, untied_pairs
from rlhfjax.types import Loss, Scalar


def bradley_terry_loss(
    chosen: Float[Array, "n"], rejected: Float[Array, "n"], weight: Float[Array, "n"]
) -> Loss:
    """-log sigmoid(r_w - r_l), mean over pairs. Metrics loss, accuracy, margin.

    Source: Bradley & Terry 1952; Stiennon et al. 2020, section 3.4.
    """
    return _pair_loss(lambda d: -jax.nn.log_sigmoid(d), chosen, rejected, weight)


def margin_loss(
    chosen: Float[Array, "n"],
    rejected: Float[Array, "n"],
    margin: Float[Array, "n"],
    weight: Float[Array, "n"],
) -> Loss:
    """-log sigmoid(r_w - r_l - m), m larger the clearer the labeler's preference (a column of the data).

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
    """-(1 - eps) log sigmoid(r_w - r_l) - eps log sigmoid(r_l - r_w): labels are wrong with probability eps.

    Source: Wang et al. 2024, "Secrets of RLHF II"; Mitchell 2023.
    """

    def loss(d):
        return -(1 - smoothing) * jax.nn.log_sigmoid(
            d
        ) - smoothing * jax.nn.log_sigmoid(-d)

    return _pair_loss(loss, chosen, rejected, weight)


def soft_label_loss(
    a: Float[Array, "n"],
    b: Float[Array, "n"],
    probability: Float[Array, "n"],
    weight: Float[Array, "n"],
) -> Loss:
    """-p log sigmoid(r_a - r_b) - (1 - p) log sigmoid(r_b - r_a), p the probability that a is better; a tie is 1/2.

    accuracy and margin count the pairs with p != 1/2 and are of the likelier response over the other.

    Source: Nakano et al. 2021 (WebGPT; ties as soft 50 % labels); Bai et al. 2022, Constitutional AI.
    """
    difference = jnp.where(weight > 0, a - b, 0)
    loss = -probability * jax.nn.log_sigmoid(difference) - (
        1 - probability
    ) * jax.nn.log_sigmoid(-difference)
    total, count = masked_sum(loss, weight), jnp.sum(weight)
    sign = jnp.where(weight > 0, jnp.sign(probability - 0.5), 0)
    return divide(total, count), {
        "loss": (total, count),
        **pair_metrics(sign * difference, weight * jnp.abs(sign)),
    }


def rao_kupper_loss(
    a: Float[Array, "n"],
    b: Float[Array, "n"],
    outcome: Float[Array, "n"],
    weight: Float[Array, "n"],
    *,
    eta: Scalar,
) -> Loss:
    """Bradley-Terry with ties as outcomes of their own: minus the log of, with d = r_a - r_b and eta > 0,

      P(a wins) = sigmoid(d - eta),  P(b wins) = sigmoid(-d - eta),  P(tie) = (e^{2 eta} - 1) P(a wins) P(b wins)

    Args:
      a, b: rewards of the two responses.
      outcome: 1 (a wins), 1/2 (tie), 0 (b wins).
      weight: 1 on pairs that exist.
      eta: rewards closer than about eta are called equal; the three add up to 1. At 0 ties are impossible.

    Source: Rao & Kupper 1967 (eta = log theta).
    """
    difference = jnp.where(weight > 0, a - b, 0)
    a_wins, b_wins = (
        jax.nn.log_sigmoid(difference - eta),
        jax.nn.log_sigmoid(-difference - eta),
    )
    tie = jnp.log(jnp.expm1(2 * jnp.asarray(eta, difference.dtype))) + a_wins + b_wins
    loss = -jnp.where(outcome > 0.5, a_wins, jnp.where(outcome < 0.5, b_wins, tie))
    total, count = masked_sum(loss, weight), jnp.sum(weight)
    sign = jnp.where(weight > 0, jnp.sign(outcome - 0.5), 0)
    return divide(total, count), {
        "loss": (total, count),
        **pair_metrics(sign * difference, weight * jnp.abs(sign)),
    }


def best_of_k_loss(
    rewards: Float[Array, "p k"], best: Int[Array, "p"], valid: Float[Array, "p k"]
) -> Loss:
    """-log softmax_k(r)[best]: the labeler picks the best of K. Metrics loss, accuracy (the argmax is the best).

    A prompt whose best is not valid, or that has no other completion, has weight 0.

    Source: Ziegler et al. 2019, eq. 1.
    """
    logits = jnp.where(valid > 0, rewards, -jnp.inf)
    picked = jax.nn.one_hot(best, valid.shape[1], dtype=valid.dtype)
    usable = (jnp.sum(picked * valid, axis=1) > 0) & (jnp.sum(valid > 0, axis=1) > 1)
    logits = jnp.where(usable[:, None], logits, 0)
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), best[:, None], axis=1)[:, 0]
    weight = usable.astype(valid.dtype)
    total, count = masked_sum(loss, weight), jnp.sum(weight)
    correct = (jnp.argmax(logits, axis=1) == best).astype(valid.dtype)
    return divide(total, count), {
        "loss": (total, count),
        "accuracy": (masked_sum(correct, weight), count),
    }


def plackett_luce_loss(
    rewards: Float[Array, "p k"],
    labels: Float[Array, "p k"],
    valid: Float[Array, "p k"],
    same: Int[Array, "p k"] | None = None,
) -> Loss:
    """Minus the log-likelihood of the whole ranking: sum_i -log( e^{r_i} / (e^{r_i} + sum_{j worse than i} e^{r_j}) ).

    The best is drawn from all, the next from the rest, and so on. Completions that are tied or have
    the same tokens do not compete with each other; without those this is Plackett-Luce exactly,
    with K = 2 Bradley-Terry. Mean over prompts with a pair that competes.

    Args:
      rewards: r(x, y_i); labels: higher is better; valid: 1 on completions that exist.
      same: equal where completions have the same tokens.

    Returns:
      nats per prompt; metrics loss (weight: prompts), accuracy and margin (weight: pairs).

    Source: Plackett 1975; Luce 1959; Rafailov et al. 2023, appendix A.3.
    """
    pairs = untied_pairs(labels, valid, same)
    differences = reward_differences(rewards, valid)
    worse = jnp.where(pairs > 0, -differences, -jnp.inf)
    # log(e^{r_i} + sum_worse e^{r_j}) - r_i = logaddexp(0, logsumexp_worse(r_j - r_i)); the 0 is i itself.
    against = jnp.concatenate([jnp.zeros_like(worse[:, :, :1]), worse], axis=2)
    nll = jnp.sum(jax.nn.logsumexp(against, axis=2), axis=1)
    usable = jnp.any(pairs > 0, axis=(1, 2)).astype(nll.dtype)
    total, count = masked_sum(nll, usable), jnp.sum(usable)
    return divide(total, count), {
        "loss": (total, count),
        **pair_metrics(differences, pairs),
    }


def _pair_loss(function, chosen, rejected, weight) -> Loss:
    difference = jnp.where(weight > 0, chosen - rejected, 0)
    total, count = masked_sum(function(difference), weight), jnp.sum(weight)
    return divide(total, count), {
        "loss": (total, count),
        **pair_metrics(difference, weight),
    }
