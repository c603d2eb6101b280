"""`benchmarks.run` in a separate process, for one measured step."""

import json
import subprocess
import sys

import pytest

from benchmarks.run import SPEC

OFTEN = "grpo"  # it samples, scores and updates


@pytest.mark.parametrize(
    "workload",
    [
        pytest.param(
            name, marks=pytest.mark.slow if name == OFTEN else pytest.mark.nightly
        )
        for name in SPEC["workloads"]
    ],
)
def test_a_workload_prints_its_line(workload):
    command = [sys.executable, "-m", "benchmarks.run", f"--workload={workload}"]
    command += ["--shape=tiny", "--steps=1", "--warmup=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert (line["workload"], line["n_steps"]) == (workload, 1)
    rates = [value for name, value in line.items() if name.endswith("_per_s")]
    assert rates and min(rates) > 0
