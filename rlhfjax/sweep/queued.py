"""Submits all runs to a cluster's queue and waits for their jobs together."""

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from rlhfjax import json_text, paths
from rlhfjax.errors import DataError, first_line
from rlhfjax.paths import Path
from rlhfjax.sweep import pool

POLL = 30.0  # seconds between checks of the states
# Exit codes of the states in which a job has ended.
CODES = {"Completed": 0, "Failed": 1, "Missing": 1}


def run_all(
    commands: Mapping[str, Sequence[str]],
    jobs: Mapping[str, str],
    states: Sequence[str],
    folder: Path,
    say: Callable[[str], None] = print,
) -> dict[str, int]:
    """Submits every run and waits until all have ended. Existing jobs are reused.

    Args:
      commands: {run: the words that submit it without waiting}.
      jobs: {run: the name of its job in the cluster}.
      states: the words that, followed by names of jobs, print {job: state} as JSON.
      folder: output of the commands is appended to `folder/logs/NAME.txt`.
    Returns:
      {run: exit code}: 0 or 1, or the exit code of a submission that failed.
    Raises:
      KeyboardInterrupt: Ctrl-C. The jobs continue, and the same sweep finds them.
    """
    codes = _submit(commands, folder, say)
    unknown = ""
    while waiting := [name for name in commands if name not in codes]:
        found, error = _ask(states, [jobs[name] for name in waiting])
        if error and error != unknown:
            say(f"the cluster does not answer; asking again: {error}")
        unknown = error
        for name in waiting:
            state = found.get(jobs[name], "")
            if state in CODES:
                codes[name] = CODES[state]
                say(f"[{len(codes)}/{len(commands)}] {name}: {state}")
        if len(codes) < len(commands):
            time.sleep(POLL)
    return codes


def _submit(
    commands: Mapping[str, Sequence[str]], folder: Path, say: Callable[[str], None]
) -> dict[str, int]:
    """Submits one run after the other; returns {run: exit code} of those that were not accepted."""
    failed: dict[str, int] = {}
    here = paths.Mirror(folder, [f"{pool.LOGS}/{name}.txt" for name in commands])
    paths.make_folder(here.folder / pool.LOGS)
    for name, command in commands.items():
        with pool.log_of(here.folder, name).open("a") as log:
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            ).returncode
        if code:
            failed[name] = code
            say(
                f"{name}: not submitted ({pool.describe(code)}), see {pool.log_of(folder, name)}"
            )
    say(
        f"{len(commands) - len(failed)} of {len(commands)} runs are submitted; Ctrl-C leaves them "
        "to the cluster"
    )
    here.close()
    return failed


def _ask(states: Sequence[str], jobs: Sequence[str]) -> tuple[dict[str, str], str]:
    """Returns ({job: state}, ""), or ({}, the reason why the cluster did not answer)."""
    done = subprocess.run(
        [*states, *jobs],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        return {}, first_line(done.stderr)
    try:
        return json_text.decode(done.stdout, "its answer", dict[str, str]), ""
    except DataError as e:
        return {}, str(e)
