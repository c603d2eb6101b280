"""The jitted functions of a stage's step, and the shapes they are called with: no data, no checkpoint, no array.

The stage's own step runs on shapes (`rlhfjax/programs.py`): what is planned is what a run would lower. How much the
mathematics of each needs stands in the stage's `workload`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from rlhfjax import footprint, stages
from rlhfjax import state as states
from rlhfjax.footprint import Net
from rlhfjax.mesh import Layout, make_layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.size import parameters
from rlhfjax.plan import chips
from rlhfjax.plan.shapes import Subject, hold
from rlhfjax.plan.topology import Target
from rlhfjax.programs import Call, Held, Recorder, placed
from rlhfjax.roles import Pass
from rlhfjax.types import PyTree


class Program(NamedTuple):
    """One jitted function of a stage's step."""

    name: str
    lower: Callable[[], Any]  # -> jax.stages.Lowered
    inputs: PyTree  # ShapeDtypeStructs with shardings
    devices: int  # of its mesh
    model_flops: (
        float  # of the whole mesh, what the mathematics needs: see `chips.token_flops`
    )
    passes: float = 1.0  # so many times those are computed, at least: see `passes`


class Sketch(NamedTuple):
    """A stage as its programs; a step runs each of them once, in this order."""

    programs: list[Program]
    tokens: int  # per step: of batches, or of responses
    steps: int
    batch: int  # sequences of the largest forward-backward pass, for the table by hand
    time: int
    held: list[
        Held
    ]  # what is on the devices all the time, whichever program runs: state and frozen models


def layout_for(subject: Subject, target: Target) -> Layout:
    """Returns the mesh over a target's devices that the stage's config asks for."""
    auto = subject.config.mesh.strategy == "auto"
    need = footprint.need_of(subject.nets, subject.workload()) if auto else None
    return make_layout(subject.config.mesh, target.devices, need, target.capacity)


def sketch(subject: Subject, layout: Layout, completions: int = 2) -> Sketch:
    """Returns all programs of a stage.

    Args:
      completions: responses to a prompt, where the data decides that: reward and direct stages.
    Raises:
      ConfigError: batch and mesh do not fit each other.
    """
    config, recorder = subject.config, Recorder()
    with layout.use(), recorder.record():
        stage = stages.find(config.stage).build(config, layout, subject.sources)
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = states.abstract(jax.eval_shape(stage.init, key), stage.axes, layout)
        state = hold(state, "state")
        rows = layout.sharding("batch")
        batch = jax.tree.map(lambda x: placed(x, rows), stage.batch(completions))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=layout.replicated)
        stage.step(state, batch, key)
    workload, flops = subject.workload(completions), step_flops(subject, completions)
    trains = {one.program for one, _ in passes_of(subject, completions) if one.trains}
    again = passes(footprint.trained_nets(subject.nets))
    programs = [
        Program(
            name=call.name,
            lower=call.lower,
            inputs=call.shapes,
            devices=call.layout.mesh.size,
            model_flops=flops.get(call.name, 0.0),
            passes=again if call.name in trains else 1.0,
        )
        for call in _named(recorder.calls)
    ]
    held = [*jax.tree.leaves(state), *recorder.held]
    return Sketch(
        programs, workload.units, config.steps, workload.rows, workload.length, held
    )


def _named(calls: list[Call]) -> Iterator[Call]:
    """Yields calls under names of their own: a second one of a name has its number after it."""
    seen: dict[str, int] = {}
    for call in calls:
        seen[call.name] = seen.get(call.name, 0) + 1
        number = seen[call.name]
        yield call if number == 1 else call._replace(name=f"{call.name}_{number}")


def passes(trained: list[Net]) -> float:
    """The products that training computes over the 3 passes that PaLM counts (forward, to the inputs, to the weights).

    Adapters alone need no gradient of the weights; remat=full goes forward once more. The least of several models.
    """
    return min(_passes(net.role.lora.rank, net.config) for net in trained)


def _passes(rank: int, model: TransformerConfig) -> float:
    return ((2 if rank else 3) + (model.remat == "full")) / 3


def passes_of(subject: Subject, completions: int = 2) -> Iterator[tuple[Pass, Net]]:
    """Yields what goes through each model in a step; a reward of several models has a program for each."""
    for one in subject.workload(completions).passes:
        for net in subject.nets:
            suffix = net.name.removeprefix(one.role)
            if net.name == one.role or (
                net.name.startswith(one.role) and suffix.startswith("_")
            ):
                yield one._replace(program=one.program + suffix), net


def step_flops(subject: Subject, completions: int = 2) -> dict[str, float]:
    """What the mathematics of a step needs, of the whole mesh, by program, as PaLM counts: a forward pass is a third of
    a training step."""
    flops: dict[str, float] = {}
    for one, net in passes_of(subject, completions):
        each = float(
            chips.token_flops(
                parameters(net.config, net.role.head), net.config, one.length
            )
        )
        share = 1.0 if one.trains else 1 / 3
        flops[one.program] = flops.get(one.program, 0.0) + one.tokens * each * share
    return flops
