"""Searches for the smallest slice that a stage fits on, and for the one with the best throughput.

As little as possible is compiled. The estimate (`estimate.py`) ranks the ways to run the stage on
every slice: remat, microbatches, mesh. It says where to begin: the best way on the smallest slice
that should fit is compiled, then smaller slices until one does not fit. Other ways and larger
slices are compiled only while the estimate, corrected by what was compiled, promises more tokens
per chip-second, or per money. GPUs have the estimate alone.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rlhfjax.errors import ConfigError
from rlhfjax.mesh import axis_sizes
from rlhfjax.plan import predict, variants
from rlhfjax.plan.candidates import Candidate, candidates
from rlhfjax.plan.predict import Plan
from rlhfjax.plan.price import NO_PRICES, Prices
from rlhfjax.plan.shapes import Subject
from rlhfjax.plan.topology import target
from rlhfjax.plan.variants import VARY

ATTEMPTS = (
    3  # ways to run the stage on one slice that are compiled before it is given up
)
FASTER = 1 + 1e-6  # a promise is worth a compilation from this factor on


@dataclasses.dataclass
class Search:
    """The candidates, and what a search found among them."""

    candidates: list[Candidate]
    smallest: dict[str, str] = dataclasses.field(default_factory=dict)
    """The topology of the smallest slice that fits, by chip."""
    exhausted: bool = False  # whether the limit of compilations was reached

    @property
    def plans(self) -> dict[str, Plan]:
        """The last plan of each compiled slice that fits, or does not, by topology."""
        compiled = [c for c in self.candidates if c.plan is not None]
        compiled.sort(key=lambda c: c.fits)
        return {c.topology: c.plan for c in compiled if c.plan is not None}

    @property
    def compilations(self) -> int:
        return sum(c.plan is not None for c in self.candidates)

    @property
    def slices(self) -> dict[str, list[Candidate]]:
        """The candidates of each slice, by topology."""
        found: dict[str, list[Candidate]] = {}
        for c in self.candidates:
            found.setdefault(c.topology, []).append(c)
        return found

    @property
    def fitting(self) -> list[Candidate]:
        return [c for c in self.candidates if c.fits]

    @property
    def fewest(self) -> Candidate | None:
        """The slice with the fewest chips that fits, the best of several."""
        return min(self.fitting, key=lambda c: (c.chips, -self.value(c)), default=None)

    @property
    def best(self) -> Candidate | None:
        """The one with the most tokens per chip-second, or per money, of those that fit."""
        return max(self.fitting, key=self.value, default=None)

    def value(self, c: Candidate) -> float:
        """Returns what the search maximizes, of an estimate times `correction`."""
        return c.value(self.rate(c))

    def rate(self, c: Candidate) -> float:
        """Returns tokens per chip-second; those of an estimate are corrected."""
        if c.plan is not None or c.by_hand:
            return c.rate
        return c.expected_rate * correction(self.candidates, c.chip).rate

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {
            "smallest": self.fewest and self.fewest.topology,
            "smallest_by_chip": self.smallest,
            "best": self.best and self.best.topology,
            "compiled": self.compilations,
            "considered": len(self.candidates),
            "limit_reached": self.exhausted,
            "candidates": [c.as_dict() for c in shown(self)],
            "plans": {name: plan.as_dict() for name, plan in self.plans.items()},
        }


def shown(result: Search) -> list[Candidate]:
    """Returns what was compiled, and of the other slices the first candidate."""
    found = []
    for group in result.slices.values():
        compiled = [c for c in group if c.plan is not None]
        found += compiled or group[:1]
    return found


def search(
    subject: Subject,
    chips: Sequence[str],
    compile_slice: Callable[[Candidate], Plan],
    most: int = 8,
    completions: int = 2,
    *,
    vary: Sequence[str] = VARY,
    prices: Prices = NO_PRICES,
) -> Search:
    """Searches the slices of some chips.

    Args:
      compile_slice: returns the plan of a candidate; this takes the time.
      most: how often `compile_slice` may be called.
      vary: what a candidate may change, of `variants.VARY`.
    Raises:
      ConfigError: no slice of these chips has a mesh that divides the batch and the models.
    """
    result = Search([])
    for chip in chips:
        price = prices.of(chip)
        result.candidates += candidates(subject, chip, completions, vary, price)
    if not result.candidates:
        raise ConfigError(
            f"--topology=search: no slice of {', '.join(chips)} divides batch and model of "
            f"{subject.name}; mesh {axis_sizes(subject.config.mesh)}, "
            f"batch_size {subject.config.batch_size}"
        )

    def compiled(c: Candidate) -> bool:
        if c.plan is None and not c.by_hand:
            if result.compilations >= most:
                raise _LimitReached
            c.plan = compile_slice(c)
        return c.fits

    def fits(first: Candidate) -> bool:
        group = result.slices[first.topology]
        for _ in range(ATTEMPTS):
            attempt = next_attempt(group)
            if attempt is None:
                return False
            if compiled(attempt):
                return True
        return False

    def first_size(chip: str) -> float:
        slices = (c for c in result.candidates if c.chip == chip and c.expected_to_fit)
        return float(min((c.chips for c in slices), default=math.inf))

    leaders = [group[0] for group in result.slices.values()]
    try:
        for chip in sorted(chips, key=first_size):
            slices = [c for c in leaders if c.chip == chip]
            if (found := smallest(slices, fits)) is not None:
                result.smallest[chip] = found.topology
        while (better := promising(result)) is not None:
            compiled(better)
    except _LimitReached:
        result.exhausted = True
    return result


def search_chips(
    subject: Subject,
    chips: Sequence[str],
    most: int = 8,
    completions: int = 2,
    *,
    vary: Sequence[str] = VARY,
    prices: Prices = NO_PRICES,
) -> Search:
    """Runs `search` with the TPU compiler; stops at the first program of a slice that does not
    fit."""

    def compile_slice(c: Candidate) -> Plan:
        ways = ", ".join(f"{k}={v}" for k, v in settings_of(subject, c).items())
        where = f"{c.topology}{ways and f' with {ways}'}"
        print(f"compiling {subject.name} for {where}", file=sys.stderr, flush=True)
        on_slice = variants.apply(subject, c.settings).with_config(mesh=c.mesh)
        return predict.make_plan(on_slice, target(c.topology), completions, stop=True)

    return search(
        subject, chips, compile_slice, most, completions, vary=vary, prices=prices
    )


def settings_of(subject: Subject, c: Candidate) -> dict[str, Any]:
    """Returns the options of the stage's config that a candidate sets."""
    return variants.options(subject, c.mesh, c.settings)


class _LimitReached(Exception):
    """No compilation is left."""


def next_attempt(group: Sequence[Candidate]) -> Candidate | None:
    """Returns the candidate of a slice to compile next; None if no further one should fit.

    Args:
      group: the candidates of the slice, the best first.
    """
    compiled = [c for c in group if c.plan is not None]
    if not compiled:
        return group[0]
    if fitting := [c for c in compiled if c.fits]:
        return fitting[0]
    ratio = correction(compiled, group[0].chip).bytes
    left = [
        c
        for c in group
        if c.plan is None and c.expected.bytes * ratio <= c.capacity and not c.by_hand
    ]
    return max(left, key=lambda c: c.expected_rate, default=None)


class Correction(NamedTuple):
    """Ratios of compiled to estimated numbers for one chip; 1 if nothing was compiled."""

    rate: float  # the least ratio of compiled to estimated tokens per second, of what fits
    bytes: float  # the largest ratio of compiled to estimated bytes


def correction(candidates: Sequence[Candidate], chip: str) -> Correction:
    """Returns the factors by which a chip's estimates have been off so far."""
    compiled = [c for c in candidates if c.plan is not None and c.chip == chip]
    rates = [c.rate / c.expected_rate for c in compiled if c.fits]
    sizes = [c.needed / c.expected.bytes for c in compiled if c.needed is not None]
    return Correction(rate=min(rates, default=1.0), bytes=max(sizes, default=1.0))


def smallest(
    ordered: Sequence[Candidate], fits: Callable[[Candidate], bool]
) -> Candidate | None:
    """Returns the smallest candidate that fits; begins where the estimate expects it.

    Args:
      ordered: candidates, the smallest first.
    """
    if not ordered:
        return None
    at = next((i for i, c in enumerate(ordered) if c.expected_to_fit), len(ordered) - 1)
    if fits(ordered[at]):
        while at and fits(ordered[at - 1]):
            at -= 1
        return ordered[at]
    return next((c for c in ordered[at + 1 :] if fits(c)), None)


def promising(result: Search) -> Candidate | None:
    """Returns what may be better than the best and is not compiled yet, if anything.

    It is on no smaller slice of a chip than the smallest that fits, and it should fit there. Its
    estimates are corrected by what was compiled, see `Search`.
    """
    if result.best is None:
        return None
    top, found = FASTER * result.value(result.best), None
    for chip in result.smallest:
        off = correction(result.candidates, chip)
        of_chip = [c for c in result.candidates if c.chip == chip]
        fewest = min(c.chips for c in of_chip if c.fits)
        for c in of_chip:
            if c.plan is not None or c.by_hand or c.chips < fewest:
                continue
            value = c.value(c.expected_rate * off.rate)
            if value > top and c.expected.bytes * off.bytes <= c.capacity:
                top, found = value, c
    return found
