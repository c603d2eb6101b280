"""Recentring: a reward model whose bias is set anew, and nothing else, so that some samples have mean reward 0.

r'(x, y) = r(x, y) - mean r over the samples; which of two answers is better does not change.

The samples are answers of a policy to prompts, completions of preference folders, or demonstrations.
"""

import dataclasses

import jax
import numpy as np

from rlhfjax import hosts
from rlhfjax.data import loader
from rlhfjax.data.batches import concatenate
from rlhfjax.data.config import SourceConfig, open_preferences, open_sources
from rlhfjax.errors import ConfigError
from rlhfjax.evals import stats
from rlhfjax.interop import store
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer, finalize
from rlhfjax.models.config import TransformerConfig
from rlhfjax.paths import Path
from rlhfjax.ranges import Seed, Size, Temperature, TokensOrNone
from rlhfjax.rewards import center
from rlhfjax.rewards.model import ModelReward
from rlhfjax.rewards.responses import validate_reward_model
from rlhfjax.rl.answers import Sampling, answers
from rlhfjax.rl.prompts import PromptConfig, open_prompts
from rlhfjax.roles import Role, Workload, job_workload
from rlhfjax.stages.reward import make_scorer
from rlhfjax.supervised import validate_length

LEAVES_MODEL = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    stage: str = "recenter"
    init_from: str  # the reward model
    policy: str | None = None  # answers `prompts`; or else:
    preferences: tuple[str, ...] = ()  # completions of the train split
    demonstrations: tuple[SourceConfig, ...] = ()
    prompts: PromptConfig = PromptConfig()
    prompt_length: TokensOrNone = 0  # of `policy`
    max_new_tokens: TokensOrNone = 0  # of `policy`
    temperature: Temperature = 1.0
    length: TokensOrNone = (
        0  # prompt and response, of `preferences` and `demonstrations`
    )
    batch_size: Size
    seed: Seed = 0
    mesh: MeshConfig = MeshConfig()


def roles(config: Config) -> dict[str, Role]:
    policy = {"policy": Role(config.policy)} if config.policy else {}
    return {"reward": Role(config.init_from, head="scalar"), **policy}


def workload(config: Config, completions: int = 1) -> Workload:
    sampled = config.prompt_length + config.max_new_tokens
    return job_workload(config.batch_size, sampled if config.policy else config.length)


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    if sum(map(bool, (config.policy, config.preferences, config.demonstrations))) != 1:
        raise ConfigError(
            "recenter: give the samples by one of policy, preferences and demonstrations"
        )
    needed = ("prompt_length", "max_new_tokens") if config.policy else ("length",)
    if missing := [name for name in needed if getattr(config, name) < 1]:
        raise ConfigError(f"recenter.{missing[0]}: a value is required")
    layout.check_batch(config.batch_size, "recenter.batch_size")
    validate_length(
        sum(getattr(config, name) for name in needed),
        model_config,
        f"recenter.{' + '.join(needed)}",
    )


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes model/; returns mean and spread of the samples' rewards before."""
    saved = store.load(config.init_from, layout)
    validate(config, layout, saved.model.config)
    validate_reward_model(saved, saved.tokenizer, config.init_from)
    with layout.use():
        rewards, valid, cut = _samples(config, saved, layout)
        context = f"recenter.init_from={config.init_from}"
        stats.validate_scores(rewards, context, valid)
        params, metrics = center.normalize(saved.params, rewards, valid, "mean")
        metrics["rows_cut"] = (np.sum(cut * valid), np.sum(valid))
    store.save(workdir / store.FOLDER, dataclasses.replace(saved, params=params))
    values = finalize(hosts.whole(metrics), "recenter/")
    with Writer(workdir) as writer:
        writer.write(0, values)
    return values


Samples = tuple[np.ndarray, np.ndarray, np.ndarray]  # rewards, valid, cut


def _samples(config: Config, saved: store.SavedModel, layout: Layout) -> Samples:
    """Returns the rewards of the samples, which of them exist, and which lost tokens."""
    tokenizer = saved.tokenizer
    if config.policy:
        return _sampled(config, saved, layout)
    size, length = config.batch_size, config.length
    if config.preferences:
        source = open_preferences(config.preferences, "train")
        batches = loader.preference_batches(
            source, tokenizer, batch_size=size, length=length, train=False
        )
    else:
        source = open_sources(config.demonstrations, "recenter.demonstrations")
        batches = center.demonstrations(
            source, tokenizer, batch_size=size, length=length
        )
    rewards, labels = make_scorer(saved.model, layout)(saved.params, batches)
    return rewards, labels.valid, labels.cut


def _sampled(config: Config, saved: store.SavedModel, layout: Layout) -> Samples:
    policy = store.load(config.policy or "", layout)
    tokenizer = policy.tokenizer
    if policy.tokenizer != saved.tokenizer:
        raise ConfigError("recenter: policy and reward model have different tokenizers")
    source = open_prompts(config.prompts, "recenter.prompts", seed=config.seed)
    sampling = Sampling(
        config.prompt_length,
        config.max_new_tokens,
        config.temperature,
        config.batch_size,
    )
    reward, key = ModelReward(saved.model, saved.params), jax.random.key(config.seed)
    parts = [
        (
            hosts.whole(reward(one.tokens, one.segments, one.mask)),
            (index >= 0).astype(np.float32),
            cut,
        )
        for one, index, cut in answers(source, policy, tokenizer, sampling, key, layout)
    ]
    return concatenate(parts)
