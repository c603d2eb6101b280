"""The date and time that chat templates write: the present, or that of a workdir's first start.

A template such as Llama 3.1's writes the date into every prompt. A run that is resumed tomorrow has
to see the same tokens, so `recipe` pins the time at which a workdir was first started.
"""

import contextlib
import datetime
from collections.abc import Iterator

_pinned: list[datetime.datetime] = []  # the innermost is the last
_records: list[dict[str, str]] = []  # of `recorded`, the innermost is the last


def now() -> datetime.datetime:
    """Returns the time for chat templates, in local time, to the second."""
    return _pinned[-1] if _pinned else datetime.datetime.now().replace(microsecond=0)


def written(time: datetime.datetime, form: str) -> str:
    """Returns a time in a form of strftime, which a template writes."""
    text = time.strftime(form)
    for record in _records:
        record[form] = text
    return text


def is_now(record: dict[str, str]) -> bool:
    """Returns whether templates would write today what a record of `recorded` says."""
    return all(now().strftime(form) == text for form, text in record.items())


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, str]]:
    """Gives what templates write meanwhile: form -> text."""
    record: dict[str, str] = {}
    _records.append(record)
    try:
        yield record
    finally:
        _records.pop()


@contextlib.contextmanager
def pinned(time: datetime.datetime) -> Iterator[None]:
    """Makes `now` return a time. Templates that are compiled meanwhile keep it."""
    _pinned.append(time)
    try:
        yield
    finally:
        _pinned.pop()
