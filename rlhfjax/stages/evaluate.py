"""Evaluation on held-out prompts: a policy against a baseline, by a gold reward that neither was trained on.

Both answer the same prompts. metrics.jsonl has, as `evaluate/NAME`:

gold_win_rate, proxy_win_rate    (wins + ties / 2) / prompts, with NAME_wilson_{low,high}, 95 %
gold_difference                  mean of policy - baseline, prompt by prompt, with its 95 %
                                 interval NAME_bca_{low,high}, or NAME_t_{low,high} of few prompts
kl                               KL(policy || baseline) of the sampled responses, nats per response

At temperature 0 there is no `kl`: greedy responses are no samples of the policy, and no average
over them is a KL. A score that is NaN or infinite is an error.
"""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from rlhfjax import hosts
from rlhfjax.algos import kl
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.evals import stats
from rlhfjax.evals.text import distinct_n
from rlhfjax.interop import store
from rlhfjax.jsonl import write_jsonl
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.models.config import TransformerConfig
from rlhfjax.paths import Path
from rlhfjax.ranges import Seed, Size, SizeOrNone, Temperature, Tokens
from rlhfjax.rewards.load import RewardSource, label, load_reward
from rlhfjax.rewards.responses import texts
from rlhfjax.rl.answers import Sampling, answers, validate_buckets
from rlhfjax.rl.config import validate_decode_batch
from rlhfjax.rl.prompts import PromptConfig, open_prompts
from rlhfjax.rl.rollout import Rollout, response_logprobs
from rlhfjax.roles import Role, Workload, job_workload, scorers
from rlhfjax.supervised import validate_length

SAMPLES = "samples.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    stage: str = "evaluate"
    policy: str
    baseline: str  # also the reference of the KL
    gold: RewardSource  # a scorer
    proxy: RewardSource | None = None  # the reward that the policy was trained on
    prompts: PromptConfig = PromptConfig()
    prompt_length: Tokens
    max_new_tokens: Tokens
    temperature: Temperature = 1.0
    batch_size: Size = 64
    decode_batch: SizeOrNone = 0  # answers decoded at a time, the next prompt as soon as one ends; 0: all, to the longest
    prompt_buckets: Tokens = 1  # widths that prompts are padded to, even parts of prompt_length; each is compiled once
    seed: Seed = 0
    mesh: MeshConfig = MeshConfig()


def roles(config: Config) -> dict[str, Role]:
    scored = scorers(gold=config.gold, proxy=config.proxy)
    return {"policy": Role(config.policy), "baseline": Role(config.baseline), **scored}


def workload(config: Config, completions: int = 1) -> Workload:
    return job_workload(config.batch_size, config.prompt_length + config.max_new_tokens)


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    layout.check_batch(config.batch_size, "evaluate.batch_size")
    validate_decode_batch(config.decode_batch, 1, layout, "evaluate")
    validate_buckets(config.prompt_buckets, config.prompt_length, "evaluate")
    validate_length(
        config.prompt_length + config.max_new_tokens,
        model_config,
        "evaluate.prompt_length + max_new_tokens",
    )


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes metrics.jsonl and samples.jsonl (both answers to every prompt with their scores)."""
    models = {
        name: store.load(getattr(config, name), layout)
        for name in ("policy", "baseline")
    }
    for saved in models.values():
        validate(config, layout, saved.model.config)
    tokenizer = models["policy"].tokenizer
    if models["policy"].tokenizer != models["baseline"].tokenizer:
        raise ConfigError(
            "evaluate: policy and baseline have different tokenizers; a KL between them means nothing"
        )
    rewards = {"gold": load_reward(config.gold, layout, tokenizer)}
    if config.proxy:
        rewards["proxy"] = load_reward(config.proxy, layout, tokenizer)
    with layout.use():
        answered = {
            name: _answer(config, saved, models["baseline"], tokenizer, rewards, layout)
            for name, saved in models.items()
        }
    for who, name in itertools.product(answered, rewards):
        context = (
            f"evaluate.{name}={label(getattr(config, name))}, responses of the {who}"
        )
        stats.validate_scores(answered[who][name], context)
    metrics = summarize(answered)
    _write_samples(workdir / SAMPLES, answered)
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def _answer(
    config: Config,
    saved: store.SavedModel,
    reference: store.SavedModel,
    tokenizer: Tokenizer,
    rewards: dict[str, Any],
    layout: Layout,
) -> dict[str, Any]:
    """One model's answers to all prompts: texts, scores, KL to the reference, lengths."""
    source = open_prompts(config.prompts, "evaluate.prompts", seed=config.seed)
    lengths = (config.prompt_length, config.max_new_tokens)
    more = {"decode_batch": config.decode_batch, "buckets": config.prompt_buckets}
    sampling = Sampling(*lengths, config.temperature, config.batch_size, **more)
    parts: dict[str, list] = {}
    key = jax.random.key(config.seed)
    for rollout, index, cut in answers(source, saved, tokenizer, sampling, key, layout):
        rows = (rollout.tokens, rollout.segments, rollout.mask)
        measured = {name: reward(*rows) for name, reward in rewards.items()}
        if config.temperature > 0:
            measured["kl"] = _sequence_kl(reference, rollout, config.temperature)
        rollout, measured = hosts.whole((rollout, measured))
        prompts, answered = texts(
            tokenizer, rollout.tokens, rollout.segments, rollout.mask
        )
        ended = ((rollout.responses == tokenizer.eos_id) & (rollout.mask > 0)).any(
            axis=1
        )
        measured |= {
            "prompt": prompts,
            "answer": answered,
            "length": rollout.mask.sum(1),
            "ended": ended,
        }
        measured |= {"cut": cut}
        real = np.flatnonzero(index >= 0)
        for name, values in measured.items():
            parts.setdefault(name, []).extend(values[i] for i in real)
    return {
        k: v if isinstance(v[0], str) else np.array(v, np.float64)
        for k, v in parts.items()
    }


def _sequence_kl(
    reference: store.SavedModel, rollout: Rollout, temperature: float
) -> jax.Array:
    """log pi(y|x) / pi_ref(y|x) of each response, nats; the temperature is above 0."""
    model, params, r = reference.model, reference.params, rollout.mask.shape[1]
    tokens, segments = rollout.tokens, rollout.segments
    ref_logprobs, _ = response_logprobs(model, params, tokens, segments, r, temperature)
    return kl.sequence_kl(kl.k1(rollout.logprobs, ref_logprobs), rollout.mask)


def summarize(answers: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The held-out table: `evaluate/gold_win_rate`, `evaluate/kl`, …; see the module."""
    policy, baseline = answers["policy"], answers["baseline"]
    out = {"prompts": len(policy["answer"]), "prompts_cut": policy["cut"].mean()}
    for score in ("gold", "proxy"):
        if score in policy:
            wins = stats.win_rate(policy[score], baseline[score])
            out |= _with_interval(f"{score}_win_rate", wins)
    if len(policy["gold"]) > 1:
        difference = stats.mean_interval(policy["gold"] - baseline["gold"])
        out |= _with_interval("gold_difference", difference)
    if "kl" in policy:
        out["kl"] = policy["kl"].mean()
    for name, side in (("policy", policy), ("baseline", baseline)):
        out |= {
            f"gold_{name}": side["gold"].mean(),
            f"distinct_1_{name}": distinct_n(side["answer"], 1),
            f"distinct_2_{name}": distinct_n(side["answer"], 2),
            f"response_length_{name}": side["length"].mean(),
            f"eos_rate_{name}": side["ended"].mean(),
        }
        if "proxy" in side:
            out[f"proxy_{name}"] = side["proxy"].mean()
    return {f"evaluate/{name}": float(value) for name, value in out.items()}


def _with_interval(name: str, interval: stats.Interval) -> dict[str, float]:
    """NAME, and the ends of its interval, whose names say which interval it is."""
    prefix = f"{name}_{interval.method.lower()}"
    return {
        name: interval.value,
        f"{prefix}_low": interval.low,
        f"{prefix}_high": interval.high,
    }


def _write_samples(path: Path, answers: dict[str, dict[str, Any]]) -> None:
    policy, baseline = answers["policy"], answers["baseline"]
    rows = []
    for i, prompt in enumerate(policy["prompt"]):
        row = {
            "prompt": prompt,
            "policy": policy["answer"][i],
            "baseline": baseline["answer"][i],
        }
        for score in ("gold", "proxy"):
            if score in policy:
                row |= {
                    f"{score}_policy": float(policy[score][i]),
                    f"{score}_baseline": float(baseline[score][i]),
                }
        rows.append(row)
    write_jsonl(path, rows)
