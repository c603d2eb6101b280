"""Memory by hand: arithmetic that a person can check, without a compiler.

GB is 10^9 bytes and GiB 2^30; textbooks call both GB, see `textbook`.
"""

from typing import NamedTuple

from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.size import Number, layer_activations, parameters

GB, GIB = 10**9, 2**30
# Bytes per number.
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}
OPTIMIZERS = ("adamw", "adamw_8bit", "sgd_momentum", "sgd")
# Numbers that share one float32 scale in 8-bit AdamW (Dettmers et al. 2022, section 2.1).
BLOCK = 2048


def optimizer_bytes(n: Number, optimizer: str, precision: str = "fp32") -> Number:
    """Returns the bytes of an optimizer's state for n parameters.

    AdamW has two moments, SGD with momentum one, SGD none. The moments of 8-bit AdamW take one byte
    per number and a float32 scale per BLOCK numbers, at any precision.
    """
    per_parameter = {
        "adamw": 2 * BYTES[precision],
        "adamw_8bit": 2 * (1 + 4 / BLOCK),
        "sgd_momentum": BYTES[precision],
        "sgd": 0.0,
    }
    return n * per_parameter[optimizer]


def korthikanti(c: TransformerConfig, batch: int, time: int) -> Number:
    """Returns the activation bytes of all layers of a GPT, at 2 bytes per number.

    L s b h (34 + 5 a s / h), with s time, b batch, h width and a heads.

    Source: Korthikanti et al. 2022, eq. 1.
    """
    per_number = 34 + 5 * c.n_heads * time / c.d_model
    return c.n_layers * time * batch * c.d_model * per_number


def logits_bytes(c: TransformerConfig, batch: int, time: int) -> Number:
    """Returns b t v x 4 bytes: float32 logits, if they were not computed in chunks."""
    return batch * time * c.vocab_size * 4.0


class Line(NamedTuple):
    """One quantity of the textbook example."""

    what: str
    textbook: Number  # in `unit`
    unit: str  # GB or GiB, the one that gives the printed number
    how: str  # the arithmetic of the printed number
    needed: Number  # bytes, from the exact count
    why: str


def textbook(c: TransformerConfig) -> list[Line]:
    """Returns the well-known numbers for Llama-2-7B beside what is needed.

    Inference: n = 7e9 parameters in GiB (26.1, 13, 6.5, 3.26, all printed as GB). Training at
    int8: n in GB of 10^9, 7 for weights, 7 for gradients, 14 for AdamW, and activations of
    (d_model + d_ff) numbers of one byte per token and layer, 0.99 GB per sample of 2048 tokens.
    `needed` has the exact count of parameters, and for training what this repository keeps:
    float32 weights, gradients and moments, and the activations of `layer_activations` in bf16.
    """
    n, batch, time = 7e9, 50, 2048
    exact = parameters(c)
    sample = time * c.n_layers * (c.d_model + c.d_ff)
    exact_sample = c.n_layers * sum(layer_activations(c, 1, time).values())
    lines = []
    for p in ("fp32", "fp16", "int8", "int4"):
        line = Line(
            what=f"inference, {p}",
            textbook=n * BYTES[p] / GIB,
            unit="GiB",
            how=f"{n:.3g} x {BYTES[p]:g} B",
            needed=exact * BYTES[p],
            why="exact count",
        )
        lines.append(line)
    int8 = f"{n:.3g} x 1 B"
    total = 4 * n + batch * sample
    needed = exact * 16.0 + batch * exact_sample
    for what, size, how, exactly, why in (
        ("training at int8: weights", n, int8, exact * 4.0, "float32 master weights"),
        ("  gradients", n, int8, exact * 4.0, "float32"),
        ("  AdamW", 2 * n, f"2 x {int8}", exact * 8.0, "two float32 moments"),
        (
            "  activations per sample",
            sample,
            "s L (d + f) x 1 B",
            exact_sample,
            "all saved tensors",
        ),
        (f"  total, batch {batch}", total, "the sum", needed, "no remat, one device"),
    ):
        line = Line(
            what=what,
            textbook=size / GB,
            unit="GB",
            how=how,
            needed=exactly,
            why=why,
        )
        lines.append(line)
    return lines


def by_precision(c: TransformerConfig) -> dict[str, dict[str, Number]]:
    """Returns the bytes of weights, and of training with each optimizer, at each precision.

    Training needs weights, gradients and optimizer state. Mixed precision is a row of its own: bf16
    weights and gradients beside float32 master weights and moments.
    """
    n = parameters(c)
    rows: dict[str, dict[str, Number]] = {}
    for precision, size in BYTES.items():
        training = {
            o: 2 * n * size + optimizer_bytes(n, o, precision) for o in OPTIMIZERS
        }
        rows[precision] = {"weights": n * size, **training}
    mixed = {o: (2 + 2 + 4) * n + optimizer_bytes(n, o) for o in OPTIMIZERS}
    rows["bf16 + fp32 master"] = {"weights": n * 2.0, **mixed}
    return rows
