"""Process reward learning: the probability that each step of a solution is right.

loss = -mean over steps of y log sigmoid(z) + (1 - y) log sigmoid(-z)

where z is the scalar head at the last token of a step and y its label. Rows are of kind steps:

    {"messages": [..., a user's turn], "steps": [text, ...], "labels": [number, ...]}

The result is a reward by name: the product, or the minimum, of the probabilities of a response's
steps. A step ends where the separator ends; see `data/steps.py`.

Source: Lightman et al. 2023, "Let's Verify Step by Step"; Uesato et al. 2022.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax.algos import process
from rlhfjax.data.batches import StepBatch, shapes
from rlhfjax.data.config import SourceConfig, open_mixture, open_sources, own_shards
from rlhfjax.data.loader import step_batches
from rlhfjax.data.steps import Neutral
from rlhfjax.mesh import Layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.experts import add_balance
from rlhfjax.models.transformer import Model
from rlhfjax.ranges import Size, Tokens
from rlhfjax.rewards.process import SEPARATOR, validate_separator
from rlhfjax.roles import DISK, REWARD, Models, Role, Sources, Workload
from rlhfjax.stage import Data, Finished, Stage
from rlhfjax.state import TrainState
from rlhfjax.supervised import (
    MODEL,
    LossFunction,
    StreamConfig,
    finished_model,
    load_trained,
    sum_metrics,
    supervised_stage,
    supervised_workload,
    train_step,
    trained_role,
    validate_streams,
)
from rlhfjax.types import Loss, Metrics, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    """The options of process reward learning."""

    stage: str = "process_reward"
    """Name of the stage."""
    sources: tuple[SourceConfig, ...] = ()
    """Solutions with a label per step, rows of kind steps, to train on."""
    eval_sources: tuple[SourceConfig, ...] = ()
    """Held-out solutions."""
    length: Tokens
    """Tokens of prompt and solution; the prompt keeps at most half of them where both are long."""
    batch_size: Size
    """Solutions per update."""
    separator: str = SEPARATOR
    """Text between two steps; responses that are scored are divided by it."""
    neutral: Neutral = None
    """None: labels are from 0 to 1. Of ratings -1, 0 and 1 (PRM800K), what 0 is: positive (Lightman
    et al. 2023, appendix F), negative, or masked, without a label."""
    combine: process.Combine = "product"
    """Score of a response: product of the probabilities of its steps (Lightman et al. 2023), or
    their minimum."""


def roles(config: Config) -> dict[str, Role]:
    return {MODEL: trained_role(config, head="scalar")}


def workload(config: Config, completions: int = 1) -> Workload:
    return supervised_workload(config)


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    validate_streams(config, layout, model_config)
    validate_separator(config.separator, config.stage)


def describe(config: Config) -> dict[str, Any]:
    """Returns the content of reward.json: the model beside it scores steps."""
    return {
        "kind": "process",
        "separator": config.separator,
        "combine": config.combine,
    }


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    models = Models(config.stage, roles(config), layout, sources)
    loaded, tokenizer = load_trained(config, models)
    model = loaded.model
    validate(config, layout, model.config)
    step, tx = train_step(config, loaded, steps_loss(model))
    measure = held_out_steps(model, config.combine)

    def open_data() -> Data:
        train = open_mixture(config.sources, f"{config.stage}.sources")
        held = open_sources(config.eval_sources, f"{config.stage}.eval_sources")
        load_with = functools.partial(
            step_batches,
            tokenizer=tokenizer,
            batch_size=config.batch_size,
            length=config.length,
            separator=config.separator,
            neutral=config.neutral,
        )
        shards = own_shards(config.data_shards, config.batch_size, layout)
        batches = load_with(train, seed=config.seed, shards=shards)
        held_out = load_with(held, train=False)

        def evals(state: TrainState) -> Metrics:
            params = loaded.merged(state.params)
            total = sum_metrics(
                held_out.restart(),
                functools.partial(measure, params),
                layout,
                config.eval_batches,
            )
            return total | majorities(total)

        def finish(state: TrainState) -> Finished:
            finished = finished_model(loaded, state.params)
            return finished._replace(files={REWARD: describe(config)})

        return Data(batches, evals, finish)

    def batch_shapes(_: int) -> StepBatch:
        return shapes(StepBatch, b=config.batch_size, t=config.length)

    return supervised_stage(
        loaded,
        tx,
        step=step,
        batch=batch_shapes,
        open=open_data,
        units=config.batch_size,
        unit="solutions",
    )


def steps_loss(model: Model) -> LossFunction:
    """Returns the loss of a StepBatch as a function (params, batch, key) -> (loss, metrics)."""

    def of_batch(params: PyTree, batch: StepBatch, key: jax.Array | None) -> Loss:
        key = key if model.drops else None
        hidden, routing = model.hidden_and_routing(
            params, batch.tokens, segment_ids=batch.attention_mask, key=key
        )
        logits = model.scalar(params, hidden)
        scalar, metrics = process.step_loss(logits, batch.labels, batch.weight)
        metrics["rows_cut"] = _rows_cut(batch)
        return add_balance(model.config, (scalar, metrics), routing)

    return of_batch


def held_out_steps(model: Model, combine: process.Combine) -> Any:
    """Returns a function (params, batch) -> the metrics of held-out steps and solutions."""

    @jax.jit
    def measure(params: PyTree, batch: StepBatch) -> Metrics:
        hidden = model.hidden(params, batch.tokens, segment_ids=batch.attention_mask)
        logits = model.scalar(params, hidden)
        _, metrics = process.step_loss(logits, batch.labels, batch.weight)
        scores = process.solution_scores(logits, batch.ends, combine=combine)
        metrics |= process.solution_metrics(scores, batch.labels, batch.weight)
        metrics["rows_cut"] = _rows_cut(batch)
        return {f"val_{name}": metric for name, metric in metrics.items()}

    return measure


def majorities(total: Metrics) -> Metrics:
    """Returns the accuracies of always giving the more frequent answer, to compare with.

    Args:
      total: of `held_out_steps`, summed.
    """
    names = {
        "val_majority": "val_positive",
        "val_solution_majority": "val_solution_positive",
    }
    found: Metrics = {}
    for name, share in names.items():
        positive, count = total[share]
        found[name] = (max(positive, count - positive), count)
    return found


def _rows_cut(batch: StepBatch) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(batch.cut * batch.valid), jnp.sum(batch.valid)
