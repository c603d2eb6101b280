"""The N+ details, step 1: fine-tunes Pythia on reference summaries of TL;DR; or a toy on dialogue.

Paper: Huang et al. 2024 (arXiv 2403.17031), "The N+ implementation details of RLHF with PPO", and
  its released code (vwxyzjn/summarize_from_feedback_details; "code" below). Expected there, win
  rate against the reference summaries by gpt-3.5-turbo-0125, read off a figure: 1B about 33 %, 2.8B
  41 %, 6.9B 43 %. The toy does not measure this.
Command: rlhfjax train --config=experiments/huang2024/sft.py:size=1b --workdir=runs/huang2024/1b/sft
  rlhfjax run --config=experiments/huang2024/sft.py:size=toy --workdir=runs/huang2024/toy_sft
Variants: :size=1b, 2.8b or 6.9b; :init=random, the shape with random parameters, to see memory and
  speed before there are weights; :seed=44413 (and 55513, 66613, 77713: the paper's four).
Hardware: one node of 8 H100 (code, sbatches). Toy: 2 CPU cores. Time and result: README.md beside
  this file.
"""

import dataclasses
import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.models.presets import preset
from rlhfjax.stages import stage_config

TOY = runpy.run_path(str(Path(__file__).parents[1] / "toy.py"))
VARIANTS = (
    "",
    "size=2.8b",
    "size=6.9b",
    "init=random",
    "size=2.8b,init=random",
    "size=6.9b,init=random",
    "size=toy",
)

EPISODES = 116_722  # TL;DR's training split
PROMPT, RESPONSE = 512, 53  # details 2 and 4
SIZES = ("1b", "2.8b", "6.9b")  # of Pythia


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size=(*SIZES, "toy"), init=("pythia", "random"), seed=44413)
    return toy(arg.seed) if arg.size == "toy" else paper(arg)


def optim(**changes) -> dict:
    """Returns the optimizer of every stage: the code's AdamW(lr, eps), else PyTorch's defaults."""
    return {
        "name": "adamw",
        "learning_rate": 3e-6,  # the paper's table of hyper-parameters, and the sbatch files
        "schedule": "cosine",  # the table: SFT and reward model; to 0
        "warmup_steps": 0,  # code
        "b1": 0.9,  # code: PyTorch's default
        "b2": 0.999,  # code: PyTorch's default
        "eps": 1e-5,  # the table
        # code: PyTorch's default; there on vectors too, here on matrices alone
        "weight_decay": 0.01,
        "clip_norm": 0.0,  # nothing clips in the code; we did not read its DeepSpeed file
        **changes,
    }


def origin(arg: ConfigDict) -> dict:
    """Returns the options that say where the parameters come from."""
    if arg.init == "pythia":
        # a folder of a model, see README.md
        return {"init_from": f"runs/huang2024/pythia-{arg.size}-deduped"}
    shape = preset(
        f"pythia-{arg.size}", dtype="bfloat16", scan_layers=True, remat="full"
    )
    return {
        "model": dataclasses.asdict(shape),
        "tokenizer": "data/pythia/tokenizer.model",
    }


def paper(arg: ConfigDict) -> ConfigDict:
    summaries = {"spec": "jsonl:data/tldr/sft_{split}*.jsonl", "kind": "messages"}
    batch = 128
    return stage_config(
        "sft",
        **origin(arg),
        # A post in the form of detail 2 ("SUBREDDIT: ... TL;DR:") is the user's turn, the summary
        # the assistant's. The code learns the tokens of both; this stage the summary's alone.
        sources=(summaries,),
        eval_sources=({**summaries, "split": "validation"},),
        length=PROMPT
        + RESPONSE,  # detail 5: at most 562 without our template's markers
        batch_size=batch,  # rows; short posts share one
        steps=EPISODES // batch,  # one epoch
        eval_every=100,
        checkpoint={"every": 100, "minutes": 15.0},
        seed=arg.seed,
        optim=optim(),
    )


def toy(seed: int) -> ConfigDict:
    """Returns the toy recipe: the quickstart's SFT with this optimizer."""
    config = TOY["tuned"](seed)
    config.sft.optim.update(optim(learning_rate=1e-3))
    return config
