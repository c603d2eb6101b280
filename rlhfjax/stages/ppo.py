"""PPO against a reward, with a KL penalty to a reference: rollout -> score -> advantages -> minibatch epochs.

maximise E[ r(x, y) - beta log pi(y | x) / pi_ref(y | x) ] (+ gamma E[ log pi(x) ] over pretraining text, PPO-ptx)

Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022, eq. 2 and appendix C.4.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax import state as states
from rlhfjax.algos import advantages, masked, policy, shaping, value
from rlhfjax.algos.combine import add_losses
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.optim import OptimConfig, make_optimizer, make_schedule
from rlhfjax.rewards.model import ModelReward
from rlhfjax.stages import Pairs, Stage
from rlhfjax.stages.parts.common import frozen_part, to_save
from rlhfjax.stages.parts.epochs import end_iteration, minibatch_epochs
from rlhfjax.stages.parts.policy import Known, PolicyAlgorithm, Task, Tokens, open_task, policy_stage
from rlhfjax.stages.parts.policy_config import PolicyConfig, check_policy
from rlhfjax.stages.parts.rollout import Rollout, response_hidden

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    """See PolicyConfig for the options that are not PPO's own; batch_size counts episodes of an iteration."""

    stage: str = "ppo"
    # trunk of the value function: a copy of the reward model's or of the policy's (with adapters: the very same, under
    # adapters of its own), or the policy's own
    value: Literal["reward", "policy", "shared"] = "reward"
    # loaded: the reward model's (a policy's trunk has none, it is 0); normal: of std 1 / sqrt(d + 1)
    value_head: Literal["loaded", "zero", "normal"] = "loaded"
    epochs: int = 4
    minibatches: int = 4
    clip: float = 0.2
    value_clip: float = 0.2  # 0: none
    value_coefficient: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: Literal["none", "batch", "minibatch"] = "none"  # in a minibatch: lm-human-preferences
    whiten_advantages: Literal["none", "batch", "minibatch"] = "minibatch"
    value_optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)


def check(config: Config, layout: Layout, shape: TransformerConfig | None) -> None:
    """Refuses what cannot be meant, before anything is computed."""
    check_policy(config, layout, shape)
    make_schedule(config.value_optim, config.updates)
    if not (0 <= config.gamma <= 1 and 0 <= config.lam <= 1):
        raise ConfigError(f"ppo.gamma={config.gamma}, lam={config.lam}: they are between 0 and 1")
    if config.clip <= 0 or config.value_clip < 0:
        raise ConfigError(
            f"ppo.clip={config.clip} must be above 0, and value_clip={config.value_clip} at least 0 (none)"
        )
    if config.whiten_rewards == "minibatch" and config.whiten_advantages == "batch":
        raise ConfigError(
            "ppo.whiten_advantages: where rewards are whitened in a minibatch, advantages exist only there"
        )
    if config.kl.place == "loss" and config.kl.estimator == "grpo":
        raise ConfigError("ppo.kl.estimator=\"grpo\" is the group stage's; in PPO's loss: k1, k2, k3, sequence")


def build(config: Config, layout: Layout) -> Stage:
    task = open_task(config, layout)
    check(config, layout, task.start.model.config)
    made = parts(config, task)

    def keep(state: states.TrainState) -> dict[str, Any]:
        if config.value == "shared":
            return {}
        whole = states.attach(made.frozen["value"], state.params["value"])
        return {"value": to_save(made.algorithm.critic, whole, task.start.tokenizer)}

    return policy_stage(config, layout, task, also=keep, **made._asdict())


class Parts(NamedTuple):
    """What PPO makes of a task, arrays or shapes: see `policy_stage`."""

    algorithm: "Algorithm"
    born: Callable[[jax.Array], dict[str, PyTree]]
    axes: dict[str, PyTree]
    loaded: dict[str, PyTree]
    frozen: dict[str, PyTree]


def parts(config: Config, task: Task) -> Parts:
    """The algorithm with the value function that the config names, and the parameters that it trains."""
    model = task.start.model
    critic, critic_params = _value_start(config, task)

    def born(key: jax.Array) -> dict[str, PyTree]:
        value = critic.init_trained(jax.random.fold_in(key, 1))
        return {"policy": model.init_trained(key), "value": _value_tree(config, value)}

    return Parts(
        Algorithm(config, model, critic, Tokens.of(config, task.tokenizer)),
        born,
        axes={"policy": model.trained_axes(), "value": _value_tree(config, critic.trained_axes())},
        loaded={"policy": task.start.params, "value": critic_params},
        frozen={"value": {} if config.value == "shared" else frozen_part(critic, critic_params)},
    )


def _value_tree(config: Config, tree: PyTree) -> PyTree:
    """A value function on the policy's trunk has a head of its own only."""
    return {"head": tree["head"]} if config.value == "shared" else tree


def _value_start(config: Config, task: Task) -> tuple[Model, PyTree]:
    """The value function and what of its parameters is loaded; what is not stays as it was born."""
    if config.value == "reward":
        if not isinstance(task.reward, ModelReward):
            raise ConfigError(f'ppo.value="reward": {config.reward} is no model; use "policy" or "shared"')
        model, loaded = task.reward.model, dict(task.reward.params)
    else:
        model = Model(task.start.model.config, "scalar")
        loaded = {} if config.value == "shared" else {"backbone": task.start.params["backbone"]}
    if config.value_head == "zero" or (config.value_head == "loaded" and "head" not in loaded):
        loaded["head"] = {"kernel": jnp.zeros(model.config.d_model), "bias": jnp.zeros(())}
    elif config.value_head == "normal":
        loaded.pop("head", None)
    return dataclasses.replace(model, lora=config.lora), loaded


@dataclasses.dataclass(frozen=True)
class Experience:
    """An iteration's rollouts with all that is constant over its epochs: arrays, or shapes where a run is planned."""

    tokens: Any  # [b, p + r]
    segments: Any  # [b, p + r]
    mask: Any  # [b, r]
    logprobs: Any  # [b, r] of the policy that sampled
    values: Any  # [b, r]
    advantages: Any  # [b, r]
    returns: Any  # [b, r]
    rewards: Any = None  # [b, r], where advantages are made from them in every minibatch
    ref_logprobs: Any = None  # [b, r], where the KL is in the loss


jax.tree_util.register_dataclass(Experience)


class Algorithm(PolicyAlgorithm):
    """PPO's jitted pieces for one policy and one value function."""

    def __init__(self, config: Config, model: Model, critic: Model, tokens: Tokens):
        super().__init__(config, model, tokens)
        self.critic = critic
        self.tx = optax.partition(
            {
                "policy": make_optimizer(config.optim, config.updates),
                "value": make_optimizer(config.value_optim, config.updates),
            },
            lambda params: {name: jax.tree.map(lambda _, n=name: n, tree) for name, tree in params.items()},
        )
        self.prepare = jax.jit(self._prepare)
        self.update = jax.jit(self._update, donate_argnums=0)

    # ------------------------------------------------------------------ score -> advantages

    def _know(self, params: PyTree, reference: PyTree, rollout: Rollout) -> Known:
        values = self._values(params, rollout.tokens, rollout.segments, rollout.mask.shape[1]) * rollout.mask
        return super()._know(params, reference, rollout)._replace(values=values)

    def _prepare(
        self, state: states.TrainState, known: Known, rollout: Rollout, scores: jax.Array
    ) -> tuple[Experience, Pairs]:
        """Rewards and advantages of a rollout; nothing here has a gradient."""
        c, mask = self.config, rollout.mask
        old_logprobs, ref_logprobs, values = known
        shaped, ended, pairs = self.shape(scores, rollout)
        penalty, sequence_kl = self.kl_to_reference(old_logprobs, ref_logprobs, mask)
        beta = state.extra["kl_coefficient"]
        rewards = shaping.token_rewards(shaped, penalty, mask, beta=beta)
        if c.whiten_rewards == "batch":
            rewards = masked.whiten_keep_mean(rewards, mask)
        advantage, returns = advantages.gae(rewards, values, mask, gamma=c.gamma, lam=c.lam)
        if c.whiten_advantages == "batch":
            advantage = masked.whiten(advantage, mask)
        n = jnp.float32(mask.shape[0])
        pairs |= {
            "score": (scores.sum(), n),
            "reward": ((shaped - beta * sequence_kl).sum(), n),
            "kl": (sequence_kl.sum(), n),
            "response_length": (mask.sum(), n),
            "eos_rate": (ended.astype(jnp.float32).sum(), n),
            "value_explained_variance": value.explained_variance(values, returns, mask),
            "kl_coefficient": (beta, jnp.ones(())),
        }
        experience = Experience(
            rollout.tokens,
            rollout.segments,
            mask,
            old_logprobs,
            values,
            advantage,
            returns,
            rewards=rewards if c.whiten_rewards == "minibatch" else None,
            ref_logprobs=ref_logprobs if c.kl.place == "loss" else None,
        )
        return experience, pairs

    def _values(self, params: PyTree, tokens: jax.Array, segments: jax.Array, r: int) -> jax.Array:
        if self.config.value == "shared":
            hidden = response_hidden(self.model, params["policy"], tokens, segments, r)
        else:
            hidden = response_hidden(self.critic, params["value"], tokens, segments, r)
        return self.critic.scalar(params["value"], hidden)

    # ------------------------------------------------------------------ minibatch epochs

    def loss(
        self, params: PyTree, batch: Experience, key: jax.Array | None, beta: jax.Array | float = 0.0
    ) -> tuple[jax.Array, Pairs]:
        """Clipped policy loss + value_coefficient x value loss - entropy_coefficient x entropy, mean over tokens.

        beta weighs the KL to the reference where that is in the loss.
        """
        c, mask, r = self.config, batch.mask, batch.mask.shape[1]
        hidden = response_hidden(self.model, params["policy"], batch.tokens, batch.segments, r)
        logprobs, entropy = self.model.logprobs(params["policy"], hidden, batch.tokens[:, -r:], c.temperature)
        if c.value == "shared":
            values = self.critic.scalar(params["value"], hidden)
        else:
            values = self._values(params, batch.tokens, batch.segments, r)
        terms = {
            "policy": (1.0, policy.ppo_loss(logprobs, batch.logprobs, batch.advantages, mask, clip=c.clip)),
            "value": (c.value_coefficient, self._value_loss(values, batch)),
        }
        if c.entropy_coefficient:
            terms["entropy"] = (1.0, policy.entropy_bonus(entropy, mask, coefficient=c.entropy_coefficient))
        if c.kl.place == "loss":
            terms["kl"] = (beta, self._kl_loss(logprobs, batch))
        total, pairs = add_losses(**terms)
        return total, pairs | {"entropy": masked.token_mean(jax.lax.stop_gradient(entropy), mask)}

    def _value_loss(self, values: jax.Array, batch: Experience) -> tuple[jax.Array, Pairs]:
        if self.config.value_clip:
            return value.clipped_value_loss(
                values, batch.values, batch.returns, batch.mask, clip=self.config.value_clip
            )
        return value.value_loss(values, batch.returns, batch.mask)

    def _kl_loss(self, logprobs: jax.Array, batch: Experience) -> tuple[jax.Array, Pairs]:
        """Summed over a minibatch's tokens and weighted by tokens, as the terms it joins.

        Of `sequence`, too, only the sum is used: divided by tokens it is what a KL in the reward comes to.
        """
        scalar, pairs = super()._kl_loss(logprobs, batch)
        return scalar, {**pairs, "loss": (pairs["loss"][0], batch.mask.sum())}

    def _update(
        self,
        state: states.TrainState,
        experience: Experience,
        text: dict[str, jax.Array],
        pairs: Pairs,
        key: jax.Array,
        frozen: PyTree | None = None,
    ) -> tuple[states.TrainState, Pairs]:
        """The epochs of an iteration, then its KL coefficient and averages."""
        loss = functools.partial(self.loss, beta=state.extra["kl_coefficient"])
        rows = (state, experience, text, key)
        state, more = minibatch_epochs(self.config, self.tx, self.model, loss, *rows, self._whitened, frozen)
        return end_iteration(self.config, state, pairs), more

    def _whitened(self, batch: Experience) -> Experience:
        c = self.config
        if c.whiten_rewards == "minibatch":
            rewards = masked.whiten_keep_mean(batch.rewards, batch.mask)
            advantage, returns = advantages.gae(rewards, batch.values, batch.mask, gamma=c.gamma, lam=c.lam)
            batch = dataclasses.replace(batch, advantages=advantage, returns=returns)
        if c.whiten_advantages == "minibatch":
            batch = dataclasses.replace(batch, advantages=masked.whiten(batch.advantages, batch.mask))
        return batch
