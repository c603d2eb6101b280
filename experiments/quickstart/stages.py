"""Runs every stage for a few steps on the results of a finished quickstart, as a check.

Paper: none; the numbers mean nothing.
Command: rlhfjax run --config=experiments/quickstart/stages.py:run=runs/quickstart
    --workdir=runs/stages
  rlhfjax train --config=experiments/quickstart/stages.py:stage=direct,run=runs/quickstart
      --workdir=runs/direct
Variants: :stage=NAME is one stage, by itself; without it all of them are a recipe, in which some
  use the results of others: what `select` keeps is fine-tuned on, a judge labels for `collect`, and
  `group` climbs a reward composed of four.
Hardware: 2 CPU cores, under two minutes after :size=smoke.

Data, lengths and models are those of the run. `data/` beside this file holds what people
would write: principles, rankings by two labelers, feedback in time, labels of steps.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rlhfjax import claims, recipe, stages, workdirs
from rlhfjax.config import parse_arg
from rlhfjax.errors import ConfigError
from rlhfjax.stages import stage_config

VARIANTS = ()  # it needs a finished run
DATA = Path(__file__).parent / "data"
STEPS, ROWS = 2, 16
CLASSES = (
    {"option": "A", "reward": 1.0, "name": "kind"},
    {"option": "B", "reward": -1.0, "name": "unkind"},
)
STEPS_SOURCE = {"spec": f"jsonl:{DATA}/steps.jsonl", "kind": "steps", "split": "all"}
RUBRIC = "Is this answer kind?\n{response}\n(A) yes (B) no"


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, stage=("all", *stages.names()), run="runs/quickstart")
    configs = smoke(Path(arg.run))
    if arg.stage == "all":
        together(configs)
        return ConfigDict(
            {"stages": tuple(configs)}
            | {name: stage_config(**one) for name, one in configs.items()}
        )
    if arg.stage not in configs:
        raise ConfigError(
            f"config argument stage={arg.stage}: it has no smoke config here"
        )
    return stage_config(**configs[arg.stage])


def together(configs: dict[str, dict[str, Any]]) -> None:
    """Makes some stages use what others of the recipe make."""
    rewards = {
        name: {"reward": f"stage:{name}", "name": name}
        for name in ("recenter", "rubric", "tamer")
    }
    gold = {"reward": "gold:sentiment", "name": "gold", "weight": 0.5}
    configs["compose"]["members"] = (*rewards.values(), gold)
    configs["group"] |= {"reward": "stage:compose", "human": {"reward": "stage:tamer"}}
    configs["collect"]["labeler"] = "stage:feedback"
    configs["label"]["answers"] = ("stage:collect/preferences",)
    configs["import_rankings"]["rankings"] = "stage:export_rankings/rankings.jsonl"
    selected = {
        "spec": "jsonl:stage:select/train.jsonl",
        "kind": "messages",
        "split": "all",
    }
    configs["sft"]["sources"] = (selected,)


def smoke(run: Path) -> dict[str, dict[str, Any]]:
    """Returns {stage: options of its smoke config}, ordered so that all inputs come before."""
    base = finished(run)
    at = {name: str(folder) for name, folder in recipe.stage_folders(base, run).items()}
    preferences = (f"{at['collect']}/preferences",)
    collect = base["collect"]
    sampling = {
        name: collect[name]
        for name in ("prompt_length", "max_new_tokens", "temperature")
    }
    prompts, held_out = (
        {**collect[name], "limit": ROWS} for name in ("prompts", "eval_prompts")
    )
    length = base["reward"]["length"]
    judge = {
        "model": at["sft"],
        "length": base["pretrain"]["model"]["max_length"],
        "batch_size": ROWS,
    }
    loop = {
        "steps": STEPS,
        "eval_every": 0,
        "checkpoint": {"every": 0},
        "log": {"every": 1, "tensorboard": False},
    }
    optim = {"learning_rate": 1e-4}
    ranked = {
        "preferences": preferences,
        "length": length,
        "batch_size": ROWS,
        "optim": optim,
        **loop,
    }
    text = {"batch_size": ROWS, "eval_batches": 1, "optim": optim, **loop}
    sampled = {
        "prompts": prompts,
        "eval_prompts": held_out,
        "optim": optim,
        **loop,
        **sampling,
    }
    raw = {**collect["prompts"]["source"], "limit": 8 * ROWS}
    chosen = {
        "prepare": {
            "sources": (raw,),
            "language": {"keep": ("en",), "probability": 0.2},
            "near": {"threshold": 0.8},
            "prompts": {"prefix": 80},
            "evaluation": {"sources": (collect["eval_prompts"]["source"],)},
            "validation": 0.3,
            "test": 0.0,
            "rows_per_file": 3 * ROWS,
        },
        "tokenizer": {},
        "tasks": {"tasks": ("chain_sum", "spell_backward"), "size": 20},
        "pretrain": text,
        "import_model": {"init_from": at["sft"], "overrides": {"scan_layers": True}},
        "select": {"preferences": preferences, "tokenizer": at["tokenizer"]},
        "sft": text,
        "reward": {**ranked, "eval_batches": 1},
        "recenter": {
            "init_from": at["reward"],
            "policy": at["sft"],
            "prompts": held_out,
            "batch_size": ROWS,
            **sampling,
        },
        "tamer": {
            "init_from": at["sft"],
            "feedback": str(DATA / "feedback.jsonl"),
            "held_out": str(DATA / "feedback.jsonl"),
            "length": length,
            "batch_size": 4,
            "optim": optim,
            **loop,
        },
        "process_reward": {
            "init_from": at["sft"],
            "sources": (STEPS_SOURCE,),
            "eval_sources": (STEPS_SOURCE,),
            "neutral": "positive",
            "separator": "\n",
            "length": length,
            "batch_size": 4,
            "optim": optim,
            **loop,
        },
        "rubric": {"judge": judge, "template": RUBRIC, "classes": CLASSES},
        "feedback": {"judge": judge, "principles": str(DATA / "principles.txt")},
        "compose": {
            "members": (
                {"reward": at["reward"], "name": "model"},
                {"reward": "gold:sentiment", "weight": 0.5},
            )
        },
        "synthesize": {
            "seeds": (raw,),
            "init_from": at["sft"],
            "count": ROWS,
            "rounds": 4,
            "examples": 2,
            "min_words": 1,
            "similarity": 1.0,
            "length": judge["length"],
            "max_new_tokens": sampling["max_new_tokens"] // 2,
            "temperature": 1.0,
            "batch_size": ROWS,
            "validation": 0.3,
        },
        "collect": {
            "prompts": prompts,
            "eval_prompts": {**held_out, "limit": 4},
            "batch_size": 4,
        },
        "label": {
            "answers": preferences,
            "simulated": "gold:sentiment",
            "count": ROWS,
            "port": 0,
            "grace": 0.0,
        },
        "export_rankings": {"preferences": preferences},
        "import_rankings": {
            "rankings": str(DATA / "rankings.jsonl"),
            "tokenizer": at["tokenizer"],
            "validation": 0.3,
        },
        "critique": {
            "init_from": at["sft"],
            "principles": str(DATA / "critiques.jsonl"),
            "prompts": prompts,
            "rounds": 2,
            "validation": 0.3,
            "length": judge["length"],
            "max_new_tokens": sampling["max_new_tokens"] // 2,
            "batch_size": ROWS,
        },
        "direct": {
            "init_from": at["sft"],
            "reference_logprobs": "precomputed",
            **ranked,
        },
        "group": {
            "init_from": at["sft"],
            "reward": at["reward"],
            "batch_size": 4,
            "samples_per_prompt": 4,
            **sampled,
        },
        "reinforce_pp": {
            "init_from": at["sft"],
            "reward": at["reward"],
            "batch_size": ROWS,
            **sampled,
        },
        "ppo": {
            "batch_size": ROWS,
            "minibatches": 2,
            "epochs": 1,
            "value_optim": optim,
            **sampled,
        },
        "best_of_n": {
            "init_from": at["sft"],
            "proxy": at["reward"],
            "gold": "gold:sentiment",
            "prompts": {**held_out, "limit": 8},
            "pool": 4,
            "batch_size": ROWS,
            **sampling,
        },
        "evaluate": {"prompts": held_out, "batch_size": ROWS},
    }
    return {
        name: {"stage": name} | base.get(name, {}) | options
        for name, options in chosen.items()
    }


def finished(run: Path) -> dict[str, Any]:
    """Returns the config of a finished quickstart, its `stage:` references resolved."""
    config = workdirs.read_config(run) or {}
    folders = recipe.stage_folders(config, run) if "stages" in config else {}
    if not folders or not all(map(workdirs.read_done, folders.values())):
        raise ConfigError(
            f"run={run}: expected the workdir of a quickstart that has run to its end"
        )
    config = claims.with_defaults(config)
    stages_of = {name: recipe.resolve(config[name], folders, name) for name in folders}
    return {"stages": config["stages"], **stages_of}
