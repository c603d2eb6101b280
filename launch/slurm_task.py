"""Runs the command on every node, as a child of the process that submitit starts there.

submitit unpickles and calls a `Task` and writes down what it returns. Before the time limit, Slurm
sends that process SIGUSR2. The child gets SIGTERM, on which a run saves and exits with 75. Then
submitit's own handler of SIGUSR2 calls `checkpoint`, pickles its result and has Slurm requeue the
job.
"""

import atexit
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.shell import PREEMPTED

_STOP = (
    signal.SIGUSR2,
    signal.SIGTERM,
)  # before the time is up; on pre-emption, or when the job is canceled


@dataclasses.dataclass(frozen=True)
class Task:
    """A command, and how often its job was requeued."""

    command: tuple[str, ...]
    env: Mapping[str, str]
    max_restarts: int
    restarts: int = 0

    def __call__(self) -> int:
        """Runs the command and returns its exit code.

        Does not return where the job starts again.
        """
        import submitit

        here, requeue = submitit.JobEnvironment(), signal.getsignal(signal.SIGUSR2)
        here.paths.result_pickle.unlink(
            missing_ok=True
        )  # of a start before, that ended otherwise on another node
        code = _run(self.command, {**os.environ, **_found(), **_jax(here), **self.env})
        if code == PREEMPTED and self.restarts < self.max_restarts:
            if here.global_rank == 0 and _goes_on(here.job_id):
                _forget_results(here)
                print(
                    f"launch: preempted; restart {self.restarts + 1} of {self.max_restarts}",
                    flush=True,
                )
                signal.signal(signal.SIGUSR2, requeue)
                signal.raise_signal(signal.SIGUSR2)
            sys.exit(
                code
            )  # without a result: it is the first node's to requeue the job, or Slurm is ending it
        atexit.register(
            os._exit, code
        )  # so that Slurm has it too, once submitit has written it down
        return code

    def checkpoint(self) -> Any:
        """What submitit is to call after the requeue."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(dataclasses.replace(self, restarts=self.restarts + 1))


def _run(command: tuple[str, ...], env: Mapping[str, str]) -> int:
    """Runs a command, which gets one SIGTERM for Slurm's SIGUSR2 or SIGTERM.

    128 + the signal that killed it.
    """
    # some clusters send a signal to every process of a job, and this one would kill the child
    child = subprocess.Popen(
        command,
        env=env,
        preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
    )

    def stop(*_: object) -> None:
        for number in _STOP:
            signal.signal(number, signal.SIG_IGN)
        child.terminate()

    for number in _STOP:
        signal.signal(number, stop)
    code = child.wait()
    return 128 - code if code < 0 else code


def _found() -> dict[str, str]:
    """What is installed with this interpreter is found first.

    The job has the cluster's environment, not a login's.
    """
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    }


def _jax(here: Any) -> dict[str, str]:
    """How JAX's processes find each other; one alone has nobody to find.

    The port is chosen as JAX itself does.
    """
    if here.num_tasks == 1:
        return {}
    port = 65536 - 4096 + int(here.raw_job_id) % 4096  # two jobs may share a node
    known = {"COORDINATOR_ADDRESS": f"{here.hostnames[0]}:{port}"}
    known |= {"NUM_PROCESSES": str(here.num_tasks), "PROCESS_ID": str(here.global_rank)}
    return {f"JAX_{name}": value for name, value in known.items()}


def _forget_results(here: Any) -> None:
    """Removes what the nodes wrote down before a requeue.

    A node removes its own result when it starts; one that starts after another has ended would be
    too late.
    """
    for rank in range(here.num_tasks):
        here.paths.folder.joinpath(f"{here.job_id}_{rank}_result.pkl").unlink(
            missing_ok=True
        )


def _goes_on(job: str) -> bool:
    """Returns whether the job is running, not being canceled and not requeued already."""
    words = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    return (
        subprocess.run(words, capture_output=True, text=True).stdout.strip()
        == "RUNNING"
    )
