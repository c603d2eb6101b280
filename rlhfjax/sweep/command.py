"""`rlhfjax sweep`: expand, run what is not finished, collect."""

import dataclasses
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rlhfjax import paths
from rlhfjax.errors import ConfigError, Preempted, UserError
from rlhfjax.paths import Path
from rlhfjax.report.sweep import read_result, write_sweep
from rlhfjax.sweep import is_seed, pool, queued
from rlhfjax.sweep.expand import Run, expand

LOCAL = ("local",)
# What is in launch/, each with its words that start a run: they wait for its end, but for gke's,
# which leave it to the cluster's queue.
WORDS = {
    "tpu": ("run",),
    "gke": ("submit",),
    "slurm": ("submit", "--wait"),
    "ssh": ("run",),
}
GKE = (sys.executable, "-m", "launch.gke")
TPU = (sys.executable, "-m", "launch.tpu")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a sweep runs.

    launcher: the words of a command that takes a run's command after its own, waits, and exits with
      its code, as `launcher` makes them. `{name}` in it stands for the run's name. "local" is this
      machine. GKE's do not wait: all runs are submitted at once, and the cluster orders them.
    slices_in_turn: so many TPUs are created once and take the runs in turn, in the place of one TPU
      per run; 0: not.
    metrics: what the page shows; none: the telling ones of the last stage.
    """

    parallel: int = 1
    launcher: tuple[str, ...] = LOCAL
    slices_in_turn: int = 0
    dry_run: bool = False
    metrics: tuple[str, ...] = ()


def launcher(text: str) -> tuple[str, ...]:
    """The words of a launcher: `local`; `tpu`, `gke`, `slurm` or `ssh` with flags of launch/'s; or
    those of a command.

    Raises:
      ConfigError: there is no such launcher or program, or launch/ is not here.
    """
    try:
        first, *flags = shlex.split(text) or [""]
    except ValueError as e:
        raise ConfigError(f"--launcher={text}: {str(e).lower()}") from None
    if first == "local" and not flags:
        return LOCAL
    if first in WORDS:
        if not (file := paths.path("launch") / f"{first}.py").is_file():
            raise ConfigError(
                f"--launcher={first}: {file} is not in this folder; expected to run in the "
                "repository's"
            )
        flags = flags[:-1] if flags[-1:] == ["--"] else flags
        return (
            sys.executable,
            "-m",
            f"launch.{first}",
            *WORDS[first],
            "--name={name}",
            *flags,
            "--",
        )
    if not shutil.which(first):
        raise ConfigError(
            f"--launcher={text}: expected local, {', '.join(WORDS)}, or a command that is installed"
        )
    return (first, *flags)


def sweep(
    config: str, workdir: Path, given: Mapping[str, Any], options: Options
) -> None:
    """Runs a sweep, or goes on with it; finished runs are not run again.

    Raises:
      ConfigError: before any run, as `expand`.
      UserError: runs failed; the others are done, and the table is written.
      Preempted, KeyboardInterrupt: stopped by a signal.
    """
    if options.slices_in_turn:
        options = in_turn(options, workdir)
    runs = expand(config, workdir, given)
    commands = {
        run.name: whole_command(run, options.launcher)
        for run in runs
        if not run.finished
    }
    if options.dry_run:
        for run in runs:
            print(
                f"# {run.name} is finished"
                if run.finished
                else shlex.join(commands[run.name])
            )
        return
    print(
        f"{len(runs)} runs, {len(runs) - len(commands)} of them finished; logs in "
        f"{workdir / 'logs'}"
    )
    try:
        if options.launcher[:3] == GKE:
            jobs = {name: job_name(options.launcher, name) for name in commands}
            codes = queued.run_all(
                commands, jobs, states_command(options.launcher), workdir
            )
        else:
            codes = pool.run_all(commands, workdir, options.parallel)
        for words in down_commands(options, len(commands)):
            print(shlex.join(words))
            subprocess.run(words, stdin=subprocess.DEVNULL)
    except (KeyboardInterrupt, Preempted):
        for words in down_commands(options, len(commands)):
            print(
                f"a TPU is left, on which its run goes on; to delete it: {shlex.join(words)}"
            )
        raise
    finally:
        print(f"table: {collect(runs, workdir, options.metrics)}")
    if failed := [name for name, code in codes.items() if code]:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed: "
            + "; ".join(why(codes, workdir, failed))
        )


def whole_command(run: Run, launcher: Sequence[str] = LOCAL) -> list[str]:
    """The words that start a run: with this interpreter here, or as the launcher's `rlhfjax …`."""
    if tuple(launcher) == LOCAL:
        return [sys.executable, "-m", "rlhfjax", *run.command]
    return [
        *(word.replace("{name}", run.name) for word in launcher),
        "rlhfjax",
        *run.command,
    ]


def job_name(launcher: Sequence[str], name: str) -> str:
    """The name that a launcher's words give to a run: their last --name."""
    words = [word for word in launcher if word.startswith("--name=")] or ["--name="]
    return words[-1].partition("=")[2].replace("{name}", name)


def states_command(launcher: Sequence[str]) -> list[str]:
    """The words that print the states of GKE's jobs, where and how often the launcher's words say."""
    where = [
        word
        for word in launcher
        if word.startswith(("--context=", "--namespace=", "--poll="))
    ]
    return [*GKE, "states", *where]


def in_turn(options: Options, workdir: Path) -> Options:
    """Options whose launcher names a TPU by the slot that a run takes, and leaves it for the next
    run.

    Raises:
      ConfigError: the launcher is not that of TPU VMs.
    """
    if options.launcher[:3] != TPU:
        raise ConfigError(
            "--slices_in_turn: expected --launcher='tpu …', whose TPUs it keeps from run to run"
        )
    flags = [word for word in options.launcher[4:-1] if not word.startswith("--name=")]
    name = f"--name={workdir.name}-{pool.SLOT}"
    launcher = (*TPU, "run", name, *flags, "--keep", "--")
    return dataclasses.replace(
        options, launcher=launcher, parallel=options.slices_in_turn
    )


def down_commands(options: Options, runs: int) -> list[list[str]]:
    """The commands that delete the TPUs which took the runs in turn.

    None where each run had its own.
    """
    where = [
        word for word in options.launcher if word.startswith(("--zone=", "--project="))
    ]
    name = job_name(options.launcher, "")
    slots = range(min(options.slices_in_turn, runs))
    return [
        [*TPU, "down", f"--name={name.replace(pool.SLOT, str(slot))}", *where]
        for slot in slots
    ]


def collect(runs: Sequence[Run], workdir: Path, metrics: Sequence[str] = ()) -> Path:
    """Writes the sweep's tables and page from what its runs have left so far; returns the page."""
    results = []
    for run in runs:
        seeds = {
            option: value for option, value in run.overrides.items() if is_seed(option)
        }
        setting = {
            option: value
            for option, value in run.overrides.items()
            if not is_seed(option)
        }
        results.append(read_result(workdir, run.name, setting, seeds))
    return write_sweep(workdir, results, metrics)


def why(codes: Mapping[str, int], workdir: Path, failed: Sequence[str]) -> list[str]:
    """A text a failed run: its name, how it ended, and the last line of its log."""
    said = []
    for name in failed:
        log = pool.log_of(workdir, name)
        lines = (
            log.read_bytes().decode(errors="replace").split("\n")
            if log.exists()
            else []
        )
        last = next(
            (line.strip() for line in reversed(lines) if line.strip()), "no output"
        )
        said.append(f"{name} ({pool.describe(codes[name])}: {last})")
    return said
