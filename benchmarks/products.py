"""The matrix products of a workload, and how fast this machine multiplies at their shapes.

    python -m benchmarks.products --workload=pretrain --shape=tiny

prints one JSON line. A product [m, k] x [k, n] takes 2 m k n FLOPs. The roofline of a step is the
sum over its products with weights of count x FLOPs / rate, where the rate is that of this shape
alone: float32, or bf16 inputs with a float32 output. Attention scores, norms and the optimizer are
left out, so no step can be as fast as its roofline.

In training, a product x [m, k] w [k, n] has two more: dy w^T is [m, n] x [n, k], and x^T dy is
[k, m] x [m, n].
"""

import argparse
import os
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from rlhfjax import json_text
from rlhfjax.models.config import GATED, TransformerConfig
from rlhfjax.models.presets import preset

SPEC_FILE = Path(__file__).parent / "workloads.json"
DTYPES = {"float32": jnp.float32, "bfloat16_products": jnp.bfloat16}
_ROUNDS = 5
_FLOPS, _NUMBERS = 4e9, 2**26  # of one timed call, at least and at most


class Product(NamedTuple):
    """The shape of a product [m, k] x [k, n]."""

    m: int
    k: int
    n: int

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.k * self.n


Counts = Counter[Product]
"""How often a step computes each product."""


def products(
    workload: str, config: TransformerConfig, sizes: Mapping[str, Any]
) -> Counts:
    """Returns the products of a step of one of the workloads of workloads.json."""
    if workload in ("pretrain", "sft"):
        return trained(model(config, rows := sizes["batch"] * sizes["seq"], rows))
    if workload == "rm":
        return trained(model(config, 2 * sizes["pairs"] * sizes["seq"], 0))
    batch, prompt, new = sizes["batch"], sizes["prompt"], sizes["new"]
    sampled = model(config, batch * prompt, 0)
    sampled += times(model(config, batch, batch), new)
    if workload == "generate":
        return sampled
    scored = model(config, batch * (prompt + new), batch * new)
    if workload == "grpo":
        return sampled + scored + trained(scored)
    values = model(config, batch * (prompt + new), 0)
    rows = batch // sizes["minibatches"]
    policy_update = trained(model(config, rows * (prompt + new), rows * new))
    value_update = trained(model(config, rows * (prompt + new), 0))
    updates = times(
        policy_update + value_update, sizes["epochs"] * sizes["minibatches"]
    )
    return sampled + times(scored, 2) + times(values, 2) + updates


def model(config: TransformerConfig, rows: int, rows_out: int) -> Counts:
    """Returns the products of a forward pass over `rows` tokens, with logits of `rows_out`."""
    d, f = config.d_model, config.d_ff
    heads = config.n_heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    layer: Counts = Counter()
    layer[Product(rows, d, heads)] += 1
    layer[Product(rows, d, keys)] += 2
    layer[Product(rows, heads, d)] += 1
    layer[Product(rows, d, f)] += 2 if config.mlp in GATED else 1
    layer[Product(rows, f, d)] += 1
    counts = times(layer, config.n_layers)
    if rows_out:
        counts[Product(rows_out, d, config.vocab_size)] += 1
    return counts


def trained(forward: Counts) -> Counts:
    """Returns the products of a forward and a backward pass."""
    counts: Counts = Counter()
    for (m, k, n), count in forward.items():
        counts[Product(m, k, n)] += count
        counts[Product(m, n, k)] += count
        counts[Product(k, m, n)] += count
    return counts


def times(counts: Counts, factor: int) -> Counts:
    return Counter({product: factor * count for product, count in counts.items()})


def flops(counts: Counts) -> float:
    return sum(count * product.flops for product, count in counts.items())


def roofline_seconds(counts: Counts, rates: Mapping[Product, float]) -> float:
    """Returns the sum of count x FLOPs / rate; rates are in FLOP/s."""
    return sum(count * p.flops / rates[p] for p, count in counts.items())


# ------------------------------------------------------------------ measuring


def measure_rate(product: Product, dtype: Any) -> float:
    """Returns FLOP/s of a product with inputs of a dtype and a float32 output, the best of 5.

    One call multiplies many matrices in a loop on the device, so that the time to start a program
    does not count.
    """
    m, k, n = product
    count = max(1, round(_FLOPS / product.flops))
    count = max(1, min(count, _NUMBERS // max(k * n, m * n)))
    x = jax.random.normal(jax.random.key(0), (m, k)).astype(dtype)
    weights = jax.random.normal(jax.random.key(1), (count, k, n)).astype(dtype)

    @jax.jit
    def multiply(x: jax.Array, weights: jax.Array) -> jax.Array:
        def one(w: jax.Array) -> jax.Array:
            return jnp.dot(x, w, preferred_element_type=jnp.float32)

        return jax.lax.map(one, weights)

    seconds = []
    for _ in range(_ROUNDS + 1):  # the first one compiles
        start = time.perf_counter()
        jax.block_until_ready(multiply(x, weights))
        seconds.append(time.perf_counter() - start)
    return count * product.flops / min(seconds[1:])


def measure(workload: str, shape: str) -> dict[str, Any]:
    """Returns every product with its rates, and the roofline of a step by dtype."""
    spec = json_text.read(SPEC_FILE, json_text.Object)
    counts = products(workload, preset(shape), spec["workloads"][workload])
    rates = {
        name: {product: measure_rate(product, dtype) for product in counts}
        for name, dtype in DTYPES.items()
    }
    lines = []
    for product, count in sorted(
        counts.items(), key=lambda item: -item[1] * item[0].flops
    ):
        gflops = {name: round(rates[name][product] / 1e9, 1) for name in DTYPES}
        line = product._asdict() | {"count": count, "gflop": product.flops / 1e9}
        lines.append(line | {"gflops_per_s": gflops})
    seconds = {name: roofline_seconds(counts, rates[name]) for name in DTYPES}
    return {
        "kind": "roofline",
        "workload": workload,
        "shape": shape,
        "gflop": flops(counts) / 1e9,
        "seconds": {name: round(value, 5) for name, value in seconds.items()},
        "products": lines,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products")
    parser.add_argument("--workload", required=True)
    parser.add_argument("--shape", default="tiny")
    options = parser.parse_args()
    measured = measure(options.workload, options.shape)
    print(json_text.encode(measured, "the roofline"), flush=True)


if __name__ == "__main__":
    main()
