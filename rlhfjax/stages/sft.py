"""Supervised fine-tuning: next-token loss on the assistant's turns, in the chat template, packed.

L(theta) = -1/|A| sum_{t in A} log p_theta(x_t | x_<t)

where A are the assistant's tokens and the eos of its turns.

Sources with kind="text" mix pretraining documents into fine-tuning, all of whose targets are in A
too; `weight` is the share of rows. InstructGPT mixes 10 % of pretraining data (Ouyang et al. 2022,
appendix C.3). The metrics document_examples and document_tokens are the shares that documents have
of the packed examples and of the targets, and so of the loss.

`eval_reward` with keep_best="max:val_reward" keeps the checkpoint that a reward model likes best
(appendix C.1).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from rlhfjax.data.batches import TokenBatch, shapes
from rlhfjax.data.loader import sft_batches
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.language import (
    LanguageConfig,
    language_roles,
    language_stage,
    language_workload,
    validate_language,
)
from rlhfjax.mesh import Layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.rl.eval_reward import EvalRewardConfig, reward_evals, validate_eval_reward
from rlhfjax.roles import DISK, Loaded, Models, Role, Sources, scorers
from rlhfjax.stage import Stage
from rlhfjax.state import TrainState
from rlhfjax.types import Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LanguageConfig):
    """The options of supervised fine-tuning."""

    stage: str = "sft"
    """Name of the stage."""
    eval_reward: EvalRewardConfig = EvalRewardConfig()
    """A reward that scores sampled responses in every evaluation, as val_reward."""


MODEL_NAME = "SFT"
workload = language_workload


def roles(config: Config) -> dict[str, Role]:
    scorer = scorers(eval_reward=config.eval_reward.source)
    return {**language_roles(config), **scorer}


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    validate_language(config, layout, model_config)
    validate_eval_reward(config.eval_reward, config.stage, model_config)


def build(config: Config, layout: Layout, sources: Sources = DISK) -> Stage:
    size, length = config.batch_size, config.length
    batch = shapes(TokenBatch, b=size, t=length)
    batch = dataclasses.replace(batch, cut=jax.ShapeDtypeStruct((size,), np.float32))
    documents = has_documents(config)
    if documents:
        marks = jax.ShapeDtypeStruct((size, length), np.float32)
        batch = dataclasses.replace(batch, documents=marks)

    def open_reward(
        loaded: Loaded, tokenizer: Tokenizer, models: Models
    ) -> Callable[[TrainState], Metrics]:
        reward = config.eval_reward
        validate_eval_reward(reward, config.stage, loaded.model.config)
        return reward_evals(reward, config, loaded, tokenizer, layout, models)

    return language_stage(
        config,
        layout,
        sources,
        functools.partial(sft_batches, documents=documents),
        batch,
        roles=roles(config),
        more_evals=open_reward if config.eval_reward.source else None,
    )


def has_documents(config: Config) -> bool:
    """Returns whether a source is of kind text by its option."""
    sources = (*config.sources, *config.eval_sources)
    return any(source.kind == "text" for source in sources)
