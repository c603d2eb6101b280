"""A process reward: the probabilities that the steps of a response are right, as one score."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from rlhfjax import hosts
from rlhfjax.algos.process import Combine, solution_scores
from rlhfjax.data.steps import step_ends
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import Layout
from rlhfjax.models.transformer import Model
from rlhfjax.programs import ROWS, Program, Rows, on_host
from rlhfjax.rewards.dense import token_rewards
from rlhfjax.rewards.model import ModelReward
from rlhfjax.types import PyTree

SEPARATOR = "\n\n"
"""Default text between two steps; PRM800K's solutions have a step per paragraph."""


def validate_separator(separator: str, context: str) -> None:
    """Raises ConfigError for an empty separator."""
    if not separator:
        raise ConfigError(f"{context}.separator='': expected the text between steps")


def response_scores(
    model: Model,
    params: PyTree,
    tokens: Int[Array, "n t"],
    attention_mask: Int[Array, "n t"],
    ends: Float[Array, "n r"],
    *,
    combine: Combine,
) -> Float[Array, " n"]:
    """Returns the scores of responses, product or minimum of the probabilities of their steps.

    Args:
      ends: 1 at the last token of each step of the last r tokens.
    """
    logits = token_rewards(model, params, tokens, attention_mask)
    return solution_scores(logits[:, -ends.shape[1] :], ends, combine=combine)


class ProcessReward(ModelReward):
    """Scores responses by their steps. The host finds the steps in the text of a response."""

    def __init__(
        self,
        saved: store.SavedModel,
        *,
        tokenizer: Tokenizer,
        layout: Layout,
        separator: str,
        combine: Combine,
        program: str = "score",
    ):
        super().__init__(saved.model, saved.params, program)
        self._tokenizer, self._layout = tokenizer, layout
        self._separator = separator
        scores = functools.partial(response_scores, saved.model, combine=combine)
        self._by_steps = Program(program, jax.jit(scores), ROWS)

    def __call__(self, tokens: Rows, attention_mask: Rows, mask: Rows) -> Rows:
        """Returns the scores [n] of responses, from 0 to 1.

        Args:
          tokens, attention_mask: [n, p + r], prompts and responses.
          mask: [n, r], 1 on the response's tokens.
        """
        find = on_host(self._find_ends, _ends_shape)
        ends = self._layout.put_rows(find(tokens, mask))
        return self._by_steps(self.params, tokens, attention_mask, ends)

    def _find_ends(self, tokens: Rows, mask: Rows) -> np.ndarray:
        """Returns 1 at the last token of each step, float32 [n, r]."""
        rows, counts = hosts.whole((tokens, mask))
        ends = np.zeros(counts.shape, np.float32)
        responses = np.asarray(rows)[:, -counts.shape[1] :]
        for i, (ids, counted) in enumerate(zip(responses, counts, strict=True)):
            places = np.flatnonzero(counted)
            kept = ids[places].tolist()
            ends[i, places[step_ends(self._tokenizer, kept, self._separator)]] = 1.0
        return ends


def _ends_shape(tokens: Rows, mask: Rows) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(mask.shape, np.float32)
