"""The parts of `benchmarks.accelerator`. Each runs in a separate process and returns JSON values.

Nothing here is done at import but imports: the processes are forked off one that has imported this
module and has not started a device.
"""

import dataclasses
import os
import signal
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import batches
from benchmarks.stage_steps import Steps, program_seconds
from rlhfjax import paths, train
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.presets import preset
from rlhfjax.models.size import kv_cache_bytes, parameters
from rlhfjax.models.transformer import Model
from rlhfjax.plan import chips
from rlhfjax.rl.rollout import sample
from rlhfjax.sampling import Sampling
from rlhfjax.stage import Data, Finished

Result = dict[str, Any]
KERNELS = {"gpu": "cudnn", "tpu": "splash"}
_TIMED = 3  # calls or steps of which the median is reported


class Sizes(NamedTuple):
    """Presets and numbers of tokens, on one device."""

    small: str  # the 124M model
    large: str  # the 1B model
    rows: int  # sequences of the small model
    large_rows: int
    length: int
    large_length: int
    decode: tuple[int, ...]  # batches of generation
    prompt: int
    new: int
    episodes: int


FULL = Sizes(
    small="gpt2-124m",
    large="llama3.2-1b",
    rows=32,
    large_rows=8,
    length=1024,
    large_length=2048,
    decode=(1, 64, 8, 256),
    prompt=128,
    new=128,
    episodes=64,
)
TINY = Sizes(
    small="tiny",
    large="tiny",
    rows=4,
    large_rows=4,
    length=32,
    large_length=32,
    decode=(1, 2, 3, 4),
    prompt=8,
    new=8,
    episodes=8,
)


def model_config(name: str, sizes: Sizes, **changes: Any) -> TransformerConfig:
    """Returns the preset as this device trains it: bf16, its own kernel, scanned layers."""
    fields: dict[str, Any] = {
        "dtype": "bfloat16",
        "attention": KERNELS.get(jax.default_backend(), "einsum"),
        "scan_layers": True,
        "dropout": 0.0,
    }
    if sizes == TINY:
        fields |= {"n_layers": 1, "vocab_size": 256}
    return preset(name, **(fields | changes))


def device() -> Result:
    """Returns the name, the number and the peaks of the devices."""
    first = jax.devices()[0]
    chip = chip_of(first.device_kind)
    peak = "unknown peak"
    if chip is not None:
        peak = f"{chip.flops / 1e12:.0f} TFLOP/s, {chip.hbm_bandwidth / 1e12:.2f} TB/s"
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "devices": jax.device_count(),
        "chip": chip.name if chip else None,
        "peak": peak,
    }


def chip_of(device_kind: str) -> chips.Chip | None:
    """Returns the chip of a device; None if its peaks are unknown."""
    find: Callable[[str], chips.Chip | None] | None = getattr(chips, "chip_of", None)
    return find(device_kind) if find else None


def chip_count(chip: chips.Chip) -> float:
    return jax.device_count() / chip.devices


def norm(tree: Any) -> float:
    squares = [
        np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree)
    ]
    return float(np.sqrt(sum(squares)))


def median_seconds(call: Callable[[], Any]) -> float:
    """Returns the median seconds of a call, after one that compiles."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(_TIMED):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# ------------------------------------------------------------------ training


def training(stage: str, model: str, sizes: Sizes) -> Result:
    """Measures steps of pretrain, sft or reward with the small or the large model."""
    is_large = model == "large"
    config = model_config(getattr(sizes, model), sizes)
    rows = sizes.large_rows if is_large else sizes.rows
    rows *= jax.device_count()
    length = sizes.large_length if is_large else sizes.length
    values = {"batch_size": rows, "length": length, "steps": 100}
    steps = Steps(stage, values, config)
    given = {"batch": rows, "pairs": rows, "seq": length}
    if stage == "sft":
        given["prompt"] = length // 2
    name = {"reward": "rm"}.get(stage, stage)
    ticks = steps.run(batches.MAKERS[name](given, config.vocab_size), _TIMED + 1)
    seconds = float(statistics.median(ticks.wall[1:]))
    per_step = rows * length * (2 if stage == "reward" else 1)
    result = {
        "parameters": parameters(config),
        "tokens_per_step": per_step,
        "seconds": seconds,
        "tokens_per_s": per_step / seconds,
        "first_step_s": float(ticks.wall[0]),
    }
    return result | memory(steps, seconds)


def memory(steps: Steps, seconds: float) -> Result:
    """Returns the peak on a device beside plan's, and the step's MFU if the peak is known.

    A plan that fails is reported and costs no measurement.
    """
    stats = jax.devices()[0].memory_stats() or {}
    result: Result = {"peak_gb": None, "plan_gb": None, "mfu": None}
    if peak := stats.get("peak_bytes_in_use"):
        result["peak_gb"] = peak / 1e9
    try:
        plan = steps.plan()
    except Exception as error:  # of any compiler
        return result | {"plan_error": f"{type(error).__name__}: {error}"[:300]}
    result["plan_gb"] = max(program.needed for program in plan.programs) / 1e9
    flops = sum(program.model_flops for program in plan.programs)
    result["model_flops"] = flops
    if chip := chip_of(jax.devices()[0].device_kind):
        result["mfu"] = chips.mfu(flops, seconds, chip_count(chip), chip)
    return result


# ------------------------------------------------------------------ sampling


def generation(rows: int, sizes: Sizes) -> Result:
    """Measures a decode step of the large model on one device.

    A step's least traffic is every weight that a token is computed with, in bf16, and the cache at
    its mean length.
    """
    config = model_config(sizes.large, sizes)
    model = Model(config)
    with make_layout(MeshConfig(devices="0:1")).use():
        params = jax.jit(model.init)(jax.random.key(0))
        prompts = jnp.full((rows, sizes.prompt), 5, jnp.int32)
        mask = jnp.ones_like(prompts)

        def seconds(new: int) -> float:
            sampling = Sampling(max_new_tokens=new, eos_id=-1, pad_id=0)
            key = jax.random.key(1)
            return median_seconds(
                lambda: sample(model, params, prompts, mask, key, sampling=sampling)
            )

        whole, prefill = seconds(sizes.new), seconds(1)
    step = (whole - prefill) / (sizes.new - 1)
    moved = 2.0 * decoded_parameters(config)
    moved += float(kv_cache_bytes(config, rows, sizes.prompt + sizes.new // 2))
    result = {
        "new_tokens_per_s": rows * sizes.new / whole,
        "prefill_s": prefill,
        "decode_step_s": step,
        "least_gb_per_step": moved / 1e9,
        "gb_per_s": moved / step / 1e9,
        "bandwidth_share": None,
    }
    if chip := chip_of(jax.devices()[0].device_kind):
        bandwidth = chip.hbm_bandwidth / chip.devices
        result["bandwidth_share"] = moved / step / bandwidth
    return result


def decoded_parameters(config: TransformerConfig) -> int:
    """Returns the parameters that a decode step reads; of an untied embedding only its rows."""
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.d_model
    return parameters(config) - embedding


# ------------------------------------------------------------------ policies


def policy(stage: str, sizes: Sizes) -> Result:
    """Measures an iteration of ppo or group (GRPO) with the small model, split by program."""
    config = model_config(sizes.small, sizes)
    episodes = sizes.episodes * jax.device_count()
    values: dict[str, Any] = {
        "batch_size": episodes,
        "prompt_length": sizes.prompt,
        "max_new_tokens": sizes.new,
        "steps": 100,
    }
    given = {"batch": episodes, "prompt": sizes.prompt}
    if stage == "group":
        groups = {"batch_size": episodes // 4, "samples_per_prompt": 4}
        values |= groups | {"estimator": "grpo"}
        given |= {"prompts": episodes // 4, "group": 4}
    else:
        values["minibatches"] = 4
    steps = Steps(stage, values, config)
    with program_seconds() as seconds:
        ticks = steps.run(batches.prompts(given, config.vocab_size), 2)
    # The calls of the second iteration; those of the first compiled.
    split = {name: sum(calls[len(calls) // 2 :]) for name, calls in seconds.items()}
    whole = float(ticks.wall[1])
    result = {
        "seconds": whole,
        "response_tokens_per_s": episodes * sizes.new / whole,
        "first_step_s": float(ticks.wall[0]),
        "programs": split,
    }
    return result | memory(steps, whole)


# ------------------------------------------------------------------ resume


class Numbered:
    """Batches that depend on the step alone; kills the process before one of them."""

    def __init__(self, make: batches.Make, kill_at: int):
        self._make, self._kill_at, self._step = make, kill_at, 0

    def __next__(self) -> Any:
        if self._kill_at and self._step == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self._step += 1
        return self._make(np.random.default_rng(self._step))

    def get_state(self) -> Result:
        return {"step": self._step}

    def set_state(self, state: Result) -> None:
        self._step = state["step"]


def resumable(folder: str, kill_at: int, sizes: Sizes) -> Result:
    """Trains the small model for 6 steps with a checkpoint at every second one.

    Args:
      folder: the workdir; a checkpoint in it is resumed.
      kill_at: the step that SIGKILL comes before; 0: never.
    Returns:
      The last loss and the norm of the trained parameters, in hexadecimal.
    """
    config = model_config(sizes.small, sizes)
    rows, length = 2 * jax.device_count(), min(sizes.length, 128)
    values = {
        "batch_size": rows,
        "length": length,
        "steps": 6,
        "checkpoint": {"every": 2},
        "log": {"every": 1, "tensorboard": False},
    }
    steps = Steps("pretrain", values, config)
    make = batches.packed({"batch": rows, "seq": length}, config.vocab_size)

    def finish(state: Any) -> Finished:
        squares = norm(jax.device_get(state.params))
        return Finished(models={}, metrics={"norm": (squares, 1.0)}, files={})

    data = Data(batches=Numbered(make, kill_at), evals=lambda state: {}, finish=finish)
    stage = dataclasses.replace(steps.stage, open=lambda: data)
    last = train.run(stage, steps.config, paths.path(folder), steps.layout)
    kept = ("pretrain/loss", "pretrain/norm")
    return {name: float(last[name]).hex() for name in kept}
