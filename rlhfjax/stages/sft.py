"""Supervised fine-tuning: next-token loss on what the assistant says, in the chat template, packed.

L(theta) = -1/|A| sum_{t in A} log p_theta(x_t | x_<t), A the assistant's tokens and the eos of its turns.
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
from rlhfjax.models.transformer import Model
from rlhfjax.optim import make_optimizer
from rlhfjax.programs import STATE, WHOLE, Program
from rlhfjax.roles import DISK, Models, Role, Sources, Workload
from rlhfjax.stage import Data, Metrics, Stage, row_shapes
from rlhfjax.state import TrainState, gradients
from rlhfjax.supervised import (
    MODEL,
    StreamConfig,
    descend,
    held_out_loss,
    language_shapes,
    left_behind,
    load_trained,
    sum_over,
    supervised_stage,
    supervised_workload,
    trained_role,
    validate_streams,
)

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    stage: str = "sft"
    sources: tuple[SourceConfig, ...] = ()
    eval_sources: tuple[SourceConfig, ...] = ()
    length: int


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

    @functools.partial(jax.jit, donate_argnums=1)
    def update(frozen: Any, state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        options = {"microbatches": config.microbatches, "frozen": frozen}
        grads, metrics = gradients(loss, state.params, batch, key, **options)
        return descend(config, tx, state, grads, metrics)

    program = Program("step", update, [STATE, WHOLE])

    def step(state: TrainState, batch: Batch, key: Any) -> tuple[TrainState, Metrics]:
        return program(loaded.frozen, state, batch, key)

    def open_data() -> Data:
        options = {"batch_size": config.batch_size, "length": config.length}
        train = open_sources(config.sources, "sft.sources")
        held_out = open_sources(config.eval_sources, "sft.eval_sources")
        own = own_shards(config.data_shards, config.batch_size, layout)
        batches = loader.sft_batches(train, tokenizer, seed=config.seed, shards=own, **options)
        passes = loader.sft_batches(held_out, tokenizer, seed=0, train=False, **options)
        measure = held_out_loss(model, loss, tokenizer.byte_lengths())

        def evals(state: TrainState) -> Metrics:
            params = loaded.merged(state.params)
            return sum_over(passes.restart(), lambda b: measure(params, b), layout, config.eval_batches)

        return Data(batches, evals, lambda state: left_behind(loaded, state.params))

    shapes = language_shapes(config.batch_size, config.length)
    shapes = {**shapes, **row_shapes(config.batch_size, cut=((), np.float32))}
    return supervised_stage(
        loaded,
        tx,
        step=step,
        batch=lambda _: shapes,
        open=open_data,
        units=config.batch_size * config.length,
    )


def language_loss(model: Model) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Returns a function (params, batch, key) -> mean negative log-likelihood of the masked
    targets, nats per token.

    Its metrics are the loss, and the share of examples that lost tokens.
    """

    def loss(params: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        key = key if model.drops else None
        hidden = model.hidden(params, batch["tokens"], batch["positions"], batch["segments"], key)
        nll, weight = model.cross_entropy(params, hidden, batch["targets"], batch["mask"])
        examples = jnp.sum((batch["positions"] == 0) & (batch["segments"] > 0))
        examples_cut = (jnp.sum(batch["cut"]), examples.astype(jnp.float32))
        metrics = {"loss": (nll, weight), "examples_cut": examples_cut}
        return nll / jnp.maximum(weight, 1.0), metrics

    return loss
