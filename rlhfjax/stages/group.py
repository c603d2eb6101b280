"""Policy gradients without a value function: K answers to a prompt are each other's baseline.

One stage for RLOO, GRPO, Dr. GRPO, DAPO and REINFORCE with a moving baseline: K samples a prompt -> score -> advantages
within each group -> minibatch epochs. `estimator` names the pair of functions in `algos/group.py`.

Ahmadian et al. 2024 (RLOO); Shao et al. 2024 (GRPO); Liu et al. 2025 (Dr. GRPO); Yu et al. 2025 (DAPO); Williams 1992.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhfjax.algos import group, kl, masked, policy, shaping
from rlhfjax.algos.combine import add_losses
from rlhfjax.data.batches import PolicyBatch, TokenBatch
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout
from rlhfjax.metrics import merge
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.optim import make_optimizer
from rlhfjax.ranges import Positive, PositiveCount, ShareBelow1, Size, TokensOrNone
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
from rlhfjax.rl.task import open_task
from rlhfjax.roles import DISK, Sources
from rlhfjax.stage import Stage
from rlhfjax.state import TrainState, merge_params
from rlhfjax.streams import UPDATE
from rlhfjax.types import Metrics, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    """See PolicyConfig for the options of every policy stage; batch_size counts *prompts* of an iteration."""

    stage: str = "group"
    estimator: Literal["rloo", "grpo", "dr_grpo", "dapo", "reinforce"] = "rloo"
    samples_per_prompt: Size = (
        4  # K, answers to a prompt; an iteration has batch_size times K episodes
    )
    epochs: PositiveCount = 1
    minibatches: Size = 1
    clip: Positive = 0.2
    clip_high: Positive = 0.28  # of dapo; DAPO, section 4.1
    baseline_decay: ShareBelow1 = 0.9  # of reinforce, an iteration
    overlong: Literal["keep", "leave_out"] = (
        "keep"  # what hit the length limit in the loss; DAPO leaves it out
    )
    overlong_soft: TokensOrNone = 0  # last tokens before max_new_tokens over which the score falls by 1 (DAPO eq. 13); 0: off
    only_informative: bool = (
        False  # groups of equal scores (without a KL) do not count in the mean
    )

    @property
    def episodes(self) -> int:
        return self.batch_size * self.samples_per_prompt


class Estimator(NamedTuple):
    """How advantages and then the loss are made, and which KL may join that loss."""

    # (scores, penalties) -> advantages, all [p, k]; a penalty is beta times the KL of a response.
    # None: scores minus penalties minus the moving baseline.
    advantages: Callable[[jax.Array, jax.Array], jax.Array] | None
    loss: Callable[["Config", jax.Array, "Experience", Any], tuple[jax.Array, Metrics]]
    kl_losses: tuple[str, ...] = ()


class Experience(NamedTuple):
    """An iteration's responses with all that is constant over its epochs."""

    tokens: Any  # [b, p + r]
    segments: Any  # [b, p + r]
    mask: Any  # [b, r], 0 also in responses that are left out of the loss
    logprobs: Any  # [b, r] of the policy that sampled
    advantages: Any  # [b], made within whole groups
    ref_logprobs: Any  # [b, r]


def _reinforce(
    c: Config, logprobs: jax.Array, batch: Experience, beta: Any
) -> tuple[jax.Array, Metrics]:
    return group.rloo_loss(logprobs, batch.advantages, batch.mask)


def _grpo(
    c: Config, logprobs: jax.Array, batch: Experience, beta: Any
) -> tuple[jax.Array, Metrics]:
    """With the KL in the reward there is none here."""
    rows = (logprobs, batch.logprobs, batch.ref_logprobs, batch.advantages, batch.mask)
    in_loss = c.kl.place == "loss"
    scalar, pairs = group.grpo_loss(*rows, clip=c.clip, beta=beta if in_loss else 0.0)
    left_out = ("kl",) if in_loss else ("kl", "kl_clamped")
    return scalar, {name: pair for name, pair in pairs.items() if name not in left_out}


def _dr_grpo(
    c: Config, logprobs: jax.Array, batch: Experience, beta: Any
) -> tuple[jax.Array, Metrics]:
    rows = (logprobs, batch.logprobs, batch.advantages, batch.mask)
    return group.dr_grpo_loss(*rows, clip=c.clip, length=c.max_new_tokens)


def _dapo(
    c: Config, logprobs: jax.Array, batch: Experience, beta: Any
) -> tuple[jax.Array, Metrics]:
    rows = (logprobs, batch.logprobs, batch.advantages, batch.mask)
    return group.dapo_loss(*rows, clip_low=c.clip, clip_high=c.clip_high)


def _rloo_advantages(scores: jax.Array, penalties: jax.Array) -> jax.Array:
    return group.rloo_advantages(scores - penalties)


def _dr_grpo_advantages(scores: jax.Array, penalties: jax.Array) -> jax.Array:
    return group.dr_grpo_advantages(scores - penalties)


ESTIMATORS = {
    "rloo": Estimator(_rloo_advantages, _reinforce, ("sequence",)),
    "grpo": Estimator(group.grpo_advantages, _grpo, ("grpo",)),
    "dr_grpo": Estimator(_dr_grpo_advantages, _dr_grpo),
    "dapo": Estimator(group.grpo_advantages, _dapo, ("k1", "k2", "k3")),
    "reinforce": Estimator(None, _reinforce, ("sequence",)),
}


roles = policy_roles
workload = policy_workload


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    validate_policy(config, layout, model_config)
    name, estimator = config.estimator, ESTIMATORS[config.estimator]
    if config.samples_per_prompt == 1 and estimator.advantages is not None:
        raise ConfigError(
            f"group.samples_per_prompt={config.samples_per_prompt}: {name} compares at least 2 answers to a prompt"
        )
    if config.kl.place == "loss" and config.kl.estimator not in estimator.kl_losses:
        known = ", ".join(estimator.kl_losses) or "none (put it in the reward)"
        raise ConfigError(
            f"group.kl.estimator={config.kl.estimator!r}: in the loss of {name} there can be {known}"
        )
    if config.entropy_coefficient and name != "dapo":
        raise ConfigError(
            f"group.entropy_coefficient: a bonus per token joins a mean over tokens, dapo's, not {name}'s"
        )
    if config.overlong_soft > config.max_new_tokens:
        raise ConfigError(
            f"group.overlong_soft={config.overlong_soft}: it lies within max_new_tokens={config.max_new_tokens} tokens"
        )
    if config.overlong == "leave_out" and not config.stop_at_eos:
        raise ConfigError(
            'group.overlong="leave_out": with stop_at_eos=False every answer hits the length limit'
        )
    if config.one_step_off and estimator.loss is _reinforce:
        raise ConfigError(
            f"group.one_step_off: {name} has no ratio to correct for it; grpo, dr_grpo and dapo have"
        )
    if config.only_informative and estimator.advantages is None:
        raise ConfigError(
            "group.only_informative: reinforce has no groups, equal rewards may be worth learning from"
        )


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

    extra = {"baseline": jnp.zeros(())} if config.estimator == "reinforce" else {}
    return policy_stage(config, task, made.tx, step, extra=extra)


def programs(config: Config, model: Model, tokens: Tokens) -> Programs:
    """Returns the jitted functions of an iteration, in their order."""
    c, estimator = config, ESTIMATORS[config.estimator]
    tx = make_optimizer(c.optim, c.updates)
    logprobs_of = logprobs_with(c, model)

    # ------------------------------------------------------------------ score -> advantages

    def forward(params: PyTree, reference: PyTree | None, rollout: Rollout) -> Forward:
        """All passes that need no score; of a reference on another mesh, pass None."""
        ref_logprobs = None if reference is None else logprobs_of(reference, rollout)
        logprobs = behavior_logprobs(c, logprobs_of, params["policy"], rollout)
        return Forward(logprobs, ref_logprobs)

    def make_experience(
        state: TrainState, known: Forward, rollout: Rollout, scores: jax.Array
    ) -> tuple[Experience, Metrics]:
        """One advantage per response, from the rewards of its whole group; nothing here has a gradient."""
        mask = rollout.mask
        old_logprobs, ref_logprobs, _ = known
        shaped, ended, metrics = shape_rewards(c, tokens, scores, rollout)
        if c.overlong_soft:
            shaped = shaped + shaping.overlong_penalty(
                mask, limit=c.max_new_tokens, soft=c.overlong_soft
            )
        penalty, sequence_kl = kl_penalty(c.kl, old_logprobs, ref_logprobs, mask)
        beta = state.extra["kl_coefficient"]
        penalties = beta * kl.sequence_kl(penalty, mask)
        groups = shaped.reshape(-1, c.samples_per_prompt)
        informative = jnp.repeat(group.informative(groups), c.samples_per_prompt)
        metrics |= rollout_metrics(scores, shaped, beta, sequence_kl, ended, mask)
        n = jnp.float32(mask.shape[0])
        metrics |= {
            "kl_coefficient": (beta, jnp.ones(())),
            "informative": (informative.astype(jnp.float32).sum(), n),
            "group_std": (jnp.std(groups, axis=1).sum(), jnp.float32(groups.shape[0])),
            "advantage_reward": ((shaped - penalties).sum(), n),
        }
        counted = mask
        if c.overlong == "leave_out":
            counted = counted * ended[:, None]
        if c.only_informative:
            counted = counted * informative[:, None]
        experience = Experience(
            tokens=rollout.tokens,
            segments=rollout.segments,
            mask=counted,
            logprobs=old_logprobs,
            advantages=advantages_of(groups, penalties.reshape(groups.shape), state),
            ref_logprobs=ref_logprobs,
        )
        return experience, metrics

    def advantages_of(
        scores: Float[Array, "p k"], penalties: Float[Array, "p k"], state: TrainState
    ) -> Float[Array, "b"]:
        if estimator.advantages is not None:
            return estimator.advantages(scores, penalties).reshape(-1)
        # the average of the iterations before this one, free of the zero that it began with
        weight = 1 - c.baseline_decay ** state.step.astype(jnp.float32)
        return (scores - penalties).reshape(-1) - masked.divide(
            state.extra["baseline"], weight
        )

    # ------------------------------------------------------------------ minibatch epochs

    def loss(
        params: PyTree,
        batch: Experience,
        key: jax.Array | None,
        beta: jax.Array | float = 0.0,
    ) -> tuple[jax.Array, Metrics]:
        """The estimator's surrogate, and what joins it: KL in the loss, entropy bonus."""
        mask, r = batch.mask, batch.mask.shape[1]
        hidden = response_hidden(
            model, params["policy"], batch.tokens, batch.segments, r
        )
        logprobs, entropy = model.logprobs(
            params["policy"], hidden, batch.tokens[:, -r:], c.temperature
        )
        terms = {"policy": (1.0, estimator.loss(c, logprobs, batch, beta))}
        if c.entropy_coefficient:
            terms["entropy"] = (
                1.0,
                policy.entropy_bonus(entropy, mask, coefficient=c.entropy_coefficient),
            )
        if c.kl.place == "loss" and c.kl.estimator != "grpo":
            terms["kl"] = (beta, kl_loss(c.kl, logprobs, batch))
        total, metrics = add_losses(**terms)
        ratios = policy.ratio_metrics(
            policy.log_ratio(logprobs, batch.logprobs, mask), mask
        )
        return total, ratios | metrics | {
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
        """The epochs of an iteration, then its KL coefficient, averages and baseline."""
        of_minibatch = functools.partial(loss, beta=state.extra["kl_coefficient"])
        rows = (state, experience, text, key)
        state, update_metrics = minibatch_epochs(
            c, tx, model, of_minibatch, *rows, frozen=frozen
        )
        if "baseline" in state.extra:
            total, n = metrics["advantage_reward"]
            decayed = group.moving_baseline(
                state.extra["baseline"], (total / n)[None], decay=c.baseline_decay
            )
            state = state.replace(extra={**state.extra, "baseline": decayed})
        return end_iteration(c, state, metrics), update_metrics

    return programs_of(logprobs_of, forward, make_experience, update, loss, tx)
