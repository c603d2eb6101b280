"""Compares rlhfjax with TRL and Tunix: the sides in turn, each run in a separate process.

    python -m benchmarks.compare --out=FILE.jsonl --trl=PYTHON --trl_ppo=PYTHON --tunix=PYTHON
    python -m benchmarks.compare --table=FILE.jsonl

The first command measures, adds JSON lines to a file and prints the table; given again, it leaves
out what the file has, so that a comparison may take several evenings of one machine. The second
prints the table of a file again. PYTHON is the interpreter of an environment with the peer, see
benchmarks/peers/README.md. A side without an interpreter is left out, and the table says so.

A pilot round with few steps finds each side's fastest setting per workload and shape. Then every
round runs, for each workload, each side's settings for the three pairings: float32 against
float32, default against default, best against best. Odd rounds run the sides in reverse order.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks import compare_table, machine, options
from benchmarks.compare_table import SIDES
from rlhfjax import json_text, precision
from rlhfjax.models.presets import preset

HERE = Path(__file__).parent
SPEC = json_text.read(HERE / "workloads.json", json_text.Object)
WORKLOADS = (  # sft and grpo at the small shape are left out, for time
    *(f"{name}:tiny" for name in ("pretrain", "sft", "rm", "generate", "ppo", "grpo")),
    *(f"{name}:small" for name in ("pretrain", "rm", "generate", "ppo")),
)
KNOWN = [f"{name}:{shape}" for name in SPEC["workloads"] for shape in ("tiny", "small")]
# Steps of a pilot run that are measured, and left out before them.
PILOT = {"steps": 2, "warmup": 1}


class Run(NamedTuple):
    """One process."""

    side: str
    setting: str
    workload: str
    shape: str


@dataclasses.dataclass(frozen=True)
class Sides:
    """The interpreters of the sides; "" leaves a side out."""

    trl: str = ""
    trl_ppo: str = ""  # an older TRL, the last with PPO
    tunix: str = ""

    def interpreter(self, side: str, workload: str) -> str:
        if side == "rlhfjax":
            return sys.executable
        if side == "trl" and workload == "ppo":
            return self.trl_ppo
        return getattr(self, side)

    def present(self, workload: str) -> list[str]:
        """Returns the sides that can run a workload."""
        return [side for side in SIDES if self.interpreter(side, workload)]


# What a record is about: a record of the same is not measured again.
ABOUT = ("kind", "phase", "round", "workload", "shape", "side", "setting")


class Comparison:
    """Runs processes and adds their JSON lines to a file; what the file has is not run again.

    Args:
      sizes: `steps` and `warmup` of the rounds, where they are not the workload's own.
    """

    def __init__(
        self, sides: Sides, out: Path, limit: float, sizes: dict[str, int] | None = None
    ):
        self.sides, self._out, self._limit, self._sizes = sides, out, limit, sizes or {}
        self.records: list[dict[str, Any]] = []
        if out.exists():
            self.records = [
                json_text.parse(line) for line in out.read_text().splitlines()
            ]

    def has(self, about: dict[str, Any]) -> bool:
        """Returns whether there is a record of the same, with or without a result."""
        wanted = {name: about[name] for name in ABOUT if name in about}
        return any(wanted.items() <= record.items() for record in self.records)

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with self._out.open("a") as file:
            file.write(json_text.encode(record, self._out) + "\n")

    def run(self, run: Run, **about: Any) -> None:
        """Measures one setting of one side; a failure is a record with `error`."""
        about = {"kind": "run", **about, **run._asdict()}
        if self.has(about):
            return
        about["load_before"] = machine.load()
        sizes = PILOT if about["phase"] == "pilot" else self._sizes
        command = self._command(run, sizes)
        print(f"{about['phase']} {' '.join(run)}", file=sys.stderr, flush=True)
        self.add(about | measured(command, self._limit))

    def _command(self, run: Run, sizes: dict[str, int]) -> list[str]:
        interpreter = self.sides.interpreter(run.side, run.workload)
        if run.side != "rlhfjax":
            script = str(HERE / "peers" / f"{run.side}_bench.py")
            return [interpreter, script, *peer_task(run, sizes)]
        command = [interpreter, "-m", "benchmarks.run", f"--workload={run.workload}"]
        command += [f"--shape={run.shape}", f"--dtype={run.setting}"]
        return command + [f"--{name}={n}" for name, n in sizes.items()]

    def rooflines(self, names: list[str]) -> None:
        """Measures this machine's rate of every product of the workloads."""
        for workload, shape in (name.split(":") for name in names):
            command = [sys.executable, "-m", "benchmarks.products"]
            command += [f"--workload={workload}", f"--shape={shape}"]
            about = {"kind": "roofline", "workload": workload, "shape": shape}
            if self.has(about):
                continue
            self.add(about | measured(command, self._limit))

    def pilot(self, names: list[str]) -> None:
        for workload, shape in (name.split(":") for name in names):
            for side in self.sides.present(workload):
                for setting in SIDES[side].settings:
                    run = Run(side, setting, workload, shape)
                    self.run(run, phase="pilot", round=0)

    def round(self, number: int, names: list[str]) -> None:
        for workload, shape in (name.split(":") for name in names):
            runs = list(self._wanted(workload, shape))
            for run in runs[::-1] if number % 2 else runs:
                self.run(run, phase="round", round=number)

    def _wanted(self, workload: str, shape: str) -> Iterator[Run]:
        """Yields each side's settings of the three pairings, each setting once."""
        best = compare_table.best_settings(self.records, workload, shape)
        for side in self.sides.present(workload):
            default = SIDES[side].default
            wanted = ["float32", default, best.get(side, "float32")]
            if default == precision.AUTO and wanted[-1] == precision.here():
                wanted.pop()  # the default is the best one
            for setting in dict.fromkeys(wanted):
                yield Run(side, setting, workload, shape)


def peer_task(run: Run, sizes: dict[str, int]) -> list[str]:
    """Returns the words that a peer's script reads its task from."""
    sizes = SPEC["workloads"][run.workload] | sizes
    config = preset(run.shape)
    names = ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_length")
    words = {"workload": run.workload, "setting": run.setting, **sizes}
    words |= {f"model.{name}": getattr(config, name) for name in names}
    words |= {f"optimizer.{name}": value for name, value in SPEC["optimizer"].items()}
    return [f"{name}={value}" for name, value in words.items()]


def measured(command: list[str], limit: float) -> dict[str, Any]:
    """Returns the JSON that a process prints last, or {"error": ...}."""
    inside = command[1] == "-m"  # rlhfjax itself; peers must not see its folder
    environment = {k: v for k, v in os.environ.items() if inside or k != "PYTHONPATH"}
    try:
        result = subprocess.run(
            command,
            cwd=HERE.parent if inside else HERE / "peers",
            env=environment,
            timeout=limit,
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {limit:.0f} s"}
    except OSError as error:
        return {"error": str(error)}
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode or not lines:
        lines = result.stderr.strip().splitlines() or ["no message"]
        return {"error": f"exit code {result.returncode}: {lines[-1][:300]}"}
    return json_text.parse(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare")
    parser.add_argument("--trl", default="", metavar="PYTHON")
    parser.add_argument("--trl_ppo", default="", metavar="PYTHON")
    parser.add_argument("--tunix", default="", metavar="PYTHON")
    parser.add_argument("--out", type=Path, default=Path("compare.jsonl"))
    parser.add_argument("--table", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default: the workload's own")
    parser.add_argument("--warmup", type=int, help="steps that are left out before")
    parser.add_argument("--limit", type=float, default=900, help="seconds per run")
    parser.add_argument("--only", default=",".join(WORKLOADS), metavar="NAME:SHAPE,...")
    given = parser.parse_args()
    if given.table:
        lines = given.table.read_text().splitlines()
        print(compare_table.markdown([json_text.parse(line) for line in lines]))
        return
    names = options.names(parser, "only", given.only, KNOWN)
    sides = Sides(
        trl=options.interpreter(parser, "trl", given.trl),
        trl_ppo=options.interpreter(parser, "trl_ppo", given.trl_ppo),
        tunix=options.interpreter(parser, "tunix", given.tunix),
    )
    sizes = {"steps": given.steps, "warmup": given.warmup}
    sizes = {name: n for name, n in sizes.items() if n is not None}
    comparison = Comparison(sides, given.out, given.limit, sizes)
    comparison.add({"kind": "machine", **machine.describe()})
    comparison.rooflines(names)
    comparison.pilot(names)
    for number in range(given.rounds):
        comparison.round(number, names)
    print(compare_table.markdown(comparison.records))


if __name__ == "__main__":
    main()
