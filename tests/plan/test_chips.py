"""Rooflines and MFU with numbers that fit in a head."""

import pytest

from rlhfjax.models import size
from rlhfjax.models.presets import preset
from rlhfjax.plan import chips
from rlhfjax.plan.chips import CHIPS, GPUS, TPUS, Chip, Work

CHIP = Chip(
    "toy", hbm=1.0, flops=100.0, hbm_bandwidth=10.0, ici=4.0, dcn=1.0, source=""
)


@pytest.mark.parametrize(
    ("work", "seconds", "bound"),
    [
        (Work(500, 10, 0, 0), 5, "compute"),
        (Work(500, 80, 0, 0), 8, "hbm"),
        (Work(500, 80, 40, 0), 10, "ici"),
        (Work(500, 80, 40, 12), 12, "dcn"),
    ],
)
def test_a_step_waits_for_its_slowest_resource(work, seconds, bound):
    got = chips.roofline(work, CHIP)
    assert (got.seconds, got.bound) == (seconds, bound)


def test_a_device_has_its_share_of_a_chip():
    halves = Chip("halves", 1.0, 100.0, 10.0, 4.0, 1.0, "", devices=2)
    assert chips.roofline(Work(500, 10, 4, 1), halves) == (10, 2, 2, 2)


def test_work_adds_and_multiplies():
    assert Work(1, 2, 3, 4) + Work(1, 1, 1, 1).times(2) == Work(3, 4, 5, 6)


def test_palms_own_mfu():
    # Appendix B: 540B on 6144 TPU v4, 238.3K tokens/s, is 45.7 % without and 46.2 % with
    # attention. N = 540.35e9, L = 118, H = 48, Q = 256, T = 2048 (Table 1).
    c = preset("gpt3-125m", n_layers=118, n_heads=48, d_head=256)
    v4, seconds = CHIPS["v4"], 1 / 238.3e3
    without = chips.mfu(chips.training_flops(540.35e9, 1), seconds, 6144, v4)
    with_attention = chips.mfu(size.token_flops(540.35e9, c, 2048), seconds, 6144, v4)
    assert round(100 * without, 1) == 45.7
    assert round(100 * with_attention, 1) == 46.2


def test_chips_are_as_their_pages_say():
    gib = 2**30
    assert {name: round(c.hbm / gib) for name, c in TPUS.items()} == {
        "v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 192
    }  # fmt: skip
    peaks = {"v4": 275, "v5e": 197, "v5p": 459, "v6e": 918, "tpu7x": 2307}
    assert {name: c.flops / 1e12 for name, c in TPUS.items()} == peaks
    assert all(c.source.startswith("https://") for c in TPUS.values())
    # all-reduce bandwidth of a pod of 256 v5e, 51.2 TB/s, is that of its one-directional links
    assert CHIPS["v5e"].ici * 256 == 51.2e12
    assert CHIPS["v6e"].ici * 256 == 102.4e12


def test_gpus_are_as_their_sheets_say():
    """Sheets print FLOP/s with sparsity, bidirectional NVLink, and a node of eight."""
    sparse = {"a100-80gb": 624, "h100": 1979, "h200": 1979, "b200": 4500}  # TFLOP/s
    assert {name: 2 * GPUS[name].flops / 1e12 for name in sparse} == sparse
    nvlink = {"v100-32gb": 300, "a100-40gb": 600, "h100": 900, "b200": 1800}  # GB/s
    assert {name: 2 * GPUS[name].ici / 1e9 for name in nvlink} == nvlink
    gigabits = {"v100-32gb": 400, "a100-80gb": 1600, "h200": 3200, "b200": 3200}
    assert {name: 8 * 8 * GPUS[name].dcn / 1e9 for name in gigabits} == gigabits
    # DGX B200: 1,440 GB and 64 TB/s; DGX H200: 1,128 GB
    assert 8 * GPUS["b200"].hbm == 1440 * 2**30 and 8 * GPUS["h200"].hbm == 1128 * 2**30
    assert 8 * GPUS["b200"].hbm_bandwidth == 64e12
    assert all(c.is_gpu and c.node == 8 for c in GPUS.values())
    assert not any(c.is_gpu for c in TPUS.values())


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA B200", "b200"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("cpu", None),
        ("NVIDIA H100 PCIe", None),  # 756 TFLOP/s
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_chip_of_a_device(device_kind, name):
    assert chips.chip_of(device_kind) == (name and CHIPS[name])


def test_gpt3s_own_arithmetic():
    """175B parameters and 300B tokens; 14.8 days of 10,000 V100 are 19.7 % of their peak."""
    flops = chips.training_flops(175e9, 300e9)
    assert flops == 3.15e23
    assert round(chips.petaflops_days(flops)) == 3_646
    share = chips.mfu(flops, 14.8 * chips.DAY, 10_000, CHIPS["v100-32gb"])
    assert round(100 * share, 1) == 19.7
    # Brown et al. 2020, table D.1, with 174,600 M parameters: 3.14e23 FLOPs, 3.64e3 PF-days
    table = chips.training_flops(174.6e9, 300e9)
    assert f"{table:.3g}" == "3.14e+23"
    assert f"{chips.petaflops_days(table):.3g}" == "3.64e+03"
