"""Best-of-n: what a reward would buy without any training, by picking the best of n responses.

A pool of N responses to every held-out prompt gives, for n = 1, 2, 4 .. N, the unbiased estimate of
both rewards of the response that the proxy likes best (Nakano et al. 2021, appendix I), against
KL = log n - (n - 1) / n.

metrics.jsonl   one line per n, step = n: best_of_n/{proxy, gold, kl, kl_pool, prompts_cut, …};
                beside it tilt_{proxy, gold}, what the best policy at that KL would reach
scores.jsonl    one line per prompt: proxy, gold and length of every response, to recompute it all
samples.jsonl   one line per prompt: the best response of its pool, and a plain sample
responses.npz   with `save_responses`: the pools with their gold scores, for other proxies
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rlhfjax import hosts, paths
from rlhfjax.algos.best_of_n import (
    best_of_n_distribution,
    best_of_n_kl,
    best_of_n_reward,
)
from rlhfjax.data import loader
from rlhfjax.data.batches import PromptBatch, take
from rlhfjax.data.counted import data_metrics
from rlhfjax.data.sources import Source
from rlhfjax.errors import ConfigError
from rlhfjax.evals import stats
from rlhfjax.evals.tilt import tilt_at_kl
from rlhfjax.evals.words import substitutes
from rlhfjax.interop import store
from rlhfjax.jsonl import write_jsonl
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.models.config import TransformerConfig
from rlhfjax.paths import Path
from rlhfjax.progress import Progress
from rlhfjax.ranges import PositiveTemperature, Seed, Size
from rlhfjax.rewards.load import RewardSource, label, load_reward
from rlhfjax.rewards.responses import Reward, texts
from rlhfjax.rl import pools as saved_pools
from rlhfjax.rl.config import PromptConfig, sampling_workload, validate_sampling
from rlhfjax.rl.placement import job_placement
from rlhfjax.rl.pools import SavedPools
from rlhfjax.rl.prompts import open_prompts
from rlhfjax.rl.rollout import Rollout
from rlhfjax.roles import Role, scorers
from rlhfjax.sampling.config import Sampling, SamplingConfig
from rlhfjax.stages.evaluate import SAMPLES, sample_rows

SCORES = "scores.jsonl"
TILT_ROOM = 3.0  # nats below log N, up to which a pool tells the tilt
# "proxy", "gold", "length" and "answer" [p, N], "cut" [p], as scores.jsonl names them. "answer" is
# an id that equal responses share.
Pool = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SamplingConfig):
    """The options of best-of-n."""

    stage: str = "best_of_n"
    init_from: str
    """Workdir of the policy that responds."""
    proxy: RewardSource
    """Reward that picks the best response: a reward stage's workdir, or a scorer."""
    gold: RewardSource = ""
    """Scorer that measures the pick; empty: the proxy alone."""
    prompts: PromptConfig = PromptConfig()
    """Held-out prompts."""
    pool: Size = 64
    """N, responses per prompt (Gao et al. 2022: up to 60,000)."""
    save_responses: bool = False
    """Saves the pools for other proxies."""
    responses: str = ""
    """Workdir of a best_of_n stage that saved its pools: they are scored, with the gold scores that
    they have. Empty: responses are sampled."""
    temperature: PositiveTemperature = 1.0
    """Sampling temperature."""
    batch_size: Size = 64
    """Responses per batch."""
    seed: Seed = 0
    """Seed of prompts and responses."""
    mesh: MeshConfig = MeshConfig()
    """Mesh of devices."""


def roles(config: Config) -> dict[str, Role]:
    rewards = scorers(proxy=config.proxy, gold=config.gold)
    return {"policy": Role(config.init_from), **rewards}


workload = sampling_workload


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    where = "best_of_n"
    if config.responses and (config.gold or config.save_responses):
        raise ConfigError(
            f"{where}.responses={config.responses}: {where}.gold and save_responses must be"
            " left out; the pools have their gold scores"
        )
    if config.save_responses and not config.gold:
        raise ConfigError(
            f"{where}.save_responses=True: expected {where}.gold, whose scores are saved"
        )
    layout.validate_batch(config.batch_size, f"{where}.batch_size")
    validate_sampling(config, layout, model_config, _samples_per_prompt(config))


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Samples and scores the pools; returns the metrics of the largest n.

    Raises:
      DataError: a score is NaN or infinite; names the reward, the prompt and the response.
    """
    policy = store.load(config.init_from, layout)
    validate(config, layout, policy.model.config)
    rewards = {"proxy": load_reward(config.proxy, layout, policy.tokenizer)}
    if config.gold:
        rewards["gold"] = load_reward(config.gold, layout, policy.tokenizer)
    source = open_prompts(
        config.prompts, "best_of_n.prompts", policy.tokenizer, config.seed
    )
    with layout.use():
        prompts, responses, pool = _pools(
            config, source, policy, rewards, layout, workdir
        )
    for name in rewards:
        context = f"best_of_n.{name}={label(getattr(config, name))}"
        stats.validate_scores(pool[name], context)
    write_jsonl(workdir / SCORES, _score_rows(prompts, pool))
    best = np.argmax(pool["proxy"], axis=1)
    rows = sample_rows(
        prompts,
        policy=_picked(responses, pool, best),
        baseline=_picked(responses, pool, np.zeros_like(best)),
    )
    write_jsonl(workdir / SAMPLES, rows)
    of_pool = {
        "distinct_responses": distinct(pool),
        "prompts_cut": float(pool["cut"].mean()),
    }
    if "gold" in pool:
        found = substitutes(responses, pool["length"], pool["gold"])
        of_pool |= {f"gold_{name}": value for name, value in found.items()}
    metrics: dict[str, float] = {}
    with Writer(workdir) as writer:
        for n in sizes(config.pool):
            point = curve_point(pool, n) | of_pool
            metrics = {f"best_of_n/{name}": value for name, value in point.items()}
            metrics |= data_metrics(source, "best_of_n")
            writer.write(n, metrics)
    return metrics


def sizes(pool: int) -> list[int]:
    """Returns 1, 2, 4 .. and the pool's size."""
    powers = [2**i for i in range(pool.bit_length()) if 2**i < pool]
    return [*powers, pool]


def distinct(pool: Pool) -> float:
    """Returns the share of distinct responses among those to one prompt, mean over prompts."""
    return float(np.mean([len(set(row)) / len(row) for row in pool["answer"].tolist()]))


def curve_point(pool: Pool, n: int) -> dict[str, float]:
    """Returns what best-of-n by the proxy gives, mean over prompts.

    proxy, gold: unbiased estimates over all subsets of n responses.
    kl: log n - (n - 1) / n, which is exact if no two samples are alike, and an upper bound if a
      policy repeats itself.
    kl_pool: the exact KL of best-of-n out of the pool's own distribution of distinct responses,
      which sees repetitions. With n near N it is too low, since it cannot exceed log N.
    """
    proxy = jnp.asarray(pool["proxy"], jnp.float32)
    estimate = jax.jit(jax.vmap(lambda p, g: best_of_n_reward(p, g, n=n)))
    point = {}
    for name in ("proxy", "gold"):
        if name in pool:
            rewards = estimate(proxy, jnp.asarray(pool[name], jnp.float32))
            point[name] = float(np.mean(np.asarray(rewards, np.float64)))
    rows = zip(pool["answer"], pool["proxy"], strict=True)
    kls = [pool_kl(*row, n=n) for row in rows]
    point |= {"kl": best_of_n_kl(n), "kl_pool": float(np.mean(kls))}
    return point | tilt_point(pool, point["kl"])


def tilt_point(pool: Pool, kl: float) -> dict[str, float]:
    """Returns what the tilt by the proxy reaches at a KL, mean over prompts.

    tilt_proxy, tilt_gold: no policy has a higher proxy reward at this KL (`tilt_at_kl`). They are
      left out where the pool does not tell them: above log N - TILT_ROOM.
    """
    size = pool["proxy"].shape[1]
    reachable = kl <= math.log(size) - TILT_ROOM
    weights = tilt_at_kl(pool["proxy"], kl) if reachable else None
    if weights is None:
        return {}
    return {
        f"tilt_{name}": float(np.mean(np.sum(weights * pool[name], axis=1)))
        for name in ("proxy", "gold")
        if name in pool
    }


def pool_kl(
    responses: Int[np.ndarray, " N"], rewards: Float[np.ndarray, " N"], *, n: int
) -> float:
    """Returns KL(best-of-n || p) in nats; p are the frequencies of the pool's distinct responses.

    Args:
      responses: ids, equal for equal responses.
      rewards: pick the best; ties between distinct responses are broken at random.
    """
    _, first, counts = np.unique(responses, return_index=True, return_counts=True)
    p = jnp.asarray(counts / counts.sum(), jnp.float32)
    q = best_of_n_distribution(p, jnp.asarray(rewards[first], jnp.float32), n=n)
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    chosen = q > 0
    p, q = p[chosen], q[chosen]
    return float(np.sum(q * np.log(q / p)))


# ------------------------------------------------------------------ pools


def _pools(
    config: Config,
    source: Source,
    policy: store.SavedModel,
    rewards: dict[str, Reward],
    layout: Layout,
    workdir: Path,
) -> tuple[list[str], list[list[str]], Pool]:
    """Returns the texts of prompts [p] and of their responses [p][N], and the pools."""
    encoded = next(
        loader.prompt_batches(
            source,
            policy.tokenizer,
            train=False,
            batch_size=len(source),
            length=config.prompt_length,
        )
    )
    total = len(source) * config.pool
    saved = _saved(config, encoded, total)
    kept: list[Rollout] = []
    prompts: list[str] = []
    responses: list[str] = []
    ids: list[bytes] = []
    scores: dict[str, list[float]] = {name: [] for name in (*rewards, "length")}
    batches = (
        _sampled(config, policy, encoded, total, layout)
        if saved is None
        else _read(config, saved, layout)
    )
    with Progress(total, "responses", title="best_of_n") as progress:
        for rollout, count in batches:
            rows = (rollout.tokens, rollout.attention_mask, rollout.mask)
            for name, reward in rewards.items():
                scores[name] += hosts.whole(reward(*rows))[:count].tolist()
            rollout = hosts.whole(rollout)
            if config.save_responses:
                kept.append(rollout)
            batch_prompts, batch_responses = texts(
                policy.tokenizer, rollout.tokens, rollout.attention_mask, rollout.mask
            )
            prompts += batch_prompts[:count]
            responses += batch_responses[:count]
            scores["length"] += rollout.mask.sum(1)[:count].tolist()
            for row, keep in zip(rollout.responses, rollout.mask, strict=True):
                ids.append(row[keep > 0].tobytes())
            del ids[len(responses) :]
            progress.update(len(responses), count=count)
    if config.save_responses:
        saved_pools.write(workdir, saved_pools.collected(kept, scores["gold"]))
    if saved is not None:
        scores["gold"] = saved.gold.tolist()
    shape = (len(source), config.pool)
    pool: Pool = {
        name: np.array(scores[name], np.float64).reshape(shape)
        for name in ("proxy", "gold", "length")
        if name in scores
    }
    pool["length"] = pool["length"].astype(np.int64)
    _, distinct = np.unique(np.array(ids, object), return_inverse=True)
    pool["answer"] = distinct.astype(np.int64).reshape(shape)
    pool["cut"] = encoded.cut
    first_rows = range(0, total, config.pool)
    grouped = [responses[i : i + config.pool] for i in first_rows]
    return prompts[:: config.pool], grouped, pool


def _saved(config: Config, prompts: PromptBatch, total: int) -> SavedPools | None:
    """Returns the pools that the config names; None if it names none.

    Raises:
      ConfigError: they are of other prompts, or of other sizes.
    """
    if not config.responses:
        return None
    saved = saved_pools.read(paths.path(config.responses))
    where = f"best_of_n.responses={config.responses}"
    if len(saved.tokens) != total:
        raise ConfigError(
            f"{where}: it has {len(saved.tokens):,} responses; expected {total:,},"
            f" best_of_n.pool={config.pool} per prompt"
        )
    shape = (config.prompt_length, config.max_new_tokens)
    length = saved.mask.shape[1]
    there = (saved.tokens.shape[1] - length, length)
    if there != shape:
        raise ConfigError(
            f"{where}: its prompt_length and max_new_tokens are {there}; expected {shape}"
        )
    first = saved.tokens[:: config.pool, : config.prompt_length]
    if not np.array_equal(first, prompts.tokens):
        raise ConfigError(f"{where}: its prompts are others than best_of_n.prompts")
    return saved


def _read(
    config: Config, saved: SavedPools, layout: Layout
) -> Iterator[tuple[Rollout, int]]:
    """Yields what `_sampled` yields, from saved pools."""
    total = len(saved.tokens)
    for first in range(0, total, config.batch_size):
        rollout = layout.put(saved.rollout(first, config.batch_size))
        yield rollout, min(config.batch_size, total - first)


def _sampled(
    config: Config,
    policy: store.SavedModel,
    prompts: PromptBatch,
    total: int,
    layout: Layout,
) -> Iterator[tuple[Rollout, int]]:
    """Yields batches of responses, and how many of their rows count; row i N + j is of prompt i."""
    k = _samples_per_prompt(config)
    sampling = Sampling.from_config(config, policy.tokenizer, k)
    placement = job_placement(
        layout, policy.model, config.batch_size, config.prompt_length, sampling
    )
    weights = placement.place(policy.params)
    for i, first in enumerate(range(0, total, config.batch_size)):
        rows = np.arange(first, first + config.batch_size)
        # Rows past the last one only fill the batch.
        of_prompt = np.minimum(rows, total - 1) // config.pool
        batch = layout.put(take(prompts, of_prompt))
        key = jax.random.fold_in(jax.random.key(config.seed), i)
        rollout = placement.sample(
            weights, batch.tokens, batch.attention_mask, key, sampling
        )
        yield rollout, min(config.batch_size, total - first)


def _samples_per_prompt(config: Config) -> int:
    """Returns how many consecutive rows of a batch are sure to share a prompt.

    Pools and batches both begin and end between groups of that many rows.
    """
    return math.gcd(config.pool, config.batch_size)


def _score_rows(prompts: list[str], pool: Pool) -> list[dict[str, Any]]:
    """Returns the lines of scores.jsonl."""
    return [
        {"prompt": prompt} | {name: x[i].tolist() for name, x in pool.items()}
        for i, prompt in enumerate(prompts)
    ]


def _picked(
    responses: list[list[str]], pool: Pool, index: Int[np.ndarray, " p"]
) -> dict[str, Any]:
    """Returns one response per prompt with its scores, as `sample_rows` takes them."""
    prompts = np.arange(len(index))
    scores: dict[str, Any] = {
        name: pool[name][prompts, index] for name in ("gold", "proxy") if name in pool
    }
    scores["response"] = [row[i] for row, i in zip(responses, index, strict=True)]
    return scores
