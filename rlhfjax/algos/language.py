"""Next-token losses: pretraining, supervised fine-tuning and PPO's pretraining mix."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Num

from rlhfjax.algos.masked import divide, sequence_mean, token_mean
from rlhfjax.algos.types import Loss, Metric, Scalar


def next_token_loss(logprobs: Float[Array, "b t"], mask: Float[Array, "b t"]) -> Loss:
    """-log pi(target_t | past), mean over counted targets, nats per token.

    Args:
      logprobs: of the target at each slot (already shifted: logprobs[:, t] is of the token after slot t).
      mask: 1 where the target counts: everywhere but across documents in pretraining, on the assistant's tokens in SFT.

    Source: Radford et al. 2018, eq. 1.
    """
    total, weight = token_mean(-logprobs, mask)
    return divide(total, weight), {"loss": (total, weight)}


def ptx_loss_token_mean(logprobs: Float[Array, "b t"], mask: Float[Array, "b t"], *, coefficient: Scalar) -> Loss:
    """gamma times the mean over *tokens* of -log pi(x_t | x_<t): the pretraining mix of PPO-ptx.

    Its gradient is *added* to PPO's of the same minibatch; the two are not averaged by their number of examples.
    Ouyang et al. give gamma = 27.8 and not the unit; with this one it is a factor per nat/token.

    Source: Ouyang et al. 2022, eq. 2 and appendix C.4.
    """
    return _ptx(token_mean(-logprobs, mask), token_mean(-logprobs, mask), coefficient)


def ptx_loss_sequence_sum(logprobs: Float[Array, "b t"], mask: Float[Array, "b t"], *, coefficient: Scalar) -> Loss:
    """gamma times the mean over *sequences* of -log pi(x) = -sum_t log pi(x_t | x_<t), as eq. 2 reads literally.

    With sequences of n tokens this is n times `ptx_loss_token_mean`: the same gamma is a much heavier mix.

    Source: Ouyang et al. 2022, eq. 2.
    """
    return _ptx(sequence_mean(-logprobs, mask), token_mean(-logprobs, mask), coefficient)


def _ptx(term, nll, coefficient) -> Loss:
    total, weight = coefficient * term[0], term[1]
    return divide(total, weight), {"loss": (total, weight), "nll": nll}


def nats_per_byte(
    nll: Float[Array, ""],
    targets: Int[Array, "b t"],
    mask: Float[Array, "b t"],
    byte_lengths: Num[Array, "v"],
) -> Metric:
    """Returns the loss per UTF-8 byte of the text of the counted targets, which tokenizers can be
    compared by.

      sum_t m_t (-log pi(x_t | x_<t)) / sum_t m_t bytes(x_t);   divided by ln 2 it is bits per byte

    Special tokens have no bytes: what it costs to predict them counts, per byte of the text around
    them.

    Args:
      nll: sum over the counted targets of -log pi, nats.
      targets: token ids.
      mask: 1 where a target counts.
      byte_lengths: the bytes of text that each id stands for, of `Tokenizer.byte_lengths`.

    Returns:
      (nats, bytes).

    Source: Gao et al. 2020, "The Pile", section 3.1 (bits per UTF-8 encoded byte).
    """
    return nll, jnp.sum(byte_lengths[targets] * mask)
