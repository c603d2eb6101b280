"""Trains the quickstart: from raw text to an aligned chat model on a laptop's CPU.

Paper: InstructGPT (Ouyang et al. 2022) at toy scale, on real human dialogue; the human labeler is
  *simulated* by a fixed gold reward (VADER sentiment without laughter, minus penalties for
  degenerate responses).
Command: rlhfjax run --config=experiments/quickstart/recipe.py --workdir=runs/quickstart
Variants: :size=smoke is the same recipe in about two minutes, for CI; :seed=1 another seed.
  `rlhfjax sweep` with the same flags varies the KL coefficient, three seeds each.
Hardware: 2 CPU cores. Time and result: see README.md beside this file.
"""

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config
from rlhfjax.sweep import grid, product, seeds

VARIANTS = ("", "size=smoke")
GOLD = "gold:friendliness"
STAGES = ("tokenizer", "pretrain", "sft", "collect", "reward", "ppo", "evaluate")


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size=("full", "smoke"), seed=0)
    smoke = arg.size == "smoke"
    vocab, prompt, answer = 2048, 64, 32

    def chats(split, **options):
        return {
            "spec": "tfds:chitchat",
            "kind": "messages",
            "split": split,
            "min_turns": 4,
            **options,
        }

    text = ({"spec": "tfds:kjv", "split": "train"}, chats("train"))
    sampling = {"prompt_length": prompt, "max_new_tokens": answer, "temperature": 1.0}

    config = ConfigDict({"stages": STAGES})
    config.tokenizer = stage_config("tokenizer", sources=text, vocab_size=vocab)
    config.pretrain = stage_config(
        "pretrain",
        tokenizer="stage:tokenizer",
        model={
            "vocab_size": vocab,
            "d_model": 64 if smoke else 128,
            "n_layers": 2 if smoke else 4,
            "n_heads": 2 if smoke else 4,
            "d_ff": 176 if smoke else 352,
            "max_length": 256,
            "dtype": "auto",
        },
        sources=text,
        eval_sources=(chats("validation"),),
        eval_batches=8,
        length=128,
        batch_size=32,
        steps=60 if smoke else 600,
        eval_every=30 if smoke else 200,
        checkpoint={"every": 30 if smoke else 200},
        seed=arg.seed,
        optim={
            "learning_rate": 3e-3,
            "warmup_steps": 20,
            "final_fraction": 0.1,
            "weight_decay": 0.1,
        },
    )
    config.sft = stage_config(
        "sft",
        init_from="stage:pretrain",
        sources=(chats("train"),),
        eval_sources=(chats("validation"),),
        eval_batches=8,
        length=128,
        batch_size=32,
        steps=40 if smoke else 300,
        eval_every=20 if smoke else 100,
        checkpoint={"every": 20 if smoke else 100},
        seed=arg.seed,
        optim={
            "learning_rate": 1e-3,
            "warmup_steps": 10,
            "final_fraction": 0.1,
            "weight_decay": 0.1,
        },
    )
    config.collect = stage_config(
        "collect",
        init_from="stage:sft",
        labeler=GOLD,
        prompts={"source": chats("train"), "limit": 128 if smoke else 2048},
        eval_prompts={"source": chats("validation"), "limit": 32 if smoke else 192},
        samples_per_prompt=4,
        batch_size=32,
        seed=arg.seed,
        **sampling,
    )
    config.reward = stage_config(
        "reward",
        init_from="stage:sft",
        preferences=("stage:collect/preferences",),
        length=prompt + answer,
        batch_size=16,
        steps=20 if smoke else 256,
        eval_every=10 if smoke else 64,
        checkpoint={"every": 10 if smoke else 64},
        seed=arg.seed,
        normalize="mean_std",
        optim={"learning_rate": 5e-4, "warmup_steps": 10, "final_fraction": 0.1},
    )
    config.ppo = stage_config(
        "ppo",
        init_from="stage:sft",
        reward="stage:reward",
        gold=GOLD,
        prompts={"source": chats("train"), "per_conversation": 3},
        eval_prompts={"source": chats("validation"), "limit": 64},
        batch_size=64,
        epochs=2,
        minibatches=4,
        kl={"coefficient": 0.15, "target": 6.0, "horizon": 640},
        missing_eos="penalty",
        missing_eos_value=1.0,
        steps=6 if smoke else 40,
        eval_every=3 if smoke else 4,
        checkpoint={"every": 3 if smoke else 8},
        log={"every": 1, "samples_every": 3 if smoke else 8},
        seed=arg.seed,
        optim={
            "learning_rate": 2e-4,
            "schedule": "constant",
            "warmup_steps": 8,
            "warmup_start": 0.1,
        },
        value_optim={
            "learning_rate": 5e-4,
            "schedule": "constant",
            "warmup_steps": 8,
            "warmup_start": 0.1,
        },
        **sampling,
    )
    config.evaluate = stage_config(
        "evaluate",
        policy="stage:ppo",
        baseline="stage:sft",
        gold=GOLD,
        proxy="stage:reward",
        prompts={"source": chats("test"), "limit": 64 if smoke else 256},
        tax={
            "chats": (chats("validation"),),
            "texts": ({"spec": "tfds:kjv", "split": "validation"},),
            "pretrained": "stage:pretrain",
            "length": 128,
            "batches": 2,
        },
        batch_size=64,
        seed=arg.seed + 1000,
        **sampling,
    )
    return config


def sweep(add):
    for overrides in product(grid("ppo.kl.coefficient", 0.05, 0.15, 0.45), seeds(3)):
        add(overrides)
