"""Every second of a stage is in one part, whatever happened to it, and goodput is what is left for
training.
"""

import json

import pytest

from rlhfjax import clock as clocks
from rlhfjax.clock import Clock
from rlhfjax.config import write_json


@pytest.fixture
def at(monkeypatch):
    """Sets the time of day; the process began at 100."""
    now = [100.0]
    monkeypatch.setattr(clocks.time, "time", lambda: now[0])
    monkeypatch.setattr(clocks.rlhfjax, "BEGAN", 100.0)
    monkeypatch.setattr(Clock, "_process_start_counted", False)
    monkeypatch.setattr(
        clocks.jax.monitoring,
        "register_event_duration_secs_listener",
        lambda listen: None,
    )
    return lambda seconds: now.__setitem__(0, seconds)


def first_start(folder, at) -> Clock:
    """3 s of imports, 2 s of building, 1 s restoring, 1 s of data, a step of 10 s with 6 s of
    compiling, 3 s saved.
    """
    at(103)
    clock = Clock(folder)
    at(105)
    with clock.part("restore"):
        at(106)
    clock.end_build()
    with clock.part("data"):
        at(107)
    with clock.part("step"):
        clocks._on_duration("/jax/core/compile/backend_compile_duration", 6.0)
        clocks._on_duration(
            "/jax/core/compile/jaxpr_trace_duration", 50.0
        )  # may hold others of its kind: not counted
        at(117)
    with clock.part("checkpoint"):
        at(120)
    clock.save()
    return clock


def test_every_second_is_in_one_part(tmp_path, at):
    clock = first_start(tmp_path, at)
    wanted = {
        "imports": 3,
        "build": 2,
        "restore": 1,
        "data": 1,
        "step": 4,
        "compile": 6,
        "checkpoint": 3,
    }
    assert {name: value for name, value in clock.seconds.items() if value} == wanted
    assert clock.goodput() == 4 / 20
    assert clock.describe_start().startswith(
        "started in 20.0 s: compile 6.0 s, step 4.0 s, "
    )


def test_what_comes_after_the_last_checkpoint_of_a_start_that_was_cut_off_is_lost(
    tmp_path, at
):
    """The first start trains 30 s more and is killed.

    The second comes at 200 and trains for 20 s.
    """
    clock = first_start(tmp_path, at)
    with clock.part("step"):
        at(150)
    at(200)
    again = Clock(tmp_path)  # of a process that has had a clock: nothing is imported
    again.end_build()
    with again.part("step"):
        at(220)
    assert (
        again.starts == 2
        and again.seconds["restart"] == 80
        and again.seconds["step"] == 24
    )
    assert sum(again.seconds.values()) == 220 - 100
    assert again.summary()["goodput"] == 24 / 120
    assert again.worked() == 20 + 20  # without the 80 s between the two starts
    again.save()
    assert json.loads((tmp_path / clocks.FILE).read_text())["goodput"] == 24 / 120


def test_only_the_first_host_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(clocks.hosts, "first", lambda: False)
    write_json(tmp_path / "x.json", {})
    assert not list(tmp_path.iterdir())
