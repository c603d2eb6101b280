"""PPO against a reward, with a KL penalty to a reference: rollout -> score -> advantages -> minibatch epochs.

maximize E[ r(x, y) - beta log pi(y | x) / pi_ref(y | x) ] (+ gamma E[ log pi(x) ] over pretraining text, PPO-ptx)

Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022, eq. 2 and appendix C.4.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax.algos import advantages, masked, policy, shaping, value
from rlhfjax.algos.combine import add_losses
from rlhfjax.data.batches import PolicyBatch, TokenBatch
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.metrics import merge
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.lora import LoraConfig
from rlhfjax.models.transformer import Model
from rlhfjax.optim import OptimConfig, make_optimizer, make_schedule
from rlhfjax.ranges import NonNegative, Positive, PositiveCount, Share, Size
from rlhfjax.rewards.load import label
from rlhfjax.rewards.model import ModelReward
from rlhfjax.rl.config import (
    PolicyConfig,
    policy_roles,
    policy_workload,
    validate_policy,
)
from rlhfjax.rl.epochs import end_iteration, minibatch_epochs
from rlhfjax.rl.policy import policy_stage
from rlhfjax.rl.prompts import prompt_metrics
from rlhfjax.rl.rewards import kl_loss, kl_penalty, rollout_metrics, shape_rewards
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
from rlhfjax.rl.task import Task, open_task
from rlhfjax.roles import DISK, Loaded, Role, Sources, Workload
from rlhfjax.stage import Stage
from rlhfjax.state import TrainState, copy_into, merge_params
from rlhfjax.streams import UPDATE, VALUE_INIT
from rlhfjax.types import Metrics, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    """See PolicyConfig for the options that are not PPO's own; batch_size counts episodes of an iteration."""

    stage: str = "ppo"
    # trunk of the value function: a copy of the reward model's or of the policy's (with adapters: the very same, under
    # adapters of its own), or the policy's own
    value: Literal["reward", "policy", "shared"] = "reward"
    # loaded: the reward model's (a policy's trunk has none, it is 0); normal: of std 1 / sqrt(d + 1)
    value_head: Literal["loaded", "zero", "normal"] = "loaded"
    epochs: PositiveCount = 4
    minibatches: Size = 4
    clip: Positive = 0.2
    value_clip: NonNegative = 0.2  # 0: none
    value_coefficient: NonNegative = 0.1
    gamma: Share = 1.0
    lam: Share = 0.95
    whiten_rewards: Literal["none", "batch", "minibatch"] = (
        "none"  # in a minibatch: lm-human-preferences
    )
    whiten_advantages: Literal["none", "batch", "minibatch"] = "minibatch"
    value_optim: OptimConfig = OptimConfig()


def roles(config: Config) -> dict[str, Role]:
    """Returns the roles of every policy stage, and the value function."""
    critic = Role(
        config.init_from, head="scalar", optim=config.value_optim, lora=config.lora
    )
    shares = "reward" if config.value == "reward" else "policy"
    if config.value == "reward":
        critic = critic._replace(source=config.reward, scores=True)
    if config.value == "shared":
        critic = critic._replace(lora=LoraConfig(), head_alone=True)
    return policy_roles(config) | {"value": critic._replace(shares=shares)}


def workload(config: Config, completions: int = 1) -> Workload:
    return policy_workload(
        config, values=() if config.value == "shared" else ("value",)
    )


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    validate_policy(config, layout, model_config)
    make_schedule(config.value_optim, config.updates)
    if config.whiten_rewards == "minibatch" and config.whiten_advantages == "batch":
        raise ConfigError(
            "ppo.whiten_advantages: where rewards are whitened in a minibatch, advantages exist only there"
        )
    if config.kl.place == "loss" and config.kl.estimator == "grpo":
        raise ConfigError(
            "ppo.kl.estimator=\"grpo\" is the group stage's; in PPO's loss: k1, k2, k3, sequence"
        )


class Experience(NamedTuple):
    """An iteration's rollouts with all that is constant over its epochs."""

    tokens: Any  # [b, p + r]
    segments: Any  # [b, p + r]
    mask: Any  # [b, r]
    logprobs: Any  # [b, r] of the policy that sampled
    values: Any  # [b, r]
    advantages: Any  # [b, r]
    returns: Any  # [b, r]
    rewards: Any = (
        None  # [b, r], where advantages are made from them in every minibatch
    )
    ref_logprobs: Any = None  # [b, r], where the KL is in the loss


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    task = open_task(config, roles(config), layout, sources)
    policy_model = task.policy.model
    validate(config, layout, policy_model.config)
    critic = _value_function(config, task)
    frozen = {"policy": task.policy.frozen, "value": critic.frozen}
    made = programs(config, policy_model, critic.model, task.tokens)
    sample = make_sampler(config, layout, policy_model, task.tokens)
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

    def init_value(key: jax.Array) -> dict[str, PyTree]:
        fresh = critic.model.init_trained(jax.random.fold_in(key, VALUE_INIT))
        return {"value": _own(config, fresh)}

    def start(state: TrainState) -> TrainState:
        value_params = _start_value(config, critic, state.params["value"])
        return state.replace(params=state.params | {"value": value_params})

    def also(state: TrainState) -> dict[str, Any]:
        return (
            {}
            if config.value == "shared"
            else {"value": critic.saved(state.params["value"])}
        )

    return policy_stage(
        config,
        task,
        made.tx,
        step,
        init_others=init_value,
        axes={"value": _own(config, critic.model.trained_axes())},
        start=start,
        also=also,
    )


def programs(config: Config, model: Model, critic: Model, tokens: Tokens) -> Programs:
    """Returns the jitted functions of an iteration, in their order."""
    c = config
    tx = optax.partition(
        {
            "policy": make_optimizer(c.optim, c.updates),
            "value": make_optimizer(c.value_optim, c.updates),
        },
        lambda params: {
            name: jax.tree.map(lambda _, n=name: n, tree)
            for name, tree in params.items()
        },
    )

    logprobs_of = logprobs_with(c, model)

    # ------------------------------------------------------------------ score -> advantages

    def values_of(params: PyTree, batch: Any) -> jax.Array:
        trunk, trunk_params = (
            (model, params["policy"])
            if c.value == "shared"
            else (critic, params["value"])
        )
        hidden = response_hidden(
            trunk, trunk_params, batch.tokens, batch.segments, batch.mask.shape[1]
        )
        return critic.scalar(params["value"], hidden)

    def forward(params: PyTree, reference: PyTree | None, rollout: Rollout) -> Forward:
        """All passes that need no score; of a reference on another mesh, pass None."""
        values = values_of(params, rollout) * rollout.mask
        ref_logprobs = None if reference is None else logprobs_of(reference, rollout)
        logprobs = behavior_logprobs(c, logprobs_of, params["policy"], rollout)
        return Forward(logprobs, ref_logprobs, values)

    def make_experience(
        state: TrainState, known: Forward, rollout: Rollout, scores: jax.Array
    ) -> tuple[Experience, Metrics]:
        """Rewards and advantages of a rollout; nothing here has a gradient."""
        mask = rollout.mask
        old_logprobs, ref_logprobs, values = known
        shaped, ended, metrics = shape_rewards(c, tokens, scores, rollout)
        penalty, sequence_kl = kl_penalty(c.kl, old_logprobs, ref_logprobs, mask)
        beta = state.extra["kl_coefficient"]
        rewards = shaping.token_rewards(shaped, penalty, mask, beta=beta)
        if c.whiten_rewards == "batch":
            rewards = masked.whiten_keep_mean(rewards, mask)
        advantage, returns = advantages.gae(
            rewards, values, mask, gamma=c.gamma, lam=c.lam
        )
        if c.whiten_advantages == "batch":
            advantage = masked.whiten(advantage, mask)
        metrics |= rollout_metrics(scores, shaped, beta, sequence_kl, ended, mask)
        metrics |= {
            "value_explained_variance": value.explained_variance(values, returns, mask),
            "kl_coefficient": (beta, jnp.ones(())),
        }
        experience = Experience(
            tokens=rollout.tokens,
            segments=rollout.segments,
            mask=mask,
            logprobs=old_logprobs,
            values=values,
            advantages=advantage,
            returns=returns,
            rewards=rewards if c.whiten_rewards == "minibatch" else None,
            ref_logprobs=ref_logprobs if c.kl.place == "loss" else None,
        )
        return experience, metrics

    # ------------------------------------------------------------------ minibatch epochs

    def whiten(batch: Experience) -> Experience:
        if c.whiten_rewards == "minibatch":
            rewards = masked.whiten_keep_mean(batch.rewards, batch.mask)
            advantage, returns = advantages.gae(
                rewards, batch.values, batch.mask, gamma=c.gamma, lam=c.lam
            )
            batch = batch._replace(advantages=advantage, returns=returns)
        if c.whiten_advantages == "minibatch":
            batch = batch._replace(
                advantages=masked.whiten(batch.advantages, batch.mask)
            )
        return batch

    def loss(
        params: PyTree,
        batch: Experience,
        key: jax.Array | None,
        beta: jax.Array | float = 0.0,
    ) -> tuple[jax.Array, Metrics]:
        """Clipped policy loss + value_coefficient x value loss - entropy_coefficient x entropy, mean over tokens.

        beta weighs the KL to the reference where that is in the loss.
        """
        mask, r = batch.mask, batch.mask.shape[1]
        hidden = response_hidden(
            model, params["policy"], batch.tokens, batch.segments, r
        )
        logprobs, entropy = model.logprobs(
            params["policy"], hidden, batch.tokens[:, -r:], c.temperature
        )
        values = (
            critic.scalar(params["value"], hidden)
            if c.value == "shared"
            else values_of(params, batch)
        )
        policy_terms = policy.ppo_loss(
            logprobs, batch.logprobs, batch.advantages, mask, clip=c.clip
        )
        if c.value_clip:
            rows = (values, batch.values, batch.returns, mask)
            value_terms = value.clipped_value_loss(*rows, clip=c.value_clip)
        else:
            value_terms = value.value_loss(values, batch.returns, mask)
        terms = {
            "policy": (1.0, policy_terms),
            "value": (c.value_coefficient, value_terms),
        }
        if c.entropy_coefficient:
            terms["entropy"] = (
                1.0,
                policy.entropy_bonus(entropy, mask, coefficient=c.entropy_coefficient),
            )
        if c.kl.place == "loss":  # weighted by tokens, as the terms that it joins
            scalar, pairs = kl_loss(c.kl, logprobs, batch)
            terms["kl"] = (
                beta,
                (scalar, {**pairs, "loss": (pairs["loss"][0], mask.sum())}),
            )
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
        of_minibatch = functools.partial(loss, beta=state.extra["kl_coefficient"])
        rows = (state, experience, text, key)
        state, update_metrics = minibatch_epochs(
            c, tx, model, of_minibatch, *rows, whiten, frozen
        )
        return end_iteration(c, state, metrics), update_metrics

    return programs_of(logprobs_of, forward, make_experience, update, loss, tx, whiten)


# ------------------------------------------------------------------ the value function


def _value_function(config: Config, task: Task) -> Loaded:
    """Returns the value function, and how the parameters that it starts from are read."""
    policy = task.policy
    if config.value == "reward":
        if not isinstance(task.reward, ModelReward):
            raise ConfigError(
                f'ppo.value="reward": {label(config.reward)} is no model; use "policy" or "shared"'
            )
        config_of_value, params = task.reward.model.config, task.reward.params
        read = lambda: dict(params)  # noqa: E731
    else:
        config_of_value = policy.model.config
        read = lambda: {"backbone": policy.read()["backbone"]}  # noqa: E731
    frozen = {}
    if config.lora.rank and config.value != "shared":
        frozen = {"backbone": read()["backbone"]}
    return Loaded(
        Model(config_of_value, "scalar", config.lora), task.tokenizer, frozen, read
    )


def _own(config: Config, tree: PyTree) -> PyTree:
    """Returns what a value function has of its own: on the policy's trunk its head alone."""
    return {"head": tree["head"]} if config.value == "shared" else tree


def _start_value(config: Config, critic: Loaded, params: PyTree) -> PyTree:
    """Returns fresh parameters with the pretrained ones and the head that the config names in them."""
    pretrained = {} if config.value == "shared" else critic.read()
    if config.value_head == "zero" or (
        config.value_head == "loaded" and "head" not in pretrained
    ):
        width = critic.model.config.d_model
        pretrained["head"] = {"kernel": jnp.zeros(width), "bias": jnp.zeros(())}
    elif config.value_head == "normal":
        pretrained.pop("head", None)
    return copy_into(params, pretrained)
