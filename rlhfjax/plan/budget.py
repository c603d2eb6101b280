"""A training run by the arithmetic of papers: parameters, tokens, FLOPs, days."""

from typing import NamedTuple

from rlhfjax.errors import ConfigError, cut
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.size import active_parameters
from rlhfjax.plan.chips import CHIPS, Chip, petaflops_days, training_flops
from rlhfjax.plan.price import NO_PRICES, Prices, cost


class Fleet(NamedTuple):
    """A number of chips of one kind, with their total FLOP/s."""

    chip: Chip
    count: int


def fleet(topology: str) -> Fleet:
    """Parses CHIP:COUNT, `v100-32gb:10000` or `v5e:256`.

    Raises:
      ConfigError: it has another form, or the chip is unknown.
    """
    name, _, count = topology.partition(":")
    n = int(count) if count.isdecimal() and len(count) < 10 else 0
    if name not in CHIPS or not n:
        known = ", ".join(CHIPS)
        raise ConfigError(
            f"--topology={cut(topology)}: with --tokens expected CHIP:COUNT; chips are {known}"
        )
    return Fleet(CHIPS[name], n)


def seconds(flops: float, chips: Fleet, mfu: float) -> float:
    """Returns the time of a number of model FLOPs at a share of the peak."""
    return flops / (mfu * chips.count * chips.chip.flops)


def text(
    model: TransformerConfig,
    tokens: float,
    topology: str | None = None,
    mfu: float | None = None,
    prices: Prices = NO_PRICES,
) -> str:
    """Returns what training a model on a number of tokens takes, in sentences.

    Raises:
      ConfigError: only one of topology and mfu is given.
    """
    n = active_parameters(model)
    flops = float(training_flops(n, tokens))
    days = petaflops_days(flops)
    line = (
        f"6 N D = 6 x {n:,} x {tokens:.4g} = {flops:.4g} FLOPs = {days:,.0f} PF-days."
    )
    if (topology is None) != (mfu is None):
        raise ConfigError(
            "--tokens: give both --topology=CHIP:COUNT and --mfu=SHARE, or neither"
        )
    if topology is None or mfu is None:
        return line
    chips = fleet(topology)
    took = seconds(flops, chips, mfu)
    whole = cost(took, chips.count, prices.of(chips.chip.name))
    peak = chips.chip.flops / 1e12
    return (
        f"{line}\n{chips.count:,} x {chips.chip.name} of {peak:,.4g} TFLOP/s at "
        f"{100 * mfu:.1f} % MFU: {whole.text()}."
    )
