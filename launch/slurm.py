"""Runs a command on the nodes of a Slurm cluster: one process a node, requeued when it was preempted or out of time.

    python -m launch.slurm submit --name=a --nodes=4 --gpus_per_node=8 --time=24:00:00 -- rlhfjax run --config=…
    python -m launch.slurm script … -- …      prints what `sbatch` would get
    python -m launch.slurm down --name=a

`submit --wait` waits for the end and has the command's exit code. This is a batch script and not submitit, which would
submit a pickled function: here a dry run shows exactly what would run, and a login node needs no package.
"""

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence

from absl import flags

from launch.shell import PREEMPTED, Shell, environment, exports, given, launch, required, slug


@dataclasses.dataclass(frozen=True)
class Job:
    """What runs where; `time` as Slurm has it, D-HH:MM:SS."""

    name: str
    command: tuple[str, ...]
    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    grace: int = 300
    max_restarts: int = 20
    output: str = "slurm-%x-%j.txt"
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


def script(job: Job) -> str:
    """The batch script. Its environment is the cluster's own: nothing of the submitting shell's goes along."""
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_task or None,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "output": job.output,
        "open-mode": "append",  # a requeued job goes on in the same file
        "export": "NONE",
        "dependency": "singleton",  # what is submitted twice does not run twice at once
        "signal": f"B:TERM@{job.grace}",  # to this script, so many seconds before the time is up
    }
    head = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    command = f"{_PROCESS}{exports(job.env)}{shlex.join(job.command)}"
    return "\n".join(
        ["#!/bin/bash -l", *head, "#SBATCH --requeue", _BODY.format(command=shlex.quote(command), **_numbers(job))]
    )


def _numbers(job: Job) -> dict[str, int]:
    return {"preempted": PREEMPTED, "most": job.max_restarts}


_PROCESS = "JAX_NUM_PROCESSES=$SLURM_NTASKS JAX_PROCESS_ID=$SLURM_PROCID "  # a process has all GPUs of its node

# The script passes SIGTERM on, since srun alone would kill; `wait` returns when the trap has run, so it waits again.
_BODY = """\
export JAX_COORDINATOR_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):12345
srun --export=ALL --kill-on-bad-exit=0 bash -c {command} &
trap 'scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
wait $!; code=$?
while kill -0 $! 2>/dev/null; do wait $!; code=$?; done
if [ $code -eq {preempted} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {most} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def submit(name: str, wait: bool) -> list[str]:
    """The command that takes the script on its standard input, and prints the job's number."""
    return ["sbatch", "--parsable", *(["--wait"] if wait else [])]


def down(name: str) -> list[str]:
    return ["scancel", f"--name={name}", "--me"]


def _flags(fv: flags.FlagValues) -> None:
    flags.DEFINE_integer("nodes", 1, "one process each", 1, flag_values=fv)
    flags.DEFINE_integer("gpus_per_node", 0, "0: none is asked for", 0, flag_values=fv)
    flags.DEFINE_integer("cpus_per_task", 0, "0: the cluster's default", 0, flag_values=fv)
    flags.DEFINE_string("time", "24:00:00", "of one start; a job that is not done is requeued", flag_values=fv)
    flags.DEFINE_string("partition", None, "default: the cluster's", flag_values=fv)
    flags.DEFINE_string("account", None, "default: the user's", flag_values=fv)
    flags.DEFINE_integer("grace", 300, "seconds that a run has to save before the time is up", 1, flag_values=fv)
    flags.DEFINE_integer("max_restarts", 20, "after pre-emptions", 0, flag_values=fv)
    flags.DEFINE_string("output", "slurm-%x-%j.txt", "the log", flag_values=fv)
    flags.DEFINE_bool("wait", False, "until the job has ended", flag_values=fv)


def act(fv: flags.FlagValues, words: Sequence[str], command: Sequence[str]) -> int:
    if list(words) not in (["submit"], ["script"], ["down"]):
        raise flags.IllegalFlagValueError(f"{' '.join(words) or 'no word'}: expected one of submit, script, down")
    required(fv, "name")
    name, shell = slug(fv.name), Shell(fv.dry_run)
    if words[0] == "down":
        return shell.run(down(name))
    own = {"name": name, "command": tuple(given(command)), "env": environment(fv.env)}
    job = Job(**{field.name: fv[field.name].value for field in dataclasses.fields(Job) if field.name not in own}, **own)
    if words[0] == "script" or fv.dry_run:
        shell.say(script(job))
    return 0 if words[0] == "script" else shell.run(submit(name, fv.wait), stdin=script(job))


def main() -> None:
    launch(__doc__, _flags, act, sys.argv)


if __name__ == "__main__":
    main()
