"""Pretraining: next-token loss on packed documents.

L(theta) = -1/|T| sum_{t in T} log p_theta(x_t | x_<t), T the tokens that have a predecessor in their own document.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.data import loader
from rlhfjax.data.config import SourceConfig, open_sources, own_shards
from rlhfjax.mesh import Layout
from rlhfjax.metrics import merge
from rlhfjax.models.transformer import Model
from rlhfjax.optim import make_optimizer, make_schedule
from rlhfjax.programs import STATE, WHOLE, Program
from rlhfjax.roles import DISK, Models, Role, Sources, Workload
from rlhfjax.stage import Data, Metrics, Stage, row_shapes
from rlhfjax.state import TrainState, apply_gradients, gradients
from rlhfjax.supervised import (
    MODEL,
    StreamConfig,
    held_out_loss,
    left_behind,
    load_trained,
    sum_over,
    supervised_workload,
    trained_role,
    validate_streams,
)

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    stage: str = "pretrain"
    sources: tuple[SourceConfig, ...] = ()
    eval_sources: tuple[SourceConfig, ...] = ()
    length: int
    cross_document: bool = False  # GPT-3 (App. B) attends across the documents of a window; we keep them apart


validate = validate_streams


def workload(config: Config, completions: int = 1) -> Workload:
    return supervised_workload(config)


def roles(config: Config) -> dict[str, Role]:
    return {MODEL: trained_role(config)}


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    loaded = load_trained(config, Models(config.stage, roles(config), layout, sources))
    model, tokenizer = loaded.model, loaded.tokenizer
    validate(config, layout, model.config)
    loss = language_loss(model)
    tx = make_optimizer(config.optim, config.steps)
    schedule = make_schedule(config.optim, config.steps)

    @functools.partial(jax.jit, donate_argnums=1)
    def update(frozen: Any, state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        options = {"microbatches": config.microbatches, "frozen": frozen}
        grads, metrics = gradients(loss, state.params, batch, key, **options)
        rate = schedule(state.step)
        skip = config.on_nonfinite == "skip"
        state, update_metrics = apply_gradients(state, grads, tx, skip_nonfinite=skip)
        rate_metrics = {"learning_rate": (rate, jnp.ones(()))}
        return state.replace(step=state.step + 1), merge(metrics, update_metrics, rate_metrics)

    program = Program("step", update, [STATE, WHOLE])

    def step(state: TrainState, batch: Batch, key: Any) -> tuple[TrainState, Metrics]:
        return program(loaded.frozen, state, batch, key)

    def open_data() -> Data:
        options = {"batch_size": config.batch_size, "length": config.length, "cross_document": config.cross_document}
        train = open_sources(config.sources, "pretrain.sources")
        held_out = open_sources(config.eval_sources, "eval_sources")
        own = own_shards(config.data_shards, config.batch_size, layout)
        batches = loader.pretrain_batches(train, tokenizer, seed=config.seed, shards=own, **options)
        passes = loader.pretrain_batches(held_out, tokenizer, seed=0, train=False, **options)
        measure = held_out_loss(model, loss, tokenizer.byte_lengths())

        def evals(state: TrainState) -> Metrics:
            params = loaded.merged(state.params)
            return sum_over(passes.restart(), lambda b: measure(params, b), layout, config.eval_batches)

        return Data(batches, evals, lambda state: left_behind(loaded, state.params))

    row = (config.length,)
    return Stage(
        init=lambda key: TrainState.create(model.init_trained(key), tx),
        axes=model.trained_axes(),
        start=lambda state: state.replace(params=loaded.start(state.params)),
        step=step,
        batch=lambda _: row_shapes(
            config.batch_size,
            tokens=(row, np.int32),
            targets=(row, np.int32),
            segments=(row, np.int32),
            positions=(row, np.int32),
            mask=(row, np.float32),
        ),
        open=open_data,
        units=config.batch_size * config.length,
    )


def language_loss(model: Model) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Returns a function (params, batch, key) -> mean negative log-likelihood of the masked
    targets, nats per token."""

    def loss(params: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        key = key if model.drops else None
        hidden = model.hidden(params, batch["tokens"], batch["positions"], batch["segments"], key)
        nll, weight = model.cross_entropy(params, hidden, batch["targets"], batch["mask"])
        return nll / jnp.maximum(weight, 1.0), {"loss": (nll, weight)}

    return loss
