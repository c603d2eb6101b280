"""What stages that improve a policy against a reward share: sampling, scoring, and the Stage around an algorithm."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhfjax import state as states
from rlhfjax.algos import kl, shaping, tamer
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import Layout, elsewhere, make_layout
from rlhfjax.metrics import merge
from rlhfjax.models.transformer import Model
from rlhfjax.rewards.load import load_reward
from rlhfjax.rewards.responses import Reward, score
from rlhfjax.stages import Batches, Finished, Pairs, Stage
from rlhfjax.stages.parts.common import adapters_of, base_of, frozen_part, place, to_save
from rlhfjax.stages.parts.held_out import held_out
from rlhfjax.stages.parts.policy_config import HumanConfig, PolicyConfig
from rlhfjax.stages.parts.prompts import Repeated, prompt_batches
from rlhfjax.stages.parts.ptx import with_ptx
from rlhfjax.stages.parts.rollout import Rollout, cut, response_logprobs, sample

PyTree = Any
AHEAD = "ahead"  # in a state: the rollout that the next iteration learns from


@dataclasses.dataclass(frozen=True)
class Task:
    """A policy to improve and what it is improved against.

    With adapters the parameters it starts from are their base; unless there is another, they are the reference too.
    """

    start: store.SavedModel
    tokenizer: Tokenizer
    reward: Reward
    reference: PyTree
    human: Reward | None = None  # added to the reward, with a weight that is annealed
    there: Layout | None = None  # where rewards and reference are, if not where the policy is


def open_task(config: PolicyConfig, layout: Layout) -> Task:
    """Loads the policy, its reference and the reward.

    Raises:
      ConfigError: `init_from` is not a language model.
    """
    start = store.load(config.init_from, layout)
    if start.model.head != "lm":
        raise ConfigError(
            f"{config.stage}.init_from={config.init_from}: a policy is needed, this model has a {start.model.head} head"
        )
    tokenizer = start.tokenizer
    model = dataclasses.replace(start.model, lora=config.lora)
    start = dataclasses.replace(start, model=model, params=base_of(model, start.params))
    there = None if config.judge_mesh is None else make_layout(config.judge_mesh)
    if there is not None:
        there.check_batch(config.episodes, f"{config.stage}: the responses of an iteration, over judge_mesh,")
    if config.reference is None and there is None:
        reference = start.params
    else:
        reference = store.load(config.reference or config.init_from, there or layout).params
    reward = load_reward(config.reward, there or layout, tokenizer)
    human = load_reward(config.human.reward, there or layout, tokenizer) if config.human.reward else None
    return Task(start, tokenizer, reward, reference, human, there)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The token ids that sampling and scoring know by name."""

    eos: int
    pad: int
    stop: int | None = None  # where truncate is on: its token

    @classmethod
    def of(cls, config: PolicyConfig, tokenizer: Tokenizer) -> "Tokens":
        stop = tokenizer.token_id(config.truncate.token) if config.truncate.token else None
        return cls(tokenizer.eos_id, tokenizer.pad_id, stop)


class Known(NamedTuple):
    """What forward passes say of a rollout before it has a score, all [b, r]."""

    logprobs: jax.Array  # log pi_old, 0 outside the response
    ref_logprobs: jax.Array | None  # None until it comes from another mesh
    values: jax.Array | None = None  # where there is a value function


class PolicyAlgorithm:
    """How every algorithm samples and scores; its own are `prepare` (advantages) and `update` (epochs)."""

    def __init__(self, config: PolicyConfig, model: Model, tokens: Tokens):
        self.config, self.model, self.tokens = config, model, tokens
        self.know = jax.jit(self._know)
        self.ref_logprobs = jax.jit(self.logprobs)

    def _know(self, params: PyTree, reference: PyTree | None, rollout: Rollout) -> Known:
        """Everything that needs no score: dispatched before scoring, it runs while rules score on the host.

        Of a reference on another mesh, None here, `ref_logprobs` says what it thinks.
        """
        ref_logprobs = None if reference is None else self.logprobs(reference, rollout)
        return Known(self.behaviour(params["policy"], rollout), ref_logprobs)

    def rollout(
        self, params: PyTree, prompts: jax.Array, segments: jax.Array, key: jax.Array, each: int = 1
    ) -> Rollout:
        """A response to every row; `each` rows that follow each other have one prompt."""
        eos = self.tokens.eos if self.config.stop_at_eos else -1
        limits = {"max_new": self.config.max_new, "eos_id": eos, "pad_id": self.tokens.pad}
        limits |= {"each": each, "slots": self.config.slots}
        return sample(self.model, params, prompts, segments, key, temperature=self.config.temperature, **limits)

    def seen(self, rollout: Rollout) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the reward scores, (tokens, segments, mask): the responses up to the stop token where truncate is on."""
        if self.tokens.stop is not None:
            rollout = cut(rollout, self.tokens.stop, self.config.truncate.after, self.tokens.pad)
        return rollout.tokens, rollout.segments, rollout.mask

    def behaviour(self, params: PyTree, rollout: Rollout) -> Float[Array, "b r"]:
        """log pi_old of the response tokens, 0 elsewhere."""
        if self.config.behaviour_logprobs == "sampler":
            return rollout.logprobs
        return self.logprobs(params, rollout) * rollout.mask

    def logprobs(self, params: PyTree, rollout: Rollout) -> Float[Array, "b r"]:
        r = rollout.mask.shape[1]
        return response_logprobs(self.model, params, rollout.tokens, rollout.segments, r, self.config.temperature)[0]

    def shape(self, scores: Float[Array, "b"], rollout: Rollout) -> tuple[Float[Array, "b"], Bool[Array, "b"], Pairs]:
        """Scores after missing-EOS, rejection and clipping, in this order; whether each response ended; metrics."""
        c, mask, pairs = self.config, rollout.mask, {}
        ended = shaping.has_token(rollout.responses, mask, self.tokens.eos)
        if c.missing_eos == "penalty":
            scores = shaping.penalise_missing_eos(scores, ended, penalty=c.missing_eos_value)
        elif c.missing_eos == "replace":
            scores = shaping.replace_missing_eos(scores, ended, value=c.missing_eos_value)
        if self.tokens.stop is not None:
            _, found = shaping.truncate_mask(rollout.responses, mask, token_id=self.tokens.stop, after=c.truncate.after)
            scores = shaping.reject(scores, found, value=c.truncate.value)
            pairs["accepted"] = (found.astype(jnp.float32).sum(), jnp.float32(found.shape[0]))
        return (shaping.clip_score(scores, limit=c.score_clip) if c.score_clip else scores), ended, pairs

    def kl_to_reference(
        self, logprobs: Float[Array, "b r"], ref_logprobs: Float[Array, "b r"], mask: Float[Array, "b r"]
    ) -> tuple[Float[Array, "b r"], Float[Array, "b"]]:
        """The penalty on each token (0 where it is in the loss), and log pi(y|x) / pi_ref(y|x) of each response.

        The second is what is logged and what a controller is fed, whichever estimator the penalty has.
        """
        log_ratio = kl.k1(logprobs, ref_logprobs) * mask
        if self.config.kl.place == "loss":
            return jnp.zeros_like(log_ratio), kl.sequence_kl(log_ratio, mask)
        per_token = getattr(kl, self.config.kl.estimator)(logprobs, ref_logprobs) * mask
        return per_token, kl.sequence_kl(log_ratio, mask)

    def _kl_loss(self, logprobs: Float[Array, "b r"], batch: Any) -> tuple[jax.Array, Pairs]:
        """KL to the reference as a loss, and kl_clamped where its estimator has a clamp.

        The loss's weight is the number of responses for `sequence`, of tokens for others.
        """
        old, ref, mask = batch.logprobs, batch.ref_logprobs, batch.mask
        losses = {
            "k1": lambda: kl.kl_loss_k1(logprobs, old, ref, mask),
            "k2": lambda: kl.kl_loss_k2(logprobs, ref, mask),
            "k3": lambda: kl.kl_loss_k3(logprobs, old, ref, mask),
            "sequence": lambda: kl.kl_loss_sequence(logprobs, ref, mask),
        }
        scalar, pairs = losses[self.config.kl.estimator]()
        return scalar, {name: pair for name, pair in pairs.items() if name != "kl"}


def with_human(config: HumanConfig, scores: Any, human: Any, step: jax.Array) -> tuple[jax.Array, Pairs]:
    """R + w H of every response, w annealed by the iteration; the mean of H and w as metrics."""
    first, factor = jnp.float32(config.weight), jnp.float32(config.factor)
    weight = tamer.annealed(first, factor=factor, iteration=step)
    human = jnp.asarray(human, jnp.float32)
    pairs = {"human": (human.sum(), jnp.float32(human.size)), "human_weight": (weight, jnp.ones(()))}
    return tamer.reward_addition(jnp.asarray(scores, jnp.float32), human, weight=weight), pairs


def sampler(config: PolicyConfig, layout: Layout, algorithm: Any) -> Callable[..., Rollout]:
    """`algorithm.rollout`, where the config says so on another mesh of the same devices.

    The policy's weights are laid out anew, from devices to devices, before every rollout, and the responses come back
    in the layout of training.

    Raises:
      ConfigError: the rollout's batch does not go over that mesh.
    """
    if config.rollout_mesh is None:
        return algorithm.rollout
    there = make_layout(config.rollout_mesh, list(layout.mesh.devices.flat))
    there.check_batch(config.episodes, f"{config.stage}.batch_size, over rollout_mesh,")
    axes = algorithm.model.axes()

    def rollout(params: PyTree, prompts: jax.Array, segments: jax.Array, key: jax.Array, each: int = 1) -> Rollout:
        rows = jax.device_put((prompts, segments), there.sharding("batch"))
        params = jax.device_put(params, states.shardings(params, axes, there))
        with there.use():
            sampled = algorithm.rollout(params, *rows, key, each)
        return jax.device_put(sampled, layout.sharding("batch"))

    return rollout


def policy_step(
    config: PolicyConfig, layout: Layout, task: Task, algorithm: Any, frozen: PyTree
) -> Callable[..., tuple[Any, Pairs]]:
    """(state, batch, key) -> (state, metrics): rollout, scores, advantages, epochs."""
    sample_responses = sampler(config, layout, algorithm)
    scored = elsewhere(task.there, layout, functools.partial(score, task.reward))
    human = None if task.human is None else elsewhere(task.there, layout, task.human)
    ref_logprobs = elsewhere(task.there, layout, functools.partial(algorithm.ref_logprobs, task.reference))

    def know(params: PyTree, rollout: Rollout) -> Known:
        if task.there is None:
            return algorithm.know(params, task.reference, rollout)
        return algorithm.know(params, None, rollout)._replace(ref_logprobs=ref_logprobs(rollout))

    def drawn(
        state: states.TrainState, params: PyTree, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[Rollout, Rollout | None, int]:
        """What to learn from, what the next iteration learns from, and by how many iterations the first is behind."""
        rows = (params["policy"], batch["prompts"], batch["segments"])
        new = sample_responses(*rows, key, config.each)
        if not config.one_step_off:
            return new, None, 0
        if int(state.step) == 0:
            return sample_responses(*rows, jax.random.fold_in(key, 2), config.each), new, 0
        return Rollout(**state.extra[AHEAD]), new, 1

    def step(state: states.TrainState, batch: dict[str, jax.Array], key: jax.Array) -> tuple[Any, Pairs]:
        params = states.attach(frozen, state.params)
        rollout, ahead, behind = drawn(state, params, batch, key)
        state = state.replace(extra={name: x for name, x in state.extra.items() if name != AHEAD})
        seen = algorithm.seen(rollout)  # before `know`: reading it then does not wait for `know`
        known = know(params, rollout)
        scores, said = scored(*seen)
        if human is not None:
            scores, more = with_human(config.human, scores, human(*seen), state.step)
            said = {**said, **more}
        experience, pairs = algorithm.prepare(state, known, rollout, layout.put_rows(scores))
        text = {name[4:]: rows for name, rows in batch.items() if name.startswith("ptx/")}
        state, more = algorithm.update(state, experience, text, pairs, jax.random.fold_in(key, 1), frozen)
        if ahead is not None:
            state = state.replace(extra={**state.extra, AHEAD: ahead._asdict()})
            more = {**more, "staleness": (jnp.float32(behind), jnp.ones(()))}
        cut = batch["cut"]
        return state, merge(said, pairs, more, {"prompts_cut": (cut.sum(), jnp.float32(cut.size))})

    return step


def _no_rollout(config: PolicyConfig) -> dict[str, jax.Array]:
    """The shape of an iteration's rollout, before there is one."""
    b, t = config.episodes, config.prompt_length + config.max_new
    ids, row = jnp.zeros((b, t), jnp.int32), jnp.zeros((b, config.max_new))
    return Rollout(ids, jnp.zeros_like(ids), row, jnp.zeros_like(row))._asdict()


def fresh_state(
    config: PolicyConfig,
    algorithm: Any,
    born: Callable[[jax.Array], dict[str, PyTree]],
    extra: Mapping[str, Any] | None = None,
) -> Callable[[jax.Array], states.TrainState]:
    """key -> the state before anything is loaded; see `policy_stage` for `born` and `extra`."""

    def init(key: jax.Array) -> states.TrainState:
        params = born(key)
        more = {"kl_coefficient": jnp.float32(config.kl.coefficient), **(extra or {})}
        if config.ema:
            more["ema"] = {"policy": jax.tree.map(jnp.array, params["policy"])}
        if config.one_step_off:
            more[AHEAD] = _no_rollout(config)
        return states.TrainState.create(params, algorithm.tx, **more)

    return init


def policy_stage(
    config: PolicyConfig,
    layout: Layout,
    task: Task,
    algorithm: Any,
    *,
    born: Callable[[jax.Array], dict[str, PyTree]],
    axes: dict[str, PyTree],
    loaded: Mapping[str, PyTree],
    frozen: Mapping[str, PyTree] | None = None,
    extra: Mapping[str, Any] | None = None,
    also: Callable[[states.TrainState], dict[str, Any]] = lambda state: {},
    repeats: int = 1,
) -> Stage:
    """The Stage of an algorithm with a `tx`, `prepare` and `update`.

    Args:
      born: key -> what is trained, fresh, "policy" among it; `loaded` is laid over it, what it lacks stays as born.
      frozen: what is not trained besides the policy's base.
      extra: what the state carries besides the KL coefficient and the average.
      also: state -> further models to keep, by folder.
      repeats: consecutive rows for every prompt.
    """
    prompts = prompt_batches(config.prompts, task.tokenizer, config)
    batches: Batches = Repeated(prompts, repeats) if repeats > 1 else prompts
    base = frozen_part(task.start.model, task.start.params)
    frozen = {"policy": base, **(frozen or {})}
    rows = {AHEAD: dict.fromkeys(Rollout._fields, ("batch", None))} if config.one_step_off else {}

    def load(state: states.TrainState) -> states.TrainState:
        params = {name: place(loaded[name], tree) for name, tree in state.params.items()}
        more = dict(state.extra)
        if config.ema:
            more["ema"] = {"policy": place(loaded["policy"], more["ema"]["policy"])}
        return state.replace(params=params, extra=more)

    def finish(state: states.TrainState) -> Finished:
        trained = state.extra["ema"]["policy"] if config.ema else state.params["policy"]
        model = to_save(task.start.model, states.attach(base, trained), task.start.tokenizer)
        models = {store.FOLDER: model}
        return Finished(models | also(state), {}, {}, adapters_of(task.start.model, trained))

    return Stage(
        init=fresh_state(config, algorithm, born, extra),
        axes=axes | rows,
        start=load,
        batches=with_ptx(config.ptx, batches, task.tokenizer, config, layout),
        step=policy_step(config, layout, task, algorithm, frozen),
        evals=held_out(config, algorithm, task, layout, base),
        finish=finish,
        units=config.episodes * config.max_new,
    )
