"""A workload with TRL's trainers: one JSON line. `benchmarks.compare` starts it; see README.md.

`setting` is float32, bf16 (autocast, TRL's own default) or medium (float32 whose products may use
bf16 inside), and with "+compile" torch.compile as well.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import tempfile
from types import SimpleNamespace
from typing import Any

import common
import torch
import transformers as hf
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers


class Ticks(hf.TrainerCallback):
    """Ticks at the start of training and at the end of every optimizer step."""

    def __init__(self, stopwatch: common.Stopwatch):
        self.on_train_begin = self.on_step_end = stopwatch.tick


def run(task: SimpleNamespace, stopwatch: common.Stopwatch) -> int:
    """Runs warmup + steps steps of the task; returns the units per step."""
    torch.manual_seed(0)
    if task.setting.startswith("medium"):
        torch.set_float32_matmul_precision("medium")
    task.count = task.warmup + task.steps
    with tempfile.TemporaryDirectory() as task.folder:
        return WORKLOADS[task.workload](task, stopwatch)


def llama(task: SimpleNamespace, kind: Any = hf.LlamaForCausalLM, **fields: Any) -> Any:
    """Returns a Llama with random float32 weights."""
    m = task.model
    config = hf.LlamaConfig(
        vocab_size=m.vocab_size,
        hidden_size=m.d_model,
        intermediate_size=m.d_ff,
        num_hidden_layers=m.n_layers,
        num_attention_heads=m.n_heads,
        num_key_value_heads=m.n_heads,
        max_position_embeddings=m.max_length,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        tie_word_embeddings=True,
        pad_token_id=common.PAD,
        bos_token_id=None,
        eos_token_id=common.EOS,
        **fields,
    )
    return kind(config)


def scorer(task: SimpleNamespace) -> Any:
    """Returns the trunk with a scalar head: a reward model or a value function."""
    return llama(task, hf.LlamaForSequenceClassification, num_labels=1)


def tokenizer(task: SimpleNamespace) -> Any:
    ids = {"<pad>": common.PAD, "<eos>": common.EOS}
    for i in range(common.FIRST_WORD, task.model.vocab_size):
        ids[f"w{i}"] = i
    words = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "padding_side": "left"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def arguments(task: SimpleNamespace, batch: int) -> dict[str, Any]:
    """Returns what every trainer is told."""
    optimizer = task.optimizer
    return {
        "output_dir": task.folder,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta1": optimizer.b1,
        "adam_beta2": optimizer.b2,
        "adam_epsilon": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.clip_norm,
        "bf16": task.setting.startswith("bf16"),
        "torch_compile": task.setting.endswith("+compile"),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def fine_tune(task: SimpleNamespace, stopwatch: common.Stopwatch) -> int:
    """Trains on whole rows; in sft the first `prompt` tokens do not count in the loss."""
    from trl import SFTConfig, SFTTrainer

    rows = task.count * task.batch
    data = {"input_ids": common.random_ids(task, rows, task.seq).tolist()}
    if task.workload == "sft":
        counted = [0] * task.prompt + [1] * (task.seq - task.prompt)
        data["completion_mask"] = [counted] * rows
    config = SFTConfig(
        max_steps=task.count, max_length=task.seq, **arguments(task, task.batch)
    )
    trainer = SFTTrainer(
        model=llama(task),
        args=config,
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(task),
        callbacks=[Ticks(stopwatch)],
    )
    trainer.train()
    return task.batch * task.seq


def reward(task: SimpleNamespace, stopwatch: common.Stopwatch) -> int:
    from trl import RewardConfig, RewardTrainer

    ids = common.random_ids(task, 2, task.count * task.pairs, task.seq).tolist()
    data = {"chosen_ids": ids[0], "rejected_ids": ids[1]}
    config = RewardConfig(
        max_steps=task.count, max_length=task.seq, **arguments(task, task.pairs)
    )
    trainer = RewardTrainer(
        model=scorer(task),
        args=config,
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(task),
        callbacks=[Ticks(stopwatch)],
    )
    trainer.train()
    return task.pairs


def generate(task: SimpleNamespace, stopwatch: common.Stopwatch) -> int:
    """Samples with `model.generate`, as TRL's trainers do without vLLM."""
    model = llama(task).eval()
    if task.setting.endswith("+compile"):
        model.forward = torch.compile(model.forward)
    ids = torch.from_numpy(common.random_ids(task, task.batch, task.prompt)).long()
    options = {
        "max_new_tokens": task.new,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": None,
    }
    is_bf16 = task.setting.startswith("bf16")
    for _ in stopwatch.ticking(range(task.count)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), **options
            )
        assert out.shape == (task.batch, task.prompt + task.new)
    return task.batch * task.new


def ppo(task: SimpleNamespace, stopwatch: common.Stopwatch) -> int:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    episodes = task.count * task.batch
    config = PPOConfig(
        total_episodes=episodes,
        num_mini_batches=task.minibatches,
        num_ppo_epochs=task.epochs,
        local_rollout_forward_batch_size=task.batch,
        num_sample_generations=0,
        response_length=task.new,
        stop_token_id=None,
        temperature=1.0,
        kl_coef=task.kl,
        **arguments(task, task.batch),
    )
    prompts = common.random_ids(task, episodes, task.prompt).tolist()
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer(task),
        model=llama(task),
        ref_model=llama(task),
        reward_model=scorer(task),
        value_model=scorer(task),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        callbacks=[Ticks(stopwatch)],
    )
    trainer.train()
    return task.batch * task.new


def grpo(task: SimpleNamespace, stopwatch: common.Stopwatch) -> int:
    from trl import GRPOConfig, GRPOTrainer

    llama(task).save_pretrained(task.folder)  # the trainer loads the reference from it
    config = GRPOConfig(
        max_steps=task.count,
        model_init_kwargs={"dtype": "float32"},
        num_generations=task.group,
        max_completion_length=task.new,
        temperature=1.0,
        generation_kwargs={"min_new_tokens": task.new},
        beta=task.kl,
        num_iterations=1,
        **arguments(task, task.batch),
    )
    ids = common.random_ids(task, task.count * task.prompts, task.prompt)
    trainer = GRPOTrainer(
        model=task.folder,
        reward_funcs=common.even_share,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [common.text_of(x) for x in ids]}),
        processing_class=tokenizer(task),
        callbacks=[Ticks(stopwatch)],
    )
    trainer.train()
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
    common.main("trl", ("trl", "transformers", "torch"), run)
