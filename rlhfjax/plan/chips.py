"""Chips as data, and the arithmetic of rooflines: the least time a step takes, and its share of the peak."""

import dataclasses
from typing import NamedTuple

from rlhfjax.models.config import TransformerConfig

GIB = 2.0**30
Number = int | float


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a vendor says of one chip. A chip may be several JAX devices: `devices`."""

    name: str
    hbm: float  # bytes
    flops: float  # bf16 FLOP/s, dense
    hbm_bandwidth: float  # bytes/s
    ici: float  # bytes/s out of the chip over all of its links, one direction
    dcn: float  # bytes/s out of the chip, to another slice
    source: str
    devices: int = 1


# Capacity, peak, HBM and bidirectional ICI bandwidth: the "system architecture" section of each page; `ici` is half of
# what the page calls bidirectional. DCN of v5p: its page (50 Gbps); of v5e: 6.4 Tbps a pod of 256 chips. Later versions
# of the pages state HBM bandwidth in GiB/s (v5e: 800, v5p: 2575).
# Assumed, and not confirmed by a page: v4's links, 6 of 50 GB/s (Jouppi et al. 2023, Table 4; secondary sources have
# 400 Gb/s a link and direction); v4's DCN, taken as v5e's; the DCN of v6e; HBM bandwidth, ICI and DCN of TPU7x.
DOCS = "https://cloud.google.com/tpu/docs"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275e12, 1200e9, 300e9, 3.125e9, f"{DOCS}/v4"),
        Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9, 3.125e9, f"{DOCS}/v5e"),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9, 6.25e9, f"{DOCS}/v5p"),
        Chip("v6e", 32 * GIB, 918e12, 1638e9, 400e9, 12.5e9, f"{DOCS}/v6e"),
        Chip(
            "tpu7x",
            192 * GIB,
            2307e12,
            7380e9,
            600e9,
            12.5e9,
            f"{DOCS}/tpu7x",
            devices=2,
        ),
    )
}


class Work(NamedTuple):
    """What one device does in a step."""

    flops: Number
    hbm_bytes: Number
    ici_bytes: Number
    dcn_bytes: Number

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, n: Number) -> "Work":
        return Work(*(n * x for x in self))


class Roofline(NamedTuple):
    """Seconds that each resource is busy; a step takes at least the longest of them, if all else overlaps."""

    compute: Number
    hbm: Number
    ici: Number
    dcn: Number

    @property
    def seconds(self) -> Number:
        return max(self)

    @property
    def bound(self) -> str:
        """The name of what the step waits for."""
        return max(zip(self, self._fields, strict=True))[1]


def roofline(work: Work, chip: Chip) -> Roofline:
    """Work of one device over what that device has: a chip's share where a chip is several devices.

    Source: Williams et al. 2009, with the two networks as further roofs.
    """
    n = chip.devices
    return Roofline(
        work.flops / (chip.flops / n),
        work.hbm_bytes / (chip.hbm_bandwidth / n),
        work.ici_bytes / (chip.ici / n),
        work.dcn_bytes / (chip.dcn / n),
    )


def training_flops(parameters: Number, tokens: Number) -> Number:
    """6 N D: 2 N multiplications and additions a token forward, twice that backward (Kaplan et al. 2020, table 1)."""
    return 6 * parameters * tokens


def token_flops(parameters: Number, c: TransformerConfig, time: int) -> Number:
    """PaLM's count of training one token: 6 N + 12 L H Q T, with Q the width of a head and T the sequence.

    Recomputation does not count: what is predicted from it is MFU, not the hardware's utilization.

    Source: Chowdhery et al. 2022, appendix B.
    """
    return 6 * parameters + 12 * c.n_layers * c.n_heads * c.head_dim * time


def mfu(model_flops: Number, seconds: Number, chips: Number, chip: Chip) -> Number:
    """Model FLOPs utilization: observed (here: predicted) tokens a second over what the peak would allow.

    Source: Chowdhery et al. 2022, appendix B.
    """
    return model_flops / (seconds * chips * chip.flops)
