"""Held-out responses of a policy in training: their reward, their KL to the reference, their length."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlhfjax import hosts
from rlhfjax.algos import kl, shaping
from rlhfjax.data.batches import PromptBatch
from rlhfjax.mesh import Layout
from rlhfjax.metrics import merge
from rlhfjax.rl.config import PolicyConfig
from rlhfjax.rl.prompts import held_out_prompts
from rlhfjax.rl.rollout import Rollout, response_logprobs, sampled, truncated
from rlhfjax.rl.task import Task
from rlhfjax.state import TrainState
from rlhfjax.streams import HELD_OUT
from rlhfjax.types import Metrics, PyTree


def held_out(
    config: PolicyConfig, task: Task, layout: Layout
) -> Callable[[TrainState], Metrics]:
    """Returns a function state -> reward, KL to the reference and length of responses to held-out
    prompts; the draws are always the same."""
    prompts = held_out_prompts(config.eval_prompts, task.tokenizer, config)
    policy = task.policy
    reward = task.on_frozen(task.reward)

    @jax.jit
    def sequence_kl(reference: PyTree, rollout: Rollout) -> jax.Array:
        r = rollout.mask.shape[1]
        ref_logprobs, _ = response_logprobs(
            policy.model,
            reference,
            rollout.tokens,
            rollout.segments,
            r,
            config.temperature,
        )
        return kl.sequence_kl(kl.k1(rollout.logprobs, ref_logprobs), rollout.mask)

    kl_to_reference = task.on_frozen(functools.partial(sequence_kl, task.reference))

    def measure(params: PyTree, batch: PromptBatch, number: int) -> dict[str, Any]:
        on_devices = layout.put(batch)
        key = jax.random.fold_in(jax.random.key(config.seed), HELD_OUT + number)
        rows = (on_devices.tokens, on_devices.attention_mask, key)
        rollout = sampled(config, policy.model, task.tokens, params, *rows)
        scored = truncated(config, task.tokens, rollout)
        seen = (scored.tokens, scored.segments, scored.mask)
        measured = {
            "val_kl": kl_to_reference(rollout),
            "val_proxy": reward(*seen),
            "val_response_length": rollout.mask.sum(1),
            "val_eos_rate": shaping.has_token(
                rollout.responses, rollout.mask, task.tokenizer.eos_id
            ),
            "val_prompts_cut": batch.cut,
        }
        return (
            measured if task.gold is None else measured | {"val_gold": task.gold(*seen)}
        )

    def evals(state: TrainState) -> Metrics:
        params, total = policy.merged(state.params["policy"]), {}
        for i, batch in enumerate(prompts.restart()):
            real = (batch.index >= 0).astype(np.float32)
            for name, values in measure(params, batch, i).items():
                host = np.asarray(hosts.whole(values), np.float32)
                total = merge(
                    total, {name: (float((host * real).sum()), float(real.sum()))}
                )
        return total

    return evals
