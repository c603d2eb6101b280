"""Evaluation on held-out prompts: a policy against a baseline, by a gold reward.

Neither model was trained on the gold reward, and both respond to the same prompts. metrics.jsonl
has, as `evaluate/NAME`:

gold_win_rate, proxy_win_rate    (wins + ties / 2) / prompts, with NAME_wilson_{low,high}, 95 %
gold_difference                  mean of policy - baseline, prompt by prompt, with its 95 %
                                 interval NAME_bca_{low,high}, or NAME_t_{low,high} of few prompts
kl                               KL(policy || baseline) of the sampled responses, nats per response

At temperature 0 there is no `kl`: greedy responses are no samples of the policy, and no average
over them is a KL. A score that is NaN or infinite is an error.
"""

import dataclasses
import itertools
import logging
from typing import Any

import jax
import numpy as np

from rlhfjax import hosts
from rlhfjax.errors import ConfigError
from rlhfjax.evals import stats
from rlhfjax.evals.text import distinct_n
from rlhfjax.interop import store
from rlhfjax.jsonl import write_jsonl
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Progress, Writer
from rlhfjax.models.config import TransformerConfig
from rlhfjax.paths import Path
from rlhfjax.ranges import Seed, Size, Tokens
from rlhfjax.rewards.load import RewardSource, label, load_reward
from rlhfjax.rewards.responses import texts
from rlhfjax.rl.config import PromptConfig, sampling_workload, validate_sampling
from rlhfjax.rl.prompts import open_prompts
from rlhfjax.rl.responses import PromptBatching, sample_responses, validate_buckets
from rlhfjax.rl.rewards import reference_kl
from rlhfjax.roles import Role, scorers
from rlhfjax.sampling.config import Sampling, SamplingConfig

log = logging.getLogger("rlhfjax")
SAMPLES = "samples.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SamplingConfig):
    """The options of evaluation."""

    stage: str = "evaluate"
    policy: str
    """Workdir of the policy."""
    baseline: str
    """Workdir of the baseline, which is also the reference of the KL."""
    gold: RewardSource
    """Scorer that decides which response is better."""
    proxy: RewardSource | None = None
    """The reward that the policy was trained on; None: not measured."""
    prompts: PromptConfig = PromptConfig()
    """Held-out prompts."""
    batch_size: Size = 64
    """Prompts per batch."""
    prompt_buckets: Tokens = 1
    """Widths that prompts are padded to, even parts of prompt_length; each is compiled once."""
    seed: Seed = 0
    """Seed of prompts and responses."""
    mesh: MeshConfig = MeshConfig()
    """Mesh of devices."""


def roles(config: Config) -> dict[str, Role]:
    rewards = scorers(gold=config.gold, proxy=config.proxy)
    return {"policy": Role(config.policy), "baseline": Role(config.baseline), **rewards}


workload = sampling_workload


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    layout.validate_batch(config.batch_size, "evaluate.batch_size")
    validate_sampling(config, layout, model_config)
    validate_buckets(config.prompt_buckets, config.prompt_length, "evaluate")


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes metrics.jsonl and samples.jsonl (both responses to every prompt with their scores)."""
    models = {
        "policy": store.load(config.policy, layout),
        "baseline": store.load(config.baseline, layout),
    }
    for saved in models.values():
        validate(config, layout, saved.model.config)
    tokenizer = models["policy"].tokenizer
    if tokenizer != models["baseline"].tokenizer:
        raise ConfigError(
            "evaluate.baseline: must have the policy's tokenizer, "
            "a KL between different ones means nothing"
        )
    rewards = {"gold": load_reward(config.gold, layout, tokenizer)}
    if config.proxy:
        rewards["proxy"] = load_reward(config.proxy, layout, tokenizer)
    with layout.use():
        results = {
            name: _measure(config, name, saved, models["baseline"], rewards, layout)
            for name, saved in models.items()
        }
    for model, reward in itertools.product(results, rewards):
        source = label(getattr(config, reward))
        context = f"evaluate.{reward}={source}, responses of the {model}"
        stats.validate_scores(results[model][reward], context)
    metrics = summarize(results)
    policy = results["policy"]
    rows = sample_rows(policy["prompt"], policy, results["baseline"])
    write_jsonl(workdir / SAMPLES, rows)
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def _measure(
    config: Config,
    name: str,
    saved: store.SavedModel,
    reference: store.SavedModel,
    rewards: dict[str, Any],
    layout: Layout,
) -> dict[str, Any]:
    """Returns texts, scores, KL and lengths of one model's responses, per prompt."""
    tokenizer = saved.tokenizer
    source = open_prompts(config.prompts, "evaluate.prompts", tokenizer, config.seed)
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
        for rollout, index, cut in batches:
            rows = (rollout.tokens, rollout.attention_mask, rollout.mask)
            measured = {name: reward(*rows) for name, reward in rewards.items()}
            if config.temperature > 0:
                measured["kl"] = reference_kl(
                    config, reference.model, reference.params, rollout
                )
            rollout, measured = hosts.whole((rollout, measured))
            measured["prompt"], measured["response"] = texts(
                tokenizer, rollout.tokens, rollout.attention_mask, rollout.mask
            )
            is_eos = (rollout.responses == tokenizer.eos_id) & (rollout.mask > 0)
            measured["ended"] = is_eos.any(axis=1)
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


def summarize(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Returns the metrics of a policy and a baseline, as the module's docstring lists them."""
    policy, baseline = results["policy"], results["baseline"]
    metrics = {"prompts": len(policy["cut"]), "prompts_cut": policy["cut"].mean()}
    for score in ("gold", "proxy"):
        if score in policy:
            wins = stats.win_rate(policy[score], baseline[score])
            metrics |= _with_interval(f"{score}_win_rate", wins)
    if len(policy["gold"]) > 1:
        difference = stats.mean_interval(policy["gold"] - baseline["gold"])
        metrics |= _with_interval("gold_difference", difference)
    if "kl" in policy:
        metrics["kl"] = policy["kl"].mean()
    for name, result in results.items():
        metrics |= {
            f"gold_{name}": result["gold"].mean(),
            f"distinct_1_{name}": distinct_n(result["response"], 1),
            f"distinct_2_{name}": distinct_n(result["response"], 2),
            f"response_length_{name}": result["length"].mean(),
            f"eos_rate_{name}": result["ended"].mean(),
        }
        if "proxy" in result:
            metrics[f"proxy_{name}"] = result["proxy"].mean()
    return {f"evaluate/{name}": float(value) for name, value in metrics.items()}


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
        for score in ("gold", "proxy"):
            if score in policy:
                row[f"{score}_policy"] = float(policy[score][i])
                row[f"{score}_baseline"] = float(baseline[score][i])
        rows.append(row)
    return rows
