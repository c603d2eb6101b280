"""Measures sampling against the machine's limits, and the gain of continuous batching.

    python -m benchmarks.sampler            prints a Markdown table

Everything runs in one process, in rounds that measure each variant in turn; the table has medians.
The machine's limits (a copy, a matrix product) are measured in the same rounds. A decode step must
read every weight and the whole cache once, and needs 2 FLOPs per weight and row, and 4 per head
width and cache position. The roofline is the longer of the two times.

Response lengths with a long tail come from a rule on the eos: at every step its logit is set such
that its probability is 1 / mean. Lengths are then geometric with that mean, up to max_new_tokens.
Both ways of batching sample the same tokens.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.presets import preset
from rlhfjax.models.transformer import Model
from rlhfjax.sampling import Samples, Sampling, generate

PAD, EOS = 0, 2
ROWS, PROMPT, NEW = 64, 64, 64  # the workload `generate` of benchmarks.run
COPY, SQUARE = 2**26, 2048  # float32 numbers copied; side of the matrices
TAIL = {"prompts": 256, "decode_batch": 32, "mean": 32, "new": 192}
SHARED = {"prompts": 16, "samples_per_prompt": 4, "prompt": 192}


@dataclasses.dataclass(frozen=True)
class LongTail(Model):
    """A model whose responses end with probability 1 / mean at every step."""

    mean: int = TAIL["mean"]

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        logits = super().logits(params, hidden).at[..., EOS].set(-jnp.inf)
        rest = jax.nn.logsumexp(logits, axis=-1)
        return logits.at[..., EOS].set(rest - jnp.log(self.mean - 1.0))


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("new", "eos", "samples_per_prompt", "decode_batch"),
)
def sample(
    model: Model, params: Any, prompts: jax.Array, keys: jax.Array, **how: Any
) -> Samples:
    sampling = Sampling(
        max_new_tokens=how["new"],
        eos_id=how.get("eos", -1),
        pad_id=PAD,
        samples_per_prompt=how.get("samples_per_prompt", 1),
        decode_batch=how.get("decode_batch", 0),
    )
    attention_mask = jnp.ones_like(prompts)
    return generate(model, params, prompts, attention_mask, keys, sampling)


def step_cost(shape: TransformerConfig, rows: int, places: int) -> tuple[float, float]:
    """Returns the (FLOPs, bytes) that a decode step in float32 needs at least."""
    c = shape
    heads, keys = c.n_heads * c.head_dim, c.kv_heads * c.head_dim
    mlp = (3 if c.mlp == "swiglu" else 2) * c.d_model * c.d_ff
    weights = (
        c.n_layers * (c.d_model * 2 * (heads + keys) + mlp) + c.vocab_size * c.d_model
    )
    cached = rows * places * c.n_layers * keys
    return 2.0 * weights * rows + 4.0 * rows * places * c.n_layers * heads, 4.0 * (
        weights + 2 * cached
    )


def ceilings() -> dict[str, Callable[[], Any]]:
    """Returns a copy and a matrix product to be timed."""
    x, a = jnp.ones(COPY), jax.random.normal(jax.random.key(0), (SQUARE, SQUARE))
    state, add, product = (
        [x],
        jax.jit(lambda x: x + 1, donate_argnums=0),
        jax.jit(jnp.matmul),
    )

    def copy() -> jax.Array:
        state[0] = add(state[0])  # one read, one write, no new buffer
        return state[0]

    return {"copy": copy, "product": lambda: product(a, a)}


def workloads(shape: TransformerConfig) -> dict[str, Callable[[], Any]]:
    model, params = Model(shape), jax.jit(Model(shape).init)(jax.random.key(0))
    tailed = LongTail(shape)

    def prompts(n: int, length: int = PROMPT) -> jax.Array:
        return jax.random.randint(
            jax.random.key(1), (n, length), 4, shape.vocab_size, dtype=jnp.int32
        )

    def keys(n: int) -> jax.Array:
        return jax.random.split(jax.random.key(2), n)

    plain, many = (
        (prompts(ROWS), keys(ROWS)),
        (prompts(TAIL["prompts"]), keys(TAIL["prompts"])),
    )
    few, samples_per_prompt, decode_batch = (
        prompts(SHARED["prompts"], SHARED["prompt"]),
        SHARED["samples_per_prompt"],
        TAIL["decode_batch"],
    )
    repeated, drawn = (
        jnp.repeat(few, samples_per_prompt, axis=0),
        keys(SHARED["prompts"] * samples_per_prompt),
    )

    def in_batches() -> list[Samples]:
        parts = [
            [x[i : i + decode_batch] for x in many]
            for i in range(0, TAIL["prompts"], decode_batch)
        ]
        return [
            sample(tailed, params, *part, new=TAIL["new"], eos=EOS) for part in parts
        ]

    return {
        "prefill": lambda: sample(model, params, *plain, new=1),
        "generate": lambda: sample(model, params, *plain, new=NEW),
        "static": in_batches,
        "at once": lambda: sample(tailed, params, *many, new=TAIL["new"], eos=EOS),
        "continuous": lambda: sample(
            tailed, params, *many, new=TAIL["new"], eos=EOS, decode_batch=decode_batch
        ),
        "repeated": lambda: sample(model, params, repeated, drawn, new=NEW),
        "shared": lambda: sample(
            model, params, few, drawn, new=NEW, samples_per_prompt=samples_per_prompt
        ),
    }


def medians(todo: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns median seconds of each variant. The first round compiles and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in todo}
    for _ in range(rounds + 1):
        for name, run in todo.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def lengths(todo: dict[str, Callable[[], Any]]) -> np.ndarray:
    """Returns the response lengths, [prompts]. Raises AssertionError if the variants differ."""
    parts = todo["static"]()
    static = np.concatenate([np.asarray(part.tokens) for part in parts])
    for name in ("at once", "continuous"):
        np.testing.assert_array_equal(todo[name]().tokens, static)
    return np.concatenate([np.asarray(part.mask) for part in parts]).sum(1)


def table(shape: TransformerConfig, t: dict[str, float], drawn: np.ndarray) -> str:
    bandwidth, peak = 8.0 * COPY / t["copy"], 2.0 * SQUARE**3 / t["product"]
    step = (t["generate"] - t["prefill"]) / (NEW - 1)
    flops, moved = step_cost(shape, ROWS, PROMPT + NEW - 1)
    best = max(flops / peak, moved / bandwidth)
    rows = drawn.reshape(-1, TAIL["decode_batch"])
    useful = drawn.sum() / (rows.max(1).sum() * TAIL["decode_batch"])
    lines = [
        ("this machine: a copy", f"{bandwidth / 1e9:.1f} GB/s"),
        (
            f"this machine: a product of {SQUARE} x {SQUARE}",
            f"{peak / 1e9:.0f} GFLOP/s",
        ),
        (
            f"{ROWS} prompts of {PROMPT}, {NEW} new each",
            f"{ROWS * NEW / t['generate']:,.0f} new tokens/s",
        ),
        (
            "... of it the prefill",
            f"{t['prefill'] * 1e3:.0f} of {t['generate'] * 1e3:.0f} ms",
        ),
        (
            "a decode step",
            f"{step * 1e3:.2f} ms: {flops / 1e6:.0f} MFLOP, {moved / 1e6:.1f} MB",
        ),
        (
            "... its roofline",
            f"{best * 1e3:.2f} ms (compute {flops / peak * 1e3:.2f}, memory "
            f"{moved / bandwidth * 1e3:.2f}): "
            f"{best / step:.0%} of it reached",
        ),
        (
            f"{len(drawn)} prompts, geometric lengths (drawn: mean {drawn.mean():.0f}, longest "
            f"{drawn.max():.0f})",
            f"in batches of {TAIL['decode_batch']}, {useful:.0%} of the lanes' steps are of use",
        ),
        (
            f"... static, batches of {TAIL['decode_batch']}",
            f"{drawn.sum() / t['static']:,.0f} new tokens/s",
        ),
        ("... static, all at once", f"{drawn.sum() / t['at once']:,.0f} new tokens/s"),
        (
            f"... continuous, {TAIL['decode_batch']} lanes",
            f"{drawn.sum() / t['continuous']:,.0f} new tokens/s, "
            f"{t['static'] / t['continuous']:.2f} x static",
        ),
        (
            f"{SHARED['prompts']} prompts of {SHARED['prompt']}, "
            f"{SHARED['samples_per_prompt']} responses of {NEW} each",
            f"prompts repeated {t['repeated']:.2f} s, shared {t['shared']:.2f} s: "
            f"{t['repeated'] / t['shared']:.2f} x",
        ),
    ]
    return "\n".join(
        [
            "| what | measured |",
            "|---|---|",
            *(f"| {name} | {result} |" for name, result in lines),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", default="tiny", help="a preset of rlhfjax/models/presets.py"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    shape = preset(args.shape)
    todo = ceilings() | workloads(shape)
    drawn = lengths(todo)
    load = os.getloadavg()[0]
    print(table(shape, medians(todo, args.rounds), drawn))
    print(
        f"\n{args.shape}, medians of {args.rounds} rounds; load average before them {load:.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
