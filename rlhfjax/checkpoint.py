"""Writes and reads checkpoints with Orbax v1. This is the only file that imports orbax.

Saves are asynchronous, a checkpoint is visible only when it is complete, and it is verified when it
is read. Its metadata have one 32-bit checksum per array, and one of the data position. The
checksum of an array adds integers over its bits, so it does not depend on the sharding; it detects
files that were cut short or altered, whatever the storage does.
"""

import logging
import re
import zlib
from typing import Any, NotRequired

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp
from typing_extensions import TypedDict

from rlhfjax import hosts, json_text, paths
from rlhfjax.config import CheckpointConfig
from rlhfjax.errors import CheckpointError, DataError, first_line
from rlhfjax.paths import Path
from rlhfjax.types import PyTree

log = logging.getLogger("rlhfjax")
# Orbax writes this file last into a bucket, where it cannot rename a complete folder.
COMMITTED = "commit_success.txt"
_STEP = re.compile("0|[1-9][0-9]{0,17}")  # the name of a checkpoint
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes per element


def _checksum(x: jax.Array) -> jax.Array:
    """Sums, modulo 2**32, the bits of each element times an odd number that its index gives."""
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])
    weights = 2 * jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape) + 1
    return jnp.sum(bits.astype(jnp.uint32) * weights, dtype=jnp.uint32)


@jax.jit
def _checksums(tree: PyTree) -> list[jax.Array]:
    return [_checksum(x) for x in jax.tree.leaves(tree)]


def checksums(tree: PyTree) -> list[int]:
    """Returns the checksum of every array, in the order of the tree's leaves."""
    return [int(checksum) for checksum in jax.device_get(_checksums(tree))]


def _data_checksum(data: Any) -> int:
    """Returns the checksum of a data position, of JSON types."""
    context = "data position"
    as_read = json_text.parse(json_text.encode(data, context))
    text = json_text.encode(as_read, context, sort_keys=True)
    return zlib.crc32(text.encode())


class _Metadata(TypedDict, extra_items=Any):
    """What is saved beside the arrays. Only checkpoints of a run have a data position."""

    checksums: list[int]
    data: NotRequired[Any]
    data_checksum: NotRequired[int]  # absent in older checkpoints


class Checkpoints:
    """The checkpoints of one workdir, `checkpoints/<step>/`: the state and the data position."""

    def __init__(self, workdir: Path, config: CheckpointConfig):
        self.directory = paths.absolute(workdir) / "checkpoints"
        self._damaged = paths.absolute(workdir) / "damaged_checkpoints"
        policies = ocp.training.preservation_policies
        keep: list[Any] = [policies.LatestN(config.keep_last)]
        if config.keep_every:
            keep.append(policies.EveryNSteps(config.keep_every))
        any_policy: Any = policies.AnyPreservationPolicy(keep)
        self._orbax = ocp.training.Checkpointer(
            str(paths.without_patterns(self.directory)),
            preservation_policy=any_policy,
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Returns the steps of complete checkpoints; a save in progress does not count."""

        def complete_steps() -> list[int]:
            folders = paths.children(self.directory)
            numbered = [folder for folder in folders if _STEP.fullmatch(folder.name)]
            return sorted(int(folder.name) for folder in numbered if _committed(folder))

        return hosts.share(complete_steps)

    def save(self, step: int, state: PyTree, data: Any) -> None:
        """Starts to save; the checkpoint gets its name once it is on disk completely.

        Args:
          data: the position of the data iterator, of JSON types.
        Raises:
          CheckpointError: the disk is full or read-only. Earlier checkpoints are untouched.
          DataError: `data` holds NaN or an infinity.
        """
        json_text.validate_finite(data, f"checkpoint {step}: the position of the data")
        metadata: Any = {
            "data": data,
            "data_checksum": _data_checksum(data),
            "checksums": checksums(state),
        }
        # An error may also be that of the previous save, which Orbax waits for here.
        with _disk_errors(self.directory):
            self._orbax.save_checkpointables_async(
                step, {"state": state}, force=True, custom_metadata=metadata
            )

    def wait(self) -> None:
        """Waits until a save in progress, if any, is complete on every host."""
        with _disk_errors(self.directory):
            self._orbax.wait()
        hosts.barrier()

    def close(self) -> None:
        """Waits for a save in progress, if any, and closes Orbax's checkpointer."""
        with _disk_errors(self.directory):
            self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def restore(self, abstract: PyTree) -> tuple[PyTree, Any] | None:
        """Returns (state, data position) of the latest intact checkpoint, None if there is none.

        A damaged checkpoint is reported in the log and moved to `damaged_checkpoints/`; then the
        one before it is read.

        Args:
          abstract: ShapeDtypeStructs with the shardings to restore to.
        Raises:
          CheckpointError: all checkpoints are damaged, or one has other shapes than the model.
        """
        steps = self.steps()
        for step in reversed(steps):
            folder = self.directory / str(step)
            try:
                state, metadata = _load(folder, abstract)
            except _Damaged as e:
                log.warning(
                    "checkpoint %s is damaged (%s): trying the one before it", folder, e
                )
                self._move_aside(step)
            else:
                return state, metadata.get("data")
        if steps:
            raise CheckpointError(
                f"{self.directory}: no checkpoint can be read; they were moved to "
                f"{self._damaged.name}/. "
                "The same command now starts this stage from its beginning"
            )
        return None

    def _move_aside(self, step: int) -> None:
        def move() -> None:
            target = self._damaged / str(step)
            while target.exists():
                target = target.with_name(target.name + "_")
            paths.move(self.directory / str(step), target)

        hosts.share(move)
        self._orbax.reload()


def save_tree(path: Path, tree: PyTree) -> None:
    """Writes one tree of arrays, completely or not at all; what is at `path` is removed first."""
    path = paths.absolute(path)
    metadata: Any = {"checksums": checksums(tree)}
    with _disk_errors(path):
        ocp.save_checkpointables(
            str(paths.without_patterns(path)),
            {"state": tree},
            overwrite=True,
            custom_metadata=metadata,
        )


def load_tree(path: Path, abstract: PyTree) -> PyTree:
    """Reads what `save_tree` wrote, with the shapes, dtypes and shardings of `abstract`.

    Raises:
      CheckpointError: there are no parameters, they are damaged, or they have other shapes.
    """
    path = paths.absolute(path)
    if not path.exists() or not _committed(path):
        raise CheckpointError(f"{path}: no parameters here; a finished stage has them")
    try:
        tree, _ = _load(path, abstract)
    except _Damaged as e:
        raise CheckpointError(f"{path}: damaged ({e})") from None
    return tree


def _committed(path: Path) -> bool:
    """Returns whether a checkpoint is complete; on a disk it has its name only then."""
    return not paths.remote(path) or (path / COMMITTED).exists()


class _Damaged(Exception):
    """The bytes of a checkpoint are not those that were saved."""


class _disk_errors:
    """Turns the error of a full or read-only disk into a CheckpointError of one line.

    Orbax wraps the OSError in exceptions of several types; for a bucket there may be none.
    """

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: Any
    ) -> None:
        cause = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise CheckpointError(f"saving {self._path} failed: {cause}") from error
        if not isinstance(error, ValueError | RuntimeError):
            return
        if paths.remote(self._path) or "os_error" in str(error):
            match = re.search(r": ([^:]*) \[os_error", str(error))  # TensorStore's
            reason = match[1] if match else _one_line(error)
            raise CheckpointError(f"saving {self._path} failed: {reason}") from error


def _load(path: Path, abstract: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """Reads one checkpoint and verifies its checksums; returns the state and the metadata.

    Raises:
      CheckpointError: its shapes differ from those of `abstract`.
      _Damaged: anything else is wrong.
    """
    name = str(paths.without_patterns(path))
    try:
        saved = ocp.metadata(name, checkpointable_name="state")
    except Exception as e:  # Orbax and TensorStore raise many types for damaged files
        raise _Damaged(_one_line(e)) from e
    metadata: Any = saved.custom_metadata
    if saved.metadata is None or not metadata:
        raise _Damaged("its metadata cannot be read")
    _validate_metadata(metadata)
    _validate_shapes(path, saved.metadata, abstract)
    state, problem = None, ""
    try:
        state = ocp.load_checkpointables(name, {"state": abstract})["state"]
    except Exception as e:
        problem = _one_line(e)
    if hosts.anywhere(bool(problem)):
        raise _Damaged(problem or "another host cannot read it")
    if checksums(state) != metadata["checksums"]:
        raise _Damaged("checksums differ")
    return state, metadata


def _validate_metadata(metadata: Any) -> None:
    """Raises _Damaged if the metadata or the data position in it were altered."""
    try:
        json_text.validate(metadata, "its metadata", _Metadata)
    except DataError as e:
        raise _Damaged(str(e)) from None
    checksum = metadata.get("data_checksum")
    if checksum not in (None, _data_checksum(metadata.get("data"))):
        raise _Damaged("the checksum of its data position differs")


def _validate_shapes(path: Path, saved: PyTree, abstract: PyTree) -> None:
    """Raises CheckpointError if a checkpoint has other shapes than the model."""
    saved_shapes = _shapes(saved)
    model_shapes = _shapes(abstract)
    for name in sorted(saved_shapes.keys() | model_shapes.keys()):
        saved_shape = saved_shapes.get(name, "absent")
        model_shape = model_shapes.get(name, "absent")
        if saved_shape != model_shape:
            raise CheckpointError(
                f"{path}: {name} is {saved_shape} there and {model_shape} in this model"
            )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every array under its path, such as `params/policy/head/kernel`."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {"/".join(map(_key, path)): tuple(leaf.shape) for path, leaf in leaves}


def _key(entry: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _one_line(error: Exception) -> str:
    return first_line(error, kind=True)[:200]
