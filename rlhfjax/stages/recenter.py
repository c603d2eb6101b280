"""Recentering: a reward model with a new bias, so that some samples have mean reward 0.

r'(x, y) = r(x, y) - mean r over the samples; which of two responses is better does not change.

The samples are a policy's responses to prompts, completions of preference folders, or
demonstrations.
"""

import dataclasses

import jax
import numpy as np

from rlhfjax import hosts
from rlhfjax.data import loader
from rlhfjax.data.config import (
    Preferences,
    SourceConfig,
    open_preferences,
    open_sources,
)
from rlhfjax.data.counted import data_metrics
from rlhfjax.errors import ConfigError
from rlhfjax.evals import stats
from rlhfjax.interop import store
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer, finalize
from rlhfjax.models.config import TransformerConfig
from rlhfjax.paths import Path
from rlhfjax.ranges import Seed, Size, TokensOrNone
from rlhfjax.rewards import center
from rlhfjax.rewards.model import ModelReward
from rlhfjax.rewards.responses import validate_reward_model
from rlhfjax.rl.config import PromptConfig, sampling_workload, validate_sampling
from rlhfjax.rl.prompts import open_prompts
from rlhfjax.rl.responses import PromptBatching, sample_responses
from rlhfjax.roles import Role, Workload, job_workload
from rlhfjax.sampling.config import Sampling, SamplingConfig
from rlhfjax.stages.reward import make_scorer
from rlhfjax.supervised import validate_length

LEAVES_MODEL = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SamplingConfig):
    """The options of recentering; those of sampling are for `policy`."""

    stage: str = "recenter"
    init_from: str
    """Workdir of the reward model."""
    policy: str | None = None
    """Workdir of a policy whose responses to `prompts` are the samples."""
    preferences: Preferences = ()
    """Folders or sources of rankings whose completions (train split) are the samples."""
    demonstrations: tuple[SourceConfig, ...] = ()
    """Conversations whose last responses are the samples."""
    prompts: PromptConfig = PromptConfig()
    """Prompts for `policy`."""
    prompt_length: TokensOrNone = 0
    """Tokens that prompts are padded to, for `policy`."""
    max_new_tokens: TokensOrNone = 0
    """Tokens of the longest response of `policy`."""
    length: TokensOrNone = 0
    """Tokens of prompt and response, for `preferences` and `demonstrations`."""
    batch_size: Size
    """Samples per batch."""
    seed: Seed = 0
    """Seed of prompts and responses."""
    mesh: MeshConfig = MeshConfig()
    """Mesh of devices."""


def roles(config: Config) -> dict[str, Role]:
    policy = {"policy": Role(config.policy)} if config.policy else {}
    return {"reward": Role(config.init_from, head="scalar"), **policy}


def workload(config: Config, completions: int = 1) -> Workload:
    if config.policy:
        return sampling_workload(config)
    return job_workload(config.batch_size, config.length)


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    if sum(map(bool, (config.policy, config.preferences, config.demonstrations))) != 1:
        raise ConfigError(
            "recenter: needs samples from one of policy, preferences and demonstrations"
        )
    needed = ("prompt_length", "max_new_tokens") if config.policy else ("length",)
    for option in needed:
        if getattr(config, option) < 1:
            raise ConfigError(f"recenter.{option}: a value is required")
    layout.validate_batch(config.batch_size, "recenter.batch_size")
    if config.policy:
        validate_sampling(config, layout, model_config)
    else:
        validate_length(config.length, model_config, "recenter.length")


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes model/; returns mean and spread of the samples' rewards before."""
    saved = store.load(config.init_from, layout)
    validate(config, layout, saved.model.config)
    validate_reward_model(saved, saved.tokenizer, config.init_from)
    with layout.use():
        if config.policy:
            samples = _score_responses(config, config.policy, saved, layout)
        else:
            samples = _score_rows(config, saved, layout)
        rewards, valid, cut, counts = samples
        context = f"recenter.init_from={config.init_from}"
        stats.validate_scores(rewards, context, valid)
        params, metrics = center.normalize(saved.params, rewards, valid, "mean")
        metrics["rows_cut"] = (np.sum(cut * valid), np.sum(valid))
    store.save(workdir / store.FOLDER, dataclasses.replace(saved, params=params))
    values = finalize(hosts.whole(metrics), "recenter/") | counts
    with Writer(workdir) as writer:
        writer.write(0, values)
    return values


# Rewards, valid, cut, and the metrics of the data.
Samples = tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, float]]


def _score_rows(config: Config, saved: store.SavedModel, layout: Layout) -> Samples:
    """Returns rewards, valid and cut of preferences or demonstrations."""
    if config.preferences:
        source = open_preferences(config.preferences, "train")
        batches = loader.preference_batches(
            source,
            saved.tokenizer,
            batch_size=config.batch_size,
            length=config.length,
            train=False,
        )
    else:
        source = open_sources(config.demonstrations, "recenter.demonstrations")
        batches = center.demonstrations(
            source,
            saved.tokenizer,
            batch_size=config.batch_size,
            length=config.length,
        )
    rewards, labels = make_scorer(saved.model, layout)(saved.params, batches)
    return rewards, labels.valid, labels.cut, data_metrics(source, "recenter")


def _score_responses(
    config: Config, policy_path: str, saved: store.SavedModel, layout: Layout
) -> Samples:
    """Returns rewards, valid and cut of a policy's responses; valid is 0 in rows that only fill."""
    policy = store.load(policy_path, layout)
    if policy.tokenizer != saved.tokenizer:
        raise ConfigError("recenter.policy: must have the reward model's tokenizer")
    reward = ModelReward(saved.model, saved.params)
    tokenizer = policy.tokenizer
    source = open_prompts(config.prompts, "recenter.prompts", tokenizer, config.seed)
    batches = sample_responses(
        source,
        policy,
        Sampling.from_config(config, policy.tokenizer),
        PromptBatching(batch_size=config.batch_size, length=config.prompt_length),
        jax.random.key(config.seed),
        layout,
    )
    rewards, valid, cut = [], [], []
    for batch in batches:
        rollout = batch.rollout
        scores = reward(rollout.tokens, rollout.attention_mask, rollout.mask)
        rewards.append(hosts.whole(scores))
        valid.append((batch.index >= 0).astype(np.float32))
        cut.append(batch.cut)
    counts = data_metrics(source, "recenter")
    return np.concatenate(rewards), np.concatenate(valid), np.concatenate(cut), counts
