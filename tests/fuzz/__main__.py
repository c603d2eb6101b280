"""Prints what readers get wrong: python -m tests.fuzz [READER...] [--seconds=60] [--input=FILE]"""

import argparse
import random
import sys
import time
from pathlib import Path

from tests.fuzz.explore import explore, judge
from tests.fuzz.readers import READERS


def main() -> int:
    """Prints findings and returns the exit code: 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("readers", nargs="*", metavar="READER")
    parser.add_argument("--seconds", type=float, help="time for all readers")
    parser.add_argument("--input", type=Path, help="a file with one input")
    parser.add_argument("--save", type=Path, help="folder for the inputs that fail")
    options = parser.parse_args()
    names = options.readers or list(READERS)
    if options.input:
        finding = judge(names[0], options.input.read_bytes())
        print(finding or "nothing")
        return int(finding is not None)
    count = 0
    for name in names:
        seconds = options.seconds and options.seconds / len(names)
        start = time.monotonic()
        found = explore(name, seconds, random.randrange(2**32))
        print(f"== {name}: {len(found)} ({time.monotonic() - start:.1f} s)", flush=True)
        for number, (finding, content) in enumerate(found):
            shown = content if len(content) <= 200 else content[:200] + b"..."
            print(f"{name}: {finding}\n    {shown!r}", flush=True)
            if options.save:
                (options.save / name).mkdir(parents=True, exist_ok=True)
                (options.save / name / str(number)).write_bytes(content)
        count += len(found)
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
