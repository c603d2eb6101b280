"""What a test needs and a machine may lack.

Without it a contributor's test is skipped. With CI=true, which CI services set, a test whose
package is missing runs, and fails: nobody reads what was skipped.
"""

import importlib.util
import os
import shutil

import pytest


def needs(*packages: str, extra: str = "", install: str = "") -> pytest.MarkDecorator:
    """Returns the mark of tests that need packages.

    Args:
      packages: as they are imported.
      extra: the extra of rlhfjax that has them.
      install: the command that installs them, where no extra does.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    command = install or f"pip install -e '.[{extra}]'"
    reason = f"{', '.join(missing)} not installed: {command}"
    return pytest.mark.skipif(bool(missing) and not in_ci(), reason=reason)


def needs_program(name: str) -> None:
    """Skips the test unless a program is in PATH."""
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not in PATH")


def in_ci() -> bool:
    """Whether a CI service runs the tests."""
    return os.environ.get("CI") == "true"
