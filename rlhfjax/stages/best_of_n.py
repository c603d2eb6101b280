"""Best-of-n: what a reward would buy without any training, by picking the best of n samples.

A pool of N answers to every held-out prompt gives, for n = 1, 2, 4 .. N, the unbiased estimate of both rewards of the
answer that the proxy likes best (Nakano et al. 2021, appendix I), against KL = log n - (n - 1) / n.

metrics.jsonl   a line an n, step = n: best_of_n/{proxy, gold, kl, kl_pool, prompts_cut}
scores.jsonl    a line a prompt: every answer's proxy, gold and length, so that all of it can be computed again
samples.jsonl   a line a prompt: the best of its pool, and a plain sample
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rlhfjax import hosts
from rlhfjax.algos.best_of_n import (
    best_of_n_distribution,
    best_of_n_kl,
    best_of_n_reward,
)
from rlhfjax.data import loader
from rlhfjax.data.batches import PromptBatch, take
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.evals import stats
from rlhfjax.interop import store
from rlhfjax.jsonl import write_jsonl
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Progress, Writer
from rlhfjax.models.config import TransformerConfig
from rlhfjax.paths import Path
from rlhfjax.ranges import PositiveTemperature, Seed, Size, SizeOrNone, Tokens
from rlhfjax.rewards.load import RewardSource, label, load_reward
from rlhfjax.rewards.responses import Reward, texts
from rlhfjax.rl.config import validate_decode_batch
from rlhfjax.rl.prompts import PromptConfig, open_prompts
from rlhfjax.rl.rollout import Rollout, sample
from rlhfjax.roles import Role, Workload, job_workload, scorers
from rlhfjax.supervised import validate_length

SCORES, SAMPLES = "scores.jsonl", "samples.jsonl"
# {"proxy" [p, N], "gold" [p, N], "length" [p, N], "answer" [p, N] ids of equal answers, "cut" [p]}
Pool = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    stage: str = "best_of_n"
    init_from: str  # the policy that answers
    proxy: RewardSource  # what picks: a reward stage's workdir, or a scorer
    gold: RewardSource = ""  # what judges the pick; empty: the proxy alone
    prompts: PromptConfig = PromptConfig()
    pool: Size = 64  # N, answers to a prompt; Gao et al. 2022: 60,000 at the most
    prompt_length: Tokens
    max_new_tokens: Tokens
    temperature: PositiveTemperature = 1.0
    batch_size: Size = 64  # answers at a time
    decode_batch: SizeOrNone = 0  # of them decoded together, the next prompt as soon as one ends; 0: all, to the longest
    seed: Seed = 0
    mesh: MeshConfig = MeshConfig()


def roles(config: Config) -> dict[str, Role]:
    return {
        "policy": Role(config.init_from),
        **scorers(proxy=config.proxy, gold=config.gold),
    }


def workload(config: Config, completions: int = 1) -> Workload:
    return job_workload(config.batch_size, config.prompt_length + config.max_new_tokens)


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    layout.check_batch(config.batch_size, "best_of_n.batch_size")
    validate_decode_batch(
        config.decode_batch, _same_prompt(config), layout, "best_of_n"
    )
    validate_length(
        config.prompt_length + config.max_new_tokens,
        model_config,
        "best_of_n.prompt_length + max_new_tokens",
    )


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Samples and scores the pools; returns the metrics of the largest n.

    Raises:
      DataError: a score is NaN or infinite; names the reward, the prompt and the response.
    """
    policy = store.load(config.init_from, layout)
    validate(config, layout, policy.model.config)
    tokenizer = policy.tokenizer
    rewards = {"proxy": load_reward(config.proxy, layout, tokenizer)}
    if config.gold:
        rewards["gold"] = load_reward(config.gold, layout, tokenizer)
    with layout.use():
        prompts, answers, pool = _pools(config, policy, tokenizer, rewards, layout)
    for name in rewards:
        context = f"best_of_n.{name}={label(getattr(config, name))}"
        stats.validate_scores(pool[name], context)
    write_jsonl(workdir / SCORES, _score_rows(prompts, pool))
    write_jsonl(workdir / SAMPLES, _sample_rows(prompts, answers, pool))
    metrics: dict[str, float] = {}
    with Writer(workdir) as writer:
        for n in sizes(config.pool):
            point = {**curve_point(pool, n), "prompts_cut": float(pool["cut"].mean())}
            metrics = {f"best_of_n/{name}": value for name, value in point.items()}
            writer.write(n, metrics)
    return metrics


def sizes(pool: int) -> list[int]:
    """1, 2, 4 .. and the pool itself."""
    powers = [2**i for i in range(pool.bit_length()) if 2**i < pool]
    return [*powers, pool]


def curve_point(pool: Pool, n: int) -> dict[str, float]:
    """What best-of-n by proxy gives, mean over prompts.

    proxy, gold: unbiased estimates over all subsets of n answers. kl: log n - (n - 1) / n, which is exact where no two
    samples are alike and an upper bound where a policy repeats itself. kl_pool: the exact KL of best-of-n out of the
    pool's own distribution of distinct answers, which sees repetitions; with n near N it is too low, since the pool is
    all it knows (it cannot exceed log N).
    """
    proxy = jnp.asarray(pool["proxy"], jnp.float32)
    estimate = jax.jit(jax.vmap(lambda p, g: best_of_n_reward(p, g, n=n)))
    rewards = {
        name: estimate(proxy, jnp.asarray(pool[name], jnp.float32))
        for name in ("proxy", "gold")
        if name in pool
    }
    kls = [
        pool_kl(*row, n=n) for row in zip(pool["answer"], pool["proxy"], strict=True)
    ]
    values = {
        name: float(np.mean(np.asarray(x, np.float64))) for name, x in rewards.items()
    }
    return values | {"kl": best_of_n_kl(n), "kl_pool": float(np.mean(kls))}


def pool_kl(
    answers: Int[np.ndarray, " N"], rewards: Float[np.ndarray, " N"], *, n: int
) -> float:
    """KL(best-of-n || p) in nats, p being how often each distinct answer stands in the pool.

    Args:
      answers: equal ids are equal answers.
      rewards: by which the best is picked; ties between distinct answers are broken at random.
    """
    _, first, counts = np.unique(answers, return_index=True, return_counts=True)
    p = jnp.asarray(counts / counts.sum(), jnp.float32)
    q = np.asarray(
        best_of_n_distribution(p, jnp.asarray(rewards[first], jnp.float32), n=n),
        np.float64,
    )
    chosen = q > 0
    return float(
        np.sum(q[chosen] * np.log(q[chosen] / np.asarray(p, np.float64)[chosen]))
    )


def _pools(
    config: Config,
    policy: store.SavedModel,
    tokenizer: Tokenizer,
    rewards: dict[str, Reward],
    layout: Layout,
) -> tuple[list[str], list[list[str]], Pool]:
    """Texts of prompts and of their answers [p][N], and the pools; answer j of prompt i is row i N + j."""
    source = open_prompts(config.prompts, "best_of_n.prompts", seed=config.seed)
    options = {"batch_size": len(source), "length": config.prompt_length}
    encoded = next(loader.prompt_batches(source, tokenizer, train=False, **options))
    total = len(source) * config.pool
    prompts: list[str] = []
    answers: list[str] = []
    parts: dict[str, list] = {name: [] for name in (*rewards, "length", "answer")}
    with Progress(total, "answers", title="best_of_n") as progress:
        for i, first in enumerate(range(0, total, config.batch_size)):
            count = min(config.batch_size, total - first)
            rows = (
                np.minimum(np.arange(first, first + config.batch_size), total - 1)
                // config.pool
            )
            rollout = _sample(
                config,
                policy,
                tokenizer,
                take(encoded, rows),
                i,
                layout,
            )
            for name, reward in rewards.items():
                parts[name] += hosts.whole(
                    reward(rollout.tokens, rollout.segments, rollout.mask)
                )[:count].tolist()
            host = hosts.whole(rollout)
            asked, said = texts(tokenizer, host.tokens, host.segments, host.mask)
            prompts += [
                text
                for text, row in zip(asked, range(first, first + count), strict=False)
                if not row % config.pool
            ]
            answers += said[:count]
            parts["length"] += host.mask.sum(1)[:count].tolist()
            parts["answer"] += [
                ids[keep > 0].tobytes()
                for ids, keep in zip(host.responses, host.mask, strict=True)
            ][:count]
            progress.update(first + count, count=count)
    _, parts["answer"] = np.unique(
        np.array(parts["answer"], object), return_inverse=True
    )
    shape = (len(source), config.pool)
    kinds = {"length": np.int64, "answer": np.int64}
    pool = {
        name: np.array(x, kinds.get(name, np.float64)).reshape(shape)
        for name, x in parts.items()
    }
    pool["cut"] = encoded.cut
    return (
        prompts,
        [answers[i * config.pool : (i + 1) * config.pool] for i in range(len(source))],
        pool,
    )


def _sample(
    config: Config,
    policy: store.SavedModel,
    tokenizer: Any,
    prompts: PromptBatch,
    number: int,
    layout: Layout,
) -> Rollout:
    placed = layout.put(prompts)
    key = jax.random.fold_in(jax.random.key(config.seed), number)
    return sample(
        policy.model,
        policy.params,
        placed.tokens,
        placed.attention_mask,
        key,
        max_new_tokens=config.max_new_tokens,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        temperature=config.temperature,
        samples_per_prompt=_same_prompt(config),
        decode_batch=config.decode_batch,
    )


def _same_prompt(config: Config) -> int:
    """Rows of a batch that are sure to have one prompt: pools and batches both begin and end between such groups."""
    return math.gcd(config.pool, config.batch_size)


def _score_rows(prompts: list[str], pool: Pool) -> list[dict[str, Any]]:
    return [
        {"prompt": text} | {name: x[i].tolist() for name, x in pool.items()}
        for i, text in enumerate(prompts)
    ]


def _sample_rows(
    prompts: list[str], answers: list[list[str]], pool: Pool
) -> list[dict[str, Any]]:
    """As the evaluation writes them: the policy is best-of-N, the baseline the first answer of the pool."""
    rows = []
    for i, prompt in enumerate(prompts):
        best = int(np.argmax(pool["proxy"][i]))
        row: dict[str, Any] = {
            "prompt": prompt,
            "policy": answers[i][best],
            "baseline": answers[i][0],
        }
        for name in ("gold", "proxy"):
            if name in pool:
                row |= {
                    f"{name}_policy": pool[name][i, best],
                    f"{name}_baseline": pool[name][i, 0],
                }
        rows.append(row)
    return rows
