"""Measures how long commands take to begin: help, the first training step, the first token.

    python -m benchmarks.starts --runs=3 [--other=CHECKOUT]

A start is `cold` with an empty folder of compiled programs and `second` where the same command ran
before. With --other, another checkout of the repository takes turns with this one, so that what
else the machine does falls on both. Per start there are the seconds until its sign appears and the
seconds of CPU that the process used until then, which other programs disturb less. The models are
those of the quickstart's smoke variant, which each checkout trains first, untimed.
"""

import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

RUNS = flags.DEFINE_integer("runs", 3, "starts of each kind", lower_bound=1)
BEGIN = flags.DEFINE_list("stages", ["pretrain", "ppo"], "stages that begin")
OTHER = flags.DEFINE_string("other", None, "another checkout to take turns with")
RECIPE = "--config=experiments/quickstart/recipe.py:size=smoke"
STAGES = ("tokenizer", "pretrain", "sft", "collect", "reward", "ppo")
TICKS = os.sysconf("SC_CLK_TCK")  # of a second, in /proc


@dataclasses.dataclass(frozen=True)
class Start:
    """A command, and what its output shows when it has begun."""

    name: str
    words: tuple[str, ...]
    typed: str = ""  # standard input
    stage: str = (
        ""  # the stage that begins; empty: the first byte of stdout is the sign
    )
    cold: bool = True  # measured with an empty folder of programs too


def starts(workdir: Path, stages: list[str]) -> list[Start]:
    """Returns what is measured in a workdir; stages begin anew, the last one first."""
    recipe = ("run", RECIPE, f"--workdir={workdir}")
    chat = ("chat", f"--workdir={workdir}", "--temperature=0", "--max_new_tokens=8")
    return [
        Start("--version", ("--version",), cold=False),
        Start("--help", ("--help",), cold=False),
        Start("options ppo", ("options", "ppo"), cold=False),
        Start("chat, first token", chat, typed="How are you?\n"),
        *(
            Start(f"{stage}, first step", recipe, stage=stage)
            for stage in sorted(stages, key=STAGES.index, reverse=True)
        ),
    ]


class Side:
    """A checkout with its workdir and its folder of programs."""

    def __init__(self, name: str, checkout: Path, scratch: Path):
        self.name, self.checkout = name, checkout
        self.workdir, self.cache = scratch / name / "run", scratch / name / "cache"

    def environment(self) -> dict[str, str]:
        unset = (
            "JAX_COMPILATION_CACHE_DIR",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
        )
        env = {name: value for name, value in os.environ.items() if name not in unset}
        own = {"PYTHONPATH": str(self.checkout), "XDG_CACHE_HOME": str(self.cache)}
        return {"JAX_PLATFORMS": "cpu"} | env | own

    def prepare(self, last: str) -> None:
        """Runs the recipe until a stage is done."""
        words = ["run", RECIPE, f"--workdir={self.workdir}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhfjax", *words],
            cwd=self.checkout,
            env=self.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        done = self.workdir / f"{STAGES.index(last):02d}_{last}" / "done.json"
        while not done.exists():
            if process.poll() is not None:
                raise SystemExit(f"{self.name}: the recipe ended before {last}")
            time.sleep(0.5)
        process.kill()
        process.wait()

    def measure(self, start: Start) -> tuple[float, float]:
        """Returns the wall and CPU seconds until a command has begun."""
        if start.stage:
            for folder in self.workdir.glob("[0-9][0-9]_*"):
                if int(folder.name[:2]) >= STAGES.index(start.stage):
                    shutil.rmtree(folder)
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhfjax", *start.words],
            cwd=self.checkout,
            env=self.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if start.stage else subprocess.DEVNULL,
            text=True,
        )
        assert process.stdin and process.stdout
        process.stdin.write(start.typed)
        process.stdin.close()
        if start.stage:
            assert process.stderr
            lines = iter(process.stderr.readline, "")
            begun = any(line.startswith(f"{start.stage} started") for line in lines)
        else:
            begun = bool(process.stdout.read(1))
        seconds = time.monotonic() - began
        cpu = _cpu_seconds(process.pid)
        process.kill()
        process.wait()
        if not begun:
            raise SystemExit(f"{self.name}: {start.name}: the command ended early")
        return seconds, cpu


def _cpu_seconds(pid: int) -> float:
    """Returns the user's and the system's CPU seconds of a process that nobody has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


Times = dict[tuple[str, str], list[tuple[float, float]]]  # by start and side


def measured(sides: list[Side], stages: list[str], runs: int) -> Times:
    """Returns the seconds of every start, the sides in turn."""
    times: Times = {}
    for of_sides in zip(*(starts(side.workdir, stages) for side in sides), strict=True):
        start = of_sides[0]
        for kind in ("cold", "second") if start.cold else ("",):
            name = f"{start.name} ({kind})" if kind else start.name
            for _ in range(runs):
                for side, own in zip(sides, of_sides, strict=True):
                    if kind == "cold":
                        shutil.rmtree(side.cache, ignore_errors=True)
                    seconds = side.measure(own)
                    times.setdefault((name, side.name), []).append(seconds)
                    print(name, side.name, *seconds, file=sys.stderr, flush=True)
    return times


def table(times: Times) -> Iterator[str]:
    """Yields the lines of a Markdown table: medians, and the range of the wall seconds."""
    yield "| start | checkout | seconds (range) | CPU seconds |"
    yield "|---|---|---|---|"
    for (name, side), values in times.items():
        wall, cpu = ([value[i] for value in values] for i in (0, 1))
        spread = f"{min(wall):.1f}–{max(wall):.1f}"
        median = statistics.median(wall)
        yield (
            f"| {name} | {side} | {median:.1f} ({spread}) | "
            f"{statistics.median(cpu):.1f} |"
        )


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side("this", Path(__file__).parents[1], Path(folder))]
        if OTHER.value:
            sides.append(Side("other", Path(OTHER.value).resolve(), Path(folder)))
        for side in sides:
            side.prepare(max(BEGIN.value, key=STAGES.index))
        print("\n".join(table(measured(sides, BEGIN.value, RUNS.value))))


if __name__ == "__main__":
    app.run(main)
