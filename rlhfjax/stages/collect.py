"""Collection: K answers of a policy to each prompt, scored and ranked by a labeler, written as a dataset.

workdir/preferences/    ArrayRecord for the reward stage, and train.jsonl, validation.jsonl for people

With more than one labeler, how far they agree is reported: pairwise, with ties, and as Fleiss' kappa.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from rlhfjax import hosts
from rlhfjax.data.preferences import write_preferences
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import DataError
from rlhfjax.interop import store
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Progress, Writer, finalize
from rlhfjax.models.config import TransformerConfig
from rlhfjax.paths import Path
from rlhfjax.ranges import Seed, Several, Size, SizeOrNone, Temperature, Tokens
from rlhfjax.rewards.agreement import agreement
from rlhfjax.rewards.labelers import Answers, Labeler, make_answers
from rlhfjax.rewards.load import LabelerSource, label, load_labeler
from rlhfjax.rl.answers import Sampling, answers, validate_buckets
from rlhfjax.rl.config import TruncateConfig, validate_decode_batch, validate_truncate
from rlhfjax.rl.prompts import PromptConfig, open_prompts
from rlhfjax.roles import Role, Workload, job_workload, scorers
from rlhfjax.supervised import validate_length

FOLDER = "preferences"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    stage: str = "collect"
    init_from: str  # the policy that answers
    labeler: LabelerSource  # whose scores are kept: gold:sentiment, a reward's workdir, a judge's, rankings:GLOB
    others: tuple[
        LabelerSource, ...
    ] = ()  # label the same answers, for inter-labeler agreement alone
    prompts: PromptConfig = PromptConfig()
    eval_prompts: PromptConfig = PromptConfig()  # become the validation split
    samples_per_prompt: Several = 4  # K; InstructGPT: 4 to 9
    prompt_length: Tokens
    max_new_tokens: Tokens
    temperature: Temperature = 1.0
    # as in the stages that then train on such answers; `truncate` cuts, and keeps whole an answer without the token
    stop_at_eos: bool = True
    truncate: TruncateConfig = TruncateConfig()
    batch_size: Size = 32  # prompts at a time
    decode_batch: SizeOrNone = 0  # answers decoded at a time, the next prompt as soon as one ends; 0: all, to the longest
    prompt_buckets: Tokens = 1  # widths that prompts are padded to, even parts of prompt_length; each is compiled once
    int8: bool = False  # weights and cache of the policy while it answers: half of bfloat16's bytes, nearly its answers
    seed: Seed = 0
    mesh: MeshConfig = MeshConfig()


def roles(config: Config) -> dict[str, Role]:
    sources = {f"other_{i}": name for i, name in enumerate(config.others)}
    labelers = scorers(labeler=config.labeler, **sources)
    labelers = {name: role._replace(labels=True) for name, role in labelers.items()}
    return {"policy": Role(config.init_from), **labelers}


def workload(config: Config, completions: int = 1) -> Workload:
    return job_workload(config.batch_size, config.prompt_length + config.max_new_tokens)


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    layout.check_batch(
        config.batch_size * config.samples_per_prompt,
        "collect.batch_size times samples_per_prompt",
    )
    validate_decode_batch(
        config.decode_batch, config.samples_per_prompt, layout, "collect"
    )
    validate_buckets(config.prompt_buckets, config.prompt_length, "collect")
    validate_length(
        config.prompt_length + config.max_new_tokens,
        model_config,
        "collect.prompt_length + max_new_tokens",
    )
    validate_truncate(config.truncate, config.max_new_tokens, "collect")


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Samples, labels and writes; returns how many comparisons there are and how many of the pairs are ties."""
    policy = store.load(config.init_from, layout)
    validate(config, layout, policy.model.config)
    policy = store.int8(policy) if config.int8 else policy
    tokenizer = policy.tokenizer
    labelers = [
        load_labeler(name, layout, tokenizer)
        for name in (config.labeler, *config.others)
    ]
    prompts = {"train": config.prompts, "validation": config.eval_prompts}
    with layout.use():
        splits = {
            split: _answers(config, number, one, policy, tokenizer, labelers, layout)
            for number, (split, one) in enumerate(prompts.items())
        }
    hosts.share(
        lambda: write_preferences(
            workdir / FOLDER, splits, labeler=label(config.labeler)
        )
    )
    metrics = _describe(splits)
    for labeler in labelers:
        if hasattr(labeler, "metrics"):
            metrics |= finalize(labeler.metrics(), "collect/")
    if config.others:
        labels = [
            np.array([row["labels"][i] for row in splits["train"]])
            for i in range(len(labelers))
        ]
        metrics |= {
            f"collect/{name}": value for name, value in agreement(labels).items()
        }
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def _answers(
    config: Config,
    number: int,
    prompts: PromptConfig,
    policy: store.SavedModel,
    tokenizer: Tokenizer,
    labelers: list[Labeler],
    layout: Layout,
) -> list[dict[str, Any]]:
    source = open_prompts(prompts, "collect.prompts", seed=config.seed)
    lengths = (config.prompt_length, config.max_new_tokens)
    more = {
        "decode_batch": config.decode_batch,
        "stop_at_eos": config.stop_at_eos,
        "truncate": config.truncate,
    }
    more |= {"buckets": config.prompt_buckets}
    sampling = Sampling(
        *lengths,
        config.temperature,
        config.batch_size,
        samples_per_prompt=config.samples_per_prompt,
        **more,
    )
    key = jax.random.fold_in(jax.random.key(config.seed), number)
    rows = []
    with Progress(len(source), "prompts", title="collect") as progress:
        for rollout, index, cut in answers(
            source, policy, tokenizer, sampling, key, layout
        ):
            some = make_answers(
                rollout.tokens,
                rollout.segments,
                rollout.mask,
                config.samples_per_prompt,
                tokenizer,
            )
            labels = np.stack([labeler(some) for labeler in labelers])
            _validate_opinions(config, labels[0], index)
            rows += _rows(hosts.whole(rollout), some, labels, index, cut)
            progress.update(len(rows), count=int((index >= 0).sum()))
    return rows


def _validate_opinions(config: Config, labels: np.ndarray, index: np.ndarray) -> None:
    """Raises DataError if the labels [p, k] of a prompt of the source have no opinion (NaN)."""
    missing = np.argwhere(np.isnan(labels) & (index >= 0)[:, None])
    if len(missing):
        row, response = missing[0]
        place = f"response {response} of prompt {index[row]}"
        raise DataError(
            f"collect.labeler={label(config.labeler)}: it has no opinion about {place}"
        )


def _rows(
    rollout: Any,
    some: Answers,
    labels: np.ndarray,
    index: np.ndarray,
    cut: np.ndarray,
) -> list[dict[str, Any]]:
    """One row a prompt; prompts that only fill the batch are left out."""
    k, p = some.k, rollout.tokens.shape[1] - rollout.mask.shape[1]
    rows = []
    for i in (i for i, original in enumerate(index) if original >= 0):
        first = i * k
        rows.append(
            {
                "prompt": some.prompts[i],
                "prompt_tokens": rollout.tokens[first, :p][
                    rollout.segments[first, :p] > 0
                ].tolist(),
                "completions": some.completions[i],
                "completion_tokens": [
                    rollout.responses[j][rollout.mask[j] > 0].tolist()
                    for j in range(first, first + k)
                ],
                "scores": labels[0, i].tolist(),
                "labels": labels[:, i],
                "cut": float(cut[i]),
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
        "collect/prompts_cut": float(np.mean([row["cut"] for row in splits["train"]])),
    }
