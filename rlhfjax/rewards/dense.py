"""A reward per token: H(s_t, a_t), which TAMER learns, for every token of a response."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhfjax.models.experts import Routing
from rlhfjax.models.transformer import Model
from rlhfjax.programs import ROWS, Program, Rows, small
from rlhfjax.rewards.model import ModelReward
from rlhfjax.types import PyTree


def token_rewards(
    model: Model,
    params: PyTree,
    tokens: Int[Array, "n t"],
    attention_mask: Int[Array, "n t"],
) -> Float[Array, "n t"]:
    """Returns H of every token: the scalar head on the hidden state at the token itself.

    This state depends on the token, which is the action.
    """
    return token_rewards_and_routing(model, params, tokens, attention_mask)[0]


def token_rewards_and_routing(
    model: Model,
    params: PyTree,
    tokens: Int[Array, "n t"],
    attention_mask: Int[Array, "n t"],
) -> tuple[Float[Array, "n t"], Routing | None]:
    """Returns `token_rewards`, and the routing of a mixture of experts, for training."""
    hidden, routing = model.hidden_and_routing(
        params, tokens, segment_ids=attention_mask
    )
    return model.scalar(params, hidden), routing


class DenseReward(ModelReward):
    """A reward per token; a response scores the sum over its tokens, sum_t H(s_t, a_t)."""

    def __init__(self, model: Model, params: PyTree, program: str = "score"):
        super().__init__(model, params)
        self._dense = Program(
            program, jax.jit(functools.partial(token_rewards, model)), ROWS
        )
        total = jax.jit(
            lambda rewards, mask: jnp.sum(jnp.where(mask > 0, rewards, 0), axis=1)
        )
        self._sum = Program(f"{program}_sum", total, ROWS)

    def per_token(self, tokens: Rows, attention_mask: Rows, mask: Rows) -> Rows:
        """Returns H of the response's tokens, [n, r], 0 on padding."""
        r = mask.shape[1]
        rewards = self._dense(self.params, tokens, attention_mask)
        return small(lambda rewards, mask: rewards[:, -r:] * mask, ROWS)(rewards, mask)

    def __call__(self, tokens: Rows, attention_mask: Rows, mask: Rows) -> Rows:
        """Returns the scores [n] of responses.

        Args:
          tokens, attention_mask: [n, p + r], prompts and responses.
          mask: [n, r], 1 on the response's tokens.
        """
        return self._sum(self.per_token(tokens, attention_mask, mask), mask)
