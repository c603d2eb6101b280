"""Rooflines and MFU with numbers that fit in a head."""

import pytest

from rlhfjax.models import size
from rlhfjax.models.presets import preset
from rlhfjax.plan import chips
from rlhfjax.plan.chips import CHIPS, Chip, Work

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
    assert {name: round(c.hbm / gib) for name, c in CHIPS.items()} == {
        "v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 192
    }  # fmt: skip
    peaks = {"v4": 275, "v5e": 197, "v5p": 459, "v6e": 918, "tpu7x": 2307}
    assert {name: c.flops / 1e12 for name, c in CHIPS.items()} == peaks
    assert all(c.source.startswith("https://") for c in CHIPS.values())
    # all-reduce bandwidth of a pod of 256 v5e, 51.2 TB/s, is that of its one-directional links
    assert CHIPS["v5e"].ici * 256 == 51.2e12
    assert CHIPS["v6e"].ici * 256 == 102.4e12
