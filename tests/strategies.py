"""Every stage that trains on every strategy: 8 devices that XLA makes of one CPU against one.

  python -m tests.strategies [--stages=sft,ppo] [--strategies=data,fsdp]

prints a JSON line for each pair:

metrics    the largest |a - b| / max(1, |a|) of all metrics, losses among them, of two steps, and
the `worst` of them params     the largest |a - b| of all parameters after them; `moved`, how far
one of them went in these steps share      of the parameters and optimizer moments of two or more
dimensions, the largest share that a device has
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from rlhfjax import recipe, stages, state
from rlhfjax.config import to_dict
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.metrics import finalize
from tests import tiny

# One row a strategy: what a config says.
STRATEGIES = {
    "data": {"strategy": "data"},
    "fsdp": {"strategy": "fsdp"},
    "fsdp_tensor": {"strategy": "fsdp_tensor", "tensor": 2},
    "context": {"strategy": "context", "tensor": 2, "sequence": 2},
    "hsdp": {"strategy": "hsdp", "replica": 2},
}
STAGES = ("pretrain", "sft", "reward", "direct", "ppo", "group")
SGD = {"name": "sgd", "learning_rate": 0.1, "b1": 0.9, "schedule": "constant"}
STEPS = 2


def stage_values(name: str, data: Path, workdir: Path) -> dict:
    """A stage of the tiny recipe, on what its run in `workdir` left; batches that 8 devices share.

    SGD: a step in proportion to the gradient. Adam's first steps are of one size whatever the
      gradient is, so that the
    rounding of a gradient that is nearly 0 would decide about their sign.
    """
    config = to_dict(tiny.get_config(f"data={data}"))
    folders = recipe.stage_folders(config, workdir)
    base = {"direct": "reward", "group": "ppo"}.get(name, name)
    values = recipe.resolve(config[base], folders, base) | {"optim": SGD}
    if name == "direct":
        keep = ("init_from", "preferences", "length", "batch_size", "optim", "steps")
        values = {k: values[k] for k in keep} | {
            "stage": "direct",
            "loss": {"name": "dpo"},
        }
    if name == "group":
        drop = (
            "value",
            "value_head",
            "gamma",
            "lam",
            "value_optim",
            "value_clip",
            "value_coefficient",
            "ptx",
            "kl",
        )
        values = {
            k: v
            for k, v in values.items()
            if k not in drop and not k.startswith("whiten")
        }
        values |= {
            "stage": "group",
            "estimator": "grpo",
            "samples_per_prompt": 2,
            "batch_size": 8,
            "clip": 0.2,
        }
    if name in ("ppo", "group"):
        values |= {"minibatches": 2, "epochs": 1}
    if name == "ppo":
        values |= {"value_optim": SGD}
    return values


def run_steps(values: dict, mesh: dict, devices: list) -> tuple:
    """Two steps: metrics, parameters before and after, and what share of each matrix of the state a
    device holds.
    """
    config = recipe.check(values | {"mesh": mesh}, values["stage"])
    layout = make_layout(MeshConfig(**mesh), devices)
    with layout.use():
        stage = stages.find(config.stage).build(config, layout)
        key = jax.random.key(config.seed)
        current = stage.start(state.create_sharded(stage.init, key, stage.axes, layout))
        metrics, before = [], jax.device_get(current.params)
        for step in range(STEPS):
            batch = layout.put(next(stage.batches))
            current, pairs = stage.step(current, batch, jax.random.fold_in(key, step))
            metrics.append(finalize(jax.device_get(pairs)))
    matrices = [
        x for x in jax.tree.leaves((current.params, current.opt_state)) if x.ndim >= 2
    ]
    shares = [x.addressable_shards[0].data.size / x.size for x in matrices]
    return metrics, before, jax.device_get(current.params), shares


def compare(one: tuple, many: tuple) -> dict:
    assert [m.keys() for m in one[0]] == [m.keys() for m in many[0]]
    gaps = {
        k: abs(a[k] - b[k]) / max(1.0, abs(a[k]))
        for a, b in zip(one[0], many[0], strict=True)
        for k in a
    }
    worst = max(gaps, key=lambda k: gaps[k])
    params = {"params": furthest(one[2], many[2]), "moved": furthest(one[1], one[2])}
    return {"metrics": gaps[worst], "worst": worst, **params, "share": max(many[3])}


def furthest(a: dict, b: dict) -> float:
    return max(
        jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b))
    )


def cells(names: list[str], strategies: list[str], workdir: Path):
    """A dict for every stage and strategy."""
    data = workdir / "conversations"
    for name in names:
        values = stage_values(name, data, workdir / "finished")
        one = run_steps(values, {}, jax.devices()[:1])
        for strategy in strategies:
            many = run_steps(values, STRATEGIES[strategy], jax.devices())
            yield {"stage": name, "strategy": strategy, **compare(one, many)}


def prepare(workdir: Path) -> Path:
    """The tiny recipe up to its preferences and reward, where they are not there yet."""
    from tests.conftest import write_conversations

    if not (workdir / "finished").exists():
        write_conversations(workdir / "conversations")
        config = to_dict(tiny.get_config(f"data={workdir / 'conversations'}"))
        config["stages"] = [s for s in config["stages"] if s not in ("ppo", "evaluate")]
        recipe.run(
            {k: v for k, v in config.items() if k not in ("ppo", "evaluate")},
            workdir / "finished",
        )
    return workdir


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--workdir", type=Path)
    options = parser.parse_args()
    workdir = prepare(options.workdir or Path(tempfile.mkdtemp()))
    for cell in cells(
        options.stages.split(","), options.strategies.split(","), workdir
    ):
        print(json.dumps(cell), flush=True)


if __name__ == "__main__":
    sys.exit(main())
