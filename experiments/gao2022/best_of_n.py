"""Over-optimization, step 5: picks the best of n by a proxy, measures by gold.

Paper: Gao et al. 2022 (arXiv 2210.10760), section 3. Expected there, gold score over d = sqrt(KL),
  nats: R(d) = d (alpha - beta d), with KL = log n - (n - 1) / n; read off figure 1a the 3M proxy
  peaks near 0.50 at KL 4 to 5, the 85M one near 0.87 at 8, the 3B one still rises at 10. The
  coefficients are not printed as numbers.
Command: rlhfjax train --config=experiments/gao2022/best_of_n.py:proxy=85m
    --workdir=runs/gao2022/1.2b/best_of_n_85m
Variants: :proxy=3m to 3b, as in proxy.py; :policy=6b; :pool=60000; :pairs=2000; :seed=1.
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
PROXY = runpy.run_path(str(HERE / "proxy.py"))
COLLECT = runpy.run_path(str(HERE / "collect.py"))
VARIANTS = ("", "proxy=3m", "proxy=3b", "pool=60000")


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        policy=("1.2b", "6b"),
        proxy=("85m", *PROXY["SIZES"]),
        pairs=Argument(COLLECT["PAIRS"], PositiveCount),
        pool=1000,
        seed=0,
    )
    prompts = {
        "spec": "jsonl:data/instructgpt/prompts_{split}*.jsonl",
        "kind": "prompt",
        "split": "validation",
    }
    return stage_config(
        "best_of_n",
        init_from=f"runs/gao2022/{arg.policy}/sft",
        proxy=f"runs/gao2022/{arg.policy}/proxy_{arg.proxy}_{arg.pairs}",
        gold="runs/gao2022/gold",
        prompts={"source": prompts, "limit": 256},  # our choice
        pool=arg.pool,  # section 3: the form was found up to n = 1,000 and held up to 60,000
        prompt_length=COLLECT["PROMPT"],
        max_new_tokens=COLLECT["ANSWER"],
        temperature=1.0,  # unpublished; InstructGPT
        batch_size=256,
        seed=arg.seed,
    )
