"""Checkpoints: Orbax v1, asynchronous, visible only when whole, verified when read. The only file that imports orbax.

Beside the arrays of a checkpoint lies one 32-bit sum an array. The sums are integer additions over the bits, so they do
not depend on how an array is sharded, and a file that was cut short or altered is noticed whatever the storage does.
"""

import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from rlhfjax import hosts, json_text, paths
from rlhfjax.config import CheckpointConfig
from rlhfjax.errors import CheckpointError, first_line
from rlhfjax.paths import Path
from rlhfjax.types import PyTree

log = logging.getLogger("rlhfjax")
COMMITTED = "commit_success.txt"  # what Orbax writes last into a bucket, where it cannot rename what is whole


def _checksum(x: jax.Array) -> jax.Array:
    """Sum over elements of their bits times an odd number that depends on the index, modulo 2**32."""
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    bits = jax.lax.bitcast_convert_type(
        x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    )
    weights = 2 * jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape) + 1
    return jnp.sum(bits.astype(jnp.uint32) * weights, dtype=jnp.uint32)


@jax.jit
def _checksums(tree: PyTree) -> list[jax.Array]:
    return [_checksum(x) for x in jax.tree.leaves(tree)]


def checksums(tree: PyTree) -> list[int]:
    return [int(c) for c in jax.device_get(_checksums(tree))]


class Checkpoints:
    """The checkpoints of one workdir: `checkpoints/<step>/`, each with the state and the data iterator's position."""

    def __init__(self, workdir: Path, config: CheckpointConfig):
        self.directory = paths.absolute(workdir) / "checkpoints"
        self.set_aside = paths.absolute(workdir) / "damaged_checkpoints"
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(config.keep_last)]
        if config.keep_every:
            keep.append(policies.EveryNSteps(config.keep_every))
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Those that are whole on the disk; a save under way is not."""

        def whole() -> list[int]:
            found = [
                path for path in paths.children(self.directory) if path.name.isdigit()
            ]
            return sorted(int(path.name) for path in found if _committed(path))

        return hosts.share(whole)

    def save(self, step: int, state: PyTree, data: Any) -> None:
        """Starts a save; the checkpoint appears under its name once all of it is on the disk.

        Args:
          data: the data iterator's position, of JSON types.
        Raises:
          CheckpointError: the disk refused (full, read-only). The checkpoints before it are untouched.
          DataError: NaN or an infinity in `data`.
        """
        json_text.validate_finite(data, f"checkpoint {step}: the position of the data")
        note = {"data": data, "checksums": checksums(state)}
        with _disk_errors(
            self.directory
        ):  # what fails may also be the save before this one
            self._orbax.save_checkpointables_async(
                step, {"state": state}, force=True, custom_metadata=note
            )

    def wait(self) -> None:
        """Until the save under way, if any, is whole, on every host."""
        with _disk_errors(self.directory):
            self._orbax.wait()
        hosts.barrier()

    def close(self) -> None:
        """Waits for the save under way, if any."""
        with _disk_errors(self.directory):
            self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def restore(self, abstract: PyTree) -> tuple[PyTree, Any] | None:
        """The latest sound checkpoint as (state, data iterator's position); None where there is no checkpoint.

        A damaged one is named in the log and moved to `damaged_checkpoints/`, and the one before it is used.

        Args:
          abstract: ShapeDtypeStructs with the shardings to restore to.
        Raises:
          CheckpointError: there are checkpoints and none is sound, or one is of another shape than the model.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                state, note = _load(self.directory / str(step), abstract)
                return state, note["data"]
            except _Damaged as e:
                log.warning(
                    "checkpoint %s is damaged (%s): trying the one before it",
                    self.directory / str(step),
                    e,
                )
                self._move_aside(step)
        if steps:
            raise CheckpointError(
                f"{self.directory}: no checkpoint can be read; they were moved to {self.set_aside.name}/. "
                "The same command now starts this stage from its beginning"
            )
        return None

    def _move_aside(self, step: int) -> None:
        def move() -> None:
            target = self.set_aside / str(step)
            while target.exists():
                target = target.with_name(target.name + "_")
            paths.move(self.directory / str(step), target)

        hosts.share(move)
        self._orbax.reload()


def save_tree(path: Path, tree: PyTree) -> None:
    """Writes one tree of arrays, whole or not at all, in place of what was there, which goes first."""
    path, note = paths.absolute(path), {"checksums": checksums(tree)}
    with _disk_errors(path):
        ocp.save_checkpointables(
            path, {"state": tree}, overwrite=True, custom_metadata=note
        )


def load_tree(path: Path, abstract: PyTree) -> PyTree:
    """Reads what `save_tree` wrote into the shapes, dtypes and shardings of `abstract`.

    Raises:
      CheckpointError: nothing there, damaged, or of other shapes.
    """
    path = paths.absolute(path)
    if not path.exists() or not _committed(path):
        raise CheckpointError(f"{path}: no parameters here; a finished stage has them")
    try:
        return _load(path, abstract)[0]
    except _Damaged as e:
        raise CheckpointError(f"{path}: damaged ({e})") from None


def _committed(path: Path) -> bool:
    """Whether a checkpoint is whole; on a disk it has its name only then."""
    return not paths.remote(path) or (path / COMMITTED).exists()


class _Damaged(Exception):
    """A checkpoint whose bytes are not what was saved."""


class _disk_errors:
    """Turns what a full or read-only disk raises into one line; Orbax wraps it in several types."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: Any
    ) -> None:
        cause = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise CheckpointError(f"saving {self.path} failed: {cause}") from error
        if isinstance(error, ValueError | RuntimeError) and (
            paths.remote(self.path) or "os_error" in str(error)
        ):
            reason = re.search(r": ([^:]*) \[os_error", str(error))  # TensorStore's
            raise CheckpointError(
                f"saving {self.path} failed: {reason[1] if reason else _one_line(error)}"
            ) from error


def _load(path: Path, abstract: PyTree) -> tuple[PyTree, dict]:
    """Reads one checkpoint and compares checksums; another shape is the caller's error, anything else is damage."""
    try:
        found = ocp.metadata(path, checkpointable_name="state")
        saved, note = found.metadata, found.custom_metadata
    except (
        Exception
    ) as e:  # Orbax and TensorStore raise many types for a file that is cut short
        raise _Damaged(_one_line(e)) from e
    if saved is None or not note:
        raise _Damaged("its metadata cannot be read")
    _check_shapes(path, saved, abstract)
    why = ""
    try:
        state = ocp.load_checkpointables(path, {"state": abstract})["state"]
    except Exception as e:
        why = _one_line(e)
    if hosts.anywhere(bool(why)):
        raise _Damaged(why or "another host cannot read it")
    if checksums(state) != note["checksums"]:
        raise _Damaged("checksums differ")
    return state, note


def _check_shapes(path: Path, saved: PyTree, abstract: PyTree) -> None:
    saved, wanted = _shapes(saved), _shapes(abstract)
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{path}: {name} is {saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} in this model"
            )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        "/".join(
            str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k))))
            for k in path
        ): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _one_line(e: Exception) -> str:
    return first_line(e, kind=True)[:200]
