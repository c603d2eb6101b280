"""The table of `benchmarks.sampler`, from times and lengths that are given."""

import numpy as np

from benchmarks.sampler import table
from rlhfjax.models.presets import preset


def test_the_table_has_rates_and_ratios():
    seconds = {
        "copy": 0.5,
        "product": 1.0,
        "prefill": 0.1,
        "generate": 0.73,
        "static": 6.0,
        "at once": 4.0,
        "continuous": 2.0,
        "repeated": 0.4,
        "shared": 0.25,
    }
    # Two batches of 32: the longest row of the first has 10 tokens, of the second 30.
    drawn = np.concatenate([np.full(31, 5), [10], np.full(31, 20), [30]])
    text = table(preset("tiny"), seconds, drawn)
    rows = dict(line.strip("| ").split(" | ") for line in text.splitlines()[2:])
    assert rows["this machine: a copy"] == "1.1 GB/s"  # 8 * 2^26 bytes in 0.5 s
    assert rows["64 prompts of 64, 64 new each"] == "5,611 new tokens/s"
    assert rows["a decode step"].startswith("10.00 ms")  # 0.63 s of 63 steps
    # 155 + 10 + 620 + 30 tokens of 32 * (10 + 30)
    longest = "64 prompts, geometric lengths (drawn: mean 13, longest 30)"
    assert rows[longest] == "in batches of 32, 64% of the lanes' steps are of use"
    assert rows["... static, all at once"] == "204 new tokens/s"
    assert rows["... continuous, 32 lanes"] == "408 new tokens/s, 3.00 x static"
    assert rows["16 prompts of 192, 4 responses of 64 each"].endswith("1.60 x")
