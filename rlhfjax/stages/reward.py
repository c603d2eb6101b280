"""Reward learning from ranked answers: InstructGPT eq. 1, K forward passes for all K-choose-2 pairs of a prompt.

loss = -1/C(K, 2) sum_{w better than l} log sigmoid(r(x, y_w) - r(x, y_l)); one prompt's K answers are one element.
The trained model is shifted, and by option scaled, so that answers of the policy it will judge have mean 0 (std 1).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.algos.masked import masked_mean, masked_std
from rlhfjax.algos.normalise import centring_bias, gain_and_bias
from rlhfjax.algos.preference import kwise_loss
from rlhfjax.data import loader
from rlhfjax.data.preferences import read_preferences
from rlhfjax.data.sources import Concatenated, Source, open_source
from rlhfjax.errors import ConfigError
from rlhfjax.evals import stats
from rlhfjax.mesh import Layout
from rlhfjax.models import store
from rlhfjax.models.transformer import Model
from rlhfjax.optim import make_optimizer, make_schedule
from rlhfjax.rewards.model import sequence_rewards
from rlhfjax.stages import Finished, Pairs, Stage
from rlhfjax.stages.parts.common import ModelTrainConfig, assemble, begin, check_training
from rlhfjax.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ModelTrainConfig):
    stage: str = "reward"
    preferences: tuple[str, ...] = ()  # folders that `collect` wrote, or jsonl: globs
    length: int  # prompt and response, tokens
    batch_size: int  # prompts; InstructGPT: 64 (C.2)
    normalise: Literal["none", "mean", "mean_std"] = "mean"


check = check_training


def build(config: Config, layout: Layout) -> Stage:
    start = begin(config, layout, head="scalar")
    check(config, layout, start.model.config)
    options = {"batch_size": config.batch_size, "length": config.length}
    train, held_out = (open_preferences(config.preferences, split) for split in ("train", "validation"))
    batches = loader.preference_batches(train, start.tokenizer, seed=config.seed, train=True, **options)
    judged = _Judged(start.model, loader.preference_batches(held_out, start.tokenizer, train=False, **options), layout)

    def finish(state: TrainState) -> Finished:
        answers = judged(state.params)
        params, pairs = normalise(state.params, answers, config.normalise)
        margins = stats.margins(answers["rewards"], answers["scores"], answers["valid"])
        model = store.SavedModel(start.model, params, start.tokenizer_file)
        return Finished({store.FOLDER: model}, pairs, {"calibration.json": stats.calibration(margins).as_dict()})

    return assemble(
        config,
        start,
        loss=reward_loss(start.model),
        tx=make_optimizer(config.optim, config.steps),
        schedule=make_schedule(config.optim, config.steps),
        batches=batches,
        evals=lambda state: held_out_metrics(judged(state.params)),
        finish=finish,
        units=config.batch_size,
        unit="prompts",
    )


def open_preferences(names: tuple[str, ...], split: str) -> Source:
    """Rankings of all folders and `jsonl:` globs, as one source.

    Raises:
      ConfigError: none is named.
    """
    if not names:
        raise ConfigError("reward.preferences: at least one folder or jsonl: glob is needed")
    parts = [
        open_source(name, kind="preferences", split=split) if ":" in name else read_preferences(name, split)
        for name in names
    ]
    return parts[0] if len(parts) == 1 else Concatenated(parts)


def completion_rewards(model: Model, params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> jax.Array:
    """Rewards [b, k] of every completion, one forward pass each."""
    b, k, t = batch["tokens"].shape
    rows = (batch["tokens"].reshape(b * k, t), batch["segments"].reshape(b * k, t))
    return sequence_rewards(model, params, *rows, key).reshape(b, k)


def reward_loss(model: Model) -> Callable[..., tuple[jax.Array, Pairs]]:
    def loss(params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> tuple[jax.Array, Pairs]:
        key = key if model.config.dropout else None
        return kwise_loss(completion_rewards(model, params, batch, key), batch["scores"], batch["valid"])

    return loss


class _Judged:
    """The held-out completions with their labels, and the rewards that some parameters give them."""

    def __init__(self, model: Model, batches: loader.Batches, layout: Layout):
        self._batches, self._layout = batches, layout
        self._rewards = jax.jit(lambda params, batch: completion_rewards(model, params, batch, None))

    def __call__(self, params: Any) -> dict[str, np.ndarray]:
        parts = []
        for batch in self._batches.restart():
            rewards = jax.device_get(self._rewards(params, self._layout.put(batch)))
            parts.append({"rewards": rewards} | {k: batch[k] for k in ("scores", "valid", "lengths")})
        return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def held_out_metrics(judged: dict[str, np.ndarray]) -> Pairs:
    """val_loss, val_accuracy, the accuracy of judging by length alone, and the expected calibration error."""
    rewards, labels, valid = judged["rewards"], judged["scores"], judged["valid"]
    _, pairs = kwise_loss(jnp.asarray(rewards), jnp.asarray(labels), jnp.asarray(valid))
    margins = stats.margins(rewards, labels, valid)
    return {
        "val_loss": pairs["loss"],
        "val_accuracy": stats.pairwise_accuracy(rewards, labels, valid),
        "val_length_accuracy": (stats.length_baseline(judged["lengths"], labels, valid), 1.0),
        "val_calibration_error": (stats.calibration(margins).ece, 1.0),
    }


def normalise(params: Any, judged: dict[str, np.ndarray], how: str) -> tuple[Any, Pairs]:
    """Folds gain and bias into the scalar head: r' = gain r + bias has mean 0 (and std 1) on the completions."""
    rewards, valid = (jnp.asarray(judged[name], jnp.float32).ravel() for name in ("rewards", "valid"))
    pairs = {"reference_mean": (masked_mean(rewards, valid), 1.0), "reference_std": (masked_std(rewards, valid), 1.0)}
    if how == "none":
        return params, pairs
    if how == "mean_std":
        gain, bias = gain_and_bias(rewards, valid, mean=0.0, std=1.0)
    else:
        gain, bias = 1.0, centring_bias(rewards, valid)
    head = {"kernel": params["head"]["kernel"] * gain, "bias": params["head"]["bias"] * gain + bias}
    return {**params, "head": head}, pairs
