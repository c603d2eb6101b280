"""launch.slurm on submitit, against a stand-in for Slurm that really runs the batch script on this
machine.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import shell, slurm
from rlhfjax import recipe
from rlhfjax.config import to_dict
from tests import tiny_hosts
from tests.test_resume import assert_same_stage

ROOT = Path(__file__).parents[2]
TOOLS = ("sbatch", "srun", "scontrol", "squeue", "sacct", "scancel")
JOB = ["--name=a", "--wait"]
# Counts to 40; the first time only to 1, until it is stopped. A node's state is a file of its own.
COUNT = """
import os, signal, sys, time
file, stopped = os.environ["SLURM_PROCID"], []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
first = not os.path.exists(file)
n = 0 if first else int(open(file).read())
print("from", n, flush=True)
while n < 40:
    n += 1
    while first and not stopped:
        time.sleep(0.02)
    if stopped:
        open(file, "w").write(str(n))
        sys.exit(75)
print("counted to", n)
"""


class Clock:
    """submitit's: it looks for results every 1 / 20 of a second instead of every second."""

    @staticmethod
    def time() -> float:
        return time.time()

    @staticmethod
    def sleep(seconds: float) -> None:
        time.sleep(seconds / 20)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The stand-in's folder; jobs begin in the repository's, as those do that are submitted from
    there.
    """
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        tool = tmp_path / "bin" / name
        tool.write_text(
            f"#!/bin/sh\nexec {sys.executable} -S {Path(__file__).parent / 'slurm_standin.py'} "
            f'{name} "$@"\n'
        )
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("STANDIN", str(tmp_path))
    monkeypatch.chdir(ROOT)
    slurm.submitit().SlurmJob.watcher.clear()  # every test's first job is the seventh
    monkeypatch.setattr(sys.modules["submitit.core.core"], "_time", Clock())
    return tmp_path


@pytest.fixture
def call(cluster, capsys):
    """(exit code, stdout, stderr) of `python -m launch.slurm ARGS`, its files in the stand-in's
    folder.
    """

    def call(word: str, *args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            shell.launch(
                "",
                slurm._flags,
                slurm.act,
                ["launch.slurm", word, f"--folder={cluster}/files", *args],
            )
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return call


def sh(script: str) -> list[str]:
    return ["--", "sh", "-c", script]


def log(cluster: Path, node: int = 0) -> list[str]:
    return (cluster / "files" / f"7_{node}_log.out").read_text().splitlines()


def made(cluster: Path, tool: str) -> list[str]:
    file = cluster / "calls"
    return (
        [line for line in file.read_text().splitlines() if line.startswith(tool)]
        if file.exists()
        else []
    )


@pytest.mark.parametrize("code", [0, 3])
def test_the_commands_exit_code_is_the_launchers_and_slurms(code, cluster, call):
    script = f'echo "$X $SLURM_PROCID"; [ $SLURM_PROCID = 0 ] || exit {code}'
    got, out, err = call("submit", *JOB, "--nodes=2", "--env=X=a  b", *sh(script))
    assert (got, err) == (code, "") and f"its log: {cluster}/files/7_0_log.out\n" in out
    assert log(cluster) == ["a  b 0"] and log(cluster, 1) == ["a  b 1"]
    assert ("7_1_log.out ends with\na  b 1\n" in out) == bool(code)
    assert not made(cluster, "scontrol")
    while (cluster / "7" / "state").read_text() == "RUNNING":
        time.sleep(0.05)
    assert (cluster / "7" / "code").read_text() == str(code)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [(1, ["none", "none", "none"]), (2, [f"n0:{65536 - 4096 + 7}", "2", "0"])],
    ids=["one", "two"],
)
def test_processes_are_told_of_each_other(nodes, said, cluster, call):
    script = "".join(
        f"echo ${{JAX_{name}:-none}};"
        for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
    )
    assert call("submit", *JOB, f"--nodes={nodes}", *sh(script))[0] == 0
    assert log(cluster) == said and [log(cluster, i)[-1] for i in range(1, nodes)] == [
        "1"
    ] * (nodes - 1)


def test_a_job_has_the_clusters_environment_and_this_interpreters_programs(
    cluster, call, monkeypatch
):
    monkeypatch.setenv("MINE", "mine")
    assert call("submit", *JOB, *sh('echo "${MINE:-none}"; command -v python'))[0] == 0
    assert log(cluster) == ["none", str(Path(sys.executable).parent / "python")]


def test_options_of_sbatch_and_srun_and_lines_of_the_script_go_through(call):
    options = [
        "--sbatch=mem=0",
        "--sbatch=exclusive",
        "--srun=--container-image=x.sqsh",
        "--setup=module load cuda",
    ]
    code, out, _ = call(
        "script", "--name=a", "--gpus_per_node=8", *options, *sh("true")
    )
    lines = out.splitlines()
    assert code == 0 and "#SBATCH --mem=0" in lines and "#SBATCH --exclusive" in lines
    (srun,) = [line for line in lines if line.startswith("srun ")]
    assert "--container-image=x.sqsh" in srun
    assert lines.index("module load cuda") < lines.index(srun)


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--gpus_per_node=8"], "add --cpus_per_task=N, or --sbatch=exclusive"),
        (["--sbatch=time=1:00:00"], "this launcher sets time itself"),
        (["--sbatch=--no-requeue"], "this launcher sets no-requeue itself"),
        (["--sbatch=a b=c"], "expected KEY=VALUE or KEY"),
    ],
)
def test_what_would_waste_a_node_or_break_a_restart_is_refused(
    args, error, cluster, call
):
    code, _, err = call("submit", "--name=a", *args, *sh("true"))
    assert (
        code == 1
        and error in err
        and err.count("\n") == 1
        and not made(cluster, "sbatch")
    )


def test_a_job_is_requeued_where_it_was_preempted(cluster, call):
    """The second node failed the first time, and ends last the second time: that alone counts."""
    wait = "while [ ! -e files/7_1_result.pkl ]; do sleep 0.02; done"
    script = f"""
    cd {cluster}
    if mkdir been$SLURM_PROCID 2> /dev/null; then
      [ $SLURM_PROCID = 1 ] && exit 3; {wait}; exit 75
    fi
    sleep $SLURM_PROCID; echo again"""
    code, _, _ = call("submit", *JOB, "--nodes=2", *sh(script))
    assert code == 0 and made(cluster, "scontrol") == ["scontrol requeue 7"]
    assert log(cluster) == ["launch: preempted; restart 1 of 20", "again"] and log(
        cluster, 1
    ) == ["again"]


def test_a_job_is_not_requeued_for_ever(cluster, call):
    code, _, err = call("submit", *JOB, "--max_restarts=2", *sh("echo start; exit 75"))
    assert (
        code == 1
        and err
        == "launch: a: preempted more than --max_restarts=2 times; its state is saved\n"
    )
    assert (
        log(cluster).count("start") == 3
        and made(cluster, "scontrol") == ["scontrol requeue 7"] * 2
    )


def once_it_runs(cluster: Path, *words: str) -> threading.Thread:
    """Calls a command of Slurm's once every node's log has a line."""

    def act() -> None:
        logs = [cluster / "files" / f"7_{i}_log.out" for i in range(2)]
        while not all(file.exists() and "from" in file.read_text() for file in logs):
            time.sleep(0.02)
        subprocess.run(words, check=True)

    thread = threading.Thread(target=act)
    thread.start()
    return thread


COUNTING = ["--nodes=2", "--", sys.executable, "-S", "-c"]


@pytest.mark.parametrize("number", ["USR2", "TERM"])
def test_what_is_out_of_time_or_preempted_saves_and_ends_as_if_it_had_not_been(
    number, cluster, call
):
    """SIGUSR2 comes before the time is up, to every process.

    SIGTERM before the machines are taken away.
    """
    thread = once_it_runs(cluster, "scancel", f"--signal={number}", "7")
    assert (
        call(
            "submit", *JOB, *COUNTING, f"import os; os.chdir({str(cluster)!r})\n{COUNT}"
        )[0]
        == 0
    )
    thread.join()
    assert made(cluster, "scontrol") == ["scontrol requeue 7"]
    for node in range(2):
        first, *_, second, last = [
            line for line in log(cluster, node) if not line.startswith("launch:")
        ]
        assert (first, second, last) == ("from 0", "from 1", "counted to 40")


def test_a_cancelled_job_saves_and_is_not_requeued(cluster, call, monkeypatch):
    thread = once_it_runs(cluster, "scancel", "--name=a", "--me")
    monkeypatch.setattr(
        sys.modules["submitit"].SlurmJob, "_results_timeout_s", 1
    )  # for a file system to be slow
    code, out, _ = call(
        "submit", *JOB, *COUNTING, f"import os; os.chdir({str(cluster)!r})\n{COUNT}"
    )
    thread.join()
    assert code == 1 and "job 7 is CANCELLED; " in out and not made(cluster, "scontrol")
    assert (cluster / "0").read_text() == "1"


def test_a_dry_run_is_what_was_submitted(cluster, call, monkeypatch):
    args = [*JOB, "--nodes=2", "--env=X=a b", "--", "sh", "-c", "exit 0"]
    assert call("submit", *args)[0] == 0
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    before = (cluster / "calls").read_text()
    printed, dry = call("script", *args)[1], call("submit", "--dry_run", *args)[1]
    assert (cluster / "calls").read_text() == before
    text, command = dry.split("\n\n# which runs on every node: ")
    assert text == (cluster / "files" / "7_submission.sh").read_text().rstrip("\n")
    assert (printed, command) == (dry, "X='a b' sh -c 'exit 0'\n")


def test_the_script_asks_for_what_was_asked(call):
    asked = [
        "--nodes=4",
        "--gpus_per_node=8",
        "--cpus_per_task=6",
        "--partition=p",
        "--account=b",
        "--grace=60",
    ]
    _, script, _ = call("script", "--name=a", *asked, "--time=1-02:30:00", *sh("true"))
    for line in (
        "nodes=4", "ntasks-per-node=1", "gpus-per-node=8", "cpus-per-task=6", "partition=p",
         "account=b", "time=1590",
        "signal=USR2@60", "requeue", "dependency=singleton", "export=NONE", "job-name=a",
         "open-mode=append",
    ):  # fmt: skip
        assert f"\n#SBATCH --{line}\n" in script
    assert (
        "--cpus-per-task=6 " in script.partition("\nsrun ")[2] and "wckey" not in script
    )
    _, script, _ = call("script", "--name=a", *sh("true"))
    assert not any(
        word in script for word in ("cpus-per-task", "gpus", "account", "partition")
    )


def test_times_in_minutes_by_hand():
    assert [slurm.minutes(time) for time in ("00:30:00", "24:00:00", "2-01:00:30")] == [
        30,
        1440,
        48 * 60 + 61,
    ]
    for bad in ("30", "1:30", "1-2", ""):
        with pytest.raises(shell.flags.Error, match="expected HH:MM:SS or D-HH:MM:SS"):
            slurm.minutes(bad)


def test_what_slurm_refuses_is_one_line(cluster, call, monkeypatch):
    code, out, err = call("submit", *JOB, "--partition=nowhere", *sh("true"))
    said = "launch: sbatch: error: Batch job submission failed: Invalid partition name specified\n"
    assert (code, out, err) == (1, "", said)
    monkeypatch.setenv("PATH", "/nowhere")
    assert (
        call("submit", *JOB, *sh("true"))[2]
        == "launch: sbatch is not installed on this machine, or not in PATH\n"
    )
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, _, err = call("script", *JOB, *sh("true"))
    assert (
        code == 1
        and err.startswith("launch: submitit is not installed in this Python: ")
        and err.count("\n") == 1
    )


def test_what_a_tool_says_last_is_there_without_output():
    assert (
        shell.last_line("sbatch: error: a\nsbatch: error: b\n\n") == "sbatch: error: b"
    )
    assert shell.last_line("") == shell.last_line(" \n") == ""


def test_a_command_that_is_not_there_and_secrets_in_its_log(cluster, call, monkeypatch):
    code, out, _ = call("submit", *JOB, "--", "there-is-no-such-program")
    assert code == 1 and "No such file or directory: 'there-is-no-such-program'" in out
    monkeypatch.setenv("HF_TOKEN", "hf-secret-value")
    (cluster / "stored").write_text("using hf-secret-value\n")
    code, out, _ = call("submit", *JOB, *sh(f"cat {cluster}/stored; exit 4"))
    assert code == 4 and "using ***\n" in out and "hf-secret-value" not in out


def test_down_cancels_the_jobs_of_the_name(call):
    assert (
        call("down", "--name=A b", "--dry_run")[1]
        == f"scancel --name={shell.slug('A b')} --me\n"
    )


@pytest.mark.nightly
def test_a_run_that_was_out_of_time_ends_with_the_bytes_of_one_that_was_not(
    conversations, cluster, call
):
    """Stopped after six of 24 steps, by Slurm's signal; the folders of both runs are compared."""
    recipe.run_stage(
        to_dict(tiny_hosts.get_config(f"data={conversations}").tokenizer),
        cluster / "tokenizer",
    )
    config = f"tests/tiny_hosts.py:data={conversations},only=pretrain,tokenizer={cluster}/tokenizer"
    words = [
        sys.executable,
        "-m",
        "rlhfjax",
        "train",
        f"--config={config}",
        "--config.steps=24",
    ]
    env = [
        f"--env={name}={value}"
        for name, value in os.environ.items()
        if name.startswith("JAX_")
    ]
    args = [*JOB, *env, "--", *words, "--config.checkpoint.every=4"]

    def stop() -> None:
        metrics = cluster / "stopped" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 6:
            time.sleep(0.005)
        subprocess.run(["scancel", "--signal=USR2", "7"], check=True)

    thread = threading.Thread(target=stop)
    thread.start()
    assert call("submit", *args, f"--workdir={cluster}/stopped")[0] == 0
    thread.join()
    assert call("submit", *args, f"--workdir={cluster}/whole")[0] == 0
    assert made(cluster, "scontrol") == ["scontrol requeue 7"]
    assert sum("pretrain stopped at step" in line for line in log(cluster)) == 1
    assert_same_stage(cluster / "whole", cluster / "stopped")
