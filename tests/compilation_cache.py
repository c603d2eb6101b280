"""The persistent compilation cache of the tests: what one run has compiled, the next one loads.

`RLHFJAX_TEST_CACHE=off pytest` compiles everything anew; `RLHFJAX_TEST_CACHE=FOLDER` keeps the
programs elsewhere.
"""

import hashlib
import os
import shutil
from importlib.metadata import version
from pathlib import Path

VARIABLE = "RLHFJAX_TEST_CACHE"
LIMIT = 4 * 2**30  # bytes; a fuller folder is emptied


def use() -> None:
    """Sets jax's environment variables, which processes that a test starts inherit.

    Call it before jax is imported.
    """
    # All of them: the many that take milliseconds take most of the time together.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if os.environ.get(VARIABLE) == "off":
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    else:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder()))


def folder() -> Path:
    """The folder of this machine's programs.

    It exists, and is emptied when it has grown above LIMIT.
    """
    root = Path(os.environ.get(VARIABLE) or user_cache() / "rlhfjax" / "tests")
    path = root / key()
    if path.exists() and size(path) > LIMIT:
        shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True, exist_ok=True)
    return path


def user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def key() -> str:
    """jaxlib's version and a hash of the processor's instruction sets.

    Machine code of another one may not run.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return (
        f"jaxlib-{version('jaxlib')}-{hashlib.sha256(flags.encode()).hexdigest()[:12]}"
    )


def size(path: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(entry.stat().st_size for entry in os.scandir(path))


if __name__ == "__main__":
    print(folder())
