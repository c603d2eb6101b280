"""Held-out answers of a policy in training: their reward, their KL to the reference, their length."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlhfjax import hosts
from rlhfjax.algos import kl, shaping
from rlhfjax.mesh import Layout, elsewhere
from rlhfjax.metrics import merge
from rlhfjax.rewards.load import load_reward
from rlhfjax.stages import Pairs
from rlhfjax.stages.parts.prompts import held_out_prompts
from rlhfjax.stages.parts.rollout import Rollout, response_logprobs
from rlhfjax.state import TrainState, attach

PyTree = Any


def held_out(
    config: Any,
    algorithm: Any,
    task: Any,
    layout: Layout,
    frozen: PyTree,
) -> Callable[[TrainState], Pairs]:
    """state -> reward, KL to the reference and length of answers to held-out prompts; the draws are always the same.

    Args:
      config: a PolicyConfig.
      algorithm: a PolicyAlgorithm.
      task: a Task: reward, reference and where they are.
      frozen: of the policy, what the state does not hold.
    """
    prompts = held_out_prompts(config.eval_prompts, task.tokenizer, config)
    gold = load_reward(config.gold, layout, task.tokenizer) if config.gold else None
    reward = elsewhere(task.there, layout, task.reward)

    @jax.jit
    def sequence_kl(reference: PyTree, rollout: Rollout) -> jax.Array:
        r = rollout.mask.shape[1]
        ref_logprobs, _ = response_logprobs(
            algorithm.model, reference, rollout.tokens, rollout.segments, r, config.temperature
        )
        return kl.sequence_kl(kl.k1(rollout.logprobs, ref_logprobs), rollout.mask)

    def evals(state: TrainState) -> Pairs:
        params, total = attach(frozen, state.params["policy"]), {}
        for i, batch in enumerate(prompts.restart()):
            real = (batch["index"] >= 0).astype(np.float32)
            placed = layout.put(batch)
            key = jax.random.fold_in(jax.random.key(config.seed), 2**31 + i)
            rollout = algorithm.rollout(params, placed["prompts"], placed["segments"], key)
            seen = algorithm.seen(rollout)
            measured = {
                "val_kl": elsewhere(task.there, layout, functools.partial(sequence_kl, task.reference))(rollout),
                "val_proxy": reward(*seen),
                "val_response_length": rollout.mask.sum(1),
                "val_eos_rate": shaping.has_token(rollout.responses, rollout.mask, task.tokenizer.eos_id),
            }
            measured["val_prompts_cut"] = batch["cut"]
            if gold is not None:
                measured["val_gold"] = gold(*seen)
            measured = {name: np.asarray(hosts.whole(x), np.float32) for name, x in measured.items()}
            total = merge(total, {name: (float((x * real).sum()), float(real.sum())) for name, x in measured.items()})
        return total

    return evals
