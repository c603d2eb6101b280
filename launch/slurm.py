"""Runs a command on the nodes of a Slurm cluster, one process per node.

The job is requeued when it was preempted or ran out of time.

    python -m launch.slurm submit --name=a --nodes=4 --gpus_per_node=8 --time=24:00:00 \\
        -- rlhfjax run --config=…
    python -m launch.slurm script … -- …      prints the batch script for `sbatch`
    python -m launch.slurm down --name=a

`submit --wait` waits for the end and exits with the command's exit code. submitit submits and
requeues the job and collects its results. Therefore this Python, this folder and --folder must be
on a file system that the nodes share.
"""

import contextlib
import dataclasses
import io
import math
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from launch.shell import (
    PREEMPTED,
    LaunchError,
    Shell,
    environment,
    exports,
    given,
    last_line,
    launch,
    required,
    slug,
    worst,
)
from launch.slurm_task import Task

TAIL = 10  # lines of a log that are shown where the command failed


@dataclasses.dataclass(frozen=True)
class Job:
    """What runs where."""

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
    folder: str | None = None
    sbatch: Sequence[
        str
    ] = ()  # KEY=VALUE or KEY, options of sbatch that have no flag here
    setup: Sequence[
        str
    ] = ()  # lines of the batch script before the command: module load …
    srun: Sequence[str] = ()  # arguments of srun: a container's
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


def minutes(time: str) -> int:
    """`[D-]HH:MM:SS`, as Slurm has it, in whole minutes."""
    found = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,6}):(\d{1,6}):(\d{1,6})", time)
    if not found:
        raise flags.IllegalFlagValueError(
            f"--time={time}: expected HH:MM:SS or D-HH:MM:SS"
        )
    days, hours, mins, seconds = (int(x or 0) for x in found.groups())
    return (24 * days + hours) * 60 + mins + math.ceil(seconds / 60)


# Options of sbatch that a Job has already, or on which restarting depends.
_OURS = (
    *(
        "job-name",
        "nodes",
        "ntasks-per-node",
        "gpus-per-node",
        "cpus-per-task",
        "time",
        "partition",
        "account",
    ),
    *(
        "dependency",
        "signal",
        "requeue",
        "no-requeue",
        "export",
        "output",
        "error",
        "open-mode",
        "wckey",
        "array",
    ),
)


def sbatch_options(pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` and `KEY` texts as submitit's additional parameters.

    Raises:
      LaunchError: one is an option that a flag of this launcher sets.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", key):
            raise LaunchError(
                f"--sbatch={pair}: expected KEY=VALUE or KEY, a long option of sbatch"
            )
        if key in _OURS:
            raise LaunchError(
                f"--sbatch={pair}: this launcher sets {key} itself; --help lists its flags"
            )
        options[key.replace("-", "_")] = value if equals else True
    return options


def validate(job: Job) -> None:
    """Checks what a cluster would accept and then run on one core.

    Raises:
      LaunchError: GPUs are asked for, and neither CPUs nor whole nodes.
    """
    if (
        job.gpus_per_node
        and not job.cpus_per_task
        and "exclusive" not in sbatch_options(job.sbatch)
    ):
        raise LaunchError(
            f"--gpus_per_node={job.gpus_per_node}: most clusters give one CPU core per task, and "
            "memory by the core, "
            "where none is asked for; add --cpus_per_task=N, or --sbatch=exclusive for whole nodes"
        )


def parameters(job: Job) -> dict[str, Any]:
    """What submitit makes the batch script of.

    Nothing of the submitting shell's environment goes along.
    """
    cpus = (
        [f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task else []
    )  # which srun takes from no script
    return {
        "job_name": job.name,
        "nodes": job.nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": job.gpus_per_node or None,
        "cpus_per_task": job.cpus_per_task or None,
        "time": minutes(job.time),
        "partition": job.partition,
        "account": job.account,
        "dependency": "singleton",  # what is submitted twice does not run twice at once
        "signal_delay_s": job.grace,  # before the time is up; to the processes, which pass it on
        "stderr_to_stdout": True,
        "setup": [
            "export SUBMITIT_LOG_LEVEL=ERROR",
            *job.setup,
        ],  # the log is the command's
        "srun_args": ["--export=ALL", "--kill-on-bad-exit=0", *cpus, *job.srun],
        "wckey": None,
        "additional_parameters": {"requeue": True, "export": "NONE"}
        | sbatch_options(job.sbatch),
    }


def submitit() -> Any:
    """The library, which is needed here alone."""
    os.environ.setdefault(
        "SUBMITIT_LOG_LEVEL", "NOCONFIG"
    )  # it would close all other handlers, and say things twice
    try:
        import submitit
    except ImportError:
        raise LaunchError(
            "submitit is not installed in this Python: python3 -m pip install 'submitit>=1.5'"
        ) from None
    return submitit


def executor(job: Job) -> Any:
    """submitit's, with the job's parameters."""

    class Executor(submitit().SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            # as on a cluster: a dry run needs none, and without `sbatch` there is one clear line
            return 2

    made = Executor(
        job.folder or f"runs/slurm/{job.name}", max_num_timeout=job.max_restarts
    )
    made.update_parameters(**parameters(job))
    return made


def script(job: Job) -> str:
    """The batch script, and below it what is not in it: the command, which submitit pickles."""
    made = executor(job)
    text = made._make_submission_file_text(made._submitit_command_str, "")
    return f"{text}\n# which runs on every node: {exports(job.env)}{shlex.join(job.command)}"


def submit(job: Job) -> Any:
    """Submits the job; returns submitit's record of it."""
    errors = submitit().core.utils
    try:
        with contextlib.redirect_stderr(
            io.StringIO()
        ):  # on which submitit repeats what the error says
            return executor(job).submit(Task(job.command, job.env, job.max_restarts))
    except FileNotFoundError:
        raise LaunchError(
            "sbatch is not installed on this machine, or not in PATH"
        ) from None
    except (errors.FailedJobError, errors.FailedSubmissionError) as e:
        raise LaunchError(last_line(str(e)) or type(e).__name__) from None


def finish(shell: Shell, job: Job, submitted: Any) -> int:
    """Waits for the job's end, through requeues; one exit code for all nodes."""
    submitted.wait()
    tasks = [submitted.task(i) for i in range(submitted.num_tasks)]
    lost = [task for task in tasks if not task.paths.result_pickle.exists()]
    codes = [
        result(shell, task) for task in tasks if task not in lost[1:]
    ]  # one is enough: submitit waits for it
    if worst(codes) == PREEMPTED:
        raise LaunchError(
            f"{job.name}: preempted more than --max_restarts={job.max_restarts} times; its state "
            "is saved"
        )
    return worst(codes)


def result(shell: Shell, task: Any) -> int:
    """A node's exit code, 1 where it left none; the end of its log is shown where it is not 0."""
    errors = submitit().core.utils
    try:
        code = task.result()
        how = f"ended with exit code {code}"
    except errors.FailedJobError:  # the command could not be started
        code, how = 1, "failed"
    except errors.UncompletedJobError:
        code, how = 1, f"is {task.state}"
    if code:
        shell.say(f"job {task.job_id} {how}; {task.paths.stdout} ends with")
        for line in (task.stdout() or "").splitlines()[-TAIL:]:
            shell.say(line)
    return code


def down(name: str) -> list[str]:
    return ["scancel", f"--name={name}", "--me"]


def _flags(fv: flags.FlagValues) -> None:
    flags.DEFINE_integer(
        "nodes", 1, "number of nodes, one process each", 1, flag_values=fv
    )
    flags.DEFINE_integer(
        "gpus_per_node", 0, "GPUs to request; 0: none", 0, flag_values=fv
    )
    flags.DEFINE_integer(
        "cpus_per_task", 0, "0: the cluster's default", 0, flag_values=fv
    )
    flags.DEFINE_string(
        "time",
        "24:00:00",
        "time limit of one start; an unfinished job is requeued",
        flag_values=fv,
    )
    flags.DEFINE_string("partition", None, "default: the cluster's", flag_values=fv)
    flags.DEFINE_string("account", None, "default: the user's", flag_values=fv)
    flags.DEFINE_integer(
        "grace",
        300,
        "seconds a run has to save before the time limit",
        1,
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "max_restarts", 20, "restarts after preemptions", 0, flag_values=fv
    )
    flags.DEFINE_multi_string(
        "sbatch",
        [],
        "an sbatch option KEY=VALUE or KEY: mem=0, exclusive, qos=high; repeatable",
        flag_values=fv,
    )
    flags.DEFINE_multi_string(
        "setup",
        [],
        "a line before the command in the batch script: 'module load cuda'; repeatable",
        flag_values=fv,
    )
    flags.DEFINE_multi_string(
        "srun",
        [],
        "an srun argument: --container-image=…; repeatable",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "folder",
        None,
        "folder for scripts, logs and results; default: runs/slurm/NAME",
        flag_values=fv,
    )
    flags.DEFINE_bool("wait", False, "wait until the job has ended", flag_values=fv)


def act(fv: flags.FlagValues, words: Sequence[str], command: Sequence[str]) -> int:
    if list(words) not in (["submit"], ["script"], ["down"]):
        raise flags.IllegalFlagValueError(
            f"{' '.join(words) or 'no word'}: expected one of submit, script, down"
        )
    required(fv, "name")
    name, shell = slug(fv.name), Shell(fv.dry_run)
    if words[0] == "down":
        return shell.run(down(name))
    own = {"name": name, "command": tuple(given(command)), "env": environment(fv.env)}
    job = Job(
        **{
            field.name: fv[field.name].value
            for field in dataclasses.fields(Job)
            if field.name not in own
        },
        **own,
    )
    validate(job)
    if words[0] == "script" or fv.dry_run:
        shell.say(script(job))
        return 0
    submitted = submit(job)
    shell.say(
        f"{name}: job {submitted.job_id}; its log: {submitted.task(0).paths.stdout}"
    )
    return finish(shell, job, submitted) if fv.wait else 0


def main() -> None:
    launch(__doc__, _flags, act, sys.argv)


if __name__ == "__main__":
    main()
