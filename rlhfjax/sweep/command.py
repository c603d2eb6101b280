"""`rlhfjax sweep`: expand, run what is not finished, collect."""

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhfjax.errors import UserError
from rlhfjax.report.sweep import read_result, write_sweep
from rlhfjax.sweep import is_seed, pool
from rlhfjax.sweep.expand import Run, expand

LOCAL = ("local",)


@dataclasses.dataclass(frozen=True)
class Options:
    """How a sweep runs.

    launcher: the words of a command that takes a run's command after its own, waits, and exits with its code;
      "local" is this machine. `{name}` in it stands for the run's name.
    metrics: what the page shows; none: the telling ones of the last stage.
    """

    parallel: int = 1
    launcher: tuple[str, ...] = LOCAL
    dry_run: bool = False
    metrics: tuple[str, ...] = ()


def sweep(config: str, workdir: Path, given: Mapping[str, Any], options: Options) -> None:
    """Runs a sweep, or goes on with it; finished runs are not run again.

    Raises:
      ConfigError: before any run, as `expand`.
      UserError: runs failed; the others are done, and the table is written.
      Preempted, KeyboardInterrupt: stopped by a signal.
    """
    runs = expand(config, workdir, given)
    commands = {run.name: whole_command(run, options.launcher) for run in runs if not run.finished}
    if options.dry_run:
        for run in runs:
            print(f"# {run.name} is finished" if run.finished else shlex.join(commands[run.name]))
        return
    print(f"{len(runs)} runs, {len(runs) - len(commands)} of them finished; logs in {workdir / 'logs'}")
    try:
        codes = pool.run_all(commands, workdir, options.parallel)
    finally:
        print(f"table: {collect(runs, workdir, options.metrics)}")
    if failed := [name for name, code in codes.items() if code]:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: " + "; ".join(why(codes, workdir, failed)))


def whole_command(run: Run, launcher: Sequence[str] = LOCAL) -> list[str]:
    """The words that start a run: with this interpreter here, or as the launcher's `rlhfjax …`."""
    if tuple(launcher) == LOCAL:
        return [sys.executable, "-m", "rlhfjax", *run.command]
    return [*(word.replace("{name}", run.name) for word in launcher), "rlhfjax", *run.command]


def collect(runs: Sequence[Run], workdir: Path, metrics: Sequence[str] = ()) -> Path:
    """Writes the sweep's tables and page from what its runs have left so far; returns the page."""
    results = []
    for run in runs:
        seeds = {option: value for option, value in run.overrides.items() if is_seed(option)}
        setting = {option: value for option, value in run.overrides.items() if not is_seed(option)}
        results.append(read_result(workdir, run.name, setting, seeds))
    return write_sweep(workdir, results, metrics)


def why(codes: Mapping[str, int], workdir: Path, failed: Sequence[str]) -> list[str]:
    """A text a failed run: its name, how it ended, and the last line of its log."""
    said = []
    for name in failed:
        log = pool.log_of(workdir, name)
        lines = log.read_text(errors="replace").split("\n") if log.exists() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        said.append(f"{name} ({pool.describe(codes[name])}: {last})")
    return said
