"""Over-optimization, step 4: trains proxy reward models of many sizes.

Paper: Gao et al. 2022 (arXiv 2210.10760), section 2, appendix C.
Command: rlhfjax train --config=experiments/gao2022/proxy.py:proxy=85m
    --workdir=runs/gao2022/1.2b/proxy_85m_90000
Variants: :proxy=3m, 12m, 25m, 42m, 85m, 300m, 680m, 1.2b or 3b; :policy=6b; :pairs=2000, the
  comparisons to learn from (those of `collect.py` with the same argument); :seed=1.
Hardware: not named by the paper. Time and result: README.md beside this file; at small scale:
  figure1a.py.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import Argument, parse_arg
from rlhfjax.ranges import PositiveCount
from rlhfjax.stages import stage_config

HERE = Path(__file__).parent
COLLECT = runpy.run_path(str(HERE / "collect.py"))
VARIANTS = ("", "proxy=3m", "proxy=3b", "proxy=85m,pairs=2000")

BATCH = 64  # table 1 (appendix C)
MULTIPLIER = 1.67e-2  # table 1 (appendix C), of a learning rate that it does not name
# The start of each size (a folder of a model), and the rate that is multiplied: here the peak rate
# of GPT-3's pretraining at that size (Brown et al. 2020, table 2.1), as WebGPT's table 7, of the
# same group, has its bases. From 85M on the names are GPT-3's sizes without embeddings. Of the four
# below neither shape nor rate is published: 12 L d^2 gives their names for 4 x 256, 4 x 512, 8 x
# 512 and 6 x 768 (layers x width), which is an inference, and the rate is that of the smallest in
# the table.
SIZES = {
    "3m": ("runs/gpt3/3m", 6.0e-4),
    "12m": ("runs/gpt3/12m", 6.0e-4),
    "25m": ("runs/gpt3/25m", 6.0e-4),
    "42m": ("runs/gpt3/42m", 6.0e-4),
    "85m": ("runs/gpt3/125m", 6.0e-4),
    "300m": ("runs/gpt3/350m", 3.0e-4),
    "680m": ("runs/gpt3/760m", 2.5e-4),
    "1.2b": ("runs/gpt3/1.3b", 2.0e-4),
    "3b": ("runs/gpt3/2.7b", 1.6e-4),
}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        policy=("1.2b", "6b"),
        proxy=("85m", *SIZES),
        pairs=Argument(COLLECT["PAIRS"], PositiveCount),
        seed=0,
    )
    start, rate = SIZES[arg.proxy]
    steps = arg.pairs // BATCH
    return stage_config(
        "reward",
        init_from=start,  # unpublished whether pretrained alone or fine-tuned; pretrained
        preferences=(f"runs/gao2022/{arg.policy}/comparisons_{arg.pairs}/preferences",),
        length=COLLECT["PROMPT"] + COLLECT["ANSWER"],
        batch_size=BATCH,
        steps=steps,  # one epoch; more epochs do not replace data (figure 13)
        loss={"name": "bradley_terry"},
        # Section 2 afterwards sets every proxy's mean over the initial policy's responses to 0, as
        # here, and its scale so that the cross-entropy to soft labels is least, which is left out:
        # neither changes what best-of-n picks, nor PPO's whitened advantages.
        normalize="mean",
        eval_every=max(1, steps // 4),
        checkpoint={"every": max(1, steps // 4), "minutes": 15.0},
        seed=arg.seed,
        optim={
            "name": "adam",  # table 1 (appendix C)
            "learning_rate": MULTIPLIER * rate,
            "schedule": "cosine",  # unpublished; InstructGPT's reward model
            "final_fraction": 0.1,  # unpublished; the same
            "b1": 0.9,  # unpublished; InstructGPT, appendix C
            "b2": 0.95,  # unpublished; the same
            "eps": 1e-8,  # unpublished; GPT-3's
            "clip_norm": 1.0,  # unpublished; GPT-3's
        },
    )
