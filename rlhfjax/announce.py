"""What a run says about itself in its log: its stages, its models, its devices."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rlhfjax.errors import UserError
from rlhfjax.footprint import Net
from rlhfjax.mesh import Layout
from rlhfjax.origins import Origins, roles_of
from rlhfjax.paths import Path
from rlhfjax.progress import about
from rlhfjax.stages import find

log = logging.getLogger("rlhfjax")


def stages(folders: Mapping[str, Path], done: set[str]) -> None:
    """Logs the stages of a recipe, and which of them are done.

    Args:
      done: names of the finished stages.
    """
    if len(done) == len(folders):
        log.info("all %d stages are done; there is nothing to run", len(folders))
        return
    names = [f"{name} (done)" if name in done else name for name in folders]
    log.info("stages: %s", ", ".join(names))


def models(config: Any, origins: Origins | None = None) -> list[Net]:
    """Returns the models of a stage; [] if they are not known yet.

    Args:
      origins: describes models; default: those on disk.
    """
    try:
        return (origins or Origins({})).nets(roles_of(config), config.stage)
    except UserError:  # the stage itself says what is missing
        return []


def stage(
    config: Any,
    title: str,
    nets: Sequence[Net],
    layout: Layout,
    memory: float | None = None,
) -> None:
    """Logs what a stage is about to do: its steps, models, devices and their memory.

    Args:
      config: the stage's typed config.
      title: the stage's name and its number in the recipe, such as `[2/7] pretrain`.
      nets: its models.
      memory: bytes per device at the stage's peak, by hand; None: not known.
    """
    parts = []
    if steps := getattr(config, "steps", 0):
        parts.append(f"{steps:,} steps")
    if not getattr(find(config.stage), "ON_ONE_HOST", False):
        parts += [
            f"{net.name} of {number(net.numbers)} parameters{_note(net)}"
            for net in nets
        ]
        parts.append(_devices(layout))
        if memory is not None:
            parts.append(f"about {memory / 2**30:.2g} GiB per device by hand")
    log.info("%s: %s", title, "; ".join(parts) or "needs no device")


def time_left(seconds: Mapping[str, float | None]) -> None:
    """Logs how long the stages that are left take, if that is known of any of them.

    Args:
      seconds: by name of the stage; None: unknown.
    """
    known = {name: value for name, value in seconds.items() if value is not None}
    if not known:
        return
    unknown = [name for name in seconds if name not in known]
    sign, rest = "about", ""
    if unknown:
        sign = "more than"
        rest = f"; not measured on this machine yet: {', '.join(unknown)}"
    parts = [f"{name} {about(value)}" for name, value in known.items()]
    total = about(sum(known.values()))
    log.info("time left: %s %s (%s%s)", sign, total, ", ".join(parts), rest)


def cached(title: str, done: Mapping[str, Any]) -> None:
    """Logs that a stage's files were copied from the cache.

    Args:
      done: content of the stage's done.json.
    """
    log.info(
        "%s: taken from the cache (computing it took %s s)", title, done["seconds"]
    )


def _note(net: Net) -> str:
    if net.role.shares:
        return f", shared with {net.role.shares}"
    if net.role.optim is None:
        return ", frozen"
    return f", {number(net.trained)} trained" if net.trained < net.numbers else ""


def _devices(layout: Layout) -> str:
    devices = layout.mesh.devices.flatten()
    kind = devices[0].device_kind
    axes = [f"{axis}={size}" for axis, size in layout.mesh.shape.items() if size > 1]
    mesh = f" ({', '.join(axes)})" if axes else ""
    return f"{len(devices)} x {kind}{mesh}"


def number(count: int) -> str:
    """Returns a count for people: `950`, `1.12 M`, `6.74 B`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)
