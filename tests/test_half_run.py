"""Today's code goes on from workdirs that an older version left half-run.

tests/half_run.py wrote them.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from rlhfjax import recipe
from tests import half_run

# On the machine that wrote the archive every number is equal to the bit. On another CPU XLA sums in
# another order: SSE4.2, AVX and AVX2, with XLA's optimizations and without, differ by at most 1/70
# of this. A state that lost a moment, the schedule's count, the baseline, the stale rollout or the
# data's position differs by more than 100 times this; with averages or a KL coefficient 1 % off, by
# 12 or 8 times.
RTOL, ATOL = 1e-3, 1e-5

SLOW = ("direct_kto",)  # beside direct_dpo it adds a second position of the data


def marks(variant: str) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.slow,) if variant in SLOW else ()


VARIANTS = [pytest.param(name, marks=marks(name)) for name in half_run.variants()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_half_run_workdir_goes_on(variant, tmp_path, monkeypatch):
    half_run.unpack(tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = half_run.trained_folder(variant)
    checkpoint = folder / "checkpoints" / str(half_run.STOPPED)
    lines, written = (folder / "metrics.jsonl").read_bytes(), times(checkpoint)
    assert lines and written and not (folder / "done.json").exists()

    metrics = recipe.run(half_run.variants()[variant], Path(variant))

    new_lines = (folder / "metrics.jsonl").read_bytes()
    assert new_lines.startswith(lines)
    steps = {
        json.loads(line)["step"] for line in new_lines.removeprefix(lines).splitlines()
    }
    assert steps == set(range(half_run.STOPPED + 1, half_run.STEPS + 1))
    assert times(checkpoint) == written  # a run that starts anew saves this step again
    assert not (folder / "damaged_checkpoints").exists()
    assert (folder / "done.json").exists()
    assert_close(
        half_run.end_of(variant, metrics),
        json.loads(half_run.ENDS.read_text())[variant],
    )


def times(folder: Path) -> dict[Path, int]:
    """Returns when each file of a folder was written."""
    return {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }


def assert_close(end: Mapping, expected: Mapping) -> None:
    """Compares metrics by value, arrays by sum and norm; the norm is the scale of both."""
    for name, value in expected["metrics"].items():
        np.testing.assert_allclose(
            end["metrics"][name], value, RTOL, ATOL, err_msg=name
        )
    assert end["arrays"].keys() == expected["arrays"].keys()
    for name, (total, norm) in expected["arrays"].items():
        tolerance = RTOL * norm + ATOL
        got = end["arrays"][name]
        np.testing.assert_allclose(
            got, (total, norm), rtol=0, atol=tolerance, err_msg=name
        )
