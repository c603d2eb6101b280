"""Measures how much a reader has to unpack per line: AST nodes per line of code.

    python -m tests.density [FOLDER]

prints the mean, the densest files and the number of lines over 100 columns of a folder (default:
rlhfjax). It exits with 1 if the mean or the density of a file is above its limit. A line of code is
one that is not blank, a comment or a docstring. Type annotations are not counted.
"""

import argparse
import ast
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

MEAN_LIMIT = 5.5
FILE_LIMIT = 7.5
SHORT = 20  # lines of code; files up to this length have no limit of their own
COLUMNS = 100
DENSEST = 5  # files that are printed whether they are above the limit or not


class Measure(NamedTuple):
    """What was counted in one file."""

    path: pathlib.Path
    nodes: int
    code_lines: int
    wide_lines: int

    @property
    def density(self) -> float:
        return self.nodes / max(self.code_lines, 1)

    @property
    def is_too_dense(self) -> bool:
        return self.code_lines > SHORT and self.density > FILE_LIMIT


def measure(path: pathlib.Path) -> Measure:
    """Counts the nodes, the lines of code and the lines over 100 columns of a file."""
    text = path.read_text()
    lines = text.splitlines()
    tree = ast.parse(text)
    docstring_lines = set(_docstring_lines(tree))
    code_lines = 0
    for number, line in enumerate(lines, start=1):
        stripped = line.strip()
        is_comment = not stripped or stripped.startswith("#")
        code_lines += not is_comment and number not in docstring_lines
    return Measure(
        path=path,
        nodes=sum(1 for _ in _counted_nodes(tree)),
        code_lines=code_lines,
        wide_lines=sum(len(line) > COLUMNS for line in lines),
    )


def _docstring_lines(tree: ast.AST) -> Iterator[int]:
    """Yields the line numbers of docstrings, including those below a field or a constant."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str):
            yield from range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _counted_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yields a node and its descendants, without annotations and without Load, Store and Del."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.expr_context) or not isinstance(child, ast.AST):
                continue
            yield from _counted_nodes(child)


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; returns the exit code."""
    parser = argparse.ArgumentParser(description="AST nodes per line of code")
    parser.add_argument("folder", nargs="?", default="rlhfjax", type=pathlib.Path)
    folder = parser.parse_args(arguments).folder
    measures = [measure(path) for path in sorted(folder.rglob("*.py"))]
    nodes = sum(file.nodes for file in measures)
    code_lines = sum(file.code_lines for file in measures)
    wide_lines = sum(file.wide_lines for file in measures)
    mean = nodes / max(code_lines, 1)
    densest = sorted(measures, key=lambda file: file.density, reverse=True)
    too_dense = [file for file in densest if file.is_too_dense]
    long_files = [file for file in densest if file.code_lines > SHORT]
    for file in long_files[: max(DENSEST, len(too_dense))]:
        remark = f" (limit {FILE_LIMIT})" if file.is_too_dense else ""
        print(f"{file.density:5.2f}  {file.path}{remark}")
    print(f"{mean:5.2f}  mean over {code_lines} lines of code (limit {MEAN_LIMIT})")
    print(f"{nodes} nodes, {wide_lines} lines over {COLUMNS} columns")
    return int(mean > MEAN_LIMIT or bool(too_dense))


if __name__ == "__main__":
    sys.exit(main())
