"""Collection: K answers of a policy to each prompt, scored and ranked by a labeller, written as a dataset.

workdir/preferences/    ArrayRecord for the reward stage, and train.jsonl, validation.jsonl for people
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhfjax.data import loader
from rlhfjax.data.preferences import write_preferences
from rlhfjax.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Progress, Writer
from rlhfjax.models import store
from rlhfjax.models.config import TransformerConfig
from rlhfjax.rewards.responses import Reward, load_reward, texts
from rlhfjax.stages.parts.common import check_length
from rlhfjax.stages.parts.prompts import PromptConfig, open_prompts
from rlhfjax.stages.parts.rollout import sample

FOLDER = "preferences"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    stage: str = "collect"
    init_from: str  # the policy that answers
    labeller: str  # a scorer such as gold:sentiment, or a reward stage's workdir
    prompts: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    eval_prompts: PromptConfig = dataclasses.field(default_factory=PromptConfig)  # become the validation split
    completions: int = 4  # K; InstructGPT: 4 to 9
    prompt_length: int
    max_new: int
    temperature: float = 1.0
    batch_size: int = 32  # prompts at a time
    seed: int = 0
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def check(config: Config, layout: Layout, shape: TransformerConfig | None) -> None:
    """Refuses what cannot be meant, before anything is computed."""
    if config.completions < 2:
        raise ConfigError(f"collect.completions={config.completions}: a ranking needs at least 2")
    layout.check_batch(config.batch_size * config.completions, "collect.batch_size times completions")
    check_length(config.prompt_length + config.max_new, shape, "collect.prompt_length + max_new")


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Samples, labels and writes; returns how many comparisons there are and how many of the pairs are ties."""
    policy = store.load(config.init_from, layout)
    check(config, layout, policy.model.config)
    tokenizer = load_tokenizer(policy.tokenizer)
    labeller = load_reward(config.labeller, layout, tokenizer)
    prompts = {"train": config.prompts, "validation": config.eval_prompts}
    with layout.use():
        splits = {
            split: _answers(config, number, one, policy, tokenizer, labeller, layout)
            for number, (split, one) in enumerate(prompts.items())
        }
    write_preferences(workdir / FOLDER, splits, labeller=config.labeller)
    metrics = _describe(splits)
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def _answers(
    config: Config,
    number: int,
    prompts: PromptConfig,
    policy: store.SavedModel,
    tokenizer: SentencePieceTokenizer,
    labeller: Reward,
    layout: Layout,
) -> list[dict[str, Any]]:
    source = open_prompts(prompts, "collect.prompts", seed=config.seed)
    batches = loader.prompt_batches(
        source, tokenizer, train=False, batch_size=config.batch_size, length=config.prompt_length
    )
    limits = {"max_new": config.max_new, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    key = jax.random.fold_in(jax.random.key(config.seed), number)
    rows = []
    with Progress(len(source), "prompts", title="collect") as progress:
        for i, batch in enumerate(batches):
            repeated = {k: np.repeat(batch[k], config.completions, axis=0) for k in ("prompts", "segments")}
            placed = layout.put(repeated)
            rollout = sample(
                policy.model,
                policy.params,
                placed["prompts"],
                placed["segments"],
                jax.random.fold_in(key, i),
                temperature=config.temperature,
                **limits,
            )
            scores = np.asarray(labeller(rollout.tokens, rollout.segments, rollout.mask), np.float64)
            rows += _rows(jax.device_get(rollout), scores, batch["index"], config, tokenizer)
            progress.update(len(rows), count=int((batch["index"] >= 0).sum()))
    return rows


def _rows(
    rollout: Any, scores: np.ndarray, index: np.ndarray, config: Config, tokenizer: SentencePieceTokenizer
) -> list[dict[str, Any]]:
    """One row a prompt; prompts that only fill the batch are left out."""
    k, p = config.completions, config.prompt_length
    prompts, answers = texts(tokenizer, rollout.tokens, rollout.segments, rollout.mask)
    rows = []
    for first in (i * k for i, original in enumerate(index) if original >= 0):
        some = range(first, first + k)
        rows.append(
            {
                "prompt": prompts[first],
                "prompt_tokens": rollout.tokens[first, :p][rollout.segments[first, :p] > 0].tolist(),
                "completions": [answers[i] for i in some],
                "completion_tokens": [rollout.responses[i][rollout.mask[i] > 0].tolist() for i in some],
                "scores": [float(scores[i]) for i in some],
            }
        )
    return rows


def _describe(splits: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    scores = np.array([row["scores"] for row in splits["train"]])
    i, j = np.triu_indices(scores.shape[1], k=1)
    lengths = [len(ids) for row in splits["train"] for ids in row["completion_tokens"]]
    return {
        "collect/prompts": float(len(scores)),
        "collect/comparisons": float(len(scores) * len(i)),
        "collect/ties": float(np.mean(scores[:, i] == scores[:, j])),
        "collect/score": float(scores.mean()),
        "collect/score_std_within_prompt": float(scores.std(axis=1).mean()),
        "collect/response_length": float(np.mean(lengths)),
    }
