"""The CPU of a run: XLA compiles for its instruction sets, and rounding depends on them."""

import functools
import os
import platform

from rlhfjax import paths
from rlhfjax.paths import Path

FILE = paths.path("/proc/cpuinfo")
VECTORS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
"""Instruction sets that decide how products are computed, the narrowest first."""


@functools.cache
def features() -> frozenset[str]:
    """Returns the features that XLA compiles for: those in /proc/cpuinfo, or the CPU's name."""
    fields = read(FILE)
    listed = fields.get("flags") or fields.get("Features") or platform.processor()
    return frozenset(listed.split())


def name() -> str:
    """Returns the model's name, which several generations of a family may share."""
    return read(FILE).get("model name") or platform.processor() or "unknown CPU"


def vectors() -> list[str]:
    """Returns those of `VECTORS` that it has."""
    return [flag for flag in VECTORS if flag in features()]


def describe() -> str:
    """Returns name and instruction sets, such as "AMD EPYC (avx2, avx512f)"."""
    found = ", ".join(vectors())
    return f"{name()} ({found})" if found else name()


def cores() -> int:
    """Returns the number of cores that the process may use, by which XLA divides loops."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read(file: Path) -> dict[str, str]:
    """Returns the fields of the first processor in a file like /proc/cpuinfo; {} without it."""
    if not file.exists():
        return {}
    found: dict[str, str] = {}
    for line in file.read_text().splitlines():
        field, _, value = line.partition(":")
        found.setdefault(field.strip(), value.strip())
    return found
