"""REINFORCE++: PPO's clipped loss on advantages without a value function and without groups.

The advantage of a token is the score minus beta times the KL still to come, normalized over the whole batch.

Hu et al. 2025, "REINFORCE++".
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.algos import advantages, masked, policy, shaping
from rlhfjax.algos.combine import add_losses
from rlhfjax.data.batches import PolicyBatch, TokenBatch
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.metrics import merge
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.optim import make_optimizer
from rlhfjax.ranges import Positive, PositiveCount, Size
from rlhfjax.rl.config import (
    PolicyConfig,
    policy_roles,
    policy_workload,
    validate_policy,
)
from rlhfjax.rl.epochs import end_iteration, minibatch_epochs
from rlhfjax.rl.policy import policy_stage
from rlhfjax.rl.prompts import prompt_metrics
from rlhfjax.rl.rewards import kl_penalty, rollout_metrics, shape_rewards
from rlhfjax.rl.rollout import (
    Forward,
    Programs,
    Rollout,
    Tokens,
    behavior_logprobs,
    draw,
    logprobs_with,
    make_sampler,
    programs_of,
    response_hidden,
    stream,
    truncated,
    with_next,
    without_next,
)
from rlhfjax.rl.task import open_task
from rlhfjax.roles import DISK, Sources
from rlhfjax.stage import Stage
from rlhfjax.state import TrainState, merge_params
from rlhfjax.streams import UPDATE
from rlhfjax.types import Metrics, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    """See PolicyConfig for the options of every policy stage; batch_size counts responses per iteration."""

    stage: str = "reinforce_pp"
    epochs: PositiveCount = 1
    minibatches: Size = 1
    clip: Positive = 0.2


roles = policy_roles
workload = policy_workload


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    validate_policy(config, layout, model_config)
    if config.kl.place != "reward":
        raise ConfigError(
            "reinforce_pp.kl.place: the KL is in the reward; in the loss it is GRPO's or PPO's"
        )


class Experience(NamedTuple):
    """An iteration's responses with all that is constant over its epochs."""

    tokens: Any  # [b, p + r]
    segments: Any  # [b, p + r]
    mask: Any  # [b, r]
    logprobs: Any  # [b, r] of the policy that sampled
    advantages: Any  # [b, r]


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    task = open_task(config, roles(config), layout, sources)
    model = task.policy.model
    validate(config, layout, model.config)
    frozen = {"policy": task.policy.frozen}
    made = programs(config, model, task.tokens)
    sample = make_sampler(config, layout, model, task.tokens)
    forward = task.forward(made)

    def step(
        state: TrainState, batch: PolicyBatch, key: Any
    ) -> tuple[TrainState, Metrics]:
        params = merge_params(frozen, state.params)
        drawn = draw(config, sample, state, params["policy"], batch.prompts, key)
        rollout, state = drawn.rollout, without_next(state)
        scored = truncated(config, task.tokens, rollout)  # what the reward model sees
        known = forward(params, rollout)
        scores, reward_metrics = task.score(config, scored, state.step)
        experience, metrics = made.make_experience(state, known, rollout, scores)
        text, update_key = batch.text, stream(key, UPDATE)
        state, update_metrics = made.update(
            state, experience, text, metrics, update_key, frozen
        )
        state, staleness = with_next(state, drawn)
        return state, merge(
            reward_metrics,
            metrics,
            update_metrics,
            staleness,
            prompt_metrics(batch.prompts),
        )

    return policy_stage(config, task, made.tx, step)


def programs(config: Config, model: Model, tokens: Tokens) -> Programs:
    """Returns the jitted functions of an iteration, in their order."""
    c = config
    tx = make_optimizer(c.optim, c.updates)
    logprobs_of = logprobs_with(c, model)

    def forward(params: PyTree, reference: PyTree | None, rollout: Rollout) -> Forward:
        """All passes that need no score; of a reference on another mesh, pass None."""
        ref_logprobs = None if reference is None else logprobs_of(reference, rollout)
        logprobs = behavior_logprobs(c, logprobs_of, params["policy"], rollout)
        return Forward(logprobs, ref_logprobs)

    def make_experience(
        state: TrainState, known: Forward, rollout: Rollout, scores: jax.Array
    ) -> tuple[Experience, Metrics]:
        """Rewards and advantages of a rollout; nothing here has a gradient."""
        mask, beta = rollout.mask, state.extra["kl_coefficient"]
        logprobs, ref_logprobs, _ = known
        shaped, ended, metrics = shape_rewards(c, tokens, scores, rollout)
        penalty, sequence_kl = kl_penalty(c.kl, logprobs, ref_logprobs, mask)
        rewards = shaping.token_rewards(shaped, penalty, mask, beta=beta)
        metrics |= rollout_metrics(scores, shaped, beta, sequence_kl, ended, mask)
        metrics |= {
            "kl_coefficient": (beta, jnp.ones(())),
        }
        experience = Experience(
            tokens=rollout.tokens,
            segments=rollout.segments,
            mask=mask,
            logprobs=logprobs,
            advantages=advantages.reinforce_pp(rewards, mask),
        )
        return experience, metrics

    def loss(params: PyTree, batch: Experience, key: None) -> tuple[jax.Array, Metrics]:
        """Clipped policy loss - entropy_coefficient x entropy, mean over tokens."""
        mask, r = batch.mask, batch.mask.shape[1]
        hidden = response_hidden(
            model, params["policy"], batch.tokens, batch.segments, r
        )
        targets = batch.tokens[:, -r:]
        logprobs, entropy = model.logprobs(
            params["policy"], hidden, targets, c.temperature
        )
        surrogate = policy.ppo_loss(
            logprobs, batch.logprobs, batch.advantages, mask, clip=c.clip
        )
        terms = {"policy": (1.0, surrogate)}
        if c.entropy_coefficient:
            bonus = policy.entropy_bonus(
                entropy, mask, coefficient=c.entropy_coefficient
            )
            terms["entropy"] = (1.0, bonus)
        total, metrics = add_losses(**terms)
        return total, metrics | {
            "entropy": masked.token_mean(jax.lax.stop_gradient(entropy), mask)
        }

    def update(
        state: TrainState,
        experience: Experience,
        text: TokenBatch | None,
        metrics: Metrics,
        key: jax.Array,
        frozen: PyTree | None = None,
    ) -> tuple[TrainState, Metrics]:
        """The epochs of an iteration, then its KL coefficient and averages."""
        rows = (state, experience, text, key)
        state, update_metrics = minibatch_epochs(
            c, tx, model, loss, *rows, frozen=frozen
        )
        return end_iteration(c, state, metrics), update_metrics

    return programs_of(logprobs_of, forward, make_experience, update, loss, tx)
