"""InstructGPT, step 1: fine-tunes on demonstrations.

Paper: Ouyang et al. 2022 (arXiv 2203.02155), appendices C.1 and C.3.
Command: rlhfjax train --config=experiments/instructgpt/sft.py:size=1.3b
    --workdir=runs/instructgpt/1.3b/sft
  rlhfjax train --config=experiments/instructgpt/sft.py:size=1.3b,role=start
      --workdir=runs/instructgpt/1.3b/start
Variants: :size=1.3b, 6.7b or 175b; :role=baseline, the SFT models of the paper's figures (C.1), or
  start, what PPO begins from and what its KL is to (C.3); :seed=1.
Hardware: 4.9 petaflop/s-days for 175B. Not yet run.
"""

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config

VARIANTS = (
    "",
    "size=1.3b,role=start",
    "size=6.7b",
    "size=6.7b,role=start",
    "size=175b",
    "size=175b,role=start",
)

# "6B" in the paper; that this is GPT-3 6.7B is an inference
SIZES = ("1.3b", "6.7b", "175b")
DEMONSTRATIONS = 11_295 + 1_430  # table 6: by labelers and by customers
BATCH = {"1.3b": 32, "6.7b": 32, "175b": 8}  # C.1 and C.3, demonstrations
EPOCHS = {"baseline": 16, "start": 2}  # C.1; C.3
LEARNING_RATE = {
    "baseline": {"1.3b": 9.65e-6, "6.7b": 9.65e-6, "175b": 5.03e-6},  # C.1
    "start": {"1.3b": 5e-6, "6.7b": 1.04e-5, "175b": 2.45e-6},  # C.3
}
LENGTH = 2048  # appendix C: the context
# Our rows are packed, so that a batch of rows holds more demonstrations than rows. Prompts have 408
# tokens on average (table 9), responses an unpublished number; that 4 demonstrations fill a row is
# our choice.
A_ROW = 4


def optim(**changes) -> dict:
    """Returns appendix C (Adam), C.1 and C.3 (cosine to 10 %, without warm-up)."""
    return {
        "name": "adamw",
        "weight_decay": 0.0,  # unpublished; none
        "schedule": "cosine",
        "warmup_steps": 0,
        "final_fraction": 0.1,
        "b1": 0.9,  # appendix C
        "b2": 0.95,  # appendix C
        "eps": 1e-8,  # unpublished; GPT-3's
        "clip_norm": 1.0,  # unpublished; GPT-3's
        **changes,
    }


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size=SIZES, role=tuple(EPOCHS), seed=0)
    updates = DEMONSTRATIONS * EPOCHS[arg.role] // BATCH[arg.size]
    source = {
        "spec": "jsonl:data/instructgpt/demonstrations_{split}*.jsonl",
        "kind": "messages",
    }
    return stage_config(
        "sft",
        init_from=f"runs/gpt3/{arg.size}",  # pretrain.py beside this file
        # C.1: 0.2 on the residual branches; ours is one rate, for the embedding and the attention
        # weights too. C.3 does not name it: as C.1.
        overrides={"dropout": 0.2},
        # C.3 mixes 10 % of pretraining text into these batches (`start`). Whether that is 10 % of
        # examples or of tokens is unpublished. It is left out; a source with kind="text" adds it.
        sources=(source,),
        # A batch of two rows: on more devices, tensors are split too, but 50,257 rows of the
        # embedding are 29 x 1,733.
        mesh={"data": 1, "fsdp": 2, "tensor": -1, "rules": {"vocab": ()}}
        if arg.size == "175b"
        else {},
        eval_sources=({**source, "split": "validation"},),  # table 6: 1,550 + 103
        length=LENGTH,
        batch_size=BATCH[arg.size] // A_ROW,
        steps=updates,
        # C.1 chooses among checkpoints, and among 7 learning rates (175B: 5), by the reward model's
        # score on validation prompts, not by validation loss, which is lowest after one epoch. Here
        # every epoch is evaluated and kept; `eval_reward` with keep_best="max:val_reward" chooses.
        eval_every=updates // EPOCHS[arg.role],
        checkpoint={
            "every": updates // EPOCHS[arg.role],
            "keep_every": updates // EPOCHS[arg.role],
            "minutes": 15.0,
        },
        seed=arg.seed,
        optim=optim(learning_rate=LEARNING_RATE[arg.role][arg.size]),
    )
