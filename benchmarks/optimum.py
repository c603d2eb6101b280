"""Compares the policies that algorithms find with the optimal one, which is known exactly.

    python -m benchmarks.optimum                the table of docs/optimum.md
    python -m benchmarks.optimum --controller   the adaptive KL coefficient against its target

There are two prompts. Responses have at most two tokens of six, and each has a fixed random reward.
The policy that maximizes E[r] - beta KL(pi || rho) is then known exactly for each prompt:

    pi*(y) = rho(y) exp(r(y) / beta) / Z
    E[r] - beta KL(pi || rho) = beta log Z - beta KL(pi || pi*)    for all pi

The policy is a Transformer. The stages' own programs train it on its own samples at temperature
0.8. The result is measured by summing over all responses, so that no number in the table is an
estimate from samples.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import state as states
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.optim import OptimConfig
from rlhfjax.rl.config import KLConfig
from rlhfjax.rl.rollout import (
    Rollout,
    TokenIds,
    response_logprobs,
    sample,
    truncate_responses,
)
from rlhfjax.sampling import Sampling
from rlhfjax.stages import group, ppo, reinforce_pp

PAD, EOS, VOCAB, LENGTH = 0, 2, 6, 2
PROMPTS = np.array([[1, 3], [1, 4]], np.int32)
TEMPERATURE, BETA, EPISODES = 0.8, 0.4, 256
SHAPE = TransformerConfig(
    vocab_size=VOCAB,
    d_model=32,
    n_layers=1,
    n_heads=2,
    d_ff=64,
    max_length=4,
    init_std=0.2,
    tie_embeddings=False,
)
PRINTED = "GRPO as printed (k3 in the loss)"
REWARDS = (
    np.random.default_rng(0)
    .normal(size=(len(PROMPTS), VOCAB, VOCAB))
    .astype(np.float32)
)


def responses() -> tuple[np.ndarray, np.ndarray]:
    """Returns all responses, [n, 2], and their masks.

    A response is the eos alone, or two tokens of which the first is not the eos.
    """
    pairs = [(a, b) for a, b in itertools.product(range(VOCAB), repeat=2) if a != EOS]
    tokens = np.array([(EOS, PAD), *pairs], np.int32)
    mask = np.ones(tokens.shape, np.float32)
    mask[0, 1] = 0
    return tokens, mask


def reward(tokens: jax.Array, segments: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the reward of a response in the table. An ended response has PAD as second token."""
    prompt = jnp.where(tokens[:, 1] == PROMPTS[0, 1], 0, 1)
    return jnp.asarray(REWARDS)[
        prompt, tokens[:, 2], jnp.where(mask[:, 1] > 0, tokens[:, 3], PAD)
    ]


@jax.jit
def every_logprob(params: Any) -> tuple[jax.Array, jax.Array]:
    """Returns log pi(y | x) of every response to every prompt, [prompts, n], and their rewards."""
    tokens, mask = responses()
    n = len(tokens)
    whole = jnp.concatenate(
        [jnp.repeat(jnp.asarray(PROMPTS), n, 0), jnp.tile(tokens, (len(PROMPTS), 1))],
        axis=1,
    )
    counted = jnp.tile(mask, (len(PROMPTS), 1))
    segments = jnp.concatenate([jnp.ones_like(counted), counted], axis=1).astype(
        jnp.int32
    )
    logprobs, _ = response_logprobs(
        Model(SHAPE), params, whole, segments, LENGTH, TEMPERATURE
    )
    return (logprobs * counted).sum(1).reshape(-1, n), reward(
        whole, segments, counted
    ).reshape(-1, n)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Exact expectations, averaged over the prompts."""

    reward: float
    kl: float  # to the reference, nats a sequence
    objective: float  # reward - beta kl
    divergence: float  # KL(pi || pi*), nats


def measure(
    logprobs: np.ndarray, reference: np.ndarray, rewards: np.ndarray, beta: float = BETA
) -> Measured:
    """Measures a policy, given log pi(y|x) [prompts, n] of every response."""
    p = np.exp(np.float64(logprobs))
    np.testing.assert_allclose(
        p.sum(1), 1, atol=1e-5
    )  # they are all the responses there are
    earned, spent = (p * rewards).sum(1), (p * (logprobs - reference)).sum(1)
    divergence = (p * (logprobs - optimum(reference, rewards, beta))).sum(1)
    return Measured(
        earned.mean(), spent.mean(), (earned - beta * spent).mean(), divergence.mean()
    )


def optimum(
    reference: np.ndarray, rewards: np.ndarray, beta: float = BETA
) -> np.ndarray:
    """Returns log pi*(y|x) = log rho(y|x) + r / beta - log Z."""
    tilted = np.float64(reference) + np.float64(rewards) / beta
    return tilted - np.log(np.exp(tilted).sum(1, keepdims=True))


# ------------------------------------------------------------------ training


def settings(steps: int, **changes: Any) -> dict[str, Any]:
    optim = OptimConfig(
        name="adam", learning_rate=2e-3, schedule="linear", clip_norm=0.0, b2=0.99
    )
    common = {
        "init_from": "",
        "reward": "",
        "prompt_length": 2,
        "max_new_tokens": LENGTH,
        "temperature": TEMPERATURE,
    }
    return {**common, "steps": steps, "optim": optim, "kl": KLConfig(BETA), **changes}


def ppo_config(steps: int, **changes: Any) -> ppo.Config:
    own = {
        "batch_size": EPISODES,
        "epochs": 2,
        "minibatches": 2,
        "value": "policy",
        "value_coefficient": 1.0,
    }
    value = OptimConfig(
        name="adam", learning_rate=1e-2, schedule="constant", clip_norm=0.0, b2=0.99
    )
    return ppo.Config(
        **settings(steps, **{**own, "value_optim": value, "value_clip": 0.0, **changes})
    )


def group_config(steps: int, **changes: Any) -> group.Config:
    own = {"batch_size": EPISODES // 8, "samples_per_prompt": 8, "minibatches": 2}
    return group.Config(**settings(steps, **{**own, **changes}))


def reinforce_pp_config(steps: int, **changes: Any) -> reinforce_pp.Config:
    return reinforce_pp.Config(
        **settings(steps, **{"batch_size": EPISODES, "minibatches": 2, **changes})
    )


@functools.cache
def fresh(model: Model, seed: int) -> Any:
    """Returns a model's parameters: the same arrays at every call, which must not be donated."""
    return model.init(jax.random.key(seed))


class Algorithm(NamedTuple):
    """A policy stage without its data and its rewards."""

    config: Any  # of a policy stage
    model: Model
    ids: TokenIds
    programs: Any  # its Programs


def start(
    config: Any, shape: TransformerConfig = SHAPE
) -> tuple[Algorithm, states.TrainState, Any]:
    """Returns (algorithm, state, reference); the reference is the same for every config."""
    model, critic, ids = Model(shape), Model(shape, "scalar"), TokenIds(EOS, PAD)
    params = {"policy": jax.tree.map(jnp.array, fresh(model, 100))}
    extra = {"kl_coefficient": jnp.float32(config.kl.coefficient)}
    if isinstance(config, ppo.Config):
        programs: Any = ppo.programs(config, model, critic, ids)
        value = jax.tree.map(jnp.array, fresh(critic, 101))
        head = {"head": jax.tree.map(jnp.zeros_like, value["head"])}
        params["value"] = head if config.value == "shared" else value | head
    elif isinstance(config, group.Config):
        programs = group.programs(config, model, ids)
        extra |= {"baseline": jnp.zeros(())} if config.estimator == "reinforce" else {}
    else:
        programs = reinforce_pp.programs(config, model, ids)
    reference = fresh(model, 100)
    algorithm = Algorithm(config, model, ids, programs)
    return algorithm, states.TrainState.create(params, programs.tx, **extra), reference


def rollout_of(
    algorithm: Algorithm, params: Any, prompts: jax.Array, key: jax.Array
) -> Rollout:
    """Samples a response to every row."""
    sampling = Sampling.from_config(algorithm.config, algorithm.ids)
    attention_mask = jnp.ones_like(prompts)
    return sample(
        algorithm.model, params, prompts, attention_mask, key, sampling=sampling
    )


def experience(
    algorithm: Algorithm, state: states.TrainState, reference: Any, key: jax.Array
) -> tuple[Rollout, Any, Any]:
    """Returns (rollout, experience, metrics) of an iteration; consecutive rows share a prompt."""
    each = algorithm.config.episodes // len(PROMPTS)
    prompts = jnp.repeat(jnp.asarray(PROMPTS), each, axis=0)
    rollout = rollout_of(algorithm, state.params["policy"], prompts, key)
    return rollout, *experience_of(algorithm, state, reference, rollout)


def experience_of(
    algorithm: Algorithm, state: states.TrainState, reference: Any, rollout: Rollout
) -> tuple[Any, Any]:
    """Returns (experience, metrics) of a rollout, scored by the table."""
    scored = truncate_responses(algorithm.config, algorithm.ids, rollout)
    scores = reward(scored.tokens, scored.attention_mask, scored.mask)
    outputs = algorithm.programs.forward(state.params, reference, rollout)
    return algorithm.programs.make_experience(state, outputs, rollout, scores)


def train(config: Any, seed: int = 0) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yields the policy's parameters and metrics: first those of the start, without metrics, then
    those after each iteration."""
    algorithm, state, reference = start(config)
    yield reference, {}
    for step in range(config.steps):
        key = jax.random.fold_in(jax.random.key(seed), step)
        _, episodes, pairs = experience(algorithm, state, reference, key)
        state, _ = algorithm.programs.update(
            state, episodes, None, pairs, jax.random.fold_in(key, 1)
        )
        yield state.params["policy"], pairs


def last(config: Any, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (log pi, log rho, rewards) of every response after training."""
    steps = train(config, seed)
    reference, rewards = jax.device_get(every_logprob(next(steps)[0]))
    *_, (params, _) = steps
    return jax.device_get(every_logprob(params))[0], reference, rewards


def in_loss(estimator: str) -> KLConfig:
    return KLConfig(BETA, place="loss", estimator=estimator)


def algorithms(steps: int) -> dict[str, Any]:
    """Gives every algorithm as many updates as PPO, which makes four per iteration."""
    groups = functools.partial(group_config, 2 * steps)
    return {
        "PPO": ppo_config(steps),
        "PPO, shared trunk": ppo_config(steps, value="shared"),
        "PPO, KL in the loss": ppo_config(
            steps, kl=in_loss("sequence"), whiten_advantages="none"
        ),
        "RLOO": groups(estimator="rloo"),
        "RLOO, KL in the loss": group_config(
            4 * steps, estimator="rloo", kl=in_loss("sequence"), minibatches=1
        ),
        "REINFORCE, moving baseline": groups(estimator="reinforce"),
        "REINFORCE++": reinforce_pp_config(2 * steps),
        "GRPO, KL in the reward": groups(estimator="grpo"),
        "Dr. GRPO": groups(estimator="dr_grpo"),
        "DAPO": groups(estimator="dapo"),
        "PPO, k3 in the reward": ppo_config(steps, kl=KLConfig(BETA, estimator="k3")),
        PRINTED: groups(estimator="grpo", kl=in_loss("grpo")),
    }


def controller(target: float, steps: int, seed: int = 0) -> tuple[float, float]:
    """Returns the mean KL (nats) and coefficient over the last quarter of an adaptive PPO run."""
    config = ppo_config(steps, kl=KLConfig(0.05, target=target, horizon=10 * EPISODES))
    metrics = [pairs for _, pairs in train(config, seed)][-steps // 4 :]
    both = jax.device_get(
        [(m["kl"][0] / m["kl"][1], m["kl_coefficient"][0]) for m in metrics]
    )
    return tuple(float(x) for x in np.mean(np.array(both), axis=0))


# ------------------------------------------------------------------ tables


def optimum_table(steps: int) -> None:
    print(
        "| algorithm | reward | KL to the reference | reward - beta KL | KL to the optimum | s |"
    )
    print("|---|---|---|---|---|---|")
    shown = False
    for name, config in algorithms(steps).items():
        began = time.monotonic()
        logprobs, reference, rewards = last(config)
        if not shown:
            row("(start)", measure(reference, reference, rewards))
            row(
                "**analytic optimum**",
                measure(optimum(reference, rewards), reference, rewards),
            )
            shown = True
        row(
            name,
            measure(logprobs, reference, rewards),
            f"{time.monotonic() - began:.0f}",
        )


def row(name: str, m: Measured, seconds: str = "") -> None:
    print(
        f"| {name} | {m.reward:.4f} | {m.kl:.4f} | {m.objective:.4f} | {m.divergence:.5f} | "
        f"{seconds} |",
        flush=True,
    )


def controller_table(steps: int) -> None:
    print("| target (nats) | KL reached | coefficient |")
    print("|---|---|---|")
    for target in (0.5, 1.0, 1.5):
        reached, coefficient = controller(target, steps)
        print(f"| {target} | {reached:.4f} | {coefficient:.4f} |", flush=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--controller", action="store_true")
    options = parser.parse_args(argv)
    controller_table(options.steps) if options.controller else optimum_table(
        options.steps
    )


if __name__ == "__main__":
    main(sys.argv[1:])
