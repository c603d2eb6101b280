"""launch.ssh, whose scripts really run, with a stand-in for ssh; and what all launchers share."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import shell, ssh
from rlhfjax.errors import Preempted
from tests.needs import needs_program

ROOT = Path(__file__).parents[2]

TOOLS = {
    # ssh HOST SCRIPT: the host is a folder.
    "ssh": 'shift 3; mkdir -p $STANDIN/$1; cd $STANDIN/$1; HOME=$PWD exec sh -c "$2"',
    "scp": 'while [ "${1#-}" != "$1" ]; do shift; done; mkdir -p $STANDIN/${2%%:*}; cp $1 '
    "$STANDIN/${2%%:*}/${2#*:}",
}


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """The stand-ins' folder."""
    needs_program("git")
    (tmp_path / "bin").mkdir()
    for name, text in TOOLS.items():
        tool = tmp_path / "bin" / name
        tool.write_text(f"#!/bin/sh\n{text}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN", str(tmp_path))
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "init", "-q", checkout], check=True)
    (checkout / "tracked.py").touch()
    subprocess.run(["git", "add", "tracked.py"], cwd=checkout, check=True)
    monkeypatch.chdir(checkout)
    return tmp_path


def call(capsys, module, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        shell.launch("", module._flags, module.act, ["launch", *args])
    out, err = capsys.readouterr()
    return caught.value.code, out, err


HOSTS = ["run", "--name=a", "--hosts=u@h0,h1", "--setup=true"]


def test_ssh_runs_a_process_a_host(tools, capsys):
    script = 'echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID"; ls'
    code, out, err = call(capsys, ssh, *HOSTS, "--", "sh", "-c", script)
    assert (code, err) == (0, "")
    assert {line for line in out.splitlines() if line.startswith("[")} == {
        "[u@h0] h0:12345 2 0", "[u@h0] tracked.py", "[h1] h0:12345 2 1", "[h1] tracked.py",
    }  # fmt: skip


def test_when_one_host_fails_the_others_are_stopped(tools, capsys):
    """The second fails at once; the first would go on for a minute, and is let to save."""
    wait = "trap 'echo saved; exit 75' TERM; while :; do sleep 0.05; done"
    began = time.monotonic()
    script = f"if [ $JAX_PROCESS_ID = 1 ]; then sleep 0.3; exit 3; fi; {wait}"
    code, out, _ = call(capsys, ssh, *HOSTS, "--", "sh", "-c", script)
    assert code == 3 and "[u@h0] saved" in out and time.monotonic() - began < 30


def test_ssh_starts_again_after_a_pre_emption(tools, capsys):
    script = "echo x >> ~/runs; sleep 0.5; [ $(wc -l < ~/runs) -ge 2 ] || exit 75"
    code, out, _ = call(capsys, ssh, *HOSTS, "--", "sh", "-c", script)
    assert code == 0 and out.count("it starts again") == 1
    assert (tools / "h1" / "runs").read_text() == "x\nx\n"


def test_one_code_for_many_hosts():
    assert shell.worst([0, 0]) == 0
    assert shell.worst([75, 0]) == shell.worst([75, 255]) == 75
    assert shell.worst([75, 255, 3, 4]) == 3


def test_a_dry_run_of_ssh_calls_nothing(tools, capsys):
    code, out, _ = call(
        capsys, ssh, *HOSTS, "--dry_run", "--", "rlhfjax", "run", "--workdir=a b"
    )
    assert code == 0 and not (tools / "h1").exists()
    assert (
        out.count("\nssh ") == 6
        and out.count("\nscp ") == 2
        and out.startswith("# packs what git tracks into ")
    )


def test_launchers_agree_with_rlhfjax_and_need_nothing_of_it():
    assert Preempted.exit_code == shell.PREEMPTED
    code = "import sys, launch.gke, launch.slurm, launch.ssh, launch.tpu; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"jax", "rlhfjax", "numpy"} & {
        name.partition(".")[0] for name in done.stdout.split()
    }


SECRETS = {
    "HF_TOKEN": "hf-secret-value",
    "SHORT_KEY": "x",
    "A_PASSWORD": "hf-secret-value-and-more",
    "HOME": "/home/me",
}


def test_secrets_are_hidden_and_other_words_are_not():
    text = "got hf-secret-value-and-more, then hf-secret-value. x /home/me"
    assert shell.redact(text, SECRETS) == "got ***, then ***. x /home/me"
    for said in (
        "HF_TOKEN=abcdefgh",
        "x --config.wandb_api_key=abcdefgh",
        "password: abcdefgh",
        "MY_SECRET_2=abcdefgh",
    ):
        assert "abcdefgh" not in shell.redact(said, {}) and "***" in shell.redact(
            said, {}
        )
    for said in (
        "tokenizer=stage:tokenizer",
        "tokens: 1234567",
        "--config.ppo.tokenizer=runs/tokenizer",
        "key=value",
    ):
        assert shell.redact(said, {}) == said


@pytest.mark.parametrize(
    ("pair", "fine"),
    [
        ("OPENAI_KEY=sk-abc123def456ghi7", False),
        ("OPENAI_KEY=abcdefgh", False),
        ("OTHER=hf_" + "aB" * 12, False),
        ("PROXY=http://me:pass@host", False),
        ("XLA_FLAGS=--xla_x=1", True),
        ("MAX_TOKENS=100000", True),
        ("JAX_TRACEBACK_FILTERING=off", True),
    ],
)
def test_an_environment_has_no_secrets(pair, fine):
    name, _, value = pair.partition("=")
    if fine:
        assert shell.environment([pair]) == {name: value}
        return
    with pytest.raises(shell.LaunchError, match="looks like a secret") as caught:
        shell.environment([pair])
    assert value not in str(caught.value)


@pytest.mark.parametrize("value", ["13", "\n", ".", "<|endoftext|>", "endofsentence"])
def test_an_option_of_ours_is_no_secret_by_its_name(value):
    command = ["rlhfjax", "run", f"--config.ppo.truncate.token={value}"]
    assert shell.given(command) == command


def test_launch_and_rlhfjax_share_files_by_links():
    for name in ("arguments.py", "redact.py"):
        assert (ROOT / "launch" / name).samefile(ROOT / "rlhfjax" / name)


def test_what_a_command_prints_is_redacted_too(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf-secret-value")
    lines = []
    code = shell.Shell(out=lines.append).run(
        ["sh", "-c", 'echo "using $HF_TOKEN"; exit 4']
    )
    assert code == 4 and lines[-1] == "using ***"
    with pytest.raises(
        shell.LaunchError, match="there-is-no-such-program is not installed"
    ):
        shell.Shell(out=lines.append).run(["there-is-no-such-program"])


def test_names_are_those_that_clouds_take_and_no_two_become_one():
    """By hand: printf 'kl=0.1,seed=1' | sha256sum."""
    assert shell.slug("kl-5") == "kl-5" and shell.slug("a" * 40) == "a" * 40
    assert shell.slug("kl=0.1,seed=1") == "kl-0-1-seed-1-698fae"
    alike = [
        "kl=0.1",
        "kl=-0.1",
        "KL=0.1",
        "kl-0-1",
        *(f"{'model.' * 10}n_layers=2,seed={seed}" for seed in (0, 1)),
    ]
    made = [shell.slug(name) for name in alike]
    assert len(set(made)) == len(alike) and max(map(len, made)) == 40
    assert all(shell.SLUG.fullmatch(name) for name in made)
    for bad in ("1a", "=", ""):
        with pytest.raises(shell.LaunchError, match="begins with a letter"):
            shell.slug(bad)
