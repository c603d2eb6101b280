"""The programs that stages run: digests without names, frozen before the code was rearranged.

programs.txt has one line per variant of a stage: its name and the digests of the programs that it
compiles when it runs for two steps, evaluation included. A change of the code that is meant to
change no behavior leaves them as they are. After a change that is meant to change them,

    python -m tests.frozen.programs               # writes every variant
    python -m tests.frozen.programs ppo group     # those with one of these words in their name

metrics.json has the last metrics of each variant and the CPU that computed them, written by the
same command; `--metrics` writes the metrics alone.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax._src import compiler as jax_compiler

from rlhfjax import recipe
from rlhfjax.config import to_dict
from tests import tiny
from tests.plan.fingerprint import module_digest

TABLE = Path(__file__).with_name("programs.txt")
METRICS = Path(__file__).with_name("metrics.json")
LEAST = 60  # lines of a module; smaller ones are single operations, run by themselves
LORA = {"rank": 2, "targets": "attention/(query|value)"}
ONE_DEVICE, OTHER_DEVICES = {"data": 2, "devices": "0:2"}, {"data": 2, "devices": "2:4"}
ESTIMATORS = ("rloo", "grpo", "dr_grpo", "dapo", "reinforce")
DIRECT = ("dpo", "cdpo", "ipo", "kto", "orpo", "simpo")


def variants(conversations: Path, finished: Path) -> dict[str, dict[str, Any]]:
    """Returns the config of every variant by name; `finished` is the workdir of the tiny recipe."""
    config = to_dict(tiny.get_config(f"data={conversations},steps=2"))
    folders = recipe.stage_folders(config, finished)
    stages = {
        name: recipe.resolve(config[name], folders, name) for name in config["stages"]
    }
    ppo = stages["ppo"]
    preferences = (str(folders["collect"] / "preferences"),)
    sampling = {
        name: ppo[name] for name in ("prompt_length", "max_new_tokens", "temperature")
    }
    loop = {
        name: ppo[name]
        for name in ("steps", "eval_every", "checkpoint", "log", "optim")
    }
    held_out = ppo["eval_prompts"]
    plain = {"ptx": {"coefficient": 0.0}, "ema": 0.0}
    members = ({"reward": ppo["reward"]}, {"reward": "gold:sentiment", "weight": 0.5})
    twins = ({"reward": ppo["reward"]}, {"reward": ppo["reward"]})
    found = {
        "pretrain": stages["pretrain"],
        "sft": stages["sft"] | {"microbatches": 2},
        "sft lora": stages["sft"] | {"lora": LORA},
        "sft nf4": stages["sft"] | {"lora": {**LORA, "base": "nf4"}},
        "reward": stages["reward"],
        "reward before": stages["reward"]
        | {"normalize_before": "mean_std", "lora": LORA},
        "collect": stages["collect"],
        "compose": {"stage": "compose", "members": members},
        "ensemble": {"stage": "compose", "members": twins, "combine": "pessimistic"},
        "evaluate": stages["evaluate"],
        "recenter": {
            "stage": "recenter",
            "init_from": ppo["reward"],
            "policy": ppo["init_from"],
            "prompts": held_out,
            "batch_size": 8,
            **sampling,
        },
        "best_of_n": {
            "stage": "best_of_n",
            "init_from": ppo["init_from"],
            "proxy": ppo["reward"],
            "gold": "gold:sentiment",
            "prompts": held_out,
            "pool": 4,
            "batch_size": 8,
            **sampling,
        },
        "ppo": ppo,
        "ppo shared": ppo | plain | {"value": "shared", "value_head": "normal"},
        "ppo policy value": ppo
        | plain
        | {"value": "policy", "entropy_coefficient": 0.01},
        "ppo lora": ppo | {"lora": LORA, "behavior_logprobs": "forward"},
        "ppo int8": ppo | plain | {"lora": {**LORA, "base": "int8"}, "value": "policy"},
        "ppo one_step_off": ppo | {"one_step_off": True},
        "ppo slots": ppo | plain | {"decode_batch": 8},
        "ppo rollout_mesh": ppo | plain | {"rollout_mesh": {"data": 2, "tensor": 2}},
        "ppo frozen_mesh": ppo
        | plain
        | {"mesh": ONE_DEVICE, "frozen_mesh": OTHER_DEVICES},
        "ppo text": ppo | plain | {"reward": "gold:sentiment", "value": "policy"},
        "ppo human": ppo | plain | {"human": {"reward": ppo["reward"]}},
        "ppo compose": ppo | plain | {"reward": "compose", "value": "policy"},
        "ppo ensemble": ppo | plain | {"reward": "ensemble", "gold": ppo["reward"]},
        "ppo scores": ppo
        | plain
        | {
            "truncate": {"token": "▁", "after": 2},
            "missing_eos": "penalty",
            "score_clip": 1.0,
            "whiten_rewards": "minibatch",
            "whiten_advantages": "none",
            "target_kl": 0.1,
            "microbatches": 2,
        },
        "ppo kl loss": ppo
        | plain
        | {
            "kl": {"place": "loss", "estimator": "k3"},
            "whiten_advantages": "batch",
            "value_clip": 0.0,
        },
    }
    shared = set(ppo) - {
        "value",
        "value_head",
        "value_clip",
        "value_coefficient",
        "value_optim",
        "gamma",
        "lam",
    }
    shared -= {"whiten_rewards", "whiten_advantages", "clip"}
    group = {name: ppo[name] for name in shared}
    group |= plain | {
        "stage": "group",
        "batch_size": 4,
        "samples_per_prompt": 4,
        "epochs": 1,
    }
    for name in ESTIMATORS:
        found[f"group {name}"] = group | {"estimator": name}
    found["group dapo overlong"] = group | {
        "estimator": "dapo",
        "overlong": "leave_out",
        "overlong_soft": 2,
        "only_informative": True,
        "kl": {"place": "loss", "estimator": "k2"},
        "ema": 0.9,
    }
    found["group grpo kl"] = group | {
        "estimator": "grpo",
        "kl": {"place": "loss", "estimator": "grpo"},
    }
    direct = {
        "stage": "direct",
        "init_from": ppo["init_from"],
        "preferences": preferences,
    }
    direct |= {"length": 32, "batch_size": 8, **loop}
    for name in DIRECT:
        found[f"direct {name}"] = direct | {"loss": {"name": name}}
    found["direct precomputed"] = direct | {
        "reference_logprobs": "precomputed",
        "microbatches": 2,
    }
    found["direct lora"] = direct | {
        "lora": LORA,
        "loss": {"name": "kto"},
        "reference": ppo["init_from"],
    }
    feedback = Path(__file__).parents[2] / "experiments/quickstart/data/feedback.jsonl"
    found["tamer"] = {
        "stage": "tamer",
        "init_from": ppo["init_from"],
        "feedback": str(feedback),
        "held_out": str(feedback),
        "length": 32,
        "batch_size": 4,
        **loop,
    }
    return found


def run(
    values: dict[str, Any], workdir: Path, made: Path
) -> tuple[list[str], dict[str, float]]:
    """Runs a variant. Returns the digests of its larger programs, sorted, and its last metrics.

    Args:
      made: the folder in which variants named "compose" and "ensemble" have been run.
    """
    if values.get("reward") in ("compose", "ensemble"):
        values = values | {"reward": str(made / values["reward"])}
    digests: set[str] = set()
    compile_or_get_cached = jax_compiler.compile_or_get_cached

    def compiled(backend, module, *rest, **more):
        text = str(module)
        if text.count("\n") >= LEAST:
            digests.add(digest(text))
        return compile_or_get_cached(backend, module, *rest, **more)

    jax.clear_caches()
    with mock.patch.object(jax_compiler, "compile_or_get_cached", compiled):
        metrics = recipe.run_stage(values, workdir)
    return sorted(digests), metrics


MESH = re.compile(r"sdy.mesh @mesh = <\[(.*?)\]")
EMPTY_MESH = re.compile(r"\n  sdy.mesh @empty_mesh = .*")
DIMENSION = re.compile(r"\{[^{}]*\}")


def canonical(text: str) -> str:
    """Returns a module's text with each sharding spelled in one way.

    Mesh axes of size 1 are left out of shardings, and arrays without a mesh (keys) lie on the mesh:
    neither changes what is compiled.
    """
    if (mesh := MESH.search(text)) is None:
        return text
    sizes = dict(re.findall(r'"(\w+)"=(\d+)', mesh[1]))
    ones = [f'"{axis}"' for axis, size in sizes.items() if size == "1"]

    def dimension(match: re.Match[str]) -> str:
        axes = [axis for axis in match[0].strip("{}").split(", ") if axis not in ones]
        return "{" + ", ".join(axes) + "}"

    def sharding(match: re.Match[str]) -> str:
        return DIMENSION.sub(dimension, match[0]).replace("@empty_mesh", "@mesh")

    return re.sub(r"#sdy.sharding<@\w+, \[.*?\]>", sharding, EMPTY_MESH.sub("", text))


def digest(text: str) -> str:
    """Returns the digest of a module."""
    return module_digest(canonical(text))[:12]


def cpu() -> str:
    """Returns a digest of the CPU's model and features, which decide how XLA rounds sums."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    kinds = {
        line for line in lines if line.startswith(("model name", "flags", "Features"))
    }
    return hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()[:12]


def read() -> dict[str, list[str]]:
    """Returns the digests by variant; the first line names the version of jax."""
    lines = [
        line.partition(": ")
        for line in TABLE.read_text().splitlines()
        if not line.startswith("#")
    ]
    return {name: text.split() for name, _, text in lines}


def main(words: list[str]) -> None:
    from tests.conftest import write_conversations

    metrics_alone = "--metrics" in words
    words = [word for word in words if word != "--metrics"]
    known = read() if TABLE.exists() else {}
    metrics = json.loads(METRICS.read_text()) if METRICS.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(os.environ.get("FROZEN_WORLD", name))
        conversations, finished = folder / "conversations", folder / "finished"
        if not conversations.exists():
            write_conversations(conversations)
        recipe.run(to_dict(tiny.get_config(f"data={conversations}")), finished)
        for variant, values in variants(conversations, finished).items():
            needed = variant in ("compose", "ensemble")
            if words and not needed and not any(word in variant for word in words):
                continue
            known[variant], metrics[variant] = run(
                values, Path(name) / re.sub(r"\W", "_", variant), Path(name)
            )
            print(variant, len(known[variant]), flush=True)
    metrics["cpu"] = cpu()
    METRICS.write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    if metrics_alone:
        return
    rows = [f"{variant}: {' '.join(digests)}" for variant, digests in known.items()]
    head = ["# Written by python -m tests.frozen.programs", f"jax: {jax.__version__}"]
    TABLE.write_text(
        "\n".join([*head, *(row for row in rows if not row.startswith("jax:"))]) + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
