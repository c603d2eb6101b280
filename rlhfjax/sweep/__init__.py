"""Sweeps: an experiment file's `sweep(add)`, expanded, run, and collected.

A sweep is a list of overrides, each a dict {option: value}. An experiment file says which ones it
has:

    def sweep(add):
        for overrides in product(grid("ppo.kl.coefficient", 0.05, 0.15, 0.45), seeds(3)):
            add(overrides)

An option is `a.b.c` of the config, as in `--config.a.b.c=`, or `arg.NAME`, as in FILE.py:NAME=.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from rlhfjax.errors import ConfigError

Overrides = dict[str, Any]
Sweep = list[Overrides]


def grid(option: str, *values: Any) -> Sweep:
    """One option, each of the values."""
    return [{option: value} for value in values]


def seeds(n: int, option: str = "arg.seed") -> Sweep:
    """Seeds 0, …, n - 1; `option="seed"` for a file whose config is one stage and takes no seed as
    argument.
    """
    return grid(option, *range(n))


def product(*sweeps: Iterable[Mapping[str, Any]]) -> Sweep:
    """Every combination of an element of each; the last sweep varies fastest."""
    return [_merged(parts) for parts in itertools.product(*sweeps)]


def zipped(*sweeps: Iterable[Mapping[str, Any]]) -> Sweep:
    """The first of each, the second of each, and so on.

    Raises:
      ConfigError: the sweeps are not of one length.
    """
    lists = [list(sweep) for sweep in sweeps]
    if len({len(one) for one in lists}) > 1:
        raise ConfigError(
            f"zipped: sweeps of lengths {', '.join(str(len(one)) for one in lists)}; expected one "
            "length"
        )
    return [_merged(parts) for parts in zip(*lists, strict=True)]


def chain(*sweeps: Iterable[Mapping[str, Any]]) -> Sweep:
    """One sweep after the other."""
    return [dict(overrides) for overrides in itertools.chain(*sweeps)]


def is_seed(option: str) -> bool:
    """Whether the option only tells repetitions of one experiment apart."""
    return option.rsplit(".", 1)[-1] == "seed"


def _merged(parts: Iterable[Mapping[str, Any]]) -> Overrides:
    merged: Overrides = {}
    for part in parts:
        if twice := sorted(merged.keys() & part.keys()):
            raise ConfigError(
                f"sweep: {twice[0]!r} is set by two of the sweeps that are combined"
            )
        merged |= part
    return merged
