"""Collection: K responses of a policy per prompt, ranked by a labeler, written as a dataset.

workdir/preferences/    ArrayRecord for the reward stage, {train,validation}.jsonl for people

With more than one labeler, their agreement is reported: pairwise, with ties, and as Fleiss' kappa.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from rlhfjax import hosts
from rlhfjax.data.counted import data_metrics
from rlhfjax.data.preferences import write_preferences
from rlhfjax.data.sources import Source
from rlhfjax.errors import DataError
from rlhfjax.evals.words import substitutes
from rlhfjax.interop import store
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer, finalize
from rlhfjax.models.config import TransformerConfig
from rlhfjax.paths import Path
from rlhfjax.progress import Progress
from rlhfjax.ranges import Seed, Several, Size, Tokens
from rlhfjax.rewards.agreement import agreement
from rlhfjax.rewards.labelers import Answers, Labeler, make_answers
from rlhfjax.rewards.load import LabelerSource, label, load_labeler
from rlhfjax.rl.config import (
    PromptConfig,
    TruncateConfig,
    batches_of,
    sampling_workload,
    validate_sampling,
    validate_truncate,
)
from rlhfjax.rl.prompts import open_prompts
from rlhfjax.rl.responses import (
    PromptBatching,
    Responses,
    sample_responses,
    validate_buckets,
)
from rlhfjax.roles import Role, Workload, scorers
from rlhfjax.sampling.config import Sampling, ShapedSamplingConfig

FOLDER = "preferences"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ShapedSamplingConfig):
    """The options of collection. `truncate` cuts responses; one without the token stays whole."""

    stage: str = "collect"
    init_from: str
    """Workdir of the policy that responds."""
    labeler: LabelerSource
    """Labeler whose scores are kept: gold:sentiment, rankings:GLOB, or a reward's workdir."""
    others: tuple[LabelerSource, ...] = ()
    """Labelers of the same responses, for inter-labeler agreement alone."""
    prompts: PromptConfig = PromptConfig()
    """Prompts of the train split."""
    eval_prompts: PromptConfig = PromptConfig()
    """Prompts of the validation split."""
    samples_per_prompt: Several = 4
    """K, responses per prompt (InstructGPT: 4 to 9)."""
    truncate: TruncateConfig = TruncateConfig()
    """Stop token, as in the stages that train on such responses."""
    batch_size: Size = 32
    """Prompts per batch."""
    prompt_buckets: Tokens = 1
    """Widths that prompts are padded to, even parts of prompt_length; each is compiled once."""
    int8: bool = False
    """Whether the policy samples with int8 weights and cache, half the bytes of bfloat16."""
    seed: Seed = 0
    """Seed of prompts and responses."""
    mesh: MeshConfig = MeshConfig()
    """Mesh of devices."""


def roles(config: Config) -> dict[str, Role]:
    others = {f"other_{i}": name for i, name in enumerate(config.others)}
    labelers = scorers(labeler=config.labeler, **others)
    labelers = {name: role._replace(labels=True) for name, role in labelers.items()}
    return {"policy": Role(config.init_from), **labelers}


def workload(config: Config, completions: int = 1) -> Workload:
    labelers = [("label", role) for role in roles(config) if role != "policy"]
    return sampling_workload(config, config.samples_per_prompt, labelers)


def batches(config: Config) -> int | None:
    return batches_of(config.batch_size, config.prompts, config.eval_prompts)


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    layout.validate_batch(
        config.batch_size * config.samples_per_prompt,
        "collect.batch_size times samples_per_prompt",
    )
    validate_sampling(config, layout, model_config, config.samples_per_prompt)
    validate_buckets(config.prompt_buckets, config.prompt_length, "collect")
    validate_truncate(config.truncate, config.max_new_tokens, "collect")


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Samples, labels and writes; returns metrics such as comparisons and the share of ties."""
    policy = store.load(config.init_from, layout)
    validate(config, layout, policy.model.config)
    policy = store.int8(policy) if config.int8 else policy
    names = (config.labeler, *config.others)
    labelers = [load_labeler(name, layout, policy.tokenizer) for name in names]
    prompts = {"train": config.prompts, "validation": config.eval_prompts}
    key = jax.random.key(config.seed)
    splits, counts = {}, {}
    with layout.use():
        for i, (split, prompt_config) in enumerate(prompts.items()):
            split_key = jax.random.fold_in(key, i)
            source = open_prompts(
                prompt_config, "collect.prompts", policy.tokenizer, config.seed
            )
            splits[split] = _labeled_rows(
                config, source, policy, labelers, split_key, layout
            )
            counts[split] = data_metrics(source, "collect")
    labeler_name = label(config.labeler)
    hosts.share(
        lambda: write_preferences(workdir / FOLDER, splits, labeler=labeler_name)
    )
    metrics = _describe(splits["train"]) | counts["train"]
    for labeler in labelers:
        labeler_metrics = getattr(labeler, "metrics", None)
        if labeler_metrics is not None:
            metrics |= finalize(labeler_metrics(), "collect/")
    if config.others:
        labels = [row["labels"] for row in splits["train"]]
        by_labeler = [np.array(label) for label in zip(*labels, strict=True)]
        for name, value in agreement(by_labeler).items():
            metrics[f"collect/{name}"] = value
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def _labeled_rows(
    config: Config,
    source: Source,
    policy: store.SavedModel,
    labelers: list[Labeler],
    key: jax.Array,
    layout: Layout,
) -> list[dict[str, Any]]:
    """Returns the rows of a split: prompts with their responses and labels."""
    k, tokenizer = config.samples_per_prompt, policy.tokenizer
    sampling = Sampling.from_config(config, tokenizer, k)
    batching = PromptBatching(
        batch_size=config.batch_size,
        length=config.prompt_length,
        buckets=config.prompt_buckets,
    )
    batches = sample_responses(
        source, policy, sampling, batching, key, layout, truncate=config.truncate
    )
    rows = []
    with Progress(len(source), "prompts", title="collect") as progress:
        for batch in batches:
            rollout, index = batch.rollout, batch.index
            answers = make_answers(
                rollout.tokens, rollout.attention_mask, rollout.mask, k, tokenizer
            )
            labels = np.stack([labeler(answers) for labeler in labelers])
            _validate_opinions(config, labels[0], index)
            rows += _rows(batch, answers, labels)
            progress.update(len(rows), count=int((index >= 0).sum()))
    return rows


def _validate_opinions(config: Config, labels: np.ndarray, index: np.ndarray) -> None:
    """Raises DataError if one of the labels [p, k] of the source's prompts is no opinion (NaN)."""
    missing = np.argwhere(np.isnan(labels) & (index >= 0)[:, None])
    if len(missing):
        row, response = missing[0]
        raise DataError(
            f"collect.labeler={label(config.labeler)}: "
            f"it has no opinion about response {response} of prompt {index[row]}"
        )


def _rows(
    batch: Responses, answers: Answers, labels: np.ndarray
) -> list[dict[str, Any]]:
    """Returns one row per prompt, without the prompts that only fill the batch."""
    rollout, k = hosts.whole(batch.rollout), answers.k
    p = rollout.tokens.shape[1] - rollout.mask.shape[1]
    is_prompt_token = rollout.attention_mask[:, :p] > 0
    is_response_token = rollout.mask > 0
    rows = []
    for i in np.flatnonzero(batch.index >= 0):
        first = i * k
        prompt = rollout.tokens[first, :p][is_prompt_token[first]]
        responses = [
            rollout.responses[j][is_response_token[j]].tolist()
            for j in range(first, first + k)
        ]
        row = {
            "prompt": answers.prompts[i],
            "prompt_tokens": prompt.tolist(),
            "completions": answers.completions[i],
            "completion_tokens": responses,
            "scores": labels[0, i].tolist(),
            "labels": labels[:, i],
            "cut": float(batch.cut[i]),
        }
        rows.append(row)
    return rows


def _describe(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns metrics of the rows of the train split."""
    scores = np.array([row["scores"] for row in rows])
    i, j = np.triu_indices(scores.shape[1], k=1)
    lengths = np.array([[*map(len, row["completion_tokens"])] for row in rows])
    texts = [row["completions"] for row in rows]
    baselines = substitutes(texts, lengths, scores)
    return {
        "collect/prompts": float(len(scores)),
        "collect/comparisons": float(len(scores) * len(i)),
        "collect/ties": float(np.mean(scores[:, i] == scores[:, j])),
        "collect/score": float(scores.mean()),
        "collect/score_std_within_prompt": float(scores.std(axis=1).mean()),
        "collect/response_length": float(np.mean(lengths)),
        **{f"collect/{name}": value for name, value in baselines.items()},
        "collect/prompts_cut": float(np.mean([row["cut"] for row in rows])),
    }
