"""Any bytes give a value or one of our errors, within 2 s and 500 MB; see the package."""

import os
import random
import signal
import time
import warnings

import pytest

from rlhfjax.errors import DataError
from tests.fuzz import inputs, watch
from tests.fuzz.explore import explore, give_examples, judge, recorded
from tests.fuzz.readers import READERS

# Set: random inputs for this number of seconds, over all readers. Not set: always the same inputs.
SECONDS = float(os.environ.get("RLHFJAX_FUZZ_SECONDS", "0"))
RECORDED = [(name, file.name) for name in READERS for file in recorded(name)]


@pytest.mark.fuzz
@pytest.mark.parametrize("name", READERS)
def test_any_bytes_give_a_value_or_one_of_our_errors(name, tmp_path):
    start = random.SystemRandom().randrange(2**32)
    found = explore(name, SECONDS / len(READERS) or None, start)
    lines = []
    for number, (finding, content) in enumerate(found):
        file = tmp_path / str(number)
        file.write_bytes(content)
        lines.append(f"{finding}\n    {content[:200]!r}")
        lines.append(f"    again: python -m tests.fuzz {name} --input={file}")
    assert not found, "\n".join([f"{len(found)} findings", *lines])


@pytest.mark.fuzz
@pytest.mark.parametrize("name, title", RECORDED)
def test_what_was_found_is_mended(name, title):
    (file,) = (file for file in recorded(name) if file.name == title)
    assert judge(name, file.read_bytes()) is None


# ------------------------------------------------------------------ what finds it


def _wrong(content: bytes) -> None:
    raise KeyError("x")


def _sleepless(content: bytes) -> None:
    while True:
        pass


def _slow(content: bytes) -> None:
    end = time.process_time() + watch.SECONDS * 1.5
    while time.process_time() < end:
        pass


def _large(content: bytes) -> None:
    bytearray(3 * watch.MEMORY)  # more than a test before has left free


def _large_and_told(content: bytes) -> None:
    try:
        _large(content)
    except MemoryError:
        raise DataError("x: too large") from None


def _noisy(content: bytes) -> None:
    for i in range(watch.WARNINGS + 1):
        warnings.warn(str(i), stacklevel=1)


def _two_lines(content: bytes) -> None:
    raise DataError("x:\ny")


class _Uncut(DataError):
    """An error that shows its whole message, whatever its length."""

    __str__ = Exception.__str__


def _long(content: bytes) -> None:
    raise _Uncut("x" * 2000)


def _refused(content: bytes) -> None:
    raise DataError("x:1: expected a JSON object, got int")


@pytest.fixture
def short(monkeypatch):
    """Limits of time that a test can wait for, and handlers as before."""
    monkeypatch.setattr(watch, "SECONDS", 0.05)
    monkeypatch.setattr(watch, "HANG", 0.2)
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGVTALRM, signal.SIGALRM, signal.SIGPROF)
    }
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "call, kind",
    [
        (_wrong, "KeyError"),
        (_sleepless, "Hang"),
        (_slow, "slow"),
        (_large, "memory"),
        (_large_and_told, "memory"),
        (_noisy, "warnings"),
        (_two_lines, "message"),
        (_long, "message"),
    ],
)
def test_each_kind_of_mistake_is_a_finding(call, kind, short):
    finding = watch.judge(call, b"")
    assert finding is not None and finding.kind == kind


def test_a_value_and_an_error_of_ours_are_no_finding(short):
    assert watch.judge(len, b"") is None
    assert watch.judge(_refused, b"") is None
    assert watch.judge(_wrong, b"", (KeyError,)) is None


@pytest.mark.fuzz
def test_a_process_that_dies_is_a_finding_with_its_input():
    found = explore("planted_crash")
    assert [one.finding.kind for one in found] == ["crash"]
    assert b"die" in found[0].content


def test_bad_inputs_are_of_every_kind():
    """Whole documents, cut ones, other encodings, and values that readers mistake."""
    made = _examples(inputs.json_bytes([b'{"a": [1, {"b": "x"}]}']), 400)
    kinds = {
        "whole": b'{"a": [1, {"b": ',
        "nan": b"NaN",
        "deep": b"[" * 1000,
        "many digits": b"9" * 400,
        "surrogate": b"\\ud800",
        "gzip": b"\x1f\x8b",
        "UTF-16": b"\xff\xfe",
    }
    for kind, part in kinds.items():
        assert any(part in content for content in made), kind
    seed = bytes(range(64))
    damaged = _examples(inputs.binary_bytes([seed]), 200)
    assert any(seed.startswith(content) for content in damaged)
    assert any(len(content) == len(seed) != content.find(seed) for content in damaged)


def _examples(strategy, count):
    made = []
    give_examples(strategy, made.append, count)
    return made
