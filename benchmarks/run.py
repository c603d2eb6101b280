"""Measures the speed of one workload with one model, and prints one JSON line.

    python -m benchmarks.run --workload=pretrain --shape=tiny

The stages are built by their own `build` and run by the loop of `rlhfjax train`. Only their data
are replaced, by random full sequences, so that nothing is padded. The time of a step is that from
one request for data to the next.
"""

import dataclasses
import logging
import os
import resource
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from absl import app, flags

from benchmarks import batches
from rlhfjax import host_memory, json_text, precision, recipe, stages, train
from rlhfjax.data.preferences import write_preferences
from rlhfjax.data.tokenizer import train_sentencepiece
from rlhfjax.interop import store
from rlhfjax.mesh import make_layout
from rlhfjax.models.presets import preset
from rlhfjax.models.transformer import Model
from rlhfjax.rl import task
from rlhfjax.rl.rollout import sample
from rlhfjax.sampling import Sampling
from rlhfjax.stages import stage_config

SPEC = json_text.read(Path(__file__).parent / "workloads.json", json_text.Object)
WORKLOAD = flags.DEFINE_enum(
    "workload", None, list(SPEC["workloads"]), "what to time", required=True
)
SHAPE = flags.DEFINE_enum("shape", "tiny", ["tiny", "small"], "model preset")
DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["auto", "float32", "bfloat16", "bfloat16_products"],
    "dtype of the model; auto: the one that a stage would choose here",
)
MICROBATCHES = flags.DEFINE_integer("microbatches", 0, "0: the workload's own number")
STEPS = flags.DEFINE_integer("steps", 0, "measured steps; 0: the workload's own number")
WARMUP = flags.DEFINE_integer(
    "warmup", -1, "steps left out before them; -1: the workload's own number"
)


class Meter:
    """Records wall and CPU time at every step boundary, and the time spent in generation."""

    def __init__(self) -> None:
        self.ticks: list[tuple[float, float]] = []
        self.spans: list[tuple[float, float]] = []

    def tick(self) -> None:
        self.ticks.append((time.perf_counter(), time.process_time()))

    def timed(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            jax.block_until_ready(
                (args, kwargs)
            )  # the step before may still be running
            start = time.perf_counter()
            out = jax.block_until_ready(function(*args, **kwargs))
            self.spans.append((start, time.perf_counter() - start))
            return out

        return call


class Data:
    """Yields batches without end; each request for a batch is a step boundary."""

    def __init__(self, make: Any, meter: Meter):
        self._make, self._meter = make, meter
        self._rng = np.random.default_rng(0)

    def __next__(self) -> Any:
        self._meter.tick()
        return self._make(self._rng)

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: Any) -> None:
        pass


def even_share(tokens: Any, segments: Any, mask: Any) -> np.ndarray:
    """Returns the share of even ids in a response: the reward of grpo, computed on the host."""
    del segments
    responses, mask = np.asarray(tokens)[:, -mask.shape[1] :], np.asarray(mask)
    return ((responses % 2 == 0) * mask).sum(1) / mask.sum(1)


def prepare(folder: Path, shape: Any) -> None:
    """Writes the files that stages open: a tokenizer, a conversation, a ranking, random models."""
    rng = np.random.default_rng(0)
    text = [" ".join(map(str, rng.integers(0, 1000, 20))) for _ in range(200)]
    tokenizer = train_sentencepiece(text, folder, vocab_size=274)
    turns = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]
    chats = folder / "chats.jsonl"
    chats.write_text(json_text.encode({"messages": turns}, chats) + "\n")
    row = {"prompt": "1", "completions": ["2", "3"], "scores": [1.0, 0.0]}
    row |= {
        "prompt_tokens": tokenizer.encode("1"),
        "completion_tokens": [tokenizer.encode(t) for t in "23"],
    }
    write_preferences(
        folder / "preferences",
        {"train": [row], "validation": [row]},
        labeler="made up",
    )
    for head in ("lm", "scalar"):
        model = Model(shape, head)
        params = jax.jit(model.init)(jax.random.key(0))
        store.save(folder / head, store.SavedModel(model, params, tokenizer))


def stage_values(
    workload: str, folder: Path, w: dict[str, Any], steps: int
) -> dict[str, Any]:
    chats = {"spec": f"jsonl:{folder}/chats.jsonl", "kind": "messages", "split": "all"}
    micro = MICROBATCHES.value or w["microbatches"]
    loop = {
        "steps": steps,
        "microbatches": micro,
        "log": {"every": 10**9, "samples_every": 0, "tensorboard": False},
        "optim": SPEC["optimizer"],
    }
    if workload in ("pretrain", "sft"):
        data = {
            "sources": (chats,),
            "eval_sources": (chats,),
            "batch_size": w["batch"],
            "length": w["seq"],
        }
        return {"init_from": f"{folder}/lm", **data, **loop}
    if workload == "rm":
        data = {
            "preferences": (f"{folder}/preferences",),
            "batch_size": w["pairs"],
            "length": w["seq"],
        }
        return {"init_from": f"{folder}/lm", **data, **loop}
    policy_options = {
        "init_from": f"{folder}/lm",
        "reward": f"{folder}/scalar",
        "prompts": {"source": chats},
        "eval_prompts": {"source": chats},
        "prompt_length": w["prompt"],
        "max_new_tokens": w["new"],
        "stop_at_eos": False,  # as the peers: no response ends early
        "epochs": w["epochs"],
        "minibatches": w["minibatches"],
        **loop,
    }
    if workload == "grpo":
        groups = {
            "estimator": "grpo",
            "batch_size": w["prompts"],
            "samples_per_prompt": w["group"],
        }
        return (
            policy_options
            | groups
            | {"kl": {"coefficient": w["kl"], "place": "loss", "estimator": "grpo"}}
        )
    kl = {"coefficient": w["kl"]}
    return policy_options | {
        "batch_size": w["batch"],
        "kl": kl,
        "value_optim": SPEC["optimizer"],
    }


def run_stage(workload: str, shape: Any, w: dict[str, Any], meter: Meter) -> None:
    """Trains a stage for warmup + steps steps, and one more, whose start ends the last one."""
    name = {"rm": "reward", "grpo": "group"}.get(workload, workload)
    make = batches.MAKERS[workload](w, shape.vocab_size)
    layout = make_layout()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, shape)
        values = stage_config(
            name, **stage_values(workload, folder, w, w["warmup"] + w["steps"] + 1)
        )
        config = recipe.check(values, name)
        module = stages.find(name)
        if workload in ("ppo", "grpo"):
            make_sampler = module.make_sampler
            module.make_sampler = lambda *args: meter.timed(make_sampler(*args))
        if workload == "grpo":
            task.load_reward = lambda *_: even_share
        with layout.use():
            stage = module.build(config, layout)

        def open_data() -> Any:
            return stage.open()._replace(
                batches=Data(make, meter), evals=lambda state: {}
            )

        train.run(
            dataclasses.replace(stage, open=open_data), config, folder / "run", layout
        )


def run_generate(shape: Any, w: dict[str, Any], meter: Meter) -> None:
    """Measures the sampler as rollouts, `collect` and `evaluate` call it."""
    model = Model(shape)
    params = jax.jit(model.init)(jax.random.key(0))
    data = Data(batches.prompts(w, shape.vocab_size), meter)
    sampling = Sampling(max_new_tokens=w["new"], eos_id=2, pad_id=0)
    for step in range(w["warmup"] + w["steps"] + 1):
        batch = next(data).prompts
        key = jax.random.key(step)
        jax.block_until_ready(
            sample(
                model,
                params,
                batch.tokens,
                batch.attention_mask,
                key,
                sampling=sampling,
            )
        )


def flops(workload: str, shape: Any, w: dict[str, Any]) -> float:
    """Returns a step's FLOPs: 6 N per trained token, 2 N per forward token, without attention."""
    d, trunk = (
        shape.d_model,
        shape.n_layers
        * (
            2 * shape.d_model**2 * (1 + shape.kv_heads / shape.n_heads)
            + 3 * shape.d_model * shape.d_ff
        ),
    )
    output = shape.vocab_size * d
    if workload in ("pretrain", "sft"):
        return 6 * (trunk + output) * w["batch"] * w["seq"]
    if workload == "rm":
        return 6 * trunk * 2 * w["pairs"] * w["seq"]
    total, new = w["batch"] * (w["prompt"] + w["new"]), w["batch"] * w["new"]
    forward = 2 * trunk * total + 2 * output * new
    if workload == "generate":
        return forward
    if workload == "grpo":
        return 2 * forward + 3 * forward
    scores = 2 * trunk * total
    return 3 * forward + 2 * scores + w["epochs"] * 3 * (forward + scores)


def report(
    workload: str, shape: Any, w: dict[str, Any], meter: Meter
) -> dict[str, Any]:
    wall, cpu = (np.diff([t[i] for t in meter.ticks]) for i in (0, 1))
    measured, used = wall[w["warmup"] :], cpu[w["warmup"] :]
    median = statistics.median(measured)
    units = (
        w["pairs"] if workload == "rm" else w["batch"] * w.get("new", w.get("seq", 1))
    )
    out = {
        "peer": "rlhfjax",
        "workload": workload,
        "shape": SHAPE.value,
        "dtype": shape.dtype,
        w["metric"]: round(units / median, 1),
        "n_steps": len(measured),
        "median": round(median, 4),
        "min": round(float(measured.min()), 4),
        "max": round(float(measured.max()), 4),
        "first_step_s": round(float(wall[0]), 2),
        "gflops": round(flops(workload, shape, w) / median / 1e9, 2),
        "cpu_s_median": round(statistics.median(used), 4),
        "cpu_per_wall": round(float(used.sum() / measured.sum()), 2),
    }
    if workload in ("ppo", "grpo"):
        begin, end = meter.ticks[w["warmup"]][0], meter.ticks[-1][0]
        spent = sum(seconds for start, seconds in meter.spans if begin <= start < end)
        out["generation_share"] = round(spent / (end - begin), 3)
    out["peak_rss_mb"] = round(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    out["loadavg_1m"] = round(os.getloadavg()[0], 2)
    out["versions"] = {p: metadata.version(p) for p in ("rlhfjax", "jax", "flax")}
    return out


def main(argv: list[str]) -> None:
    del argv
    logging.getLogger("absl").setLevel(logging.ERROR)
    host_memory.release_after_compiling()  # as recipe.run_stage does
    w = dict(SPEC["workloads"][WORKLOAD.value])
    w["steps"] = STEPS.value or w["steps"]
    w["warmup"] = w["warmup"] if WARMUP.value < 0 else WARMUP.value
    dtype = precision.here() if DTYPE.value == precision.AUTO else DTYPE.value
    shape, meter = preset(SHAPE.value, dtype=dtype), Meter()
    if WORKLOAD.value == "generate":
        run_generate(shape, w, meter)
    else:
        run_stage(WORKLOAD.value, shape, w, meter)
    measured = json_text.null_nonfinite(report(WORKLOAD.value, shape, w, meter))
    print(json_text.encode(measured, WORKLOAD.value), flush=True)


if __name__ == "__main__":
    app.run(main)
