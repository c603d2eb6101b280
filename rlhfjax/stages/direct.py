"""Direct preference optimisation: a policy from ranked answers, without a reward model and without sampling.

DPO, cDPO, IPO, KTO, ORPO and SimPO differ by `loss.name` alone: see `algos/direct.py` for the equations, and
`parts/direct.py` for how K answers make pairs. DPO (Rafailov et al. 2023, eq. 7), rho being the frozen reference:
  loss = -log sigmoid(beta [log pi/rho (y_w | x) - log pi/rho (y_l | x)])
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import hosts
from rlhfjax.algos.direct import kto_kl, mean_logprobs, sequence_logprobs
from rlhfjax.data import loader
from rlhfjax.data.sources import Source
from rlhfjax.errors import ConfigError
from rlhfjax.evals import stats
from rlhfjax.interop import store
from rlhfjax.mesh import Layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.optim import make_optimizer, make_schedule
from rlhfjax.stages import Pairs, Stage
from rlhfjax.stages.parts.common import Start, StreamConfig, assemble, begin, check_streams, own_shards
from rlhfjax.stages.parts.direct import Answers, LossConfig, implicit_rewards, make_loss
from rlhfjax.stages.parts.preferences import (
    Mismatched,
    completion_logprobs,
    open_preferences,
    truncation_metrics,
)
from rlhfjax.stages.parts.ptx import Together
from rlhfjax.state import TrainState

PyTree = Any
Arrays = dict[str, Any]
REFERENCE, OTHERS = "reference", "mismatched/"  # the name, and the prefix, of what is added to a batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    stage: str = "direct"
    preferences: tuple[str, ...] = ()  # folders that `collect` wrote, or jsonl: globs
    length: int  # prompt and response, tokens; a prompt keeps up to half of it
    batch_size: int  # prompts, each with all of its pairs; DPO: 64 pairs
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    reference: str | None = None  # None: init_from
    reference_logprobs: Literal["live", "precomputed"] = "live"  # precomputed: one pass over the data, before training


def check(config: Config, layout: Layout, shape: TransformerConfig | None) -> None:
    """Refuses what cannot be meant, before anything is computed."""
    check_streams(config, layout, shape)
    name = config.loss.name
    if config.loss.needs_reference and config.init_from is None and config.reference is None:
        raise ConfigError(f"direct.reference: {name} needs one, and there is no init_from to take its place")
    if not config.loss.needs_reference and (config.reference or config.reference_logprobs != "live"):
        raise ConfigError(f"direct.reference: {name} has no reference")


def build(config: Config, layout: Layout) -> Stage:
    start = begin(config, layout)
    check(config, layout, start.model.config)
    reference = _Reference(config, start, layout) if config.loss.needs_reference else None
    train, held_out = (open_preferences(config.preferences, split, "direct") for split in ("train", "validation"))
    own = own_shards(config.data_shards, config.batch_size, layout)
    batches = _batches(config, train, start, train=True, shards=own)
    if reference is not None and config.reference_logprobs == "precomputed":
        batches = _Precomputed(batches, lambda: reference.table(_batches(config, train, start, train=False)))
    stage = assemble(
        config,
        start,
        loss=direct_loss(start.model, config.loss),
        tx=make_optimizer(config.optim, config.steps),
        schedule=make_schedule(config.optim, config.steps),
        batches=batches,
        evals=_held_out(config, start, reference, _batches(config, held_out, start, train=False), layout),
        units=config.batch_size,
        unit="prompts",
    )
    measure = total_logprobs(start.model, config.microbatches)

    def step(state: TrainState, batch: Arrays, key: jax.Array) -> tuple[TrainState, Pairs]:
        if reference is not None and REFERENCE not in batch:
            batch = batch | reference(batch)
        batch, others = _split(batch)
        if others:  # KTO's z has no gradient, and is one number for all microbatches
            kl = _kl(measure(start.whole(state.params), others), others)
            batch = batch | {"kl": jnp.broadcast_to(kl, batch["valid"].shape[:1])}
        return stage.step(state, batch, key)

    return dataclasses.replace(stage, step=step)


def direct_loss(model: Model, config: LossConfig) -> Callable[..., tuple[jax.Array, Pairs]]:
    """(params, batch, key) -> the loss of `make_loss` on a batch with its reference log-probabilities."""
    loss = make_loss(config)

    def of_batch(params: PyTree, batch: Arrays, key: jax.Array | None) -> tuple[jax.Array, Pairs]:
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
    return sequence_logprobs(logprobs, mask).reshape(shape), mean_logprobs(logprobs, mask).reshape(shape)


def _answers(batch: Arrays, total: Any, mean: Any) -> Answers:
    valid = batch["valid"] * (batch["lengths"] > 0)  # an answer without tokens has no log-probability to speak of
    reference = batch.get(REFERENCE, jnp.zeros_like(total))
    kl = batch["kl"][0] if "kl" in batch else jnp.zeros(())
    return Answers(total, mean, reference, batch["scores"], valid, kl, batch["same"])


def _batches(config: Config, source: Source, start: Start, **options: Any) -> Any:
    """Ranked answers; for KTO, beside them, the same prompts with the answers to others."""
    options |= {"batch_size": config.batch_size, "length": config.length, "seed": config.seed}
    batches = loader.preference_batches(source, start.tokenizer, **options)
    if config.loss.name != "kto":
        return batches
    others = loader.preference_batches(Mismatched(source, start.tokenizer), start.tokenizer, **options)
    return Together(batches, **{OTHERS[:-1]: others})


def _split(batch: Arrays) -> tuple[Arrays, Arrays]:
    """A batch, and what it has beside it of mismatched prompts and answers."""
    others = {name.removeprefix(OTHERS): x for name, x in batch.items() if name.startswith(OTHERS)}
    return {name: x for name, x in batch.items() if not name.startswith(OTHERS)}, others


def _kl(total: jax.Array, others: Arrays) -> jax.Array:
    """KTO's z from the log-probabilities [b, k] of mismatched answers."""
    return kto_kl(total.ravel(), others[REFERENCE].ravel(), others["valid"].ravel())


def total_logprobs(model: Model, parts: int) -> Callable[[PyTree, Arrays], jax.Array]:
    """(params, batch) -> log pi(y | x) of its answers, [b, k], in so many microbatches; jitted, without gradient."""
    return jax.jit(lambda params, batch: _in_parts(model, params, batch, parts)[0])


def _in_parts(model: Model, params: PyTree, batch: Arrays, parts: int) -> tuple[jax.Array, jax.Array]:
    """`answer_logprobs` without gradient or dropout, a microbatch at a time."""
    rows = {name: batch[name] for name in ("tokens", "segments", "lengths")}
    if parts == 1:
        return answer_logprobs(model, params, rows)
    rows = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), rows)  # as `state.gradients` does
    out = jax.lax.map(lambda some: answer_logprobs(model, params, some), rows)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), out)


# ------------------------------------------------------------------ the reference


class _Reference:
    """The frozen policy rho: log rho(y | x) of a batch, or of all data at once."""

    def __init__(self, config: Config, start: Start, layout: Layout):
        model, self._params = start.model, start.params
        if config.reference is not None:
            saved = store.load(config.reference, layout)
            model, self._params = saved.model, saved.params
            if model.head != "lm" or saved.tokenizer != start.tokenizer:
                raise ConfigError(
                    f"direct.reference={config.reference}: a language model with the policy's tokenizer is needed"
                )
        self._layout = layout
        self._total = total_logprobs(model, config.microbatches)

    def __call__(self, batch: Arrays) -> Arrays:
        """{"reference": [b, k]} of a batch on the devices, and the same of what is mismatched."""
        own, others = _split(batch)
        parts = {"": own, OTHERS: others} if others else {"": own}
        return {prefix + REFERENCE: self._total(self._params, part) for prefix, part in parts.items()}

    def table(self, batches: Any) -> dict[str, np.ndarray]:
        """{name: [rows, k]} for every row of the data, in one pass over them in order."""
        parts: dict[str, list[np.ndarray]] = {}
        for batch in batches.restart():
            for name, values in hosts.whole(self(self._layout.put(batch))).items():
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
        return batch | {name: rows[batch["index"]] for name, rows in self._table.items()}

    def get_state(self) -> Any:
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        self._batches.set_state(state)


# ------------------------------------------------------------------ held-out data


def _held_out(
    config: Config, start: Start, reference: _Reference | None, batches: Any, layout: Layout
) -> Callable[[TrainState], Pairs]:
    """state -> the loss and the implicit reward's accuracy on held-out answers; the reference is asked once."""
    measure = jax.jit(lambda params, batch: _in_parts(start.model, params, batch, config.microbatches))
    known: list[Arrays] = []  # by batch: the reference's log-probabilities

    def evals(state: TrainState) -> Pairs:
        parts: list[Arrays] = []
        for i, batch in enumerate(batches.restart()):
            if config.eval_batches and i == config.eval_batches:
                break
            placed = layout.put(batch)
            if i == len(known):
                known.append(hosts.whole(reference(placed)) if reference is not None else {})
            own, others = _split(placed)
            params = start.whole(state.params)
            total, mean = hosts.whole(measure(params, own))
            part = batch | known[i] | {"total": total, "mean": mean}
            if others:
                part[f"{OTHERS}total"] = hosts.whole(measure(params, others)[0])
            parts.append({name: x for name, x in part.items() if name.split("/")[-1] not in ("tokens", "segments")})
        return held_out_metrics(config.loss, {name: np.concatenate([p[name] for p in parts]) for name in parts[0]})

    return evals


def held_out_metrics(config: LossConfig, rows: Arrays) -> Pairs:
    """val_loss and the loss's other metrics; accuracy and margin over all pairs alike, as the reward stage has them."""
    rows, others = _split({name: jnp.asarray(x) for name, x in rows.items()})
    if others:
        rows["kl"] = _kl(others["total"], others)[None]
    answers = _answers(rows, rows["total"], rows["mean"])
    _, pairs = make_loss(config)(answers)
    labels = (answers.scores, answers.valid, answers.same)
    judged = [np.asarray(x) for x in (implicit_rewards(config, answers), *labels)]
    margins = stats.margins(*judged)
    return {f"val_{name}": pair for name, pair in {**pairs, **truncation_metrics(rows)}.items()} | {
        "val_accuracy": stats.pairwise_accuracy(*judged),
        "val_margin": (float(margins.sum()), float(margins.size)),
        "val_length_accuracy": (stats.length_baseline(np.asarray(rows["lengths"]), *judged[1:]), 1.0),
    }
