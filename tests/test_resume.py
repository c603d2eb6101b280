"""A run that was stopped, however rudely, ends with the bytes of one that was not."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhfjax import clock, recipe, stages
from rlhfjax.errors import Preempted
from rlhfjax.interop import store
from rlhfjax.mesh import make_layout
from tests import tiny
from tests.test_stages import stage_values

ROOT = Path(__file__).parent.parent
TRAINED = ("pretrain", "sft", "reward", "ppo")


# ------------------------------------------------------------------ what a run leaves


def checkpoint_note(folder: Path) -> dict:
    """A checkpoint's sums over every array of the state (optimizer, KL coefficient, EMA...) and the
    data's position.
    """
    last = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return json.loads((last / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """Every parameter of every model that a stage kept."""
    layout = make_layout(devices=jax.devices()[:1])
    found = {}
    for config in sorted(folder.glob("*/config.json")):
        for path, x in jax.tree.leaves_with_path(
            store.load(config.parent, layout).params
        ):
            found[config.parent.name + jax.tree_util.keystr(path)] = np.asarray(x)
    return found


def assert_same_stage(a: Path, b: Path) -> None:
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes(), (
        b.name
    )
    for file in (
        "samples.jsonl",
        "samples_steps.jsonl",
        "preferences/train.jsonl",
        "preferences/validation.jsonl",
        "tokenizer.model",
    ):
        assert (a / file).exists() == (b / file).exists(), file
        if (a / file).exists():
            assert (a / file).read_bytes() == (b / file).read_bytes(), file
    ours, theirs = arrays(a), arrays(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(
            ours[name].view(np.uint32), theirs[name].view(np.uint32), err_msg=name
        )
    if (a / "checkpoints").exists():
        assert checkpoint_note(a) == checkpoint_note(b)


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    for number, name in enumerate(tiny.STAGES):
        assert_same_stage(a / f"{number:02d}_{name}", b / f"{number:02d}_{name}")


# ------------------------------------------------------------------ in this process


class _Crash(Exception):
    pass


def interrupt(monkeypatch, name: str, at: int, how: str) -> None:
    """Makes the next run of a stage end in its `at`-th step, by an exception or by SIGTERM."""
    module = stages.find(name)
    whole = module.build

    def build(config, layout):
        stage, calls = whole(config, layout), iter(range(10**6))

        def step(*args):
            if next(calls) == at:
                if how == "exception":
                    raise _Crash
                os.kill(os.getpid(), signal.SIGTERM)
            return stage.step(*args)

        return dataclasses.replace(stage, step=step)

    monkeypatch.setattr(module, "build", build)


@pytest.mark.parametrize(
    "name", ("pretrain", pytest.param("ppo", marks=pytest.mark.slow))
)
def test_pitfall_30_a_stage_that_crashed_goes_on_to_the_same_bits(
    name, conversations, finished, tmp_path, monkeypatch
):
    """The fourth step (after the checkpoint of step 2) fails.

    Step 3 is done again, from the same state and data.
    """
    values, reference = (
        stage_values(name, conversations, finished),
        recipe_folder(finished, name),
    )
    with monkeypatch.context() as patch:
        interrupt(patch, name, 3, "exception")
        with pytest.raises(_Crash):
            recipe.run_stage(values, tmp_path / "run")
    assert not (tmp_path / "run" / "done.json").exists()
    recipe.run_stage(values, tmp_path / "run")
    assert_same_stage(reference, tmp_path / "run")
    if name == "pretrain":
        assert (
            len(checkpoint_note(tmp_path / "run")["data"]["rows"]) == 4
        )  # the position of each of its streams


@pytest.mark.parametrize(
    "name", ("sft", pytest.param("reward", marks=pytest.mark.nightly))
)
def test_sigterm_saves_at_that_step_and_the_run_goes_on_to_the_same_bits(
    name, conversations, finished, tmp_path, monkeypatch
):
    values, reference = (
        stage_values(name, conversations, finished),
        recipe_folder(finished, name),
    )
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupt(patch, name, 2, "sigterm")
        with pytest.raises(Preempted, match="stopped at step 3 and was saved"):
            recipe.run_stage(values, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
    assert (
        signal.getsignal(signal.SIGTERM) == handler
    )  # the loop's own is gone with the loop
    first = sum(clock.read(tmp_path / "run")["seconds"].values())
    recipe.run_stage(values, tmp_path / "run")
    assert_same_stage(reference, tmp_path / "run")
    # The time that the report shows is that of both starts.
    kept = clock.read(tmp_path / "run")["seconds"]
    took = recipe.read_done(tmp_path / "run")["seconds"]
    assert took >= sum(kept.values()) - kept["restart"] - 0.1 > first


def recipe_folder(finished: Path, name: str) -> Path:
    return finished / f"{tiny.STAGES.index(name):02d}_{name}"


# ------------------------------------------------------------------ real processes


class Run:
    """`python -m rlhfjax run` of the tiny recipe in a workdir that may be killed and started again.

    It has the devices and the flags of the tests, so that its bits are those of `finished`.
    """

    def __init__(self, conversations: Path, workdir: Path):
        self.workdir = workdir
        flags = [f"--config=tests/tiny.py:data={conversations}", f"--workdir={workdir}"]
        self.command = [sys.executable, "-m", "rlhfjax", "run", *flags]
        self.process: subprocess.Popen | None = None

    def start(self) -> "Run":
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(self.command, cwd=ROOT, **quiet)
        return self

    def finish(self) -> None:
        _, errors = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, errors

    def wait_for(self, happened) -> bool:
        """Until something has happened; False where the process ended before."""
        deadline = time.monotonic() + 300
        while not happened():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, "nothing happened for five minutes"
            time.sleep(0.002)
        return True

    def send(self, number: int) -> tuple[int, str]:
        """Sends a signal; (exit code, stderr)."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=120)
        return self.process.returncode, errors

    def folder(self, stage: str) -> Path:
        return self.workdir / f"{tiny.STAGES.index(stage):02d}_{stage}"

    def begun(self, stage: str):
        return lambda: (self.folder(stage) / "config.json").exists()

    def lines(self, stage: str) -> int:
        path = self.folder(stage) / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def current(self) -> str | None:
        """The stage that has begun and is not done."""
        return next(
            (
                s
                for s in tiny.STAGES
                if self.begun(s)() and not (self.folder(s) / "done.json").exists()
            ),
            None,
        )


SOME = ("pretrain", "collect", "ppo")  # of each kind of stage: one


@pytest.mark.parametrize(
    "killed, twice",
    [
        pytest.param(SOME, False, marks=pytest.mark.slow, id="three"),
        pytest.param(tiny.STAGES, True, marks=pytest.mark.nightly, id="ten"),
    ],
)
def test_kills_in_many_stages_change_no_bit(
    killed, twice, conversations, finished, tmp_path
):
    """SIGKILL at a random line of a stage's metrics where it has several, else once it has begun;
    or at any time.
    """
    rng = random.Random(20)
    run = Run(conversations, tmp_path / "run")
    struck = []

    def kill() -> None:
        struck.append(run.current())
        code, errors = run.send(signal.SIGKILL)
        assert code == -signal.SIGKILL, errors

    for stage in killed:
        whole = (
            (finished / run.folder(stage).name / "metrics.jsonl")
            .read_bytes()
            .count(b"\n")
        )
        wanted = rng.randint(1, whole - 1) if stage in TRAINED else 0
        run.start()
        if run.wait_for(lambda s=stage, n=wanted: run.begun(s)() and run.lines(s) >= n):
            kill()
        if not twice:
            continue
        run.start()
        if run.wait_for(run.begun(stage)):
            time.sleep(rng.uniform(0, 2.0))
            if run.process.poll() is None:
                kill()
    run.start().finish()
    assert len(struck) >= (10 if twice else len(killed))
    assert set(struck) >= set(killed), f"struck only {struck}"
    assert_same_run(finished, run.workdir)


@pytest.mark.nightly
def test_sigterm_ends_with_75_and_the_same_command_goes_on(
    conversations, finished, tmp_path
):
    run = Run(conversations, tmp_path / "run")
    for stage in ("pretrain", "ppo"):
        run.start()
        assert run.wait_for(lambda s=stage: run.lines(s) >= 1)
        code, errors = run.send(signal.SIGTERM)
        assert code == 75, errors
        said = [line for line in errors.splitlines() if line.startswith("rlhfjax:")]
        assert len(said) == 1 and "Traceback" not in errors
        step = re.search(
            rf"{stage} stopped at step (\d+) and was saved", said[0]
        ).group(1)
        assert (run.folder(stage) / "checkpoints" / step).is_dir()
    run.start().finish()
    assert_same_run(finished, run.workdir)
