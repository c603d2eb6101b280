"""A trained reward model as a scorer of token sequences."""

import functools

import jax
from jaxtyping import Array, Float, Int

from rlhfjax.models.transformer import Model
from rlhfjax.programs import ROWS, Program, Rows
from rlhfjax.types import PyTree


def sequence_rewards(
    model: Model,
    params: PyTree,
    tokens: Int[Array, "n t"],
    segments: Int[Array, "n t"],
    key: jax.Array | None = None,
) -> Float[Array, " n"]:
    """r(x, y): the scalar head on the last real token of prompt and response.

    Source: Ziegler et al. 2019, section 2.1; Ouyang et al. 2022, section 3.5.
    """
    return model.scalar(params, model.last_hidden(params, tokens, segments, key))


class ModelReward:
    """Scores whole sequences with frozen parameters."""

    def __init__(self, model: Model, params: PyTree, program: str = "score"):
        self.model, self.params = model, params
        self._score = Program(
            program, jax.jit(functools.partial(sequence_rewards, model)), ROWS
        )

    def __call__(self, tokens: Rows, segments: Rows, mask: Rows) -> Rows:
        """tokens, segments [n, p + r], response mask [n, r] -> scores [n]."""
        return self._score(self.params, tokens, segments)
