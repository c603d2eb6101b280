"""Trains a process reward model on labels of steps; at toy size on sums with a wrong step.

Paper: Lightman et al. 2023, "Let's Verify Step by Step" (arXiv 2305.20050). Expected there: 78.2%
  of MATH's problems solved by the best of 1860 samples, by an outcome reward 72.4% (section 3). The
  toy does not measure this.
Command: rlhfjax train --config=experiments/lightman2023/prm.py --workdir=runs/lightman2023/prm
  python experiments/lightman2023/solutions.py runs/lightman2023/data
  rlhfjax run --config=experiments/lightman2023/prm.py:size=toy --workdir=runs/lightman2023/toy
Variants: :size=toy,seed=1.
Hardware: toy: 2 CPU cores, minutes. Time and result: README.md beside this file.
"""

from typing import Any

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config

VARIANTS = ("", "size=toy")
TOY_DATA = "runs/lightman2023/data"
VOCABULARY = 278  # bytes, characters and a few pieces


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size=("paper", "toy"), seed=0)
    return toy(arg) if arg.size == "toy" else paper(arg)


def source(files: str) -> dict[str, str]:
    return {"spec": f"jsonl:{files}", "kind": "steps", "split": "all"}


def paper(arg: ConfigDict) -> ConfigDict:
    return stage_config(
        "process_reward",
        # The paper's is the base GPT-4 after MathMix, 1.5 billion tokens (section 2.2).
        init_from="runs/lightman2023/generator",
        # PRM800K in our rows: messages, steps, and ratings -1, 0, 1 as labels.
        sources=(source("data/prm800k/train*.jsonl"),),
        eval_sources=(source("data/prm800k/validation*.jsonl"),),
        separator="\n",  # section 2.2: "newline delimited step-by-step format"
        neutral="positive",  # appendix F
        combine="product",  # section 2.6
        length=1024,  # unpublished; our choice
        batch_size=128,  # unpublished; our choice
        steps=6000,  # unpublished; our choice: PRM800K has 75,000 solutions, ten epochs
        eval_every=500,
        checkpoint={"every": 500, "minutes": 15.0},
        log={"every": 1},
        seed=arg.seed,
        optim={
            "learning_rate": 1e-5,  # unpublished; our choice
            "schedule": "cosine",
        },
    )


def toy(arg: ConfigDict) -> ConfigDict:
    """Returns two reward models of the same solutions: from labels of steps, and of outcomes."""
    tokenizer = stage_config(
        "tokenizer", sources=(text(),), vocab_size=VOCABULARY, model_type="bpe"
    )
    by_steps = learned(arg, "steps", separator="\n")
    # One step per solution: no blank line stands in it.
    by_outcome = learned(arg, "outcome", separator="\n\n")
    return ConfigDict(
        {
            "stages": ("tokenizer", "process", "outcome"),
            "tokenizer": tokenizer,
            "process": by_steps,
            "outcome": by_outcome,
        }
    )


def text() -> dict[str, str]:
    return {"spec": f"text:{TOY_DATA}/text.txt", "documents": "line", "split": "all"}


def learned(arg: ConfigDict, kind: str, separator: str) -> ConfigDict:
    model: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "d_ff": 256,
        "max_length": 64,
        "dtype": "auto",
    }
    return stage_config(
        "process_reward",
        tokenizer="stage:tokenizer",
        model=model,
        sources=(source(f"{TOY_DATA}/{kind}/train.jsonl"),),
        eval_sources=(source(f"{TOY_DATA}/{kind}/validation.jsonl"),),
        separator=separator,
        length=64,
        batch_size=64,
        steps=1000,
        eval_every=250,
        checkpoint={"every": 500},
        log={"every": 50, "tensorboard": False},
        seed=arg.seed,
        optim={"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 50},
    )
