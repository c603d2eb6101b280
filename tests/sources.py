"""Source files as syntax trees."""

import ast
import functools
import gc
from pathlib import Path


@functools.cache
def tree(path: Path) -> ast.Module:
    """Returns the syntax tree of a file.

    The garbage collector is off meanwhile. A finalizer that reports an exception makes a syntax
    tree too, and CPython 3.11 then fails with "AST constructor recursion depth mismatch".
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        if enabled:
            gc.enable()
