"""Evaluation on held-out prompts: a policy against a baseline.

Neither model was trained on the gold reward, and both respond to the same prompts. metrics.jsonl
has, as `evaluate/NAME`, what docs/metrics.md explains. The most important are:

gold_win_rate, proxy_win_rate    (wins + ties / 2) / prompts, with NAME_wilson_{low,high}, 95 %
gold_win_rate_equal_length       the same for responses of equal length, see `evals.length`, with
                                 NAME_wald_{low,high}; likewise for the proxy
gold_difference                  mean of policy - baseline, prompt by prompt, with its 95 %
                                 interval NAME_bca_{low,high}, or NAME_t_{low,high} of few prompts
kl                               KL(policy || baseline) of the sampled responses, nats per response
chat_loss_MODEL, text_loss_MODEL nats per token on held-out data, with `tax`

Without a gold reward the proxy alone decides, and without either there is no win rate. At
temperature 0 there is no `kl`: greedy responses are no samples of the policy, and no average over
them is a KL. The same holds with min_p, a repetition penalty or stop. A score that is NaN or
infinite is an error.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlhfjax import hosts
from rlhfjax.data import loader
from rlhfjax.data.config import SourceConfig, open_sources
from rlhfjax.data.counted import data_metrics
from rlhfjax.data.sources import Source
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.evals import stats
from rlhfjax.evals.length import length_controlled_win_rate
from rlhfjax.evals.text import distinct_n
from rlhfjax.interop import store
from rlhfjax.jsonl import write_jsonl
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer, finalize
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.paths import Path
from rlhfjax.progress import Progress
from rlhfjax.ranges import Count, Seed, Size, Tokens, TokensOrNone
from rlhfjax.rewards.load import RewardSource, label, load_reward
from rlhfjax.rewards.responses import texts
from rlhfjax.rl.config import (
    PromptConfig,
    batches_of,
    sampling_workload,
    validate_sampling,
)
from rlhfjax.rl.prompts import open_prompts
from rlhfjax.rl.responses import PromptBatching, sample_responses, validate_buckets
from rlhfjax.rl.rewards import reference_kl
from rlhfjax.roles import Role, Workload, scorers
from rlhfjax.sampling.config import Sampling, ShapedSamplingConfig, end_ids
from rlhfjax.supervised import (
    held_out_loss,
    language_loss,
    sum_metrics,
    validate_length,
)
from rlhfjax.types import Metrics

log = logging.getLogger("rlhfjax")
SAMPLES = "samples.jsonl"
COMPARED = ("policy", "baseline")
MODELS = (*COMPARED, "pretrained")
SCORES = ("gold", "proxy")


@dataclasses.dataclass(frozen=True)
class TaxConfig:
    """Held-out text that shows the alignment tax: what the policy unlearned while it was trained.

    Source: Ouyang et al. 2022, section 4.2; here by the loss of the language model.
    """

    chats: tuple[SourceConfig, ...] = ()
    """Held-out conversations; the loss is of the assistant's tokens."""
    texts: tuple[SourceConfig, ...] = ()
    """Held-out documents."""
    pretrained: str | None = None
    """Workdir of the model before fine-tuning, measured beside the others; None: it is not."""
    length: TokensOrNone = 0
    """Tokens per row; 0: prompt_length + max_new_tokens."""
    batches: Count = 4
    """Batches per kind of text; 0: all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ShapedSamplingConfig):
    """The options of evaluation."""

    stage: str = "evaluate"
    policy: str
    """Workdir of the policy."""
    baseline: str
    """Workdir of the baseline, which is also the reference of the KL."""
    gold: RewardSource | None = None
    """Scorer that decides which response is better; None: not measured."""
    proxy: RewardSource | None = None
    """The reward that the policy was trained on; None: not measured."""
    prompts: PromptConfig = PromptConfig()
    """Held-out prompts."""
    policy_prompts: PromptConfig = PromptConfig()
    """The same prompts, row by row, as the policy gets them: after solved examples, for a model
    that was only pretrained. Without a source the policy gets `prompts`."""
    tax: TaxConfig = TaxConfig()
    """Held-out text, on which the loss of the models is measured."""
    batch_size: Size = 64
    """Prompts per batch."""
    prompt_buckets: Tokens = 1
    """Widths that prompts are padded to, even parts of prompt_length; each is compiled once."""
    seed: Seed = 0
    """Seed of prompts and responses."""
    mesh: MeshConfig = MeshConfig()
    """Mesh of devices."""


def roles(config: Config) -> dict[str, Role]:
    models = {"policy": Role(config.policy), "baseline": Role(config.baseline)}
    if config.tax.pretrained:
        models["pretrained"] = Role(config.tax.pretrained)
    return models | scorers(gold=config.gold, proxy=config.proxy)


def workload(config: Config, completions: int = 1) -> Workload:
    """Returns what a batch computes. Both models respond to its prompts."""
    passes = [("score", "gold"), ("score", "proxy")]
    if _measures_kl(config):
        passes.append(("kl", "baseline"))
    return sampling_workload(config, 2, passes)


def _measures_kl(config: Config) -> bool:
    """Returns whether responses are samples of the policy's own distribution."""
    return config.temperature > 0 and not config.is_shaped


def batches(config: Config) -> int | None:
    return batches_of(config.batch_size, config.prompts)


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    layout.validate_batch(config.batch_size, "evaluate.batch_size")
    validate_sampling(config, layout, model_config)
    validate_buckets(config.prompt_buckets, config.prompt_length, "evaluate")
    validate_length(config.tax.length, model_config, "evaluate.tax.length")


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes metrics.jsonl and samples.jsonl (both responses to every prompt with their scores)."""
    sources = {name: role.source for name, role in roles(config).items()}
    models = {
        name: store.load(str(sources[name]), layout)
        for name in MODELS
        if name in sources
    }
    for name, saved in models.items():
        validate(config, layout, saved.model.config)
        if saved.tokenizer != models["policy"].tokenizer:
            raise ConfigError(
                f"evaluate.{name}: must have the policy's tokenizer, "
                "numbers per token of different ones cannot be compared"
            )
    tokenizer = models["policy"].tokenizer
    rewards = {
        name: load_reward(source, layout, tokenizer)
        for name in SCORES
        if (source := getattr(config, name))
    }
    prompts = _prompts(config, tokenizer)
    with layout.use():
        results = {
            name: _measure(
                config, name, models[name], models["baseline"], rewards, source, layout
            )
            for name, source in prompts.items()
        }
        losses = held_out_losses(config, models, layout)
    for model, reward in itertools.product(results, rewards):
        source = label(getattr(config, reward))
        context = f"evaluate.{reward}={source}, responses of the {model}"
        stats.validate_scores(results[model][reward], context)
    metrics = summarize(results) | losses
    metrics |= data_metrics(prompts["policy"], "evaluate")
    policy = results["policy"]
    rows = sample_rows(policy["prompt"], policy, results["baseline"])
    write_jsonl(workdir / SAMPLES, rows)
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def _prompts(config: Config, tokenizer: Tokenizer) -> dict[str, Source]:
    """Returns the prompts of both models."""

    def opened(option: str) -> Source:
        prompts = getattr(config, option)
        return open_prompts(prompts, f"evaluate.{option}", tokenizer, config.seed)

    baseline = opened("prompts")
    if config.policy_prompts.source is None:
        return {"policy": baseline, "baseline": baseline}
    policy = opened("policy_prompts")
    if len(policy) != len(baseline):
        raise ConfigError(
            f"evaluate.policy_prompts: {len(policy)} prompts, evaluate.prompts has"
            f" {len(baseline)}; expected the same ones, row by row"
        )
    return {"policy": policy, "baseline": baseline}


def _measure(
    config: Config,
    name: str,
    saved: store.SavedModel,
    reference: store.SavedModel,
    rewards: dict[str, Any],
    source: Source,
    layout: Layout,
) -> dict[str, Any]:
    """Returns texts, scores, KL and lengths of one model's responses, per prompt."""
    tokenizer = saved.tokenizer
    batches = sample_responses(
        source,
        saved,
        Sampling.from_config(config, tokenizer),
        PromptBatching(
            batch_size=config.batch_size,
            length=config.prompt_length,
            buckets=config.prompt_buckets,
        ),
        jax.random.key(config.seed),
        layout,
    )
    log.info("evaluate: sampling and scoring the responses of the %s", name)
    results: dict[str, list] = {}
    with Progress(len(source), "prompts", title=f"evaluate {name}") as progress:
        for rollout, index, cut, stopped in batches:
            rows = (rollout.tokens, rollout.attention_mask, rollout.mask)
            measured = {name: reward(*rows) for name, reward in rewards.items()}
            if _measures_kl(config):
                measured["kl"] = reference_kl(
                    config, reference.model, reference.params, rollout
                )
            rollout, measured = hosts.whole((rollout, measured))
            measured["prompt"], measured["response"] = texts(
                tokenizer, rollout.tokens, rollout.attention_mask, rollout.mask
            )
            is_eos = np.isin(rollout.responses, end_ids(tokenizer))
            ended = (is_eos & (rollout.mask > 0)).any(axis=1)
            measured["ended"] = ended | stopped
            measured["length"] = rollout.mask.sum(1)
            measured["cut"] = cut
            is_prompt = np.flatnonzero(index >= 0)
            for key, values in measured.items():
                results.setdefault(key, []).extend(values[i] for i in is_prompt)
            progress.update(len(results["cut"]), count=len(is_prompt))
    return {
        name: values if isinstance(values[0], str) else np.array(values, np.float64)
        for name, values in results.items()
    }


def held_out_losses(
    config: Config, models: dict[str, store.SavedModel], layout: Layout
) -> dict[str, float]:
    """Returns the losses of all models on held-out text, per token and per byte."""
    tax, tokenizer = config.tax, models["policy"].tokenizer
    length = config.prompt_length + config.max_new_tokens
    if tax.length:
        length = tax.length
    kinds = {
        "chat": (loader.sft_batches, tax.chats),
        "text": (loader.pretrain_batches, tax.texts),
    }

    @functools.cache  # models of one shape share a compiled program
    def measure(model: Model) -> Callable[..., Metrics]:
        return held_out_loss(model, language_loss(model), tokenizer.byte_lengths())

    losses: dict[str, float] = {}
    for kind, (load, sources) in kinds.items():
        if not sources:
            continue
        batches = load(
            open_sources(sources, f"evaluate.tax.{kind}s"),
            tokenizer=tokenizer,
            batch_size=config.batch_size,
            length=length,
            train=False,
        )
        for name, saved in models.items():
            of_batch = functools.partial(measure(saved.model), saved.params)
            total = sum_metrics(batches.restart(), of_batch, layout, tax.batches)
            means = finalize(total)
            losses[f"evaluate/{kind}_loss_{name}"] = means["val_loss"]
            if "val_examples_cut" in means:  # the same of every model
                losses[f"evaluate/{kind}_examples_cut"] = means["val_examples_cut"]
            per_byte = means["val_nats_per_byte"]
            losses[f"evaluate/{kind}_nats_per_byte_{name}"] = per_byte
    return losses


def summarize(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Returns the metrics of a policy and a baseline, as the module's docstring lists them."""
    policy, baseline = results["policy"], results["baseline"]
    metrics = {"prompts": len(policy["cut"]), "prompts_cut": policy["cut"].mean()}
    for score in SCORES:
        if score in policy:
            metrics |= _compare(score, policy, baseline)
    if "kl" in policy:
        metrics |= _mean("kl", policy["kl"])
    for name, result in results.items():
        metrics |= {
            f"distinct_1_{name}": distinct_n(result["response"], 1),
            f"distinct_2_{name}": distinct_n(result["response"], 2),
            f"eos_rate_{name}": result["ended"].mean(),
        }
        metrics |= _mean(f"response_length_{name}", result["length"])
        for score in SCORES:
            if score in result:
                metrics |= _mean(f"{score}_{name}", result[score])
    return {f"evaluate/{name}": float(value) for name, value in metrics.items()}


def _compare(
    score: str, policy: dict[str, Any], baseline: dict[str, Any]
) -> dict[str, float]:
    """Returns the win rates by a score, and the mean difference of the scores."""
    scores = policy[score], baseline[score]
    longer = policy["length"] - baseline["length"]
    equal_length = length_controlled_win_rate(*scores, longer)
    difference = policy[score] - baseline[score]
    metrics = _with_interval(f"{score}_win_rate", stats.win_rate(*scores))
    metrics |= _with_interval(f"{score}_win_rate_equal_length", equal_length)
    if len(difference) > 1:
        metrics |= _mean(f"{score}_difference", difference)
    return metrics


def _mean(name: str, values: np.ndarray) -> dict[str, float]:
    """Returns the mean of the prompts' values, with its interval if there are several prompts."""
    if len(values) < 2:
        return {name: values.mean()}
    return _with_interval(name, stats.mean_interval(values))


def _with_interval(name: str, interval: stats.Interval) -> dict[str, float]:
    """Returns NAME and the ends of its interval, whose names say which kind of interval it is."""
    prefix = f"{name}_{interval.method.lower()}"
    return {
        name: interval.value,
        f"{prefix}_low": interval.low,
        f"{prefix}_high": interval.high,
    }


def sample_rows(
    prompts: list[str], policy: dict[str, Any], baseline: dict[str, Any]
) -> list[dict[str, Any]]:
    """Returns the lines of samples.jsonl, one per prompt: both responses and their scores."""
    rows = []
    for i, prompt in enumerate(prompts):
        row: dict[str, Any] = {
            "prompt": prompt,
            "policy": policy["response"][i],
            "baseline": baseline["response"][i],
        }
        for score in (*SCORES, "length"):
            if score in policy:
                row[f"{score}_policy"] = float(policy[score][i])
                row[f"{score}_baseline"] = float(baseline[score][i])
        rows.append(row)
    return rows
