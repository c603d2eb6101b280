"""Arrays of a signature are checked in tests, in every module that annotates some.

For all modules it took half of the time in which tests are collected.
"""

import re
import tomllib
from pathlib import Path

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from rlhfjax.algos.kl import sequence_kl

ROOT = Path(__file__).parent.parent
IMPORTS = re.compile(r"^from jaxtyping import", re.MULTILINE)


def checked() -> tuple[str, ...]:
    """Returns the packages and modules that pyproject.toml names to jaxtyping."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    options = project["tool"]["pytest"]["ini_options"]["addopts"]
    *names, checker = re.search(r"--jaxtyping-packages=(\S+)", options)[1].split(",")
    assert checker == "beartype.beartype"
    return tuple(names)


def module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def test_every_module_with_shapes_is_checked():
    annotated = {
        module(file)
        for file in (ROOT / "rlhfjax").rglob("*.py")
        if IMPORTS.search(file.read_text())
    }
    assert "rlhfjax.algos.kl" in annotated
    names = tuple(f"{name}." for name in checked())
    assert {m for m in annotated if not f"{m}.".startswith(names)} == set()


def test_a_wrong_shape_is_found():
    kl, mask = jnp.zeros((2, 3)), jnp.ones((2, 4))
    with pytest.raises(TypeCheckError, match="mask"):
        sequence_kl(kl, mask)
