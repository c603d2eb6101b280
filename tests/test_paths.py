"""Paths on a disk and in a bucket do the same, and what is written is there whole or not at all."""

import os
import pathlib
import subprocess
import sys
import time
import urllib.request

import pytest
from etils import epath

from rlhfjax import paths, patterns
from rlhfjax.errors import ConfigError, DataError
from tests import gcs


@pytest.fixture(params=["disk", "bucket"])
def root(request, tmp_path):
    """A folder that is empty, of both kinds."""
    return (
        tmp_path / "root"
        if request.param == "disk"
        else request.getfixturevalue("bucket")
    )


def fill(folder, *names: str) -> None:
    for name in names:
        paths.make_folder((folder / name).parent)
        paths.write(folder / name, name)


# ------------------------------------------------------------------ names


def test_a_local_name_is_a_plain_path_and_a_buckets_is_not(cloud):
    assert (
        type(paths.path("a/b"))
        is type(paths.path(pathlib.Path("a/b")))
        is type(pathlib.Path())
    )
    there = paths.path("gs://bucket/a//b/")
    assert isinstance(there, epath.Path) and str(there) == "gs://bucket/a/b" == str(
        paths.path(there)
    )
    assert isinstance(there, paths.Path) and isinstance(pathlib.Path("a"), paths.Path)
    assert (
        paths.remote(there)
        and not paths.remote("a/b")
        and not paths.remote("hf:gs://bucket/a")
    )


def test_a_store_that_we_do_not_know_is_one_line():
    with pytest.raises(
        ConfigError,
        match=r"^s3://bucket/x: expected a local path or one of Google Cloud Storage \(gs://",
    ):
        paths.path("s3://bucket/x")


def test_without_gcsfs_a_bucket_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        ConfigError,
        match=r"^gs://bucket/x: gcsfs is not installed; pip install -e '\.\[gcs\]'$",
    ):
        paths.path("gs://bucket/x")
    assert paths.path("x") == pathlib.Path("x")


def test_absolute_follows_links_on_a_disk_and_leaves_a_buckets_name(
    tmp_path, monkeypatch, cloud
):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    assert paths.absolute(pathlib.Path("link")) == (tmp_path / "real").resolve()
    assert str(paths.absolute(paths.path("gs://bucket/a"))) == "gs://bucket/a"


def test_what_is_kept_relative_to_a_folder_is_found_again_after_both_have_moved(root):
    fill(
        root,
        "run/03_reward/x",
        "run/04_compose/reward.json",
        "moved/03_reward/x",
        "moved/04_compose/reward.json",
    )
    kept = paths.relative(str(root / "run" / "03_reward"), root / "run" / "04_compose")
    assert kept == "../03_reward"
    assert paths.within(root / "moved" / "04_compose", kept).exists()
    if paths.remote(root):
        assert str(paths.within(root / "moved" / "04_compose", kept)) == str(
            root / "moved" / "03_reward"
        )


def test_names_that_cannot_be_relative_stay_as_they_are(tmp_path, bucket):
    fill(bucket, "a/x")
    assert (
        paths.relative("gold:sentiment", bucket)
        == "gold:sentiment"
        == paths.relative("gold:sentiment", tmp_path)
    )
    assert paths.relative(str(tmp_path), bucket) == str(tmp_path)
    assert paths.relative(str(bucket / "a"), tmp_path) == str(bucket / "a")
    assert (
        paths.within(bucket, str(tmp_path))
        == tmp_path
        == paths.within(tmp_path / "a", str(tmp_path))
    )
    assert paths.within(tmp_path, str(bucket / "a")) == bucket / "a"


# ------------------------------------------------------------------ what is there


def test_children_are_one_level_and_files_all(root):
    assert paths.children(root) == paths.files(root) == []
    fill(root, "b", "a/x", "a/c/y", "a/c/z")
    assert [one.name for one in paths.children(root)] == ["a", "b"]
    assert [str(one.relative_to(root)) for one in paths.files(root)] == [
        "a/c/y",
        "a/c/z",
        "a/x",
        "b",
    ]
    assert all(
        isinstance(one, type(root))
        for one in [*paths.children(root), *paths.files(root)]
    )


def test_a_file_that_another_program_wrote_is_seen(bucket, cloud):
    """gcsfs would remember that there was none."""
    fill(bucket, "b")
    assert not (bucket / "a").exists() and [
        one.name for one in paths.children(bucket)
    ] == ["b"]
    upload = f"{cloud}/upload/storage/v1/b/{gcs.BUCKET}/o?uploadType=media&name={bucket.name}/a"
    urllib.request.urlopen(
        urllib.request.Request(upload, b"there", method="POST")
    ).close()
    assert (bucket / "a").read_text() == "there" and [
        one.name for one in paths.children(bucket)
    ] == ["a", "b"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("b.jsonl", ["b.jsonl"]),
        ("c/?.jsonl", ["c/d.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "c/d.jsonl", "c/e/f.jsonl"]),
        ("c*", []),
        ("nowhere/*", []),
    ],
)
def test_glob_finds_files_in_order(root, pattern, found):
    fill(root, "b.jsonl", "a.jsonl", "a.txt", "c/d.jsonl", "c/e/f.jsonl")
    assert [
        str(one.relative_to(root)) for one in paths.glob(f"{root}/{pattern}")
    ] == found


@pytest.mark.parametrize("pattern", ["**/x", "?/**", "*/*/*"])
def test_a_glob_that_looks_into_too_many_folders_is_one_line(
    pattern, tmp_path, monkeypatch
):
    fill(tmp_path, *(f"{i}/{i}/x" for i in range(6)))
    assert len(paths.glob(f"{tmp_path}/{pattern}")) in (0, 6)
    monkeypatch.setattr(patterns, "MOST_FOLDERS", 5)
    with pytest.raises(DataError, match=r"more than 5 folders to look into; begin"):
        paths.glob(f"{tmp_path}/{pattern}")
    assert paths.glob(f"{tmp_path}/[1]/1/*") == [tmp_path / "1/1/x"]


def test_glob_knows_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path, "x.txt")
    assert paths.glob("~/*.txt") == [tmp_path / "x.txt"]


# ------------------------------------------------------------------ writing


def test_write_makes_and_replaces_and_leaves_nothing_else(root):
    paths.make_folder(root)
    assert paths.write(root / "x", "one\n") == root / "x"
    assert paths.write(root / "x", "zwö".encode()).read_bytes() == "zwö".encode()
    assert paths.write(root / "x", "zwö").read_text(encoding="utf-8") == "zwö"
    assert [one.name for one in paths.children(root)] == ["x"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    paths.write(tmp_path / "x", "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        paths.write(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and [
        one.name for one in tmp_path.iterdir()
    ] == ["x"]


def test_a_bucket_that_is_not_there_is_one_line(cloud):
    with pytest.raises(ConfigError, match=r"^gs://nowhere/x: there is no such bucket$"):
        paths.write(paths.path("gs://nowhere/x"), "x")


def test_replacing_puts_a_folder_in_the_place_of_another(root):
    fill(root / "f", "marker", "old/x", "both")
    with paths.replacing(root / "f", "marker") as new:
        assert isinstance(new, pathlib.Path) and list(new.iterdir()) == []
        fill(new, "marker", "new/y", "both")
        assert (root / "f" / "old" / "x").exists()  # until the end
    assert [str(one.relative_to(root / "f")) for one in paths.files(root / "f")] == [
        "both",
        "marker",
        "new/y",
    ]
    assert [one.name for one in paths.children(root)] == ["f"]


def test_replacing_leaves_the_older_folder_where_the_newer_fails(root):
    fill(root / "f", "marker")
    with pytest.raises(KeyError), paths.replacing(root / "f", "marker") as new:
        fill(new, "other")
        raise KeyError
    assert [str(one.relative_to(root)) for one in paths.files(root)] == ["f/marker"]


def test_replacing_in_a_bucket_removes_the_marker_first_and_writes_it_last(
    bucket, monkeypatch
):
    """So that a folder that has it is whole, whenever the process is killed.

    Looked at after every request.
    """
    fill(bucket / "f", "marker", "a", "b")
    kind = type(paths._store())
    request, seen = kind._call, []

    async def watched(self, method, *args, **kwargs):
        answer = await request(self, method, *args, **kwargs)
        if method in ("POST", "DELETE"):
            listed = await request(
                self,
                "GET",
                "b/{}/o",
                gcs.BUCKET,
                prefix=f"{bucket.name}/f/",
                json_out=True,
            )
            seen.append(
                {one["name"].rpartition("/")[2] for one in listed.get("items", [])}
            )
        return answer

    monkeypatch.setattr(kind, "_call", watched)
    with paths.replacing(bucket / "f", "marker") as new:
        fill(new, "marker", "c", "d")
    monkeypatch.undo()
    assert (
        seen[0] == {"a", "b"}
        and {"c", "d"} in seen
        and seen[-1] == {"c", "d", "marker"}
    )
    assert [there for there in seen if "marker" in there] == [seen[-1]]


def test_what_a_killed_replacing_left_is_removed_by_the_next(tmp_path):
    code = f"""
import os, pathlib, signal
from rlhfjax import paths
with paths.replacing(pathlib.Path({str(tmp_path / "f")!r}), "marker") as new:
    (new / "marker").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list(tmp_path.glob(".f.tmp-*"))) == 1 and not (tmp_path / "f").exists()
    with paths.replacing(tmp_path / "f", "marker") as new:
        (new / "marker").write_text("y")
    assert [one.name for one in tmp_path.iterdir()] == ["f"] and (
        tmp_path / "f" / "marker"
    ).read_text() == "y"


def test_remove_takes_everything_and_does_not_mind_nothing(root):
    fill(root, "f/a", "f/b/c", "g")
    paths.remove(root / "f")
    paths.remove(root / "f")
    assert [str(one.relative_to(root)) for one in paths.files(root)] == ["g"]


def test_move_gives_a_folder_another_name(root):
    fill(root, "f/a", "f/b/c", "g")
    paths.move(root / "f", root / "h" / "i")
    assert [str(one.relative_to(root)) for one in paths.files(root)] == [
        "g",
        "h/i/a",
        "h/i/b/c",
    ]
    assert (root / "h" / "i" / "b" / "c").read_text() == "f/b/c"


# ------------------------------------------------------------------ stand-ins


def test_local_is_the_path_itself_on_a_disk(tmp_path):
    assert paths.local(tmp_path / "not there") == tmp_path / "not there"


def test_local_downloads_files_and_folders_once_and_anew_when_they_change(bucket):
    fill(bucket, "f/a", "f/b/c", "g")
    one, folder = paths.local(bucket / "f" / "a"), paths.local(bucket / "f")
    assert (one.name, one.read_text()) == ("a", "f/a")
    assert [str(file.relative_to(folder)) for file in paths.files(folder)] == [
        "a",
        "b/c",
    ]
    assert (
        paths.local(bucket / "f" / "a") == one and paths.local(bucket / "f") == folder
    )
    paths.write(bucket / "f" / "a", "changed")
    assert (
        paths.local(bucket / "f" / "a").read_text()
        == (paths.local(bucket / "f") / "a").read_text()
        == "changed"
    )
    assert one.read_text() == "f/a"  # who has it open keeps it
    with pytest.raises(FileNotFoundError, match="nowhere"):
        paths.local(bucket / "nowhere")


@pytest.mark.slow
def test_downloads_go_with_the_process(bucket, tmp_path):
    fill(bucket, "x")
    code = f"from rlhfjax import paths; print(paths.local(paths.path('{bucket}/x')).read_text())"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert said.stdout == "x\n" and list(tmp_path.iterdir()) == []


def test_a_mirror_of_a_folder_on_a_disk_is_the_folder(tmp_path):
    mirror = paths.Mirror(tmp_path / "f", ["x"])
    assert mirror.folder == tmp_path / "f" and not mirror.folder.exists()
    mirror.sync()
    mirror.close()


def test_a_mirror_of_a_bucket_goes_on_with_its_files_and_brings_back_what_has_changed(
    bucket, monkeypatch
):
    fill(bucket, "x", "y")
    mirror = paths.Mirror(bucket, ["x", "b/log", "nowhere"])
    assert [
        str(one.relative_to(mirror.folder)) for one in paths.files(mirror.folder)
    ] == ["x"]
    with (mirror.folder / "x").open("a") as file:
        file.write(" and more")
    (mirror.folder / "b").mkdir()
    (mirror.folder / "b" / "log").write_text("line\n")
    (mirror.folder / "b" / "latest").symlink_to("log")
    assert (bucket / "x").read_text() == "x"
    mirror.sync()
    assert [str(one.relative_to(bucket)) for one in paths.files(bucket)] == [
        "b/log",
        "x",
        "y",
    ]
    assert (bucket / "x").read_text() == "x and more" and (
        bucket / "b" / "log"
    ).read_text() == "line\n"

    written = []
    whole = paths.write
    monkeypatch.setattr(
        paths,
        "write",
        lambda path, content: written.append(path.name) or whole(path, content),
    )
    mirror.sync()
    assert written == []
    (mirror.folder / "b" / "log").write_text("line\nanother\n")
    mirror.sync(every=3600.0)
    assert written == []
    time.sleep(0.1)
    mirror.sync(every=0.1)
    assert written == ["log"]
    (mirror.folder / "last").write_text("")
    mirror.close()
    assert (
        written == ["log", "last"]
        and (bucket / "last").exists()
        and not mirror.folder.exists()
    )


# ------------------------------------------------------------------ locks and refusals


def test_a_lock_is_where_it_is_named_or_on_this_machine(tmp_path, cloud):
    assert paths.lock_file(tmp_path / "x.lock") == tmp_path / "x.lock"
    a, b = (
        paths.lock_file(paths.path(f"gs://bucket/{name}/sweep.lock")) for name in "ab"
    )
    assert a != b and a == paths.lock_file(paths.path("gs://bucket/a/sweep.lock"))
    assert isinstance(a, pathlib.Path) and a.parent.is_dir()


def test_what_the_cloud_refuses_is_one_line_whatever_it_is_wrapped_in():
    from gcsfs.retry import HttpError

    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = HttpError(
        {"code": 403, "message": "nobody has no storage.objects.get\nmore"}
    )
    assert (
        paths.refusal(wrapped)
        == "Google Cloud Storage: HttpError: nobody has no storage.objects.get"
    )
    assert paths.refusal(ValueError("ours")) == ""


@pytest.mark.parametrize("name", ["a\0b", "x" * 256, "x/" * 2048, "\ud800"])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(ConfigError) as caught:
        paths.path(name)
    assert len(str(caught.value)) < 250


def test_home_is_the_home_folder_unless_there_is_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert str(paths.path("~/a")) == "/home/me/a"
    (tmp_path / "~").mkdir()
    assert str(paths.path("~/a")) == "/home/me/a" and str(paths.path("~")) == "~"
    (tmp_path / "~" / "a").touch()
    assert str(paths.path("~/a")) == "~/a"


def test_a_scheme_is_one_that_is_known():
    known = ("jsonl", "text")
    assert paths.scheme("jsonl:a", known) == "jsonl"
    assert paths.scheme("runs/2026-11-29T10:00:00", known) == ""
    assert paths.scheme("jsonl", known) == paths.scheme("/jsonl:a", known) == ""


@pytest.mark.parametrize("name", ["runs[1]", "a\\b", "gs:"])
def test_libraries_that_know_patterns_reach_any_folder(name, tmp_path):
    target = tmp_path / name / "params"
    plain = paths.without_patterns(target)
    assert plain.name == "params" and not set("[\\") & set(str(plain))
    plain.mkdir()
    (plain / "x").touch()
    assert (target / "x").exists()
    assert paths.without_patterns(tmp_path / "a b:c") == tmp_path / "a b:c"


def test_a_bucket_without_network_is_one_line_within_seconds(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://no-such-host.invalid:1")
    paths._reach_buckets.cache_clear()
    name = paths.path("gs://bucket/x")
    for read in (paths.read, paths.exists, paths.children, paths.files):
        with pytest.raises(
            DataError, match=r"^Google Cloud Storage cannot be reached: "
        ):
            read(name)
