"""The memory arithmetic that a person can check by hand: parameters, optimizer, activations, logits, KV cache.

Nothing here compiles or allocates; `compiled.py` has what the compiler says. GB is 10^9 bytes, GiB 2^30: texts use both
under the name of the first, see `textbook`.
"""

from typing import NamedTuple

from rlhfjax.errors import ConfigError
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.size import Number, layer_activations, parameters

GB, GIB = 10**9, 2**30
BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "int8": 1.0,
    "int4": 0.5,
}  # of one number
OPTIMIZERS = ("adamw", "adamw_8bit", "sgd_momentum", "sgd")
BLOCK = 2048  # numbers that share one float32 scale in 8-bit AdamW (Dettmers et al. 2022, section 2.1)


def bytes_of(precision: str) -> float:
    """Bytes of one number.

    Raises:
      ConfigError: the precision is none of BYTES.
    """
    if precision not in BYTES:
        raise ConfigError(
            f"precision {precision!r} is unknown: accepted are {', '.join(BYTES)}"
        )
    return BYTES[precision]


def optimizer_bytes(n: Number, optimizer: str, precision: str = "fp32") -> Number:
    """What an optimizer keeps of n parameters: AdamW two moments, SGD with momentum one, SGD none.

    8-bit AdamW has moments of one byte and a float32 scale for every BLOCK of them, whatever `precision` is.

    Raises:
      ConfigError: the optimizer is none of OPTIMIZERS.
    """
    if optimizer not in OPTIMIZERS:
        raise ConfigError(
            f"optimizer {optimizer!r} is unknown: accepted are {', '.join(OPTIMIZERS)}"
        )
    each = {
        "adamw": 2 * bytes_of(precision),
        "adamw_8bit": 2 * (1 + 4 / BLOCK),
        "sgd_momentum": bytes_of(precision),
        "sgd": 0.0,
    }
    return n * each[optimizer]


def korthikanti(
    c: TransformerConfig,
    batch: int,
    time: int,
    *,
    tensor: int = 1,
    sequence_parallel: bool = False,
    recompute: str = "none",
) -> Number:
    """Activation bytes a device of all layers of a GPT, 2 bytes a number, as published.

      none:      s b h (10 + 24 / t + 5 a s / (h t)) a layer (eq. 2; eq. 1 where t = 1)
                 s b h / t (34 + 5 a s / h) with sequence parallelism (eq. 4)
      selective: the same without 5 a s / h (section 5)
      full:      2 s b h (only each layer's input; Table 2)

    Source: Korthikanti et al. 2022, sections 4 and 5.
    """
    sbh, scores = time * batch * c.d_model, 5 * c.n_heads * time / c.d_model
    if recompute == "full":
        return c.n_layers * 2.0 * sbh
    if recompute == "selective":
        scores = 0.0
    elif recompute != "none":
        raise ConfigError(
            f"recompute {recompute!r} is unknown: accepted are none, selective, full"
        )
    a_layer = (
        (34 + scores) / tensor if sequence_parallel else 10 + (24 + scores) / tensor
    )
    return c.n_layers * sbh * a_layer


def logits_bytes(
    c: TransformerConfig, batch: int, time: int, size: Number = 4.0
) -> Number:
    """b t v numbers: what logits would take if they were ever whole; `models/logprobs.py` makes them in chunks."""
    return batch * time * c.vocab_size * size


class Line(NamedTuple):
    """One quantity: as the textbook has it, and as it is."""

    what: str
    textbook: Number  # in its own unit
    unit: str  # GB or GiB, whichever gives the printed figure
    how: str  # the arithmetic of the printed figure
    needed: Number  # bytes, of the exact count
    why: str


def textbook(
    c: TransformerConfig, n: Number = 7e9, batch: int = 50, time: int = 2048
) -> list[Line]:
    """The well-known figures of Llama-2-7B, with the conventions that give them, beside what is needed.

    Inference: n = 7e9 parameters in GiB (26.1, 13, 6.5, 3.26, all printed as GB). Training at int8: n in GB of 10^9,
    7 for weights, 7 for gradients, 14 for AdamW, and an activation of (d_model + d_ff) numbers of one byte a token and
    layer, 0.99 GB for a sample of 2048 tokens. `needed` has the exact count of parameters, and for training what this
    repository keeps: float32 weights, gradients and moments, and the activations of `layer_activations` in bf16.
    """
    exact = parameters(c)
    lines = [
        Line(
            f"inference, {p}",
            n * BYTES[p] / GIB,
            "GiB",
            f"{n:.3g} x {BYTES[p]:g} B",
            exact * BYTES[p],
            "exact count",
        )
        for p in ("fp32", "fp16", "int8", "int4")
    ]
    a_sample = time * c.n_layers * (c.d_model + c.d_ff) * BYTES["int8"]
    real_sample = c.n_layers * sum(layer_activations(c, 1, time).values())
    moments = "two float32 moments"
    lines += [
        Line(
            "training at int8: weights",
            n / GB,
            "GB",
            f"{n:.3g} x 1 B",
            exact * 4.0,
            "float32 masters",
        ),
        Line("  gradients", n / GB, "GB", f"{n:.3g} x 1 B", exact * 4.0, "float32"),
        Line(
            "  AdamW",
            2 * n / GB,
            "GB",
            f"2 x {n:.3g} x 1 B",
            optimizer_bytes(exact, "adamw"),
            moments,
        ),
        Line(
            "  activations of a sample",
            a_sample / GB,
            "GB",
            "s L (d + f) x 1 B",
            real_sample,
            "every kept tensor",
        ),
    ]
    total, needed = 4 * n + batch * a_sample, exact * 16.0 + batch * real_sample
    lines.append(
        Line(
            f"  together, batch {batch}",
            total / GB,
            "GB",
            "their sum",
            needed,
            "no remat, one device",
        )
    )
    return lines


def by_precision(
    c: TransformerConfig, head: str = "lm"
) -> list[dict[str, Number | str]]:
    """Weights at each precision; weights, gradients and optimizer where all are kept at it, bytes.

    Mixed precision is a row of its own: bf16 weights and gradients beside a float32 master copy and float32 moments.
    """
    n = parameters(c, head)
    rows: list[dict[str, Number | str]] = []
    for precision in BYTES:
        row: dict[str, float | str] = {
            "precision": precision,
            "weights": n * BYTES[precision],
        }
        row |= {
            o: 2 * n * BYTES[precision] + optimizer_bytes(n, o, precision)
            for o in OPTIMIZERS
        }
        rows.append(row)
    master = {o: (2 + 2 + 4) * n + optimizer_bytes(n, o) for o in OPTIMIZERS}
    return [*rows, {"precision": "bf16 + fp32 master", "weights": n * 2.0, **master}]
