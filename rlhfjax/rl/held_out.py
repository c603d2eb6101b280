"""Held-out evaluation of a policy in training: reward, KL and length of its responses."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlhfjax import hosts
from rlhfjax.algos import shaping
from rlhfjax.data import loader
from rlhfjax.data.batches import PromptBatch
from rlhfjax.data.config import open_sources
from rlhfjax.metrics import merge
from rlhfjax.rl.config import PolicyConfig
from rlhfjax.rl.placement import held_out_placement
from rlhfjax.rl.prompts import held_out_prompts
from rlhfjax.rl.rewards import reference_kl, vocabulary_kl
from rlhfjax.rl.rollout import truncate_responses
from rlhfjax.rl.task import Task
from rlhfjax.sampling.config import Sampling, end_ids
from rlhfjax.state import TrainState
from rlhfjax.streams import HELD_OUT
from rlhfjax.supervised import held_out_loss, language_loss, sum_metrics
from rlhfjax.types import Metrics, PyTree


def make_evals(config: PolicyConfig, task: Task) -> Callable[[TrainState], Metrics]:
    """Returns a function state -> reward, KL to the reference and length of held-out responses.

    With `eval_text` also the loss on that text, as val_text_loss and val_text_nats_per_byte.

    The random numbers are the same at every call.
    """
    held_out = held_out_prompts(config.eval_prompts, task.tokenizer, config)
    policy, sampling = task.policy, Sampling.from_config(config, task.ids)
    placement = held_out_placement(config, task.layout, policy.model)
    reward = task.on_frozen(task.reward)

    sequence_kl = jax.jit(functools.partial(reference_kl, config, policy.model))
    kl_to_reference = task.on_frozen(functools.partial(sequence_kl, task.reference))

    text_losses = _make_text_losses(config, task)
    exact_kl = jax.jit(functools.partial(vocabulary_kl, config, policy.model))

    def measure(
        params: PyTree, weights: PyTree, batch: PromptBatch, number: int
    ) -> dict[str, Any]:
        """Returns measurements [b] of the responses to batch `number`.

        Args:
          weights: `params` where responses are sampled.
        """
        prompts = task.layout.put(batch)
        key = jax.random.fold_in(jax.random.key(config.seed), HELD_OUT + number)
        rollout = placement.sample(
            weights, prompts.tokens, prompts.attention_mask, key, sampling
        )
        scored = truncate_responses(config, task.ids, rollout)
        rows = (scored.tokens, scored.attention_mask, scored.mask)
        measured = {
            "val_kl": kl_to_reference(rollout),
            "val_proxy": reward(*rows),
            "val_response_length": rollout.mask.sum(1),
            "val_eos_rate": shaping.has_token(
                rollout.responses, rollout.mask, *end_ids(task.ids)
            ),
            "val_prompts_cut": batch.cut,
        }
        if config.kl.exact:
            exact = exact_kl(params, task.reference, rollout)
            measured["val_kl_exact"] = exact
        if task.gold is not None:
            measured["val_gold"] = task.gold(*rows)
        return measured

    def evals(state: TrainState) -> Metrics:
        params = policy.merged(state.params["policy"])
        weights = placement.place(params)
        total = text_losses(params)
        for i, batch in enumerate(held_out.restart()):
            is_prompt = (batch.index >= 0).astype(np.float32)
            for name, values in measure(params, weights, batch, i).items():
                values = np.asarray(hosts.whole(values), np.float32)
                metric = (float((values * is_prompt).sum()), float(is_prompt.sum()))
                total = merge(total, {name: metric})
        return total

    return evals


def _make_text_losses(config: PolicyConfig, task: Task) -> Callable[[PyTree], Metrics]:
    """Returns a function params -> losses on the text of `eval_text`; nothing without sources."""
    text = config.eval_text
    if not text.sources:
        return lambda params: {}
    model, tokenizer = task.policy.model, task.tokenizer
    length = text.length
    if not length:
        length = config.prompt_length + config.max_new_tokens
    batches = loader.pretrain_batches(
        open_sources(text.sources, f"{config.stage}.eval_text.sources"),
        tokenizer,
        batch_size=config.episodes,
        length=length,
        train=False,
    )
    loss = held_out_loss(model, language_loss(model), tokenizer.byte_lengths())

    def losses(params: PyTree) -> Metrics:
        of_batch = functools.partial(loss, params)
        found = sum_metrics(batches.restart(), of_batch, task.layout, text.batches)
        return {
            f"val_text_{name}": found[f"val_{name}"]
            for name in ("loss", "nats_per_byte")
        }

    return losses
