"""Implements `rlhfjax sweep`: expands a sweep, runs what is not finished, collects results."""

import dataclasses
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

from rlhfjax import dry_run, experiment, paths, trackers
from rlhfjax.config import write_json
from rlhfjax.errors import ConfigError, Preempted, UserError
from rlhfjax.paths import Path
from rlhfjax.progress import duration
from rlhfjax.redact import redact
from rlhfjax.report.sweep import Result, read_result, write_sweep
from rlhfjax.sweep import pool, queued
from rlhfjax.sweep.expand import Run, expand

LOCAL = ("local",)
# The launchers in launch/, each with the words that start a run. They wait until the run ends; only
# GKE's leaves that to the cluster's queue.
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
    """How a sweep runs."""

    parallel: int = 1
    """Number of runs at a time."""
    launcher: tuple[str, ...] = LOCAL
    """Words that start a run, as `launcher` returns them: put before the run's command, they wait
    and exit with its code. `{name}` stands for the run's name. GKE's words do not wait: all runs
    are submitted at once, and the cluster orders them."""
    slices_in_turn: int = 0
    """Number of TPUs that are created once and shared by the runs; 0: one TPU per run."""
    dry_run: bool = False
    """Whether to print the commands without running them."""
    cache: str = ""
    """Folder of finished stages that the runs share, see `stage_cache`; empty: none."""
    metrics: tuple[str, ...] = ()
    """Metrics on the page; empty: the most telling ones of the last stage."""


def launcher(text: str) -> tuple[str, ...]:
    """Returns the words of a launcher.

    Args:
      text: `local`; `tpu`, `gke`, `slurm` or `ssh` with flags of launch/'s programs; or a command.
    Raises:
      ConfigError: the launcher or program does not exist, or launch/ is not in this folder.
    """
    try:
        first, *flags = shlex.split(text) or [""]
    except ValueError as e:
        raise ConfigError(f"--launcher={text}: {str(e).lower()}") from None
    if first == "local" and not flags:
        return LOCAL
    if first in WORDS:
        file = paths.path("launch") / f"{first}.py"
        if not file.is_file():
            raise ConfigError(
                f"--launcher={first}: {file} is not in this folder; "
                "run this in the repository's folder"
            )
        flags = flags[:-1] if flags[-1:] == ["--"] else flags
        module = (sys.executable, "-m", f"launch.{first}")
        return (*module, *WORDS[first], "--name={name}", *flags, "--")
    if not shutil.which(first):
        raise ConfigError(
            f"--launcher={text}: expected local, {', '.join(WORDS)}, "
            "or a command that is installed"
        )
    return (first, *flags)


def sweep(
    config: str, workdir: Path, given: Mapping[str, Any], options: Options
) -> None:
    """Runs a sweep, or resumes it; finished runs are skipped.

    Args:
      config: FILE.py[:args].
      given: options of the command line, which all runs have.
    Raises:
      ConfigError: before any run, as `expand`.
      UserError: runs failed; the others are done, and the table is written.
      Preempted, KeyboardInterrupt: a signal stopped the sweep.
    """
    run_all(expand(config, workdir, given), workdir, options)


def run_all(
    runs: Sequence[Run],
    workdir: Path,
    options: Options,
    known: Mapping[str, Result] = types.MappingProxyType({}),
) -> None:
    """Runs what is not finished of an expanded sweep, and writes its tables; see `sweep`.

    Args:
      known: results of runs that are not started, by the run's name: they are taken from results.
    """
    if options.slices_in_turn:
        options = in_turn(options, workdir)
    commands = {
        run.name: whole_command(run, options.launcher, options.cache)
        for run in runs
        if run.name not in known and not run.finished
    }
    if options.dry_run:
        _print_dry_run(runs, commands, known, shared=bool(options.cache))
        return
    logs = workdir / pool.LOGS
    paths.make_folder(workdir)
    write_json(workdir / trackers.SWEEP, {"runs": [run.name for run in runs]})
    print(f"{_counted(runs, commands, known)}; logs in {logs}")
    down = [shlex.join(words) for words in down_commands(options, len(commands))]
    try:
        codes = _run_all(commands, workdir, options)
        for command in down:
            print(command)
            subprocess.run(shlex.split(command), stdin=subprocess.DEVNULL)
    except (KeyboardInterrupt, Preempted):
        for command in down:
            print(f"a TPU is still running its run; to delete it: {command}")
        raise
    finally:
        print(f"table: {collect(runs, workdir, options.metrics, known)}")
    if failed := [name for name, code in codes.items() if code]:
        reasons = "; ".join(why(codes, workdir, failed))
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {reasons}")


def _counted(
    runs: Sequence[Run], commands: Mapping[str, Any], known: Mapping[str, Result]
) -> str:
    """Returns how many runs there are, are finished, and are taken from results."""
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    finished = len(runs) - len(commands) - len(known)
    taken = f", {len(known)} taken from results" if known else ""
    return f"{count}, {finished} of them finished{taken}"


def _print_dry_run(
    runs: Sequence[Run],
    commands: Mapping[str, Sequence[str]],
    known: Mapping[str, Result],
    shared: bool,
) -> None:
    """Prints the commands and the total time, as comments and lines for a shell.

    Args:
      shared: whether the runs share the stages that are the same in them.
    """
    for run in runs:
        command = commands.get(run.name)
        state = "is taken from results" if run.name in known else "is finished"
        line = shlex.join(command) if command else f"# {run.name} {state}"
        print(redact(line))
    left = [(run.config, run.workdir) for run in runs if run.name in commands]
    total = dry_run.total_seconds(left, shared)
    time = "" if total is None else f"; about {duration(total)}, one run at a time"
    print(f"# {_counted(runs, commands, known)}{time}")


def print_configs(
    config: str, workdir: Path, given: Mapping[str, Any] | None = None
) -> None:
    """Prints the first run's config, and where the others differ from it; see `sweep`."""
    first, *others = expand(config, workdir, given)
    words = list(experiment.words_of(first.config))
    print("\n".join([f"# {first.name}", *words]))
    for run in others:
        print(f"\n# {run.name}: what differs")
        for word in experiment.words_of(run.config):
            if word not in words:
                print(word)


def _run_all(
    commands: Mapping[str, Sequence[str]], workdir: Path, options: Options
) -> dict[str, int]:
    """Runs every command; returns {run: exit code}."""
    if options.launcher[:3] != GKE:
        return pool.run_all(commands, workdir, options.parallel)
    jobs = {name: job_name(options.launcher, name) for name in commands}
    return queued.run_all(commands, jobs, states_command(options.launcher), workdir)


def default_cache(workdir: Path, launcher: Sequence[str]) -> str:
    """Returns the cache in a sweep's folder; "" if the runs do not see that folder."""
    shared = tuple(launcher) == LOCAL or paths.remote(workdir)
    return str(workdir / "cache") if shared else ""


def whole_command(
    run: Run, launcher: Sequence[str] = LOCAL, cache: str = ""
) -> list[str]:
    """Returns the words that start a run: locally with this interpreter, or with a launcher."""
    words = [*run.command]
    if cache:
        words.append(f"--cache={cache}")
    if tuple(launcher) == LOCAL:
        return [sys.executable, "-m", "rlhfjax", *words]
    return [
        *(word.replace("{name}", run.name) for word in launcher),
        "rlhfjax",
        *map(pool.Verbatim, words),
    ]


def job_name(launcher: Sequence[str], name: str) -> str:
    """Returns the name that a launcher gives to a run: the last --name among its words."""
    words = [word for word in launcher if word.startswith("--name=")] or ["--name="]
    return words[-1].partition("=")[2].replace("{name}", name)


def states_command(launcher: Sequence[str]) -> list[str]:
    """Returns the words that print the states of GKE jobs, in the launcher's namespace."""
    where = [
        word
        for word in launcher
        if word.startswith(("--context=", "--namespace=", "--poll="))
    ]
    return [*GKE, "states", *where]


def in_turn(options: Options, workdir: Path) -> Options:
    """Returns options whose launcher names a TPU by the run's slot and keeps it for the next run.

    Raises:
      ConfigError: the launcher is not `tpu`.
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
    """Returns the commands that delete the TPUs that runs shared; [] if each run had its own.

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


def collect(
    runs: Sequence[Run],
    workdir: Path,
    metrics: Sequence[str] = (),
    known: Mapping[str, Result] = types.MappingProxyType({}),
) -> Path:
    """Writes the tables and the page of a sweep from its runs' files so far; returns the page."""
    results = []
    for run in runs:
        result = known.get(run.name)
        if result is None:
            result = read_result(workdir, run.name, run.setting, run.seeds)
        results.append(result)
    return write_sweep(workdir, results, metrics)


def why(codes: Mapping[str, int], workdir: Path, failed: Sequence[str]) -> list[str]:
    """Returns one text per failed run: its name, its exit code, and the last line of its log."""
    reasons = []
    for name in failed:
        log = pool.log_of(workdir, name)
        text = log.read_bytes().decode(errors="replace") if log.exists() else ""
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        last = lines[-1] if lines else "no output"
        reasons.append(f"{name} ({pool.describe(codes[name])}: {last})")
    return reasons
