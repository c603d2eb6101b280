"""launch.tpu against a stand-in for gcloud that checks arguments and really runs what is sent to the workers."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch import tpu
from tests.needs import needs_program

HERE = Path(__file__).parent
TPU = ["run", "--name=a", "--zone=z", "--accelerator=v5litepod-16", "--setup=true", "--poll=0.01"]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """The stand-in's folder; `gcloud` in PATH is the stand-in, and no other program of the name can be reached."""
    needs_program("git")
    (tmp_path / "bin").mkdir()
    gcloud = tmp_path / "bin" / "gcloud"
    gcloud.write_text(f'#!/bin/sh\nexec {sys.executable} -S {HERE / "standin.py"} "$@"\n')
    gcloud.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN", str(tmp_path))
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "init", "-q", checkout], check=True)
    (checkout / "tracked.py").write_text("print('as it is in the working tree')")
    (checkout / ".env").write_text("HF_TOKEN=kept-out-of-git")
    subprocess.run(["git", "add", "tracked.py"], cwd=checkout, check=True)
    monkeypatch.chdir(checkout)
    return tmp_path


def call(capsys, *args: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m launch.tpu ARGS`."""
    from launch.shell import launch

    with pytest.raises(SystemExit) as caught:
        launch("", tpu._flags, tpu.act, ["launch.tpu", *args])
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def calls(cloud: Path) -> list[list[str]]:
    path = cloud / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def verbs(cloud: Path) -> list[str]:
    """What was called, describe left out: create, scp, ssh, delete."""
    return [words[3] for words in calls(cloud) if words[0] == "compute" and words[3] != "describe"]


def test_from_nothing_to_a_finished_run(cloud, capsys):
    code, out, err = call(
        capsys, *TPU, "--spot", "--project=p", "--env=GREETING=hello  you", "--", *sh('echo "$GREETING"')
    )
    assert (code, err) == (0, "")
    assert "\nhello  you\n" in out and "a: WAITING_FOR_RESOURCES\na: PROVISIONING\n" in out
    assert verbs(cloud) == ["create", "scp", "ssh", "ssh", "ssh", "delete"]
    assert all("--zone=z" in words and "--project=p" in words for words in calls(cloud))
    assert calls(cloud)[1][4:] == [
        "a", "--zone=z", "--project=p", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=a", "--spot", "--quiet",
    ]  # fmt: skip
    copied = cloud / "deleted-0" / "rlhfjax"
    assert [path.name for path in copied.iterdir()] == ["tracked.py"]  # what git tracks, and nothing else


def sh(script: str) -> list[str]:
    return ["bash", "-c", script]


def test_a_failed_command_ends_with_its_code_and_the_tpu_is_deleted(cloud, capsys):
    code, out, _ = call(capsys, *TPU, "--", *sh("echo oh; exit 3"))
    assert code == 3 and "\noh\n" in out and verbs(cloud)[-1] == "delete"


def test_keep_leaves_the_tpu_and_the_same_command_uses_it_again(cloud, capsys):
    assert call(capsys, *TPU, "--keep", "--", *sh("exit 3"))[0] == 3
    assert "delete" not in verbs(cloud)
    assert call(capsys, *TPU, "--", *sh("echo again"))[0] == 0
    assert verbs(cloud).count("create") == 1 and verbs(cloud)[-1] == "delete"


def test_exit_code_75_starts_the_command_again_on_the_same_machines(cloud, capsys):
    script = "echo run >> ~/runs; [ $(wc -l < ~/runs) -ge 2 ] || exit 75"
    code, out, _ = call(capsys, *TPU, "--", *sh(script))
    assert code == 0 and "a: preempted; restart 1 of 20" in out
    assert (cloud / "deleted-0" / "runs").read_text() == "run\n" * 2
    assert verbs(cloud).count("create") == 1


def test_machines_that_were_taken_away_are_replaced(cloud, capsys):
    (cloud / "scenario.json").write_text('{"follow": ["preempt", ""]}')
    code, out, _ = call(capsys, *TPU, "--", *sh("sleep 0.1; echo done"))
    assert code == 0 and "restart 1 of 20" in out and "\ndone\n" in out
    assert [verb for verb in verbs(cloud) if verb in ("create", "delete")] == ["create", "delete"] * 2


def test_pre_emptions_have_an_end(cloud, capsys):
    (cloud / "scenario.json").write_text('{"follow": ["preempt"]}')
    code, _, err = call(capsys, *TPU, "--max_restarts=0", "--", *sh("sleep 0.1"))
    assert code == 1 and err.startswith("launch: a: preempted more than --max_restarts=0 times; its state is saved;")


def test_a_lost_connection_finds_the_run_again(cloud, capsys):
    """The run goes on without the connection: it is followed again, and not started twice."""
    (cloud / "scenario.json").write_text('{"follow": ["lost", ""]}')
    wait = "until [ -e ~/followed ]; do sleep 0.05; done"
    code, out, _ = call(capsys, *TPU, "--", *sh(f"echo start >> ~/starts; {wait}; echo done"))
    assert code == 0 and "connection lost" in out and "\ndone\n" in out
    assert (cloud / "deleted-0" / "starts").read_text() == "start\n"


def test_stop_sends_sigterm_to_the_command(cloud, capsys):
    script = "trap 'echo saved; exit 75' TERM; echo ready; while :; do sleep 0.05; done"
    (cloud / "scenario.json").write_text('{"follow": ["lost"]}')
    assert call(capsys, *TPU, "--keep", "--max_restarts=0", "--", *sh(script))[0] == 1
    log = cloud / "a" / "a.log"
    while not log.exists() or "ready" not in log.read_text():
        pass
    assert call(capsys, "stop", "--name=a", "--zone=z")[0] == 0
    code, out, _ = call(capsys, "logs", "--name=a", "--zone=z")
    assert code == 75 and "\nsaved\n" in out
    assert call(capsys, "down", "--name=a", "--zone=z")[0] == 0


def test_several_slices_are_one_queued_resource(cloud, capsys):
    code, _, _ = call(capsys, *TPU, "--slices=2", "--", "touch", "been")
    assert code == 0
    create = calls(cloud)[1]
    assert "--node-count=2" in create and "--node-prefix=a" in create and not any("node-id" in word for word in create)
    assert all((cloud / f"deleted-{i}" / "rlhfjax" / "been").exists() for i in range(2))


def test_gcloud_that_fails_is_not_a_machine_that_is_gone(cloud, capsys):
    (cloud / "scenario.json").write_text('{"describe": "broken"}')
    code, _, err = call(capsys, *TPU, "--", "true")
    assert code == 1 and err.count("\n") == 1 and "failed three times: ERROR: (gcloud) PERMISSION_DENIED" in err
    assert verbs(cloud) == []


def test_an_installation_that_fails_says_what_is_left(cloud, capsys):
    code, _, err = call(capsys, *TPU, "--setup=false", "--", "true")
    assert code == 1 and err.count("\n") == 1
    assert err.endswith("what is there costs: python -m launch.tpu down --name=a --zone=z\n")


def test_a_dry_run_prints_what_a_run_calls(cloud, capsys):
    """Word for word: the lines of the dry run, without the comment, are the calls of the run."""
    code, out, _ = call(capsys, *TPU, "--dry_run", "--", "echo", "a b")
    assert code == 0 and calls(cloud) == []
    printed = [shlex.split(line)[1:] for line in out.splitlines() if line.startswith("gcloud ")]
    call(capsys, *TPU, "--", "echo", "a b")
    assert printed == [words for words in calls(cloud) if words[3] != "describe"]
    assert "queued-resources describe a --zone=z" in out


def test_a_bucket_is_mounted_before_the_set_up(cloud, capsys):
    """As root of the worker, with stand-ins for what would change this machine."""
    for name, text in {
        "sudo": 'echo "sudo $*" >> $STANDIN/did',
        "gcsfuse": 'echo "gcsfuse $*" >> $STANDIN/did',
    }.items():
        (cloud / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (cloud / "bin" / name).chmod(0o755)
    (cloud / "bin" / "curl").symlink_to("/bin/true")
    assert call(capsys, *TPU, "--setup=echo set up >> $STANDIN/did", "--bucket=b", "--", "true")[0] == 0
    did = (cloud / "did").read_text().splitlines()
    assert did[-2:] == ["gcsfuse --implicit-dirs b /bucket", "set up"] and "sudo apt-get -qq install -y gcsfuse" in did


def test_a_secret_is_read_on_the_worker_and_stands_nowhere_else(cloud, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "local-secret-value")
    right = '[ "$WANDB_API_KEY" = the-stored-value ] && echo right'
    leak = "echo leaked $(echo local-secret)-value HF_TO''KEN=abcdefgh"
    code, out, _ = call(capsys, *TPU, "--secret=WANDB_API_KEY=stored", "--", *sh(f"{right}; {leak}"))
    assert code == 0 and "\nright\n" in out
    assert "local-secret-value" not in out + (cloud / "calls.jsonl").read_text()
    assert "\nleaked *** HF_TOKEN=***\n" in out and "abcdefgh" not in out.rpartition("leaked")[2]


def test_a_secret_in_the_command_is_refused(cloud, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "local-secret-value")
    for command in (["echo", "x-local-secret-value"], ["rlhfjax", "--hf_token=abcdefgh"]):
        code, out, err = call(capsys, *TPU, "--", *command)
        assert code == 1 and "a secret stands in the command" in err and calls(cloud) == []
        assert "local-secret-value" not in out + err and "abcdefgh" not in out + err


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["fly"], 2, "expected one of run, logs, stop, down"),
        (["run", "--zone=z", "--", "true"], 2, "--name is required"),
        (["run", "--name=a", "--zone=z", "--", "true"], 2, "--accelerator is required"),
        (TPU, 2, "what to run is missing"),
        ([*TPU, "--name=1a", "--", "true"], 1, "begins with a letter"),
        ([*TPU, "--env=HF_TOKEN=abcdefgh", "--", "true"], 1, "--env=HF_TOKEN=…: this looks like a secret"),
        ([*TPU, "--env=broken", "--", "true"], 1, "expected NAME=VALUE"),
        ([*TPU, "--secret=HF_TOKEN=a b", "--", "true"], 1, "the name of a stored secret"),
    ],
)
def test_what_cannot_be_meant(args, code, said, cloud, capsys):
    got, _, err = call(capsys, *args)
    assert got == code and said in err and err.startswith("launch: ") and "abcdefgh" not in err
    assert calls(cloud) == []
