"""Reward learning from ranked answers: InstructGPT eq. 1, K forward passes for all K-choose-2 pairs of a prompt.

loss = -1/C(K, 2) sum_{w better than l} log sigmoid(r(x, y_w) - r(x, y_l)); one prompt's K answers are one element.
Other likelihoods by name: see `rewards/losses.py`. The trained model is shifted, and by option scaled, so that answers
of the policy it will judge have mean 0 (std 1), or so that demonstrations score 0.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import hosts
from rlhfjax.data import loader
from rlhfjax.data.config import SourceConfig, open_preferences, open_sources, own_shards
from rlhfjax.errors import ConfigError
from rlhfjax.evals import stats
from rlhfjax.mesh import Layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.ranges import Size, Tokens
from rlhfjax.rewards import center
from rlhfjax.rewards.losses import LossConfig, RewardLoss, make_loss
from rlhfjax.rewards.model import sequence_rewards
from rlhfjax.roles import DISK, Loaded, Models, Role, Sources, Workload
from rlhfjax.stage import Data, Finished, Shapes, Stage, row_shapes
from rlhfjax.state import TrainState
from rlhfjax.supervised import (
    MODEL,
    StreamConfig,
    left_behind,
    load_trained,
    supervised_stage,
    supervised_workload,
    train_step,
    trained_role,
    truncation_metrics,
    validate_streams,
)
from rlhfjax.types import Metrics

Batch = dict[str, Any]
LABELS = (
    "scores",
    "valid",
    "same",
)  # what of a batch says how its completions compare, as the losses take them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    stage: str = "reward"
    preferences: tuple[str, ...] = ()  # folders that `collect` wrote, or jsonl: globs
    length: Tokens  # prompt and response, tokens; a prompt keeps up to half of it
    batch_size: Size  # prompts; InstructGPT: 64 (C.2)
    loss: LossConfig = LossConfig()
    normalize_before: Literal["none", "mean", "mean_std"] = (
        "none"  # N-details: mean_std before training as well
    )
    normalize: Literal["none", "mean", "mean_std", "demonstrations"] = "mean"
    demonstrations: tuple[
        SourceConfig, ...
    ] = ()  # whose answers score 0, for normalize="demonstrations"


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
            'reward.demonstrations: sources go together with reward.normalize="demonstrations"'
        )


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    loaded = load_trained(config, Models(config.stage, roles(config), layout, sources))
    model, tokenizer = loaded.model, loaded.tokenizer
    validate(config, layout, model.config)
    of_completions = make_loss(config.loss)
    loss = reward_loss(model, of_completions)
    step, tx = train_step(config, loaded, loss)
    rewards_of = make_judge(model, layout)

    def judge(
        trained: Any, batches: Iterable[dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        return rewards_of(loaded.merged(trained), batches)

    @functools.cache
    def held_out() -> Any:
        source = open_preferences(config.preferences, "validation")
        options = {"batch_size": config.batch_size, "length": config.length}
        return loader.preference_batches(source, tokenizer, train=False, **options)

    def start(state: TrainState) -> TrainState:
        state = state.replace(params=loaded.start(state.params))
        if config.normalize_before == "none":
            return state
        judged = judge(state.params, held_out().restart())
        return state.replace(
            params=center.normalize(state.params, judged, config.normalize_before)[0]
        )

    def open_data() -> Data:
        options = {"batch_size": config.batch_size, "length": config.length}
        source = open_preferences(config.preferences, "train")
        own = own_shards(config.data_shards, config.batch_size, layout)
        batches = loader.preference_batches(
            source, tokenizer, seed=config.seed, shards=own, **options
        )
        passes = held_out()

        def evals(state: TrainState) -> Metrics:
            return held_out_metrics(
                judge(state.params, passes.restart()), of_completions
            )

        def finish(state: TrainState) -> Finished:
            judged = judge(state.params, passes.restart())
            params, metrics = _normalized(config, loaded, state.params, judged, judge)
            margins = stats.margins(
                judged["rewards"], *(judged[name] for name in LABELS)
            )
            files = {"calibration.json": stats.calibration(margins).as_dict()}
            return left_behind(loaded, params)._replace(metrics=metrics, files=files)

        return Data(batches, evals, finish)

    return supervised_stage(
        loaded,
        tx,
        start=start,
        step=step,
        batch=lambda completions: preference_shapes(
            config.batch_size, completions, config.length
        ),
        open=open_data,
        units=config.batch_size,
        unit="prompts",
    )


def preference_shapes(size: int, completions: int, length: int) -> Shapes:
    """Returns the shapes of a batch of `loader.preference_batches`."""
    each, row = (completions,), (completions, length)
    return row_shapes(
        size,
        tokens=(row, np.int32),
        segments=(row, np.int32),
        scores=(each, np.float32),
        valid=(each, np.float32),
        cut=(each, np.float32),
        lengths=(each, np.int32),
        same=(each, np.int32),
        index=((), np.int32),
    )


def _normalized(
    config: Config,
    loaded: Loaded,
    params: Any,
    judged: dict[str, np.ndarray],
    judge: Callable[..., Any],
) -> tuple[Any, Metrics]:
    if config.normalize != "demonstrations":
        return center.normalize(params, judged, config.normalize)
    source = open_sources(config.demonstrations, "reward.demonstrations")
    options = {"batch_size": config.batch_size, "length": config.length}
    shown = judge(params, center.demonstrations(source, loaded.tokenizer, **options))
    params, metrics = center.normalize(params, shown, "mean")
    _, reference = center.normalize(params, judged, "none")
    cut = truncation_metrics(shown)["rows_cut"]
    return params, {
        **reference,
        "demonstration_mean": metrics["reference_mean"],
        "demonstrations_cut": cut,
    }


def completion_rewards(
    model: Model, params: Any, batch: dict[str, jax.Array], key: jax.Array | None
) -> jax.Array:
    """Rewards [b, k] of every completion, one forward pass each."""
    b, k, t = batch["tokens"].shape
    rows = (batch["tokens"].reshape(b * k, t), batch["segments"].reshape(b * k, t))
    return sequence_rewards(model, params, *rows, key).reshape(b, k)


def reward_loss(
    model: Model, loss: RewardLoss
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Every such loss is one of differences of rewards: the head's bias has gradient 0, exactly 0 and not rounding's
    (which Adam would scale up to whole steps). Normalization alone sets it."""

    def of_batch(
        params: Any, batch: dict[str, jax.Array], key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        key = key if model.drops else None
        head = params["head"]
        params = {
            **params,
            "head": {**head, "bias": jax.lax.stop_gradient(head["bias"])},
        }
        rewards = completion_rewards(model, params, batch, key)
        scalar, pairs = loss(rewards, *(batch[name] for name in LABELS))
        return scalar, {**pairs, **truncation_metrics(batch)}

    return of_batch


def make_judge(model: Model, layout: Layout) -> Callable[..., dict[str, np.ndarray]]:
    """(params, batches of completions) -> their rewards, beside what the batches say of them."""
    rewards_of = jax.jit(
        lambda params, batch: completion_rewards(model, params, batch, None)
    )

    def judge(
        params: Any, batches: Iterable[dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        parts = []
        for batch in batches:
            rewards = hosts.whole(rewards_of(params, layout.put(batch)))
            parts.append(
                {"rewards": rewards}
                | {k: batch[k] for k in (*LABELS, "lengths", "cut")}
            )
        return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}

    return judge


def held_out_metrics(judged: dict[str, np.ndarray], loss: RewardLoss) -> Metrics:
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
