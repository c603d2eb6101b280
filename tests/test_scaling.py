"""The slopes of `benchmarks.scaling`, on power laws and on counts made by hand."""

import pytest

from benchmarks import batches, scaling, scaling_step
from benchmarks.stage_steps import Steps, program_seconds
from rlhfjax.models.presets import preset
from rlhfjax.models.size import parameters


def test_the_slope_of_a_power_law_is_its_exponent():
    xs = (1, 2, 4, 8)
    assert scaling.slope(xs, [5 * x**1.5 for x in xs]) == pytest.approx(1.5)
    assert scaling.slope(xs, [3, 3, 3, 3]) == pytest.approx(0)


def expected_slope(name, quantity, shape="tiny"):
    axis = scaling.AXES[name]
    needed = [scaling.expected(axis.point(x), shape)[quantity] for x in axis.values]
    return scaling.slope(axis.values, needed)


def test_the_algorithms_own_slopes():
    assert expected_slope("batch", "seconds") == pytest.approx(1)
    assert expected_slope("responses", "seconds") == pytest.approx(1)
    assert expected_slope("devices", "compiled_mb") == pytest.approx(-1)
    assert expected_slope("devices", "seconds") == pytest.approx(0)
    assert expected_slope("rows", "index_seconds") == pytest.approx(1)
    assert expected_slope("rows", "open_seconds") == pytest.approx(0)


def test_the_expected_flops_of_a_step_are_palms_with_half_of_the_keys():
    config = preset("tiny", max_length=4096)
    point = scaling.AXES["length"].point(1024)
    per_token = 6 * parameters(config) + 12 * 4 * 4 * 32 * 512
    assert scaling.expected(point, "tiny")["seconds"] == 8192 * per_token


def test_a_slope_above_the_algorithms_is_marked():
    axis = scaling.AXES["rows"]
    steep = [{"open_seconds": x**0.5, "index_seconds": x**1.05} for x in axis.values]
    index, opened = scaling.lines(axis, steep, "tiny")
    assert index.endswith("| 1.00 | 1.05 | no |")
    assert opened.endswith("| 0.00 | 0.50 | above |")


def test_a_stage_runs_on_random_models_and_is_planned():
    config = preset("tiny", n_layers=1, vocab_size=64)
    sizes = {"batch": 4, "seq": 16, "microbatches": 1}
    steps = Steps(*scaling_step.stage_values("pretrain", sizes), config)
    with program_seconds() as seconds:
        ticks = steps.run(batches.packed(sizes, 64), 2)
    assert {name: len(calls) for name, calls in seconds.items()} == {"step": 2}
    assert all(ticks.wall > seconds["step"])
    (program,) = steps.plan().programs
    assert program.needed > 12 * parameters(config)  # parameters and two moments
