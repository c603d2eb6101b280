"""Where a result comes from: provenance.jsonl in every workdir, one line per start.

A line has the command, the commit of the package and whether its folder was clean, the versions of
the packages, the hardware, the stage's seed, the sizes of its models and the date that chat
templates write.
"""

import datetime
import functools
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import types
from collections.abc import Mapping
from typing import Any, NotRequired

import jax
from typing_extensions import TypedDict

from rlhfjax import hosts, json_text, paths, processor, template_date
from rlhfjax.errors import DataError
from rlhfjax.jsonl import REMEDY, read_jsonl
from rlhfjax.paths import Path
from rlhfjax.redact import redact

FILE = "provenance.jsonl"
PACKAGES = ("rlhfjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def record(
    workdir: Path,
    *,
    seeds: Mapping[str, int],
    parameters: Mapping[str, int] = types.MappingProxyType({}),
) -> None:
    """Adds a line about this start to a workdir's provenance.jsonl, on the first host.

    Args:
      seeds: seed by name of the stage.
      parameters: number of parameters by name of the model.
    """
    if not hosts.first():
        return
    row = about_start() | {
        "seeds": dict(seeds),
        "parameters": dict(parameters),
        "template_date": template_date.now().isoformat(),
    }
    rows = [*read_jsonl(workdir / FILE), row]
    lines = [json_text.encode(row, FILE) + "\n" for row in rows]
    paths.write(workdir / FILE, "".join(lines))


class Start(TypedDict, extra_items=Any):
    """A line of provenance.jsonl."""

    date: NotRequired[str]
    command: NotRequired[str]
    commit: NotRequired[str | None]
    clean: NotRequired[bool | None]
    versions: NotRequired[dict[str, str]]
    hardware: NotRequired[dict[str, Any]]
    seeds: NotRequired[dict[str, int]]
    parameters: NotRequired[dict[str, int]]
    template_date: NotRequired[str]


def read(workdir: Path) -> list[dict[str, Any]]:
    """Returns the starts of a workdir, in order; [] for workdirs of older versions.

    Raises:
      DataError: a line is damaged; the message names it and says what to do.
    """
    return read_jsonl(workdir / FILE, Start, REMEDY)


def first_template_date(workdir: Path) -> datetime.datetime:
    """Returns the date that chat templates wrote at the first start; `template_date.now` before it.

    Raises:
      DataError: a line is damaged.
    """
    starts = read(workdir)
    if not starts:
        return template_date.now()
    # Workdirs of older versions have the time of the start only, in UTC.
    text = starts[0].get("template_date") or starts[0].get("date", "")
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise DataError(
            f"{workdir / FILE}:1: {json_text.shown(text)} is no date; {REMEDY}"
        ) from None
    return time.astimezone().replace(tzinfo=None) if time.tzinfo else time


def about_start() -> dict[str, Any]:
    """Returns what is the same for all stages of a process."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "date": now.isoformat(timespec="seconds"),
        "command": command(),
        **_code(),
        "versions": _versions(),
        "hardware": _hardware(),
    }


def command() -> str:
    """Returns the command line of this process, without secrets."""
    program = os.path.basename(sys.argv[0])
    program = "rlhfjax" if program == "__main__.py" else program
    words = shlex.join([program, *sys.argv[1:]])
    return redact(json_text.unicode(words))


@functools.cache
def _code() -> dict[str, Any]:
    """Returns the commit of the package's source, and whether tracked files were unchanged.

    The commit is None if the source is neither a git checkout nor was installed from one.
    """
    folder = paths.path(__file__).parent
    if commit := _git(folder, "rev-parse", "HEAD"):
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
        return {"commit": commit, "clean": changes == ""}
    return {"commit": _installed_commit(), "clean": None}


def _git(folder: Path, *words: str) -> str | None:
    """Returns the output of a git command; None if it failed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed_commit() -> str | None:
    """Returns the commit that pip installed the package from, if it was installed from git."""
    try:
        text = importlib.metadata.distribution("rlhfjax").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    about = json_text.decode(text, "direct_url.json", json_text.Object) if text else {}
    return about.get("vcs_info", {}).get("commit_id")


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "platform": device.platform,
        "hosts": hosts.count(),
        "machine": platform.node(),
        "cores": processor.cores(),
        "cpu": processor.describe(),
        "system": platform.platform(),
    }
