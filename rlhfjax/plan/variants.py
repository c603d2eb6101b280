"""Ways to run a stage that give the same result: remat, microbatches, mesh.

They change time and memory alone, up to rounding: gradients do not depend on the number of
microbatches or on the mesh, and what remat recomputes has the same values.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rlhfjax.mesh import DEFAULT_RULES, MeshConfig, axis_sizes
from rlhfjax.plan.shapes import Subject
from rlhfjax.strategy import MOST_TENSOR, fill, sizes

VARY = ("remat", "microbatches", "mesh")
FREE = ("given", "auto")  # strategies that leave the mesh to the search


class Settings(NamedTuple):
    """What a search changes beside the mesh. The default is what the config has."""

    remat: str = ""  # "": as the config has it
    microbatches: int = 0  # 0: as the config has it


AS_IT_IS = Settings()


def settings(subject: Subject, remat: str, microbatches: int) -> Settings:
    """Returns the settings; what is the config's own is left out."""
    return Settings(
        remat=remat if remat != subject.model.remat else "",
        microbatches=microbatches if microbatches != subject.config.microbatches else 0,
    )


def apply(subject: Subject, settings: Settings) -> Subject:
    """Returns the stage with other settings."""
    changed = subject
    if settings.remat:
        changed = with_model_field(changed, "remat", settings.remat)
    if settings.microbatches:
        changed = changed.with_config(microbatches=settings.microbatches)
    return changed


def with_model_field(subject: Subject, name: str, value: Any) -> Subject:
    """Returns the stage with another value of a field of the model that it trains.

    The config must have the place for it, see `changes_model`.
    """
    config = subject.config
    if getattr(config, "model", None) is not None:
        return subject.with_config(
            model=dataclasses.replace(config.model, **{name: value})
        )
    return subject.with_config(overrides={**config.overrides, name: value})


def changes_model(subject: Subject) -> bool:
    """Whether the stage's config can change the model: by `model`, or by `overrides`.

    Policy stages take the model as the earlier stage left it.
    """
    config = subject.config
    return getattr(config, "model", None) is not None or hasattr(config, "overrides")


def remats(subject: Subject, vary: Sequence[str] = VARY) -> list[str]:
    """Returns values of remat, the model's own first."""
    own = subject.model.remat
    if "remat" not in vary or not changes_model(subject):
        return [own]
    return [own, *(remat for remat in ("none", "full") if remat != own)]


def rows_of(subject: Subject) -> int:
    """Returns the rows of an update, which microbatches and the mesh split."""
    return subject.workload().batch * subject.config.microbatches


def microbatches(
    own: int, rows: int, shards: int, vary: Sequence[str] = VARY
) -> Iterator[int]:
    """Yields numbers of microbatches whose rows divide into shards: the own one, then powers of 2.

    The powers grow; the first that fits is the fastest, since each microbatch gathers the weights.
    """
    counts = [own]
    if "microbatches" in vary:
        counts += [n for n in _powers_of_2(rows) if n != own]
    for count in counts:
        if rows % (count * shards) == 0:
            yield count


def meshes(
    subject: Subject, devices: int, vary: Sequence[str] = VARY
) -> list[MeshConfig]:
    """Returns meshes of all devices that divide the models, that of `mesh_for` first.

    If the config gives a mesh, there is no other. Else they are all powers of 2 along data, fsdp
    and tensor; `tensor` has more than 8 devices only where the batch leaves no choice.
    """
    if not is_free(subject) or "mesh" not in vary:
        given = mesh_for(subject, devices)
        return [] if given is None else [given]
    if "microbatches" in vary:  # rows of a whole update
        subject = subject.with_config(microbatches=1)
    first = mesh_for(subject, devices)
    found = [] if first is None else [first]
    divides = Divisors(subject)
    most_tensor = max(MOST_TENSOR, first.tensor if first else 1)
    for tensor in _powers_of_2(min(devices, most_tensor)):
        for data in _powers_of_2(devices // tensor):
            fsdp = devices // (tensor * data)
            if fsdp * tensor * data != devices:
                continue
            mesh = divides.checked(_free_mesh(subject, data, fsdp, tensor))
            if mesh is not None and mesh not in found:
                found.append(mesh)
    return found


def is_free(subject: Subject) -> bool:
    """Whether the config leaves the sizes of the mesh to the search."""
    given: MeshConfig = subject.config.mesh
    sizes_given = dataclasses.replace(given, rules={}, strategy="given")
    return given.strategy in FREE and sizes_given == MeshConfig()


def mesh_for(subject: Subject, devices: int) -> MeshConfig | None:
    """Returns the mesh of a stage on this many devices; None if it does not divide the stage.

    The mesh is that of the config if it gives one, else FSDP. If a microbatch has fewer rows than
    there are devices, FSDP is over as many as divide it and `tensor` over the rest; a vocabulary
    that `tensor` does not divide stays whole.
    """
    given: MeshConfig = subject.config.mesh
    if is_free(subject):
        fsdp = math.gcd(subject.workload().batch, devices)
        mesh = _free_mesh(subject, 1, fsdp, devices // fsdp)
    else:
        wanted = axis_sizes(given)
        if given.strategy not in FREE:
            wanted = sizes(given.strategy, wanted)
        filled = fill(wanted, devices)
        if filled is None:
            return None
        mesh = dataclasses.replace(given, **filled)
    return Divisors(subject).checked(mesh)


def _free_mesh(subject: Subject, data: int, fsdp: int, tensor: int) -> MeshConfig:
    given: MeshConfig = subject.config.mesh
    return dataclasses.replace(
        given, strategy="given", data=data, fsdp=fsdp, tensor=tensor
    )


class Divisors:
    """What a mesh must divide: the batch and the models of a stage."""

    def __init__(self, subject: Subject):
        self._batch = subject.workload().batch
        self._configs = [net.config for net in subject.nets]

    def checked(self, mesh: MeshConfig) -> MeshConfig | None:
        """Returns the mesh, the vocabulary whole where needed; None if it does not divide."""
        if self._batch % (mesh.replica * mesh.data * mesh.fsdp):
            return None
        for c in self._configs:
            widths = (c.n_heads, c.kv_heads, c.d_ff)
            if c.d_model % mesh.fsdp or any(n % mesh.tensor for n in widths):
                return None
        splits_vocab = "tensor" in mesh.rules.get("vocab", DEFAULT_RULES["vocab"])
        if splits_vocab and any(c.vocab_size % mesh.tensor for c in self._configs):
            return dataclasses.replace(mesh, rules={**mesh.rules, "vocab": ()})
        return mesh


def _powers_of_2(most: int) -> list[int]:
    return [2**i for i in range(int(math.log2(most)) + 1)]


# ------------------------------------------------------------------ as options of the config


def options(
    subject: Subject, mesh: MeshConfig, settings: Settings = AS_IT_IS
) -> dict[str, Any]:
    """Returns the options of the stage's config that a choice sets, by their dotted names."""
    own: MeshConfig = subject.config.mesh
    found: dict[str, Any] = {}
    for axis, size in axis_sizes(mesh).items():
        if size != getattr(own, axis):
            found[f"mesh.{axis}"] = size
    if mesh.strategy != own.strategy:
        found["mesh.strategy"] = mesh.strategy
    if dict(mesh.rules) != dict(own.rules):
        found["mesh.rules"] = dict(mesh.rules)
    if settings.remat and settings.remat != subject.model.remat:
        found |= model_option(subject, "remat", settings.remat)
    if settings.microbatches not in (0, subject.config.microbatches):
        found["microbatches"] = settings.microbatches
    return found


def model_option(subject: Subject, name: str, value: Any) -> dict[str, Any]:
    """Returns the option that sets a field of the model, as `with_model_field` does."""
    if getattr(subject.config, "model", None) is not None:
        return {f"model.{name}": value}
    return {f"overrides.{name}": value}
