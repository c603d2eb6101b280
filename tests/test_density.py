"""`python -m tests.density`, which CI runs: nodes per line of code, counted by hand."""

import pathlib

import pytest

from tests import density

SOURCE = '''"""A docstring
of two lines."""

# A comment.
x: dict[str, int] = {}
"""A docstring below a variable."""


def f(y: int) -> int:
    return y + 1
'''

# Module; Expr and Constant twice; AnnAssign, Name, Dict; FunctionDef, arguments, arg; Return,
# BinOp, Name, Add, Constant.
NODES = 1 + 4 + 3 + 3 + 5


def test_a_file_is_measured(tmp_path: pathlib.Path):
    path = tmp_path / "a.py"
    path.write_text(SOURCE + "#" * 101 + "\n")
    assert density.measure(path) == (path, NODES, 3, 1)


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("x = 1\n" * 30, 0),
        ("x = [1, 2, 3, 4, 5]\n" * 30, 1),  # 8 nodes per line
        ("x = [1, 2, 3, 4, 5]\n" * 20 + "x = 1\n" * 100, 0),  # 3.8 nodes per line
    ],
)
def test_the_exit_code_says_whether_a_limit_is_passed(tmp_path, capsys, source, code):
    (tmp_path / "a.py").write_text(source)
    assert density.main([str(tmp_path)]) == code
    assert "nodes, 0 lines over 100 columns" in capsys.readouterr().out
