"""The tables of forms in docs/data.md and README: every row in them is read as they say."""

import json
import re

import pytest

from rlhfjax.data.forms import FORMS, Reader
from rlhfjax.data.rows import COLUMNS
from tests.doc_commands import ROOT

DATA = (ROOT / "docs" / "data.md").read_text()


def table(text, heading):
    """Returns the cells of the rows of the table whose first heading is given."""
    _, _, rest = text.partition(f"| {heading} |")
    lines = rest.splitlines()[2:]
    end = next(i for i, line in enumerate(lines) if not line.startswith("|"))
    return [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[:end]
    ]


def example(cell):
    """Returns the row that a cell begins with, None for words and for a row that is cut."""
    found = re.match(r"`(\{.*?\})`(?:,|$)", cell)
    return json.loads(found[1]) if found and "…" not in found[1] else None


def quoted(text):
    return tuple(re.findall(r"`([^`]+)`", text))


FORM_ROWS = table(DATA, "form")


def test_the_tables_have_every_form_and_kind():
    assert {name for row in FORM_ROWS for name in quoted(row[0])} == set(FORMS)
    assert {quoted(row[0])[0] for row in table(DATA, "kind")} == set(COLUMNS)


@pytest.mark.parametrize("cells", FORM_ROWS, ids=lambda cells: cells[0])
def test_a_form_has_the_columns_and_the_kind_that_docs_say(cells):
    names, columns, kind, row = cells
    needed, _, optional = columns.partition(";")
    for name in quoted(names):
        form = FORMS[name]
        assert form.kind == quoted(kind)[0]
        if name != "ranking":
            assert quoted(needed)[: len(form.columns)] == form.columns
            extra = quoted(optional)
            if extra:
                assert extra == form.optional
    if (raw := example(row)) is not None:
        read = Reader(None, {})
        read(raw)
        assert read.form in quoted(names)


def test_most_forms_have_an_example():
    assert sum(example(cells[-1]) is not None for cells in FORM_ROWS) >= 13


def test_rows_of_the_readme_are_read():
    rows = table((ROOT / "README.md").read_text(), "rows")
    read = 0
    for name, cell, _ in rows:
        if (raw := example(cell)) is not None:
            reader = Reader(None, {})
            reader(raw)
            assert reader.form, name
            read += 1
    assert read >= len(rows) - 1
