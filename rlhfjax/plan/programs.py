"""The jitted functions of a stage's step, with the shapes they are called with.

The stage's own step runs on shapes (`rlhfjax/programs.py`), so what is planned is what a run would
lower; no data, checkpoint or array is needed. The FLOPs of each program come from the stage's
`workload`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from rlhfjax import footprint, pace, stages
from rlhfjax import state as states
from rlhfjax.footprint import Net
from rlhfjax.mesh import Layout, make_layout
from rlhfjax.plan.shapes import Subject, hold
from rlhfjax.plan.topology import Target
from rlhfjax.programs import Call, Held, Recorder, placed


class PlannedProgram(NamedTuple):
    """One jitted function of a stage's step."""

    name: str
    lower: Callable[[], Any]  # returns a jax.stages.Lowered
    inputs: list[jax.ShapeDtypeStruct]  # with shardings
    devices: int  # of its mesh
    model_flops: float  # of all devices, see `models.size.token_flops`
    flops_ratio: float = 1.0  # computed FLOPs over model_flops, see `flops_ratio`


class StepPrograms(NamedTuple):
    """The programs of a stage; a step runs each of them once, in this order."""

    programs: list[PlannedProgram]
    tokens: int  # per step: of batches, or of responses
    steps: int
    batch: int  # sequences of the largest forward-backward pass
    time: int  # tokens of a sequence
    held: list[Held]  # state and frozen models, always on the devices


def layout_for(subject: Subject, target: Target) -> Layout:
    """Returns the mesh over a target's devices that the stage's config asks for."""
    need = None
    if subject.config.mesh.strategy == "auto":
        need = footprint.need_of(subject.nets, subject.workload())
    return make_layout(subject.config.mesh, target.devices, need, target.capacity)


def step_programs(
    subject: Subject, layout: Layout, completions: int = 2
) -> StepPrograms:
    """Returns all programs of a stage.

    Args:
      completions: responses per prompt of a reward or direct stage, which its data decides.
    Raises:
      ConfigError: the mesh does not divide the batch.
    """
    config, recorder = subject.config, Recorder()
    with layout.use(), recorder.record():
        stage = stages.find(config.stage).build(config, layout, subject.sources)
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = states.abstract(jax.eval_shape(stage.init, key), stage.axes, layout)
        state = hold(state, "state")
        rows = layout.sharding("batch")
        batch = jax.tree.map(lambda x: placed(x, rows), stage.batch(completions))
        stage.step(state, batch, placed(key, layout.replicated))
    workload, flops = subject.workload(completions), step_flops(subject, completions)
    trains = training_programs(subject, completions)
    training_ratio = flops_ratio(footprint.trained_nets(subject.nets))
    programs = [
        PlannedProgram(
            name=call.name,
            lower=call.lower,
            inputs=call.shapes,
            devices=call.layout.mesh.size,
            model_flops=flops.get(call.name, 0.0),
            flops_ratio=training_ratio if call.name in trains else 1.0,
        )
        for call in _numbered(recorder.calls)
    ]
    return StepPrograms(
        programs,
        tokens=workload.units,
        steps=config.steps,
        batch=workload.rows,
        time=workload.length,
        held=[*jax.tree.leaves(state), *recorder.held],
    )


def _numbered(calls: list[Call]) -> Iterator[Call]:
    """Yields the calls under different names: the second one of a name gets the suffix `_2`."""
    seen: list[str] = []
    for call in calls:
        seen.append(call.name)
        number = seen.count(call.name)
        yield call if number == 1 else call._replace(name=f"{call.name}_{number}")


def flops_ratio(trained: list[Net]) -> float:
    """Returns computed FLOPs over model FLOPs in training, the least of several models.

    PaLM counts 3 passes: forward, gradients of inputs, gradients of weights. Adapters alone need no
    gradients of the weights; `remat=full` recomputes the forward pass.
    """
    ratios = []
    for net in trained:
        passes = (2 if net.role.lora.rank else 3) + (net.config.remat == "full")
        ratios.append(passes / 3)
    return min(ratios)


def training_programs(subject: Subject, completions: int = 2) -> set[str]:
    """Returns the names of the programs that compute gradients."""
    passes = pace.model_passes(subject.nets, subject.workload(completions))
    return {model_pass.program for model_pass, _ in passes if model_pass.trains}


def step_flops(subject: Subject, completions: int = 2) -> dict[str, float]:
    """Returns the model FLOPs of a step on all devices, by program, as PaLM counts them."""
    return pace.step_flops(subject.nets, subject.workload(completions))
