"""Chips as data, and rooflines: the least time that a step takes, and its share of the peak.

TPUs are named as Google names them. GPUs come in nodes of eight that NVLink joins.
"""

import dataclasses
from typing import NamedTuple

from rlhfjax.models.size import Number

GIB = 2.0**30
DAY = 86_400  # seconds


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, as its vendor describes it. On some, a chip is several JAX devices."""

    name: str
    hbm: float  # bytes
    flops: float  # bf16 FLOP/s, dense
    hbm_bandwidth: float  # bytes/s
    ici: float  # bytes/s that leave the chip over all of its links, one direction
    dcn: float  # bytes/s that leave the chip for another slice or node
    source: str
    devices: int = 1
    node: int = (
        0  # GPUs that `ici`, their NVLink, joins; 0: a TPU, whose slice it joins
    )

    @property
    def is_gpu(self) -> bool:
        return self.node > 0


# Capacity, peak, HBM and bidirectional ICI bandwidth: "system architecture" on each page.
# `ici` is half of the bidirectional number. DCN of v5p: its page (50 Gbps); of v5e: 6.4 Tbps per
# pod of 256 chips. Later versions of the pages state HBM bandwidth in GiB/s (v5e: 800, v5p: 2575).
# Assumed, and not confirmed by a page: v4's links, 6 of 50 GB/s (Jouppi et al. 2023, Table 4;
# secondary sources have 400 Gb/s per link and direction); v4's DCN, taken as v5e's; the DCN of
# v6e; HBM bandwidth, ICI and DCN of TPU7x.
DOCS = "https://cloud.google.com/tpu/docs"
TPUS = {
    name: Chip(name, hbm * GIB, flops, bandwidth, ici, dcn, f"{DOCS}/{name}", devices)
    for name, hbm, flops, bandwidth, ici, dcn, devices in (
        ("v4", 32, 275e12, 1200e9, 300e9, 3.125e9, 1),
        ("v5e", 16, 197e12, 819e9, 200e9, 3.125e9, 1),
        ("v5p", 95, 459e12, 2765e9, 600e9, 6.25e9, 1),
        ("v6e", 32, 918e12, 1638e9, 400e9, 12.5e9, 1),
        ("tpu7x", 192, 2307e12, 7380e9, 600e9, 12.5e9, 2),
    )
}

# NVIDIA's datasheets of the SXM modules: tensor-core FLOP/s of bfloat16 without sparsity (those of
# H100, H200 and B200 print twice as much, with it; V100 has no bfloat16, its number is that of
# float16), memory and its bandwidth. `ici` is half of the bidirectional NVLink number. `dcn` is one
# GPU's share of its node's network: DGX-1 has 4 x 100 Gb/s for 8 GPUs, DGX A100 8 x 200, DGX H100,
# H200 and B200 8 x 400. A sheet's GB of memory are GiB, of which the driver keeps about 1 %. B200
# has the 180 GB of DGX B200; earlier sheets say 192.
SHEET = "NVIDIA {} Tensor Core GPU datasheet; NVIDIA {} datasheet"
GPUS = {
    name: Chip(name, hbm * GIB, flops, bandwidth, ici, dcn, SHEET.format(*sheet), 1, 8)
    for name, hbm, flops, bandwidth, ici, dcn, sheet in (
        ("v100-16gb", 16, 125e12, 900e9, 150e9, 6.25e9, ("V100", "DGX-1")),
        ("v100-32gb", 32, 125e12, 900e9, 150e9, 6.25e9, ("V100", "DGX-1")),
        ("a100-40gb", 40, 312e12, 1555e9, 300e9, 25e9, ("A100", "DGX A100")),
        ("a100-80gb", 80, 312e12, 2039e9, 300e9, 25e9, ("A100", "DGX A100")),
        ("h100", 80, 989.5e12, 3350e9, 450e9, 50e9, ("H100", "DGX H100")),
        ("h200", 141, 989.5e12, 4800e9, 450e9, 50e9, ("H200", "DGX H200")),
        ("b200", 180, 2250e12, 8000e9, 900e9, 50e9, ("HGX B200", "DGX B200")),
    )
}
CHIPS = TPUS | GPUS

# What JAX calls them. PCIe and NVL cards have other peaks and are not listed.
_DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "V100-SXM2-16GB": "v100-16gb",
    "V100-SXM2-32GB": "v100-32gb",
    "A100-SXM4-40GB": "a100-40gb",
    "A100-SXM4-80GB": "a100-80gb",
    "H100 80GB HBM3": "h100",
    "H200": "h200",
    "B200": "b200",
}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip of a `jax.Device.device_kind`, "NVIDIA H200"; None if it is not listed.

    The numbers are those of a chip, which on TPU7x is two devices (`Chip.devices`).
    """
    name = device_kind.removeprefix("NVIDIA ").removeprefix("Tesla ")
    return CHIPS.get(_DEVICE_KINDS.get(name, ""))


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


def petaflops_days(flops: Number) -> Number:
    """Returns FLOPs in days of 10^15 FLOP/s, the unit of Brown et al. 2020, appendix D."""
    return flops / (1e15 * DAY)


def mfu(model_flops: Number, seconds: Number, chips: Number, chip: Chip) -> Number:
    """Returns the model FLOPs utilization: tokens per second over what the peak would allow.

    Source: Chowdhery et al. 2022, appendix B.
    """
    return model_flops / (seconds * chips * chip.flops)
