"""Pretraining: next-token loss on packed documents.

L(theta) = -1/|T| sum_{t in T} log p_theta(x_t | x_<t), T the tokens that have a predecessor in their own document.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax.data import loader
from rlhfjax.data.config import SourceConfig, open_sources, own_shards
from rlhfjax.mesh import Layout
from rlhfjax.models.transformer import Model
from rlhfjax.ranges import Tokens
from rlhfjax.roles import DISK, Role, Sources, Workload
from rlhfjax.stage import Stage
from rlhfjax.supervised import (
    MODEL,
    Batch,
    StreamConfig,
    language_shapes,
    language_stage,
    supervised_workload,
    trained_role,
    validate_streams,
)
from rlhfjax.types import Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(StreamConfig):
    stage: str = "pretrain"
    sources: tuple[SourceConfig, ...] = ()
    eval_sources: tuple[SourceConfig, ...] = ()
    length: Tokens
    cross_document: bool = False  # GPT-3 (App. B) attends across the documents of a window; we keep them apart


validate = validate_streams


def workload(config: Config, completions: int = 1) -> Workload:
    return supervised_workload(config)


def roles(config: Config) -> dict[str, Role]:
    return {MODEL: trained_role(config)}


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    options = {
        "batch_size": config.batch_size,
        "length": config.length,
        "cross_document": config.cross_document,
    }

    def streams(tokenizer: Any) -> tuple[Any, Any]:
        train = open_sources(config.sources, "pretrain.sources")
        held_out = open_sources(config.eval_sources, "eval_sources")
        own = own_shards(config.data_shards, config.batch_size, layout)
        return (
            loader.pretrain_batches(
                train, tokenizer, seed=config.seed, shards=own, **options
            ),
            loader.pretrain_batches(
                held_out, tokenizer, seed=0, train=False, **options
            ),
        )

    shapes = language_shapes(config.batch_size, config.length)
    return language_stage(
        config, layout, roles(config), sources, language_loss, streams, shapes
    )


def language_loss(model: Model) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Returns a function (params, batch, key) -> mean negative log-likelihood of the masked
    targets, nats per token."""

    def loss(
        params: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        key = key if model.drops else None
        hidden = model.hidden(
            params, batch["tokens"], batch["positions"], batch["segments"], key
        )
        nll, weight = model.cross_entropy(
            params, hidden, batch["targets"], batch["mask"]
        )
        return nll / jnp.maximum(weight, 1.0), {"loss": (nll, weight)}

    return loss
