"""Says which changes of a config would make a stage fit, with estimates of each."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rlhfjax.footprint import Phase, batch_shards
from rlhfjax.plan.chips import CHIPS, GIB
from rlhfjax.plan.compiled import CompiledProgram
from rlhfjax.plan.estimate import estimate
from rlhfjax.plan.shapes import Subject
from rlhfjax.strategy import Axes

DOUBLINGS = 8
Fits = Callable[[Subject, Axes], bool]


class Change(NamedTuple):
    """A changed config and mesh, with the words that describe the change."""

    description: str
    subject: Subject
    axes: Axes


def advise(
    subject: Subject, axes: Axes, worst: CompiledProgram, completions: int = 2
) -> list[str]:
    """Returns a line per change, the cheapest first, and one for all that need no further chip.

    The estimate of a changed config is multiplied by the ratio of compiled to estimated bytes of
    the config as it is: the estimate is off by much the same factor for both.

    Args:
      worst: the program that needs most memory, and does not fit.
    """
    capacity = worst.capacity or 0.0
    phase: Phase = "rollout" if worst.name == "rollout" else "update"

    def estimated(subject: Subject, axes: Axes) -> float:
        # The chip matters for the estimate of the time alone.
        return estimate(subject, axes, CHIPS["v5e"], completions, phase).bytes

    factor = worst.needed / estimated(subject, axes)

    def fits(subject: Subject, axes: Axes) -> bool:
        return factor * estimated(subject, axes) <= capacity

    lines = [
        f"{worst.name} needs {worst.needed / GIB:.1f} GiB per device of {capacity / GIB:.1f}; "
        "estimates for changed configs:"
    ]
    for change in changes(subject, axes, fits):
        needed = factor * estimated(change.subject, change.axes)
        verdict = "fits" if needed <= capacity else "not enough alone"
        lines.append(f"{change.description}: {needed / GIB:.1f} GiB, {verdict}")
    return lines


def changes(subject: Subject, axes: Axes, fits: Fits) -> Iterator[Change]:
    """Yields possible changes of a config; sizes are doubled or halved until they fit."""
    model, config = subject.model, subject.config
    fields = {}
    if model.activation_dtype == "float32":
        fields["dtype"] = "bfloat16"
        description = "compute in bfloat16: dtype=bfloat16 of the model"
        yield Change(description, subject.with_models(dtype="bfloat16"), axes)
    if model.remat != "full":
        fields["remat"] = "full"
        description = f"remat=full of the model (now {model.remat})"
        yield Change(description, subject.with_models(remat="full"), axes)
    cheaper_model = combined = subject.with_models(**fields)
    count = 1 if fields else 0
    if smaller := _repeat(_double_microbatches, subject, axes, fits):
        m = smaller.config.microbatches
        flag = f"--config.microbatches={m} (now {config.microbatches})"
        yield Change(f"smaller microbatches: {flag}", smaller, axes)
        combined, count = combined.with_config(microbatches=m), count + 1
    sharded = axes
    if axes["data"] > 1:
        sharded = {**axes, "data": 1, "fsdp": axes["data"] * axes["fsdp"]}
        flags = f"--config.mesh.data=1 --config.mesh.fsdp={sharded['fsdp']}"
        now = f"(now data {axes['data']}, fsdp {axes['fsdp']})"
        description = f"shard parameters and optimizer: {flags} {now}"
        yield Change(description, subject, sharded)
        count += 1
    if count > 1:
        yield Change("all of this together", combined, sharded)
    if smaller := _repeat(_halve_batch, subject, axes, fits):
        flag = f"--config.batch_size={smaller.config.batch_size}"
        description = f"a smaller batch: {flag} (now {config.batch_size})"
        yield Change(description, smaller, axes)
    yield _more_devices(cheaper_model, sharded, fits)


def _more_devices(subject: Subject, axes: Axes, fits: Fits) -> Change:
    """Doubles the devices until the stage fits: along fsdp if the batch divides, else tensor."""
    for _ in range(DOUBLINGS):
        divides = subject.workload().batch % (2 * batch_shards(axes)) == 0
        axis = "fsdp" if divides else "tensor"
        axes = {**axes, axis: 2 * axes[axis]}
        if fits(subject, axes):
            break
    devices = math.prod(axes.values())
    flags = f"--config.mesh.fsdp={axes['fsdp']} --config.mesh.tensor={axes['tensor']}"
    description = (
        f"{devices} devices, the batch and its microbatches as they are: {flags}"
    )
    return Change(description, subject, axes)


def _repeat(
    change: Callable[[Subject, Axes], Subject | None],
    subject: Subject,
    axes: Axes,
    fits: Fits,
) -> Subject | None:
    """Repeats a change until it fits or is impossible; None if it is impossible at once."""
    changed = None
    for _ in range(DOUBLINGS):
        candidate = change(changed or subject, axes)
        if candidate is None:
            break
        changed = candidate
        if fits(changed, axes):
            break
    return changed


def _double_microbatches(subject: Subject, axes: Axes) -> Subject | None:
    if subject.workload().batch % (2 * batch_shards(axes)):
        return None
    return subject.with_config(microbatches=2 * subject.config.microbatches)


def _halve_batch(subject: Subject, axes: Axes) -> Subject | None:
    size = subject.config.batch_size
    if size % 2 or subject.workload().batch % (2 * batch_shards(axes)):
        return None
    return subject.with_config(batch_size=size // 2)
