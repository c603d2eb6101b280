"""Names the machine, the versions and the commit behind a number."""

import os
import platform
from importlib import metadata
from typing import Any

from rlhfjax import processor, provenance


def describe() -> dict[str, Any]:
    """Returns the CPU's name, flags and number, versions, commit and load average, as JSON."""
    packages = ("rlhfjax", "jax", "jaxlib", "flax")
    return {
        "cpu": processor.name(),
        "flags": processor.vectors(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
        "commit": _commit(),
        "loadavg_1m": load(),
    }


def load() -> float:
    """Returns the load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def sentence(machine: dict[str, Any]) -> str:
    """Returns one line for below a table."""
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    flags = ", ".join(machine["flags"]) or "none of " + ", ".join(processor.VECTORS)
    return (
        f"{machine['cpus']} CPUs of {machine['cpu']} ({flags}), {machine['memory_gb']} GB; "
        f"{versions}; commit {machine['commit']}; load average before: {machine['loadavg_1m']}."
    )


def _commit() -> str:
    """Returns the short commit, with "+" if tracked files were changed."""
    start = provenance.about_start()
    commit = start.get("commit") or "unknown"
    return commit[:9] + "+" * (start.get("clean") is False)


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
