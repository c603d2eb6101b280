"""Direct preference optimization: a policy from ranked answers, without a reward model and without sampling.

DPO, cDPO, IPO, KTO, ORPO and SimPO differ by `loss.name` alone: see `algos/direct.py` for the equations. DPO (Rafailov
et al. 2023, eq. 7), rho being the frozen reference:
  loss = -log sigmoid(beta [log pi/rho (y_w | x) - log pi/rho (y_l | x)])

All untied pairs of a prompt count together as one: each has the weight 1 / (pairs of the prompt), so that the loss is a
mean over prompts, and one prompt's pairs are always in one microbatch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhfjax import hosts
from rlhfjax.algos import direct as direct_losses
from rlhfjax.algos.direct import kto_kl, mean_logprobs, sequence_logprobs
from rlhfjax.algos.masked import divide
from rlhfjax.algos.preference import pair_metrics, reward_differences, untied_pairs
from rlhfjax.data import loader
from rlhfjax.data.config import open_preferences, own_shards
from rlhfjax.data.mismatched import Mismatched
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.evals import stats
from rlhfjax.mesh import Layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.programs import ROWS, Program, small
from rlhfjax.ranges import Finite, NonNegative, Positive, ShareBelowHalf, Size, Tokens
from rlhfjax.rl.prompts import Together
from rlhfjax.roles import DISK, Loaded, Models, Pass, Role, Sources, Workload
from rlhfjax.stage import Data, Shapes, Stage
from rlhfjax.stages.reward import preference_shapes
from rlhfjax.state import TrainState
from rlhfjax.supervised import (
    MODEL,
    StreamConfig,
    left_behind,
    load_trained,
    supervised_stage,
    supervised_workload,
    train_step,
    trained_role,
    truncation_metrics,
    validate_streams,
)
from rlhfjax.types import Loss, Metrics, PyTree

Arrays = dict[str, Any]
REFERENCE, OTHERS = (
    "reference",
    "mismatched/",
)  # the name, and the prefix, of what is added to a batch

WITHOUT_REFERENCE = ("orpo", "simpo")
_BETA = {"simpo": 2.0}  # others: 0.1


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which loss, and its hyper-parameters; those of other losses are not looked at."""

    name: Literal["dpo", "cdpo", "ipo", "kto", "orpo", "simpo"] = "dpo"
    beta: Positive | None = None  # None: 0.1, SimPO 2.0; IPO's tau and ORPO's lambda
    smoothing: ShareBelowHalf = 0.1  # cdpo: the probability that a label is wrong
    margin: NonNegative = 1.0  # simpo: gamma, in units of reward; the paper's gamma / beta is 0.3 to 1.6, by the model
    desirable_weight: NonNegative = 1.0  # kto: lambda_D
    undesirable_weight: NonNegative = 1.0  # kto: lambda_U
    desirable_above: Finite | None = (
        None  # kto: answers scored above are desirable, others not; None: by pairs
    )

    @property
    def strength(self) -> float:
        """beta, or the loss's own."""
        return _BETA.get(self.name, 0.1) if self.beta is None else self.beta

    @property
    def needs_reference(self) -> bool:
        return self.name not in WITHOUT_REFERENCE


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the losses look at: log-probabilities of every answer, and what a labeler says of it."""

    total: Float[Array, "p k"]  # log pi(y | x), nats
    mean: Float[Array, "p k"]  # 1/|y| log pi(y | x), nats a token
    reference: Float[Array, "p k"]  # log rho(y | x), nats; 0 where a loss has none
    scores: Float[Array, "p k"]  # more is better
    valid: Float[Array, "p k"]  # 1 on answers that exist
    kl: Float[Array, ""]  # of KTO, nats: from the whole batch
    same: Int[Array, "p k"] | None = None  # equal where answers have the same tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    stage: str = "direct"
    preferences: tuple[str, ...] = ()  # folders that `collect` wrote, or jsonl: globs
    length: Tokens  # prompt and response, tokens; a prompt keeps up to half of it
    batch_size: Size  # prompts, each with all of its pairs; DPO: 64 pairs
    loss: LossConfig = LossConfig()
    reference: str | None = None  # None: init_from
    reference_logprobs: Literal["live", "precomputed"] = (
        "live"  # precomputed: one pass over the data, before training
    )


def roles(config: Config) -> dict[str, Role]:
    trained = {MODEL: trained_role(config)._replace(keeps_head=True)}
    if not config.loss.needs_reference:
        return trained
    if config.reference is not None:
        return trained | {REFERENCE: Role(config.reference)}
    shares = MODEL if config.lora.rank else None
    return trained | {
        REFERENCE: Role(config.init_from, overrides=config.overrides, shares=shares)
    }


def workload(config: Config, completions: int = 2) -> Workload:
    """Besides the step, passes without a gradient: of a reference, and KTO's over mismatched answers."""
    step = supervised_workload(config, completions)
    before = []
    if config.loss.needs_reference and config.reference_logprobs == "live":
        before.append(Pass(REFERENCE, REFERENCE, step.units, config.length))
    if config.loss.name == "kto":
        before += [one._replace(program=f"mismatched_{one.program}") for one in before]
        before.append(Pass("mismatched", MODEL, step.units, config.length))
    return step._replace(passes=(*before, *step.passes))


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    validate_streams(config, layout, model_config)
    name = config.loss.name
    if (
        config.loss.needs_reference
        and config.init_from is None
        and config.reference is None
    ):
        raise ConfigError(
            f"direct.reference: {name} needs one, and there is no init_from to take its place"
        )
    if not config.loss.needs_reference and (
        config.reference or config.reference_logprobs != "live"
    ):
        raise ConfigError(f"direct.reference: {name} has no reference")


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    models = Models(config.stage, roles(config), layout, sources)
    loaded = load_trained(config, models)
    model, tokenizer = loaded.model, loaded.tokenizer
    validate(config, layout, model.config)
    reference = (
        _reference(config, loaded, models) if config.loss.needs_reference else None
    )
    loss = direct_loss(model, config.loss)
    train, tx = train_step(config, loaded, loss)
    mismatched = Program("mismatched", total_logprobs(model, config.microbatches), ROWS)

    def step(state: TrainState, batch: Arrays, key: Any) -> tuple[TrainState, Metrics]:
        if reference is not None and REFERENCE not in batch:
            batch = batch | reference(batch)
        batch, others = _split(batch)
        if others:  # KTO's z has no gradient, and is one number for all microbatches
            total = mismatched(loaded.merged(state.params), others)
            batch = batch | {"kl": small(_kl_rows)(total, others)}
        return train(state, batch, key)

    def open_data() -> Data:
        rows, held_out = (
            open_preferences(config.preferences, split, "direct")
            for split in ("train", "validation")
        )
        own = own_shards(config.data_shards, config.batch_size, layout)
        batches = _batches(config, rows, tokenizer, train=True, shards=own)
        if config.reference_logprobs == "precomputed":
            in_order = _batches(config, rows, tokenizer, train=False)
            batches = _Precomputed(
                batches, lambda: reference_table(reference, in_order, layout)
            )
        evals = _held_out(
            config,
            loaded,
            reference,
            _batches(config, held_out, tokenizer, train=False),
            layout,
        )
        return Data(batches, evals, lambda state: left_behind(loaded, state.params))

    return supervised_stage(
        loaded,
        tx,
        step=step,
        batch=lambda completions: _batch_shapes(config, completions),
        open=open_data,
        units=config.batch_size,
        unit="prompts",
    )


def _batch_shapes(config: Config, completions: int) -> Shapes:
    own = preference_shapes(config.batch_size, completions, config.length)
    others = (
        {f"{OTHERS}{name}": x for name, x in own.items()}
        if config.loss.name == "kto"
        else {}
    )
    shapes = {**own, **others}
    if config.reference_logprobs == "precomputed":
        prefixes = ("", OTHERS) if others else ("",)
        shapes |= {f"{prefix}{REFERENCE}": own["scores"] for prefix in prefixes}
    return shapes


def direct_loss(
    model: Model, config: LossConfig
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """(params, batch, key) -> the loss of `make_loss` on a batch with its reference log-probabilities."""
    loss = make_loss(config)

    def of_batch(
        params: PyTree, batch: Arrays, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        key = key if model.drops else None
        total, mean = answer_logprobs(model, params, batch, key)
        scalar, pairs = loss(_answers(batch, total, mean))
        return scalar, {**pairs, **truncation_metrics(batch)}

    return of_batch


def answer_logprobs(
    model: Model, params: PyTree, batch: Arrays, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """log pi(y | x) and its mean over tokens, [b, k] each, of all answers of a batch."""
    logprobs, mask = completion_logprobs(model, params, batch, key)
    shape = batch["lengths"].shape
    return sequence_logprobs(logprobs, mask).reshape(shape), mean_logprobs(
        logprobs, mask
    ).reshape(shape)


def _answers(batch: Arrays, total: Any, mean: Any) -> Answers:
    valid = batch["valid"] * (
        batch["lengths"] > 0
    )  # an answer without tokens has no log-probability to speak of
    reference = batch.get(REFERENCE, jnp.zeros_like(total))
    kl = batch["kl"][0] if "kl" in batch else jnp.zeros(())
    return Answers(total, mean, reference, batch["scores"], valid, kl, batch["same"])


def _batches(
    config: Config, source: Source, tokenizer: Tokenizer, **options: Any
) -> Any:
    """Ranked answers; for KTO, beside them, the same prompts with the answers to others."""
    options |= {
        "batch_size": config.batch_size,
        "length": config.length,
        "seed": config.seed,
    }
    batches = loader.preference_batches(source, tokenizer, **options)
    if config.loss.name != "kto":
        return batches
    others = loader.preference_batches(
        Mismatched(source, tokenizer), tokenizer, **options
    )
    return Together(batches, **{OTHERS[:-1]: others})


def _split(batch: Arrays) -> tuple[Arrays, Arrays]:
    """A batch, and what it has beside it of mismatched prompts and answers."""
    others = {
        name.removeprefix(OTHERS): x
        for name, x in batch.items()
        if name.startswith(OTHERS)
    }
    return {name: x for name, x in batch.items() if not name.startswith(OTHERS)}, others


def _kl(total: jax.Array, others: Arrays) -> jax.Array:
    """KTO's z from the log-probabilities [b, k] of mismatched answers."""
    return kto_kl(total.ravel(), others[REFERENCE].ravel(), others["valid"].ravel())


def _kl_rows(total: jax.Array, others: Arrays) -> jax.Array:
    """Returns KTO's z as a value per prompt, all equal, so that it is split into microbatches."""
    return jnp.broadcast_to(_kl(total, others), total.shape[:1])


def total_logprobs(model: Model, parts: int) -> Callable[[PyTree, Arrays], jax.Array]:
    """(params, batch) -> log pi(y | x) of its answers, [b, k], in so many microbatches; jitted, without gradient."""
    return jax.jit(lambda params, batch: _in_parts(model, params, batch, parts)[0])


def _in_parts(
    model: Model, params: PyTree, batch: Arrays, parts: int
) -> tuple[jax.Array, jax.Array]:
    """`answer_logprobs` without gradient or dropout, a microbatch at a time."""
    rows = {name: batch[name] for name in ("tokens", "segments", "lengths")}
    if parts == 1:
        return answer_logprobs(model, params, rows)
    rows = jax.tree.map(
        lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), rows
    )  # as `state.gradients` does
    out = jax.lax.map(lambda some: answer_logprobs(model, params, some), rows)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), out)


def response_slots(
    segments: Int[Array, "n t"], lengths: Int[Array, " n"]
) -> Float[Array, "n s"]:
    """1 at slots 0 .. t - 2 whose *next* token is the response's, its eos included: the last `lengths` real tokens."""
    end = jnp.sum((segments > 0).astype(jnp.int32), axis=1, keepdims=True)
    slot = jnp.arange(1, segments.shape[1])
    return ((slot >= end - lengths[:, None]) & (slot < end)).astype(jnp.float32)


def completion_logprobs(
    model: Model,
    params: PyTree,
    batch: dict[str, jax.Array],
    key: jax.Array | None = None,
) -> tuple[Float[Array, "n s"], Float[Array, "n s"]]:
    """log pi(y_t | x, y_<t) of every completion, and the mask of its tokens; n = b k rows, s = t - 1.

    Args:
      batch: of `loader.preference_batches`: tokens, segments [b, k, t], lengths [b, k].
      key: turns dropout on.
    """
    tokens, segments = (
        batch[name].reshape(-1, batch[name].shape[-1])
        for name in ("tokens", "segments")
    )
    hidden = model.hidden(params, tokens, segments=segments, key=key)
    logprobs, _ = model.logprobs(params, hidden[:, :-1], tokens[:, 1:])
    return logprobs, response_slots(segments, batch["lengths"].reshape(-1))


# ------------------------------------------------------------------ the reference


def _reference(
    config: Config, loaded: Loaded, models: Models
) -> Callable[[Arrays], Arrays]:
    """Returns a function batch -> {"reference": log rho(y | x) [b, k]} of a batch on the devices, and
    the same of what is mismatched."""
    rho = models[REFERENCE]
    if rho.model.head != "lm" or rho.tokenizer != loaded.tokenizer:
        raise ConfigError(
            f"direct.reference={config.reference}: a language model with the policy's tokenizer is needed"
        )
    model = loaded.model if config.reference is None else rho.model
    total = total_logprobs(model, config.microbatches)
    of_own = Program(REFERENCE, total, ROWS)
    of_others = Program(f"mismatched_{REFERENCE}", total, ROWS)

    def reference(batch: Arrays) -> Arrays:
        own, others = _split(batch)
        found = {REFERENCE: of_own(rho.frozen, own)}
        if others:
            found[f"{OTHERS}{REFERENCE}"] = of_others(rho.frozen, others)
        return found

    return reference


def reference_table(
    reference: Callable[[Arrays], Arrays], batches: Any, layout: Layout
) -> dict[str, np.ndarray]:
    """Returns {name: [rows, k]} for every row of the data, in one pass over them in order."""
    parts: dict[str, list[np.ndarray]] = {}
    for batch in batches.restart():
        for name, values in hosts.whole(reference(layout.put(batch))).items():
            parts.setdefault(name, []).append(values[batch["index"] >= 0])
    return {name: np.concatenate(some) for name, some in parts.items()}


class _Precomputed:
    """Batches with reference log-probabilities from a table, which is made before the first one."""

    def __init__(self, batches: Any, make: Callable[[], dict[str, np.ndarray]]):
        self._batches, self._make = batches, make
        self._table: dict[str, np.ndarray] | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._table is None:
            self._table = self._make()
        batch = next(self._batches)
        return batch | {
            name: rows[batch["index"]] for name, rows in self._table.items()
        }

    def get_state(self) -> Any:
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        self._batches.set_state(state)


# ------------------------------------------------------------------ held-out data


def _held_out(
    config: Config, loaded: Loaded, reference: Any, batches: Any, layout: Layout
) -> Callable[[TrainState], Metrics]:
    """state -> the loss and the implicit reward's accuracy on held-out answers; the reference is asked once."""
    measure = jax.jit(
        lambda params, batch: _in_parts(
            loaded.model, params, batch, config.microbatches
        )
    )
    known: list[Arrays] = []  # by batch: the reference's log-probabilities

    def evals(state: TrainState) -> Metrics:
        parts: list[Arrays] = []
        for i, batch in enumerate(batches.restart()):
            if config.eval_batches and i == config.eval_batches:
                break
            placed = layout.put(batch)
            if i == len(known):
                known.append(
                    hosts.whole(reference(placed)) if reference is not None else {}
                )
            own, others = _split(placed)
            params = loaded.merged(state.params)
            total, mean = hosts.whole(measure(params, own))
            part = batch | known[i] | {"total": total, "mean": mean}
            if others:
                part[f"{OTHERS}total"] = hosts.whole(measure(params, others)[0])
            parts.append(
                {
                    name: x
                    for name, x in part.items()
                    if name.split("/")[-1] not in ("tokens", "segments")
                }
            )
        return held_out_metrics(
            config.loss,
            {name: np.concatenate([p[name] for p in parts]) for name in parts[0]},
        )

    return evals


def held_out_metrics(config: LossConfig, rows: Arrays) -> Metrics:
    """val_loss and the loss's other metrics; accuracy and margin over all pairs alike, as the reward stage has them."""
    rows, others = _split({name: jnp.asarray(x) for name, x in rows.items()})
    if others:
        rows["kl"] = _kl(others["total"], others)[None]
    answers = _answers(rows, rows["total"], rows["mean"])
    _, pairs = make_loss(config)(answers)
    labels = (answers.scores, answers.valid, answers.same)
    judged = [np.asarray(x) for x in (implicit_rewards(config, answers), *labels)]
    margins = stats.margins(*judged)
    return {
        f"val_{name}": pair
        for name, pair in {**pairs, **truncation_metrics(rows)}.items()
    } | {
        "val_accuracy": stats.pairwise_accuracy(*judged),
        "val_margin": (float(margins.sum()), float(margins.size)),
        "val_length_accuracy": (
            stats.length_baseline(np.asarray(rows["lengths"]), *judged[1:]),
            1.0,
        ),
    }


# ------------------------------------------------------------------ losses by name


def make_loss(config: LossConfig) -> Callable[[Answers], Loss]:
    """The loss that a config names: answers -> (nats a prompt, metrics).

    Metrics of all: loss, accuracy, margin (of the implicit rewards, pairs weighted as in the loss).
    """
    return functools.partial(_LOSSES[config.name], config)


def implicit_rewards(config: LossConfig, answers: Answers) -> Float[Array, "p k"]:
    """The reward that a policy stands for: beta log pi/rho; SimPO: beta log pi / |y|; ORPO: beta log odds."""
    if config.name == "simpo":
        return config.strength * answers.mean
    if config.name == "orpo":
        mean = jnp.where(answers.valid > 0, answers.mean, -1.0)
        return config.strength * direct_losses.log_odds(mean.ravel()).reshape(
            mean.shape
        )
    return config.strength * (answers.total - answers.reference)


def pair_weights(answers: Answers) -> Float[Array, "p k k"]:
    """1 / (untied pairs of the prompt) at [p, w, l] where answer w is another one than l and scored
    better; else 0."""
    pairs = untied_pairs(answers.scores, answers.valid, answers.same)
    return divide(
        pairs, jnp.broadcast_to(pairs.sum((1, 2), keepdims=True), pairs.shape)
    )


def _pairs(
    values: Float[Array, "p k"],
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """What a value is for the better and for the worse answer of every pair; n = p k k."""
    shape = (*values.shape, values.shape[1])
    better, worse = (
        jnp.broadcast_to(x, shape) for x in (values[:, :, None], values[:, None, :])
    )
    return better.ravel(), worse.ravel()


def _with_reference(answers: Answers) -> tuple[Float[Array, " n"], ...]:
    return (
        *_pairs(answers.total),
        *_pairs(answers.reference),
        pair_weights(answers).ravel(),
    )


def _dpo(config: LossConfig, answers: Answers) -> Loss:
    return direct_losses.dpo_loss(*_with_reference(answers), beta=config.strength)


def _cdpo(config: LossConfig, answers: Answers) -> Loss:
    return direct_losses.cdpo_loss(
        *_with_reference(answers), beta=config.strength, smoothing=config.smoothing
    )


def _ipo(config: LossConfig, answers: Answers) -> Loss:
    return direct_losses.ipo_loss(*_with_reference(answers), beta=config.strength)


def _orpo(config: LossConfig, answers: Answers) -> Loss:
    return direct_losses.orpo_loss(
        *_pairs(answers.mean), pair_weights(answers).ravel(), beta=config.strength
    )


def _simpo(config: LossConfig, answers: Answers) -> Loss:
    weight = pair_weights(answers).ravel()
    return direct_losses.simpo_loss(
        *_pairs(answers.mean), weight, beta=config.strength, margin=config.margin
    )


def _kto(config: LossConfig, answers: Answers) -> Loss:
    """Every answer twice, as desirable and as undesirable, with the weights of the two."""
    good, bad = _desirability(config, answers)
    loss, metrics = direct_losses.kto_loss(
        jnp.tile(answers.total.ravel(), 2),
        jnp.tile(answers.reference.ravel(), 2),
        jnp.concatenate([jnp.ones(good.size), jnp.zeros(bad.size)]),
        jnp.concatenate([good.ravel(), bad.ravel()]),
        kl=answers.kl,
        beta=config.strength,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )
    differences = reward_differences(implicit_rewards(config, answers), answers.valid)
    return loss, metrics | pair_metrics(differences, pair_weights(answers)) | {
        "kl": (answers.kl, jnp.ones(()))
    }


def _desirability(
    config: LossConfig, answers: Answers
) -> tuple[Float[Array, "p k"], Float[Array, "p k"]]:
    """How much each answer counts as desirable and as undesirable.

    By pairs, as the paper makes labels of preferences: the better of a pair is desirable, the worse is not, and an
    answer in the middle is some of both. By a threshold: every answer is one or the other, with weight 1.
    """
    if config.desirable_above is None:
        weights = pair_weights(answers)
        return weights.sum(2), weights.sum(1)
    above = answers.scores > config.desirable_above
    return answers.valid * above, answers.valid * ~above


_LOSSES = {
    "dpo": _dpo,
    "cdpo": _cdpo,
    "ipo": _ipo,
    "kto": _kto,
    "orpo": _orpo,
    "simpo": _simpo,
}
