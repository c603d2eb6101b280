"""RLHF with PPO in one file, in plain functions that are read from top to bottom.

    python examples/ppo_minimal.py --run=runs/quickstart

improves the policy of a finished quickstart (`size=smoke` will do) against its reward model. It
computes the same as the `ppo` stage: tests/examples/test_ppo_minimal.py compares the two.

One Transformer has four sets of parameters. The policy pi and the value function V are trained;
they start as copies of the reference and of the reward model r, which are frozen. One iteration:

  sample    y ~ pi(. | x), one response y to each prompt x, with its score r(x, y)
  forward   log pi_old(y_t), log pi_ref(y_t) and V_old(t) of every response token
  rewards   r_t = [t is the last token] r(x, y) - beta log(pi_old(y_t) / pi_ref(y_t))   [Z2] [O2]
  GAE       A_t = delta_t + gamma lambda A_t+1,  R_t = A_t + V_old(t)                   [S11]
            with delta_t = r_t + gamma V_old(t+1) - V_old(t)                            [S12]
  epochs    minimize over minibatches, with rho_t = pi(y_t) / pi_old(y_t), the mean over tokens of
              - min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)                       [S7]
              + c 1/2 max((V - R_t)^2, (clip(V, V_old - eps_v, V_old + eps_v) - R_t)^2) [S9]
  adapt     beta rises if KL(pi || pi_ref) is above its target, falls if it is below    [Z 2.2]

[S] Schulman et al. 2017 (PPO), [Z] Ziegler et al. 2019, whose code clips V, [O] Ouyang et al. 2022
(InstructGPT), with the number of an equation or a section. Log-probabilities are in nats.

Notation. An array's name ends with its axes: b episodes (a prompt and its response), t all tokens,
p prompt tokens, left-padded, r response tokens, right-padded, d hidden units. `mask_br` is 1.0 on
response tokens, `attention_mask_bt` is 1 on all tokens but padding.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax.algos.advantages import gae
from rlhfjax.algos.combine import add_losses
from rlhfjax.algos.kl import adaptive_kl, k1, sequence_kl
from rlhfjax.algos.masked import whiten
from rlhfjax.algos.policy import ppo_loss
from rlhfjax.algos.shaping import token_rewards
from rlhfjax.algos.value import clipped_value_loss
from rlhfjax.data.loader import prompt_batches
from rlhfjax.data.prompts import Prompts
from rlhfjax.data.sources import open_source
from rlhfjax.interop import store
from rlhfjax.mesh import make_layout
from rlhfjax.sampling import Sampling, generate

SHOWN = ("score", "kl", "kl_coefficient", "policy_loss", "value_loss", "clip_fraction")
jit = partial(jax.jit, static_argnames=("model", "config"))


class Config(NamedTuple):
    """Mostly the quickstart's values."""

    eos_id: int
    pad_id: int
    iterations: int = 40
    batch_size: int = 64  # episodes per iteration
    prompt_length: int = 64
    response_length: int = 32
    temperature: float = 1.0
    kl_coefficient: float = 0.15  # beta at the start, reward units per nat
    kl_target: float = 6.0  # nats per response
    kl_horizon: float = 640.0  # episodes in which beta changes by at most about 20 %
    gamma: float = 1.0
    lam: float = 0.95
    epochs: int = 2
    minibatches: int = 4  # per epoch, with one update each
    clip: float = 0.2  # eps
    value_clip: float = 0.2  # eps_v
    value_coefficient: float = 0.1  # c
    learning_rate: float = 3e-4
    seed: int = 0


class Experience(NamedTuple):
    """Episodes, and what is constant while the policy is updated on them."""

    tokens_bt: jax.Array
    attention_mask_bt: jax.Array
    mask_br: jax.Array
    logprobs_br: jax.Array
    values_br: jax.Array
    advantages_br: jax.Array
    returns_br: jax.Array


@jit
def sample(model, config, params, prompts_bp, attention_mask_bp, key):
    """Returns tokens_bt, attention_mask_bt and mask_br of one response to each prompt."""
    keys_b = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(config.batch_size))
    sampling = Sampling(
        max_new_tokens=config.response_length,
        eos_id=config.eos_id,
        pad_id=config.pad_id,
        temperature=config.temperature,
    )
    samples = generate(model, params, prompts_bp, attention_mask_bp, keys_b, sampling)
    mask_br = samples.mask
    tokens_bt = jnp.hstack([prompts_bp, samples.tokens])
    attention_mask_bt = jnp.hstack([attention_mask_bp, mask_br.astype(int)])
    return tokens_bt, attention_mask_bt, mask_br


def response_hidden(model, config, params, tokens_bt, attention_mask_bt):
    """Returns hidden_brd, the hidden states at the position before each response token."""
    hidden_btd = model.hidden(params, tokens_bt, segment_ids=attention_mask_bt)
    return hidden_btd[:, config.prompt_length - 1 : -1]


def response_logprobs(model, config, params, tokens_bt, attention_mask_bt):
    """Returns logprobs_br: log pi(y_t | x, y_1 .. y_t-1), at the sampling temperature."""
    hidden_brd = response_hidden(model, config, params, tokens_bt, attention_mask_bt)
    responses_br = tokens_bt[:, config.prompt_length :]
    logprobs_br, _ = model.logprobs(params, hidden_brd, responses_br, config.temperature)
    return logprobs_br


def response_values(model, config, params, tokens_bt, attention_mask_bt):
    """Returns values_br: V of the state in which each response token is chosen."""
    hidden_brd = response_hidden(model, config, params, tokens_bt, attention_mask_bt)
    return model.scalar(params, hidden_brd)


@jit
def make_experience(model, config, params, reference, reward, rollout, beta):
    """Returns the Experience of a rollout, and metrics."""
    *inputs, mask_br = rollout
    # Score: the reward model reads its scalar at the last token.
    last_hidden_bd = model.last_hidden(reward, *inputs)
    scores_b = model.scalar(reward, last_hidden_bd)

    # Forward passes: policy, reference, value function.
    logprobs_br = response_logprobs(model, config, params["policy"], *inputs)
    ref_logprobs_br = response_logprobs(model, config, reference, *inputs)
    values_br = response_values(model, config, params["value"], *inputs)

    # Rewards with a KL penalty per token, then advantages.
    kl_br = k1(logprobs_br, ref_logprobs_br)
    rewards_br = token_rewards(scores_b, kl_br, mask_br, beta=beta)
    advantages_br, returns_br = gae(
        rewards_br, values_br, mask_br, gamma=config.gamma, lam=config.lam
    )
    metrics = {
        "score": scores_b.mean(),
        "kl": sequence_kl(kl_br, mask_br).mean(),
        "kl_coefficient": beta,
    }
    return Experience(*rollout, logprobs_br, values_br, advantages_br, returns_br), metrics


def loss(params, model, config, batch):
    """Returns the policy loss plus c times the value loss, and metrics as (sum, weight) pairs."""
    mask_br = batch.mask_br
    inputs = (batch.tokens_bt, batch.attention_mask_bt)
    policy_loss = ppo_loss(
        response_logprobs(model, config, params["policy"], *inputs),
        batch.logprobs_br,
        whiten(batch.advantages_br, mask_br),
        mask_br,
        clip=config.clip,
    )
    value_loss = clipped_value_loss(
        response_values(model, config, params["value"], *inputs),
        batch.values_br,
        batch.returns_br,
        mask_br,
        clip=config.value_clip,
    )
    c = config.value_coefficient
    return add_losses(policy=(1.0, policy_loss), value=(c, value_loss))


@jit
def update(model, config, params, opt_state, experience, rows_b):
    """Returns params and opt_state after one update on some episodes, and the loss's metrics."""
    batch = jax.tree.map(lambda array: array[rows_b], experience)
    grads, metrics = jax.grad(loss, has_aux=True)(params, model, config, batch)
    changes, opt_state = optax.adam(config.learning_rate).update(grads, opt_state)
    return optax.apply_updates(params, changes), opt_state, metrics


def train(model, config, reference, reward, prompts):
    """Yields the number, the policy's parameters and the metrics of every iteration."""
    params = {"policy": reference, "value": reward}
    opt_state = optax.adam(config.learning_rate).init(params)
    beta = jnp.float32(config.kl_coefficient)
    for iteration in range(config.iterations):
        key = jax.random.fold_in(jax.random.key(config.seed), iteration)
        batch = next(prompts)
        rollout = sample(model, config, params["policy"], batch.tokens, batch.attention_mask, key)
        experience, metrics = make_experience(
            model, config, params, reference, reward, rollout, beta
        )
        # Every epoch visits every episode once, in a new order.
        update_metrics = []
        for epoch_key in jax.random.split(jax.random.fold_in(key, 1), config.epochs):
            order_b = jax.random.permutation(epoch_key, config.batch_size)
            for rows_b in order_b.reshape(config.minibatches, -1):
                params, opt_state, pairs = update(
                    model, config, params, opt_state, experience, rows_b
                )
                update_metrics.append(pairs)

        totals = jax.tree.map(lambda *parts: sum(parts), *update_metrics)
        metrics |= {name: total / weight for name, (total, weight) in totals.items()}
        yield iteration, params["policy"], metrics
        beta = adaptive_kl(
            beta,
            metrics["kl"],
            target=config.kl_target,
            horizon=config.kl_horizon,
            episodes=config.batch_size,
        )


def main(arguments=None):
    """Runs PPO on what a quickstart left."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", required=True, help="the quickstart's workdir")
    run = Path(parser.parse_args(arguments).run)
    if not (run / "04_reward/done.json").exists():
        raise SystemExit(f"--run={run}: not a finished quickstart; its command is in README.md")
    layout = make_layout(devices=jax.devices()[:1])
    policy = store.load(run / "02_sft", layout)
    reward = store.load(run / "04_reward", layout)
    tokenizer = policy.tokenizer
    config = Config(tokenizer.eos_id, tokenizer.pad_id)
    conversations = open_source("tfds:chitchat", kind="messages", min_turns=4)
    prompts = prompt_batches(
        Prompts(conversations, per_conversation=3),
        tokenizer,
        batch_size=config.batch_size,
        length=config.prompt_length,
        seed=config.seed,
    )
    for iteration, _, metrics in train(policy.model, config, policy.params, reward.params, prompts):
        print(iteration, *(f"{name} {metrics[name]:.3f}" for name in SHOWN))


if __name__ == "__main__":
    main()
