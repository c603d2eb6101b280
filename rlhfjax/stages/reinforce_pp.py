"""REINFORCE++: PPO's clipped loss on advantages without a value function and without groups.

The advantage of a token is the score minus beta times the KL from this token on, normalized over
the whole batch.

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
from rlhfjax.models.experts import add_balance
from rlhfjax.models.transformer import Model
from rlhfjax.optim import make_optimizer
from rlhfjax.ranges import Positive, PositiveCount, Size
from rlhfjax.rl.config import (
    PolicyConfig,
    policy_roles,
    policy_workload,
    validate_policy,
)
from rlhfjax.rl.epochs import Learner, end_iteration, minibatch_epochs
from rlhfjax.rl.iteration import (
    ForwardOutputs,
    Programs,
    drop_next_rollout,
    jit_programs,
    make_forward_passes,
    make_rollout_logprobs,
    sample_rollouts,
    store_next_rollout,
    stream_key,
)
from rlhfjax.rl.placement import make_sampler
from rlhfjax.rl.policy import policy_stage
from rlhfjax.rl.prompts import prompt_metrics
from rlhfjax.rl.rewards import kl_penalty, rollout_metrics, shape_rewards
from rlhfjax.rl.rollout import (
    Rollout,
    TokenIds,
    response_outputs,
    truncate_responses,
)
from rlhfjax.rl.task import open_task
from rlhfjax.roles import DISK, Sources
from rlhfjax.stage import Stage
from rlhfjax.state import TrainState, merge_params
from rlhfjax.streams import UPDATE
from rlhfjax.types import Loss, Metrics, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    """REINFORCE++'s own options; those of every policy stage are in PolicyConfig."""

    stage: str = "reinforce_pp"
    epochs: PositiveCount = 1
    """Passes over the episodes of an iteration."""
    minibatches: Size = 1
    """Minibatches per epoch, with one update each."""
    clip: Positive = 0.2
    """Probability ratios are clipped to [1 - clip, 1 + clip]."""


MODEL_NAME = "REINFORCE++"
roles = policy_roles
workload = policy_workload


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    validate_policy(config, layout, model_config)
    if config.kl.place != "reward":
        raise ConfigError(
            f'reinforce_pp.kl.place={config.kl.place!r}: must be "reward"; '
            "PPO and GRPO can have the KL in the loss"
        )


class Experience(NamedTuple):
    """An iteration's rollout with everything that is constant over its epochs."""

    tokens: Any  # [b, p + r]
    attention_mask: Any  # [b, p + r]
    mask: Any  # [b, r]
    logprobs: Any  # [b, r] of the policy that sampled
    advantages: Any  # [b, r]


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    """Returns the stage. Its `step` is one iteration of REINFORCE++."""
    task = open_task(config, roles(config), layout, sources)
    model = task.policy.model
    validate(config, layout, model.config)
    frozen = {"policy": task.policy.frozen}
    jitted = programs(config, model, task.ids)
    sampler = make_sampler(config, layout, model, task.ids)
    forward = task.make_forward(jitted)
    exact_kl = task.make_exact_kl(config)

    def step(
        state: TrainState, batch: PolicyBatch, key: Any
    ) -> tuple[TrainState, Metrics]:
        params = merge_params(frozen, state.params)
        prompts, policy_params = batch.prompts, params["policy"]
        rollouts = sample_rollouts(config, sampler, state, policy_params, prompts, key)
        rollout, state = rollouts.current, drop_next_rollout(state)
        scored = truncate_responses(config, task.ids, rollout)
        # Forward passes are dispatched before the rewards, which the host may compute meanwhile.
        outputs = forward(params, rollout)
        kl_metrics = exact_kl(policy_params, rollout)
        scores, reward_metrics = task.score(config, scored, state.step)
        experience, metrics = jitted.make_experience(state, outputs, rollout, scores)
        task.keep_samples(rollout, outputs, scores, experience.advantages, metrics)
        update_key = stream_key(key, UPDATE)
        state, update_metrics = jitted.update(
            state, experience, batch.text, metrics, update_key, frozen
        )
        state, staleness = store_next_rollout(state, rollouts)
        return state, merge(
            reward_metrics,
            kl_metrics,
            metrics,
            update_metrics,
            staleness,
            prompt_metrics(prompts),
        )

    return policy_stage(config, task, jitted.tx, step)


def programs(config: Config, model: Model, ids: TokenIds) -> Programs:
    """Returns the jitted functions of an iteration; they are below in the order of use."""
    c = config
    tx = make_optimizer(c.optim, c.updates)
    rollout_logprobs = make_rollout_logprobs(c, model)
    forward = make_forward_passes(c, rollout_logprobs)

    # ------------------------------------------------------------------ score -> advantages

    def make_experience(
        state: TrainState, outputs: ForwardOutputs, rollout: Rollout, scores: jax.Array
    ) -> tuple[Experience, Metrics]:
        """Returns rewards and advantages of a rollout; nothing here has a gradient."""
        mask, beta = rollout.mask, state.extra["kl_coefficient"]
        logprobs, ref_logprobs, _ = outputs
        shaped, ended, metrics = shape_rewards(c, ids, scores, rollout)
        penalty, sequence_kl = kl_penalty(c.kl, logprobs, ref_logprobs, mask)
        rewards = shaping.token_rewards(shaped, penalty, mask, beta=beta)
        metrics |= rollout_metrics(scores, shaped, beta, sequence_kl, ended, mask)
        metrics["kl_coefficient"] = (beta, jnp.ones(()))
        experience = Experience(
            tokens=rollout.tokens,
            attention_mask=rollout.attention_mask,
            mask=mask,
            logprobs=logprobs,
            advantages=advantages.reinforce_pp(rewards, mask),
        )
        return experience, metrics

    # ------------------------------------------------------------------ minibatch epochs

    def loss(params: PyTree, batch: Experience, key: jax.Array | None) -> Loss:
        """Returns clipped policy loss - entropy_coefficient x entropy, mean over tokens."""
        mask = batch.mask
        outputs = response_outputs(c, model, params["policy"], batch)
        logprobs, entropy = outputs.logprobs, outputs.entropy
        policy_loss = policy.ppo_loss(
            logprobs, batch.logprobs, batch.advantages, mask, clip=c.clip
        )
        terms = {"policy": (1.0, policy_loss)}
        if c.entropy_coefficient:
            bonus = policy.entropy_bonus(
                entropy, mask, coefficient=c.entropy_coefficient
            )
            terms["entropy"] = (1.0, bonus)
        total, metrics = add_losses(**terms)
        metrics["entropy"] = masked.token_mean(jax.lax.stop_gradient(entropy), mask)
        return add_balance(model.config, (total, metrics), outputs.routing)

    def update(
        state: TrainState,
        experience: Experience,
        text: TokenBatch | None,
        metrics: Metrics,
        key: jax.Array,
        frozen: PyTree | None = None,
    ) -> tuple[TrainState, Metrics]:
        """Runs the epochs of an iteration, then adapts its KL coefficient and EMA weights."""
        learner = Learner(c, model, tx, loss)
        state, update_metrics = minibatch_epochs(
            learner, state, experience, text, key, frozen
        )
        return end_iteration(c, state, metrics), update_metrics

    return jit_programs(
        rollout_logprobs=rollout_logprobs,
        forward=forward,
        make_experience=make_experience,
        update=update,
        loss=loss,
        tx=tx,
    )
