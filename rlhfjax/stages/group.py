"""Policy gradients without a value function: K responses to a prompt are each other's baseline.

One stage for RLOO, GRPO, Dr. GRPO, DAPO and REINFORCE with a moving baseline: K responses per
prompt -> score -> advantages within each group -> minibatch epochs. `estimator` names the pair of
functions in `algos/group.py`.

Ahmadian et al. 2024 (RLOO); Shao et al. 2024 (GRPO); Liu et al. 2025 (Dr. GRPO); Yu et al. 2025
(DAPO); Williams 1992 (REINFORCE).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
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
from rlhfjax.models.experts import add_balance
from rlhfjax.models.transformer import Model
from rlhfjax.optim import make_optimizer
from rlhfjax.ranges import Positive, PositiveCount, ShareBelow1, Size, TokensOrNone
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
from rlhfjax.rl.rewards import kl_loss, kl_penalty, rollout_metrics, shape_rewards
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
from rlhfjax.types import Loss, Metrics, PyTree, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PolicyConfig):
    """The group stage's own options; those of every policy stage are in PolicyConfig.

    batch_size counts *prompts* per iteration; an iteration has batch_size times K episodes.
    """

    stage: str = "group"
    estimator: Literal["rloo", "grpo", "dr_grpo", "dapo", "reinforce"] = "rloo"
    """How advantages are estimated, and the loss that goes with them."""
    samples_per_prompt: Size = 4
    """K, responses per prompt."""
    epochs: PositiveCount = 1
    """Passes over the episodes of an iteration."""
    minibatches: Size = 1
    """Minibatches per epoch, with one update each."""
    clip: Positive = 0.2
    """Probability ratios are clipped to [1 - clip, 1 + clip]."""
    clip_high: Positive = 0.28
    """dapo: ratios are clipped to [1 - clip, 1 + clip_high] (DAPO, section 4.1)."""
    baseline_decay: ShareBelow1 = 0.9
    """reinforce: decay of the moving baseline per iteration."""
    overlong: Literal["keep", "leave_out"] = "keep"
    """Whether responses that hit the length limit are in the loss; DAPO leaves them out."""
    overlong_soft: TokensOrNone = 0
    """Last tokens before max_new_tokens over which the score falls by 1 (DAPO eq. 13); 0 is off."""
    only_informative: bool = False
    """Whether to leave groups of equal scores (KL aside) out of the loss."""


class Estimator(NamedTuple):
    """How advantages and the loss are computed, and which KL may join that loss."""

    # (scores, penalties) -> advantages, all [p, k]; a penalty is beta times the KL of a response.
    # None: scores minus penalties minus the moving baseline.
    advantages: Callable[[jax.Array, jax.Array], jax.Array] | None
    # (config, logprobs, minibatch, beta) -> (scalar, metrics)
    loss: Callable[["Config", jax.Array, "Experience", Any], Loss]
    kl_losses: tuple[str, ...] = ()


class Experience(NamedTuple):
    """An iteration's rollout with everything that is constant over its epochs."""

    tokens: Any  # [b, p + r]
    attention_mask: Any  # [b, p + r]
    mask: Any  # [b, r], 0 also in responses that are left out of the loss
    logprobs: Any  # [b, r] of the policy that sampled
    advantages: Any  # [b], computed within whole groups
    ref_logprobs: Any  # [b, r]


def _reinforce(c: Config, logprobs: jax.Array, batch: Experience, beta: Any) -> Loss:
    return group.rloo_loss(logprobs, batch.advantages, batch.mask)


def _grpo(c: Config, logprobs: jax.Array, batch: Experience, beta: Any) -> Loss:
    """If the KL is in the reward, the loss has none."""
    in_loss = c.kl.place == "loss"
    scalar, metrics = group.grpo_loss(
        logprobs,
        batch.logprobs,
        batch.ref_logprobs,
        batch.advantages,
        batch.mask,
        clip=c.clip,
        beta=beta if in_loss else 0.0,
    )
    left_out = ("kl",) if in_loss else ("kl", "kl_clamped")
    return scalar, {name: x for name, x in metrics.items() if name not in left_out}


def _dr_grpo(c: Config, logprobs: jax.Array, batch: Experience, beta: Any) -> Loss:
    return group.dr_grpo_loss(
        logprobs,
        batch.logprobs,
        batch.advantages,
        batch.mask,
        clip=c.clip,
        length=c.max_new_tokens,
    )


def _dapo(c: Config, logprobs: jax.Array, batch: Experience, beta: Any) -> Loss:
    return group.dapo_loss(
        logprobs,
        batch.logprobs,
        batch.advantages,
        batch.mask,
        clip_low=c.clip,
        clip_high=c.clip_high,
    )


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


def model_name(config: Mapping[str, Any]) -> str:
    """Returns the name of the estimator."""
    name = str(config.get("estimator", "group"))
    return "Dr. GRPO" if name == "dr_grpo" else name.upper()


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
            f"group.samples_per_prompt=1: must be >= 2, {name} compares responses"
        )
    if config.kl.place == "loss" and config.kl.estimator not in estimator.kl_losses:
        allowed = ", ".join(estimator.kl_losses) or "none (put the KL in the reward)"
        raise ConfigError(
            f"group.kl.estimator={config.kl.estimator!r}: "
            f"in the loss of {name} there can be {allowed}"
        )
    if config.entropy_coefficient and name != "dapo":
        raise ConfigError(
            f"group.entropy_coefficient={config.entropy_coefficient}: must be 0 "
            f"with {name}; only the loss of dapo is a mean over tokens, as the bonus is"
        )
    if config.overlong_soft > config.max_new_tokens:
        raise ConfigError(
            f"group.overlong_soft={config.overlong_soft}: "
            f"must be <= max_new_tokens={config.max_new_tokens}"
        )
    if config.overlong == "leave_out" and not config.stop_at_eos:
        raise ConfigError(
            'group.overlong="leave_out": needs stop_at_eos=True, '
            "without it every response hits the length limit"
        )
    if config.one_step_off and estimator.loss is _reinforce:
        raise ConfigError(
            f"group.one_step_off: needs a ratio that corrects for it; "
            f"{name} has none, grpo, dr_grpo and dapo have"
        )
    if config.only_informative and estimator.advantages is None:
        raise ConfigError(
            "group.only_informative: must be False with reinforce, which has no groups"
        )


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    """Returns the stage. Its `step` is one iteration."""
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

    extra_state = {}
    if config.estimator == "reinforce":
        extra_state["baseline"] = jnp.zeros(())
    return policy_stage(config, task, jitted.tx, step, extra_state=extra_state)


def programs(config: Config, model: Model, ids: TokenIds) -> Programs:
    """Returns the jitted functions of an iteration; they are below in the order of use."""
    c, estimator = config, ESTIMATORS[config.estimator]
    tx = make_optimizer(c.optim, c.updates)
    rollout_logprobs = make_rollout_logprobs(c, model)
    forward = make_forward_passes(c, rollout_logprobs)

    # ------------------------------------------------------------------ score -> advantages

    def make_experience(
        state: TrainState, outputs: ForwardOutputs, rollout: Rollout, scores: jax.Array
    ) -> tuple[Experience, Metrics]:
        """Returns one advantage per response, from the rewards of its whole group.

        Nothing here has a gradient.
        """
        mask = rollout.mask
        old_logprobs, ref_logprobs, _ = outputs
        shaped, ended, metrics = shape_rewards(c, ids, scores, rollout)
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
        in_loss = mask
        if c.overlong == "leave_out":
            in_loss = in_loss * ended[:, None]
        if c.only_informative:
            in_loss = in_loss * informative[:, None]
        experience = Experience(
            tokens=rollout.tokens,
            attention_mask=rollout.attention_mask,
            mask=in_loss,
            logprobs=old_logprobs,
            advantages=compute_advantages(
                groups, penalties.reshape(groups.shape), state
            ),
            ref_logprobs=ref_logprobs,
        )
        return experience, metrics

    def compute_advantages(
        scores: Float[Array, "p k"], penalties: Float[Array, "p k"], state: TrainState
    ) -> Float[Array, "b"]:
        if estimator.advantages is not None:
            return estimator.advantages(scores, penalties).reshape(-1)
        # The mean of the iterations before this one, without the zero that it started from.
        weight = 1 - c.baseline_decay ** state.step.astype(jnp.float32)
        rewards = (scores - penalties).reshape(-1)
        return rewards - masked.divide(state.extra["baseline"], weight)

    # ------------------------------------------------------------------ minibatch epochs

    def loss(
        params: PyTree, batch: Experience, key: jax.Array | None, beta: Scalar = 0.0
    ) -> Loss:
        """Returns the estimator's loss, with KL and entropy bonus if the config adds them."""
        mask = batch.mask
        outputs = response_outputs(c, model, params["policy"], batch)
        logprobs, entropy = outputs.logprobs, outputs.entropy
        policy_loss = estimator.loss(c, logprobs, batch, beta)
        terms: dict[str, tuple[Scalar, Loss]] = {"policy": (1.0, policy_loss)}
        if c.entropy_coefficient:
            bonus = policy.entropy_bonus(
                entropy, mask, coefficient=c.entropy_coefficient
            )
            terms["entropy"] = (1.0, bonus)
        if c.kl.place == "loss" and c.kl.estimator != "grpo":
            terms["kl"] = (beta, kl_loss(c.kl, logprobs, batch))
        total, metrics = add_losses(**terms)
        log_ratio = policy.log_ratio(logprobs, batch.logprobs, mask)
        metrics = policy.ratio_metrics(log_ratio, mask) | metrics
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
        """Runs the epochs of an iteration, then adapts KL coefficient, EMA weights and baseline."""
        minibatch_loss = functools.partial(loss, beta=state.extra["kl_coefficient"])
        learner = Learner(c, model, tx, minibatch_loss)
        state, update_metrics = minibatch_epochs(
            learner, state, experience, text, key, frozen
        )
        if "baseline" in state.extra:
            reward = jnp.divide(*metrics["advantage_reward"])
            baseline = group.moving_baseline(
                state.extra["baseline"], reward[None], decay=c.baseline_decay
            )
            state = state.replace(extra={**state.extra, "baseline": baseline})
        return end_iteration(c, state, metrics), update_metrics

    return jit_programs(
        rollout_logprobs=rollout_logprobs,
        forward=forward,
        make_experience=make_experience,
        update=update,
        loss=loss,
        tx=tx,
    )
