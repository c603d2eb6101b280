"""Stands in for Slurm: records every call, refuses what Slurm would, and really runs the batch
script on this machine.

    python slurm_standin.py sbatch|srun|scontrol|squeue|sacct|scancel ARGUMENTS

A job is a folder of $STANDIN named by its number; a node is a process of the step. SIGUSR2 goes to
all processes of a job, as it does with proctrack/linuxproc, SIGTERM to the step's own alone, as
with proctrack/cgroup.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(os.environ["STANDIN"])
OPTIONS = {
    "sbatch": {
        "job-name",
        "nodes",
        "ntasks-per-node",
        "gpus-per-node",
        "cpus-per-task",
        "time",
        "partition",
        "account",
    }
    | {"output", "open-mode", "export", "dependency", "signal", "requeue"},
    "srun": {"unbuffered", "output", "export", "kill-on-bad-exit", "cpus-per-task"},
    "scontrol": set(),
    "squeue": {"noheader", "jobs", "format"},
    "sacct": {"parsable2"},
    "scancel": {"signal", "name", "me"},
}


def fail(tool: str, text: str) -> None:
    print(f"{tool}: error: {text}", file=sys.stderr)
    sys.exit(1)


def options(tool: str, words: list[str]) -> dict[str, str]:
    found = {
        word[2:].partition("=")[0]: word.partition("=")[2]
        for word in words
        if word.startswith("--")
    }
    if unknown := set(found) - OPTIONS[tool]:
        fail(tool, f"unrecognized option '--{unknown.pop()}'")
    return found


def sbatch(words: list[str]) -> None:
    text = Path(words[0]).read_text()
    asked = options(
        "sbatch",
        [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH ")],
    )
    if asked.get("partition") == "nowhere":
        print("sbatch: error: invalid partition specified: nowhere", file=sys.stderr)
        fail("sbatch", "Batch job submission failed: Invalid partition name specified")
    job = ROOT / str(7 + len(list(ROOT.glob("[0-9]*"))))
    job.mkdir()
    (job / "script").write_text(text)
    (job / "asked").write_text(json.dumps(asked))
    (job / "state").write_text("PENDING")
    with (job / "errors").open("w") as log:
        words = [sys.executable, __file__, "_controller", job.name]
        subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    print(f"Submitted batch job {job.name}")


def _controller(words: list[str]) -> None:
    """Runs the script until it ends without having been requeued."""
    job = ROOT / words[0]
    asked = json.loads((job / "asked").read_text())
    env = {
        name: os.environ[name] for name in ("HOME", "PATH", "STANDIN")
    }  # --export=NONE
    env |= {
        "SLURM_JOB_ID": job.name,
        "SLURM_JOB_NUM_NODES": asked["nodes"],
        "SLURM_NTASKS": asked["nodes"],
    }
    env |= {"SLURM_JOB_NODELIST": f"n[0-{int(asked['nodes']) - 1}]"}
    time.sleep(
        0.1
        # submitit names its pickle once it knows the job; a job that has begun looks again after a
        # second
    )
    while True:
        (job / "state").write_text("RUNNING")
        with Path(asked["output"].replace("%j", job.name)).open("a") as out:
            code = subprocess.run(
                ["bash", job / "script"], env=env, stdout=out, stderr=out
            ).returncode
        if not (job / "requeued").exists():
            break
        (job / "requeued").unlink()
    canceled = (job / "state").read_text() == "CANCELLED"
    (job / "code").write_text(str(code))
    (job / "state").write_text(
        "CANCELLED" if canceled else "FAILED" if code else "COMPLETED"
    )


def srun(words: list[str]) -> None:
    at = words.index("--output")  # the file is a word of its own
    words[at : at + 2] = ["=".join(words[at : at + 2])]
    cut = next(i for i, word in enumerate(words) if not word.startswith("--"))
    asked = options("srun", words[:cut])
    job = ROOT / os.environ["SLURM_JOB_ID"]
    env = {
        k: v
        for k, v in os.environ.items()
        if asked["export"] == "ALL" or k.startswith("SLURM_")
    }
    nodes = []
    for i in range(int(env["SLURM_NTASKS"])):
        own = env | {
            "SLURM_PROCID": str(i),
            "SLURM_NODEID": str(i),
            "SLURM_LOCALID": "0",
        }
        with Path(asked["output"].replace("%j", job.name).replace("%t", str(i))).open(
            "a"
        ) as out:
            node = subprocess.Popen(
                words[cut:], env=own, stdout=out, stderr=out, start_new_session=True
            )
        nodes.append(node)
    (job / "pids").write_text(" ".join(str(node.pid) for node in nodes))
    (job / "pids").rename(job / "nodes")  # whole from the first moment
    sys.exit(max(node.wait() % 256 for node in nodes))


def scontrol(words: list[str]) -> None:
    job = ROOT / words[1]
    (job / "requeued").touch()
    (job / "state").write_text("PENDING")
    _send(job, signal.SIGTERM)


def squeue(words: list[str]) -> None:
    print((ROOT / options("squeue", words)["jobs"] / "state").read_text())


def sacct(words: list[str]) -> None:
    print("JobID|State|NodeList")
    for job in (ROOT / word for word in words if word.isdigit()):
        print(f"{job.name}|{(job / 'state').read_text()}|n0\n{job.name}.0|COMPLETED|n0")


def scancel(words: list[str]) -> None:
    asked = options("scancel", words)
    jobs = [ROOT / word for word in words if word.isdigit()] or list(
        ROOT.glob("[0-9]*")
    )
    for job in jobs:
        if "signal" in asked:
            _send(job, signal.Signals[f"SIG{asked['signal']}"])
        elif json.loads((job / "asked").read_text())["job-name"] == asked["name"]:
            (job / "state").write_text("CANCELLED")
            _send(job, signal.SIGTERM)


def _send(job: Path, number: int) -> None:
    while not (job / "nodes").exists():
        time.sleep(0.01)
    for pid in map(int, (job / "nodes").read_text().split()):
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if number == signal.SIGUSR2 else os.kill)(pid, number)


if __name__ == "__main__":
    if not sys.argv[1].startswith("_"):
        with (ROOT / "calls").open("a") as f:
            f.write(" ".join(sys.argv[1:]) + "\n")
    globals()[sys.argv[1]](sys.argv[2:])
