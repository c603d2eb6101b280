"""Workdirs that the version of commit 1e6a592 left half-run; tests/test_half_run.py resumes them.

tests/workdirs/half_run.tar.xz   a workdir per variant, stopped by SIGTERM and saved at step 2 of 4,
                                 and what they stand on: data/ (conversations, ranked completions),
                                 base/ (a policy and a reward model)
tests/workdirs/half_run.json     what uninterrupted runs of the same version ended with:
                                 {variant: {"metrics": ..., "arrays": {name: [sum, norm]}}}

    python -m tests.half_run     writes both, after it has resumed a copy of every workdir: that has
                                 to end with the bits of the uninterrupted run

Both were written with `rlhfjax/` as it is in 1e6a592. Written by a later version they would prove
nothing, so the command is only for a version that cannot resume older workdirs, which CHANGELOG.md
then says. To add a variant, copy this file into a checkout of 1e6a592 and run the command there.

Every path in a config is relative to the folder that holds the workdirs, so that it can be moved.
"""

import contextlib
import io
import json
import random
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from rlhfjax import recipe
from rlhfjax.config import to_dict
from rlhfjax.errors import Preempted
from rlhfjax.stages import stage_config
from tests.conftest import (
    WORDS,
    write_conversations,
)  # importing it sets the flags of the tests
from tests.test_resume import arrays, assert_same_stage, interrupt

FOLDER = Path(__file__).parent / "workdirs"
ARCHIVE, ENDS = FOLDER / "half_run.tar.xz", FOLDER / "half_run.json"
STEPS, STOPPED = 4, 2

POLICY, REWARD = "base/01_pretrain", "base/02_reward"
RANKED = "jsonl:data/ranked_{split}.jsonl"
OPTIM = {"learning_rate": 1e-2, "warmup_steps": 1}
LOOP = {
    "steps": STEPS,
    "eval_every": 2,
    "checkpoint": {"every": 2},
    "log": {"every": 1, "tensorboard": False},
    "mesh": {"devices": "0:1"},
    "optim": OPTIM,
}


# ------------------------------------------------------------------ configs


def variants() -> dict[str, ConfigDict]:
    """Returns {workdir: config}, each with every option present, as experiment files have them."""
    adaptive = {"coefficient": 0.1, "target": 1.0, "horizon": 80}
    text = {"coefficient": 0.5, "ratio": 1, "length": 32, "sources": (_chats("train"),)}
    lora = {"rank": 2, "alpha": 8.0, "targets": "attention/(query|value)|mlp/down"}
    reinforce = {"estimator": "reinforce", "samples_per_prompt": 4, "batch_size": 4}
    return {
        "pretrain": _pretrain(),
        "ppo_ema": _policy("ppo", value_optim=OPTIM, ema=0.5, kl=adaptive, ptx=text),
        "ppo_one_step_off": _policy("ppo", value_optim=OPTIM, one_step_off=True),
        "ppo_lora": _policy("ppo", value_optim=OPTIM, lora=lora),
        "group_reinforce": _policy("group", ema=0.5, kl=adaptive, **reinforce),
        "direct_dpo": _direct("dpo"),
        "direct_kto": _direct("kto"),
    }


def trained_folder(variant: str) -> Path:
    """Returns the workdir of the variant's half-run stage; `pretrain` is a recipe of two."""
    return Path(variant, "01_pretrain") if variant == "pretrain" else Path(variant)


def _chats(split: str) -> dict[str, str]:
    return {"spec": f"jsonl:data/{split}.jsonl", "kind": "messages", "split": "all"}


def _pretrain() -> ConfigDict:
    """A recipe: a tokenizer, and a model of 3,000 parameters."""
    model = {"vocab_size": 288, "d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 16}
    config = ConfigDict({"stages": ("tokenizer", "pretrain")})
    config.tokenizer = stage_config(
        "tokenizer", sources=(_chats("train"),), vocab_size=288
    )
    config.pretrain = stage_config(
        "pretrain",
        tokenizer="stage:tokenizer",
        model=model | {"max_length": 32},
        sources=(_chats("train"),),
        eval_sources=(_chats("validation"),),
        length=32,
        batch_size=8,
        data_shards=2,
        **LOOP,
    )
    return config


def _base() -> ConfigDict:
    """A recipe of what the other variants stand on."""
    config = _pretrain()
    config.stages = (*config.stages, "reward")
    ranked = {"preferences": (RANKED,), "length": 32, "batch_size": 8}
    config.reward = stage_config("reward", init_from="stage:pretrain", **ranked, **LOOP)
    return config


def _policy(stage: str, **options: Any) -> ConfigDict:
    common = {
        "init_from": POLICY,
        "reward": REWARD,
        "gold": "gold:sentiment",
        "prompts": {"source": _chats("train")},
        "eval_prompts": {"source": _chats("validation"), "limit": 8},
        "prompt_length": 16,
        "max_new_tokens": 8,
        "batch_size": 8,
        "epochs": 2,
        "minibatches": 2,
    }
    return stage_config(stage, **(common | LOOP | options))


def _direct(loss: str) -> ConfigDict:
    ranked = {"preferences": (RANKED,), "length": 32, "batch_size": 8}
    return stage_config(
        "direct", init_from=POLICY, loss={"name": loss}, **ranked, **LOOP
    )


# ------------------------------------------------------------------ what a run ends with


def end_of(variant: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Returns a finished run's last metrics and fingerprints of its models and adapters."""
    folder = trained_folder(variant)
    left = arrays(folder)
    adapter = folder / "adapter" / "adapter_model.safetensors"
    if adapter.exists():
        left |= {f"adapter/{name}": x for name, x in load_file(adapter).items()}
    return {
        "metrics": dict(metrics),
        "arrays": {name: _fingerprint(x) for name, x in left.items()},
    }


def _fingerprint(array: np.ndarray) -> list[float]:
    """Returns the sum and the Euclidean norm of an array, in float64."""
    x = np.asarray(array, np.float64)
    return [float(x.sum()), float(np.sqrt(np.square(x).sum()))]


# ------------------------------------------------------------------ the archive


def unpack(folder: Path) -> None:
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")


def make(scratch: Path) -> None:
    """Writes ARCHIVE and ENDS; `scratch` is an empty folder."""
    whole, half, resumed = (scratch / name for name in ("whole", "half", "resumed"))
    _write_data(whole / "data")
    with contextlib.chdir(whole):
        recipe.run(_base(), Path("base"))
    shutil.copytree(whole, half, ignore=shutil.ignore_patterns("checkpoints"))
    ends = {}
    for variant, config in variants().items():
        with contextlib.chdir(whole):
            ends[variant] = end_of(variant, recipe.run(config, Path(variant)))
        with contextlib.chdir(half):
            _run_half(config, Path(variant))
    shutil.copytree(half, resumed)
    for variant, config in variants().items():
        with contextlib.chdir(resumed):
            assert (
                end_of(variant, recipe.run(config, Path(variant))) == ends[variant]
            ), variant
        assert_same_stage(
            whole / trained_folder(variant), resumed / trained_folder(variant)
        )
    FOLDER.mkdir(exist_ok=True)
    _pack(half, ARCHIVE)
    ENDS.write_text(json.dumps(ends, indent=1, sort_keys=True) + "\n")


def _write_data(folder: Path) -> None:
    """Writes conversations, and rankings of completions by a number between -1 and 1."""
    write_conversations(folder, {"train": 60, "validation": 16})
    rng = random.Random(1)
    for split, n in (("train", 40), ("validation", 12)):
        rows = []
        for _ in range(n):
            texts = [
                " ".join(rng.choices(WORDS, k=rng.randint(1, 5))) for _ in range(4)
            ]
            scores = [round(rng.uniform(-1, 1), 2) for _ in texts[1:]]
            rows.append(
                {"prompt": texts[0], "completions": texts[1:], "scores": scores}
            )
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"ranked_{split}.jsonl").write_text("".join(lines))


def _run_half(config: ConfigDict, workdir: Path) -> None:
    """Runs until SIGTERM comes during step STOPPED, after which the loop saves and stops."""
    values = to_dict(config)
    stage = "pretrain" if "stages" in values else values["stage"]
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, stage, STOPPED - 1, "sigterm")
        with pytest.raises(Preempted, match=f"stopped at step {STOPPED} and was saved"):
            recipe.run(config, workdir)


def _pack(folder: Path, archive: Path) -> None:
    """Packs a folder without TensorBoard's events; nobody's name and no time in the headers."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:xz", preset=9) as tar:
        for path in sorted(folder.rglob("*")):
            if "tb" not in path.parts:
                tar.add(path, path.relative_to(folder), recursive=False, filter=plain)
    archive.write_bytes(memory.getvalue())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size} bytes")
