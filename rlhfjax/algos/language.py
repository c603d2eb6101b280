"""Next-token losses: pretraining, supervised fine-tuning and PPO's pretraining mix."""

import math

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from rlhfjax.algos.masked import divide, sequence_mean, token_mean
from rlhfjax.algos.types import Loss, Scalar


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


def bits_per_byte(nll: Float[Array, ""], n_bytes: Float[Array, ""]) -> Float[Array, ""]:
    """sum of -log pi over a text (nats) / (ln 2 * its UTF-8 bytes): comparable between tokenizers."""
    return divide(jnp.asarray(nll), jnp.asarray(n_bytes)) / math.log(2)
