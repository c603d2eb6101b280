"""Direct preference optimization: a policy from ranked completions, without a reward model.

DPO and its variants, IPO, KTO, ORPO and SimPO differ by `loss.name` alone; see
`rewards/direct.py`. DPO (Rafailov et al. 2023, eq. 7), with the frozen reference rho:

loss = -log sigmoid(beta [log pi/rho (y_w | x) - log pi/rho (y_l | x)])

All pairs of a prompt are in one microbatch.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import hosts
from rlhfjax.algos.direct import kto_kl
from rlhfjax.data.accepted import accepted, validate_preference
from rlhfjax.data.batches import DirectBatch, concatenate, shapes, take
from rlhfjax.data.config import Preferences, open_preferences, own_shards
from rlhfjax.data.loader import BatchStream, Joined, preference_batches
from rlhfjax.data.mismatched import Mismatched
from rlhfjax.data.mixture import mixed_like
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.data.unpaired import DESIRABLE_ABOVE
from rlhfjax.errors import ConfigError
from rlhfjax.evals import stats
from rlhfjax.mesh import Layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.experts import add_balance
from rlhfjax.models.transformer import Model
from rlhfjax.programs import ROWS, Program, small
from rlhfjax.ranges import Size, Tokens
from rlhfjax.rewards.direct import (
    LossConfig,
    completions_of,
    implicit_rewards,
    logprobs_and_routing,
    logprobs_in_microbatches,
    make_loss,
)
from rlhfjax.roles import DISK, Loaded, Models, Pass, Role, Sources, Workload
from rlhfjax.stage import Data, Stage
from rlhfjax.state import TrainState
from rlhfjax.supervised import (
    MODEL,
    LossFunction,
    StreamConfig,
    finished_model,
    load_trained,
    supervised_stage,
    supervised_workload,
    train_step,
    trained_role,
    truncation_metrics,
    validate_streams,
)
from rlhfjax.types import Loss, Metrics, PyTree

KINDS = ("preferences", "unpaired")  # of rows; unpaired ones are for KTO
REFERENCE = "reference"  # name of a role, and of the program that scores with it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    """The options of direct preference optimization."""

    stage: str = "direct"
    """Name of the stage."""
    preferences: Preferences = ()
    """Folders that `collect` wrote, specs, or sources with options."""
    length: Tokens
    """Tokens of prompt and response; the prompt keeps at most half of them where both are long."""
    batch_size: Size
    """Prompts per update, each with all of its pairs; DPO: 64 pairs."""
    loss: LossConfig = LossConfig()
    """Loss and its hyperparameters."""
    reference: str | None = None
    """Workdir of the reference model; None: the model of `init_from`."""
    reference_logprobs: Literal["live", "precomputed"] = "live"
    """When the reference scores completions: in every step, or in one pass before training."""


def model_name(config: Mapping[str, Any]) -> str:
    """Returns the name of the loss."""
    loss = config.get("loss")
    name = loss.get("name", "") if isinstance(loss, Mapping) else ""
    return str(name).upper() or "direct"


def roles(config: Config) -> dict[str, Role]:
    trained = {MODEL: trained_role(config)._replace(keeps_head=True)}
    if not config.loss.needs_reference:
        return trained
    if config.reference is not None:
        return trained | {REFERENCE: Role(config.reference)}
    reference = Role(
        config.init_from or "",
        overrides=config.overrides,
        shares=MODEL if config.lora.rank else None,
    )
    return trained | {REFERENCE: reference}


def workload(config: Config, completions: int = 2) -> Workload:
    """Returns what a step computes: besides the update, passes without a gradient.

    They are the reference's, and KTO's over mismatched completions.
    """
    step = supervised_workload(config, completions)
    passes = []
    if config.loss.needs_reference and config.reference_logprobs == "live":
        passes.append(Pass(REFERENCE, REFERENCE, step.units, config.length))
    if config.loss.name == "kto":
        passes += [p._replace(program=f"mismatched_{p.program}") for p in passes]
        passes.append(Pass("mismatched", MODEL, step.units, config.length))
    return step._replace(passes=(*passes, *step.passes))


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    validate_streams(config, layout, model_config)
    with_threshold(config)
    name = config.loss.name
    if config.loss.needs_reference:
        if config.init_from is None and config.reference is None:
            raise ConfigError(
                f"direct.reference: {name} needs one, and there is no init_from"
            )
    elif config.reference or config.reference_logprobs != "live":
        raise ConfigError(f"direct.reference: {name} has no reference")


def with_threshold(config: Config) -> Config:
    """Returns the config with the threshold between desirable and undesirable unpaired responses.

    Raises:
      ConfigError: responses without a pair, and a loss that needs pairs.
    """
    kinds = [getattr(entry, "kind", None) for entry in config.preferences]
    if "unpaired" not in kinds:
        return config
    if config.loss.name != "kto":
        raise ConfigError(
            f'direct.loss.name="{config.loss.name}": it learns from pairs; expected "kto" for'
            " preferences of kind unpaired"
        )
    if config.loss.desirable_above is not None:
        return config
    loss = dataclasses.replace(config.loss, desirable_above=DESIRABLE_ABOVE)
    return dataclasses.replace(config, loss=loss)


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    config = with_threshold(config)
    models = Models(config.stage, roles(config), layout, sources)
    loaded, tokenizer = load_trained(config, models)
    model = loaded.model
    validate(config, layout, model.config)
    add_reference = _reference(config, loaded, models)
    train, tx = train_step(config, loaded, direct_loss(model, config.loss))
    mismatched = Program("mismatched", total_logprobs(model, config.microbatches), ROWS)

    def step(
        state: TrainState, batch: DirectBatch, key: Any
    ) -> tuple[TrainState, Metrics]:
        if batch.reference is None:
            batch = add_reference(batch)
        if batch.mismatched is not None:
            # The KL has no gradient, and is the same number for all microbatches.
            total = mismatched(loaded.merged(state.params), batch.mismatched)
            kl = small(_kl_per_prompt)(total, batch.mismatched)
            batch = dataclasses.replace(batch, kl=kl, mismatched=None)
        return train(state, batch, key)

    def open_data() -> Data:
        open_split = functools.partial(
            open_preferences, config.preferences, stage="direct", kinds=KINDS
        )
        rows, held_out = open_split("train"), open_split("validation")
        batches_of = functools.partial(direct_batches, config, tokenizer)
        shards = own_shards(config.data_shards, config.batch_size, layout)
        batches = batches_of(rows, train=True, shards=shards)
        if config.reference_logprobs == "precomputed":
            in_order = batches_of(rows, train=False)
            batches = _precomputed(batches, in_order, add_reference, layout)
        held_out_batches = batches_of(held_out, train=False)
        evals = _held_out(config, loaded, add_reference, held_out_batches, layout)
        return Data(batches, evals, lambda state: finished_model(loaded, state.params))

    return supervised_stage(
        loaded,
        tx,
        step=step,
        batch=functools.partial(_batch_shapes, config),
        open=open_data,
        units=config.batch_size,
        unit="prompts",
    )


def _batch_shapes(config: Config, completions: int) -> DirectBatch:
    size, length = config.batch_size, config.length
    batch = shapes(DirectBatch, b=size, k=completions, t=length)
    if config.reference_logprobs == "precomputed":
        batch = dataclasses.replace(batch, reference=batch.scores)
    if config.loss.name == "kto":
        batch = dataclasses.replace(batch, mismatched=batch)
    return batch


def direct_loss(model: Model, config: LossConfig) -> LossFunction:
    """Returns the loss of a DirectBatch as a function (params, batch, key) -> (loss, metrics)."""
    loss = make_loss(config)

    def of_batch(params: PyTree, batch: DirectBatch, key: jax.Array | None) -> Loss:
        key = key if model.drops else None
        total, mean, routing = logprobs_and_routing(model, params, batch, key)
        scalar, metrics = loss(completions_of(batch, total, mean))
        metrics = {**metrics, **truncation_metrics(batch)}
        return add_balance(model.config, (scalar, metrics), routing)

    return of_batch


def total_logprobs(
    model: Model, microbatches: int
) -> Callable[[PyTree, DirectBatch], jax.Array]:
    """Returns a jitted function (params, batch) -> log pi(y | x) [b, k], without gradient."""
    return jax.jit(
        lambda params, batch: logprobs_in_microbatches(
            model, params, batch, microbatches
        )[0]
    )


def _kl(total: jax.Array, mismatched: DirectBatch) -> jax.Array:
    """Returns KTO's estimate of the KL from log pi [b, k] of mismatched completions."""
    reference, valid = mismatched.reference, mismatched.valid
    return kto_kl(total.ravel(), reference.ravel(), valid.ravel())


def _kl_per_prompt(total: jax.Array, mismatched: DirectBatch) -> jax.Array:
    """Returns KTO's KL once per prompt, so that it is split into microbatches."""
    return jnp.broadcast_to(_kl(total, mismatched), total.shape[:1])


# ------------------------------------------------------------------ batches


def direct_batches(
    config: Config, tokenizer: Tokenizer, source: Source, **options: Any
) -> Joined:
    """Returns batches of ranked completions; for KTO with mismatched completions beside them.

    Args:
      options: of `loader.preference_batches`.
    """
    source = accepted(source, tokenizer, validate_preference)
    batches_of = functools.partial(
        preference_batches,
        tokenizer=tokenizer,
        batch_size=config.batch_size,
        length=config.length,
        seed=config.seed,
        **options,
    )
    streams = {"": batches_of(source)}
    if config.loss.name == "kto":
        others = Mismatched(source, tokenizer)
        streams["mismatched/"] = batches_of(
            mixed_like(source, others), k=others.most_completions
        )
    return Joined(DirectBatch.of, streams)


def _precomputed(
    batches: Joined,
    in_order: Joined,
    add_reference: Callable[[DirectBatch], DirectBatch],
    layout: Layout,
) -> Joined:
    """Returns batches with the reference's log-probabilities, from a table over all rows.

    The table is made before the first batch, in one pass over the rows in order.
    """

    @functools.cache
    def table() -> References:
        parts = []
        for batch in in_order.restart():
            references = References.on_host(add_reference(layout.put(batch)))
            parts.append(take(references, batch.index >= 0))
        return concatenate(parts)

    def add(batch: DirectBatch) -> DirectBatch:
        return take(table(), batch.index).add_to(batch)

    return Joined(add, {"": batches})


# ------------------------------------------------------------------ the reference


class References(NamedTuple):
    """Log-probabilities of completions under the reference on the host, float32 [n, k], nats."""

    own: np.ndarray | None
    mismatched: np.ndarray | None

    @classmethod
    def on_host(cls, batch: DirectBatch) -> "References":
        others = batch.mismatched
        mismatched = None if others is None else others.reference
        return hosts.whole(cls(batch.reference, mismatched))

    def add_to(self, batch: DirectBatch) -> DirectBatch:
        others = batch.mismatched
        if others is not None:
            others = dataclasses.replace(others, reference=self.mismatched)
        return dataclasses.replace(batch, reference=self.own, mismatched=others)


def _reference(
    config: Config, loaded: Loaded, models: Models
) -> Callable[[DirectBatch], DirectBatch]:
    """Returns a function that adds log rho(y | x) to a batch on the devices.

    Where the loss has no reference, the function returns the batch as it is.
    """
    if not config.loss.needs_reference:
        return lambda batch: batch
    rho = models[REFERENCE]
    if rho.tokenizer != loaded.tokenizer:
        raise ConfigError(
            f"direct.reference={config.reference}: must have the policy's tokenizer"
        )
    model = loaded.model if config.reference is None else rho.model
    total = total_logprobs(model, config.microbatches)
    of_own = Program(REFERENCE, total, ROWS)
    of_mismatched = Program(f"mismatched_{REFERENCE}", total, ROWS)

    def add_reference(batch: DirectBatch) -> DirectBatch:
        others = batch.mismatched
        batch = dataclasses.replace(batch, mismatched=None)
        reference = of_own(rho.frozen, batch)
        if others is not None:
            logprobs = of_mismatched(rho.frozen, others)
            others = dataclasses.replace(others, reference=logprobs)
        return dataclasses.replace(batch, reference=reference, mismatched=others)

    return add_reference


# ------------------------------------------------------------------ held-out data


class Measured(NamedTuple):
    """Held-out completions with their log-probabilities under the policy, on the host."""

    batch: DirectBatch  # without tokens and attention_mask
    total: np.ndarray  # log pi(y | x), float32 [n, k], nats
    mean: np.ndarray  # the same per token
    mismatched: np.ndarray | None  # log pi of mismatched completions; KTO only


def _held_out(
    config: Config,
    loaded: Loaded,
    add_reference: Callable[[DirectBatch], DirectBatch],
    batches: BatchStream,
    layout: Layout,
) -> Callable[[TrainState], Metrics]:
    """Returns a function state -> metrics of held-out completions.

    The reference scores every batch once, in the first evaluation.
    """
    logprobs_of = jax.jit(
        lambda params, batch: logprobs_in_microbatches(
            loaded.model, params, batch, config.microbatches
        )
    )
    references: list[References] = []  # of each batch

    def measure(params: PyTree, batch: DirectBatch, number: int) -> Measured:
        placed = layout.put(batch)
        if number == len(references):
            references.append(References.on_host(add_reference(placed)))
        batch = references[number].add_to(batch)
        others = placed.mismatched
        own = dataclasses.replace(placed, mismatched=None)
        total, mean = hosts.whole(logprobs_of(params, own))
        mismatched = None
        if others is not None:
            mismatched = hosts.whole(logprobs_of(params, others)[0])
        return Measured(_without_tokens(batch), total, mean, mismatched)

    def evals(state: TrainState) -> Metrics:
        params = loaded.merged(state.params)
        parts = []
        for i, batch in enumerate(batches.restart()):
            if config.eval_batches and i == config.eval_batches:
                break
            parts.append(measure(params, batch, i))
        return held_out_metrics(config.loss, concatenate(parts))

    return evals


def _without_tokens(batch: DirectBatch) -> DirectBatch:
    others = batch.mismatched
    if others is not None:
        others = _without_tokens(others)
    return dataclasses.replace(
        batch, tokens=None, attention_mask=None, mismatched=others
    )


def held_out_metrics(config: LossConfig, measured: Measured) -> Metrics:
    """Returns the metrics of held-out completions.

    They are val_loss and the other metrics of the loss, and accuracy and margin of the implicit
    reward with equal weights of all pairs, as the reward stage has them.
    """
    batch = jax.tree.map(jnp.asarray, measured.batch)
    total, mean = jnp.asarray(measured.total), jnp.asarray(measured.mean)
    if measured.mismatched is not None:
        kl = _kl(jnp.asarray(measured.mismatched), batch.mismatched)
        batch = dataclasses.replace(batch, kl=kl[None])
    completions = completions_of(batch, total, mean)
    _, metrics = make_loss(config)(completions)
    metrics |= truncation_metrics(batch)

    rewards = np.asarray(implicit_rewards(config, completions))
    labels = (completions.scores, completions.valid, completions.same)
    labels = tuple(map(np.asarray, labels))
    margins = stats.margins(rewards, *labels)
    length_accuracy = stats.length_baseline(np.asarray(batch.lengths), *labels)
    return {f"val_{name}": metric for name, metric in metrics.items()} | {
        "val_accuracy": stats.pairwise_accuracy(rewards, *labels),
        "val_margin": (float(margins.sum()), float(margins.size)),
        "val_length_accuracy": (length_accuracy, 1.0),
    }
