"""Reward learning from ranked responses: InstructGPT eq. 1.

loss = -1/C(K, 2) sum_{w better than l} log sigmoid(r(x, y_w) - r(x, y_l))

The K responses to a prompt are one element of a batch: K forward passes give all K-choose-2 pairs.
See `rewards/losses.py` for other likelihoods. The trained model is shifted, and by option scaled,
so that responses of the policy that it will score have mean 0 (and std 1), or that demonstrations
score 0.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import hosts
from rlhfjax.data.batches import PreferenceBatch, concatenate, shapes
from rlhfjax.data.config import (
    Preferences,
    SourceConfig,
    open_preferences,
    open_sources,
    own_shards,
)
from rlhfjax.data.loader import BatchStream, preference_batches
from rlhfjax.errors import ConfigError
from rlhfjax.evals import stats
from rlhfjax.mesh import Layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.experts import add_balance
from rlhfjax.models.transformer import Model
from rlhfjax.ranges import Size, Tokens
from rlhfjax.rewards import center
from rlhfjax.rewards.losses import LossConfig, RewardLoss, make_loss
from rlhfjax.rewards.model import rewards_and_routing, sequence_rewards
from rlhfjax.roles import DISK, Models, Role, Sources, Workload
from rlhfjax.stage import Data, Finished, Stage
from rlhfjax.state import TrainState
from rlhfjax.supervised import (
    MODEL,
    LossFunction,
    StreamConfig,
    finished_model,
    load_trained,
    supervised_stage,
    supervised_workload,
    train_step,
    trained_role,
    truncation_metrics,
    validate_streams,
)
from rlhfjax.types import Loss, Metrics, PyTree
from rlhfjax.workdirs import CALIBRATION


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    """The options of reward learning."""

    stage: str = "reward"
    """Name of the stage."""
    preferences: Preferences = ()
    """Folders that `collect` wrote, specs, or sources with options."""
    length: Tokens
    """Tokens of prompt and response; the prompt keeps at most half of them where both are long."""
    batch_size: Size
    """Prompts per update; InstructGPT: 64 (appendix C.2)."""
    loss: LossConfig = LossConfig()
    """Likelihood of the labels."""
    normalize_before: Literal["none", "mean", "mean_std"] = "none"
    """Normalization before training, on held-out responses; N implementation details: mean_std."""
    normalize: Literal["none", "mean", "mean_std", "demonstrations"] = "mean"
    """Normalization after training, on held-out responses or on demonstrations."""
    demonstrations: tuple[SourceConfig, ...] = ()
    """Conversations whose last responses score 0 on average, for normalize="demonstrations"."""


def roles(config: Config) -> dict[str, Role]:
    return {MODEL: trained_role(config, head="scalar")}


def workload(config: Config, completions: int = 2) -> Workload:
    return supervised_workload(config, completions)


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    validate_streams(config, layout, model_config)
    if (config.normalize == "demonstrations") != bool(config.demonstrations):
        raise ConfigError(
            "reward.demonstrations: sources go together with "
            'reward.normalize="demonstrations"'
        )
    if config.loss.centering and config.loss.name == "best_of_k":
        raise ConfigError(
            f"reward.loss.centering={config.loss.centering}: must be 0 with best_of_k, "
            "a choice of one response, which has no pairs"
        )


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    models = Models(config.stage, roles(config), layout, sources)
    loaded, tokenizer = load_trained(config, models)
    model = loaded.model
    validate(config, layout, model.config)
    loss = make_loss(config.loss)
    trains_bias = bool(config.loss.centering)
    step, tx = train_step(config, loaded, reward_loss(model, loss, trains_bias))
    score_with = make_scorer(model, layout)
    batches = functools.partial(
        preference_batches,
        tokenizer=tokenizer,
        batch_size=config.batch_size,
        length=config.length,
    )

    def score(trained: PyTree, batches: Iterable[PreferenceBatch]) -> Scored:
        return score_with(loaded.merged(trained), batches)

    @functools.cache
    def open_held_out() -> BatchStream:
        source = open_preferences(config.preferences, "validation")
        return batches(source, train=False)

    def score_held_out(trained: PyTree) -> Scored:
        return score(trained, open_held_out().restart())

    def start(state: TrainState) -> TrainState:
        params = loaded.start(state.params)
        if config.normalize_before != "none":
            scored = score_held_out(params)
            params, _ = center.normalize(
                params, scored.rewards, scored.batch.valid, config.normalize_before
            )
        return state.replace(params=params)

    @functools.cache
    def open_demonstrations() -> list[PreferenceBatch]:
        source = open_sources(config.demonstrations, "reward.demonstrations")
        return center.demonstrations(
            source, tokenizer, batch_size=config.batch_size, length=config.length
        )

    def open_data() -> Data:
        source = open_preferences(config.preferences, "train")
        shards = own_shards(config.data_shards, config.batch_size, layout)
        train = batches(source, seed=config.seed, shards=shards)
        open_held_out()
        if config.demonstrations:  # so that a bad row is found before training
            open_demonstrations()

        def evals(state: TrainState) -> Metrics:
            return held_out_metrics(score_held_out(state.params), loss)

        def finish(state: TrainState) -> Finished:
            scored = score_held_out(state.params)
            params, metrics = _normalize(
                config, open_demonstrations, state.params, scored, score
            )
            calibration = stats.calibration(_margins(scored)).as_dict()
            return finished_model(loaded, params)._replace(
                metrics=metrics, files={CALIBRATION: calibration}
            )

        return Data(train, evals, finish)

    def batch_shapes(completions: int) -> PreferenceBatch:
        size, length = config.batch_size, config.length
        return shapes(PreferenceBatch, b=size, k=completions, t=length)

    return supervised_stage(
        loaded,
        tx,
        start=start,
        step=step,
        batch=batch_shapes,
        open=open_data,
        units=config.batch_size,
        unit="prompts",
    )


def reward_loss(
    model: Model, loss: RewardLoss, trains_bias: bool = False
) -> LossFunction:
    """Returns a loss of rewards as a function (params, batch, key) -> (loss, metrics).

    All losses of comparisons depend on differences of rewards, so that the gradient of the head's
    bias is 0. It is stopped, because Adam would scale its rounding errors up to whole steps. Only
    normalization sets the bias.

    Args:
      trains_bias: the loss depends on the bias too, as `centering` does.
    """

    def of_batch(params: PyTree, batch: PreferenceBatch, key: jax.Array | None) -> Loss:
        key = key if model.drops else None
        head = params["head"]
        if not trains_bias:
            head = {**head, "bias": jax.lax.stop_gradient(head["bias"])}
        rewards, routing = rewards_and_routing(
            model, {**params, "head": head}, *_rows(batch), key
        )
        rewards = rewards.reshape(batch.scores.shape)
        scalar, metrics = loss(rewards, batch.scores, batch.valid, batch.same)
        metrics = {**metrics, **truncation_metrics(batch)}
        return add_balance(model.config, (scalar, metrics), routing)

    return of_batch


def completion_rewards(
    model: Model, params: PyTree, batch: PreferenceBatch
) -> jax.Array:
    """Returns the rewards [b, k] of all completions, by one forward pass per completion."""
    return sequence_rewards(model, params, *_rows(batch)).reshape(batch.scores.shape)


def _rows(batch: PreferenceBatch) -> tuple[jax.Array, jax.Array]:
    """Returns tokens and attention mask of all completions, [b k, t]."""
    length = batch.tokens.shape[-1]
    tokens, attention_mask = batch.tokens, batch.attention_mask
    return tokens.reshape(-1, length), attention_mask.reshape(-1, length)


class Scored(NamedTuple):
    """Completions with their rewards, on the host."""

    rewards: np.ndarray  # float32 [n, k]
    batch: PreferenceBatch  # all n prompts, without tokens and attention_mask


def make_scorer(
    model: Model, layout: Layout
) -> Callable[[PyTree, Iterable[PreferenceBatch]], Scored]:
    """Returns a function (params, batches) -> the rewards of all their completions."""
    rewards_of = jax.jit(lambda params, batch: completion_rewards(model, params, batch))

    def score(params: PyTree, batches: Iterable[PreferenceBatch]) -> Scored:
        parts = []
        for batch in batches:
            rewards = hosts.whole(rewards_of(params, layout.put(batch)))
            labels = dataclasses.replace(batch, tokens=None, attention_mask=None)
            parts.append(Scored(rewards, labels))
        return concatenate(parts)

    return score


def _margins(scored: Scored) -> np.ndarray:
    batch = scored.batch
    return stats.margins(scored.rewards, batch.scores, batch.valid, batch.same)


def held_out_metrics(scored: Scored, loss: RewardLoss) -> Metrics:
    """Returns the metrics of held-out completions.

    They are val_loss, val_accuracy, the accuracy of preferring the longer response, the expected
    calibration error, `truncation_metrics` and, if the loss has it, val_centering.
    """
    batch = scored.batch
    labels = (batch.scores, batch.valid, batch.same)
    _, metrics = loss(*map(jnp.asarray, (scored.rewards, *labels)))
    calibration_error = stats.calibration(_margins(scored)).ece
    others = truncation_metrics(batch)
    if "centering" in metrics:
        others["centering"] = metrics["centering"]
    return {
        "val_loss": metrics["loss"],
        "val_accuracy": stats.pairwise_accuracy(scored.rewards, *labels),
        "val_length_accuracy": (stats.length_baseline(batch.lengths, *labels), 1.0),
        "val_calibration_error": (calibration_error, 1.0),
        **{f"val_{name}": metric for name, metric in others.items()},
    }


def _normalize(
    config: Config,
    demonstrations: Callable[[], list[PreferenceBatch]],
    params: PyTree,
    scored: Scored,
    score: Callable[[PyTree, Iterable[PreferenceBatch]], Scored],
) -> tuple[PyTree, Metrics]:
    """Returns the normalized parameters, and the moments of the rewards before."""
    rewards, valid = scored.rewards, scored.batch.valid
    if config.normalize != "demonstrations":
        return center.normalize(params, rewards, valid, config.normalize)
    _, metrics = center.normalize(params, rewards, valid, "none")
    shown = score(params, demonstrations())
    params, moments = center.normalize(params, shown.rewards, shown.batch.valid, "mean")
    cut = truncation_metrics(shown.batch)["rows_cut"]
    metrics["demonstration_mean"] = moments["reference_mean"]
    metrics["demonstrations_cut"] = cut
    return params, metrics
