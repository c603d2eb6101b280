"""The example of docs/studies.md, really run: a study of six small runs that share a base."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhfjax import paths, stage_cache
from rlhfjax.lab import results
from tests import doc_commands


@pytest.mark.nightly
def test_the_study_of_the_page(tmp_path, monkeypatch):
    for name, text in doc_commands.files("docs/studies.md").items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(doc_commands.ROOT))
    done = _run(tmp_path, "make_data.py")
    assert done.returncode == 0, done.stderr
    sweep = ("-m", "rlhfjax", "sweep", "--config=study.py")
    done = _run(tmp_path, *sweep, "--workdir=runs/study", "--parallel=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: reproduced." in done.stdout
    workdir = tmp_path / "runs" / "study"
    assert "reproduced" in (workdir / "study.html").read_text()
    rows = results.read(paths.path(workdir / results.FILE))
    _validate_base(workdir, rows)
    # Once the rows are committed nothing runs, and the verdict is the same.
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "one.jsonl").write_bytes(
        (workdir / results.FILE).read_bytes()
    )
    done = _run(tmp_path, *sweep, "--workdir=runs/again", "--launcher=false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 taken from results" in done.stdout
    assert "verdict: reproduced." in done.stdout


def _validate_base(workdir: Path, rows: list) -> None:
    """The base was pretrained once: one entry of the cache, equal files in all runs."""
    keys = [
        json.loads((folder / stage_cache.KEY_FILE).read_text())
        for folder in (workdir / "cache").iterdir()
        if folder.is_dir()
    ]
    names = sorted(key["folder"] for key in keys)
    assert names == ["00_tokenizer", "01_pretrain", *["02_sft"] * 6]
    metrics = [x.read_bytes() for x in workdir.glob("*/01_pretrain/metrics.jsonl")]
    assert len(metrics) == 6 and len(set(metrics)) == 1
    assert len(rows) == 6
    assert len({row["stages"]["pretrain"]["id"] for row in rows}) == 1
    assert len({row["stages"]["sft"]["id"] for row in rows}) == 6


def _run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
