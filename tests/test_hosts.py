"""Real processes as the hosts of one job: the same losses, a common end, exact restarts."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhfjax import hosts, recipe
from rlhfjax.config import to_dict
from rlhfjax.errors import ConfigError, HostLost
from rlhfjax.mesh import MeshConfig, make_layout
from tests import tiny_hosts
from tests.test_resume import assert_same_stage, checkpoint_note

ROOT = Path(__file__).parent.parent
LIMIT = 400  # seconds that any of these jobs may take on a busy machine


SKEWED = """
import sys, time
real = time.monotonic
time.monotonic = lambda: {rate} * real()
from rlhfjax.main import main
main(["rlhfjax", *sys.argv[1:]])
"""


class Job:
    """`python -m rlhfjax COMMAND` as several processes, started as a launcher starts hosts."""

    def __init__(
        self,
        count: int,
        workdir: Path,
        data: Path,
        *flags: str,
        command: str = "run",
        arg: str = "",
        clock_rates: tuple[float, ...] = (),
    ):
        """`clock_rates`: how much faster than the real one each host's monotonic clock runs."""
        self.workdir, self.count = workdir, count
        with contextlib.closing(socket.socket()) as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        config = f"--config=tests/tiny_hosts.py:data={data},shards=4{arg}"
        flags = (config, f"--workdir={workdir}", "--host_timeout=10", *flags)
        self.logs = [
            workdir.with_name(f"{workdir.name}.{port}.{i}") for i in range(count)
        ]
        workdir.parent.mkdir(parents=True, exist_ok=True)
        env = {
            **os.environ,
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
        }
        env["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(
            "device_count=4", "device_count=1"
        )
        self.processes = []
        for i, log in enumerate(self.logs):
            with log.open("w") as out:
                program = (
                    ["-c", SKEWED.format(rate=clock_rates[i])]
                    if clock_rates
                    else ["-m", "rlhfjax"]
                )
                words = [sys.executable, *program, command, *flags]
                own = {**env, "JAX_PROCESS_ID": str(i)}
                self.processes.append(
                    subprocess.Popen(words, cwd=ROOT, env=own, stdout=out, stderr=out)
                )

    def codes(self, within: float = LIMIT) -> list[int]:
        """The exit codes; processes that are still there then are killed, and the test fails."""
        deadline = time.monotonic() + within
        try:
            return [
                one.wait(timeout=max(0.1, deadline - time.monotonic()))
                for one in self.processes
            ]
        finally:
            for one in self.processes:
                one.kill()

    def messages(self, i: int) -> list[str]:
        return [
            line
            for line in self.logs[i].read_text().splitlines()
            if line.startswith("rlhfjax:")
        ]

    def finish(self) -> Path:
        codes = self.codes()
        assert codes == [0] * self.count, "\n".join(
            log.read_text()[-2000:] for log in self.logs
        )
        return self.workdir

    def wait_for(self, lines: int, file: Path) -> None:
        """Until a file of metrics has so many lines."""
        deadline = time.monotonic() + LIMIT
        while not file.exists() or file.read_bytes().count(b"\n") < lines:
            assert all(one.poll() is None for one in self.processes), "\n".join(
                log.read_text() for log in self.logs
            )
            assert time.monotonic() < deadline
            time.sleep(0.005)


# ------------------------------------------------------------------ one process


def test_one_process_is_first_and_alone_and_needs_no_coordinator():
    hosts.join()
    assert (hosts.index(), hosts.count(), hosts.first()) == (0, 1, True)
    assert hosts.share(lambda: "made") == "made"
    assert hosts.share_all(lambda: "made") == ["made"]
    assert hosts.anywhere(True) and not hosts.anywhere(False)
    assert hosts.gather({"a": [1]}) == [{"a": [1]}]
    vote = hosts.Vote()
    assert [vote(0), vote(2), vote(1)] == [
        0,
        2,
        1,
    ]  # at once, where nobody has to be asked


def test_rows_lie_on_devices_once_each_in_order():
    """Device i of the batch's axes holds the i-th share of the rows, and nothing else."""
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    placed = make_layout(MeshConfig(data=2, fsdp=2)).put({"tokens": rows})["tokens"]
    held = [
        np.asarray(shard.data)
        for shard in sorted(
            placed.addressable_shards, key=lambda one: one.index[0].start
        )
    ]
    assert [x.shape for x in held] == [(2, 3)] * 4
    np.testing.assert_array_equal(np.concatenate(held), rows)


def test_what_the_loss_of_a_host_looks_like(monkeypatch):
    gloo = ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    assert not hosts.lost(gloo)  # one process loses nobody
    monkeypatch.setattr(hosts, "count", lambda: 2)
    assert hosts.lost(gloo) and not hosts.lost(
        ValueError("RESOURCE_EXHAUSTED: out of memory")
    )


def test_a_process_that_sees_more_hosts_than_it_joined_does_not_start(monkeypatch):
    """On a TPU slice each host would otherwise train in the same workdir."""
    hosts.validate_process_count()
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 4)
    with pytest.raises(
        ConfigError,
        match="devices of 4 hosts, and this process has joined 1: set RLHFJAX_JOIN=1",
    ):
        make_layout(MeshConfig(data=-1))


@pytest.mark.parametrize(
    ("environment", "given"),
    [
        ({}, ""),
        ({"SLURM_JOB_GPUS": "0,1"}, "SLURM_JOB_GPUS=0,1"),
        ({"SLURM_GPUS_ON_NODE": "0"}, ""),
        ({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE=8"),
        ({"NVIDIA_VISIBLE_DEVICES": "GPU-1"}, ""),  # no scheduler
        (
            {"NVIDIA_VISIBLE_DEVICES": "GPU-1", "KUBERNETES_SERVICE_HOST": "x"},
            "NVIDIA_VISIBLE_DEVICES=GPU-1",
        ),
        (
            {"NVIDIA_VISIBLE_DEVICES": "all", "KUBERNETES_SERVICE_HOST": "x"},
            "",
        ),  # what images set
    ],
)
def test_a_job_that_was_given_gpus_does_not_train_on_cpus(
    environment, given, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hosts.validate_accelerators()  # the tests ask for CPUs: JAX_PLATFORMS=cpu
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", None)
        if given:
            with pytest.raises(ConfigError, match=re.escape(given) + ".*cuda12"):
                hosts.validate_accelerators()
        else:
            hosts.validate_accelerators()
    finally:
        jax.config.update("jax_platforms", before)


def test_every_cloud_tpu_vm_joins_its_slice(monkeypatch):
    """Even without a variable; not if the run asks for CPUs or JAX finds no cluster."""
    joined = []

    class Cluster:
        is_env_present = staticmethod(lambda: True)

    for name in hosts._COORDINATED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hosts, "_exit_on_abort", lambda message: None)
    monkeypatch.setattr(
        hosts.jax.distributed, "initialize", lambda **options: joined.append(options)
    )
    monkeypatch.setattr(hosts.cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(hosts.ClusterEnv, "_cluster_types", [Cluster])
    hosts.join()
    assert joined == []  # JAX_PLATFORMS=cpu
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", "tpu,cpu")
        hosts.join(heartbeat_timeout=7, join_timeout=8)
        monkeypatch.setattr(hosts.ClusterEnv, "_cluster_types", [])
        hosts.join()
    finally:
        jax.config.update("jax_platforms", before)
    assert joined == [{"initialization_timeout": 8, "heartbeat_timeout_seconds": 7}]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("process_id"), ConfigError),
        (RuntimeError("DEADLINE"), HostLost),
        (OSError(), HostLost),
    ],
)
def test_hosts_that_do_not_come_are_lost_and_wrong_variables_are_a_usage_error(
    error, kind, monkeypatch
):
    def initialize(**_):
        raise error

    monkeypatch.setenv("RLHFJAX_JOIN", "1")
    monkeypatch.setattr(hosts, "_exit_on_abort", lambda message: None)
    monkeypatch.setattr(hosts.jax.distributed, "initialize", initialize)
    with pytest.raises(kind) as caught:
        hosts.join(join_timeout=9)
    assert caught.value.exit_code == (2 if kind is ConfigError else 75)


# ------------------------------------------------------------------ several


@pytest.fixture(scope="module")
def alone(conversations, tmp_path_factory) -> Path:
    """The job as one process on one device."""
    return Job(1, tmp_path_factory.mktemp("alone") / "run", conversations).finish()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Rounding decides which of equal scores differ, and what a policy that equals its reference
# prefers.
SIGNS_OF_ZERO = {"group/informative", "direct/accuracy"}


def assert_same_numbers(a: list[dict], b: list[dict]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"stage"} - SIGNS_OF_ZERO:
            np.testing.assert_allclose(
                other[name], one[name], rtol=1e-3, atol=1e-5, err_msg=name
            )


@pytest.mark.parametrize(
    "count",
    (
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(4, marks=pytest.mark.nightly),
    ),
)
def test_every_stage_on_several_processes_gives_what_one_gives(
    count, alone, conversations, tmp_path
):
    many = Job(count, tmp_path / "run", conversations).finish()
    assert_same_numbers(read(alone / "metrics.jsonl"), read(many / "metrics.jsonl"))
    answers = "03_collect/preferences/train.jsonl"
    assert (many / answers).read_bytes() == (alone / answers).read_bytes()
    assert (many / "report.html").exists()


@pytest.fixture(scope="module")
def tokenizer(conversations, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    recipe.run_stage(
        to_dict(tiny_hosts.get_config(f"data={conversations}").tokenizer), folder
    )
    return folder


def pretraining(
    count: int, workdir: Path, tokenizer: Path, data: Path, *flags: str, **options
) -> Job:
    """24 steps of pretraining on 4 streams, a checkpoint every fourth."""
    if not any(flag.startswith("--config.checkpoint.every=") for flag in flags):
        flags = ("--config.checkpoint.every=4", *flags)
    flags = ("--config.steps=24", *flags)
    arg = f",only=pretrain,tokenizer={tokenizer}"
    return Job(count, workdir, data, *flags, command="train", arg=arg, **options)


@pytest.fixture(scope="module")
def uninterrupted(tokenizer, conversations, tmp_path_factory) -> Path:
    return pretraining(
        2, tmp_path_factory.mktemp("uninterrupted") / "run", tokenizer, conversations
    ).finish()


@pytest.mark.parametrize(
    "victim",
    (
        pytest.param(0, marks=pytest.mark.slow),
        pytest.param(1, marks=pytest.mark.nightly),
    ),
)
def test_a_killed_process_ends_the_others_and_the_job_goes_on_exactly(
    victim, tokenizer, uninterrupted, conversations, tmp_path
):
    job = pretraining(2, tmp_path / "run", tokenizer, conversations)
    job.wait_for(6, tmp_path / "run" / "metrics.jsonl")
    job.processes[victim].send_signal(signal.SIGKILL)
    struck = time.monotonic()
    codes = job.codes(within=40)
    assert time.monotonic() - struck < 40
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 75
    (message,) = job.messages(1 - victim)
    assert message.startswith(
        "rlhfjax: another host is gone; run the same command on all hosts to resume from the "
    )
    pretraining(2, tmp_path / "run", tokenizer, conversations).finish()
    assert_same_stage(uninterrupted, tmp_path / "run")


@pytest.mark.slow
def test_sigterm_on_any_host_saves_on_all_and_other_hosts_go_on(
    tokenizer, uninterrupted, conversations, tmp_path
):
    """One host on one device resumes from the checkpoint of two, to float tolerance."""
    job = pretraining(2, tmp_path / "run", tokenizer, conversations)
    job.wait_for(6, tmp_path / "run" / "metrics.jsonl")
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.codes() == [75, 75]
    (first,), (second,) = job.messages(0), job.messages(1)
    step = re.search(r"pretrain stopped at step (\d+) and was saved", first).group(1)
    assert second == first
    assert (
        len(checkpoint_note(tmp_path / "run")["data"]["rows"]) == 4
    )  # of the streams of both hosts
    assert (tmp_path / "run" / "checkpoints" / step).is_dir()
    pretraining(1, tmp_path / "run", tokenizer, conversations).finish()
    assert_same_numbers(
        read(uninterrupted / "metrics.jsonl"), read(tmp_path / "run" / "metrics.jsonl")
    )


@pytest.mark.slow
def test_what_only_one_host_finds_wrong_ends_all_with_its_reason(
    conversations, tmp_path
):
    """The first host alone looks at the workdir; it is a file."""
    (tmp_path / "run").write_text("")
    job = Job(2, tmp_path / "run", conversations)
    assert job.codes(within=60) == [2, 2]
    assert len(job.messages(0)) == len(job.messages(1)) == 1
    assert "rlhfjax: host 0 ended: " in job.messages(1)[0]


@pytest.mark.slow
def test_checkpoints_by_time_come_at_one_step_on_hosts_whose_clocks_differ(
    tokenizer, uninterrupted, conversations, tmp_path
):
    """The first host's clock decides: the second one's is 1,000 times as fast."""
    by_time = (
        "--config.checkpoint.every=0",
        "--config.checkpoint.minutes=0.01",
        "--config.checkpoint.keep_last=24",
    )
    job = pretraining(
        2,
        tmp_path / "run",
        tokenizer,
        conversations,
        *by_time,
        clock_rates=(1.0, 1000.0),
    ).finish()
    assert (job / "metrics.jsonl").read_bytes() == (
        uninterrupted / "metrics.jsonl"
    ).read_bytes()
    saved = [
        int(folder.name)
        for folder in (job / "checkpoints").iterdir()
        if folder.name.isdigit()
    ]
    assert max(saved) == 24 and 1 < len(saved) < 24


@pytest.mark.slow
def test_a_host_that_waits_in_vain_can_be_started_again(conversations, tmp_path):
    """JAX's abort becomes one line and the exit code on which launchers restart."""
    job = Job(2, tmp_path / "run", conversations, "--join_timeout=2")
    job.processes[1].kill()
    assert job.processes[0].wait(timeout=60) == 75
    assert job.messages(0) == [
        "rlhfjax: the other hosts did not come within --join_timeout=2 s; "
        "start the same command on all hosts again"
    ]
