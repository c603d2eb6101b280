"""What pretraining and fine-tuning have in common: a language model, the masked next-token loss, held-out loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.algos.language import nats_per_byte
from rlhfjax.data.loader import Batches
from rlhfjax.mesh import Layout
from rlhfjax.models.transformer import Model
from rlhfjax.optim import make_optimizer, make_schedule
from rlhfjax.stages import Pairs, Stage
from rlhfjax.stages.parts.common import ModelTrainConfig, Start, assemble, sum_over
from rlhfjax.state import TrainState


def language_loss(model: Model) -> Callable[..., tuple[jax.Array, Pairs]]:
    """Returns a function (params, batch, key) -> mean negative log-likelihood of the masked
    targets, nats per token.

    Its metrics are the loss, and where the loader counts them (`cut`) the share of examples that
    lost tokens.
    """

    def loss(params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> tuple[jax.Array, Pairs]:
        key = key if model.drops else None
        hidden = model.hidden(params, batch["tokens"], batch["positions"], batch["segments"], key)
        nll, weight = model.cross_entropy(params, hidden, batch["targets"], batch["mask"])
        pairs = {"loss": (nll, weight)}
        if "cut" in batch:
            examples = jnp.sum((batch["positions"] == 0) & (batch["segments"] > 0))
            pairs["examples_cut"] = (jnp.sum(batch["cut"]), examples.astype(jnp.float32))
        return nll / jnp.maximum(weight, 1.0), pairs

    return loss


def held_out_loss(model: Model, byte_lengths: np.ndarray) -> Callable[..., Pairs]:
    """Returns a function (params, batch) -> val_loss, nats per token, and val_nats_per_byte of the
    same targets.

    Args:
      byte_lengths: UTF-8 bytes of the text of each id of the tokenizer; ids beyond them have none.
    """
    lengths = jnp.zeros(model.config.vocab_size).at[: len(byte_lengths)].set(byte_lengths)

    @jax.jit
    def measure(params: Any, batch: dict[str, jax.Array]) -> Pairs:
        _, pairs = language_loss(model)(params, batch, None)
        nll, _ = pairs["loss"]
        pairs["nats_per_byte"] = nats_per_byte(nll, batch["targets"], batch["mask"], lengths)
        return {f"val_{name}": pair for name, pair in pairs.items()}

    return measure


def language_stage(
    config: ModelTrainConfig,
    start: Start,
    layout: Layout,
    *,
    batches: Any,
    held_out: Batches,
    tokens: int,
) -> Stage:
    measure = held_out_loss(start.model, start.tokenizer.byte_lengths())

    def evals(state: TrainState) -> Pairs:
        params = start.whole(state.params)
        return sum_over(held_out.restart(), lambda batch: measure(params, batch), layout, config.eval_batches)

    return assemble(
        config,
        start,
        loss=language_loss(start.model),
        tx=make_optimizer(config.optim, config.steps),
        schedule=make_schedule(config.optim, config.steps),
        batches=batches,
        evals=evals,
        units=tokens,
    )
