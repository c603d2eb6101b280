"""The table of readers: what each reads, and good inputs that bad ones are made from."""

from tests.fuzz.readers import (
    answers,
    corpus,
    foreign,
    formats,
    launchers,
    ours,
    planted,
    rows,
    words,
)
from tests.fuzz.readers.table import Reader

READERS: dict[str, Reader] = {
    name: reader
    for module in (
        ours,
        rows,
        corpus,
        formats,
        foreign,
        words,
        launchers,
        answers,
    )
    for name, reader in module.TABLE.items()
}


def find(name: str) -> Reader:
    """Returns a reader, or the one that tests planted."""
    return READERS.get(name) or planted.TABLE[name]
