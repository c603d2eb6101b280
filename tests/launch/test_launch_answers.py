"""What launchers read from programs and workers: damaged answers count as none, or are one line."""

import json
from types import SimpleNamespace

import pytest

from launch import shell, tpu_worker

STATUS = {
    "generation": "g",
    "id": "i",
    "run_id": "r",
    "phase": "running",
    "pid": 7,
    "boot": "b",
    "poll": 1.0,
    "offset": 0,
    "since": 5.0,
}


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 200_000, "\0"])
def test_an_answer_that_is_no_object_is_one_line(text):
    with pytest.raises(shell.LaunchError, match=r"^kubectl: its answer is .*$"):
        shell.parsed(text, "kubectl")


@pytest.mark.parametrize("value", [None, 3, True, []])
def test_a_field_of_another_type_is_named(value):
    with pytest.raises(shell.LaunchError, match=r"^gcloud: state=.*; expected str$"):
        shell.field({"state": value}, "state", str, "gcloud")


DAMAGED = [
    *("", "{", "[]", "3", "[" * 200_000, '{"phase": "running"}'),
    *(
        json.dumps(STATUS | {name: value})
        for name in STATUS
        for value in (None, True, [], -1)
    ),
    *(json.dumps(STATUS | {"pid": pid}) for pid in (0, 1, 1.5, "7")),
    json.dumps(STATUS | {"phase": "ended"}),
    json.dumps(STATUS | {"child": -1}),
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_status_counts_as_none(text, tmp_path):
    file = tmp_path / "status.json"
    place = SimpleNamespace(status=str(file))
    file.write_text(json.dumps(STATUS))
    assert tpu_worker.read_status(place) == STATUS
    file.write_text(text)
    assert tpu_worker.read_status(place) == {}
    assert tpu_worker.parse(text) == {}
