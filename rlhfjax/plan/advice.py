"""What would make a stage fit, with numbers: the same arithmetic for the config as it is and as it could be."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from rlhfjax.plan.chips import CHIPS, GIB
from rlhfjax.plan.compiled import Measured
from rlhfjax.plan.estimate import estimate, smallest_batch
from rlhfjax.plan.shapes import Subject

DOUBLINGS = 8
Need = Callable[[Subject, Mapping[str, int]], float]  # bytes a device


class Change(NamedTuple):
    """One thing that could be otherwise."""

    what: str
    subject: Subject
    axes: Mapping[str, int]


def advise(
    subject: Subject, axes: Mapping[str, int], worst: Measured, completions: int = 2
) -> list[str]:
    """A line a change, those that cost least first, then all that cost no chip together.

    What arithmetic says of a changed config is multiplied by what the compiler said of this one over what arithmetic
    says of it: the estimate is off by much the same factor for both.

    Args:
      worst: the program that takes most of a device, and does not fit.
    """
    compiled, room = worst.memory.peak + worst.elsewhere, worst.capacity or 0.0
    part = "rollout" if worst.name == "rollout" else "update"

    def need(
        subject: Subject, axes: Mapping[str, int]
    ) -> float:  # by arithmetic; the chip is for the time alone
        return estimate(subject, axes, CHIPS["v5e"], completions, part).bytes

    factor = compiled / need(subject, axes)
    lines = [
        f"{worst.name} needs {compiled / GIB:.1f} GiB a device of {room / GIB:.1f}; by arithmetic from there:"
    ]
    for change in changes(subject, axes, room / factor, need):
        left = factor * need(change.subject, change.axes)
        lines.append(
            f"{change.what}: {left / GIB:.1f} GiB, {'fits' if left <= room else 'not enough alone'}"
        )
    return lines


def changes(
    subject: Subject, axes: Mapping[str, int], room: float, need: Need
) -> Iterator[Change]:
    """What can be otherwise of a config; sizes are doubled or halved until arithmetic finds it in `room` bytes."""
    best = subject
    if subject.model.dtype == "float32":
        best = best.with_models(dtype="bfloat16")
        yield Change(
            "compute in bfloat16: dtype=bfloat16 of the model",
            subject.with_models(dtype="bfloat16"),
            axes,
        )
    if subject.model.remat != "full":
        best = best.with_models(remat="full")
        now = subject.model.remat
        yield Change(
            f"remat=full of the model (now {now})",
            subject.with_models(remat="full"),
            axes,
        )
    whole, steps = best, best is not subject
    if smaller := _until(_microbatches, subject, axes, room, need):
        now, m = subject.config.microbatches, smaller.config.microbatches
        best, steps = best.with_config(microbatches=m), steps + 1
        yield Change(
            f"smaller microbatches: --config.microbatches={m} (now {now})",
            smaller,
            axes,
        )
    spread = dict(axes)
    if axes["data"] > 1:
        spread |= {"data": 1, "fsdp": axes["data"] * axes["fsdp"]}
        what = f"parameters and optimizer split: --config.mesh.data=1 --config.mesh.fsdp={spread['fsdp']}"
        yield Change(
            f"{what} (now data {axes['data']}, fsdp {axes['fsdp']})", subject, spread
        )
    if steps + (spread != axes) > 1:
        yield Change("all of this together", best, spread)
    if halved := _until(_half_batch, subject, axes, room, need):
        now, b = subject.config.batch_size, halved.config.batch_size
        yield Change(
            f"a smaller batch: --config.batch_size={b} (now {now})", halved, axes
        )
    yield _more_chips(whole, spread, room, need)


def _more_chips(
    subject: Subject, axes: Mapping[str, int], room: float, need: Need
) -> Change:
    """Twice the devices, again and again: along fsdp while the batch divides, then along tensor."""
    for _ in range(DOUBLINGS):
        shards = axes["replica"] * axes["data"] * axes["fsdp"]
        axis = "fsdp" if smallest_batch(subject) % (2 * shards) == 0 else "tensor"
        axes = {**axes, axis: 2 * axes[axis]}
        if need(subject, axes) <= room:
            break
    n = (
        axes["replica"]
        * axes["data"]
        * axes["fsdp"]
        * axes["tensor"]
        * axes["sequence"]
    )
    flags = f"--config.mesh.fsdp={axes['fsdp']} --config.mesh.tensor={axes['tensor']}"
    return Change(
        f"{n} devices, the batch and its microbatches as they are: {flags}",
        subject,
        axes,
    )


def _until(
    change, subject: Subject, axes: Mapping[str, int], room: float, need: Need
) -> Subject | None:
    """The change repeated until it fits or cannot be made again; None where it cannot be made once."""
    last = None
    for _ in range(DOUBLINGS):
        following = change(last or subject, axes)
        if following is None:
            break
        last = following
        if need(last, axes) <= room:
            break
    return last


def _microbatches(subject: Subject, axes: Mapping[str, int]) -> Subject | None:
    shards, rows = (
        axes["replica"] * axes["data"] * axes["fsdp"],
        smallest_batch(subject),
    )
    return (
        subject.with_config(microbatches=2 * subject.config.microbatches)
        if rows % (2 * shards) == 0
        else None
    )


def _half_batch(subject: Subject, axes: Mapping[str, int]) -> Subject | None:
    shards, rows, b = (
        axes["replica"] * axes["data"] * axes["fsdp"],
        smallest_batch(subject),
        subject.config.batch_size,
    )
    return (
        subject.with_config(batch_size=b // 2)
        if rows % (2 * shards) == 0 and b % 2 == 0
        else None
    )
