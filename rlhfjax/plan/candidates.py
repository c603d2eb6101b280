"""What a search chooses from: slices and GPUs, each with ways to run the stage there, estimated."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from rlhfjax.errors import ConfigError
from rlhfjax.footprint import batch_shards
from rlhfjax.mesh import MeshConfig, axis_sizes
from rlhfjax.plan import variants
from rlhfjax.plan.chips import CHIPS, GPUS, Chip
from rlhfjax.plan.estimate import Estimate, estimate
from rlhfjax.plan.predict import Plan
from rlhfjax.plan.price import Cost, cost
from rlhfjax.plan.shapes import Prepared, Subject
from rlhfjax.plan.variants import AS_IT_IS, VARY, Settings
from rlhfjax.strategy import FULL

# Cloud TPU's names of slices; v4, v5p and TPU7x come in hosts of four chips.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
)
COUNTS = ("1", "2", "4", "8", "16", "32", "64", "128", "256", "512")  # GPUs
SLICES = {"v4": CUBES, "v5e": FLAT, "v5p": CUBES, "v6e": FLAT, "tpu7x": CUBES}
SLICES |= dict.fromkeys(GPUS, COUNTS)


@dataclasses.dataclass
class Candidate:
    """A slice, a way to run the stage on it, the estimate, and the plan once it is compiled."""

    topology: str
    chips: int
    mesh: MeshConfig
    expected: Estimate
    capacity: float  # bytes per device
    plan: Plan | None = None
    settings: Settings = AS_IT_IS
    price: float | None = None  # of a chip-hour
    steps: int = 0  # of the run

    @property
    def chip(self) -> str:
        return self.topology.partition(":")[0]

    @property
    def by_hand(self) -> bool:
        """Whether it cannot be compiled here, so that the estimate decides."""
        return self.chip in GPUS

    @property
    def expected_to_fit(self) -> bool:
        return self.expected.bytes <= FULL * self.capacity

    @property
    def fits(self) -> bool:
        """Whether the slice was compiled and fits, or fits by hand if it cannot be compiled."""
        if self.by_hand:
            return self.expected_to_fit
        return self.plan is not None and self.plan.fits is True

    @property
    def needed(self) -> float | None:
        """Compiled bytes per device; None before."""
        if self.plan is None:
            return None
        return max(program.needed for program in self.plan.programs)

    @property
    def expected_rate(self) -> float:
        """Tokens per chip-second."""
        return self.expected.tokens / (self.expected.seconds * self.chips)

    @property
    def rate(self) -> float:
        """Tokens per chip-second of the plan; the estimate if its roofline is unknown."""
        if self.plan is None or not self.plan.step_seconds:
            return self.expected_rate
        return self.plan.step.tokens / self.plan.step_seconds / self.chips

    def value(self, rate: float | None = None) -> float:
        """Returns what a search maximizes: tokens per chip-second, or per money if it has a price.

        Args:
          rate: in place of its own.
        """
        rate = self.rate if rate is None else rate
        return rate if self.price is None else 3600 * rate / self.price

    def cost(self, rate: float | None = None) -> Cost:
        """Returns the cost of the run at a rate, by default its own."""
        rate = self.rate if rate is None else rate
        seconds = self.steps * self.expected.tokens / (rate * self.chips)
        return cost(seconds, self.chips, self.price)

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        values = {
            "topology": self.topology,
            "chips": self.chips,
            "mesh": axis_sizes(self.mesh),
            "rules": dict(self.mesh.rules),
            "settings": self.settings._asdict(),
            "by_hand": self.by_hand,
            "expected_bytes": self.expected.bytes,
            "expected_parts": self.expected.parts,
            "capacity": self.capacity,
            "expected_tokens_per_chip_second": self.expected_rate,
            "cost": self.cost().as_dict(),
        }
        if self.plan is not None:
            values["fits"] = self.fits
            values["tokens_per_chip_second"] = self.rate if self.fits else None
        return values


def candidates(
    subject: Subject,
    chip: str,
    completions: int = 2,
    vary: Sequence[str] = VARY,
    price: float | None = None,
) -> Iterator[Candidate]:
    """Yields the ways to run a stage on each slice of a chip: the smallest slice first.

    Of one slice those that should fit come first, the fastest of them first, and of equally fast
    ones that which changes the config least; then the others, those that need least first.
    """
    if chip not in CHIPS:
        raise ConfigError(f"--chips={chip}: chips are {', '.join(CHIPS)}")
    spec, ways = CHIPS[chip], Ways(subject, completions, vary)
    for shape in SLICES[chip]:
        n = math.prod(map(int, shape.split("x")))
        found = []
        for mesh in variants.meshes(subject, n * spec.devices, vary):
            for settings, expected in ways.estimates(mesh, spec):
                candidate = Candidate(
                    topology=f"{chip}:{shape}",
                    chips=n,
                    mesh=mesh,
                    expected=expected,
                    capacity=spec.hbm / spec.devices,
                    settings=settings,
                    price=price,
                    steps=subject.config.steps,
                )
                found.append(candidate)
        yield from sorted(found, key=_order)  # is stable: earlier ones change less


class Ways:
    """The settings of a stage, with the stage under each."""

    def __init__(
        self, subject: Subject, completions: int = 2, vary: Sequence[str] = VARY
    ):
        self._subject, self._completions, self._vary = subject, completions, vary
        self._own, self._rows = subject.config.microbatches, variants.rows_of(subject)
        self._remats = variants.remats(subject, vary)
        self._stages: dict[tuple[str, int], tuple[Settings, Subject]] = {}

    def estimates(
        self, mesh: MeshConfig, chip: Chip
    ) -> Iterator[tuple[Settings, Estimate]]:
        """Yields the settings of a mesh worth a look, with their estimates.

        More microbatches than fit are never faster. So for each remat the numbers of microbatches
        end at the second one that should fit; the compiler may need it where the estimate is too
        low.
        """
        axes = axis_sizes(mesh)
        shards = batch_shards(axes)
        for remat in self._remats:
            fitting = 0
            for count in variants.microbatches(
                self._own, self._rows, shards, self._vary
            ):
                settings, stage = self._stage(remat, count)
                expected = estimate(stage, axes, chip, self._completions)
                yield settings, expected
                fitting += expected.bytes <= FULL * chip.hbm / chip.devices
                if fitting == 2:
                    break

    def _stage(self, remat: str, count: int) -> tuple[Settings, Subject]:
        """Returns the settings with this remat and number of microbatches, and the stage."""
        if (remat, count) not in self._stages:
            settings = variants.settings(self._subject, remat, count)
            changed = Prepared(*variants.apply(self._subject, settings))
            self._stages[remat, count] = (settings, changed)
        return self._stages[remat, count]


def _order(c: Candidate) -> tuple[bool, float]:
    worst_first = c.expected.bytes if not c.expected_to_fit else -c.expected_rate
    return (not c.expected_to_fit, worst_first)
