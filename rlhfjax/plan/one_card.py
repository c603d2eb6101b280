"""Which settings of a stage fit in the memory of one device, by arithmetic."""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from rlhfjax.errors import ConfigError, cut
from rlhfjax.mesh import AXES, MeshConfig
from rlhfjax.plan import variants
from rlhfjax.plan.chips import CHIPS, Chip
from rlhfjax.plan.estimate import Estimate, estimate
from rlhfjax.plan.price import NO_PRICES, Cost, Prices, cost
from rlhfjax.plan.shapes import Subject
from rlhfjax.strategy import FULL, Axes

ONE: Axes = dict.fromkeys(AXES, 1)
ADAPTERS = 16  # the rank that is tried where the config has no adapters
UNITS = {"MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40, "GB": 1e9}
# What is tried of LoRA: the config's own, adapters, and adapters on a base of fewer bytes.
LORA: tuple[dict[str, Any], ...] = (
    {},
    {"lora.rank": ADAPTERS},
    {"lora.rank": ADAPTERS, "lora.base": "int8"},
    {"lora.rank": ADAPTERS, "lora.base": "nf4"},
)


class Card(NamedTuple):
    """One device."""

    name: str
    memory: float  # bytes
    chip: Chip | None  # None: its speed is not known

    @property
    def room(self) -> float:
        """Bytes that an estimate may have; the rest is for the program and fragmentation."""
        return FULL * self.memory


class Choice(NamedTuple):
    """Settings of a stage on one device."""

    options: dict[
        str, Any
    ]  # of the stage's config, by their dotted names; those that change
    expected: Estimate


class Fits(NamedTuple):
    """What was tried on a card."""

    card: Card
    kinds: list[list[Choice]]
    """By LoRA and dtype, what changes least first; of each the fastest that fits stands first."""
    steps: int  # of the run
    price: float | None = None  # of a chip-hour

    def fits(self, choice: Choice) -> bool:
        return choice.expected.bytes <= self.card.room

    @property
    def best(self) -> Choice | None:
        """The fastest that fits of the kind that changes least; None if nothing fits."""
        first = [kind[0] for kind in self.kinds]
        return next((choice for choice in first if self.fits(choice)), None)

    @property
    def nearest(self) -> Choice:
        """What needs least."""
        tried = [choice for kind in self.kinds for choice in kind]
        return min(tried, key=lambda choice: choice.expected.bytes)

    def seconds(self, choice: Choice) -> float | None:
        """Returns the time of a step; None if the chip is not known."""
        return choice.expected.seconds if self.card.chip else None

    def cost(self, choice: Choice) -> Cost | None:
        """Returns the cost of all steps; None if the chip is not known."""
        if self.card.chip is None:
            return None
        share = 1 / self.card.chip.devices
        return cost(choice.expected.seconds * self.steps, share, self.price)

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {
            "card": self.card.name,
            "memory": self.card.memory,
            "room": self.card.room,
            "fits": self.best is not None,
            "best": self.best and self._row(self.best),
            "nearest": self._row(self.nearest),
            "choices": [self._row(choice) for kind in self.kinds for choice in kind],
        }

    def _row(self, choice: Choice) -> dict[str, Any]:
        whole = self.cost(choice)
        return {
            "options": choice.options,
            "expected_bytes": choice.expected.parts,
            "fits": self.fits(choice),
            "step_seconds": self.seconds(choice),
            "cost": whole and whole.as_dict(),
        }


def parse_card(text: str, chip: str | None = None) -> Card:
    """Parses --fits: a size, `16GiB`, or a chip, `h100`, with its memory and speed.

    Args:
      chip: the chip whose speed a card of this size has.
    Raises:
      ConfigError: it is neither; or the chip is unknown.
    """
    known = ", ".join(CHIPS)
    if chip is not None and chip not in CHIPS:
        raise ConfigError(f"--chips={cut(chip)}: chips are {known}")
    if text in CHIPS:
        one = CHIPS[text]
        return Card(text, one.hbm / one.devices, one)
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text)
    if number is None or number[2] not in UNITS or not float(number[1]):
        units = ", ".join(UNITS)
        raise ConfigError(
            f"--fits={cut(text)}: expected a size such as 16GiB (units are {units}) or a chip: "
            f"{known}"
        )
    memory = float(number[1]) * UNITS[number[2]]
    return Card(text, memory, CHIPS[chip] if chip else None)


def fit(
    subject: Subject, card: Card, completions: int = 2, prices: Prices = NO_PRICES
) -> Fits:
    """Tries LoRA, dtype, remat and microbatches on one device, all models of the stage on it.

    LoRA changes what is trained, dtype how it is rounded, the others neither.
    """
    price = prices.of(card.chip.name) if card.chip else None
    one = MeshConfig(rules=subject.config.mesh.rules)
    options = variants.options(subject, one)
    alone = subject.with_config(mesh=one)
    for other in ("rollout_mesh", "frozen_mesh"):
        if getattr(subject.config, other, None) is not None:
            alone, options = (
                alone.with_config(**{other: None}),
                {**options, other: None},
            )
    kinds = []
    for changed, kind in _kinds(alone):
        choices = [
            choice._replace(options=options | kind | choice.options)
            for choice in _choices(changed, card, completions)
        ]
        kinds.append(sorted(choices, key=lambda choice: _order(choice, card)))
    return Fits(card, kinds, subject.config.steps, price)


def _choices(subject: Subject, card: Card, completions: int) -> Iterator[Choice]:
    """Yields every remat with every number of microbatches."""
    chip = card.chip or CHIPS["v5e"]  # of its time nothing is shown
    own, rows = subject.config.microbatches, variants.rows_of(subject)
    counts = list(variants.microbatches(own, rows, 1))
    for remat, count in itertools.product(variants.remats(subject), counts):
        settings = variants.settings(subject, remat, count)
        changed = variants.apply(subject, settings)
        options = variants.options(subject, subject.config.mesh, settings)
        yield Choice(options, estimate(changed, ONE, chip, completions))


def _order(choice: Choice, card: Card) -> tuple[bool, float, int]:
    """Orders choices of one kind: what fits, by time; then the others, by memory."""
    size, over = choice.expected.bytes, choice.expected.bytes > card.room
    return (over, size if over else choice.expected.seconds, len(choice.options))


def _kinds(subject: Subject) -> Iterator[tuple[Subject, dict[str, Any]]]:
    """Yields the stage with each LoRA and dtype, and the options that set them."""
    for lora in LORA:
        adapted = _with_lora(subject, lora)
        if adapted is None:
            continue
        yield adapted, lora
        if variants.changes_model(subject) and subject.model.dtype != "bfloat16":
            dtype = variants.model_option(subject, "dtype", "bfloat16")
            changed = variants.with_model_field(adapted, "dtype", "bfloat16")
            yield changed, lora | dtype


def _with_lora(subject: Subject, options: dict[str, Any]) -> Subject | None:
    """Returns the stage with these adapters; None if it has no place for them or has some."""
    lora = getattr(subject.config, "lora", None)
    if not options:
        return subject
    if lora is None or lora.rank or getattr(subject.config, "model", None) is not None:
        return None
    fields = {name.removeprefix("lora."): value for name, value in options.items()}
    return subject.with_config(lora=dataclasses.replace(lora, **fields))
