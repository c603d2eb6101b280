"""From programs to a plan: whether a stage fits, the time per step, the cost of the whole run."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rlhfjax import paths
from rlhfjax.config import write_json
from rlhfjax.errors import ConfigError
from rlhfjax.models.size import Number, active_parameters, parameters
from rlhfjax.paths import Path
from rlhfjax.plan import chips, compiler
from rlhfjax.plan.advice import advise
from rlhfjax.plan.compiled import (
    CompiledProgram,
    analyze,
    compile_here,
    sharded_bytes,
)
from rlhfjax.plan.compiler import CompilerOutput, Request
from rlhfjax.plan.price import cost
from rlhfjax.plan.programs import (
    PlannedProgram,
    StepPrograms,
    layout_for,
    step_programs,
)
from rlhfjax.plan.shapes import Subject
from rlhfjax.plan.topology import Target


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that `rlhfjax plan` prints and writes."""

    subject: Subject
    target: Target
    mesh: dict[str, int]
    step: StepPrograms
    programs: list[CompiledProgram]
    completions: int = 2
    left_out: Sequence[str] = ()  # names of programs that --programs excludes
    price: float | None = None  # of a chip-hour

    @property
    def fits(self) -> bool | None:
        """Whether every program fits; None if the capacity of the devices is unknown."""
        verdicts = [program.fits for program in self.programs]
        return None if None in verdicts else all(verdicts)

    @property
    def model_parameters(self) -> int:
        return parameters(self.subject.model)

    @property
    def active_parameters(self) -> int:
        """Parameters that a token is computed with; fewer than all in a mixture of experts."""
        return active_parameters(self.subject.model)

    @property
    def step_seconds(self) -> float | None:
        """A lower bound: the rooflines of the step's programs, one after the other."""
        rooflines = [p.roofline for p in self.programs if p.roofline]
        if self.left_out or len(rooflines) < len(self.programs):
            return None
        return float(sum(roofline.seconds for roofline in rooflines))

    @property
    def totals(self) -> dict[str, float]:
        """Time and cost of a step and of the run; empty if the time of a step is unknown.

        mfu is a share; hours, days, chip_hours and money (with a price) are those of all steps.
        """
        seconds, chip = self.step_seconds, self.target.chip
        if seconds is None or chip is None:
            return {}
        flops = sum(program.model_flops for program in self.programs)
        whole = cost(seconds * self.step.steps, self.target.chips, self.price)
        return {
            "step_seconds": seconds,
            "mfu": chips.mfu(flops, seconds, self.target.chips, chip),
            "tokens_per_second": self.step.tokens / seconds,
            "hours": 24 * whole.days,
            **whole.as_dict(),
        }

    @property
    def six_n_d(self) -> Number:
        """6 N D of a step, in FLOPs, with N the active parameters."""
        return chips.training_flops(self.active_parameters, self.step.tokens)

    @property
    def advice(self) -> list[str]:
        """Changes that would make the stage fit, see `advise`; empty if it fits."""
        if self.fits is not False:
            return []
        failing = [program for program in self.programs if program.fits is False]
        worst = max(failing, key=lambda program: program.needed)
        return advise(self.subject, self.mesh, worst, self.completions)

    def as_dict(self) -> dict[str, Any]:
        """Returns JSON values. Bytes and seconds are per device, model_flops of all devices."""
        return {
            "stage": self.subject.name,
            "kind": self.subject.config.stage,
            "target": self.target.name,
            "compiler": self.target.compiler,
            "devices": len(self.target.devices),
            "chips": self.target.chips,
            "mesh": self.mesh,
            "parameters": self.model_parameters,
            "active_parameters": self.active_parameters,
            "fits": self.fits,
            "advice": self.advice,
            "steps": self.step.steps,
            "tokens_per_step": self.step.tokens,
            "six_n_d": self.six_n_d,
            "programs": [_program_dict(program) for program in self.programs],
            "left_out": list(self.left_out),
            **self.totals,
        }


def make_plan(
    subject: Subject,
    target: Target,
    completions: int = 2,
    stop: bool = False,
    only: Sequence[str] = (),
) -> Plan:
    """Compiles every program of a stage; nothing runs.

    Args:
      stop: whether to stop at the first program that does not fit. The one with the largest
        arguments is then compiled first.
      only: names of the programs to compile. The plan is then of a part of a step, without its
        time.
    """
    layout = layout_for(subject, target)
    step = step_programs(subject, layout, completions)
    names = [program.name for program in step.programs]
    if unknown := [name for name in only if name not in names]:
        raise ConfigError(
            f"--programs={unknown[0]}: the programs of {subject.name} are {', '.join(names)}"
        )

    def compile_program(program: PlannedProgram) -> CompilerOutput:
        if not target.topology:
            return compile_here(program)
        request = Request(
            subject=subject,
            topology=target.topology,
            slices=target.slices,
            completions=completions,
            program=program.name,
        )
        return compiler.compile_program(request)

    chosen = [p for p in step.programs if not only or p.name in only]
    if stop:
        chosen.sort(key=lambda program: -sharded_bytes(program.inputs))
    compiled: list[CompiledProgram] = []
    for program in chosen:
        compiled.append(analyze(program, target, compile_program, step.held))
        if stop and compiled[-1].fits is False:
            break
    return Plan(
        subject=subject,
        target=target,
        mesh=dict(layout.mesh.shape),
        step=step,
        programs=compiled,
        completions=completions,
        left_out=[name for name in names if only and name not in only],
    )


def _program_dict(program: CompiledProgram) -> dict[str, Any]:
    buffers = [{"what": what, "bytes": size} for what, size in program.buffers]
    values = {
        "name": program.name,
        "memory": program.memory._asdict() | {"elsewhere": program.held_by_others},
        "capacity": program.capacity,
        "fits": program.fits,
        "largest_buffers": buffers,
        "model_flops": program.model_flops,
        "compile_seconds": round(program.compile_seconds, 1),
    }
    if program.error:
        values["compiler"] = program.error
    if program.cost is not None:
        values["flops"] = program.cost.flops
        values["hbm_bytes"] = program.cost.hbm
        values["collectives"] = [
            {"kind": kind, "link": link, "bytes": size}
            for (kind, link), size in sorted(program.cost.sent.items())
        ]
        values["loops_of_unknown_length"] = program.cost.unknown_loops
    if program.roofline is not None:
        values["roofline_seconds"] = program.roofline._asdict()
        values["bound"] = program.roofline.bound
    return values


def write(path: Path, values: dict[str, Any]) -> None:
    """Writes a plan or a search as JSON; makes the folder."""
    paths.make_folder(path.parent)
    write_json(path, values)
