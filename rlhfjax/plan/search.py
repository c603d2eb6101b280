"""The smallest slice that a stage fits on, and the one that makes most of a chip, with as few compilations as possible.

Arithmetic (`estimate.py`) says where to begin; the compiler is asked about that slice, about smaller ones until one
does not fit, and then about larger ones only while arithmetic, corrected by what was compiled, promises more of them.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rlhfjax import paths
from rlhfjax.config import write_json
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import AXES, DEFAULT_RULES, MeshConfig
from rlhfjax.paths import Path
from rlhfjax.plan import predict
from rlhfjax.plan.chips import CHIPS
from rlhfjax.plan.estimate import Estimate, estimate, smallest_batch
from rlhfjax.plan.predict import Plan
from rlhfjax.plan.shapes import Subject
from rlhfjax.plan.topology import target
from rlhfjax.strategy import FULL

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# What Cloud TPU calls these slices; v4, v5p and TPU7x come in hosts of four chips.
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


class Candidate(NamedTuple):
    """A slice, how the stage would lie on it, and what arithmetic expects."""

    topology: str
    chips: int
    mesh: MeshConfig
    expected: Estimate
    capacity: float  # bytes a device

    @property
    def expected_to_fit(self) -> bool:
        return self.expected.bytes <= FULL * self.capacity

    @property
    def expected_rate(self) -> float:
        """Tokens per chip-second."""
        return self.expected.tokens / (self.expected.seconds * self.chips)


Compile = Callable[[Candidate], Plan]


@dataclasses.dataclass
class Search:
    """What was looked at: candidates, the plans of those that were compiled by topology, and the two answers."""

    candidates: list[Candidate]
    plans: dict[str, Plan] = dataclasses.field(default_factory=dict)
    smallest: dict[str, str] = dataclasses.field(default_factory=dict)  # by chip
    exhausted: bool = False  # the limit of compilations was reached

    def fits(self, c: Candidate) -> bool:
        return c.topology in self.plans and bool(self.plans[c.topology].fits)

    def rate(self, c: Candidate) -> float:
        """Tokens per chip-second by the compiled program; by arithmetic where its work could not be read."""
        plan = self.plans[c.topology]
        return (
            plan.sketch.tokens / plan.step_seconds / c.chips
            if plan.step_seconds
            else c.expected_rate
        )

    @property
    def fewest(self) -> Candidate | None:
        """The slice with the fewest chips that fits."""
        return min(
            (c for c in self.candidates if self.fits(c)),
            key=lambda c: (c.chips, -self.rate(c)),
            default=None,
        )

    @property
    def best(self) -> Candidate | None:
        """The slice with the most tokens per chip-second, of those that fit."""
        return max(
            (c for c in self.candidates if self.fits(c)), key=self.rate, default=None
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "smallest": self.fewest and self.fewest.topology,
            "smallest_by_chip": self.smallest,
            "best": self.best and self.best.topology,
            "compiled": len(self.plans),
            "considered": len(self.candidates),
            "limit_reached": self.exhausted,
            "candidates": [self._row(c) for c in self.candidates],
            "plans": {name: plan.as_dict() for name, plan in self.plans.items()},
        }

    def _row(self, c: Candidate) -> dict[str, Any]:
        out = {
            "topology": c.topology,
            "chips": c.chips,
            "mesh": {a: getattr(c.mesh, a) for a in AXES},
        }
        out |= {
            "rules": dict(c.mesh.rules),
            "expected_bytes": c.expected.bytes,
            "capacity": c.capacity,
        }
        out |= {"expected_tokens_per_chip_second": c.expected_rate}
        if c.topology in self.plans:
            out |= {
                "fits": self.fits(c),
                "tokens_per_chip_second": self.rate(c) if self.fits(c) else None,
            }
        return out


def search(
    subject: Subject,
    chips: Sequence[str],
    compiled: Compile,
    most: int = 8,
    completions: int = 2,
) -> Search:
    """Looks through the slices of some chips.

    Args:
      compiled: candidate -> its plan; what takes the time.
      most: how often `compiled` may be called.
    Raises:
      ConfigError: no slice of these chips has a mesh that the stage could use.
    """
    out = Search([c for chip in chips for c in candidates(subject, chip, completions)])
    if not out.candidates:
        raise ConfigError(
            f"--topology=search: no slice of {', '.join(chips)} divides batch and model of {subject.name}; "
            f"mesh {_axes(subject.config.mesh)}, batch_size {subject.config.batch_size}"
        )

    def fits(c: Candidate) -> bool:
        if c.topology not in out.plans:
            if len(out.plans) >= most:
                raise _Limit
            out.plans[c.topology] = compiled(c)
        return out.fits(c)

    try:
        for chip in sorted(chips, key=lambda chip: _first_size(out.candidates, chip)):
            own = [c for c in out.candidates if c.topology.startswith(f"{chip}:")]
            if (found := smallest(own, fits)) is not None:
                out.smallest[chip] = found.topology
        while (further := promising(out)) is not None:
            fits(further)
    except _Limit:
        out.exhausted = True
    return out


def on_tpus(
    subject: Subject, chips: Sequence[str], most: int = 8, completions: int = 2
) -> Search:
    """`search` with the TPU compiler; a slice's programs are compiled up to the first that does not fit."""

    def compiled(c: Candidate) -> Plan:
        print(f"compiling {subject.name} for {c.topology}", file=sys.stderr, flush=True)
        laid = subject.with_config(mesh=c.mesh)
        return predict.make(laid, target(c.topology), completions, stop=True)

    return search(subject, chips, compiled, most, completions)


def write(found: Search, path: Path) -> None:
    paths.make_folder(path.parent)
    write_json(path, found.as_dict())


class _Limit(Exception):
    """No compilation is left."""


def candidates(
    subject: Subject, chip: str, completions: int = 2
) -> Iterator[Candidate]:
    """A chip's slices that the stage can be laid over, the smallest first."""
    if chip not in CHIPS:
        raise ConfigError(f"--chips={chip}: chips are {', '.join(CHIPS)}")
    spec = CHIPS[chip]
    for shape in SLICES[chip]:
        n = math.prod(map(int, shape.split("x")))
        mesh = mesh_for(subject, n * spec.devices)
        if mesh is not None:
            axes = {axis: getattr(mesh, axis) for axis in AXES}
            expected = estimate(subject, axes, spec, completions)
            yield Candidate(
                f"{chip}:{shape}", n, mesh, expected, spec.hbm / spec.devices
            )


def mesh_for(subject: Subject, devices: int) -> MeshConfig | None:
    """How a stage lies on so many devices: as its config says where that says anything, else FSDP.

    Where the batch has fewer rows than there are devices, FSDP over as many as divide it and `tensor` over the rest; a
    vocabulary that `tensor` does not divide stays whole. None: it cannot.
    """
    given = subject.config.mesh
    if dataclasses.replace(given, rules={}) != MeshConfig():
        fixed = math.prod(n for n in _axes(given).values() if n != -1)
        if devices % fixed or (fixed != devices and -1 not in _axes(given).values()):
            return None
        filled = {
            axis: devices // fixed if n == -1 else n for axis, n in _axes(given).items()
        }
        return _possible(subject, dataclasses.replace(given, **filled))
    fsdp = math.gcd(smallest_batch(subject), devices)
    return _possible(
        subject, dataclasses.replace(given, data=1, fsdp=fsdp, tensor=devices // fsdp)
    )


def smallest(
    ordered: Sequence[Candidate], fits: Callable[[Candidate], bool]
) -> Candidate | None:
    """The first that fits, of candidates in the order of their size: down or up from where arithmetic expects it."""
    if not ordered:
        return None
    at = next((i for i, c in enumerate(ordered) if c.expected_to_fit), len(ordered) - 1)
    if fits(ordered[at]):
        while at and fits(ordered[at - 1]):
            at -= 1
        return ordered[at]
    return next((c for c in ordered[at + 1 :] if fits(c)), None)


def promising(found: Search) -> Candidate | None:
    """What should be compiled next: a larger slice that may do more a chip than any that was compiled.

    What arithmetic says of it is multiplied by what the compiler said of the chip's others over what arithmetic did.
    """
    if found.best is None:
        return None
    rates: list[tuple[float, Candidate]] = []
    for c in found.candidates:
        known = [k for k in found.candidates if found.fits(k) and _chip(k) == _chip(c)]
        if (
            c.topology not in found.plans
            and known
            and c.chips > min(k.chips for k in known)
        ):
            rates.append(
                (
                    c.expected_rate
                    * min(found.rate(k) / k.expected_rate for k in known),
                    c,
                )
            )
    rate, top = max(rates, key=lambda pair: pair[0], default=(0.0, None))
    return top if rate > found.rate(found.best) else None


def _first_size(all_of_them: Sequence[Candidate], chip: str) -> float:
    sizes = (c.chips for c in all_of_them if _chip(c) == chip and c.expected_to_fit)
    return float(min(sizes, default=math.inf))


def _chip(c: Candidate) -> str:
    return c.topology.partition(":")[0]


def _axes(mesh: MeshConfig) -> dict[str, int]:
    return {axis: getattr(mesh, axis) for axis in AXES}


def _possible(subject: Subject, mesh: MeshConfig) -> MeshConfig | None:
    """The mesh, its rules amended for the vocabulary; None where it does not divide the batch or a model."""
    if smallest_batch(subject) % (mesh.replica * mesh.data * mesh.fsdp):
        return None
    shapes = [net.config for net in subject.nets]
    for m in shapes:
        if m.d_model % mesh.fsdp or any(
            n % mesh.tensor for n in (m.n_heads, m.kv_heads, m.d_ff)
        ):
            return None
    split = "tensor" in mesh.rules.get("vocab", DEFAULT_RULES["vocab"])
    if split and any(m.vocab_size % mesh.tensor for m in shapes):
        return dataclasses.replace(mesh, rules={**mesh.rules, "vocab": ()})
    return mesh
