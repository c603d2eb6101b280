"""Trains a reward model on what people thought of whole conversations.

Paper: the loss is InstructGPT's (Ouyang et al. 2022, eq. 1). No paper has numbers for these
  ratings: every number below is our choice.
Data: chitchat-dataset's ratings as pairs of conversations with one opening, see
  `rlhfjax/data/chitchat.py`. Prompt: the opening. Completion: the whole conversation, a line per
  turn. What does not fit into `length` tokens loses its end.
Command: rlhfjax run --config=experiments/chitchat_ratings/recipe.py --workdir=runs/ratings
    --cache=runs/cache
  python experiments/chitchat_ratings/evaluate.py runs/ratings
Variants: :seed=1 is another seed of the reward stage; tokenizer, pretraining and SFT stay those of
  seed 0, which `--cache` keeps. :size=smoke is a check that everything runs.
Hardware: 2 CPU cores. Time, result and the rule by which it is read: README.md beside this file.
"""

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config

VARIANTS = ("", "seed=1", "size=smoke")
STAGES = ("tokenizer", "pretrain", "sft", "reward")
RATINGS = "tfds:chitchat_ratings"


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size=("full", "smoke"), seed=0)
    smoke = arg.size == "smoke"
    vocab, length = 4096, 256 if smoke else 1024
    chats = {"spec": "tfds:chitchat", "kind": "messages", "min_turns": 4}
    held_out = {**chats, "split": "validation"}

    config = ConfigDict({"stages": STAGES})
    config.tokenizer = stage_config("tokenizer", sources=(chats,), vocab_size=vocab)
    config.pretrain = stage_config(
        "pretrain",
        tokenizer="stage:tokenizer",
        model={
            "vocab_size": vocab,
            "d_model": 64,
            "n_layers": 2,
            "n_heads": 2,
            "d_ff": 176,
            "max_length": length,
            "dtype": "auto",
        },
        sources=(chats,),
        eval_sources=(held_out,),
        eval_batches=2,
        length=length,
        batch_size=4,
        optim=optim(3e-3, 0.1),
        **loop(12 if smoke else 200),
    )
    config.sft = stage_config(
        "sft",
        init_from="stage:pretrain",
        sources=(chats,),
        eval_sources=(held_out,),
        eval_batches=2,
        length=length,
        batch_size=4,
        optim=optim(1e-3, 0.1),
        **loop(12 if smoke else 60),
    )
    config.reward = stage_config(
        "reward",
        init_from="stage:sft",
        preferences=(RATINGS,),
        length=length,
        batch_size=4,
        seed=arg.seed,
        optim=optim(5e-4),
        **loop(12 if smoke else 240),
    )
    return config


def loop(steps: int) -> dict:
    """Returns the options of a stage that trains for `steps` and is evaluated at its end."""
    return {
        "steps": steps,
        "eval_every": steps,
        "checkpoint": {"every": steps},
        "log": {"every": 1},
    }


def optim(learning_rate: float, weight_decay: float = 0.0) -> dict:
    return {
        "learning_rate": learning_rate,
        "warmup_steps": 10,
        "final_fraction": 0.1,
        "weight_decay": weight_decay,
    }
