"""Damaged files of a workdir: one line that names the file, the place, and what to do."""

import gzip
import json
import os

import pytest

from rlhfjax import claims, clock, recipe, workdirs
from rlhfjax.errors import DataError
from rlhfjax.metrics import METRICS_FILE, TIMING_FILE, Writer, read_rows
from rlhfjax.report.workdir import read_run

FILES = {
    "config.json": {"stage": "reward", "steps": 4},
    "done.json": {"stage": "run", "steps": 4, "seconds": 1.5, "metrics": {"a/x": 1.0}},
    "goodput.json": {"at": 9.0, "starts": 1, "goodput": 0.5, "seconds": {"step": 1.0}},
    "calibration.json": {
        "confidence": [0.6],
        "accuracy": [0.5],
        "count": [3],
        "ece": 0.1,
    },
}
METRICS = '{"step": 1, "a/x": 1.0}\n{"step": 2, "a/x": null}\n{"step": 3, "a/x": 3.0}\n'


@pytest.fixture
def workdir(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / METRICS_FILE).write_text(METRICS)
    (tmp_path / TIMING_FILE).write_text('{"step": 1, "a/tokens_per_second": 5.0}\n')
    return tmp_path


def fails(call, error=DataError):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


NOT_JSON = {
    "empty": b"",
    "half": b'{"stage": "rew',
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "NaN": b'{"metrics": {"a": NaN}}',
    "400 digits": b'{"metrics": {"a": %s}}' % (b"1" * 400),
    "5000 digits": b'{"at": %s}' % (b"1" * 5000),
    "200,000 brackets": b"[" * 200_000,
    "UTF-16": '{"stage": "a"}'.encode("utf-16"),
    "gzip": gzip.compress(b'{"stage": "a"}', mtime=0),
    "not UTF-8": b'{"stage": "\xff"}',
    "lone surrogate": b'{"stage": "\\ud800"}',
    "zero bytes": b"\0" * 50,
    "no key": b"{}",
}


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_with_its_remedy(workdir, name, content):
    (workdir / name).write_bytes(content)
    message = fails(lambda: read_run(workdir))
    assert message.startswith(f"{workdir / name}: ")
    assert "; restore it from a copy, or " in message


WRONG = [
    ("done.json", "steps", [-1, True, "4", 1e300, 10**30, None, 1.5]),
    ("done.json", "seconds", [-1, True, "4", 1e300, None, [], {}]),
    ("done.json", "metrics", [None, [], 3, {"a": "x"}, {"a": True}, {"a": []}]),
    ("done.json", "stage", [None, 3, []]),
    ("goodput.json", "at", [-1, True, "4", 1e300, None]),
    ("goodput.json", "starts", [0, True, "4", 1e300, None]),
    ("goodput.json", "goodput", [-1, 2, "4", None]),
    ("goodput.json", "seconds", [None, [], {"step": -1}, {"step": "x"}, {"x": 1e300}]),
    ("calibration.json", "count", [[-1], [True], ["x"], 3, [3, 4]]),
    ("calibration.json", "confidence", [[2], [None], []]),
    ("config.json", "stage", [None, 3, True, []]),
    ("config.json", "steps", [-1, True, "4", 1e300, None]),
]


@pytest.mark.parametrize(("name", "key", "values"), WRONG)
def test_a_value_of_another_type_or_range_is_named(workdir, name, key, values):
    for value in values:
        (workdir / name).write_text(json.dumps(FILES[name] | {key: value}))
        message = fails(lambda: read_run(workdir))
        place = f"{workdir / name}: "
        assert message.startswith(place)
        assert message[len(place) :].startswith((key, "confidence, accuracy")), message


@pytest.mark.parametrize("name", [*FILES, METRICS_FILE, TIMING_FILE])
def test_what_is_no_file_is_named_at_once(workdir, name):
    path = workdir / name

    def pipe():
        os.mkfifo(path)

    def loop():
        path.symlink_to(name)

    def device():
        path.symlink_to("/dev/zero")

    for make in (path.mkdir, pipe, loop, device):
        path.rmdir() if path.is_dir() else path.unlink()
        make()
        assert fails(lambda: read_run(workdir)).startswith(f"{path}: ")


NO_CONFIG = [
    {"stages": 3},
    {"stages": None},
    {"stages": [3]},
    {"stages": {"a": {}}},
    {"stages": ["a"], "a": 7},
    {"stages": ["a"], "a": None},
    {"stages": ["a"], "a": {"stage": None}},
    {"stages": ["../a"]},
    {"stages": [""]},
    {"stages": ["a" * 300]},
    {"stages": ["a\0"]},
    {"stage": None},
    {"stage": 7},
    {"steps": 4},
]


@pytest.mark.parametrize("config", NO_CONFIG)
def test_a_config_that_is_none_is_named(workdir, config):
    (workdir / "config.json").write_text(json.dumps(config))
    now = {"stage": "reward", "steps": 4}
    readers = (read_run, lambda w: recipe.evaluate(None, w))
    for read in (*readers, lambda w: claims.claim(w, now)):
        message = fails(lambda read=read: read(workdir))
        assert message.startswith(f"{workdir}/config.json: ")
        assert message.endswith(workdirs.RESTORE)


def test_a_damaged_file_stops_a_run_before_it_computes(workdir):
    (workdir / "goodput.json").write_text("{")
    message = fails(lambda: clock.Clock(workdir))
    assert message.endswith("or delete it to count the wall time from this start on")
    (workdir / "done.json").write_text('{"metrics": 3}')
    for read in (recipe.read_done, lambda w: recipe.finished({"stage": "reward"}, w)):
        message = fails(lambda read=read: read(workdir))
        assert message.endswith("or delete it to run the stage again")


# ------------------------------------------------------------------ lines


ENDS = {
    "half a line": b'{"step": 4, "a/',
    "zero bytes": b"\0" * 4096,
    "half a line and zero bytes": b'{"step": 4' + b"\0" * 100,
    "zero bytes and a line's end": b"\0\0\n",
    "half a character": '{"step": 4, "é'.encode()[:-1],
    "nothing": b"",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("name", [METRICS_FILE, TIMING_FILE])
def test_a_broken_last_line_is_removed_on_resume(workdir, name, end):
    path = workdir / name
    path.write_bytes(METRICS.encode() + end)
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
    with Writer(workdir, 2, tensorboard=False) as writer:
        write = writer.write if name == METRICS_FILE else writer.timing
        write(3, {"a/x": 7.0})
    lines = METRICS.splitlines()[:2]
    assert path.read_text().splitlines() == [*lines, '{"step": 3, "a/x": 7.0}']


LINES = [
    "{",
    "[3]",
    "\0\0\0",
    '{"a/x": 1.0}',
    '{"step": null}',
    '{"step": "1"}',
    '{"step": true}',
    '{"step": -1}',
    '{"step": 1e300}',
    '{"step": 1, "a/x": "1"}',
    '{"step": 1, "a/x": true}',
    '{"step": 1, "a/x": []}',
    '{"step": 1, "a/x": NaN}',
]


@pytest.mark.parametrize("line", LINES)
def test_a_broken_middle_line_is_reported_on_resume_and_in_the_report(workdir, line):
    path = workdir / METRICS_FILE
    before = f"{METRICS}{line}\n{METRICS}"
    path.write_text(before)
    for read in (read_run, lambda w: Writer(w, 2, tensorboard=False)):
        message = fails(lambda read=read: read(workdir))
        assert message.startswith(f"{path}:4: ")
        assert message.endswith("; restore the file from a copy, or delete this line")
    assert path.read_text() == before
