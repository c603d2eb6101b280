"""PPO with a KL penalty to a reference: rollout -> score -> advantages -> minibatch epochs.

maximize E[ r(x, y) - beta log pi(y | x) / pi_ref(y | x) ] (+ gamma E[ log pi(x) ], PPO-ptx)

with y sampled from pi, and the x of the second term from pretraining text.

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
from rlhfjax.interop import store
from rlhfjax.mesh import Layout
from rlhfjax.metrics import merge
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.experts import Routing, add_balance
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
from rlhfjax.rl.policy import ExtraModels, policy_stage
from rlhfjax.rl.prompts import prompt_metrics
from rlhfjax.rl.rewards import kl_loss, kl_penalty, rollout_metrics, shape_rewards
from rlhfjax.rl.rollout import (
    Rollout,
    TokenIds,
    response_hidden,
    response_outputs,
    truncate_responses,
)
from rlhfjax.rl.task import Task, open_task
from rlhfjax.roles import DISK, Loaded, Role, Sources, Workload
from rlhfjax.stage import Stage
from rlhfjax.state import TrainState, merge_params
from rlhfjax.streams import UPDATE, VALUE_INIT
from rlhfjax.types import Loss, Metrics, PyTree, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    """PPO's own options; those of every policy stage are in PolicyConfig."""

    stage: str = "ppo"
    value: Literal["reward", "policy", "shared"] = "reward"
    """Trunk of the value function: a copy of the reward model's, a copy of the policy's, or shared.

    A shared trunk is the policy's own. With lora a copy is the frozen trunk, with other adapters.
    """
    value_head: Literal["loaded", "zero", "normal"] = "loaded"
    """Head at the start: the reward model's (0 if there is none), 0, or std 1 / sqrt(d + 1)."""
    epochs: PositiveCount = 4
    """Passes over the episodes of an iteration."""
    minibatches: Size = 4
    """Minibatches per epoch, with one update each."""
    clip: Positive = 0.2
    """Probability ratios are clipped to [1 - clip, 1 + clip]."""
    value_clip: NonNegative = 0.2
    """Values are clipped to this distance from those of the rollout; 0 is off."""
    value_coefficient: NonNegative = 0.1
    """Weight of the value loss."""
    gamma: Share = 1.0
    """Discount per token."""
    lam: Share = 0.95
    """Lambda of generalized advantage estimation."""
    whiten_rewards: Literal["none", "batch", "minibatch"] = "none"
    """Where rewards get standard deviation 1, their mean kept (minibatch: lm-human-preferences)."""
    whiten_advantages: Literal["none", "batch", "minibatch"] = "minibatch"
    """Where advantages get mean 0 and standard deviation 1."""
    value_optim: OptimConfig = OptimConfig()
    """Optimizer of the value function."""


MODEL_NAME = "PPO"


def roles(config: Config) -> dict[str, Role]:
    """Returns the roles of every policy stage, and the value function."""
    is_shared = config.value == "shared"
    critic = Role(
        config.init_from,
        head="scalar",
        optim=config.value_optim,
        lora=LoraConfig() if is_shared else config.lora,
        shares="policy",
        head_alone=is_shared,
    )
    if config.value == "reward":
        critic = critic._replace(source=config.reward, shares="reward", scores=True)
    return policy_roles(config) | {"value": critic}


def workload(config: Config, completions: int = 1) -> Workload:
    """Returns what an iteration computes."""
    trained = () if config.value == "shared" else ("value",)
    return policy_workload(config, trained=trained)


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    validate_policy(config, layout, model_config)
    make_schedule(config.value_optim, config.updates)
    if config.whiten_rewards == "minibatch" and config.whiten_advantages == "batch":
        raise ConfigError(
            'ppo.whiten_advantages="batch": must be "none" or "minibatch" '
            'with whiten_rewards="minibatch"'
        )
    if config.kl.place == "loss" and config.kl.estimator == "grpo":
        raise ConfigError(
            'ppo.kl.estimator="grpo": is for the group stage; '
            "in PPO's loss it must be k1, k2, k3 or sequence"
        )


class Experience(NamedTuple):
    """An iteration's rollout with everything that is constant over its epochs."""

    tokens: Any  # [b, p + r]
    attention_mask: Any  # [b, p + r]
    mask: Any  # [b, r]
    logprobs: Any  # [b, r] of the policy that sampled
    values: Any  # [b, r]
    advantages: Any  # [b, r]
    returns: Any  # [b, r]
    rewards: Any = None  # [b, r], if every minibatch makes advantages from them
    ref_logprobs: Any = None  # [b, r], if the KL is in the loss


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    """Returns the stage. Its `step` is one iteration of PPO."""
    task = open_task(config, roles(config), layout, sources)
    model = task.policy.model
    validate(config, layout, model.config)
    critic = _value_function(config, task)
    frozen = {"policy": task.policy.frozen, "value": critic.frozen}
    jitted = programs(config, model, critic.model, task.ids)
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

    def init_value(key: jax.Array) -> dict[str, PyTree]:
        fresh = critic.model.init_trained(jax.random.fold_in(key, VALUE_INIT))
        return {"value": _own_params(config, fresh)}

    def load_value(state: TrainState) -> TrainState:
        value_params = critic.start(state.params["value"])
        return state.replace(params=state.params | {"value": value_params})

    def saved_value(state: TrainState) -> dict[str, store.SavedModel]:
        if config.value == "shared":
            return {}
        return {"value": critic.saved(state.params["value"])}

    value_function = ExtraModels(
        init=init_value,
        axes={"value": _own_params(config, critic.model.trained_axes())},
        load=load_value,
        saved=saved_value,
    )
    return policy_stage(config, task, jitted.tx, step, extra_models=value_function)


def programs(config: Config, model: Model, critic: Model, ids: TokenIds) -> Programs:
    """Returns the jitted functions of an iteration; they are below in the order of use."""
    c = config
    tx = optax.partition(
        {
            "policy": make_optimizer(c.optim, c.updates),
            "value": make_optimizer(c.value_optim, c.updates),
        },
        lambda params: {
            role: jax.tree.map(lambda _, role=role: role, tree)
            for role, tree in params.items()
        },
    )
    rollout_logprobs = make_rollout_logprobs(c, model)

    # ------------------------------------------------------------------ score -> advantages

    def values_and_routing(
        params: PyTree, batch: Any
    ) -> tuple[jax.Array, Routing | None]:
        """Returns V [b, r] of the state in which each response token is chosen."""
        is_shared = c.value == "shared"
        hidden, routing = response_hidden(
            model if is_shared else critic,
            params["policy"] if is_shared else params["value"],
            batch.tokens,
            batch.attention_mask,
            batch.mask.shape[1],
        )
        return critic.scalar(params["value"], hidden), routing

    def compute_values(params: PyTree, batch: Any) -> jax.Array:
        return values_and_routing(params, batch)[0]

    forward = make_forward_passes(c, rollout_logprobs, compute_values)

    def make_experience(
        state: TrainState, outputs: ForwardOutputs, rollout: Rollout, scores: jax.Array
    ) -> tuple[Experience, Metrics]:
        """Returns rewards and advantages of a rollout; nothing here has a gradient."""
        mask = rollout.mask
        old_logprobs, ref_logprobs, values = outputs
        shaped, ended, metrics = shape_rewards(c, ids, scores, rollout)
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
            attention_mask=rollout.attention_mask,
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
        """Whitens what the config whitens per minibatch."""
        if c.whiten_rewards == "minibatch":
            rewards = masked.whiten_keep_mean(batch.rewards, batch.mask)
            advantage, returns = advantages.gae(
                rewards, batch.values, batch.mask, gamma=c.gamma, lam=c.lam
            )
            batch = batch._replace(advantages=advantage, returns=returns)
        if c.whiten_advantages == "minibatch":
            advantage = masked.whiten(batch.advantages, batch.mask)
            batch = batch._replace(advantages=advantage)
        return batch

    def loss(
        params: PyTree, batch: Experience, key: jax.Array | None, beta: Scalar = 0.0
    ) -> Loss:
        """Returns the mean over tokens of

        clipped policy loss + value_coefficient x value loss - entropy_coefficient x entropy

        plus beta x the KL to the reference, if that is in the loss.
        """
        mask = batch.mask
        outputs = response_outputs(c, model, params["policy"], batch)
        logprobs, entropy = outputs.logprobs, outputs.entropy
        value_routing = None
        if c.value == "shared":
            values = critic.scalar(params["value"], outputs.hidden)
        else:
            values, value_routing = values_and_routing(params, batch)
        policy_loss = policy.ppo_loss(
            logprobs, batch.logprobs, batch.advantages, mask, clip=c.clip
        )
        if c.value_clip:
            value_loss = value.clipped_value_loss(
                values, batch.values, batch.returns, mask, clip=c.value_clip
            )
        else:
            value_loss = value.value_loss(values, batch.returns, mask)
        terms: dict[str, tuple[Scalar, Loss]] = {
            "policy": (1.0, policy_loss),
            "value": (c.value_coefficient, value_loss),
        }
        if c.entropy_coefficient:
            bonus = policy.entropy_bonus(
                entropy, mask, coefficient=c.entropy_coefficient
            )
            terms["entropy"] = (1.0, bonus)
        if c.kl.place == "loss":
            scalar, kl_metrics = kl_loss(c.kl, logprobs, batch)
            # The weight is the number of tokens, as that of the other terms.
            kl_metrics["loss"] = (kl_metrics["loss"][0], mask.sum())
            terms["kl"] = (beta, (scalar, kl_metrics))
        total, metrics = add_losses(**terms)
        metrics["entropy"] = masked.token_mean(jax.lax.stop_gradient(entropy), mask)
        balanced = add_balance(model.config, (total, metrics), outputs.routing)
        return add_balance(critic.config, balanced, value_routing, prefix="value_")

    def update(
        state: TrainState,
        experience: Experience,
        text: TokenBatch | None,
        metrics: Metrics,
        key: jax.Array,
        frozen: PyTree | None = None,
    ) -> tuple[TrainState, Metrics]:
        """Runs the epochs of an iteration, then adapts its KL coefficient and EMA weights."""
        minibatch_loss = functools.partial(loss, beta=state.extra["kl_coefficient"])
        learner = Learner(c, model, tx, minibatch_loss, whiten)
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
        whiten=whiten,
    )


# ------------------------------------------------------------------ the value function


def _value_function(config: Config, task: Task) -> Loaded:
    """Returns the value function, and how its pretrained parameters are read."""
    if config.value == "reward":
        reward = task.reward
        if not isinstance(reward, ModelReward):
            raise ConfigError(
                f'ppo.value="reward": must be "policy" or "shared" '
                f"if the reward is no model, as {label(config.reward)}"
            )
        model_config = reward.model.config
        read_model = functools.partial(dict, reward.params)
    else:
        model_config = task.policy.model.config
        read_model = functools.partial(_read_backbone, task.policy)

    def read() -> PyTree:
        params = {} if config.value == "shared" else read_model()
        use_zeros = config.value_head == "loaded" and "head" not in params
        if config.value_head == "zero" or use_zeros:
            kernel = jnp.zeros(model_config.d_model)
            params["head"] = {"kernel": kernel, "bias": jnp.zeros(())}
        elif config.value_head == "normal":
            params.pop("head", None)
        return params

    frozen = {}
    if config.lora.rank and config.value != "shared":
        frozen = {"backbone": read_model()["backbone"]}
    model = Model(model_config, "scalar", config.lora)
    return Loaded(model, task.tokenizer, frozen, read)


def _read_backbone(policy: Loaded) -> dict[str, PyTree]:
    assert policy.read is not None  # a policy always starts from a model
    return {"backbone": policy.read()["backbone"]}


def _own_params(config: Config, params: PyTree) -> PyTree:
    """Returns the value function's own part of a scalar model: the head alone on a shared trunk."""
    return {"head": params["head"]} if config.value == "shared" else params
