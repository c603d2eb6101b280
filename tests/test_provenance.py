"""provenance.jsonl: what it says about a start, and when a line is added."""

import subprocess
import sys

import jax

import rlhfjax
from rlhfjax import processor, provenance, recipe
from tests.test_recipe import jobs, two


def git(folder, *words):
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *name, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_line_has_the_command_commit_versions_and_hardware(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/rlhfjax", "run", "--config=a b.py"])
    provenance.record(tmp_path, seeds={"sft": 3}, parameters={"model": 7})
    provenance.record(tmp_path, seeds={})
    first, second = provenance.read(tmp_path)
    assert first["command"] == "rlhfjax run '--config=a b.py'"
    assert first["seeds"] == {"sft": 3} and first["parameters"] == {"model": 7}
    assert first["versions"]["jax"] == jax.__version__
    assert first["versions"]["rlhfjax"] == rlhfjax.__version__
    assert first["hardware"]["platform"] == "cpu"
    assert first["hardware"]["cpu"] == processor.describe()
    assert first["date"].endswith("+00:00") and first["date"] <= second["date"]


def test_the_commit_and_whether_tracked_files_are_unchanged(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "a.py"))
    for content, clean in (("1", True), ("2", False)):
        (tmp_path / "a.py").write_text(content)
        (tmp_path / "untracked").write_text("")
        provenance._code.cache_clear()
        assert provenance._code() == {"commit": commit, "clean": clean}
    provenance._code.cache_clear()


def test_outside_of_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "a.py"))
    provenance._code.cache_clear()
    assert provenance._code()["clean"] is None
    provenance._code.cache_clear()


def test_every_start_that_computes_adds_a_line(tmp_path, monkeypatch):
    jobs(monkeypatch, [])
    recipe.run(two(), tmp_path)
    recipe.run(two(), tmp_path)  # there is nothing to run
    (tmp_path / "01_b" / "done.json").unlink()
    recipe.run(two(), tmp_path)
    folders = (tmp_path, tmp_path / "00_a", tmp_path / "01_b")
    assert [len(provenance.read(folder)) for folder in folders] == [2, 1, 2]
