"""A reward a token: what TAMER learns, H(s_t, a_t) on every token of a response."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.models.transformer import Model
from rlhfjax.programs import ROWS, Program, Rows, small
from rlhfjax.rewards.model import ModelReward
from rlhfjax.types import PyTree


def token_rewards(
    model: Model, params: PyTree, tokens: Int[Array, "n t"], segments: Int[Array, "n t"]
) -> Float[Array, "n t"]:
    """H at every slot: the scalar head on a token's own hidden state, which has seen the token (the action)."""
    return model.scalar(params, model.hidden(params, tokens, segments=segments))


class DenseReward(ModelReward):
    """Per-token rewards; as a score of the whole response, their sum: sum_t H(s_t, a_t)."""

    def __init__(self, model: Model, params: PyTree, program: str = "score"):
        super().__init__(model, params)
        self._dense = Program(
            program, jax.jit(functools.partial(token_rewards, model)), ROWS
        )
        total = jax.jit(
            lambda rewards, mask: jnp.sum(jnp.where(mask > 0, rewards, 0), axis=1)
        )
        self._sum = Program(f"{program}_sum", total, ROWS)

    def per_token(self, tokens: Rows, segments: Rows, mask: Rows) -> Rows:
        """H [n, r] at the response's tokens."""
        r = mask.shape[1]
        rewards = self._dense(self.params, tokens, segments)
        return small(lambda rewards, mask: rewards[:, -r:] * mask, ROWS)(rewards, mask)

    def __call__(self, tokens: Rows, segments: Rows, mask: Rows) -> Rows:
        """tokens, segments [n, p + r], response mask [n, r] -> scores [n]."""
        return self._sum(self.per_token(tokens, segments, mask), mask)
