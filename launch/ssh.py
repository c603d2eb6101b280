"""Runs a command on plain hosts over ssh, one process per host; restarts it when it was preempted.

    python -m launch.ssh run --name=a --hosts=h0,h1 --setup='…' \\
        -- rlhfjax run --config=… --workdir=/shared/runs/a
    python -m launch.ssh stop --name=a --hosts=h0,h1

The hosts need a shared file system for the workdir and logins without a password. The first host
coordinates JAX's processes. When one process fails, the others get SIGTERM; Ctrl-C stops all.
Secrets are taken from the hosts' own environment.
"""

import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence

from absl import flags

from launch.shell import (
    PREEMPTED,
    LaunchError,
    Shell,
    environment,
    exports,
    given,
    launch,
    pack,
    required,
    slug,
    worst,
)

SSH = ("ssh", "-oBatchMode=yes", "-oServerAliveInterval=15", "-oServerAliveCountMax=4")
PORT = 12345


def on(host: str, script: str) -> list[str]:
    return [*SSH, host, script]


def copy(host: str, file: str, to: str) -> list[str]:
    return ["scp", "-q", "-oBatchMode=yes", file, f"{host}:{to}"]


def run_script(name: str, command: str, hosts: Sequence[str], index: int) -> str:
    """The command in ~/NAME, as the index-th of JAX's processes.

    Its process number stands in ~/NAME.pid.
    """
    jax = {"JAX_COORDINATOR_ADDRESS": f"{hosts[0].rpartition('@')[2]}:{PORT}"}
    jax |= {"JAX_NUM_PROCESSES": str(len(hosts)), "JAX_PROCESS_ID": str(index)}
    own = exports(jax) if len(hosts) > 1 else ""
    return f"cd ~/{name} && echo $$ > ~/{name}.pid && exec env {own}{command}"


def clean_script(name: str) -> str:
    """Forgets the process of the start before, whose number may be another's by now."""
    return f"rm -f ~/{name}.pid"


def stop_script(name: str) -> str:
    """SIGTERM to the command, which may be about to start."""
    wait = f"for i in $(seq 50); do [ -s ~/{name}.pid ] && break; sleep 0.2; done"
    return f"{wait}; kill -TERM $(cat ~/{name}.pid)"


def install(shell: Shell, name: str, hosts: Sequence[str], setup: str) -> None:
    """Copies what git tracks to ~/NAME on every host, and runs `setup` there."""
    file = f"/tmp/rlhfjax-{name}.tar.gz"
    pack(shell, file)
    for host in hosts:
        shell.must(copy(host, file, f"{name}.tar.gz"))
        shell.must(
            on(
                host,
                f"mkdir -p ~/{name} && tar -xzf ~/{name}.tar.gz -C ~/{name} && cd ~/{name} && "
                f"{setup}",
            )
        )


def once(shell: Shell, name: str, hosts: Sequence[str], command: str) -> int:
    """Runs the command on all hosts at once.

    The first exit code that is not 0, after the others were stopped.
    """
    scripts = {
        host: run_script(name, command, hosts, i) for i, host in enumerate(hosts)
    }
    for host in hosts:
        shell.must(on(host, clean_script(name)))
    for host, script in scripts.items():
        shell.show(on(host, script))
    if shell.dry_run:
        return 0
    codes: list[int] = []
    ended = threading.Condition()

    def follow(host: str) -> None:
        streams = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
        }
        with subprocess.Popen(
            on(host, scripts[host]), text=True, errors="replace", **streams
        ) as process:
            for line in process.stdout:
                shell.say(f"[{host}] {line.rstrip()}")
        with ended:
            codes.append(process.returncode)
            ended.notify()

    threads = [
        threading.Thread(target=follow, args=[host], daemon=True) for host in hosts
    ]
    for thread in threads:
        thread.start()
    try:
        with ended:
            ended.wait_for(lambda: len(codes) == len(hosts) or any(codes))
            own = tuple(
                codes
            )  # those that are stopped now end as they can, which says nothing
    finally:
        if len(codes) < len(hosts):
            for host in hosts:
                shell.run(on(host, stop_script(name)))
        for thread in threads:
            thread.join()
    return worst(own)


def act(fv: flags.FlagValues, words: Sequence[str], command: Sequence[str]) -> int:
    if list(words) not in (["run"], ["stop"]):
        raise flags.IllegalFlagValueError(
            f"{' '.join(words) or 'no word'}: expected one of run, stop"
        )
    required(fv, "name", "hosts")
    name, shell = slug(fv.name), Shell(fv.dry_run)
    if words[0] == "stop":
        return max(shell.run(on(host, stop_script(name))) for host in fv.hosts)
    text = exports(environment(fv.env)) + shlex.join(given(command))
    install(shell, name, fv.hosts, fv.setup)
    for _ in range(fv.max_restarts + 1):
        code = once(shell, name, fv.hosts, text)
        if code != PREEMPTED:
            return code
        shell.say(f"{name}: preempted, its state is saved; it starts again")
    raise LaunchError(
        f"{name}: preempted more than --max_restarts={fv.max_restarts} times; its state is saved"
    )


def _flags(fv: flags.FlagValues) -> None:
    flags.DEFINE_list(
        "hosts",
        None,
        "[user@]host, comma-separated; the first coordinates",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "setup",
        "python3 -m pip install -q -e .",
        "command to run first in the copy on each host",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "max_restarts", 20, "restarts after preemptions", 0, flag_values=fv
    )


def main() -> None:
    launch(__doc__, _flags, act, sys.argv)


if __name__ == "__main__":
    main()
