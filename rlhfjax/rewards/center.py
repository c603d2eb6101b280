"""The scale of a reward model: gain and bias folded into its scalar head, and the samples they are taken from."""

from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.algos.masked import masked_mean, masked_std
from rlhfjax.algos.normalize import centring_bias, gain_and_bias
from rlhfjax.data import chat, examples
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import DataError
from rlhfjax.types import Metrics, PyTree


def fold(params: PyTree, gain: float | jax.Array, bias: float | jax.Array) -> PyTree:
    """Parameters of r' = gain r + bias: both go into the scalar head."""
    head = {
        "kernel": params["head"]["kernel"] * gain,
        "bias": params["head"]["bias"] * gain + bias,
    }
    return {**params, "head": head}


def normalize(
    params: PyTree, judged: dict[str, np.ndarray], how: str
) -> tuple[PyTree, Metrics]:
    """Folds gain and bias into the scalar head: r' = gain r + bias has mean 0 (and std 1) on the completions.

    Args:
      judged: `rewards` of completions under these parameters, and `valid`, 1 on completions that exist.
      how: none, mean (InstructGPT C.2, on whatever the completions are), or mean_std (Ziegler 2019; N-details).
    """
    rewards, valid = (
        jnp.asarray(judged[name], jnp.float32).ravel() for name in ("rewards", "valid")
    )
    pairs = {
        "reference_mean": (masked_mean(rewards, valid), 1.0),
        "reference_std": (masked_std(rewards, valid), 1.0),
    }
    if how == "none":
        return params, pairs
    if how == "mean_std":
        gain, bias = gain_and_bias(rewards, valid, mean=0.0, std=1.0)
    else:
        gain, bias = 1.0, centring_bias(rewards, valid)
    return fold(params, gain, bias), pairs


def demonstrations(
    source: Source, tokenizer: Tokenizer, *, batch_size: int, length: int
) -> Iterable[dict[str, np.ndarray]]:
    """The last answer of each conversation as one completion of its prompt: tokens, segments [b, 1, t], valid [b, 1].

    Prompts and answers are cut as those of rankings (`examples.preference`); the last batch is
    filled with rows that count for nothing.

    Raises:
      DataError: no conversation has an answer.
    """
    rows = [
        row
        for i in range(len(source))
        if (row := _demonstration(source[i]["messages"], tokenizer, length))
    ]
    if not rows:
        raise DataError(
            "demonstrations: no conversation has an assistant turn after a user's"
        )
    return list(_batched(rows, batch_size))


def _demonstration(
    messages: list[chat.Message], tokenizer: Tokenizer, length: int
) -> dict[str, np.ndarray] | None:
    roles = [message["role"] for message in messages]
    ends = [
        j for j in range(1, len(roles)) if roles[j - 1 : j + 1] == ["user", "assistant"]
    ]
    if not ends:
        return None
    prompt = chat.render_prompt(tokenizer, messages[: ends[-1]])
    answer = chat.response_tokens(tokenizer, messages[ends[-1]]["content"])
    native = {
        "prompt_tokens": prompt,
        "completion_tokens": [np.array(answer, np.int32)],
        "scores": [0.0],
    }
    return examples.preference(tokenizer, native, k=1, length=length)


def _batched(
    rows: list[dict[str, np.ndarray]], size: int
) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        blank = some[0] | {"valid": np.zeros_like(some[0]["valid"])}
        some += [blank] * (size - len(some))
        yield {name: np.stack([row[name] for row in some]) for name in some[0]}
