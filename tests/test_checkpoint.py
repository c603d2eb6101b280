"""Checkpoints: whole, verified, kept as asked.

A damaged one is named and the one before it used.
"""

import functools
import json
import logging
import os
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhfjax import checkpoint, recipe
from rlhfjax.checkpoint import Checkpoints, checksums, load_tree, save_tree
from rlhfjax.config import CheckpointConfig
from rlhfjax.errors import CheckpointError, DataError
from rlhfjax.mesh import MeshConfig, make_layout
from tests.test_resume import _Crash, assert_same_stage, interrupt, recipe_folder
from tests.test_stages import stage_values

EVERYTHING = CheckpointConfig(keep_last=100)


def tree(seed: int = 0) -> dict:
    """Arrays that do not compress, so that their bytes lie in a file as they are."""
    a, b = jax.random.split(jax.random.key(seed))
    return {
        "w": jax.random.normal(a, (64, 128)),
        "head": {"b": jax.random.normal(b, (8,))},
        "step": jnp.int32(seed),
    }


def shapes(arrays: dict, sharding=None) -> dict:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding or x.sharding
        ),
        arrays,
    )


def save(folder: Path, steps, config: CheckpointConfig = EVERYTHING) -> None:
    with Checkpoints(folder, config) as checkpoints:
        for step in steps:
            checkpoints.save(step, tree(step), {"position": step})
            checkpoints.wait()


def test_pitfall_35_a_position_that_json_cannot_hold_is_an_error(tmp_path):
    with Checkpoints(tmp_path, EVERYTHING) as checkpoints:
        with pytest.raises(
            DataError, match=r"^checkpoint 3: .* of the data: rows\[1\] is nan;"
        ):
            checkpoints.save(3, tree(), {"rows": [0, float("nan")]})
        assert checkpoints.steps() == []


def restore(folder: Path, abstract=None):
    with Checkpoints(folder, EVERYTHING) as checkpoints:
        return checkpoints.restore(abstract or shapes(tree()))


def same(a: dict, b: dict) -> bool:
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def data_file(checkpoint: Path) -> Path:
    """The file with the arrays' bytes: the largest of the store's data files."""
    return max(checkpoint.rglob("d/*"), key=lambda p: p.stat().st_size)


def truncate(checkpoint: Path) -> None:
    file = data_file(checkpoint)
    os.truncate(file, file.stat().st_size // 2)


def flip(checkpoint: Path) -> None:
    """A bit here and there (the store keeps superseded bytes too).

    Nothing but sums can notice all of them.
    """
    for file in checkpoint.rglob("d/*"):
        content = bytearray(file.read_bytes())
        for i in range(len(content) // 8, len(content), 1000):
            content[i] ^= 1
        file.write_bytes(content)


def empty(checkpoint: Path) -> None:
    data_file(checkpoint).write_bytes(b"")


def remove_data(checkpoint: Path) -> None:
    data_file(checkpoint).unlink()


def remove_metadata(checkpoint: Path) -> None:
    (checkpoint / "_CHECKPOINT_METADATA").unlink()


def cut_metadata(checkpoint: Path) -> None:
    file = checkpoint / "_CHECKPOINT_METADATA"
    os.truncate(file, file.stat().st_size // 2)


def remove_all(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "state")


DAMAGES = (
    truncate,
    flip,
    empty,
    remove_data,
    remove_metadata,
    cut_metadata,
    remove_all,
)


def test_what_was_saved_comes_back(tmp_path):
    assert restore(tmp_path) is None
    save(tmp_path, [1, 2, 3])
    state, data = restore(tmp_path)
    assert same(state, tree(3)) and data == {"position": 3}
    assert state["step"].dtype == jnp.int32


def test_one_bit_that_the_store_does_not_notice_is_noticed(tmp_path, caplog):
    """Noise is stored as it is: a bit flipped in it reads back as another number, without any
    error.
    """
    noise = {"w": jax.random.bits(jax.random.key(0), (64, 128), jnp.uint32)}
    with Checkpoints(tmp_path, EVERYTHING) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, noise, {"position": step})
    file = data_file(tmp_path / "checkpoints" / "2")
    content = bytearray(file.read_bytes())
    place = content.find(np.asarray(noise["w"]).tobytes()[1000:1032])
    assert place > 0
    content[place] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "rlhfjax"):
        state, data = restore(tmp_path, shapes(noise))
    assert data == {"position": 1} and same(state, noise)
    assert "checkpoints/2 is damaged (checksums differ)" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    damage, tmp_path, caplog
):
    save(tmp_path, [1, 2, 3])
    damage(tmp_path / "checkpoints" / "3")
    with caplog.at_level(logging.WARNING, "rlhfjax"):
        state, data = restore(tmp_path)
    assert same(state, tree(2)) and data == {"position": 2}
    said = [
        record.getMessage() for record in caplog.records if record.name == "rlhfjax"
    ]
    assert (
        len(said) == 1
        and f"{tmp_path}/checkpoints/3 is damaged" in said[0]
        and "\n" not in said[0]
    )
    assert (tmp_path / "damaged_checkpoints" / "3").is_dir()
    with Checkpoints(tmp_path, EVERYTHING) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        checkpoints.save(3, tree(3), {"position": 3})  # the step can be saved again
    assert same(restore(tmp_path)[0], tree(3))


def test_when_all_are_damaged_it_says_so_and_then_starts_anew(tmp_path):
    save(tmp_path, [1, 2])
    for step in ("1", "2"):
        flip(tmp_path / "checkpoints" / step)
    with pytest.raises(
        CheckpointError,
        match="no checkpoint can be read; they were moved to damaged_checkpoints",
    ):
        restore(tmp_path)
    assert restore(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: {**t, "w": jnp.zeros((64, 64))},
            r"w is \(64, 128\) there and \(64, 64\) in this model",
        ),
        (
            lambda t: {**t, "head": {}},
            r"head/b is \(8,\) there and absent in this model",
        ),
        (
            lambda t: {**t, "more": jnp.zeros(3)},
            r"more is absent there and \(3,\) in this model",
        ),
    ],
)
def test_another_shape_is_an_error_that_names_the_parameter(change, said, tmp_path):
    """It is the config that is wrong, not the file: nothing is moved away."""
    save(tmp_path, [1])
    with pytest.raises(CheckpointError, match=said):
        restore(tmp_path, shapes(change(tree())))
    assert same(restore(tmp_path)[0], tree(1))


def test_keep_last_and_keep_every(tmp_path):
    save(tmp_path / "a", range(1, 11), CheckpointConfig(keep_last=2))
    save(tmp_path / "b", range(1, 11), CheckpointConfig(keep_last=1, keep_every=4))
    for folder, kept in (("a", [9, 10]), ("b", [4, 8, 10])):
        with Checkpoints(tmp_path / folder, EVERYTHING) as checkpoints:
            assert checkpoints.steps() == kept


def test_a_half_written_checkpoint_is_not_one(tmp_path):
    """What a kill in the middle of a save leaves is not seen, and is cleared away."""
    save(tmp_path, [1])
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", unfinished)
    with Checkpoints(tmp_path, EVERYTHING) as checkpoints:
        assert checkpoints.steps() == [1]
        checkpoints.save(2, tree(2), {"position": 2})
    assert not unfinished.exists()
    assert restore(tmp_path)[1] == {"position": 2}


def test_a_save_holds_the_values_of_its_call_though_the_state_is_donated_at_once(
    tmp_path,
):
    """The step after a save overwrites the state's buffers while the save is still under way."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        return jax.tree.map(lambda x: x * 2 + 1, state)

    state = {"w": jax.random.normal(jax.random.key(0), (1000, 2000))}
    abstract, wanted = shapes(state), {}
    with Checkpoints(tmp_path, EVERYTHING) as checkpoints:
        for n in range(4):
            wanted[n] = np.array(state["w"])
            checkpoints.save(n, state, {})
            state = step(step(step(state)))
            jax.block_until_ready(state)
    for n in reversed(range(4)):
        saved, _ = restore(tmp_path, abstract)
        np.testing.assert_array_equal(saved["w"], wanted[n])
        shutil.rmtree(tmp_path / "checkpoints" / str(n))


def test_sums_notice_any_element_and_any_exchange_and_no_sharding():
    x = {"w": jax.random.normal(jax.random.key(0), (8, 16))}
    swapped = {"w": x["w"].at[0, 0].set(x["w"][0, 1]).at[0, 1].set(x["w"][0, 0])}
    bit = {
        "w": jnp.asarray(
            (
                np.asarray(x["w"]).view(np.uint32)
                ^ (np.arange(128).reshape(8, 16) == 77)
            ).view("f4")
        )
    }
    sharding = NamedSharding(
        make_layout(MeshConfig(data=1, fsdp=4)).mesh, PartitionSpec("fsdp")
    )
    assert checksums(x) != checksums(swapped)
    assert checksums(x) != checksums(bit)
    assert checksums(x) == checksums(jax.device_put(x, sharding))
    halves = {
        "h": jnp.arange(6, dtype=jnp.bfloat16),
        "b": jnp.array([True, False]),
        "z": jnp.array([0.0, -0.0]),
    }
    assert len(checksums(halves)) == 3


def test_restore_onto_another_mesh_is_bitwise(tmp_path):
    one = make_layout(MeshConfig(), jax.devices()[:1])
    state = jax.device_put(tree(), one.replicated)
    with Checkpoints(tmp_path, EVERYTHING) as checkpoints:
        checkpoints.save(1, state, {})
    four = make_layout(MeshConfig(data=1, fsdp=4))
    split = NamedSharding(four.mesh, PartitionSpec("fsdp"))
    abstract = {
        **shapes(state, four.replicated),
        "w": jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=split),
    }
    restored, _ = restore(tmp_path, abstract)
    assert same(restored, state)
    assert restored["w"].sharding == split and restored["w"].addressable_shards[
        0
    ].data.shape == (16, 128)
    with Checkpoints(
        tmp_path, EVERYTHING
    ) as checkpoints:  # and from four devices back to one
        checkpoints.save(2, restored, {})
    back, _ = restore(tmp_path, shapes(state, one.replicated))
    assert same(back, state)


# ------------------------------------------------------------------ a disk that refuses


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or subprocess.run(command, capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_stays(small_disk):
    big = {
        "w": jax.random.normal(jax.random.key(0), (400, 500))
    }  # 0.8 MB: the third does not fit
    with (
        pytest.raises(
            CheckpointError,
            match=rf"^saving {small_disk}/checkpoints failed: .*No space left",
        ) as caught,
        Checkpoints(small_disk, EVERYTHING) as checkpoints,
    ):
        for step in range(4):
            checkpoints.save(step, big, {"position": step})
    assert "\n" not in str(caught.value)
    state, data = restore(small_disk, shapes(big))
    assert data == {"position": 1} and same(state, big)
    with pytest.raises(CheckpointError, match="No space left"):
        save_tree(small_disk / "params", big)
    assert not (small_disk / "params").exists()


def test_what_the_disk_says_reaches_the_user_in_one_line(tmp_path, monkeypatch):
    """The same without a mount: an OSError somewhere under Orbax."""
    save(tmp_path, [1])

    def full(*_, **__):
        raise RuntimeError("save failed\nsomewhere") from OSError(
            28, "No space left on device"
        )

    with Checkpoints(tmp_path, EVERYTHING) as checkpoints:
        monkeypatch.setattr(checkpoints._orbax, "save_checkpointables_async", full)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(2, tree(2), {})
    assert (
        str(caught.value)
        == f"saving {tmp_path}/checkpoints failed: [Errno 28] No space left on device"
    )
    assert restore(tmp_path)[1] == {"position": 1}


# ------------------------------------------------------------------ one tree


def test_save_tree_and_load_tree(tmp_path):
    path = tmp_path / "params"
    with pytest.raises(CheckpointError, match="no parameters here"):
        load_tree(path, shapes(tree()))
    save_tree(path, tree(1))
    save_tree(path, tree(2))  # replaces
    assert same(load_tree(path, shapes(tree())), tree(2))
    assert [p.name for p in tmp_path.iterdir()] == ["params"]


@pytest.mark.parametrize("name", ["10:00 [x]*?", "a\\b", "gs:"])
def test_a_folder_may_have_any_name(name, tmp_path):
    """Orbax and TensorStore take some characters for patterns, separators or schemes."""
    save_tree(tmp_path / name / "params", tree(1))
    assert same(load_tree(tmp_path / name / "params", shapes(tree())), tree(1))
    with Checkpoints(tmp_path / name, CheckpointConfig()) as checkpoints:
        checkpoints.save(3, tree(2), {"position": 1})
        checkpoints.wait()
        state, position = checkpoints.restore(shapes(tree())) or (None, None)
    assert same(state, tree(2)) and position == {"position": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damaged_parameters_are_refused(damage, tmp_path):
    save_tree(tmp_path / "params", tree())
    damage(tmp_path / "params")
    with pytest.raises(CheckpointError, match=f"{tmp_path}/params: damaged") as caught:
        load_tree(tmp_path / "params", shapes(tree()))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ in a run


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_to_the_same_bits(
    conversations, finished, tmp_path, monkeypatch, caplog
):
    values, reference = (
        stage_values("pretrain", conversations, finished),
        recipe_folder(finished, "pretrain"),
    )
    with monkeypatch.context() as patch:
        interrupt(patch, "pretrain", 5, "exception")
        with pytest.raises(_Crash):
            recipe.run_stage(values, tmp_path / "run")
    flip(tmp_path / "run" / "checkpoints" / "4")
    with caplog.at_level(logging.WARNING, "rlhfjax"):
        recipe.run_stage(values, tmp_path / "run")
    assert "checkpoints/4 is damaged" in caplog.text
    assert_same_stage(reference, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "done.json").read_text())["steps"] == 6


POSITIONS = [
    {"data": {"next": -5}, "checksums": [1], "data_checksum": 3},
    {"data": {"next": 5}, "checksums": ["x"]},
    {"data": {"next": 5}, "checksums": None},
    {"checksums": [True]},
    {"data": 3},
    [],
]


@pytest.mark.parametrize("metadata", POSITIONS)
def test_altered_metadata_are_damage(metadata):
    with pytest.raises(checkpoint._Damaged):
        checkpoint._validate_metadata(metadata)


def test_a_position_keeps_its_checksum_when_it_is_read_back():
    position = {"rows": (1, 2), 10: 0.1, 9: "é"}
    as_read = {"rows": [1, 2], "10": 0.1, "9": "é"}
    checksum = checkpoint._data_checksum(position)
    assert checkpoint._data_checksum(as_read) == checksum
    read = {"data": as_read, "checksums": [1], "data_checksum": checksum}
    checkpoint._validate_metadata(read)
    del read["data_checksum"]
    checkpoint._validate_metadata(read)  # an older checkpoint
