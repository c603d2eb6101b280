"""Known defects put back, one at a time: the regression tests of `test_pitfall_NN_*` must notice
each.

    python -m tests.defects                all of them
    python -m tests.defects 03 17          those of some lines of the list of pitfalls
    python -m tests.defects --control 03   their tests with nothing put back

Every defect is one replacement of text in a copy of the package; nothing here touches the working
tree. A line a defect says whether each test that should notice it has a case that fails; the exit
code is 1 where one does not. `tests/test_defects.py` holds that every such test is in this table
and that every text is still there to be replaced.
"""

import contextlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("rlhfjax", "tests", "benchmarks", "experiments", "pyproject.toml")
CONTROL = "--control"
JOBS = 2  # defects at a time
# seconds a defect; one that makes a test hang is not noticed in the way that was meant
LIMIT = 600.0
# What every test imports, imported once: each defect runs in a fork of a process that has them, and
# no line of ours.
PRELOADED = [
    "pytest",
    "jax.numpy",
    "flax.linen",
    "optax",
    "grain",
    "orbax.checkpoint",
    "hypothesis",
    "beartype",
]


@dataclass(frozen=True)
class Defect:
    pitfall: int  # the line of the list
    file: str  # under rlhfjax/
    old: str  # stands there once
    new: str
    tests: tuple[str, ...]  # under tests/; of each, some case must fail


NOT_YET: dict[int, str] = {}  # lines that nothing of ours can get wrong yet, and why


def d(pitfall: int, file: str, old: str, new: str, *tests: str) -> Defect:
    return Defect(pitfall, file, old, new, tests)


DEFECTS = [
    # ------------------------------------------------------------------ sampling and log-
    # probabilities 1: positions count slots of padding
    d(
        1,
        "models/transformer.py",
        "return jnp.where(segment_ids > 0, index - start, 0)",
        "return jnp.broadcast_to(index, segment_ids.shape)",
        "models/test_transformer.py::test_pitfall_01_left_padding_changes_nothing",
        "models/test_transformer.py::test_pitfall_01_positions_count_real_tokens",
    ),
    # 1: ... in the decoding loop alone
    d(
        1,
        "sampling/generate.py",
        "position, place = length + s.step - 1, p + s.step - 1",
        "position, place = jnp.full_like(length, p) + s.step - 1, p + s.step - 1",
        "sampling/test_generate.py::test_pitfall_05_logprobs_are_teacher_forced",
        "sampling/test_generate.py::test_pitfall_05_cached_is_uncached",
    ),
    # 1: prompts padded on the right
    d(
        1,
        "data/padding.py",
        "[length - len(ids) for ids in rows]",
        "[0 for ids in rows]",
        "data/test_loader.py::test_pitfall_01_prompts_are_padded_on_the_left_and_segments_tell",
    ),
    # 1: the response is read one slot off
    d(
        1,
        "rl/rollout.py",
        "[:, -r - 1 : -1]",
        "[:, -r:]",
        "test_pitfalls.py::test_pitfall_04_rollouts_are_drawn_from_the_whole_softmax",
    ),
    # 2: a pad that is the eos is taken as the file has it; a tokenizer without a pad is taken, for
    # pad = eos later
    d(
        2,
        "data/hf_tokenizer.py",
        'if given.get("pad_token", self.eos_id) != self.eos_id:',
        'if "pad_token" in given:',
        "data/test_hf_tokenizer.py::test_pitfall_02_the_pad_is_never_the_eos",
    ),
    d(
        2,
        "data/tokenizer.py",
        "if min(specials) < 0 or len(set(specials)) < 4:",
        "if min(specials[1:]) < 0:",
        "data/test_tokenizer.py::test_pitfall_02_pad_bos_eos_and_unk_are_four_ids",
    ),
    d(
        2,
        "sampling/config.py",
        "if self.eos_id == self.pad_id:",
        "if False:",
        "sampling/test_generate.py::test_pitfall_02_the_end_is_not_padding",
    ),
    # 2: the eos is masked out of the loss
    d(
        2,
        "data/loader.py",
        "counts = np.ones(len(tokens), np.float32)",
        "counts = (tokens != tokenizer.eos_id).astype(np.float32)",
        "data/test_loader.py::test_pitfall_02_eos_is_a_target_that_counts",
    ),
    # 3: the reference (and whoever scores with it) forgets the temperature
    d(
        3,
        "rl/iteration.py",
        "response_outputs(config, model, params, rollout)",
        "response_outputs(__import__('dataclasses').replace(config, temperature=1.0), model, params, rollout)",
        "test_stages.py::test_pitfall_03_first_ratio_is_one_and_kl_zero_at_temperature_not_one",
        "test_stage_group.py::test_pitfall_03_first_ratio_of_a_group_stage_is_one_and_kl_zero",
    ),
    # 3: the trainer forgets it
    d(
        3,
        "stages/ppo.py",
        'response_outputs(c, model, params["policy"], batch)',
        'response_outputs(dataclasses.replace(c, temperature=1.0), model, params["policy"], batch)',
        "test_stage_ppo.py::test_pitfall_20_dropout_is_off_in_ppo",
    ),
    # 3: the sampler draws with it and reports without
    d(
        3,
        "sampling/choose.py",
        "token = inverse_cdf(logits, u)\n    picked",
        "token = inverse_cdf(logits, u)\n        logits = logits * sampling.temperature\n    picked",
        "sampling/test_generate.py::test_pitfall_03_logprobs_carry_the_temperature",
    ),
    # 4: drawn from the truncated softmax, scored by the whole one
    d(
        4,
        "sampling/choose.py",
        "logits = keep_top_k(logits / sampling.temperature, sampling.top_k)\n        logits = keep_top_p(logits, sampling.top_p)\n        logits = keep_min_p(logits, sampling.min_p)\n        token = inverse_cdf(logits, u)",
        "logits = logits / sampling.temperature\n        token = inverse_cdf(keep_top_p(keep_top_k(logits, sampling.top_k), sampling.top_p), u)",
        "sampling/test_generate.py::test_pitfall_04_truncated_logprobs_are_those_sampled_from",
    ),
    d(
        4,
        "sampling/config.py",
        "            temperature=config.temperature,\n",
        "            temperature=config.temperature,\n            top_p=0.95,\n",
        "test_pitfalls.py::test_pitfall_04_rollouts_are_drawn_from_the_whole_softmax",
    ),
    d(
        4,
        "sampling/config.py",
        "    stop_at_eos: bool = True",
        "    top_k: int = 0\n    top_p: float = 1.0\n    stop_at_eos: bool = True",
        "test_pitfalls.py::test_pitfall_04_a_training_stage_cannot_be_asked_to_truncate",
    ),
    d(
        4,
        "rl/config.py",
        "class PolicyConfig(TrainConfig, SamplingConfig):",
        "class PolicyConfig(TrainConfig, ShapedSamplingConfig):",
        "test_pitfalls.py::test_pitfall_04_a_policy_stage_cannot_be_asked_to_shape_its_samples",
    ),
    # 5: the sampler computes in another dtype
    d(
        5,
        "sampling/generate.py",
        "logits = model.sampling_logits(params, hidden)\n        token, logprob = choose(logits, u[step]",
        "logits = model.sampling_logits(params, hidden.astype(jnp.bfloat16))\n        token, logprob = choose(logits, u[step]",
        "sampling/test_generate.py::test_pitfall_05_logprobs_are_teacher_forced",
        "sampling/test_generate.py::test_pitfall_05_cached_is_uncached",
    ),
    # 5: ... with continuous batching: a lane's position is that of another row
    d(
        5,
        "sampling/continuous.py",
        "position = jnp.minimum(lengths[prompt] + s.step, entries) - 1",
        "position = jnp.minimum(lengths[0] + s.step, entries) - 1",
        "sampling/test_continuous.py::test_pitfall_05_continuous_logprobs_are_teacher_forced",
    ),
    # 6: text encoded anew: by the loader, by collection, before the reward
    d(
        6,
        "data/examples.py",
        'if "prompt_tokens" in row:',
        "if False:",
        "data/test_loader.py::test_pitfall_06_stored_ids_are_used_as_they_were_sampled",
    ),
    d(
        6,
        "stages/collect.py",
        "rows += _rows(batch, answers, labels)",
        """rows += _rows(batch, answers, labels)
            for row in rows:
                row["completion_tokens"] = [[*tokenizer.encode(x), tokenizer.eos_id] for x in row["completions"]]""",
        "test_pitfalls.py::test_pitfall_06_collected_answers_keep_their_ids",
    ),
    d(
        6,
        "stages/ppo.py",
        "rollout, state = rollouts.current, drop_next_rollout(state)",
        """rollout, state = rollouts.current, drop_next_rollout(state)
        import numpy as np

        tokens, mask = np.array(rollout.tokens), np.array(rollout.mask)
        for row, keep in zip(tokens[:, -mask.shape[1] :], mask, strict=True):
            ids = task.tokenizer.encode(task.tokenizer.decode(row[keep > 0].tolist()))[: len(row)]
            row[:] = [*ids, *[task.tokenizer.pad_id] * (len(row) - len(ids))]
        rollout = rollout._replace(tokens=layout.put({"anew": tokens})["anew"])""",
        "test_stages.py::test_pitfall_06_the_reward_scores_the_ids_that_were_sampled",
    ),
    d(
        6,
        "stages/group.py",
        "rollout, state = rollouts.current, drop_next_rollout(state)",
        """rollout, state = rollouts.current, drop_next_rollout(state)
        rollout = rollout._replace(tokens=rollout.tokens + 1)""",
        "test_policy_step.py::test_what_a_step_hands_to_its_parts",
    ),
    # 7: one constant for every generation; greedy
    d(
        7,
        "sampling/samples.py",
        "return jax.random.uniform(jax.random.fold_in(key, i))",
        "return jax.random.uniform(jax.random.fold_in(jax.random.key(0), i))",
        "sampling/test_generate.py::test_pitfall_07_keys_make_the_draw",
        "test_stage_ppo.py::test_pitfall_07_every_iteration_draws_anew",
    ),
    d(
        7,
        "sampling/config.py",
        "            temperature=config.temperature,\n",
        "            temperature=0.0,\n",
        "test_stage_ppo.py::test_pitfall_07_every_iteration_draws_anew",
    ),
    # 8: an eos forced onto what was cut off; one token short of the limit; an eos in the padding
    # taken for an end
    d(
        8,
        "sampling/generate.py",
        "return jax.lax.while_loop(is_decoding, decode, start).samples",
        """samples = jax.lax.while_loop(is_decoding, decode, start).samples
    return samples._replace(tokens=samples.tokens.at[:, -1].set(sampling.eos_id))""",
        "sampling/test_generate.py::test_pitfall_08_the_end",
    ),
    d(
        8,
        "sampling/generate.py",
        "return (s.step < max_new_tokens) &",
        "return (s.step < max_new_tokens - 1) &",
        "sampling/test_generate.py::test_pitfall_08_the_end",
    ),
    d(
        8,
        "algos/shaping.py",
        "return jnp.any(is_any(tokens, token_ids) & (mask > 0), axis=1)",
        "return jnp.any(is_any(tokens, token_ids), axis=1)",
        "algos/test_shaping.py::test_pitfall_08_an_eos_in_the_padding_is_no_end",
    ),
    # 8: what follows the eos is in the entropy, or in the KL
    d(
        8,
        "stages/ppo.py",
        "                entropy, mask, coefficient=c.entropy_coefficient\n",
        "                entropy, jnp.ones_like(mask), coefficient=c.entropy_coefficient\n",
        "test_pitfalls.py::test_pitfall_08_what_stands_after_the_eos_is_in_no_kl_entropy_or_loss",
    ),
    d(
        8,
        "rl/rewards.py",
        "kl.kl_loss_k3(logprobs, old, ref, mask)",
        "kl.kl_loss_k3(logprobs, old, ref, jnp.ones_like(mask))",
        "test_pitfalls.py::test_pitfall_08_what_stands_after_the_eos_is_in_no_kl_entropy_or_loss",
    ),
    # ------------------------------------------------------------------ rewards and advantages
    # 9: 0.7 -> 0, -1.6 -> -1
    d(
        9,
        "algos/shaping.py",
        "score[:, None] * last_token(mask) - beta * kl",
        "score.astype(jnp.int32)[:, None] * last_token(mask) - beta * kl",
        "algos/test_shaping.py::test_pitfall_09_fractional_rewards_stay_fractional",
        "test_stage_ppo.py::test_pitfall_10_the_score_is_on_the_last_response_token",
    ),
    d(
        9,
        "algos/shaping.py",
        '    score: Float[Array, "b"],\n    kl: Float[Array, "b t"],\n    mask: Float[Array, "b t"],\n    *,\n    beta: Scalar,\n',
        '    score: Array, kl: Float[Array, "b t"], mask: Float[Array, "b t"], *, beta: Scalar\n',
        "algos/test_shaping.py::test_pitfall_09_an_integer_score_is_refused",
    ),
    d(
        9,
        "rewards/gold.py",
        "            [self.score(response) for response in responses], dtype=np.float32\n",
        "            [self.score(response) for response in responses], dtype=np.int32\n",
        "rewards/test_gold.py::test_pitfall_09_fractional_scores_stay_fractional",
    ),
    d(
        9,
        "rewards/rules.py",
        "return np.array(scores, np.float32), {",
        "return np.array(scores, np.int32).astype(np.float32), {",
        "rewards/test_rules.py::test_pitfall_09_fractional_rewards_and_zero_are_kept",
    ),
    # 10: on every token; one slot further
    d(
        10,
        "algos/shaping.py",
        "score[:, None] * last_token(mask) - beta * kl",
        "score[:, None] * mask - beta * kl",
        "algos/test_shaping.py::test_pitfall_10_the_score_is_on_the_last_response_token_alone",
        "test_stage_ppo.py::test_pitfall_10_the_score_is_on_the_last_response_token",
    ),
    d(
        10,
        "algos/shaping.py",
        "return jnp.where(mask > 0, score[:, None] * last_token(mask) - beta * kl, 0)",
        "return score[:, None] * jnp.roll(last_token(mask), 1, axis=1) - beta * kl * mask",
        "algos/test_shaping.py::test_pitfall_10_the_score_is_on_the_last_response_token_alone",
        "test_stage_ppo.py::test_pitfall_10_the_score_is_on_the_last_response_token",
    ),
    # 11: 0.0 is falsy
    d(
        11,
        "algos/shaping.py",
        "return jnp.where(ended, score, value)",
        "return jnp.where(ended & (score != 0), score, value)",
        "algos/test_shaping.py::test_pitfall_11_a_score_of_zero_is_a_score",
    ),
    d(
        11,
        "metrics.py",
        "        if weight_sum != 0:\n",
        "        if weight_sum != 0 and value:\n",
        "test_metrics.py::test_pitfall_11_a_value_of_zero_is_written",
    ),
    d(
        11,
        "rewards/rules.py",
        "        scores = [\n            self._config.failed if outcome.value is None else outcome.value\n            for outcome in outcomes\n        ]\n",
        "        scores = [outcome.value or self._config.failed for outcome in outcomes]\n",
        "rewards/test_rules.py::test_pitfall_09_fractional_rewards_and_zero_are_kept",
    ),
    # 12: the unbiased variance; the mean of rewards taken off; padding in the mean; a mean a row;
    # no epsilon
    d(
        12,
        "algos/masked.py",
        "return masked_mean((x - masked_mean(x, mask)) ** 2, mask)",
        "return masked_sum((x - masked_mean(x, mask)) ** 2, mask) / (jnp.sum(mask) - 1)",
        "algos/test_masked.py::test_pitfall_12_variance_is_biased",
        "algos/test_masked.py::test_pitfall_12_one_token_has_no_variance_to_divide_by",
    ),
    d(
        12,
        "algos/masked.py",
        "whiten(x, mask, eps=eps) + masked_mean(x, mask), 0)",
        "whiten(x, mask, eps=eps), 0)",
        "algos/test_masked.py::test_pitfall_12_rewards_keep_their_mean_and_advantages_lose_it",
    ),
    d(
        12,
        "algos/masked.py",
        "    mean = masked_mean(x, mask)\n",
        "    mean = jnp.mean(x)\n",
        "algos/test_masked.py::test_pitfall_12_whitening_is_over_the_whole_batch_without_padding",
        "algos/test_masked.py::test_pitfall_12_rewards_keep_their_mean_and_advantages_lose_it",
    ),
    d(
        12,
        "algos/masked.py",
        "    mean = masked_mean(x, mask)\n",
        "    mean = masked_mean(x, mask, 1)[:, None]\n",
        "algos/test_masked.py::test_pitfall_12_whitening_is_over_the_whole_batch_without_padding",
    ),
    d(
        12,
        "algos/masked.py",
        "lax.rsqrt(masked_var(x, mask) + eps)",
        "lax.rsqrt(masked_var(x, mask))",
        "algos/test_masked.py::test_pitfall_12_one_token_has_no_variance_to_divide_by",
    ),
    d(
        12,
        "algos/group.py",
        "eps: float = 1e-4",
        "eps: float = 0.0",
        "algos/test_group.py::test_pitfall_12_equal_rewards_of_a_group_give_no_advantage_and_no_nan",
    ),
    d(
        12,
        "algos/normalize.py",
        "gain = jnp.where(spread > 0, std / jnp.where(spread > 0, spread, 1), 1)",
        "gain = std / spread",
        "algos/test_normalize.py::test_pitfall_12_equal_rewards_are_shifted_and_not_divided",
    ),
    # 13: through padding and holes; past the end of a full row
    d(
        13,
        "algos/advantages.py",
        "        carry = (\n            jnp.where(counted, value, next_value),\n            jnp.where(counted, advantage, next_advantage),\n        )\n",
        "        carry = value, advantage\n",
        "algos/test_advantages.py::test_pitfall_13_what_stands_in_padding_and_holes_does_not_matter",
        "algos/test_advantages.py::test_pitfall_13_a_hole_is_no_step",
        "algos/test_advantages.py::test_pitfall_13_no_bootstrap_past_the_end",
    ),
    d(
        13,
        "algos/advantages.py",
        "        step, (zeros, zeros), columns, reverse=True, unroll=min(8, mask.shape[1])\n",
        "        step,\n        (values[:, -1], zeros),\n        columns,\n        reverse=True,\n        unroll=min(8, mask.shape[1]),\n",
        "algos/test_advantages.py::test_pitfall_13_no_bootstrap_past_the_end",
        "test_stage_ppo.py::test_pitfall_13_what_stands_after_the_eos_changes_nothing",
    ),
    # 14: declared and not applied; applied to what is whitened already
    d(
        14,
        "rl/rewards.py",
        'if config.missing_eos == "penalty":',
        'if config.missing_eos == "never":',
        "test_stage_ppo.py::test_pitfall_14_the_missing_eos_penalty_joins_the_score_before_whitening",
    ),
    d(
        14,
        "stages/ppo.py",
        "rewards = masked.whiten_keep_mean(rewards, mask)",
        """late = masked.last_token(mask) * (shaped - scores)[:, None]
            rewards = masked.whiten_keep_mean(rewards - late, mask) + late""",
        "test_stage_ppo.py::test_pitfall_14_the_missing_eos_penalty_joins_the_score_before_whitening",
    ),
    d(
        14,
        "algos/shaping.py",
        "return jnp.where(ended, score, value)",
        "return score",
        "algos/test_shaping.py::test_pitfall_14_missing_eos_is_penalized_before_whitening",
    ),
    # 15: a token mean; a horizon in batches; no clip; a batch of prompts for one of episodes
    d(
        15,
        "algos/kl.py",
        "return masked_sum(kl, mask, axis=1)",
        "return divide(masked_sum(kl, mask, axis=1), jnp.sum(mask, axis=1))",
        "algos/test_kl.py::test_pitfall_15_the_controller_is_fed_the_sum_over_the_sequence",
        "test_pitfalls.py::test_pitfall_15_a_stage_feeds_its_controller_the_mean_sequence_kl_to_the_reference",
    ),
    d(
        15,
        "algos/kl.py",
        "return beta * (1 + error * episodes / horizon)",
        "return beta * (1 + error / horizon)",
        "algos/test_kl.py::test_pitfall_15_horizon_counts_episodes",
        "algos/test_kl.py::test_pitfall_15_adaptive_controller_by_hand",
    ),
    d(
        15,
        "algos/kl.py",
        "error = jnp.clip(jnp.asarray(mean_sequence_kl) / target - 1, -limit, limit)",
        "error = jnp.asarray(mean_sequence_kl) / target - 1",
        "algos/test_kl.py::test_pitfall_15_adaptive_controller_by_hand",
    ),
    d(
        15,
        "rl/epochs.py",
        "episodes=config.episodes,",
        "episodes=config.batch_size,",
        "test_pitfalls.py::test_pitfall_15_a_stage_feeds_its_controller_the_mean_sequence_kl_to_the_reference",
    ),
    # 15: the approximate KL between iterates
    *(
        d(
            15,
            file,
            "return end_iteration(c, state, metrics), update_metrics",
            'return end_iteration(c, state, {**metrics, "kl": update_metrics["approx_kl"]}), update_metrics',
            "test_pitfalls.py::test_pitfall_15_a_stage_feeds_its_controller_the_mean_sequence_kl_to_the_reference",
        )
        for file in ("stages/ppo.py", "stages/group.py")
    ),
    # 16: the ratio inverted; a clamp; low precision; no score-function gradient
    d(
        16,
        "algos/kl.py",
        "return jnp.expm1(-log_ratio) + log_ratio",
        "return jnp.expm1(log_ratio) - log_ratio",
        "algos/test_kl.py::test_pitfall_16_the_expectation_is_the_kl_to_the_reference_and_not_its_inverse",
        "algos/test_enumeration.py::test_pitfall_16_k1_and_k3_are_unbiased",
        "algos/test_enumeration.py::test_pitfall_16_kl_in_the_loss_has_the_gradient_of_the_kl",
        "test_stage_ppo.py::test_pitfall_16_a_kl_in_the_loss_has_the_gradient_of_the_kl",
    ),
    d(
        16,
        "algos/kl.py",
        "return jnp.expm1(-log_ratio) + log_ratio",
        "return jnp.expm1(-jnp.clip(log_ratio, -10, 10)) + jnp.clip(log_ratio, -10, 10)",
        "algos/test_kl.py::test_pitfall_16_no_clamp_kills_the_gradient",
    ),
    d(
        16,
        "algos/kl.py",
        "if jnp.finfo(x.dtype).bits < 32:",
        "if False:",
        "algos/test_kl.py::test_pitfall_16_low_precision_is_refused",
    ),
    d(
        16,
        "algos/kl.py",
        "total, weight = token_mean(ratio * kl, mask)",
        "total, weight = token_mean(kl, mask)",
        "algos/test_enumeration.py::test_pitfall_16_kl_in_the_loss_has_the_gradient_of_the_kl",
        "test_stage_ppo.py::test_pitfall_16_a_kl_in_the_loss_has_the_gradient_of_the_kl",
    ),
    d(
        16,
        "algos/kl.py",
        "total = masked_sum(lax.stop_gradient(kl) + score, mask)",
        "total = masked_sum(kl, mask)",
        "algos/test_enumeration.py::test_pitfall_16_the_sequence_loss_has_the_whole_gradient_and_value",
    ),
    # ------------------------------------------------------------------ losses and optimization
    # 17: the mean of the microbatches' means
    d(
        17,
        "state.py",
        """t + weight * g, total, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, metrics = jax.lax.scan(accumulate, zeros, (jnp.arange(microbatches), split))
    metrics = jax.tree.map(lambda x: x.sum(0), metrics)
    weight = metrics["loss"][1]
    grads = jax.tree.map(lambda t: t / jnp.maximum(weight, 1e-9), total)""",
        """t + g, total, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, metrics = jax.lax.scan(accumulate, zeros, (jnp.arange(microbatches), split))
    metrics = jax.tree.map(lambda x: x.sum(0), metrics)
    grads = jax.tree.map(lambda t: t / microbatches, total)""",
        "test_state.py::test_pitfall_17_gradients_do_not_depend_on_the_microbatches",
        "test_stages.py::test_pitfall_17_accumulation_does_not_change_the_update",
        "test_stage_group.py::test_pitfall_17_accumulation_does_not_change_the_update",
        "test_stage_reward.py::test_pitfall_17_every_loss_accumulates_exactly_in_the_stage",
        "test_stage_direct.py::test_pitfall_17_accumulation_does_not_change_a_direct_update",
        "test_stage_tamer.py::test_pitfall_17_answers_with_unequal_feedback_accumulate_exactly",
        "rewards/test_reward_losses.py::test_pitfall_17_microbatches_of_unequal_pair_counts_accumulate_to_the_batch",
    ),
    # 17: a loss that hands over its mean, not its sum
    d(
        17,
        "algos/masked.py",
        "return masked_sum(x, weight), jnp.sum(weight)",
        "return masked_mean(x, weight), jnp.ones(())",
        "algos/test_every_loss.py::test_pitfall_17_accumulation_over_microbatches_is_the_whole_batch",
    ),
    # 18: the value loss over rows where the policy's is over tokens
    d(
        18,
        "algos/value.py",
        "total, weight = token_mean(0.5 * error, mask)",
        "total, weight = token_mean(0.5 * error, mask)[0], jnp.float32(mask.shape[0])",
        "algos/test_value.py::test_pitfall_18_value_and_policy_losses_are_normalized_alike",
        "test_stage_ppo.py::test_pitfall_18_value_and_policy_losses_share_one_weight",
    ),
    d(
        18,
        "algos/value.py",
        "total, weight = token_mean(0.5 * jnp.maximum(error, clipped_error), mask)",
        "total, weight = token_mean(0.5 * jnp.maximum(error, clipped_error) / mask.shape[0], mask)",
        "algos/test_value.py::test_pitfall_18_value_and_policy_losses_are_normalized_alike",
    ),
    # 19: the ratio is always 1; the clip does nothing; no new order; several updates on one
    # minibatch; one epoch only
    d(
        19,
        "stages/ppo.py",
        "            logprobs, batch.logprobs, batch.advantages, mask, clip=c.clip\n",
        "            logprobs,\n            jax.lax.stop_gradient(logprobs),\n            batch.advantages,\n            mask,\n            clip=c.clip,\n",
        "test_stages.py::test_pitfall_19_epochs_move_the_policy_between_minibatches",
    ),
    d(
        19,
        "algos/policy.py",
        "token_mean(jnp.maximum(plain, clipped), mask)",
        "token_mean(plain, mask)",
        "algos/test_policy.py::test_pitfall_19_a_clipped_token_has_no_gradient",
    ),
    d(
        19,
        "rl/epochs.py",
        "epoch_keys = jax.random.split(key, config.epochs)",
        "epoch_keys = jax.random.split(key, 1)[jnp.zeros(config.epochs, int)]",
        "test_stage_ppo.py::test_pitfall_19_every_epoch_visits_every_episode_in_a_new_order",
    ),
    d(
        19,
        "rl/epochs.py",
        "orders = orders.reshape(updates, b // config.minibatches)",
        "orders = jnp.repeat(orders[0].reshape(config.minibatches, -1), config.epochs, axis=0)",
        "test_stage_ppo.py::test_pitfall_19_every_epoch_visits_every_episode_in_a_new_order",
    ),
    d(
        19,
        "rl/epochs.py",
        "orders = orders.reshape(updates, b // config.minibatches)",
        "orders = orders[0].reshape(config.minibatches, b // config.minibatches)",
        "test_stage_ppo.py::test_pitfall_19_every_epoch_visits_every_episode_in_a_new_order",
    ),
    # 20: dropout in PPO's epochs; wherever logprobs are computed
    d(
        20,
        "stages/ppo.py",
        "logprobs, entropy = outputs.logprobs, outputs.entropy",
        """r = batch.mask.shape[1]
        hidden, _ = response_hidden(
            model, params["policy"], batch.tokens, batch.attention_mask, r, key
        )
        logprobs, entropy = model.logprobs(
            params["policy"], hidden, batch.tokens[:, -r:], c.temperature
        )""",
        "test_stage_ppo.py::test_pitfall_20_dropout_is_off_in_ppo",
    ),
    d(
        20,
        "models/transformer.py",
        "embed_key, layer_key = (None, None) if key is None else jax.random.split(key)",
        "key = jax.random.key(0) if key is None else key\n        embed_key, layer_key = jax.random.split(key)",
        "models/test_transformer.py::test_pitfall_20_no_dropout_without_a_key",
    ),
    # 21: epsilon inside; no bias correction
    d(
        21,
        "optim.py",
        "scale * m / (jnp.sqrt(v) + eps)",
        "scale * m / (jnp.sqrt(v) + eps * jnp.sqrt(1 - b2**count))",
        "test_optim.py::test_pitfall_21_tf_epsilon_is_outside_of_the_bias_correction",
    ),
    d(
        21,
        "optim.py",
        "scale = jnp.sqrt(1 - b2**count) / (1 - b1**count)",
        "scale = 1.0",
        "test_optim.py::test_pitfall_21_the_two_agree_without_epsilon",
    ),
    # 22: negative at the end; other things than updates counted
    d(
        22,
        "optim.py",
        "u = jnp.clip((step - warmup) / max(end - warmup, 1), 0, 1)",
        "u = (step - warmup) / max(end - warmup, 1)",
        "test_optim.py::test_pitfall_22_never_negative_and_used_up_exactly_at_the_end",
    ),
    d(
        22,
        "optim.py",
        "learning_rate: Any = make_schedule(config, total_steps)",
        "learning_rate: Any = lambda n: make_schedule(config, total_steps)(2 * n)",
        "test_optim.py::test_pitfall_22_the_optimizer_counts_updates",
    ),
    d(
        22,
        "rl/config.py",
        "return self.steps * self.epochs * self.minibatches",
        "return self.steps",
        "test_pitfalls.py::test_pitfall_22_a_policys_schedule_ends_with_its_last_update",
    ),
    d(
        22,
        "rl/config.py",
        "return self.steps * self.epochs * self.minibatches",
        "return self.steps * self.epochs * self.minibatches * self.microbatches",
        "test_pitfalls.py::test_pitfall_22_a_policys_schedule_ends_with_its_last_update",
    ),
    # 23: 0 / 0; 0 times NaN
    d(
        23,
        "algos/masked.py",
        "return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)",
        "return total / weight",
        "algos/test_masked.py::test_pitfall_23_an_all_zero_mask_gives_zero_and_a_zero_gradient",
        "algos/test_every_loss.py::test_pitfall_23_a_row_or_a_batch_without_tokens_is_no_nan",
    ),
    d(
        23,
        "algos/masked.py",
        "return jnp.sum(jnp.where(mask > 0, x, 0) * mask, axis=axis)",
        "return jnp.sum(x * mask, axis=axis)",
        "algos/test_masked.py::test_pitfall_23_an_all_zero_mask_gives_zero_and_a_zero_gradient",
        "algos/test_every_loss.py::test_pitfall_23_garbage_behind_the_mask_reaches_neither_loss_nor_gradient",
    ),
    # 24: the user's words learnt; the mask dropped; an eos at the end of what was cut off; the eos
    # not learnt
    d(
        24,
        "data/template.py",
        "mask += [float(learned)] * len(ids)",
        "mask += [1.0] * len(ids)",
        "data/test_chat.py::test_pitfall_24_loss_on_every_answer_and_its_eos_and_on_nothing_else",
        "data/test_loader.py::test_pitfall_24_sft_learns_each_answer_once_and_no_prompt",
    ),
    d(
        24,
        "models/logprobs.py",
        "- hit) * m[..., None]\n",
        "- hit)\n",
        "models/test_logprobs.py::test_pitfall_24_a_token_outside_the_mask_has_no_gradient",
    ),
    d(
        24,
        "data/examples.py",
        "return [tokens[i] for i in keep], [mask[i] for i in keep]",
        "return [*(tokens[i] for i in keep[:-1]), tokens[-1]], [mask[i] for i in keep]",
        "data/test_examples.py::test_pitfall_24_a_truncated_answer_gets_no_eos",
    ),
    d(
        24,
        "data/template.py",
        "pieces.append(Piece(part, token, response=response))",
        "pieces.append(Piece(part, token))",
        "data/test_chat.py::test_pitfall_24_loss_on_every_answer_and_its_eos_and_on_nothing_else",
        "data/test_loader.py::test_pitfall_24_sft_learns_each_answer_once_and_no_prompt",
    ),
    # 25: another std; a head, or all that is fresh, born whatever the seed
    d(
        25,
        "models/blocks.py",
        "(self.width + 1) ** -0.5",
        "0.02",
        "models/test_transformer.py::test_pitfall_25_scalar_head_starts_at_one_over_root_width_plus_one",
    ),
    d(
        25,
        "models/params.py",
        "blocks.ScalarHead(config.d_model).init(head_key)",
        "blocks.ScalarHead(config.d_model).init(jax.random.key(0))",
        "models/test_transformer.py::test_pitfall_25_scalar_head_starts_at_one_over_root_width_plus_one",
    ),
    d(
        25,
        "train.py",
        "_first_state(stage, key, layout, checkpoints)\n        start",
        "_first_state(stage, jax.random.key(0), layout, checkpoints)\n        start",
        "test_pitfalls.py::test_pitfall_25_fresh_parameters_are_drawn_from_the_seed",
    ),
    # 26: another unit than the name says; averaged
    d(
        26,
        "rl/epochs.py",
        'if config.ptx.unit == "sequence":',
        "if False:",
        "test_stage_ppo.py::test_pitfall_26_the_unit_of_the_pretraining_loss_is_in_its_name",
    ),
    d(
        26,
        "rl/epochs.py",
        "lambda g, ptx: g + scale * ptx, policy_grads, grads)",
        "lambda g, ptx: (g + scale * config.ptx.ratio * ptx) / (1 + config.ptx.ratio), policy_grads, grads)",
        "test_stage_ppo.py::test_pitfall_26_gradients_of_ptx_are_added_in_the_unit_that_is_named",
    ),
    # ------------------------------------------------------------------ systems
    # 27: the weights of the first iteration for ever; the stage's step samples from what was loaded
    d(
        27,
        "rl/rollout.py",
        'sample = Program("rollout", _sample, _rollout_shapes)',
        """engine = {}


def _stale_sample(model, params, *rows, sampling):
    params = engine.setdefault("params", jax.tree.map(jnp.copy, params))
    return _sample(model, params, *rows, sampling=sampling)


sample = Program("rollout", _stale_sample, _rollout_shapes)""",
        "test_stage_ppo.py::test_pitfall_27_rollouts_come_from_the_weights_of_this_iteration",
    ),
    d(
        27,
        "stages/ppo.py",
        "sample_rollouts(config, sampler, state, policy_params, prompts, key)",
        "sample_rollouts(config, sampler, state, task.policy.read(), prompts, key)",
        "test_stages.py::test_pitfall_27_first_minibatch_of_every_iteration_has_ratio_one",
    ),
    d(
        27,
        "stages/group.py",
        "sample_rollouts(config, sampler, state, policy_params, prompts, key)",
        "sample_rollouts(config, sampler, state, task.policy.read(), prompts, key)",
        "test_policy_step.py::test_what_a_step_hands_to_its_parts",
    ),
    # 28: the mean of two hosts' means
    d(
        28,
        "metrics.py",
        "(total_value + value, total_weight + weight)",
        "(total_value / total_weight + value / weight, 2.0)",
        "test_metrics.py::test_pitfall_28_hosts_with_unequal_weights_average_exactly",
    ),
    # 29: rows numbered on each of two hosts anew
    d(
        29,
        "rl/rollout.py",
        "(jnp.arange(n))",
        "(jnp.arange(n) % (n // 2))",
        "test_chat.py::test_pitfall_29_no_two_rows_steps_or_hosts_share_a_key",
        "test_chat.py::test_pitfall_29_equal_prompts_get_different_answers_on_every_device",
    ),
    # 30: the data from their beginning; the optimizer anew; the step of the RNG; the KL coefficient
    # and the average
    d(
        30,
        "train.py",
        "stage.batches.set_state(position)",
        "pass",
        "test_resume.py::test_pitfall_30_a_stage_that_crashed_goes_on_to_the_same_bits",
        "test_stage_group.py::test_pitfall_30_a_group_stage_that_crashed_goes_on_to_the_same_bits",
        "test_pitfalls.py::test_pitfall_32_a_preempted_run_ends_after_its_step_saved_and_the_same_command_goes_on",
    ),
    d(
        30,
        "train.py",
        "return state, int(state.step)",
        "return state.replace(opt_state=jax.tree.map(lambda x: 0 * x, state.opt_state)), int(state.step)",
        "test_pitfalls.py::test_pitfall_32_a_preempted_run_ends_after_its_step_saved_and_the_same_command_goes_on",
    ),
    d(
        30,
        "train.py",
        "jax.random.fold_in(key, step)",
        "jax.random.fold_in(key, step - start)",
        "test_train.py::test_pitfall_30_a_steps_randomness_depends_on_seed_and_step_alone",
    ),
    d(
        30,
        "rl/epochs.py",
        "return state.replace(step=state.step + 1, extra=extra)",
        "return state.replace(step=state.step + 1)",
        "test_stages.py::test_pitfall_30_kl_coefficient_average_and_iterator_are_in_the_checkpoint",
    ),
    d(
        30,
        "data/iterators.py",
        '        self._iterator.set_state(_as_tuples(state["rows"]))\n',
        "",
        "data/test_loader.py::test_pitfall_30_a_restored_iterator_goes_on_with_exactly_the_next_batch",
    ),
    # 30: all streams go on from where the first one stood
    d(
        30,
        "data/iterators.py",
        'state["rows"][j]',
        'state["rows"][0]',
        "data/test_shards.py::test_pitfall_30_a_position_of_two_hosts_is_gone_on_from_by_one_and_by_four",
    ),
    # 31: the rows of Q and K as llama.cpp has them; only those of Q put back
    d(
        31,
        "interop/gguf.py",
        "return x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)",
        "return x",
        "interop/test_gguf.py::test_pitfall_31_gguf_queries_and_keys_are_put_back_in_our_order",
        "interop/test_gguf.py::test_half_split_by_hand",
    ),
    d(
        31,
        "interop/gguf.py",
        '_ROTATED = ("attention/query", "attention/key")',
        '_ROTATED = ("attention/query",)',
        "interop/test_gguf.py::test_pitfall_31_gguf_queries_and_keys_are_put_back_in_our_order",
    ),
    # 32: no end; no save; an exit code that nobody starts again on; a stage without the loop that
    # is simply killed
    d(
        32,
        "train.py",
        "if action == _STOP or (\n                    is_last and hosts.anywhere(bool(stop_requested))\n                ):",
        "if is_last and hosts.anywhere(bool(stop_requested)):",
        "test_pitfalls.py::test_pitfall_32_a_preempted_run_ends_after_its_step_saved_and_the_same_command_goes_on",
    ),
    d(
        32,
        "train.py",
        "if (save_due or action != _CONTINUE) and not is_resumed:",
        "if (save_due or action == _SAVE) and not is_resumed:",
        "test_pitfalls.py::test_pitfall_32_a_preempted_run_ends_after_its_step_saved_and_the_same_command_goes_on",
    ),
    d(
        32,
        "errors.py",
        "exit_code = 75",
        "exit_code = 1",
        "test_pitfalls.py::test_pitfall_32_a_preempted_run_tells_its_launcher_to_start_it_again",
    ),
    d(
        32,
        "process.py",
        "signal.signal(signal.SIGTERM, _on_sigterm)",
        "pass",
        "test_pitfalls.py::test_pitfall_32_outside_of_the_loop_a_preempted_run_leaves_at_once",
    ),
    # ------------------------------------------------------------------ files and statistics
    # 35: NaN in a file of JSON; in one that a checkpoint or a dataset holds
    d(
        35,
        "json_text.py",
        "default=default, allow_nan=False, **options",
        "default=default, **options",
        "test_json_text.py::test_pitfall_35_no_encoder_lets_nan_pass",
        "test_json_text.py::test_pitfall_35_a_number_that_json_lacks_is_an_error_with_its_place",
    ),
    d(
        35,
        "checkpoint.py",
        'json_text.validate_finite(data, f"checkpoint {step}: the position of the data")',
        "pass",
        "test_checkpoint.py::test_pitfall_35_a_position_that_json_cannot_hold_is_an_error",
    ),
    d(
        35,
        "data/preferences.py",
        'json_text.encode(row, f"{name}:{i}", default=_plain)',
        '__import__("json").dumps(row, default=_plain)',
        "test_json_text.py::test_pitfall_35_no_encoder_lets_nan_pass",
    ),
    d(
        35,
        "data/columns.py",
        "not -_MOST_SCORE <= value <= _MOST_SCORE",
        'not abs(value) < float("inf")',
        "data/test_preferences.py::test_pitfall_35_a_score_that_float32_cannot_hold_is_an_error",
    ),
    # 35: a metric that is not finite ends the run, or is None where it is read
    d(
        35,
        "json_text.py",
        "return None if isinstance(value, float) and not math.isfinite(value) else value",
        "return value",
        "test_json_text.py::test_pitfall_35_metrics_that_are_not_finite_are_null_and_read_as_nan",
        "test_recipe.py::test_pitfall_35_a_metric_that_is_nan_is_null_in_done_json",
        "test_sweep.py::test_pitfall_35_a_cell_of_what_is_not_finite_is_empty",
        "report/test_report.py::test_pitfall_35_what_the_page_shows_as_json_is_json",
    ),
    d(
        35,
        "recipe.py",
        '"metrics": json_text.null_nonfinite(metrics)',
        '"metrics": metrics',
        "test_recipe.py::test_pitfall_35_a_metric_that_is_nan_is_null_in_done_json",
    ),
    d(
        35,
        "metrics.py",
        "return json_text.nan_for_null(values)",
        "return values",
        "test_metrics.py::test_pitfall_35_a_value_that_is_null_is_nan_again",
    ),
    d(
        35,
        "report/page.py",
        "both = [step for step, values in measured.items() if np.isfinite(values).all()]",
        "both = list(measured)",
        "report/test_report.py::test_pitfall_35_the_frontier_leaves_out_what_is_null",
    ),
    # 35: a KL of greedy responses, at temperature 0
    d(
        35,
        "stages/evaluate.py",
        "return config.temperature > 0 and not config.is_shaped",
        "return not config.is_shaped",
        "test_stage_evaluate.py::test_pitfall_35_greedy_evaluation_has_no_kl_and_says_so",
    ),
    d(
        35,
        "stages/evaluate.py",
        "return config.temperature > 0 and not config.is_shaped",
        "return config.temperature > 0",
        "test_stage_evaluate.py::test_pitfall_35_shaped_responses_have_no_kl_and_it_is_said",
    ),
    # 36: percentiles of resampled win rates; Wald's interval
    d(
        36,
        "evals/stats.py",
        "return wilson(float(outcomes.sum()), len(outcomes), level=level)",
        """draws = np.random.default_rng(0).choice(outcomes, (10_000, len(outcomes))).mean(1)
    low, high = map(float, np.percentile(draws, [2.5, 97.5]))
    return Interval(float(outcomes.mean()), low, high, "Wilson")""",
        "evals/test_stats.py::test_pitfall_36_sixteen_wins_of_sixteen_by_hand",
        "evals/test_stats.py::test_pitfall_36_a_win_rate_near_one_is_covered",
        "test_stage_evaluate.py::test_pitfall_36_intervals_are_of_the_prompts_pairs_and_named",
    ),
    d(
        36,
        "evals/stats.py",
        "math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))",
        "math.sqrt(p * (1 - p) / n)",
        "evals/test_stats.py::test_pitfall_36_wilson_is_scipys",
    ),
    # 36: percentiles of resampled means, also of three values; an interval of nothing
    d(
        36,
        "evals/stats.py",
        'method="BCa",',
        'method="percentile",',
        "evals/test_stats.py::test_pitfall_36_the_interval_of_a_skewed_mean_is_bca_by_a_plain_loop",
        "evals/test_stats.py::test_pitfall_36_bca_is_scipys_and_the_order_does_not_matter",
    ),
    d(
        36,
        "evals/stats.py",
        "if len(x) >= BCA_LEAST and x[0] < x[-1]:",
        "if True:",
        "evals/test_stats.py::test_pitfall_36_the_interval_of_few_or_equal_values_is_students",
    ),
    d(
        36,
        "evals/stats.py",
        "if not 0 <= wins <= n or n < 1:",
        "n = max(n, 1)\n    if False:",
        "evals/test_stats.py::test_pitfall_36_nothing_has_no_interval",
    ),
    # 36: NaN loses every comparison, or is none
    d(
        36,
        "evals/stats.py",
        "bad = ~np.isfinite(scores)",
        "bad = np.zeros(scores.shape, bool)",
        "evals/test_stats.py::test_pitfall_36_a_score_that_is_not_finite_is_refused_not_compared",
        "test_stage_evaluate.py::test_pitfall_36_a_response_scored_nan_is_named",
        "test_stage_best_of_n.py::test_pitfall_36_a_pool_with_an_infinite_score_is_refused",
        "test_stage_reward.py::test_pitfall_36_a_reward_of_nan_centers_nothing",
    ),
    d(
        36,
        "stages/best_of_n.py",
        "stats.validate_scores(pool[name], context)",
        "pass",
        "test_stage_best_of_n.py::test_pitfall_36_a_pool_with_an_infinite_score_is_refused",
    ),
    d(
        36,
        "rl/pools.py",
        "bool(np.isfinite(gold).all())",
        "True",
        "test_stage_best_of_n.py::test_pitfall_36_saved_pools_with_an_infinite_score_are_refused",
    ),
    d(
        36,
        "stages/recenter.py",
        "stats.validate_scores(rewards, context, valid)",
        "pass",
        "test_stage_reward.py::test_pitfall_36_a_reward_of_nan_centers_nothing",
    ),
    # 36: an interval of a kind that nobody names
    d(
        36,
        "report/tables.py",
        'return f"{label} 95 %: {ends}"',
        'return f"95 % interval {ends}"',
        "report/test_report.py::test_pitfall_36_an_interval_is_named",
    ),
    d(
        36,
        "stages/evaluate.py",
        'prefix = f"{name}_{interval.method.lower()}"',
        "prefix = name",
        "test_stage_evaluate.py::test_pitfall_36_intervals_are_of_the_prompts_pairs_and_named",
    ),
    # ------------------------------------------------------------------ numbers that look right
    # 33: decay by the rank, which stacked layers add one to; of the scalar head
    d(
        33,
        "optim.py",
        "return name in DECAYED and not scalar_head",
        "return _.ndim >= 2",
        "test_optim.py::test_pitfall_33_a_norms_gain_does_not_decay_and_a_kernel_does",
        "test_optim.py::test_pitfall_33_scanned_and_separate_layers_have_one_update",
    ),
    d(
        33,
        "optim.py",
        "return name in DECAYED and not scalar_head",
        "return name in DECAYED",
        "test_optim.py::test_pitfall_33_scanned_and_separate_layers_have_one_update",
        "test_optim.py::test_pitfall_33_adapters_decay_whole_and_in_scanned_layers",
    ),
    # 34: logits cancel against their logsumexp; 1 against what is near it; powers of close numbers
    d(
        34,
        "models/logprobs.py",
        "-(jnp.exp(log_p) * log_p).sum(-1)",
        "lse - (jnp.exp(log_p) * logits).sum(-1)",
        "models/test_logprobs.py::test_pitfall_34_the_entropy_of_large_logits_does_not_cancel",
        "models/test_logprobs.py::test_pitfall_34_the_gradient_of_the_entropy_of_large_logits",
        "models/test_logprobs.py::test_pitfall_34_the_entropy_of_a_split_vocabulary",
    ),
    d(
        34,
        "algos/direct.py",
        "missing, excess = jax.nn.sigmoid(z - reward), jax.nn.sigmoid(reward - z)",
        "missing, excess = 1 - jax.nn.sigmoid(reward - z), 1 - jax.nn.sigmoid(z - reward)",
        "algos/test_direct.py::test_pitfall_34_kto_of_a_clear_response_keeps_its_digits",
    ),
    d(
        34,
        "algos/tamer.py",
        "return jnp.where(shortest > shape, late, early)",
        "return early",
        "algos/test_tamer.py::test_pitfall_34_gamma_credit_of_late_feedback_keeps_its_digits",
    ),
    d(
        34,
        "algos/best_of_n.py",
        "return jnp.where(tied > 0, p * jnp.exp(log_power) * lost / tied, 0)",
        "below = up_to - tied\n    return jnp.where(tied > 0, p * (up_to**n - below**n) / tied, 0)",
        "algos/test_best_of_n.py::test_pitfall_34_the_distribution_of_many_unlikely_outcomes",
    ),
    # 37: the ratio without a limit; a ratio times a ratio; k3; the odds of what is certain
    d(
        37,
        "algos/log_ratios.py",
        "return jnp.clip(log_ratios, -limit, limit)",
        "return log_ratios",
        "algos/test_policy.py::test_pitfall_37_a_ratio_beyond_float32_has_no_gradient",
        "algos/test_kl.py::test_pitfall_37_a_ratio_times_a_ratio_is_finite_and_counted",
        "algos/test_every_loss.py::test_pitfall_37_loss_and_gradient_are_finite_for_any_logprobs",
    ),
    d(
        37,
        "algos/log_ratios.py",
        "return jnp.clip(log_ratios, -limit, limit)",
        "return limit * jnp.tanh(log_ratios / limit)",
        "algos/test_policy.py::test_pitfall_37_log_ratios_within_the_limit_keep_their_bits",
    ),
    d(
        37,
        "algos/kl.py",
        "HALF = LIMIT / 2",
        "HALF = LIMIT",
        "algos/test_kl.py::test_pitfall_37_a_ratio_times_a_ratio_is_finite_and_counted",
        "algos/test_every_loss.py::test_pitfall_37_loss_and_gradient_are_finite_for_any_logprobs",
    ),
    d(
        37,
        "algos/kl.py",
        "jnp.maximum(log_ratio, -limit)",
        "jnp.maximum(log_ratio, -jnp.inf)",
        "algos/test_kl.py::test_pitfall_37_k3_is_clamped_where_it_would_overflow_and_nowhere_else",
        "algos/test_every_loss.py::test_pitfall_37_loss_and_gradient_are_finite_for_any_logprobs",
    ),
    d(
        37,
        "algos/direct.py",
        "log_p = jnp.minimum(log_p, CERTAIN)",
        "log_p = jnp.minimum(log_p, 0.0)",
        "algos/test_direct.py::test_pitfall_37_log_odds_of_a_certain_response_are_80",
        "algos/test_direct.py::test_pitfall_37_orpo_with_an_empty_response_by_hand",
        "algos/test_every_loss.py::test_pitfall_37_loss_and_gradient_are_finite_for_any_logprobs",
    ),
    # 38: the std of rewards with the KL in them; a group that differs in its KLs is informative
    d(
        38,
        "algos/group.py",
        "deviations = _deviations(rewards)\n    advantages",
        "rewards, penalties = rewards if penalties is None else rewards - penalties, None\n"
        "    deviations = _deviations(rewards)\n    advantages",
        "algos/test_group.py::test_pitfall_38_a_kl_in_the_reward_is_not_divided_by_the_std",
        "test_stage_group.py::test_pitfall_38_a_group_of_equal_scores_has_the_kls_advantage_alone",
    ),
    d(
        38,
        "stages/group.py",
        "informative = jnp.repeat(group.informative(groups), c.samples_per_prompt)",
        "with_kl = group.informative(groups - penalties.reshape(groups.shape))\n"
        "        informative = jnp.repeat(with_kl, c.samples_per_prompt)",
        "test_stage_group.py::test_pitfall_38_a_group_of_equal_scores_has_the_kls_advantage_alone",
    ),
    # 39: a response takes all of the row; the head goes first; a turn is cut in its middle; ids
    # encoded anew
    d(
        39,
        "data/examples.py",
        "return max(length // 2, length - longest)",
        "return max(1, length - longest)",
        "data/test_examples.py::test_pitfall_39_a_long_response_does_not_take_the_prompt",
        "data/test_examples.py::test_pitfall_39_a_long_prompt_keeps_its_head_and_half_of_the_row",
        "data/test_examples.py::test_pitfall_39_stored_ids_of_fine_tuning_keep_their_prompt",
        "test_stage_tamer.py::test_pitfall_39_a_long_answer_gets_what_its_prompt_leaves",
        "rewards/test_judge.py::test_pitfall_39_a_template_keeps_its_words_and_its_values_are_cut",
        "rewards/test_judge.py::test_pitfall_39_a_long_thought_does_not_take_the_question",
    ),
    d(
        39,
        "data/chat.py",
        "    return [*ids[:head], *ids[len(ids) - max_tokens + head :]]",
        "    return [*ids[len(ids) - max_tokens :]]",
        "data/test_chat.py::test_pitfall_39_a_stored_prompt_is_cut_as_the_conversation_that_it_is",
        "data/test_chat.py::test_pitfall_39_the_head_stays_of_prompts_that_are_no_rendering",
        "data/test_examples.py::test_pitfall_39_a_long_prompt_keeps_its_head_and_half_of_the_row",
    ),
    d(
        39,
        "data/chat.py",
        "        if rendered == ids:\n",
        "        if False:\n",
        "data/test_chat.py::test_pitfall_39_a_stored_prompt_is_cut_as_the_conversation_that_it_is",
    ),
    d(
        39,
        "data/chat.py",
        "        if rendered == ids:\n",
        "        if True:\n",
        "data/test_chat.py::test_pitfall_39_the_head_stays_of_prompts_that_are_no_rendering",
    ),
    # 39: a judge's template cut at its beginning; its thought before its question; a critic of
    # nothing
    d(
        39,
        "rewards/judge.py",
        "    if over <= 0:\n        return _question(filled), False",
        "    if True:\n        return _question(filled), False",
        "rewards/test_judge.py::test_pitfall_39_a_template_keeps_its_words_and_its_values_are_cut",
        "rewards/test_judge.py::test_pitfall_39_a_rubric_counts_the_questions_it_had_to_cut",
        "rewards/test_judge.py::test_pitfall_39_a_labeler_counts_the_questions_it_had_to_cut",
    ),
    d(
        39,
        "rewards/judge.py",
        "most = prompt_room(room, len(opening))",
        "most = max(8, room - len(opening))",
        "rewards/test_judge.py::test_pitfall_39_a_long_thought_does_not_take_the_question",
    ),
    d(
        39,
        "data/chat.py",
        "kept = [*shortened, *rest]",
        "kept = [*shortened, *rest][-1:]",
        "data/test_chat.py::test_pitfall_39_what_is_said_about_a_prompt_stays_when_it_is_shortened",
        "rewards/test_judge.py::test_pitfall_39_a_critic_sees_the_draft_of_a_long_prompt",
    ),
    # 39: a pair that became equal counts; what was cut does not
    d(
        39,
        "data/examples.py",
        "example.same[i] = first.setdefault(tuple(kept[i]), i)",
        "example.same[i] = first.setdefault(tuple(completion), i)",
        "data/test_examples.py::test_pitfall_39_completions_that_became_equal_are_known",
        "test_stage_reward.py::test_pitfall_39_pairs_that_became_equal_weigh_nothing_in_a_reward_stage",
        "test_stage_direct.py::test_pitfall_39_pairs_that_became_equal_weigh_nothing_in_a_direct_stage",
    ),
    d(
        39,
        "algos/preference.py",
        "return both if same is None else both & (same[:, :, None] != same[:, None, :])",
        "return both",
        "algos/test_preference.py::test_pitfall_39_the_same_tokens_are_no_pair_whatever_their_labels",
        "rewards/test_reward_losses.py::test_pitfall_39_a_pair_of_completions_with_the_same_tokens_weighs_nothing",
        "test_stage_reward.py::test_pitfall_39_pairs_that_became_equal_weigh_nothing_in_a_reward_stage",
        "test_stage_direct.py::test_pitfall_39_pairs_that_became_equal_weigh_nothing_in_a_direct_stage",
    ),
    d(
        39,
        "rewards/losses.py",
        "    if same is not None:\n        twin",
        "    if False:\n        twin",
        "rewards/test_reward_losses.py::test_pitfall_39_a_pair_of_completions_with_the_same_tokens_weighs_nothing",
    ),
    d(
        39,
        "evals/stats.py",
        "counts &= same[:, i] != same[:, j]",
        "pass",
        "evals/test_stats.py::test_pitfall_39_pairs_of_completions_with_the_same_tokens_do_not_count",
    ),
    d(
        39,
        "data/examples.py",
        "example.cut[i] = len(rows[i]) < len(prompt) + len(completion)",
        "example.cut[i] = len(rows[i]) < len(fitted) + len(completion)",
        "data/test_examples.py::test_pitfall_39_a_long_prompt_keeps_its_head_and_half_of_the_row",
    ),
    d(
        39,
        "data/examples.py",
        "marks[0] = len(tokens) < was",
        "marks[0] = 0",
        "data/test_examples.py::test_pitfall_39_a_conversation_says_whether_it_lost_tokens",
        "data/test_loader.py::test_pitfall_39_what_was_cut_is_counted_in_the_batches",
        "test_stages.py::test_pitfall_39_fine_tuning_counts_the_examples_that_lost_tokens",
    ),
    d(
        39,
        "data/loader.py",
        "cut=np.float32(cut),",
        "cut=np.float32(0),",
        "data/test_loader.py::test_pitfall_39_what_was_cut_is_counted_in_the_batches",
    ),
    # 40: half of the rows away, which may be the same prompt; one prompt alone; the same prompt,
    # written otherwise
    d(
        40,
        "data/mismatched.py",
        "donor = self._source[int(self._donors[index])]",
        "donor = self._source[(index + len(self) // 2) % len(self)]",
        "test_stage_direct.py::test_pitfall_40_mismatched_answers_are_of_another_prompt",
    ),
    d(
        40,
        "data/mismatched.py",
        "if len(first) < 2:",
        "if len(keys) < 2:",
        "test_stage_direct.py::test_pitfall_40_one_prompt_alone_is_an_error",
    ),
    d(
        40,
        "data/mismatched.py",
        'turns = [[turn["role"], turn["content"]] for turn in messages]',
        'turns = row["prompt"]',
        "test_stage_direct.py::test_pitfall_40_a_text_and_one_user_turn_are_the_same_prompt",
    ),
    # 41: the line is hashed; the whole prompt, of which another one is the beginning; in each stage
    # that splits
    d(
        41,
        "data/files.py",
        "if whole or split_of(self.reader.key_of(content, span, key)) == split:",
        "if whole or split_of(content) == split:",
        "data/test_sources.py::test_pitfall_41_a_prompt_is_in_one_split",
        "data/test_sources.py::test_pitfall_41_conversations_that_begin_alike_are_in_one_split",
        "data/test_sources.py::test_pitfall_41_a_document_is_in_one_split_whatever_stands_beside_it",
    ),
    d(
        41,
        "data/files.py",
        """        except BadRow:
            return content
""",
        """        except BadRow:
            raise
""",
        "data/test_sources.py::test_pitfall_41_a_row_without_a_prompt_is_still_reported",
    ),
    d(
        41,
        "data/rows.py",
        'return opening(row["messages"]) if "messages" in row else row["prompt"]',
        'return chat.to_text(row["messages"]) if "messages" in row else row["prompt"]',
        "data/test_sources.py::test_pitfall_41_conversations_that_begin_alike_are_in_one_split",
    ),
    d(
        41,
        "stages/import_rankings.py",
        "key = prompt if isinstance(prompt, str) else opening(prompt)",
        "key = ranking.key",
        "test_stage_collect.py::test_pitfall_41_rankings_of_one_prompt_are_in_one_split",
    ),
    d(
        41,
        "stages/critique.py",
        "split_of(opening(prompt), validation",
        "split_of(chat.to_text(prompt), validation",
        "rewards/test_judge.py::test_pitfall_41_prompts_out_of_one_conversation_are_in_one_split",
    ),
    # 42: a run of Chinese is one word; bytes of what does not count; a character for a byte; an unk
    # that has bytes
    d(
        42,
        "evals/text.py",
        '_WORD = re.compile(f"(?![\\\\W_])[{_UNSPACED}]|{_RUN}(?:[\'’]{_RUN})*")',
        '_WORD = re.compile(r"[^\\W_]+(?:[\'’][^\\W_]+)*")',
        "evals/test_text.py::test_pitfall_42_a_chinese_character_and_a_kana_is_a_word",
        "evals/test_text.py::test_pitfall_42_figures_of_chinese_answers_by_hand",
        "rewards/test_gold.py::test_pitfall_42_repetition_and_length_of_chinese_answers_by_hand",
    ),
    d(
        42,
        "evals/text.py",
        "len(words(run)) if _UNSPACED_CHARACTER.search(run) else 1",
        "1",
        "evals/test_text.py::test_pitfall_42_runs_between_blanks_where_there_are_blanks",
    ),
    d(
        42,
        "algos/language.py",
        "return nll, jnp.sum(byte_lengths[targets] * mask)",
        "return nll, jnp.sum(byte_lengths[targets])",
        "algos/test_language.py::test_pitfall_42_nats_per_byte_of_the_counted_targets",
        "test_stages.py::test_pitfall_42_the_held_out_loss_is_reported_per_byte_of_its_targets",
    ),
    d(
        42,
        "data/tokenizer.py",
        "if self._sp.is_byte(i):",
        "if False:",
        "test_stages.py::test_pitfall_42_the_held_out_loss_is_reported_per_byte_of_its_targets",
    ),
    d(
        42,
        "data/hf_tokenizer.py",
        "return piece.encode()",
        "return bytes(len(piece))",
        "data/test_hf_tokenizer.py::test_pitfall_42_bytes_of_pieces_that_are_not_spelled_in_bytes",
    ),
    d(
        42,
        "data/hf_tokenizer.py",
        "if piece == self._unk:",
        "if False:",
        "data/test_hf_tokenizer.py::test_pitfall_42_bytes_of_pieces_that_are_not_spelled_in_bytes",
    ),
    # 43: the first of no lines
    d(
        43,
        "errors.py",
        'line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")',
        "line = str(error).splitlines()[0]",
        "test_errors.py::test_pitfall_43_the_first_line_of_an_error_is_there_without_a_message",
        "test_errors.py::test_pitfall_43_hosts_that_cannot_be_joined_without_a_reason",
        "test_errors.py::test_pitfall_43_a_host_that_is_lost_without_a_reason",
    ),
    # ------------------------------------------------------------------ steps, exact KL
    # 3: the KL over the vocabulary forgets the temperature
    d(
        3,
        "models/logprobs.py",
        "jax.nn.log_softmax(logits / temperature, axis=-1)",
        "jax.nn.log_softmax(logits, axis=-1)",
        "models/test_logprobs.py::test_kl_over_the_vocabulary_is_plain",
        "test_exact_kl.py::test_the_metric_is_what_loops_give_and_training_does_not_know_of_it",
    ),
    # 17: the loss of steps is a mean of the microbatches' means
    d(
        17,
        "algos/process.py",
        '"loss": (total, count),',
        '"loss": (divide(total, count), jnp.ones(())),',
        "test_stage_process_reward.py::test_pitfall_17_solutions_of_unequal_length_accumulate_exactly",
    ),
    # 34: the KL of close models is a difference of rounded logsumexps
    d(
        34,
        "models/logprobs.py",
        "(p * (log_p - log_q) + (q - p)).sum(-1)",
        "(p * (log_p - log_q)).sum(-1)",
        "models/test_logprobs.py::test_pitfall_34_the_kl_of_models_that_are_close_is_not_rounding",
    ),
    # 39: a step that was cut off keeps its label, at a token of another step
    d(
        39,
        "data/steps.py",
        "position = len(kept_prompt) + end",
        "position = min(len(kept_prompt) + end, length - 1)",
        "data/test_steps.py::test_pitfall_39_steps_that_were_cut_off_have_no_label",
    ),
]


# ------------------------------------------------------------------ putting them back


def replaced(defect: Defect, root: Path) -> str:
    """The file's text with the defect in it.

    Raises:
      ValueError: `old` does not stand there exactly once, or is what it is to be replaced by.
    """
    text = (root / "rlhfjax" / defect.file).read_text()
    if text.count(defect.old) != 1 or defect.old == defect.new:
        raise ValueError(
            f"pitfall {defect.pitfall}: rlhfjax/{defect.file} has {text.count(defect.old)} x {defect.old!r}"
        )
    return text.replace(defect.old, defect.new)


def _run_tests(copy: str, tests: list[str], out: Connection) -> None:
    """In a process of its own: which of the tests fail in the copy, each until its first case that
    does.
    """
    os.chdir(copy)
    os.environ["PYTHONPATH"] = copy  # for the processes that tests start
    sys.path.insert(0, copy)
    for name in [
        n
        for n in sys.modules
        if n.partition(".")[0] in ("rlhfjax", "tests", "benchmarks")
    ]:
        del sys.modules[name]
    import pytest

    failed: set[str] = set()

    class Watch:
        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_setup(self, item):
            if item.nodeid.partition("[")[0] in failed:
                pytest.skip("has failed")

        def pytest_runtest_logreport(self, report):
            if (
                report.when == "call" and report.failed
            ):  # a fixture or an import that breaks is no test that fails
                failed.add(report.nodeid.partition("[")[0])

    with (
        open(os.devnull, "w") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        pytest.main(
            ["-n0", "-m", "", "-p", "no:cacheprovider", "--tb=no", *tests],
            plugins=[Watch()],
        )
    import rlhfjax

    assert Path(rlhfjax.__file__).is_relative_to(copy), rlhfjax.__file__
    out.send(failed)
    out.close()


def failures(tests: Sequence[str], root: Path = ROOT, **changed: str) -> set[str]:
    """Those of the tests that fail in a copy of the tree where rlhfjax/<file> has the text of
    `changed`.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory(prefix="rlhfjax-defect-") as folder:
        copy = Path(folder).resolve()
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(
                    root / name,
                    copy / name,
                    ignore=shutil.ignore_patterns("__pycache__"),
                )
            else:
                shutil.copy(root / name, copy / name)
        for file, text in changed.items():
            (copy / "rlhfjax" / file).write_text(text)
        here, there = context.Pipe()
        process = context.Process(
            target=_run_tests,
            args=(str(copy), [f"tests/{name}" for name in tests], there),
        )
        process.start()
        there.close()
        try:
            failed = here.recv() if here.poll(LIMIT) else set()
        except EOFError:  # it died
            failed = set()
        process.kill()
        process.join()
    return {name.removeprefix("tests/") for name in failed}


def _tried(defect: Defect) -> tuple[bool, str]:
    """Whether a defect is noticed, and the line that says so."""
    began = time.monotonic()
    failed = failures(defect.tests, **{defect.file: replaced(defect, ROOT)})
    left = [name for name in defect.tests if name not in failed]
    what = re.sub(r"\s+", " ", defect.new or "(nothing)")[:60]
    verdict = f"NOT NOTICED by {', '.join(left)}" if left else "seen to fail"
    return (
        not left,
        f"{defect.pitfall:02d} {defect.file}: {what} — {verdict} ({time.monotonic() - began:.0f} s)",
    )


def _control(defects: Sequence[Defect]) -> int:
    """The same tests in the same way, with nothing put back: none may fail."""
    tests = sorted({name for defect in defects for name in defect.tests})
    failed = failures(tests)
    print(
        f"{len(tests)} tests, {len(failed)} fail without a defect: {', '.join(sorted(failed))}"
    )
    return 1 if failed else 0


def main(argv: list[str]) -> int:
    wanted = {int(number) for number in argv if number != CONTROL}
    chosen = [defect for defect in DEFECTS if not wanted or defect.pitfall in wanted]
    noticed, began = 0, time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="rlhfjax-defects-") as cache,
        ThreadPoolExecutor(JOBS) as jobs,
    ):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault(
            "JAX_COMPILATION_CACHE_DIR", cache
        )  # what a defect does not change is compiled once
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
        if CONTROL in argv:
            return _control(chosen)
        for seen, line in jobs.map(_tried, chosen):
            noticed += seen
            print(line, flush=True)
    print(f"{len(chosen)} defects, {noticed} noticed, {time.monotonic() - began:.0f} s")
    return 0 if noticed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
