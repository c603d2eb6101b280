"""Expert iteration: sample answers, keep the best of each prompt, fine-tune on them, and again from there.

Paper: Anthony et al. 2017 (arXiv 1705.08439); on language ReST (Gulcehre et al. 2023, arXiv 2308.08998); one round is
  the rejection sampling of Llama 2 (Touvron et al. 2023, section 3.2.3), which keeps the best of K by its reward model.
  None publishes numbers for a model of this size: every one below is our choice.
Command: rlhfjax run --config=experiments/expert_iteration/recipe.py --workdir=runs/expert_iteration
Variants: :size=toy, the quickstart at its smallest; :rounds=3; :completions=16 (K); :keep=2; :seed=1. The labeller is
  the quickstart's gold reward itself.
Hardware: 2 CPU cores, minutes. Time and result: README.md beside this file.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.errors import ConfigError
from rlhfjax.stages import stage_config

QUICKSTART = Path(__file__).parent.parent / "quickstart" / "recipe.py"
VARIANTS = ("", "rounds=3", "size=toy")


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size="full", rounds=2, completions=8, keep=1, seed=0)
    if arg.size not in ("full", "toy") or arg.rounds < 1:
        raise ConfigError(f"size={arg.size},rounds={arg.rounds}: sizes are full, toy; at least 1 round")
    quickstart = base(arg)
    names = quickstart.stages[: quickstart.stages.index("sft") + 1]
    config = ConfigDict({"stages": names})
    for name in names:
        config[name] = quickstart[name]
    policy = "sft"
    for i in range(1, arg.rounds + 1):
        policy = add_round(config, arg, policy, i)
    config.evaluate = ConfigDict(quickstart.evaluate.to_dict())
    config.evaluate.update({"policy": f"stage:{policy}", "baseline": "stage:sft", "proxy": None})
    config.stages = (*config.stages, "evaluate")
    return config


def base(arg: ConfigDict) -> ConfigDict:
    """The quickstart's config, anew each time: what is taken from it is changed."""
    size = "smoke" if arg.size == "toy" else "full"
    return runpy.run_path(str(QUICKSTART))["get_config"](f"size={size},seed={arg.seed}")


def add_round(config: ConfigDict, arg: ConfigDict, policy: str, i: int) -> str:
    """collect_i from a policy, select_i, sft_i from that policy; the name of what comes out."""
    collect, select, tuned = (f"{stage}_{i}" for stage in ("collect", "select", "sft"))
    quickstart = base(arg)
    config[collect] = quickstart.collect
    config[collect].update({"init_from": f"stage:{policy}", "completions": arg.completions, "seed": arg.seed + i})
    if arg.size == "toy":
        config[collect].prompts.limit = 384
    config[collect].prompts.per_conversation = 3
    config[select] = stage_config(
        "select", preferences=(f"stage:{collect}/preferences",), tokenizer="stage:tokenizer", keep=arg.keep
    )
    rows = {"kind": "messages", "split": "all"}
    config[tuned] = ConfigDict(quickstart.sft.to_dict())
    config[tuned].update(
        {
            "init_from": f"stage:{policy}",
            "sources": ({"spec": f"jsonl:stage:{select}/train.jsonl", **rows},),
            "eval_sources": ({"spec": f"jsonl:stage:{select}/validation.jsonl", **rows},),
            "seed": arg.seed + i,
        }
    )
    config.stages = (*config.stages, collect, select, tuned)
    return tuned
