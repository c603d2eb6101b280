"""Runs a command on all workers of Cloud TPU VMs, through queued resources; goes on after pre-emptions.

    python -m launch.tpu run --name=a --zone=us-west4-a --accelerator=v5litepod-16 --spot -- rlhfjax run --config=…
    python -m launch.tpu logs | stop | down --name=a --zone=us-west4-a

`run` creates the queued resource, waits until it is active, copies what git tracks, installs it, starts the command on
every worker, shows worker 0's output until it ends, and deletes everything. The command runs detached from the
connection; the same `run` again finds it and follows it. Every gcloud call stands in a function of its own below.
"""

import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence

from absl import flags

from launch import shell as sh
from launch.shell import LOST, PREEMPTED, LaunchError, Shell

SETUP = (
    "python3 -m pip install -q --user uv && ~/.local/bin/uv venv -q --allow-existing --python 3.11 ~/venv && "
    "~/.local/bin/uv pip install -q --python ~/venv/bin/python 'jax[tpu]' -e ~/rlhfjax"
)
_REPOSITORY = "deb [signed-by=/usr/share/keyrings/gcsfuse.asc] https://packages.cloud.google.com/apt gcsfuse-jammy main"
MOUNT = (  # {bucket} as the folder /bucket, as https://cloud.google.com/storage/docs/cloud-storage-fuse/install has it
    "curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/gcsfuse.asc "
    f"> /dev/null && echo '{_REPOSITORY}' | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null && "
    "sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse && sudo mkdir -p /bucket && "
    "sudo chown $(id -u) /bucket && gcsfuse --implicit-dirs {bucket} /bucket"
)
GONE = ("SUSPENDING", "SUSPENDED", "FAILED", "DELETING")  # of a queued resource whose machines were taken away
ALIVE = (
    "--ssh-flag=-oServerAliveInterval=15",
    "--ssh-flag=-oServerAliveCountMax=4",
)  # a lost VM is noticed in a minute


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A queued resource: what it is called, where it is, and what it is asked to be."""

    name: str
    zone: str
    project: str | None = None
    accelerator: str | None = None
    runtime: str | None = None
    slices: int = 1
    spot: bool = False
    reserved: bool = False
    network: str | None = None
    service_account: str | None = None

    @property
    def nodes(self) -> list[str]:
        """The names of its TPU VMs, one a slice."""
        return [self.name] if self.slices == 1 else [f"{self.name}-{i}" for i in range(self.slices)]

    @property
    def place(self) -> list[str]:
        return [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]


def create(tpu: Tpu) -> list[str]:
    options = {"accelerator-type": tpu.accelerator, "runtime-version": tpu.runtime}
    options |= {"node-id": tpu.name} if tpu.slices == 1 else {"node-count": tpu.slices, "node-prefix": tpu.name}
    options |= {"network": tpu.network, "service-account": tpu.service_account}
    words = [f"--{key}={value}" for key, value in options.items() if value is not None]
    words += [f"--{key}" for key in ("spot", "reserved") if getattr(tpu, key)]
    return ["gcloud", "compute", "tpus", "queued-resources", "create", tpu.name, *tpu.place, *words, "--quiet"]


def describe(tpu: Tpu) -> list[str]:
    words = ["gcloud", "compute", "tpus", "queued-resources", "describe", tpu.name, *tpu.place]
    return [*words, "--format=value(state.state)"]


def delete(tpu: Tpu) -> list[str]:
    words = ["gcloud", "compute", "tpus", "queued-resources", "delete", tpu.name, *tpu.place]
    return [*words, "--force", "--quiet"]


def copy(tpu: Tpu, node: str, file: str, to: str) -> list[str]:
    words = ["gcloud", "compute", "tpus", "tpu-vm", "scp", file, f"{node}:{to}", *tpu.place]
    return [*words, "--worker=all", "--quiet"]


def ssh(tpu: Tpu, node: str, command: str, worker: str = "all") -> list[str]:
    words = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *tpu.place]
    return [*words, f"--worker={worker}", *ALIVE, "--quiet", f"--command={command}"]


def start_script(name: str, command: str) -> str:
    """Starts the command detached, unless it runs: its output goes to ~/NAME.log, its exit code to ~/NAME.code."""
    inner = f"trap : TERM; cd ~/rlhfjax && {command}; echo $? > ~/{name}.code"  # it outlives what it waits for
    return (
        f"if [ ! -e ~/{name}.code ] && kill -0 $(cat ~/{name}.pid 2>/dev/null) 2>/dev/null; then exit 0; fi; "
        f"rm -f ~/{name}.code; PATH=~/venv/bin:$PATH nohup setsid bash -c {shlex.quote(inner)} "
        f">> ~/{name}.log 2>&1 < /dev/null & echo $! > ~/{name}.pid"
    )


def follow_script(name: str) -> str:
    """Shows the log until the command has ended, then exits with its code; 255 where it was killed without one."""
    tail = f"tail -n 100 -s 0.2 -F --pid=$(cat ~/{name}.pid) ~/{name}.log 2>/dev/null"
    return f"{tail}; exit $(cat ~/{name}.code 2>/dev/null || echo {LOST})"


def end_script(name: str) -> str:
    """Waits until the command has ended on a worker whose peers have already; after five minutes it is killed."""
    return f"timeout 300 tail -s 0.2 -f /dev/null --pid=$(cat ~/{name}.pid); pkill -KILL -s $(cat ~/{name}.pid); true"


def stop_script(name: str) -> str:
    """SIGTERM to every process of the command's session, on which a run saves and exits."""
    return f"pkill -TERM -s $(cat ~/{name}.pid) || true"


def remote_command(command: Sequence[str], env: dict[str, str], stored: dict[str, str], project: str | None) -> str:
    """The command with its environment; a secret is read on the machine, from Secret Manager, and is nowhere else."""
    where = f" --project={project}" if project else ""
    read = [
        f'export {name}="$(gcloud secrets versions access latest --secret={secret}{where})" && '
        for name, secret in stored.items()
    ]
    return "".join(read) + sh.exports(env) + shlex.join(command)


class Runner:
    """Takes one command through pre-emptions to its end."""

    def __init__(self, shell: Shell, tpu: Tpu, poll: float, setup: str):
        self.shell, self.tpu, self.poll, self.setup = shell, tpu, poll, setup

    def state(self) -> str | None:
        """The queued resource's state, None where there is no such resource."""
        return self.shell.ask(describe(self.tpu), "NOT_FOUND", self.poll)

    def up(self) -> None:
        """Creates the resource unless it is there, waits, and installs; one whose machines are gone is replaced."""
        state = None if self.shell.dry_run else self.state()
        if state in GONE:
            self.shell.must(delete(self.tpu))
            state = None
        fresh = state is None
        if fresh:
            self.shell.must(create(self.tpu))
        self.wait()
        if fresh:
            self.install()

    def wait(self) -> None:
        """Until it is active; hours, when there is no capacity."""
        if self.shell.dry_run:
            self.shell.say(f"# until it prints ACTIVE: {shlex.join(describe(self.tpu))}")
            return
        before = None
        while (state := self.state()) != "ACTIVE":
            if state in (None, *GONE):
                raise LaunchError(f"{self.tpu.name}: the queued resource is {state or 'gone'} before it was active")
            if state != before:
                self.shell.say(f"{self.tpu.name}: {state}")
            before = state
            time.sleep(self.poll)

    def install(self) -> None:
        file = f"/tmp/rlhfjax-{self.tpu.name}.tar.gz"
        self.shell.must(sh.archive(file))
        for node in self.tpu.nodes:
            self.shell.must(copy(self.tpu, node, file, "rlhfjax.tar.gz"))
            unpack = f"mkdir -p ~/rlhfjax && tar -xzf ~/rlhfjax.tar.gz -C ~/rlhfjax && {self.setup}"
            self.shell.must(ssh(self.tpu, node, unpack))

    def once(self, command: str) -> int:
        """Starts the command on all workers, or finds it running, and follows worker 0; its exit code."""
        if code := self.each_node(start_script(self.tpu.name, command)):
            return code
        return self.shell.run(ssh(self.tpu, self.tpu.nodes[0], follow_script(self.tpu.name), worker="0"))

    def each_node(self, script: str) -> int:
        """Runs a script on every worker of every slice; the first exit code that is not 0."""
        return next((code for node in self.tpu.nodes if (code := self.shell.run(ssh(self.tpu, node, script)))), 0)

    def taken_away(self) -> bool:
        """Whether the machines are gone; asked twice, since the state is behind what happened."""
        for pause in (0, self.poll):
            time.sleep(pause)
            if self.state() in (None, *GONE):
                return True
        return False

    def finish(self, command: str, max_restarts: int) -> int:
        """Runs the command to its end: again after exit code 75, on new machines when they were taken away."""
        for restart in range(max_restarts + 1):
            self.up()
            code = self.once(command)
            if code == 0 or self.shell.dry_run:
                return code
            gone = self.taken_away()
            if not gone and code not in (PREEMPTED, LOST):
                return code
            why = "its machines were taken away" if gone else "preempted" if code == PREEMPTED else "connection lost"
            if code == PREEMPTED and not gone:
                self.each_node(end_script(self.tpu.name))
            self.shell.say(f"{self.tpu.name}: {why}; restart {restart + 1} of {max_restarts}")
        raise LaunchError(
            f"{self.tpu.name}: preempted more than --max_restarts={max_restarts} times; its state is saved"
        )


def _flags(fv: flags.FlagValues) -> None:
    flags.DEFINE_string("zone", None, "of the TPU", flag_values=fv)
    flags.DEFINE_string("project", None, "default: gcloud's own", flag_values=fv)
    flags.DEFINE_string("accelerator", None, "v5litepod-16, v5p-128, v6e-64, …", flag_values=fv)
    flags.DEFINE_string("runtime", "v2-alpha-tpuv5-lite", "software of the TPU VM", flag_values=fv)
    flags.DEFINE_integer("slices", 1, "joined over the data centre's network", 1, flag_values=fv)
    flags.DEFINE_bool("spot", False, "cheaper, and may be taken away", flag_values=fv)
    flags.DEFINE_bool("reserved", False, "from the project's reservation", flag_values=fv)
    flags.DEFINE_string("network", None, "default: the project's", flag_values=fv)
    flags.DEFINE_string("service_account", None, "default: Compute Engine's", flag_values=fv)
    flags.DEFINE_string("setup", SETUP, "run on each worker after the copy", flag_values=fv)
    flags.DEFINE_string("bucket", None, "a bucket's name; the workers see it as /bucket", flag_values=fv)
    flags.DEFINE_multi_string("secret", [], "NAME=SECRET: read on the workers from Secret Manager", flag_values=fv)
    flags.DEFINE_float("poll", 30.0, "seconds between looks at the state", 0.0, flag_values=fv)
    flags.DEFINE_integer("max_restarts", 20, "after pre-emptions", 0, flag_values=fv)
    flags.DEFINE_bool("keep", False, "leave the TPU when the command has ended", flag_values=fv)


def act(fv: flags.FlagValues, words: Sequence[str], command: Sequence[str]) -> int:
    if list(words) not in (["run"], ["logs"], ["stop"], ["down"]):
        raise flags.IllegalFlagValueError(f"{' '.join(words) or 'no word'}: expected one of run, logs, stop, down")
    sh.required(fv, "name", "zone")
    fields = {f.name: fv[f.name].value for f in dataclasses.fields(Tpu)}
    tpu, shell = Tpu(**fields | {"name": sh.slug(fv.name)}), Shell(fv.dry_run)
    if words[0] == "logs":
        return shell.run(ssh(tpu, tpu.nodes[0], follow_script(tpu.name), worker="0"))
    if words[0] == "stop":
        return Runner(shell, tpu, fv.poll, fv.setup).each_node(stop_script(tpu.name))
    if words[0] == "down":
        return shell.run(delete(tpu))
    sh.required(fv, "accelerator")
    env = {"RLHFJAX_JOIN": "1"} | sh.environment(fv.env)  # the machine's metadata say who the others are
    text = remote_command(sh.given(command), env, sh.secrets(fv.secret), tpu.project)
    mount = [MOUNT.format(bucket=shlex.quote(fv.bucket))] if fv.bucket else []
    try:
        code = Runner(shell, tpu, fv.poll, " && ".join([*mount, fv.setup])).finish(text, fv.max_restarts)
    except LaunchError as e:  # not deleted: the run may be well, and only gcloud not answer
        raise LaunchError(
            f"{e}; what is there costs: python -m launch.tpu down --name={tpu.name} --zone={tpu.zone}"
        ) from e
    if not fv.keep:
        shell.must(delete(tpu))
    return code


def main() -> None:
    sh.launch(__doc__, _flags, act, sys.argv)


if __name__ == "__main__":
    main()
