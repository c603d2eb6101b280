"""Command-line values that several benchmarks take."""

import argparse
from collections.abc import Collection
from pathlib import Path


def names(
    parser: argparse.ArgumentParser, flag: str, text: str, known: Collection[str]
) -> list[str]:
    """Returns the comma-separated names. Ends the program with one line if one is unknown."""
    chosen = text.split(",")
    for name in chosen:
        if name not in known:
            parser.error(f"--{flag}={name}: accepted are {', '.join(known)}")
    return chosen


def interpreter(parser: argparse.ArgumentParser, flag: str, text: str) -> str:
    """Returns the path of a Python, "~" expanded; "" stays. Ends the program if it is no file."""
    if not text:
        return ""
    path = Path(text).expanduser()
    if not path.is_file():
        parser.error(f"--{flag}={text}: no such file; expected a Python interpreter")
    return str(path)
