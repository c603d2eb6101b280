"""Sets the scale of a reward model: gain and bias in its scalar head, estimated on samples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.algos.masked import masked_mean, masked_std
from rlhfjax.algos.normalize import centring_bias, gain_and_bias
from rlhfjax.data import chat, examples
from rlhfjax.data.accepted import accepted, validate_demonstration
from rlhfjax.data.batches import PreferenceBatch, in_batches
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import DataError
from rlhfjax.types import Metrics, PyTree


def fold(params: PyTree, gain: float | jax.Array, bias: float | jax.Array) -> PyTree:
    """Returns the parameters of r' = gain r + bias, by changing the scalar head."""
    head = {
        "kernel": params["head"]["kernel"] * gain,
        "bias": params["head"]["bias"] * gain + bias,
    }
    return {**params, "head": head}


def normalize(
    params: PyTree, rewards: np.ndarray, valid: np.ndarray, how: str
) -> tuple[PyTree, Metrics]:
    """Returns the parameters of r' = gain r + bias with mean 0 (and std 1) on samples.

    Args:
      rewards: rewards of the samples under `params`, of any shape.
      valid: 1 on samples that exist, of the same shape.
      how: none, mean (InstructGPT C.2, on any samples), or mean_std (Ziegler 2019; "N
        implementation details").
    Returns:
      The parameters, and the mean and std of `rewards` as metrics.
    """
    samples = jnp.asarray(rewards, jnp.float32).ravel()
    mask = jnp.asarray(valid, jnp.float32).ravel()
    metrics: Metrics = {
        "reference_mean": (masked_mean(samples, mask), 1.0),
        "reference_std": (masked_std(samples, mask), 1.0),
    }
    if how == "none":
        return params, metrics
    if how == "mean_std":
        gain, bias = gain_and_bias(samples, mask, mean=0.0, std=1.0)
    else:
        gain, bias = 1.0, centring_bias(samples, mask)
    return fold(params, gain, bias), metrics


def demonstrations(
    source: Source, tokenizer: Tokenizer, *, batch_size: int, length: int
) -> list[PreferenceBatch]:
    """Returns the last response of each conversation as the only completion of its prompt.

    Prompts and responses are truncated as those of rankings, see `examples.preference`. The last
    batch is filled with rows that are not valid.

    Raises:
      DataError: no conversation has a response.
    """
    source = accepted(source, tokenizer, validate_demonstration)
    rows = []
    for i in range(len(source)):
        row = _demonstration(source[i]["messages"], tokenizer, length)
        if row is not None:
            rows.append(row)
    if not rows:
        raise DataError(
            "demonstrations: no conversation has an assistant turn after a user's"
        )
    filler = dataclasses.replace(rows[0], valid=np.zeros_like(rows[0].valid))
    return in_batches(rows, batch_size, filler)


def _demonstration(
    messages: list[chat.Message], tokenizer: Tokenizer, length: int
) -> PreferenceBatch | None:
    """Returns the last response to a user turn, as a row; None if there is none."""
    found = examples.last_response(messages)
    if found is None:
        return None
    prompt, text = found
    response = chat.response_tokens(tokenizer, text)
    row = {
        "prompt_tokens": chat.render_prompt(tokenizer, prompt),
        "completion_tokens": [np.array(response, np.int32)],
        "scores": [0.0],
    }
    return examples.preference(tokenizer, row, k=1, length=length)
