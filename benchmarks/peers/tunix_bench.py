"""A workload with Tunix: one JSON line. `benchmarks.compare` starts it; see README.md.

`setting` is float32 or bf16 (parameters and computation).
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

from types import SimpleNamespace
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate import sampler
from tunix.models.llama3 import model as llama3
from tunix.rl import rl_cluster
from tunix.rl import utils as rl_utils
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft import utils as sft_utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

NEVER = 10**9
NO_EOS = [-1]  # an id that is never sampled
MESH = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))


class Llama(llama3.Llama3):
    """Llama3 that takes, and ignores, the segment ids that Tunix's PPO passes."""

    def __call__(self, tokens, positions, cache, attention_mask, segment_ids=None):
        del segment_ids
        return super().__call__(tokens, positions, cache, attention_mask)


class WordTokenizer:
    """One token per word: "w<id>" has this id."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        return common.text_of(ids)

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return common.EOS

    def pad_id(self) -> int:
        return common.PAD


def run(task: SimpleNamespace, stopwatch: common.Stopwatch) -> int:
    """Runs warmup + steps steps of the task; returns the units per step."""
    task.count = task.warmup + task.steps
    task.dtype = {"float32": jnp.float32, "bf16": jnp.bfloat16}[task.setting]
    return WORKLOADS[task.workload](task, stopwatch)


def llama(task: SimpleNamespace, seed: int, tied: bool = True) -> Llama:
    """Returns a Llama with random weights (Tunix's own MLP starts at zero)."""
    m = task.model
    config = llama3.ModelConfig(
        num_layers=m.n_layers,
        vocab_size=m.vocab_size,
        embed_dim=m.d_model,
        hidden_dim=m.d_ff,
        num_heads=m.n_heads,
        head_dim=m.d_model // m.n_heads,
        num_kv_heads=m.n_heads,
        rope_theta=10000,
        norm_eps=1e-5,
        weight_tying=tied,
    )
    with MESH:
        return with_random_weights(task, Llama(config, rngs=nnx.Rngs(seed)), seed)


def with_random_weights(task: SimpleNamespace, model: Any, seed: int) -> Any:
    """Returns the model with N(0, 0.02) in its matrices, all in the task's dtype."""
    params = nnx.state(model, nnx.Param)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = []
    for key, x in zip(keys, leaves, strict=True):
        is_matrix = x.ndim > 1
        value = 0.02 * jax.random.normal(key, x.shape) if is_matrix else x
        drawn.append(value.astype(task.dtype))
    nnx.update(model, jax.tree.unflatten(structure, drawn))
    return model


def scorer(task: SimpleNamespace, seed: int) -> Any:
    """Returns the trunk with a scalar head: a reward model or a value function."""
    with MESH:
        critic = rl_utils.create_critic_model(llama(task, seed, tied=False), seed)
        return with_random_weights(task, critic, seed)


def adamw(task: SimpleNamespace) -> optax.GradientTransformation:
    o = task.optimizer
    adam = optax.adamw(
        o.learning_rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay
    )
    return optax.chain(optax.clip_by_global_norm(o.clip_norm), adam)


def train(task: SimpleNamespace, model: Any, batches: Any, inputs: Any, loss: Any):
    """Trains all parameters. With one computation in flight a step's time is its own."""
    config = TrainingConfig(
        eval_every_n_steps=NEVER, max_steps=NEVER, max_inflight_computations=1
    )
    trainer = PeftTrainer(model, adamw(task), config)
    trainer = trainer.with_gen_model_input_fn(inputs)
    if loss is not None:
        trainer = trainer.with_loss_fn(loss)
    with MESH:
        trainer.train(batches)


def attention_inputs(tokens: jax.Array) -> dict[str, jax.Array]:
    mask = tokens != common.PAD
    positions = sft_utils.build_positions_from_mask(mask)
    attention_mask = sft_utils.make_causal_attn_mask(mask)
    return {"positions": positions, "attention_mask": attention_mask}


def fine_tune(task: SimpleNamespace, stopwatch: common.Stopwatch) -> int:
    """Trains on whole rows; in sft the first `prompt` tokens do not count in the loss."""
    ids = common.random_ids(task, task.count, task.batch, task.seq)
    mask = np.ones((task.batch, task.seq), bool)
    if task.workload == "sft":
        mask[:, : task.prompt] = False

    def inputs(x: TrainingInput) -> dict[str, Any]:
        tokens = {"input_tokens": x.input_tokens, "input_mask": x.input_mask}
        return tokens | attention_inputs(x.input_tokens)

    batches = [TrainingInput(input_tokens=rows, input_mask=mask) for rows in ids]
    train(task, llama(task, 0), stopwatch.ticking(batches), inputs, None)
    return task.batch * task.seq


def reward(task: SimpleNamespace, stopwatch: common.Stopwatch) -> int:
    ids = common.random_ids(task, task.count, 2 * task.pairs, task.seq)

    def bradley_terry(model: Any, tokens: jax.Array) -> jax.Array:
        given = attention_inputs(tokens)
        scores, _ = model(tokens, given["positions"], None, given["attention_mask"])
        chosen, rejected = jnp.split(scores[:, -1, 0], 2)
        return -jnp.mean(jax.nn.log_sigmoid(chosen - rejected))

    batches = [{"tokens": rows} for rows in ids]
    model = scorer(task, 0)
    train(task, model, stopwatch.ticking(batches), lambda x: dict(x), bradley_terry)
    return task.pairs


def generate(task: SimpleNamespace, stopwatch: common.Stopwatch) -> int:
    m = task.model
    cache = sampler.CacheConfig(
        cache_size=task.prompt + task.new,
        num_layers=m.n_layers,
        num_kv_heads=m.n_heads,
        head_dim=m.d_model // m.n_heads,
    )
    sample = sampler.Sampler(llama(task, 0), WordTokenizer(), cache)
    ids = common.random_ids(task, task.batch, task.prompt)
    prompts = [common.text_of(row) for row in ids]
    for seed in stopwatch.ticking(range(task.count)):
        out = sample(
            prompts,
            max_generation_steps=task.new,
            max_prompt_length=task.prompt,
            temperature=1.0,
            top_p=1.0,
            eos_tokens=NO_EOS,
            seed=seed,
        )
        assert all(len(row) == task.new for row in out.tokens)
    return task.batch * task.new


def cluster(task: SimpleNamespace, config: Any, **models: Any) -> Any:
    """Returns the models and the sampler of a policy algorithm."""
    rollout = RolloutConfig(
        max_tokens_to_generate=task.new,
        max_prompt_length=task.prompt,
        kv_cache_size=task.prompt + task.new,
        temperature=1.0,
        top_p=1.0,
        eos_tokens=NO_EOS,
    )
    cluster_config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(rl_cluster.Role, MESH),
        rollout_engine="vanilla",
        training_config=config,
        rollout_config=rollout,
    )
    return rl_cluster.RLCluster(
        actor=llama(task, 0),
        reference=llama(task, 1),
        tokenizer=WordTokenizer(),
        cluster_config=cluster_config,
        **models,
    )


def prompt_batches(task: SimpleNamespace, size: int) -> Any:
    """Returns batches of prompts; arrays, since Tunix repeats them per group."""
    ids = common.random_ids(task, task.count * size, task.prompt)
    prompts = np.array([common.text_of(row) for row in ids])
    return [{"prompts": rows} for rows in prompts.reshape(task.count, size)]


def ppo(task: SimpleNamespace, stopwatch: common.Stopwatch) -> int:
    from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner

    config = rl_cluster.RLTrainingConfig(
        actor_optimizer=adamw(task),
        critic_optimizer=adamw(task),
        eval_every_n_steps=NEVER,
        max_steps=NEVER,
        mini_batch_size=task.batch,
        train_micro_batch_size=task.batch // task.minibatches,
        rollout_micro_batch_size=task.batch,
        compute_logps_micro_batch_size=task.batch,
    )
    models = {"critic": scorer(task, 2), "reward": scorer(task, 3)}
    learner = PPOLearner(
        rl_cluster=cluster(task, config, **models),
        ppo_config=PPOConfig(num_iterations=task.epochs, beta=task.kl),
    )
    learner.train(stopwatch.ticking(prompt_batches(task, task.batch)))
    return task.batch * task.new


def grpo(task: SimpleNamespace, stopwatch: common.Stopwatch) -> int:
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner

    config = rl_cluster.RLTrainingConfig(
        actor_optimizer=adamw(task),
        eval_every_n_steps=NEVER,
        max_steps=NEVER,
        mini_batch_size=task.prompts,
    )
    algorithm = GRPOConfig(
        num_generations=task.group, num_iterations=1, beta=task.kl, epsilon=0.2
    )
    learner = GRPOLearner(
        rl_cluster=cluster(task, config),
        algo_config=algorithm,
        reward_fns=common.even_share,
    )
    learner.train(stopwatch.ticking(prompt_batches(task, task.prompts)))
    return task.batch * task.new


WORKLOADS = {
    "pretrain": fine_tune,
    "sft": fine_tune,
    "rm": reward,
    "generate": generate,
    "ppo": ppo,
    "grpo": grpo,
}

if __name__ == "__main__":
    common.main("tunix", ("google-tunix", "jax", "flax"), run)
