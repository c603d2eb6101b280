"""TAMER: a reward per token, learned by regression on a person's delayed scalar feedback.

min_H mean_f (h_f - sum_t c_{f,t} H(s_t, a_t))^2

where h_f is a piece of feedback, given while the response appears on the screen, and c_{f,t} the
probability that it is about token t. A feedback file holds JSON lines:

    {"prompt": text or messages, "response": text, "feedback": [[seconds, value], ...]}

Token t of the response is on the screen from t to t + 1 times `seconds_per_token`; a row may have a
column of that name, which must be the same, as the stage `label` writes it. The result is a
reward by name: H summed over a response, which `compose` adds to another reward (the reward
addition of TAMER+RL).

Source: Knox & Stone 2009 (regression with credit); Warnell et al. 2018 (deep: every credited token
is worth the signal).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import json_text, paths
from rlhfjax.algos import tamer
from rlhfjax.algos.masked import divide
from rlhfjax.data import chat, examples
from rlhfjax.data.batches import TamerBatch, in_batches, shapes, stack
from rlhfjax.data.padding import pad_right
from rlhfjax.data.rows import BadRow, normalize
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.jsonl import located_rows
from rlhfjax.mesh import Layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.experts import add_balance
from rlhfjax.models.transformer import Model
from rlhfjax.ranges import NonNegative, Positive, Seconds, Tokens
from rlhfjax.rewards.dense import token_rewards_and_routing
from rlhfjax.roles import DISK, REWARD, Models, Role, Sources, Workload
from rlhfjax.stage import Data, Finished, Stage
from rlhfjax.state import TrainState
from rlhfjax.supervised import (
    MODEL,
    LossFunction,
    ModelTrainConfig,
    finished_model,
    load_trained,
    sum_metrics,
    supervised_stage,
    supervised_workload,
    train_step,
    trained_role,
    validate_training,
)
from rlhfjax.types import Loss, Metrics, PyTree

MOST = float(np.finfo(np.float32).max)
"""The largest number of a feedback file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ModelTrainConfig):
    """The options of TAMER."""

    stage: str = "tamer"
    """Name of the stage."""
    feedback: str
    """File of JSON lines with feedback to train on."""
    held_out: str
    """File of JSON lines with held-out feedback."""
    length: Tokens
    """Tokens of prompt and response; the prompt keeps at most half of them where both are long."""
    loss: Literal["tamer", "deep_tamer"] = "tamer"
    """Whether the credited tokens explain a piece of feedback together, or each by itself."""
    seconds_per_token: Seconds = 0.25
    """Seconds between two tokens of the response on the screen."""
    credit: Literal["uniform", "gamma"] = "uniform"
    """Distribution of a person's delay."""
    delay: tuple[NonNegative, NonNegative] = (0.2, 0.8)
    """Lowest and highest delay in seconds, of credit="uniform"; Knox & Stone 2009."""
    gamma: tuple[Positive, Positive] = (2.0, 0.28)
    """Shape, and scale in seconds, of the delay of credit="gamma"; Knox & Stone 2009."""


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
    """Returns the content of reward.json: the model beside it rewards every token."""
    return {"kind": "dense"}


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    models = Models(config.stage, roles(config), layout, sources)
    loaded, tokenizer = load_trained(config, models)
    model = loaded.model
    validate(config, layout, model.config)
    loss = feedback_loss(model, config)
    step, tx = train_step(config, loaded, feedback_loss(model, config, balanced=True))

    @jax.jit
    def measure(params: PyTree, batch: TamerBatch) -> Metrics:
        _, metrics = loss(params, batch, None)
        return {f"val_{name}": metric for name, metric in metrics.items()}

    def open_data() -> Data:
        read = functools.partial(
            read_feedback,
            tokenizer=tokenizer,
            length=config.length,
            pace=config.seconds_per_token,
        )
        rows, held_out = read(config.feedback), read(config.held_out)
        no_weight = np.zeros_like(held_out[0].weight)
        filler = dataclasses.replace(held_out[0], weight=no_weight)

        def evals(state: TrainState) -> Metrics:
            params = loaded.merged(state.params)
            batches = in_batches(held_out, config.batch_size, filler)
            return sum_metrics(batches, functools.partial(measure, params), layout)

        def finish(state: TrainState) -> Finished:
            finished = finished_model(loaded, state.params)
            return finished._replace(files={REWARD: describe(config)})

        return Data(Shuffled(rows, config.batch_size, config.seed), evals, finish)

    def batch_shapes(feedback: int) -> TamerBatch:
        size, length = config.batch_size, config.length
        return shapes(TamerBatch, b=size, f=feedback, t=length)

    return supervised_stage(
        loaded,
        tx,
        step=step,
        batch=batch_shapes,
        open=open_data,
        units=config.batch_size,
        unit="answers",
    )


def feedback_loss(model: Model, config: Config, balanced: bool = False) -> LossFunction:
    """Returns the regression loss, the mean over all pieces of feedback of a batch.

    The loss is a function (params, batch, key) -> (loss, metrics).

    Args:
      balanced: add the balancing loss of a mixture of experts, and metrics of its routing.
    """
    losses = {"tamer": tamer.tamer_loss, "deep_tamer": tamer.deep_tamer_loss}
    response_loss = losses[config.loss]
    credit_of = make_credit(config)

    def response_metrics(
        rewards: jax.Array,
        start: jax.Array,
        length: jax.Array,
        times: jax.Array,
        values: jax.Array,
        weight: jax.Array,
    ) -> Metrics:
        positions = jnp.arange(rewards.shape[0])
        token = (positions - start).astype(jnp.float32)
        shown = (positions >= start) & (positions < start + length)
        starts = config.seconds_per_token * token
        credit = credit_of(starts, starts + config.seconds_per_token, times)
        rewards = jnp.where(shown, rewards, 0)
        _, metrics = response_loss(rewards, credit * shown, values, weight)
        return metrics

    def loss(params: PyTree, batch: TamerBatch, key: jax.Array | None) -> Loss:
        rewards, routing = token_rewards_and_routing(
            model, params, batch.tokens, batch.attention_mask
        )
        by_response = jax.vmap(response_metrics)(
            rewards,
            batch.response_start,
            batch.response_length,
            batch.times,
            batch.values,
            batch.weight,
        )
        sums = {
            name: (jnp.sum(total), jnp.sum(weight))
            for name, (total, weight) in by_response.items()
        }
        real = (batch.weight.sum(1) > 0).astype(jnp.float32)
        rows_cut = (jnp.sum(batch.cut * real), jnp.sum(real))
        metrics = {**sums, "rows_cut": rows_cut}
        mean = divide(*sums["loss"])
        routing = routing if balanced else None
        return add_balance(model.config, (mean, metrics), routing)

    return loss


def make_credit(
    config: Config,
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Returns a function (starts [t], ends [t], times [f]) -> the credit [f, t] of every token.

    All times are in seconds.
    """
    if config.credit == "gamma":
        shape, scale = config.gamma
        return functools.partial(tamer.gamma_credit, shape=shape, scale=scale)
    low, high = config.delay
    return functools.partial(tamer.uniform_credit, low=low, high=high)


# ------------------------------------------------------------------ data


def read_feedback(
    path: str, tokenizer: Tokenizer, length: int, pace: float | None = None
) -> list[TamerBatch]:
    """Returns the responses of a file with their feedback, as rows of a TamerBatch.

    Prompts and responses that are longer than `length` together are truncated as those of rankings,
    see `examples.prompt_room`.

    Args:
      pace: seconds per token; None: that of a row is not looked at.

    Raises:
      DataError: the file cannot be read, a line is malformed, or its response was shown at another
        pace.
    """
    parsed = []
    for context, line in located_rows(paths.path(path)):
        shown = line.get("seconds_per_token", pace)
        if pace is not None and shown != pace:
            raise DataError(
                f"{context}: seconds_per_token is {json_text.shown(shown)};"
                f" expected tamer.seconds_per_token={pace}"
            )
        parsed.append(_read_line(context, line, tokenizer))
    if not parsed:
        raise DataError(f"tamer: {path} holds no feedback")
    most = max(len(feedback) for _, _, feedback in parsed)
    return [
        _to_row(tokenizer, prompt, response, feedback, most, length)
        for prompt, response, feedback in parsed
    ]


def _read_line(
    context: str, line: dict[str, Any], tokenizer: Tokenizer
) -> tuple[list[int], list[int], np.ndarray]:
    """Returns the ids of prompt and response, and the feedback, float32 [f, 2]."""
    try:
        feedback = _feedback(line.get("feedback"))
        prompt, text = line.get("prompt"), line.get("response")
        if not isinstance(text, str):
            raise BadRow("'response' must be text")
        is_text = isinstance(prompt, str) and prompt.strip()
        messages: Any = [{"role": "user", "content": prompt}] if is_text else prompt
        normalize("prompt", {"prompt": messages}, {})  # raises for malformed messages
        response = chat.response_tokens(tokenizer, text)
        ids = chat.render_prompt(tokenizer, messages).tolist()
    except BadRow as error:
        expected = '{"prompt", "response", "feedback": [[seconds, value], ...]}'
        raise DataError(f"{context}: expected {expected} ({error})") from None
    except DataError as error:  # the chat template does not take the messages
        raise DataError(f"{context}: {error}") from None
    return ids, response, feedback


def _feedback(pairs: Any) -> np.ndarray:
    """Returns feedback as float32 [f, 2]. Raises BadRow."""
    if not isinstance(pairs, list) or not pairs:
        raise BadRow("'feedback' must hold at least one pair of finite numbers")
    for pair in pairs:
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or any(type(number) not in (int, float) for number in pair):
            raise BadRow(
                "'feedback' must hold pairs of finite numbers,"
                f" got {json_text.shown(pair)}"
            )
        if any(abs(number) > MOST for number in pair):
            raise BadRow(
                "'feedback' must hold pairs of finite numbers in the range of float32,"
                f" got {json_text.shown(pair)}"
            )
        if pair[0] < 0:
            raise BadRow(f"'feedback' must have seconds ≥ 0, got {pair[0]}")
    return np.array(pairs, np.float32)


def _to_row(
    tokenizer: Tokenizer,
    prompt: list[int],
    response: list[int],
    feedback: np.ndarray,
    most: int,
    length: int,
) -> TamerBatch:
    """Returns a row with room for `most` pieces of feedback."""
    room = examples.prompt_room(length, len(response))
    kept_prompt = chat.shorten_prompt(tokenizer, prompt, room)
    kept_response = response[: length - len(kept_prompt)]
    ids = [*kept_prompt, *kept_response]
    (tokens,), (attention_mask,) = pad_right(
        [ids], length=length, pad_id=tokenizer.pad_id
    )
    padded = np.zeros((most, 2), np.float32)
    padded[: len(feedback)] = feedback
    return TamerBatch(
        tokens=tokens,
        attention_mask=attention_mask,
        times=padded[:, 0],
        values=padded[:, 1],
        weight=(np.arange(most) < len(feedback)).astype(np.float32),
        response_start=np.int32(len(kept_prompt)),
        response_length=np.int32(len(kept_response)),
        cut=np.float32(len(ids) < len(prompt) + len(response)),
    )


class Shuffled:
    """Endless batches, in a new order every epoch.

    The saved position is the number of rows taken.
    """

    def __init__(self, rows: list[TamerBatch], size: int, seed: int):
        self._rows = rows
        self._size = size
        self._seed = seed
        self._taken = 0

    def __next__(self) -> TamerBatch:
        n = len(self._rows)
        order = functools.cache(self._order)
        batch = []
        for i in range(self._taken, self._taken + self._size):
            batch.append(self._rows[order(i // n)[i % n]])
        self._taken += self._size
        return stack(batch)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))

    def get_state(self) -> dict[str, int]:
        return {"taken": self._taken, "rows": len(self._rows), "seed": self._seed}

    def set_state(self, state: dict[str, int]) -> None:
        if (state["rows"], state["seed"]) != (len(self._rows), self._seed):
            raise ValueError(
                f"saved with {state['rows']} rows and seed {state['seed']}"
            )
        self._taken = state["taken"]
