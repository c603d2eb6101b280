"""Sweeps: expands an experiment file's `sweep(add)`, runs what it adds, and collects the results.

A sweep is a list of overrides, each a dict {option: value}. An experiment file adds them:

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
    """Returns one element per value of an option."""
    return [{option: value} for value in values]


def seeds(n: int, option: str = "arg.seed", first: int = 0) -> Sweep:
    """Returns the seeds first, …, first + n - 1.

    Pass `option="seed"` if the file's config is a single stage and takes no seed as argument.
    """
    return grid(option, *range(first, first + n))


def product(*sweeps: Iterable[Mapping[str, Any]]) -> Sweep:
    """Returns every combination of one element per sweep; the last sweep varies fastest."""
    return [_merged(parts) for parts in itertools.product(*sweeps)]


def zipped(*sweeps: Iterable[Mapping[str, Any]]) -> Sweep:
    """Combines the first elements of all sweeps, then the second ones, and so on.

    Raises:
      ConfigError: the sweeps differ in length.
    """
    lists = [list(sweep) for sweep in sweeps]
    lengths = [len(elements) for elements in lists]
    if len(set(lengths)) > 1:
        raise ConfigError(
            f"zipped: sweeps of lengths {', '.join(map(str, lengths))}; expected one length"
        )
    return [_merged(parts) for parts in zip(*lists, strict=True)]


def chain(*sweeps: Iterable[Mapping[str, Any]]) -> Sweep:
    """Returns the elements of all sweeps, one sweep after the other."""
    return [dict(overrides) for overrides in itertools.chain(*sweeps)]


def is_seed(option: str) -> bool:
    """Returns whether an option is a seed, which repeats an experiment without changing it."""
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
