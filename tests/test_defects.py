"""The table of known defects: complete, and up to date with the code. To put them back.

Python -m tests.defects.
"""

import ast
import re
from pathlib import Path

import pytest

from tests import defects, sources

HERE = Path(__file__).parent
LINES = 43  # of the list of known defects of other code, and of our own


def pitfall_tests() -> set[str]:
    """file.py::name of every test of a known defect."""
    found = set()
    for path in HERE.rglob("test_*.py"):
        for node in ast.walk(sources.tree(path)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith(
                "test_pitfall_"
            ):
                found.add(f"{path.relative_to(HERE)}::{node.name}")
    return found


def test_every_test_of_a_pitfall_has_a_defect_that_it_notices():
    named = {name for defect in defects.DEFECTS for name in defect.tests}
    assert pitfall_tests() - named == set()
    assert {
        name for name in named if "::test_pitfall_" in name
    } - pitfall_tests() == set()


def test_every_pitfall_has_a_test_of_its_own():
    tested = {
        int(re.search(r"::test_pitfall_(\d\d)_", name)[1]) for name in pitfall_tests()
    }
    assert tested | set(defects.NOT_YET) == set(range(1, LINES + 1))
    assert tested & set(defects.NOT_YET) == set()
    assert {defect.pitfall for defect in defects.DEFECTS} == tested


@pytest.mark.parametrize(
    "defect", defects.DEFECTS, ids=lambda d: f"{d.pitfall:02d}-{d.file}"
)
def test_every_defect_can_still_be_put_back(defect):
    """Its text stands in the code once, and what comes of it is Python."""
    ast.parse(defects.replaced(defect, HERE.parent))
    assert defect.tests


def test_a_text_that_is_gone_is_an_error():
    with pytest.raises(ValueError, match="has 0 x 'no such text'"):
        defects.replaced(
            defects.Defect(1, "train.py", "no such text", "", ()), HERE.parent
        )
