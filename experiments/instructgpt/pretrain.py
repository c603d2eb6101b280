"""Pretrains GPT-3, whose weights are not released, for the other files.

Paper: Brown et al. 2020 (arXiv 2005.14165), table 2.1 and appendix B; Ouyang et al. 2022 start from
  it. Expected loss: not compared, the corpus is not public.
Command: rlhfjax train --config=experiments/instructgpt/pretrain.py:size=1.3b
    --workdir=runs/gpt3/1.3b
Variants: :size=125m, 350m, 760m, 1.3b, 2.7b, 6.7b, 13b or 175b; :seed=1.
Hardware: unpublished but for the cost, 3,640 petaflop/s-days for 175B. Not yet run.
"""

import dataclasses

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.models.presets import preset
from rlhfjax.stages import stage_config

VARIANTS = ("", "size=6.7b", "size=175b")

LENGTH = 2048  # section 2.1 and appendix B: always the full context
# Table 2.1: windows per batch and peak learning rate. The batches are printed as 0.5M, 1M, 2M and
# 3.2M tokens; here the multiples of 256 windows next to them.
SIZES = {
    "125m": (256, 6.0e-4),
    "350m": (256, 3.0e-4),
    "760m": (256, 2.5e-4),
    "1.3b": (512, 2.0e-4),
    "2.7b": (512, 1.6e-4),
    "6.7b": (1024, 1.2e-4),
    "13b": (1024, 1.0e-4),
    "175b": (1536, 0.6e-4),
}


def optim(tokens: int, **changes) -> dict:
    """Returns appendix B, which counts warm-up and decay in tokens; `tokens` are per update."""
    return {
        "name": "adamw",
        "warmup_steps": round(375e6 / tokens),
        "schedule": "cosine",
        "final_fraction": 0.1,
        "decay_steps": round(260e9 / tokens),  # then constant
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        **changes,
    }


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size=("1.3b", *SIZES), seed=0)
    windows, rate = SIZES[arg.size]
    tokens = windows * LENGTH
    return stage_config(
        "pretrain",
        # theirs: GPT-2's byte-level BPE of 50,257; here SentencePiece
        tokenizer="data/gpt3/tokenizer.model",
        # bfloat16 for fp16 (InstructGPT, appendix C); the sampler, PPO and the reward model inherit
        # it from here. Every second layer of GPT-3 is locally banded sparse attention; all of ours
        # are dense.
        model=dataclasses.asdict(
            preset(f"gpt3-{arg.size}", dtype="bfloat16", scan_layers=True, remat="full")
        ),
        sources=({"spec": "jsonl:data/pretraining/{split}*.jsonl", "kind": "text"},),
        eval_sources=(
            {
                "spec": "jsonl:data/pretraining/{split}*.jsonl",
                "kind": "text",
                "split": "validation",
            },
        ),
        eval_batches=8,
        length=LENGTH,
        cross_document=True,  # appendix B: documents are packed, without a mask between them
        # Appendix B grows the batch from 32k tokens over the first 4 to 12 billion tokens; here it
        # is full at once.
        batch_size=windows,
        steps=round(300e9 / tokens),  # caption of table 2.1: 300 billion tokens
        eval_every=1000,
        checkpoint={"every": 1000, "minutes": 15.0},
        seed=arg.seed,
        optim=optim(tokens, learning_rate=rate),
    )
