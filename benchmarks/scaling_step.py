"""One point of `benchmarks.scaling`: a stage's own steps, and what its programs need."""

import statistics
from typing import Any

from benchmarks import batches
from benchmarks.data_memory import resident
from benchmarks.stage_steps import Steps
from rlhfjax.models.config import TransformerConfig


def measure(
    workload: str, config: TransformerConfig, sizes: dict[str, Any], devices: int
) -> dict[str, float]:
    """Returns seconds, and MB, of a stage's steps on `devices` fake devices.

    With sizes["steps"] = 0 no step runs, and the compiled MB are all.
    """
    before = resident()
    name, values = stage_values(workload, sizes)
    # Parameters and batch are split over all devices.
    steps = Steps(name, values | {"mesh": {"fsdp": devices, "data": 1}}, config)
    if not sizes["steps"]:
        return {"compiled_mb": compiled_mb(steps)}
    make_batch = batches.MAKERS[workload](sizes, config.vocab_size)
    ticks = steps.run(make_batch, sizes["warmup"] + sizes["steps"])
    grown = resident("VmHWM") - before
    measured = slice(sizes["warmup"], None)
    return {
        "seconds": float(min(ticks.wall[measured])),
        "cpu_seconds": float(statistics.median(ticks.cpu[measured])),
        "compiled_mb": compiled_mb(steps),
        "resident_mb": grown,
        "first_seconds": float(ticks.wall[0]),
    }


def compiled_mb(steps: Steps) -> float:
    """Returns the MB per device at the peak of the step's largest program."""
    return max(program.needed for program in steps.plan().programs) / 1e6


def stage_values(workload: str, sizes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the stage of a workload and its options."""
    loop = {"steps": 100, "microbatches": sizes["microbatches"]}
    if workload == "pretrain":
        size = {"batch_size": sizes["batch"], "length": sizes["seq"]}
        return "pretrain", loop | size
    size = {"prompt_length": sizes["prompt"], "max_new_tokens": sizes["new"]}
    groups = {
        "estimator": "grpo",
        "batch_size": sizes["prompts"],
        "samples_per_prompt": sizes["group"],
        "kl": {"coefficient": sizes["kl"], "place": "loss", "estimator": "grpo"},
    }
    return "group", loop | size | groups
