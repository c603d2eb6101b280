"""Time and money of a whole run."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from rlhfjax.errors import ConfigError, cut
from rlhfjax.models.size import Number
from rlhfjax.plan.chips import CHIPS, DAY

EXPECTED = "a number, or CHIP:NUMBER for every chip, such as v5e:1.2,h100:3"


class Prices(NamedTuple):
    """Money per chip-hour, in any currency."""

    everywhere: float | None = None
    of_chips: Mapping[str, float] = {}

    def of(self, chip: str) -> float | None:
        """Returns the price of a chip; None if no price was given.

        Raises:
          ConfigError: only others have a price.
        """
        if self.of_chips and chip not in self.of_chips:
            raise ConfigError(f"--price: none for {chip}; expected {EXPECTED}")
        return self.of_chips.get(chip, self.everywhere)


NO_PRICES = Prices()


class Cost(NamedTuple):
    """What a run takes as a whole."""

    days: float
    chip_hours: float
    money: float | None  # None without a price

    def as_dict(self) -> dict[str, float]:
        values = {"days": self.days, "chip_hours": self.chip_hours}
        return values if self.money is None else {**values, "money": self.money}

    def text(self) -> str:
        """Returns `2.1 days, 403 chip-hours, 1,209 at this price`."""
        span = f"{self.days:,.3g} days, {self.chip_hours:,.4g} chip-hours"
        return span if self.money is None else f"{span}, costs {self.money:,.4g}"


def cost(seconds: float, chips: Number, price: float | None = None) -> Cost:
    """Returns the cost of a run from its seconds; `price` is that of a chip-hour."""
    chip_hours = seconds * chips / 3600
    money = None if price is None else price * chip_hours
    return Cost(days=seconds / DAY, chip_hours=chip_hours, money=money)


def parse(text: str | None) -> Prices:
    """Parses --price: `2.5` or `v5e:1.2,h100:3`."""
    if not text:
        return NO_PRICES
    if ":" not in text:
        return Prices(everywhere=_number(text))
    of_chips = {}
    for part in text.split(","):
        chip, _, number = part.partition(":")
        if chip not in CHIPS:
            known = ", ".join(CHIPS)
            raise ConfigError(f"--price={cut(part)}: chips are {known}")
        of_chips[chip] = _number(number)
    return Prices(of_chips=of_chips)


def _number(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 < price < math.inf:
        raise ConfigError(f"--price={cut(text)}: expected {EXPECTED}, above 0")
    return price
