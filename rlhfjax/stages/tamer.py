"""TAMER: a reward a token, by regression on a person's scalar feedback given a moment late while the answer appears.

min_H mean_f (h_f - sum_t c_{f,t} H(s_t, a_t))^2,  c_{f,t} the chance that feedback f is about token t

Feedback is JSON lines: {"prompt": text or messages, "response": text, "feedback": [[seconds, value], …]}; token t of
the response is on the screen from t to t + 1 times `seconds_per_token`. The result is a reward by name: H summed over
a response, which `compose` adds to another reward (TAMER+RL's reward addition).

Knox & Stone 2009 (regression with credit); Warnell et al. 2018 (deep: every credited token is worth the signal).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import paths
from rlhfjax.algos import tamer
from rlhfjax.algos.masked import divide
from rlhfjax.data import chat, examples
from rlhfjax.data.padding import pad_right
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.jsonl import located_rows
from rlhfjax.mesh import Layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.ranges import NonNegative, Positive, Seconds, Tokens
from rlhfjax.rewards.dense import token_rewards
from rlhfjax.roles import DISK, REWARD, Models, Role, Sources, Workload
from rlhfjax.stage import Data, Finished, Shapes, Stage, row_shapes
from rlhfjax.state import TrainState
from rlhfjax.supervised import (
    MODEL,
    ModelTrainConfig,
    left_behind,
    load_trained,
    sum_over,
    supervised_stage,
    supervised_workload,
    train_step,
    trained_role,
    validate_training,
)
from rlhfjax.types import Metrics

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ModelTrainConfig):
    stage: str = "tamer"
    feedback: str  # a file of JSON lines
    held_out: str  # another
    length: Tokens  # prompt and response, tokens; a prompt keeps up to half of it, beside its response
    loss: Literal["tamer", "deep_tamer"] = "tamer"
    seconds_per_token: Seconds = 0.25  # how fast the answer appeared
    credit: Literal["uniform", "gamma"] = (
        "uniform"  # the distribution of a person's delay
    )
    delay: tuple[NonNegative, NonNegative] = (
        0.2,
        0.8,
    )  # of uniform: seconds; Knox & Stone 2009
    gamma: tuple[Positive, Positive] = (
        2.0,
        0.28,
    )  # of gamma: shape, scale in seconds; Knox & Stone


def workload(config: Config, completions: int = 1) -> Workload:
    return supervised_workload(config)


def roles(config: Config) -> dict[str, Role]:
    return {MODEL: trained_role(config, head="scalar")}


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    validate_training(config, layout, model_config)
    if config.lora.dropout:
        raise ConfigError(
            f"tamer.lora.dropout={config.lora.dropout}: the regression has no dropout"
        )
    low, high = config.delay
    if low >= high:
        raise ConfigError(
            f"tamer.delay={config.delay}: expected (low, high) with low < high"
        )


def describe(config: Config) -> dict[str, Any]:
    """Returns what reward.json says: the model beside it rewards every token."""
    return {"kind": "dense"}


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    loaded = load_trained(config, Models(config.stage, roles(config), layout, sources))
    model, tokenizer = loaded.model, loaded.tokenizer
    validate(config, layout, model.config)
    loss = feedback_loss(model, config)
    step, tx = train_step(config, loaded, loss)

    def open_data() -> Data:
        rows, held_out = (
            read_feedback(path, tokenizer, config.length)
            for path in (config.feedback, config.held_out)
        )
        measure = jax.jit(
            lambda params, batch: {
                f"val_{k}": v for k, v in loss(params, batch, None)[1].items()
            }
        )

        def evals(state: TrainState) -> Metrics:
            params = loaded.merged(state.params)
            return sum_over(
                passes(held_out, config.batch_size),
                lambda batch: measure(params, batch),
                layout,
            )

        def finish(state: TrainState) -> Finished:
            return left_behind(loaded, state.params)._replace(
                files={REWARD: describe(config)}
            )

        return Data(Shuffled(rows, config.batch_size, config.seed), evals, finish)

    return supervised_stage(
        loaded,
        tx,
        step=step,
        batch=lambda values: _batch_shapes(config, values),
        open=open_data,
        units=config.batch_size,
        unit="answers",
    )


def _batch_shapes(config: Config, values: int) -> Shapes:
    """Returns the shapes of a batch whose responses have up to `values` pieces of feedback."""
    row, given = (config.length,), (values,)
    return row_shapes(
        config.batch_size,
        tokens=(row, np.int32),
        segments=(row, np.int32),
        times=(given, np.float32),
        values=(given, np.float32),
        weight=(given, np.float32),
        first=((), np.int32),
        count=((), np.int32),
        cut=((), np.float32),
    )


def feedback_loss(
    model: Model, config: Config
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """(params, batch, key) -> mean over all feedback of the batch, whichever answer it was given to."""
    one = {"tamer": tamer.tamer_loss, "deep_tamer": tamer.deep_tamer_loss}[config.loss]
    credit_of = credit_by(config)

    def of_answer(rewards, first, count, times, values, weight):
        slot = jnp.arange(rewards.shape[0])
        token = (slot - first).astype(jnp.float32)
        shown = (slot >= first) & (slot < first + count)
        starts = config.seconds_per_token * token
        credit = credit_of(starts, starts + config.seconds_per_token, times)
        return one(jnp.where(shown, rewards, 0), credit * shown, values, weight)[1]

    def loss(
        params: Any, batch: dict[str, jax.Array], key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        rewards = token_rewards(model, params, batch["tokens"], batch["segments"])
        names = ("first", "count", "times", "values", "weight")
        metrics = jax.vmap(of_answer)(rewards, *(batch[name] for name in names))
        pairs = {
            name: (total.sum(), weight.sum())
            for name, (total, weight) in metrics.items()
        }
        real = (batch["weight"].sum(1) > 0).astype(jnp.float32)
        pairs["rows_cut"] = (jnp.sum(batch["cut"] * real), jnp.sum(real))
        return divide(*pairs["loss"]), pairs

    return loss


def credit_by(config: Config) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """(starts, ends, times), seconds -> the credit [f, t] of every token for every feedback."""
    if config.credit == "gamma":
        shape, scale = config.gamma
        return functools.partial(tamer.gamma_credit, shape=shape, scale=scale)
    low, high = config.delay
    return functools.partial(tamer.uniform_credit, low=low, high=high)


def read_feedback(path: str, tokenizer: Tokenizer, length: int) -> list[Batch]:
    """Every answer with its feedback as arrays; as many places for feedback as the answer with most of it has.

    Prompts and answers that do not fit are cut, see `examples.prompt_room`; `cut` is 1 on those
    rows.

    Raises:
      DataError: the file cannot be read, or a line is malformed.
    """
    found = []
    for place, row in located_rows(paths.path(path)):
        try:
            given = np.array(row["feedback"], np.float32).reshape(-1, 2)
            prompt, response = row["prompt"], row["response"]
            messages = (
                [{"role": "user", "content": prompt}]
                if isinstance(prompt, str)
                else prompt
            )
            answer = chat.response_tokens(tokenizer, response)
            start = chat.render_prompt(tokenizer, messages).tolist()
        except (ValueError, KeyError, TypeError, AttributeError) as why:
            shape = '{"prompt", "response", "feedback": [[seconds, value], …]}'
            raise DataError(f"{place}: expected {shape} ({why})") from None
        if not len(given) or not np.all(np.isfinite(given)):
            raise DataError(
                f"{place}: 'feedback' must hold at least one pair of finite numbers"
            )
        found.append((start, answer, given))
    if not found:
        raise DataError(f"tamer: {path} holds no feedback")
    most = max(len(given) for _, _, given in found)
    return [_arrays(tokenizer, *one, most, length) for one in found]


def _arrays(
    tokenizer: Tokenizer,
    prompt: list[int],
    answer: list[int],
    given: np.ndarray,
    most: int,
    length: int,
) -> Batch:
    """One answer's arrays. Where prompt and answer do not fit they are cut as those of rankings."""
    fitted = chat.shorten_prompt(
        tokenizer, prompt, examples.prompt_room(length, len(answer))
    )
    shown = answer[: length - len(fitted)]
    ids = [*fitted, *shown]
    (tokens,), (segments,) = pad_right([ids], length=length, pad_id=tokenizer.pad_id)
    padded = np.zeros((most, 2), np.float32)
    padded[: len(given)] = given
    return {
        "tokens": tokens,
        "segments": segments,
        "times": padded[:, 0],
        "values": padded[:, 1],
        "weight": (np.arange(most) < len(given)).astype(np.float32),
        "first": np.int32(len(fitted)),
        "count": np.int32(len(shown)),
        "cut": np.float32(len(ids) < len(prompt) + len(answer)),
    }


def passes(rows: list[Batch], size: int) -> list[Batch]:
    """One pass in order; the last batch is filled with rows whose feedback weighs nothing."""
    blank = rows[0] | {"weight": np.zeros_like(rows[0]["weight"])}
    some = rows + [blank] * (-len(rows) % size)
    return [_stack(some[i : i + size]) for i in range(0, len(some), size)]


def _stack(rows: list[Batch]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Shuffled:
    """Endless batches, every epoch in an order of its own; the position is the number of rows taken."""

    def __init__(self, rows: list[Batch], size: int, seed: int):
        self._rows, self._size, self._seed, self._taken = rows, size, seed, 0

    def __next__(self) -> Batch:
        n = len(self._rows)
        places = range(self._taken, self._taken + self._size)
        orders = {
            e: np.random.default_rng([self._seed, e]).permutation(n)
            for e in {place // n for place in places}
        }
        self._taken += self._size
        return _stack([self._rows[orders[place // n][place % n]] for place in places])

    def get_state(self) -> dict[str, int]:
        return {"taken": self._taken, "rows": len(self._rows), "seed": self._seed}

    def set_state(self, state: dict[str, int]) -> None:
        if (state["rows"], state["seed"]) != (len(self._rows), self._seed):
            raise ValueError(
                f"saved with {state['rows']} rows and seed {state['seed']}"
            )
        self._taken = state["taken"]
