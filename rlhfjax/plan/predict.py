"""From programs to a plan: does it fit, how long does a step take at least, and what does the whole run cost."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rlhfjax import paths
from rlhfjax.config import write_json
from rlhfjax.errors import ConfigError
from rlhfjax.paths import Path
from rlhfjax.plan import chips, compiler, memory
from rlhfjax.plan.advice import advise
from rlhfjax.plan.compiled import Measured, here, measure, sharded_bytes
from rlhfjax.plan.compiler import Answer, Job
from rlhfjax.plan.programs import Program, Sketch, layout_for, sketch
from rlhfjax.plan.shapes import Subject
from rlhfjax.plan.topology import Target


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that `rlhfjax plan` prints and writes."""

    subject: Subject
    target: Target
    mesh: dict[str, int]
    sketch: Sketch
    programs: list[Measured]
    completions: int = 2
    left_out: list[str] = dataclasses.field(
        default_factory=list
    )  # programs that were not asked for

    @property
    def fits(self) -> bool | None:
        """Whether every program does; None where the capacity of the devices is unknown."""
        return (
            None
            if any(p.fits is None for p in self.programs)
            else all(p.fits for p in self.programs)
        )

    @property
    def step_seconds(self) -> float | None:
        """At least: the programs of a step one after the other, each at its roofline."""
        if self.left_out or any(p.roofline is None for p in self.programs):
            return None
        return sum(p.roofline.seconds for p in self.programs if p.roofline)

    @property
    def mfu(self) -> float | None:
        seconds, chip = self.step_seconds, self.target.chip
        if seconds is None or chip is None:
            return None
        return chips.mfu(
            sum(p.model_flops for p in self.programs), seconds, self.target.chips, chip
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON; bytes and seconds are a device's, FLOPs named model_flops those of the whole mesh."""
        seconds, s = self.step_seconds, self.sketch
        out: dict[str, Any] = {
            "stage": self.subject.name,
            "kind": self.subject.config.stage,
            "target": self.target.name,
            "compiler": self.target.compiler,
            "devices": len(self.target.devices),
            "chips": self.target.chips,
            "mesh": self.mesh,
            "parameters": memory.parameters(self.subject.model),
            "fits": self.fits,
            "advice": advice(self),
            "steps": s.steps,
            "tokens_per_step": s.tokens,
            "six_n_d": chips.training_flops(
                memory.parameters(self.subject.model), s.tokens
            ),
            "programs": [_program(p) for p in self.programs],
            "left_out": self.left_out,
        }
        if seconds is not None:
            hours = seconds * s.steps / 3600
            out |= {
                "step_seconds": seconds,
                "mfu": self.mfu,
                "tokens_per_second": s.tokens / seconds,
                "hours": hours,
                "chip_hours": hours * self.target.chips,
            }
        return out


def make(
    subject: Subject,
    target: Target,
    completions: int = 2,
    stop: bool = False,
    only: Sequence[str] = (),
) -> Plan:
    """Compiles every program of a stage; nothing runs.

    Args:
      only: the programs of these names; the plan is then of a part of a step, and has no time of the whole.
      stop: at the first program that does not fit, the one with the largest arguments being asked first.
    """
    layout = layout_for(subject, target)
    drawn = sketch(subject, layout, completions)
    names = [program.name for program in drawn.programs]
    if unknown := [name for name in only if name not in names]:
        raise ConfigError(
            f"--programs={unknown[0]}: the programs of {subject.name} are {', '.join(names)}"
        )
    drawn = drawn._replace(
        programs=[p for p in drawn.programs if not only or p.name in only]
    )

    def ask(program: Program) -> Answer:
        if not target.topology:
            return here(program)
        return compiler.ask(
            Job(subject, target.topology, target.slices, completions, program.name)
        )

    if stop:
        drawn.programs.sort(key=lambda program: -sharded_bytes(program.inputs))
    measured: list[Measured] = []
    for program in drawn.programs:
        measured.append(measure(program, target, ask, drawn.held))
        if stop and measured[-1].fits is False:
            break
    left_out = [name for name in names if name not in {p.name for p in drawn.programs}]
    return Plan(
        subject, target, dict(layout.mesh.shape), drawn, measured, completions, left_out
    )


def advice(plan: Plan) -> list[str]:
    """What would make it fit, with numbers; empty where it fits. See `advise`."""
    if plan.fits is not False:
        return []
    worst = max(
        (p for p in plan.programs if not p.fits),
        key=lambda p: p.memory.peak + p.elsewhere,
    )
    return advise(plan.subject, plan.mesh, worst, plan.completions)


def _program(p: Measured) -> dict[str, Any]:
    out = {
        "name": p.name,
        "memory": p.memory._asdict() | {"elsewhere": p.elsewhere},
        "capacity": p.capacity,
        "fits": p.fits,
        "largest_buffers": [{"what": what, "bytes": size} for what, size in p.buffers],
        "model_flops": p.model_flops,
        "compile_seconds": round(p.compile_seconds, 1),
    }
    if p.refused:
        out["compiler"] = p.refused
    if p.cost is not None:
        sent = [
            {"kind": kind, "link": link, "bytes": n}
            for (kind, link), n in sorted(p.cost.sent.items())
        ]
        out |= {"flops": p.cost.flops, "hbm_bytes": p.cost.hbm, "collectives": sent}
        out["loops_of_unknown_length"] = p.cost.unknown_loops
    if p.roofline is not None:
        out |= {"roofline_seconds": p.roofline._asdict(), "bound": p.roofline.bound}
    return out


def write(plan: Plan, path: Path) -> None:
    paths.make_folder(path.parent)
    write_json(path, plan.as_dict())
