"""Reward learning from ranked answers: InstructGPT eq. 1, K forward passes for all K-choose-2 pairs of a prompt.

loss = -1/C(K, 2) sum_{w better than l} log sigmoid(r(x, y_w) - r(x, y_l)); one prompt's K answers are one element.
Other likelihoods by name: see `rewards/losses.py`. The trained model is shifted, and by option scaled, so that answers
of the policy it will judge have mean 0 (std 1), or so that demonstrations score 0.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import hosts
from rlhfjax.data import loader
from rlhfjax.errors import ConfigError
from rlhfjax.evals import stats
from rlhfjax.interop import store
from rlhfjax.mesh import Layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.optim import make_optimizer, make_schedule
from rlhfjax.rewards.losses import LossConfig, RewardLoss, make_loss
from rlhfjax.rewards.model import sequence_rewards
from rlhfjax.stages import Finished, Pairs, Stage
from rlhfjax.stages.parts import centre
from rlhfjax.stages.parts.common import (
    SourceConfig,
    Start,
    StreamConfig,
    adapters_of,
    assemble,
    begin,
    check_streams,
    open_sources,
    own_shards,
)
from rlhfjax.stages.parts.preferences import open_preferences, truncation_metrics
from rlhfjax.state import TrainState

LABELS = (
    "scores",
    "valid",
    "same",
)  # what of a batch says how its completions compare, as the losses take them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    stage: str = "reward"
    preferences: tuple[str, ...] = ()  # folders that `collect` wrote, or jsonl: globs
    length: int  # prompt and response, tokens; a prompt keeps up to half of it
    batch_size: int  # prompts; InstructGPT: 64 (C.2)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    normalise_before: Literal["none", "mean", "mean_std"] = "none"  # N-details: mean_std before training as well
    normalise: Literal["none", "mean", "mean_std", "demonstrations"] = "mean"
    demonstrations: tuple[SourceConfig, ...] = ()  # whose answers score 0, for normalise="demonstrations"


def check(config: Config, layout: Layout, shape: TransformerConfig | None) -> None:
    """Refuses what cannot be meant, before anything is computed."""
    check_streams(config, layout, shape)
    if (config.normalise == "demonstrations") != bool(config.demonstrations):
        raise ConfigError('reward.demonstrations: sources go together with reward.normalise="demonstrations"')


def build(config: Config, layout: Layout) -> Stage:
    start = begin(config, layout, head="scalar")
    check(config, layout, start.model.config)
    options = {"batch_size": config.batch_size, "length": config.length}
    train, held_out = (open_preferences(config.preferences, split) for split in ("train", "validation"))
    own = own_shards(config.data_shards, config.batch_size, layout)
    batches = loader.preference_batches(train, start.tokenizer, seed=config.seed, shards=own, **options)
    held_out_batches = loader.preference_batches(held_out, start.tokenizer, train=False, **options)
    rewards_of = make_judge(start.model, layout)
    loss = make_loss(config.loss)

    def judge(trained: Any, batches: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return rewards_of(start.whole(trained), batches)

    def finish(state: TrainState) -> Finished:
        answers = judge(state.params, held_out_batches.restart())
        params, pairs = _normalised(config, start, state.params, answers, judge)
        margins = stats.margins(answers["rewards"], *(answers[name] for name in LABELS))
        files = {"calibration.json": stats.calibration(margins).as_dict()}
        return Finished({store.FOLDER: start.saved(params)}, pairs, files, adapters_of(start.model, params))

    stage = assemble(
        config,
        start,
        loss=reward_loss(start.model, loss),
        tx=make_optimizer(config.optim, config.steps),
        schedule=make_schedule(config.optim, config.steps),
        batches=batches,
        evals=lambda state: held_out_metrics(judge(state.params, held_out_batches.restart()), loss),
        finish=finish,
        units=config.batch_size,
        unit="prompts",
    )
    if config.normalise_before == "none":
        return stage

    def scaled(state: TrainState) -> TrainState:
        state = stage.start(state)
        answers = judge(state.params, held_out_batches.restart())
        return state.replace(params=centre.normalise(state.params, answers, config.normalise_before)[0])

    return dataclasses.replace(stage, start=scaled)


def _normalised(
    config: Config, start: Start, params: Any, answers: dict[str, np.ndarray], judge: Callable[..., Any]
) -> tuple[Any, Pairs]:
    if config.normalise != "demonstrations":
        return centre.normalise(params, answers, config.normalise)
    source = open_sources(config.demonstrations, "reward.demonstrations")
    options = {"batch_size": config.batch_size, "length": config.length}
    shown = judge(params, centre.demonstrations(source, start.tokenizer, **options))
    params, pairs = centre.normalise(params, shown, "mean")
    _, reference = centre.normalise(params, answers, "none")
    cut = truncation_metrics(shown)["rows_cut"]
    return params, {
        **reference,
        "demonstration_mean": pairs["reference_mean"],
        "demonstrations_cut": cut,
    }


def completion_rewards(model: Model, params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
    """Rewards [b, k] of every completion, one forward pass each."""
    b, k, t = batch["tokens"].shape
    rows = (batch["tokens"].reshape(b * k, t), batch["segments"].reshape(b * k, t))
    return sequence_rewards(model, params, *rows, key).reshape(b, k)


def reward_loss(model: Model, loss: RewardLoss) -> Callable[..., tuple[jax.Array, Pairs]]:
    """Every such loss is one of differences of rewards: the head's bias has gradient 0, exactly 0 and not rounding's
    (which Adam would scale up to whole steps). Normalisation alone sets it."""

    def of_batch(params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> tuple[jax.Array, Pairs]:
        key = key if model.drops else None
        head = params["head"]
        params = {**params, "head": {**head, "bias": jax.lax.stop_gradient(head["bias"])}}
        rewards = completion_rewards(model, params, batch, key)
        scalar, pairs = loss(rewards, *(batch[name] for name in LABELS))
        return scalar, {**pairs, **truncation_metrics(batch)}

    return of_batch


def make_judge(model: Model, layout: Layout) -> Callable[..., dict[str, np.ndarray]]:
    """(params, batches of completions) -> their rewards, beside what the batches say of them."""
    rewards_of = jax.jit(lambda params, batch: completion_rewards(model, params, batch, None))

    def judge(params: Any, batches: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        parts = []
        for batch in batches:
            rewards = hosts.whole(rewards_of(params, layout.put(batch)))
            parts.append({"rewards": rewards} | {k: batch[k] for k in (*LABELS, "lengths", "cut")})
        return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}

    return judge


def held_out_metrics(judged: dict[str, np.ndarray], loss: RewardLoss) -> Pairs:
    """val_loss, val_accuracy, the accuracy of judging by length alone, the expected calibration
    error, and what cutting did (see `truncation_metrics`)."""
    labels = [judged[name] for name in LABELS]
    _, pairs = loss(*(jnp.asarray(x) for x in (judged["rewards"], *labels)))
    margins = stats.margins(judged["rewards"], *labels)
    return {
        "val_loss": pairs["loss"],
        "val_accuracy": stats.pairwise_accuracy(judged["rewards"], *labels),
        "val_length_accuracy": (stats.length_baseline(judged["lengths"], *labels), 1.0),
        "val_calibration_error": (stats.calibration(margins).ece, 1.0),
    } | {f"val_{name}": pair for name, pair in truncation_metrics(judged).items()}
