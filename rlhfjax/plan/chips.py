"""Chips as data, and rooflines: the least time that a step takes, and its share of the peak."""

import dataclasses
from typing import NamedTuple

from rlhfjax.models.size import Number

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, as its vendor describes it. On some, a chip is several JAX devices."""

    name: str
    hbm: float  # bytes
    flops: float  # bf16 FLOP/s, dense
    hbm_bandwidth: float  # bytes/s
    ici: float  # bytes/s that leave the chip over all of its links, one direction
    dcn: float  # bytes/s that leave the chip for another slice
    source: str
    devices: int = 1


# Capacity, peak, HBM and bidirectional ICI bandwidth: "system architecture" on each page.
# `ici` is half of the bidirectional number. DCN of v5p: its page (50 Gbps); of v5e: 6.4 Tbps per
# pod of 256 chips. Later versions of the pages state HBM bandwidth in GiB/s (v5e: 800, v5p: 2575).
# Assumed, and not confirmed by a page: v4's links, 6 of 50 GB/s (Jouppi et al. 2023, Table 4;
# secondary sources have 400 Gb/s per link and direction); v4's DCN, taken as v5e's; the DCN of
# v6e; HBM bandwidth, ICI and DCN of TPU7x.
DOCS = "https://cloud.google.com/tpu/docs"
CHIPS = {
    name: Chip(name, hbm * GIB, flops, bandwidth, ici, dcn, f"{DOCS}/{name}", devices)
    for name, hbm, flops, bandwidth, ici, dcn, devices in (
        ("v4", 32, 275e12, 1200e9, 300e9, 3.125e9, 1),
        ("v5e", 16, 197e12, 819e9, 200e9, 3.125e9, 1),
        ("v5p", 95, 459e12, 2765e9, 600e9, 6.25e9, 1),
        ("v6e", 32, 918e12, 1638e9, 400e9, 12.5e9, 1),
        ("tpu7x", 192, 2307e12, 7380e9, 600e9, 12.5e9, 2),
    )
}


class Work(NamedTuple):
    """What one device does in a step."""

    flops: Number = 0
    hbm_bytes: Number = 0
    ici_bytes: Number = 0
    dcn_bytes: Number = 0

    # A tuple would concatenate.
    def __add__(self, other: "Work") -> "Work":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, n: Number) -> "Work":
        return Work(*(n * x for x in self))


class Roofline(NamedTuple):
    """Seconds that each resource is busy. A step takes at least the longest of them."""

    compute: Number
    hbm: Number
    ici: Number
    dcn: Number

    @property
    def seconds(self) -> Number:
        return max(self)

    @property
    def bound(self) -> str:
        """The name of the resource that bounds the step."""
        return max(zip(self, self._fields, strict=True))[1]


def roofline(work: Work, chip: Chip) -> Roofline:
    """Divides the work of one device by its peaks, its share of the chip's.

    Source: Williams et al. 2009, with the two networks as further roofs.
    """
    n = chip.devices
    return Roofline(
        compute=work.flops / (chip.flops / n),
        hbm=work.hbm_bytes / (chip.hbm_bandwidth / n),
        ici=work.ici_bytes / (chip.ici / n),
        dcn=work.dcn_bytes / (chip.dcn / n),
    )


def training_flops(parameters: Number, tokens: Number) -> Number:
    """Returns 6 N D: 2 N multiplications and additions per token forward, twice that backward.

    Source: Kaplan et al. 2020, table 1.
    """
    return 6 * parameters * tokens


def mfu(model_flops: Number, seconds: Number, chips: Number, chip: Chip) -> Number:
    """Returns the model FLOPs utilization: tokens per second over what the peak would allow.

    Source: Chowdhery et al. 2022, appendix B.
    """
    return model_flops / (seconds * chips * chip.flops)
