"""Builds the scripts and the description of a run that launch.tpu sends to the workers."""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Sequence
from typing import Any

from launch import shell as sh

_HAS_UV = "command -v uv > /dev/null"
_UV = (
    "mkdir -p ~/.local/bin; export PATH=$HOME/.local/bin:$PATH",
    f"{_HAS_UV} || curl -LsSf https://astral.sh/uv/install.sh | sh > /dev/null 2>&1 || true",
    # Without the installer: a separate environment, since Ubuntu 24.04 refuses --user.
    f"{_HAS_UV} || {{ python3 -m venv ~/.local/uv && ~/.local/uv/bin/pip install -q uv; }}",
    f"{_HAS_UV} || ln -sf ~/.local/uv/bin/uv ~/.local/bin/uv",
    "uv venv -q --allow-existing --python 3.11 ~/venv",
)
_APT = "sudo apt-get -o DPkg::Lock::Timeout=600 -qq"  # a new VM updates itself, and holds the lock
_GCSFUSE = (  # as https://cloud.google.com/storage/docs/cloud-storage-fuse/install has it
    "curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg"
    " | sudo tee /usr/share/keyrings/gcsfuse.asc > /dev/null",
    "echo deb '[signed-by=/usr/share/keyrings/gcsfuse.asc]' https://packages.cloud.google.com/apt"
    " gcsfuse-$(lsb_release -cs) main | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null",
    f"{_APT} update",
    f"{_APT} install -y gcsfuse",
)
_PREPARE = (
    "sudo -n rm -f /tmp/libtpu_lockfile || true",  # it outlives a killed process
    # Without huge pages a TPU starts slowly; JAX warns of it.
    "echo always | sudo -n tee /sys/kernel/mm/transparent_hugepage/enabled > /dev/null || true",
    # After a reboot the supervisor starts by itself.
    "{ crontab -l 2> /dev/null | grep -v rlhfjax_worker;"
    ' echo "@reboot PATH=$PATH python3 ~/rlhfjax_worker.py start SLICE > /dev/null 2>&1"; }'
    " | crontab - || true",
)
_MOUNTED = "mountpoint -q /bucket"


def setup_script(extras: Sequence[str]) -> str:
    """Installs uv, Python 3.11, JAX for TPUs and the copied code with its extras."""
    extra = f"[{','.join(extras)}]" if extras else ""
    install = (
        "uv pip install -q --python ~/venv/bin/python -c ~/rlhfjax/constraints/tpu.txt"
    )
    return _all([*_UV, f"{install} 'jax[tpu]' -e ~/rlhfjax{extra}"])


def with_bucket(setup: str) -> str:
    """The set-up, after Cloud Storage FUSE is installed."""
    return _all([*_GCSFUSE, setup])


def prepare_script(slice_number: int, bucket: str | None) -> str:
    """What comes before every start of the command; it fails where /bucket is no mount point."""
    lines = [line.replace("SLICE", str(slice_number)) for line in _PREPARE]
    if bucket:
        mount = f"gcsfuse --implicit-dirs {shlex.quote(bucket)} /bucket"
        again = (
            f"sudo -n umount -l /bucket 2> /dev/null; sudo mkdir -p /bucket; {mount}"
        )
        lines.append(
            f"sudo chown $(id -u) /bucket; {_MOUNTED} || {{ {again}; }}; {_MOUNTED}"
        )
    return "\n".join(lines)


def _all(lines: Sequence[str]) -> str:
    return "\n".join(["set -eo pipefail", *lines])


@dataclasses.dataclass(frozen=True)
class Job:
    """One run on a TPU.

    command: a line for a shell, with its environment.
    workdir: where the command saves its checkpoints; None where that is unknown.
    logs: the folder in a bucket that takes the workers' logs; None: none.
    linger: seconds from the end to the deletion; negative: never.
    max_run_duration: seconds; 0: without limit.
    """

    command: str
    setup: str
    bucket: str | None = None
    workdir: str | None = None
    logs: str | None = None
    linger: float = 900.0
    max_run_duration: float = 0.0
    max_restarts: int = 20

    def installed(self, archive: str) -> str:
        """The hash of what is installed: archive and set-up."""
        return _hash([archive, self.setup])

    def id(self, archive: str) -> str:
        """The hash of what runs: two starts of one id are the same run of the same code."""
        return _hash([archive, self.setup, self.run_id])

    @property
    def run_id(self) -> str:
        """The hash of the command, whatever its code."""
        return _hash([self.command, self.bucket])

    def description(
        self,
        *,
        archive: str,
        generation: str,
        slice_number: int,
        delete: Sequence[str],
        poll: float,
    ) -> dict[str, Any]:
        """rlhfjax.json, which launch/tpu_worker.py reads."""
        return {
            "id": self.id(archive),
            "run_id": self.run_id,
            "generation": generation,
            "archive": archive,
            "installed": self.installed(archive),
            "setup": self.setup,
            "prepare": prepare_script(slice_number, self.bucket),
            "check": _MOUNTED if self.bucket else "true",
            "command": self.command,
            "workdir": self.workdir or "",
            "logs": self.logs or "",
            "linger": self.linger,
            "max_run_duration": self.max_run_duration,
            "max_restarts": self.max_restarts,
            "delete": [*delete, "--async"],
            "poll": poll,
        }


def remote_command(
    command: Sequence[str],
    env: dict[str, str],
    stored: dict[str, str],
    project: str | None,
) -> str:
    """The command with its environment; a secret is read on the worker and stands nowhere else."""
    where = f" --project={project}" if project else ""
    read = [
        f'export {name}="$(gcloud secrets versions access latest --secret={secret}{where})" && '
        for name, secret in stored.items()
    ]
    return "".join(read) + sh.exports(env) + shlex.join(command)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, allow_nan=False).encode()).hexdigest()[:16]
