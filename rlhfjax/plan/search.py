"""Searches for the smallest slice that a stage fits on, and for the one with the best throughput.

As little as possible is compiled. The estimate (`estimate.py`) says where to begin. That slice is
compiled, then smaller ones until one does not fit. Larger ones are compiled only while the
estimate, corrected by what was compiled, promises more tokens per chip-second.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlhfjax.errors import ConfigError
from rlhfjax.mesh import DEFAULT_RULES, MeshConfig, axis_sizes
from rlhfjax.plan import predict
from rlhfjax.plan.chips import CHIPS
from rlhfjax.plan.estimate import Estimate, estimate
from rlhfjax.plan.predict import Plan
from rlhfjax.plan.shapes import Subject
from rlhfjax.plan.topology import target
from rlhfjax.strategy import FULL, fill

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
SLICES = {"v4": CUBES, "v5e": FLAT, "v5p": CUBES, "v6e": FLAT, "tpu7x": CUBES}


@dataclasses.dataclass
class Candidate:
    """A slice, the mesh of the stage on it, the estimate, and the plan once it is compiled."""

    topology: str
    chips: int
    mesh: MeshConfig
    expected: Estimate
    capacity: float  # bytes per device
    plan: Plan | None = None

    @property
    def chip(self) -> str:
        return self.topology.partition(":")[0]

    @property
    def expected_to_fit(self) -> bool:
        return self.expected.bytes <= FULL * self.capacity

    @property
    def fits(self) -> bool:
        """Whether the slice was compiled and fits."""
        return self.plan is not None and self.plan.fits is True

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

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        values = {
            "topology": self.topology,
            "chips": self.chips,
            "mesh": axis_sizes(self.mesh),
            "rules": dict(self.mesh.rules),
            "expected_bytes": self.expected.bytes,
            "capacity": self.capacity,
            "expected_tokens_per_chip_second": self.expected_rate,
        }
        if self.plan is not None:
            values["fits"] = self.fits
            values["tokens_per_chip_second"] = self.rate if self.fits else None
        return values


@dataclasses.dataclass
class Search:
    """The candidates, and what a search found among them."""

    candidates: list[Candidate]
    smallest: dict[str, str] = dataclasses.field(default_factory=dict)
    """The topology of the smallest slice that fits, by chip."""
    exhausted: bool = False  # whether the limit of compilations was reached

    @property
    def plans(self) -> dict[str, Plan]:
        """The plans of the compiled slices, by topology."""
        return {c.topology: c.plan for c in self.candidates if c.plan is not None}

    @property
    def fitting(self) -> list[Candidate]:
        return [c for c in self.candidates if c.fits]

    @property
    def fewest(self) -> Candidate | None:
        """The slice with the fewest chips that fits, the fastest of several."""
        return min(self.fitting, key=lambda c: (c.chips, -c.rate), default=None)

    @property
    def best(self) -> Candidate | None:
        """The slice with the most tokens per chip-second, of those that fit."""
        return max(self.fitting, key=lambda c: c.rate, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {
            "smallest": self.fewest and self.fewest.topology,
            "smallest_by_chip": self.smallest,
            "best": self.best and self.best.topology,
            "compiled": len(self.plans),
            "considered": len(self.candidates),
            "limit_reached": self.exhausted,
            "candidates": [c.as_dict() for c in self.candidates],
            "plans": {name: plan.as_dict() for name, plan in self.plans.items()},
        }


def search(
    subject: Subject,
    chips: Sequence[str],
    compile_slice: Callable[[Candidate], Plan],
    most: int = 8,
    completions: int = 2,
) -> Search:
    """Searches the slices of some chips.

    Args:
      compile_slice: returns the plan of a candidate; this takes the time.
      most: how often `compile_slice` may be called.
    Raises:
      ConfigError: no slice of these chips has a mesh that divides the batch and the models.
    """
    result = Search(
        [c for chip in chips for c in candidates(subject, chip, completions)]
    )
    if not result.candidates:
        raise ConfigError(
            f"--topology=search: no slice of {', '.join(chips)} divides batch and model of "
            f"{subject.name}; mesh {axis_sizes(subject.config.mesh)}, "
            f"batch_size {subject.config.batch_size}"
        )

    def fits(c: Candidate) -> bool:
        if c.plan is None:
            if len(result.plans) >= most:
                raise _LimitReached
            c.plan = compile_slice(c)
        return c.fits

    def first_size(chip: str) -> float:
        slices = (c for c in result.candidates if c.chip == chip and c.expected_to_fit)
        return float(min((c.chips for c in slices), default=math.inf))

    try:
        for chip in sorted(chips, key=first_size):
            slices = [c for c in result.candidates if c.chip == chip]
            if (found := smallest(slices, fits)) is not None:
                result.smallest[chip] = found.topology
        while (larger := promising(result)) is not None:
            fits(larger)
    except _LimitReached:
        result.exhausted = True
    return result


def search_tpus(
    subject: Subject, chips: Sequence[str], most: int = 8, completions: int = 2
) -> Search:
    """Runs `search` with the TPU compiler; stops at the first program of a slice that does not
    fit."""

    def compile_slice(c: Candidate) -> Plan:
        print(f"compiling {subject.name} for {c.topology}", file=sys.stderr, flush=True)
        on_slice = subject.with_config(mesh=c.mesh)
        return predict.make_plan(on_slice, target(c.topology), completions, stop=True)

    return search(subject, chips, compile_slice, most, completions)


class _LimitReached(Exception):
    """No compilation is left."""


def candidates(
    subject: Subject, chip: str, completions: int = 2
) -> Iterator[Candidate]:
    """Yields a chip's slices whose devices the stage can use, the smallest first."""
    if chip not in CHIPS:
        raise ConfigError(f"--chips={chip}: chips are {', '.join(CHIPS)}")
    spec = CHIPS[chip]
    for shape in SLICES[chip]:
        n = math.prod(map(int, shape.split("x")))
        mesh = mesh_for(subject, n * spec.devices)
        if mesh is None:
            continue
        yield Candidate(
            topology=f"{chip}:{shape}",
            chips=n,
            mesh=mesh,
            expected=estimate(subject, axis_sizes(mesh), spec, completions),
            capacity=spec.hbm / spec.devices,
        )


def mesh_for(subject: Subject, devices: int) -> MeshConfig | None:
    """Returns the mesh of a stage on this many devices; None if it does not divide the stage.

    The mesh is that of the config if it gives one, else FSDP. If a microbatch has fewer rows than
    there are devices, FSDP is over as many as divide it and `tensor` over the rest; a vocabulary
    that `tensor` does not divide stays whole.
    """
    given = subject.config.mesh
    if dataclasses.replace(given, rules={}) != MeshConfig():
        sizes = fill(axis_sizes(given), devices)
    else:
        fsdp = math.gcd(subject.workload().batch, devices)
        sizes = {"data": 1, "fsdp": fsdp, "tensor": devices // fsdp}
    if sizes is None:
        return None
    return _if_divides(subject, dataclasses.replace(given, **sizes))


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
    """Returns the larger slice that may have the best rate and is not compiled yet, if any.

    Its estimated rate is multiplied by the least ratio of compiled to estimated rate of the same
    chip's compiled slices.
    """
    if result.best is None:
        return None
    rate, top = result.best.rate, None
    for c in result.candidates:
        compiled = [k for k in result.fitting if k.chip == c.chip]
        if c.plan is not None or not compiled:
            continue
        if c.chips > min(k.chips for k in compiled):
            ratio = min(k.rate / k.expected_rate for k in compiled)
            if c.expected_rate * ratio > rate:
                rate, top = c.expected_rate * ratio, c
    return top


def _if_divides(subject: Subject, mesh: MeshConfig) -> MeshConfig | None:
    """Returns the mesh, the vocabulary whole where needed; None if it does not divide the stage."""
    if subject.workload().batch % (mesh.replica * mesh.data * mesh.fsdp):
        return None
    model_configs = [net.config for net in subject.nets]
    for c in model_configs:
        widths = (c.n_heads, c.kv_heads, c.d_ff)
        if c.d_model % mesh.fsdp or any(n % mesh.tensor for n in widths):
            return None
    splits_vocab = "tensor" in mesh.rules.get("vocab", DEFAULT_RULES["vocab"])
    if splits_vocab and any(c.vocab_size % mesh.tensor for c in model_configs):
        return dataclasses.replace(mesh, rules={**mesh.rules, "vocab": ()})
    return mesh
