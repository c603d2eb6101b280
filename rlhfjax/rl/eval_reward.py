"""Held-out reward of a model in fine-tuning: responses to prompts, scored by a reward.

InstructGPT chooses its SFT model by the reward model's score on held-out prompts, not by the
held-out loss, which rises after one epoch (Ouyang et al. 2022, appendix C.1). Here that is
`keep_best="max:val_reward"`.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from rlhfjax import hosts
from rlhfjax.algos.shaping import has_token
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.evals import stats
from rlhfjax.mesh import Layout
from rlhfjax.metrics import merge
from rlhfjax.models.config import TransformerConfig
from rlhfjax.ranges import Temperature, TokensOrNone
from rlhfjax.rewards.load import RewardSource, label, load_reward
from rlhfjax.rl.config import PromptConfig
from rlhfjax.rl.prompts import open_prompts
from rlhfjax.rl.responses import PromptBatching, sample_responses
from rlhfjax.roles import Loaded, Sources
from rlhfjax.sampling.config import Sampling, end_ids
from rlhfjax.state import TrainState
from rlhfjax.streams import HELD_OUT
from rlhfjax.supervised import ModelTrainConfig, validate_length
from rlhfjax.types import Metrics


@dataclasses.dataclass(frozen=True)
class EvalRewardConfig:
    """A reward that scores the responses of the trained model in every evaluation."""

    source: RewardSource = ""
    """Workdir of a reward model, or another scorer; empty: no responses are sampled."""
    prompts: PromptConfig = PromptConfig()
    """Held-out prompts."""
    prompt_length: TokensOrNone = 0
    """Tokens that prompts are padded to; longer conversations lose their oldest turns."""
    max_new_tokens: TokensOrNone = 0
    """Tokens of the longest response."""
    temperature: Temperature = 1.0
    """Sampling temperature; 0 is greedy."""


def validate_eval_reward(
    config: EvalRewardConfig, stage: str, model_config: TransformerConfig | None
) -> None:
    """Validates the options of the scored responses. Raises ConfigError."""
    if not config.source:
        return
    for option in ("prompt_length", "max_new_tokens"):
        if not getattr(config, option):
            raise ConfigError(
                f"{stage}.eval_reward.{option}=0: must be > 0 with eval_reward.source"
            )
    validate_length(
        config.prompt_length + config.max_new_tokens,
        model_config,
        f"{stage}.eval_reward: prompt_length + max_new_tokens",
    )


def reward_evals(
    config: EvalRewardConfig,
    stage: ModelTrainConfig,
    loaded: Loaded,
    tokenizer: Tokenizer,
    layout: Layout,
    sources: Sources,
) -> Callable[[TrainState], Metrics]:
    """Returns a function state -> reward and length of responses to the held-out prompts.

    The metrics are val_reward, val_response_length, val_eos_rate and val_prompts_cut. The random
    numbers are the same at every call.
    """
    option = f"{stage.stage}.eval_reward"
    prompts = open_prompts(config.prompts, f"{option}.prompts", tokenizer)
    reward = load_reward(config.source, layout, tokenizer, sources, "eval_reward")
    key = jax.random.fold_in(jax.random.key(stage.seed), HELD_OUT)
    batching = PromptBatching(batch_size=stage.batch_size, length=config.prompt_length)
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        extra_eos_ids=tokenizer.extra_eos_ids,
        temperature=config.temperature,
    )

    def evals(state: TrainState) -> Metrics:
        saved = loaded.saved(state.params)
        model = saved.model.restricted(tokenizer.vocab_size)
        policy = dataclasses.replace(saved, model=model)
        total: Metrics = {}
        for batch in sample_responses(prompts, policy, sampling, batching, key, layout):
            rollout = batch.rollout
            is_prompt = (batch.index >= 0).astype(np.float32)
            scores = reward(rollout.tokens, rollout.attention_mask, rollout.mask)
            scores = hosts.whole(scores)
            context = f"{option}.source={label(config.source)}"
            stats.validate_scores(scores, context, is_prompt)
            ended = has_token(rollout.responses, rollout.mask, *end_ids(tokenizer))
            measured = {
                "val_reward": scores,
                "val_response_length": hosts.whole(rollout.mask.sum(1)),
                "val_eos_rate": hosts.whole(ended),
                "val_prompts_cut": batch.cut,
            }
            for name, values in measured.items():
                values = np.where(is_prompt > 0, values, 0)
                metric = (float(values.sum()), float(is_prompt.sum()))
                total = merge(total, {name: metric})
        return total

    return evals
