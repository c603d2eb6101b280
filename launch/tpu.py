"""Runs a command on all workers of Cloud TPU VMs (v2 to v6e) and restarts it after preemptions.

    python -m launch.tpu run --name=a --zone=us-west4-a --accelerator=v5litepod-16 --spot -- \\
      rlhfjax run --config=… --workdir=gs://BUCKET/runs/a
    python -m launch.tpu logs | stop | down --name=a --zone=us-west4-a
    python -m launch.tpu list --zone=us-west4-a

`run` creates a queued resource, waits until it is active, copies what git tracks, installs it,
starts the command on every worker, and shows worker 0's output until it ends. The run needs no
connection: the workers supervise themselves (launch/tpu_worker.py), and the same `run` again finds
them.

Its interface, the Cloud TPU API with queued resources, is in maintenance: Google fixes it and adds
nothing, and tpu7x is not served. For tpu7x, for many hosts, and for runs of days use launch.gke.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Sequence

from absl import flags

from launch import shell as sh
from launch import tpu_gcloud as gcloud
from launch import tpu_job as jobs
from launch.check import validate_command
from launch.shell import PREEMPTED, LaunchError, Shell
from launch.tpu_gcloud import Tpu
from launch.tpu_job import Job
from launch.tpu_run import End, Report, Runner, Worker

WORDS = ("run", "logs", "stop", "down", "list")
KEY = "~/.ssh/google_compute_engine"
OVER = (0, 130)  # exit codes after which nobody will try again: finished, interrupted


def main() -> None:
    sh.launch(__doc__, _flags, act, sys.argv)


def act(fv: flags.FlagValues, words: Sequence[str], command: Sequence[str]) -> int:
    if len(words) != 1 or words[0] not in WORDS:
        got = " ".join(words) or "no word"
        raise flags.IllegalFlagValueError(f"{got}: expected one of {', '.join(WORDS)}")
    shell = Shell(fv.dry_run)
    sh.required(fv, *([] if words[0] == "list" else ["name"]), "zone")
    tpu = _tpu(fv)
    if words[0] == "list":
        return max([shell.run(call) for call in gcloud.lists(tpu)])
    if words[0] == "down":
        return shell.run(gcloud.delete(tpu))
    if words[0] == "run":
        return run(fv, shell, tpu, sh.given(command))
    runner = Runner(shell, tpu, Job(command="", setup=""), fv.poll)
    if words[0] == "stop":
        return 0 if runner.ask_all("stop") or shell.dry_run else 1
    return logs(fv, runner)


def run(fv: flags.FlagValues, shell: Shell, tpu: Tpu, command: list[str]) -> int:
    """The whole life of one run; its exit code."""
    sh.required(fv, "accelerator")
    if tpu.runtime is None:
        tpu = dataclasses.replace(tpu, runtime=gcloud.runtime_of(tpu.accelerator))
    job = _job(fv, tpu, command)
    if fv.check:
        validate_command(shell, command, tpu.spot)
    if not job.logs:
        shell.say(
            f"{tpu.name}: no bucket: what the run writes goes with the TPU, and nothing deletes "
            "the TPU when this launcher is gone; --workdir=gs://… has neither trouble"
        )
    add_key(shell, tpu)
    runner = Runner(shell, tpu, job, fv.poll)
    try:
        end = runner.finish()
        close(runner, end)
    except LaunchError as e:
        left = f"nothing more was deleted, and what is there costs: {_down(tpu)}"
        raise LaunchError(f"{e}; {left}") from e
    return end.code


def close(runner: Runner, end: End) -> None:
    """Deletes the TPU of a run that is over; says what happens to that of one that failed."""
    linger = runner.job.linger
    if end.deleted:
        gone = f"the TPU is gone; {runner.job.logs} has its logs"
        runner.say(f"ended with exit code {end.code}; {gone}")
        return
    if end.code not in OVER:
        runner.ask_all("tail")
        runner.say(
            f"ended with exit code {end.code}" + (f": {end.why}" if end.why else "")
        )
    if (end.code in OVER and linger >= 0) or linger == 0:
        runner.remove()
        return
    if linger < 0:
        then = "it is kept, and costs"
    elif runner.job.logs:
        then = f"it is deleted by itself in {linger / 60:.0f} minutes"
    else:
        then = "without a bucket nothing deletes it by itself, and it costs"
    again = "goes on" if end.code == PREEMPTED else "tries again, with edited code too"
    runner.say(f"the TPU is there still: {then}. The same line {again}.")
    runner.say(f"to delete it: {_down(runner.tpu)}")


def logs(fv: flags.FlagValues, runner: Runner) -> int:
    """Follows one worker's log, or shows the last lines of all; the bucket's if none answers."""
    reports = _logs(fv, runner)
    if not reports and fv.logs:
        name = "*" if fv.worker == "all" else f"worker-{fv.slice}-{fv.worker}"
        return runner.shell.run(["gcloud", "storage", "cat", f"{fv.logs}/{name}.log"])
    return max([report.get("code", 0) for report in reports.values()], default=1)


def _logs(fv: flags.FlagValues, runner: Runner) -> dict[Worker, Report]:
    if fv.worker == "all":
        return runner.ask_all("tail")
    return runner.ask_all("follow", [fv.slice], number=fv.worker)


def add_key(shell: Shell, tpu: Tpu) -> None:
    """Makes gcloud's ssh key where there is none, and adds it to the agent.

    `tpu-vm scp` to several workers refuses a key that the agent lacks, and stalls without an agent.
    """
    flag = "--ssh-key-file="
    own = [
        word.removeprefix(flag) for word in tpu.extra["ssh"] if word.startswith(flag)
    ]
    key = os.path.expanduser((own or [KEY])[-1])
    if not os.path.exists(key):
        if not shell.dry_run:
            os.makedirs(os.path.dirname(key), mode=0o700, exist_ok=True)
        shell.must(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", key])
    if shell.run(["ssh-add", key]):
        shell.say(
            f"the ssh agent did not take {key}, and copying to several workers may fail or stall: "
            f"eval $(ssh-agent) && ssh-add {key}"
        )


def _down(tpu: Tpu) -> str:
    project = f" --project={tpu.project}" if tpu.project else ""
    return f"python -m launch.tpu down --name={tpu.name} --zone={tpu.zone}{project}"


def _tpu(fv: flags.FlagValues) -> Tpu:
    extra: dict[str, list[str]] = {"create": [], "ssh": []}
    for text in fv.gcloud:
        where, _, flag = text.partition(":")
        if where not in extra or not flag.startswith("--"):
            raise flags.IllegalFlagValueError(
                f"--gcloud={text}: expected create:--FLAG or ssh:--FLAG",
            )
        extra[where].append(flag)
    names = (
        "zone",
        "project",
        "accelerator",
        "runtime",
        "slices",
        "spot",
        "reserved",
        "network",
    )
    names += ("service_account", "valid_until", "track")
    values = {name: fv[name].value for name in names}
    return Tpu(name=sh.slug(fv.name) if fv.name else "", extra=extra, **values)


def _job(fv: flags.FlagValues, tpu: Tpu, command: list[str]) -> Job:
    workdir = sh.workdir_of(command)
    bucket = sh.bucket_of(workdir)
    env = {"RLHFJAX_JOIN": "1"}  # the machine's metadata say who the others are
    if bucket:
        env["JAX_COMPILATION_CACHE_DIR"] = f"{bucket}/cache"
    env |= sh.environment(fv.env)
    setup = fv.setup if fv.setup is not None else jobs.setup_script(fv.extras)
    holds_logs = bucket or (f"gs://{fv.bucket}" if fv.bucket else None)
    return Job(
        command=jobs.remote_command(command, env, sh.secrets(fv.secret), tpu.project),
        setup=jobs.with_bucket(setup) if fv.bucket else setup,
        bucket=fv.bucket,
        workdir=workdir,
        logs=fv.logs or (f"{holds_logs}/logs/{tpu.name}" if holds_logs else None),
        linger=-1.0 if fv.keep else sh.seconds("linger", fv.linger),
        max_run_duration=sh.seconds("max_run_duration", fv.max_run_duration),
        max_restarts=fv.max_restarts,
    )


def _flags(fv: flags.FlagValues) -> None:
    text = functools.partial(flags.DEFINE_string, flag_values=fv)
    text("zone", None, "zone of the TPU")
    text("project", None, "default: gcloud's project")
    text("accelerator", None, "v5litepod-16, v5p-128, v6e-64, …")
    text("runtime", None, "TPU software version; default: the chip's")
    flags.DEFINE_integer(
        "slices",
        1,
        "number of slices, connected by the data center network",
        1,
        flag_values=fv,
    )
    flags.DEFINE_bool(
        "spot", False, "use spot VMs, which may be preempted", flag_values=fv
    )
    flags.DEFINE_bool(
        "reserved", False, "use the project's reservation", flag_values=fv
    )
    text("network", None, "default: the project's")
    text("service_account", None, "default: Compute Engine's")
    _gcloud_flags(fv)
    _set_up_flags(fv)
    _end_flags(fv)
    text("worker", "0", "of `logs`: a number, or all")
    flags.DEFINE_integer("slice", 0, "logs: number of the slice", 0, flag_values=fv)
    flags.DEFINE_float(
        "poll", 30.0, "seconds between checks of the state", 0.0, flag_values=fv
    )


def _gcloud_flags(fv: flags.FlagValues) -> None:
    passed = "create:--FLAG or ssh:--FLAG, passed to gcloud (ssh: also to scp); may be repeated"
    flags.DEFINE_multi_string("gcloud", [], passed, flag_values=fv)
    track = "gcloud track for create, ssh and scp; alpha has flex-start and IAP"
    flags.DEFINE_enum("track", None, ["alpha", "beta"], track, flag_values=fv)
    until = "time after which an unfulfilled request is given up: 6h"
    flags.DEFINE_string("valid_until", None, until, flag_values=fv)


def _set_up_flags(fv: flags.FlagValues) -> None:
    text = functools.partial(flags.DEFINE_string, flag_values=fv)
    flags.DEFINE_bool("check", True, "validate the config here first", flag_values=fv)
    flags.DEFINE_list(
        "extras", ["quickstart", "gcs"], "rlhfjax extras to install", flag_values=fv
    )
    text("setup", None, "a script that replaces the default set-up")
    text("bucket", None, "bucket for reading data, mounted at /bucket")
    text("logs", None, "folder for the workers' logs; default: gs://BUCKET/logs/NAME")
    secret = "NAME=SECRET: read on the workers from Secret Manager"
    flags.DEFINE_multi_string("secret", [], secret, flag_values=fv)


def _end_flags(fv: flags.FlagValues) -> None:
    text = functools.partial(flags.DEFINE_string, flag_values=fv)
    flags.DEFINE_integer(
        "max_restarts", 20, "restarts after preemptions", 0, flag_values=fv
    )
    flags.DEFINE_bool("keep", False, "never delete the TPU", flag_values=fv)
    text("linger", "15m", "time from a failure to the TPU's deletion; 0: immediately")
    text(
        "max_run_duration",
        "0",
        "time limit, after which the run is stopped and the TPU deleted; 0: none",
    )


if __name__ == "__main__":
    main()
