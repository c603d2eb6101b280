"""Scores token sequences with a trained reward model."""

import functools

import jax
from jaxtyping import Array, Float, Int

from rlhfjax.models.experts import Routing
from rlhfjax.models.transformer import Model
from rlhfjax.programs import ROWS, Program, Rows
from rlhfjax.types import PyTree


def sequence_rewards(
    model: Model,
    params: PyTree,
    tokens: Int[Array, "n t"],
    attention_mask: Int[Array, "n t"],
    key: jax.Array | None = None,
) -> Float[Array, " n"]:
    """Returns r(x, y): the scalar head on the last real token of prompt and response.

    Args:
      key: turns dropout on.

    Source: Ziegler et al. 2019, section 2.1; Ouyang et al. 2022, section 3.5.
    """
    return model.scalar(params, model.last_hidden(params, tokens, attention_mask, key))


def rewards_and_routing(
    model: Model,
    params: PyTree,
    tokens: Int[Array, "n t"],
    attention_mask: Int[Array, "n t"],
    key: jax.Array | None = None,
) -> tuple[Float[Array, " n"], Routing | None]:
    """Returns `sequence_rewards`, and the routing of a mixture of experts, for training."""
    hidden, routing = model.last_hidden_and_routing(params, tokens, attention_mask, key)
    return model.scalar(params, hidden), routing


class ModelReward:
    """Scores whole sequences with frozen parameters."""

    def __init__(self, model: Model, params: PyTree, program: str = "score"):
        self.model, self.params = model, params
        self._score = Program(
            program, jax.jit(functools.partial(sequence_rewards, model)), ROWS
        )

    def __call__(self, tokens: Rows, attention_mask: Rows, mask: Rows) -> Rows:
        """Returns the scores [n] of responses.

        Args:
          tokens, attention_mask: [n, p + r], prompts and responses.
          mask: [n, r], 1 on the response's tokens.
        """
        return self._score(self.params, tokens, attention_mask)
