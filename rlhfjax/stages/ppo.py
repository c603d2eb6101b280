"""PPO against a reward, with a KL penalty to a reference: rollout -> score -> advantages -> minibatch epochs.

maximise E[ r(x, y) - beta log pi(y | x) / pi_ref(y | x) ] (+ gamma E[ log pi(x) ] over pretraining text, PPO-ptx)

Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022, eq. 2 and appendix C.4.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhfjax import state as states
from rlhfjax.algos import advantages, ema, kl, masked, policy, shaping, value
from rlhfjax.algos.combine import add_losses
from rlhfjax.config import TrainConfig
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.metrics import merge
from rlhfjax.models import store
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.optim import OptimConfig, make_optimizer
from rlhfjax.rewards.model import ModelReward
from rlhfjax.rewards.responses import Reward, load_reward
from rlhfjax.stages import Finished, Pairs, Stage
from rlhfjax.stages.parts.common import check_length, place
from rlhfjax.stages.parts.language import language_loss
from rlhfjax.stages.parts.prompts import PromptConfig, held_out_prompts, prompt_batches
from rlhfjax.stages.parts.ptx import PtxConfig, with_ptx
from rlhfjax.stages.parts.rollout import Rollout, response_hidden, response_logprobs, sample

PyTree = Any


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """The penalty on log pi / pi_ref. With a target the coefficient adapts (Ziegler et al. 2019, section 2.2)."""

    coefficient: float = 0.05  # reward units per nat; the first one where it adapts
    target: float = 0.0  # nats per sequence; 0: the coefficient is fixed
    horizon: int = 0  # episodes; 10 to 20 batches
    estimator: Literal["k1", "k2", "k3"] = "k1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    stage: str = "ppo"
    init_from: str  # the policy at the start, and the reference
    reference: str | None = None  # None: init_from
    reward: str  # a reward stage's workdir, or a scorer such as gold:sentiment
    value: Literal["reward", "policy", "shared"] = (
        "reward"  # trunk of the value function: a copy of one, or the policy's
    )
    prompts: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    eval_prompts: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    gold: str = ""  # a scorer to measure held-out answers with; it is never trained on
    prompt_length: int
    max_new: int
    temperature: float = 1.0
    batch_size: int  # episodes of an iteration
    epochs: int = 4
    minibatches: int = 4  # of an epoch
    microbatches: int = 1  # of a minibatch
    clip: float = 0.2
    value_clip: float = 0.2  # 0: none
    value_coefficient: float = 0.1
    entropy_coefficient: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: Literal["none", "batch", "minibatch"] = "minibatch"
    missing_eos: Literal["none", "penalty", "replace"] = "none"
    missing_eos_value: float = 1.0  # subtracted from the score ("penalty") or put in its place ("replace": -1)
    score_clip: float = 0.0  # 0: none
    kl: KLConfig = dataclasses.field(default_factory=KLConfig)
    ptx: PtxConfig = dataclasses.field(default_factory=PtxConfig)
    ema: float = 0.0  # decay an iteration of averaged weights, which then are the stage's model; 0: none
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    value_optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)


def build(config: Config, layout: Layout) -> Stage:
    start = store.load(config.init_from, layout)
    check(config, layout, start.model.config)
    model = start.model
    if model.head != "lm":
        raise ConfigError(f"ppo.init_from={config.init_from}: a policy is needed, this model has a {model.head} head")
    prompts, tokenizer = prompt_batches(config.prompts, start.tokenizer, config)
    reward = load_reward(config.reward, layout, tokenizer)
    critic, critic_params = _value_start(config, start, reward)
    reference = start.params if config.reference is None else store.load(config.reference, layout).params
    algorithm = Algorithm(config, model, critic, tokenizer.eos_id, tokenizer.pad_id)
    batches = with_ptx(config.ptx, prompts, tokenizer, config)
    measure = _held_out(config, algorithm, reward, reference, tokenizer, layout)

    def init(key: jax.Array) -> states.TrainState:
        params = {"policy": model.init(key), "value": _value_tree(config, critic.init(jax.random.fold_in(key, 1)))}
        extra = {"kl_coefficient": jnp.float32(config.kl.coefficient)}
        if config.ema:
            extra["ema"] = {"policy": jax.tree.map(jnp.array, params["policy"])}
        return states.TrainState.create(params, algorithm.tx, **extra)

    def load(state: states.TrainState) -> states.TrainState:
        params = {
            "policy": place(start.params, state.params["policy"]),
            "value": place(critic_params, state.params["value"]),
        }
        extra = dict(state.extra)
        if config.ema:
            extra["ema"] = {"policy": place(start.params, state.params["policy"])}
        return state.replace(params=params, extra=extra)

    def step(state: states.TrainState, batch: dict[str, jax.Array], key: jax.Array) -> tuple[Any, Pairs]:
        rollout = algorithm.rollout(state.params["policy"], batch["prompts"], batch["segments"], key)
        scores = layout.put_rows(reward(rollout.tokens, rollout.segments, rollout.mask))
        experience, pairs = algorithm.prepare(state, reference, rollout, scores)
        text = {name[4:]: rows for name, rows in batch.items() if name.startswith("ptx/")}
        state, more = algorithm.update(state, experience, text, pairs["kl"], jax.random.fold_in(key, 1))
        return state, merge(pairs, more)

    def finish(state: states.TrainState) -> Finished:
        trained = state.extra["ema"]["policy"] if config.ema else state.params["policy"]
        models = {store.FOLDER: store.SavedModel(model, trained, start.tokenizer)}
        if config.value != "shared":
            models["value"] = store.SavedModel(critic, state.params["value"], start.tokenizer)
        return Finished(models, {}, {})

    return Stage(
        init=init,
        axes={"policy": model.axes(), "value": _value_tree(config, critic.axes())},
        start=load,
        batches=batches,
        step=step,
        evals=measure,
        finish=finish,
        units=config.batch_size * config.max_new,
    )


def check(config: Config, layout: Layout, shape: TransformerConfig | None) -> None:
    """Refuses what cannot be meant, before anything is computed."""
    layout.check_batch(config.batch_size, "ppo.batch_size")
    check_length(config.prompt_length + config.max_new, shape, "ppo.prompt_length + max_new")
    if min(config.epochs, config.minibatches, config.microbatches) < 1:
        raise ConfigError("ppo: epochs, minibatches and microbatches are at least 1")
    if config.batch_size % (config.minibatches * config.microbatches):
        raise ConfigError(
            f"ppo.batch_size={config.batch_size} is not divisible by minibatches={config.minibatches} times "
            f"microbatches={config.microbatches}"
        )
    layout.check_batch(config.batch_size // config.minibatches // config.microbatches, "a ppo microbatch")
    if config.temperature <= 0:
        raise ConfigError(f"ppo.temperature={config.temperature}: a rollout is sampled, it must be above 0")
    if config.kl.target and not config.kl.horizon:
        raise ConfigError("ppo.kl.horizon: an adaptive coefficient needs one; 10 to 20 times batch_size")


def _value_tree(config: Config, tree: PyTree) -> PyTree:
    """A value function on the policy's trunk has a head of its own only."""
    return {"head": tree["head"]} if config.value == "shared" else tree


def _value_start(config: Config, start: store.SavedModel, reward: Reward) -> tuple[Model, PyTree]:
    """The value function and what of its parameters is loaded; a head that is not loaded starts at 0."""
    if config.value == "reward":
        if not isinstance(reward, ModelReward):
            raise ConfigError(f'ppo.value="reward": {config.reward} is no model; use "policy" or "shared"')
        return reward.model, reward.params
    model = Model(start.model.config, "scalar")
    head = {"kernel": jnp.zeros(model.config.d_model), "bias": jnp.zeros(())}
    return model, {"head": head} if config.value == "shared" else {"backbone": start.params["backbone"], "head": head}


@dataclasses.dataclass(frozen=True)
class Experience:
    """An iteration's rollouts with everything that is constant over its epochs."""

    tokens: jax.Array  # [b, p + r]
    segments: jax.Array  # [b, p + r]
    mask: jax.Array  # [b, r]
    logprobs: jax.Array  # [b, r] of the policy that sampled
    values: jax.Array  # [b, r]
    advantages: jax.Array  # [b, r]
    returns: jax.Array  # [b, r]


jax.tree_util.register_dataclass(Experience)


class Algorithm:
    """PPO's jitted pieces for one policy and one value function."""

    def __init__(self, config: Config, model: Model, critic: Model, eos_id: int, pad_id: int):
        self.config, self.model, self.critic = config, model, critic
        self.eos_id, self.pad_id = eos_id, pad_id
        updates = config.steps * config.epochs * config.minibatches
        self.tx = optax.partition(
            {
                "policy": make_optimizer(config.optim, updates),
                "value": make_optimizer(config.value_optim, updates),
            },
            lambda params: {name: jax.tree.map(lambda _, n=name: n, tree) for name, tree in params.items()},
        )
        self.prepare = jax.jit(self._prepare)
        self.update = jax.jit(self._update, donate_argnums=0)

    def rollout(self, params: PyTree, prompts: jax.Array, segments: jax.Array, key: jax.Array) -> Rollout:
        limits = {"max_new": self.config.max_new, "eos_id": self.eos_id, "pad_id": self.pad_id}
        return sample(self.model, params, prompts, segments, key, temperature=self.config.temperature, **limits)

    # ------------------------------------------------------------------ score -> advantages

    def _prepare(
        self, state: states.TrainState, reference: PyTree, rollout: Rollout, scores: jax.Array
    ) -> tuple[Experience, Pairs]:
        """Rewards, values and advantages of a rollout; nothing here has a gradient."""
        c, mask, r = self.config, rollout.mask, rollout.mask.shape[1]
        rows = (rollout.tokens, rollout.segments)
        ref_logprobs, _ = response_logprobs(self.model, reference, *rows, r, c.temperature)
        values = self._values(state.params, *rows, r) * mask
        per_token = getattr(kl, c.kl.estimator)(rollout.logprobs, ref_logprobs) * mask
        ended = shaping.has_token(rollout.responses, mask, self.eos_id)
        shaped = self._shape(scores, ended)
        beta = state.extra["kl_coefficient"]
        rewards = shaping.token_rewards(shaped, per_token, mask, beta=beta)
        if c.whiten_rewards:
            rewards = masked.whiten_keep_mean(rewards, mask)
        advantage, returns = advantages.gae(rewards, values, mask, gamma=c.gamma, lam=c.lam)
        if c.whiten_advantages == "batch":
            advantage = masked.whiten(advantage, mask)
        n = jnp.float32(mask.shape[0])
        sequence_kl = kl.sequence_kl(per_token, mask)
        pairs = {
            "score": (scores.sum(), n),
            "reward": ((shaped - beta * sequence_kl).sum(), n),
            "kl": (sequence_kl.sum(), n),
            "response_length": (mask.sum(), n),
            "eos_rate": (ended.astype(jnp.float32).sum(), n),
            "value_explained_variance": value.explained_variance(values, returns, mask),
            "kl_coefficient": (beta, jnp.ones(())),
        }
        return Experience(*rows, mask, rollout.logprobs, values, advantage, returns), pairs

    def _shape(self, scores: jax.Array, ended: jax.Array) -> jax.Array:
        c = self.config
        if c.missing_eos == "penalty":
            scores = shaping.penalise_missing_eos(scores, ended, penalty=c.missing_eos_value)
        elif c.missing_eos == "replace":
            scores = shaping.replace_missing_eos(scores, ended, value=c.missing_eos_value)
        return shaping.clip_score(scores, limit=c.score_clip) if c.score_clip else scores

    def _values(self, params: PyTree, tokens: jax.Array, segments: jax.Array, r: int) -> jax.Array:
        if self.config.value == "shared":
            hidden = response_hidden(self.model, params["policy"], tokens, segments, r)
        else:
            hidden = response_hidden(self.critic, params["value"], tokens, segments, r)
        return self.critic.scalar(params["value"], hidden)

    # ------------------------------------------------------------------ minibatch epochs

    def loss(self, params: PyTree, batch: Experience, key: jax.Array | None) -> tuple[jax.Array, Pairs]:
        """Clipped policy loss + value_coefficient x value loss - entropy_coefficient x entropy, mean over tokens."""
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
        total, pairs = add_losses(**terms)
        return total, pairs | {"entropy": masked.token_mean(jax.lax.stop_gradient(entropy), mask)}

    def _value_loss(self, values: jax.Array, batch: Experience) -> tuple[jax.Array, Pairs]:
        if self.config.value_clip:
            return value.clipped_value_loss(
                values, batch.values, batch.returns, batch.mask, clip=self.config.value_clip
            )
        return value.value_loss(values, batch.returns, batch.mask)

    def _update(
        self, state: states.TrainState, experience: Experience, text: dict[str, jax.Array], kls: Any, key: jax.Array
    ) -> tuple[states.TrainState, Pairs]:
        """Every epoch visits every episode once, in minibatches of a fresh order; then KL coefficient and averages."""
        c = self.config
        b = experience.mask.shape[0]
        orders = jax.vmap(lambda k: jax.random.permutation(k, b))(jax.random.split(key, c.epochs))
        orders = orders.reshape(c.epochs * c.minibatches, b // c.minibatches)
        texts = jax.tree.map(lambda x: _cycle(x, c.minibatches, c.epochs), text)

        def minibatch(state: states.TrainState, inputs: Any) -> tuple[states.TrainState, Pairs]:
            rows, some_text = inputs
            batch = jax.tree.map(lambda x: x[rows], experience)
            if c.whiten_advantages == "minibatch":
                batch = dataclasses.replace(batch, advantages=masked.whiten(batch.advantages, batch.mask))
            grads, pairs = states.gradients(self.loss, state.params, batch, None, microbatches=c.microbatches)
            if c.ptx.coefficient:
                grads, pairs = self._add_ptx(state.params, grads, pairs, some_text)
            skip = c.on_nonfinite == "skip"
            norms = {f"{k}_grad_norm": (optax.global_norm(g), jnp.ones(())) for k, g in grads.items()}
            state, more = states.apply_gradients(state, grads, self.tx, skip_nonfinite=skip)
            return state, merge(pairs, more, norms)

        state, stacked = jax.lax.scan(minibatch, state, (orders, texts))
        pairs = jax.tree.map(lambda x: x.sum(0), stacked)
        pairs["first_ratio_max"] = jax.tree.map(lambda x: x[0], stacked["ratio_max"])
        return self._advance(state, kls), pairs

    def _add_ptx(self, params: PyTree, grads: PyTree, pairs: Pairs, text: dict[str, jax.Array]) -> tuple[PyTree, Pairs]:
        """Adds coefficient x the gradient of the pretraining loss; the two are accumulated, not averaged."""
        c = self.config.ptx
        more, parts = states.gradients(language_loss(self.model), params["policy"], text, None)
        scale = c.coefficient * (parts["loss"][1] / text["mask"].shape[0] if c.unit == "sequence" else 1.0)
        policy_grads = jax.tree.map(lambda g, m: g + scale * m, grads["policy"], more)
        return {**grads, "policy": policy_grads}, {**pairs, "ptx_loss": parts["loss"]}

    def _advance(self, state: states.TrainState, kls: Any) -> states.TrainState:
        c, extra = self.config, dict(state.extra)
        if c.kl.target:
            extra["kl_coefficient"] = kl.adaptive_kl(
                extra["kl_coefficient"],
                kls[0] / kls[1],
                target=c.kl.target,
                horizon=float(c.kl.horizon),
                episodes=c.batch_size,
            )
        if c.ema:
            extra["ema"] = {"policy": ema.ema_update(extra["ema"]["policy"], state.params["policy"], decay=c.ema)}
        return state.replace(step=state.step + 1, extra=extra)


def _cycle(x: jax.Array, minibatches: int, epochs: int) -> jax.Array:
    """Rows of pretraining text [n, ...] to [epochs * minibatches, n / minibatches, ...], the same text every epoch."""
    return jnp.tile(x.reshape(minibatches, -1, *x.shape[1:]), (epochs,) + (1,) * x.ndim)


def _held_out(
    config: Config, algorithm: Algorithm, reward: Reward, reference: PyTree, tokenizer: Any, layout: Layout
) -> Any:
    """state -> reward, KL to the reference and length of answers to held-out prompts; the draws are always the same."""
    prompts = held_out_prompts(config.eval_prompts, tokenizer, config)
    gold = load_reward(config.gold, layout, tokenizer) if config.gold else None

    @jax.jit
    def sequence_kl(rollout: Rollout) -> jax.Array:
        r = rollout.mask.shape[1]
        ref_logprobs, _ = response_logprobs(
            algorithm.model, reference, rollout.tokens, rollout.segments, r, config.temperature
        )
        return kl.sequence_kl(kl.k1(rollout.logprobs, ref_logprobs), rollout.mask)

    def evals(state: states.TrainState) -> Pairs:
        total: Pairs = {}
        for i, batch in enumerate(prompts.restart()):
            real = (batch["index"] >= 0).astype(np.float32)
            placed = layout.put(batch)
            key = jax.random.fold_in(jax.random.key(config.seed), 2**31 + i)
            rollout = algorithm.rollout(state.params["policy"], placed["prompts"], placed["segments"], key)
            rows = (rollout.tokens, rollout.segments, rollout.mask)
            measured = {
                "val_kl": sequence_kl(rollout),
                "val_proxy": reward(*rows),
                "val_response_length": rollout.mask.sum(1),
                "val_eos_rate": shaping.has_token(rollout.responses, rollout.mask, tokenizer.eos_id),
            }
            if gold is not None:
                measured["val_gold"] = gold(*rows)
            measured = {name: np.asarray(jax.device_get(x), np.float32) for name, x in measured.items()}
            total = merge(total, {name: (float((x * real).sum()), float(real.sum())) for name, x in measured.items()})
        return total

    return evals
