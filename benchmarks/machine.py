"""Names the machine, the versions and the commit behind a number."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhfjax import provenance

# Instruction sets that decide how fast products are.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")


def describe() -> dict[str, Any]:
    """Returns the CPU's name, flags and number, versions, commit and load average, as JSON."""
    name, flags = cpu(Path("/proc/cpuinfo"))
    packages = ("rlhfjax", "jax", "jaxlib", "flax")
    return {
        "cpu": name or platform.processor() or "unknown CPU",
        "flags": flags,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
        "commit": _commit(),
        "loadavg_1m": load(),
    }


def cpu(file: Path) -> tuple[str, list[str]]:
    """Returns the model's name and those of FLAGS that it has; ("", []) without the file."""
    if not file.exists():
        return "", []
    fields: dict[str, str] = {}
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", "").split()
    return fields.get("model name", ""), [flag for flag in FLAGS if flag in flags]


def load() -> float:
    """Returns the load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def sentence(machine: dict[str, Any]) -> str:
    """Returns one line for below a table."""
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    flags = ", ".join(machine["flags"]) or "none of " + ", ".join(FLAGS)
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
