"""Extends the context of LLaMA by position interpolation: linear rope scaling, briefly trained.

Paper: Chen et al. 2023 (arXiv 2306.15595), sections 2.3 and 3.1. Expected there: the perplexity of
  books falls as the context grows to 32,768 tokens. Not compared: their books are not here.
Command: rlhfjax import --model=hf:LLAMA --workdir=runs/llama-7b
  rlhfjax train --config=experiments/chen2023/pretrain.py --workdir=runs/chen2023/7b
  rlhfjax run --config=experiments/chen2023/pretrain.py:size=toy --workdir=runs/chen2023/toy
Variants: :length=8192 or 16384; :scaling=none, their baseline, which trains on at the longer
  context without scaling; :seed=1.
Hardware: 128 A100 for 32,768 tokens (section 3.1). Toy: 2 CPU cores, a minute. Result: README.md
  beside this file.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config

TOY = runpy.run_path(str(Path(__file__).parents[1] / "toy.py"))
VARIANTS = ("", "length=8192", "scaling=none", "size=toy")
CONTEXT = 2048  # of LLaMA
TOY_CONTEXT, TOY_LENGTH = 32, 128


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        size=("7b", "toy"),
        length=("32768", "16384", "8192"),
        scaling=("linear", "none"),
        seed=0,
    )
    return toy(arg) if arg.size == "toy" else paper(arg)


def longer(length: int, context: int, scaling: str) -> dict:
    """Returns the options of a model whose context grows from `context` to `length` tokens.

    Linear scaling by length / context rotates position m of the longer context as the model
    learned position m context / length (equation 3).
    """
    factor = length / context if scaling == "linear" else 1.0
    return {
        "max_length": length,
        "rope_scaling": {"kind": scaling, "factor": factor},
    }


def paper(arg: ConfigDict) -> ConfigDict:
    length = int(arg.length)
    books = {"spec": "jsonl:data/pile/{split}*.jsonl", "kind": "text"}
    return stage_config(
        "pretrain",
        init_from="runs/llama-7b",
        overrides={
            **longer(length, CONTEXT, arg.scaling),
            # unpublished: what saves memory here; theirs was FSDP and flash attention
            "dtype": "bfloat16",
            "scan_layers": True,
            "remat": "full",
            "attention": "splash",
        },
        sources=(books,),  # section 3.1: the Pile
        eval_sources=({**books, "split": "validation"},),
        eval_batches=8,
        length=length,
        batch_size=64 if length == 8192 else 128,  # section 3.1
        # Section 3.1: 1,000 steps, and 10,000 without interpolation.
        steps=1000 if arg.scaling == "linear" else 10000,
        eval_every=200,
        checkpoint={"every": 200, "minutes": 15.0},
        seed=arg.seed,
        optim={  # section 3.1; after the warm-up the schedule is unpublished
            "name": "adamw",
            "learning_rate": 2e-5,
            "warmup_steps": 20,
            "warmup_start": 0.1,
            "schedule": "constant",
            "b1": 0.9,
            "b2": 0.95,
            "weight_decay": 0.0,
        },
    )


def toy(arg: ConfigDict) -> ConfigDict:
    """Returns the quickstart's pretraining at a short context, and a stage at a longer one."""
    config = TOY["quickstart"](arg.seed, until="sft")
    pretrain = config.pretrain
    pretrain.model.max_length = pretrain.length = TOY_CONTEXT
    pretrain.batch_size = 128  # as many tokens as the quickstart
    pretrain.update(TOY["loop"](300))
    going_on = stage_config(
        "pretrain",
        init_from="stage:pretrain",
        overrides=longer(TOY_LENGTH, TOY_CONTEXT, arg.scaling),
        sources=pretrain.sources,
        eval_sources=pretrain.eval_sources,
        eval_batches=8,
        length=TOY_LENGTH,
        batch_size=32,
        seed=arg.seed,
        optim={"learning_rate": 3e-4, "warmup_steps": 2, "warmup_start": 0.1},
        **TOY["loop"](30, evals=6),
    )
    return TOY["add"](config, longer=going_on)
