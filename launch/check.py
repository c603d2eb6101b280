"""Validates the config of a run before a machine is requested, if rlhfjax is installed here.

    python -m launch.check run --config=experiments/quickstart/recipe.py --workdir=gs://…

An invalid config fails here within a second, not after hours in a queue. Nothing is computed, and
no device, file or bucket is accessed. Exit code 2: the config is invalid; 3: rlhfjax is not
installed in this Python.
"""

import os
import subprocess
import sys
from collections.abc import Sequence

from launch.shell import LaunchError, Shell, last_line

MISSING = 3


def validate_command(shell: Shell, command: Sequence[str], spot: bool) -> None:
    """Validates the config of `rlhfjax run|train`; says in one line where it cannot.

    Raises:
      LaunchError: rlhfjax refuses the config.
    """
    if shell.dry_run or list(command[:2]) not in (
        ["rlhfjax", "run"],
        ["rlhfjax", "train"],
    ):
        return
    words = [
        sys.executable,
        "-m",
        "launch.check",
        *command[1:],
        *(["--spot"] if spot else []),
    ]
    done = subprocess.run(
        words,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    last = last_line(done.stderr)
    if done.returncode == 2:
        raise LaunchError(f"{last}; nothing was created")
    if done.returncode == MISSING:
        shell.say(f"the config is not checked before the start: {last}")
    elif done.returncode:
        shell.say(
            f"the config could not be checked here, and a run may refuse it: {last}"
        )
    for line in done.stdout.splitlines():
        shell.say(line)


def main(argv: Sequence[str]) -> None:
    spot = argv[-1] == "--spot"
    words = list(argv[1:-1] if spot else argv[1:])
    try:
        from rlhfjax import recipe
        from rlhfjax.errors import UserError
        from rlhfjax.main import parse
    except ImportError as e:
        print(f"{e.name or e} is not installed in {sys.executable}", file=sys.stderr)
        sys.exit(MISSING)
    try:
        parsed = parse(["rlhfjax", *words])
        typed = recipe.validate(parsed[1].config) if parsed else {}
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
    risky = [name for name, config in typed.items() if _saves_by_steps_alone(config)]
    if spot and risky:
        print(
            f"warning: --spot, and checkpoint.minutes is 0 in {', '.join(risky)}: a preemption "
            "loses what was computed since checkpoint.every"
        )


def _saves_by_steps_alone(config: object) -> bool:
    checkpoint = getattr(config, "checkpoint", None)
    return checkpoint is not None and not getattr(checkpoint, "minutes", 0)


if __name__ == "__main__":
    main(sys.argv)
