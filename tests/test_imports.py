"""No module of rlhfjax imports itself through others, not even where it does so late."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import rlhfjax
from tests.sources import tree

ROOT = Path(rlhfjax.__file__).parent
# They import what the user or an extra has.
FOREIGN = {"rlhfjax.data.hf_arrow", "rlhfjax.trackers", "rlhfjax.user_code"}


def modules(root: Path) -> dict[str, Path]:
    """Returns the files of a package's modules by their full names."""
    files = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        files[".".join(parts)] = path
    return files


def run_time_nodes(node: ast.AST) -> list[ast.AST]:
    """Returns the nodes of a tree without the bodies of `if TYPE_CHECKING`, which never run."""
    nodes = [node]
    never = []
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        never = node.body
    for child in ast.iter_child_nodes(node):
        if child not in never:
            nodes += run_time_nodes(child)
    return nodes


def late_imports(path: Path) -> list[ast.expr]:
    """Returns the first arguments of a file's calls of import_module and __import__."""
    late = ("import_module", "__import__")
    calls = [node for node in run_time_nodes(tree(path)) if isinstance(node, ast.Call)]
    return [call.args[0] for call in calls if ast.unparse(call.func).endswith(late)]


def beginning(name: ast.expr) -> tuple[str, bool]:
    """Returns a string literal, or what an f-string begins with, and whether that is all of it."""
    if isinstance(name, ast.JoinedStr):
        return beginning(name.values[0])[0], False
    known = isinstance(name, ast.Constant) and isinstance(name.value, str)
    return (name.value, True) if known else ("", False)


def imports(name: str, files: dict[str, Path]) -> set[str]:
    """Returns the modules among `files` that the module `name` imports, whenever it does so.

    A module's own packages do not count, which Python has begun to import before the module.
    """
    found = set()
    for node in run_time_nodes(tree(files[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{name}: a relative import, which this test does not follow"
            )
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.add(module if module in files else node.module)
    for argument in late_imports(files[name]):
        text, whole = beginning(argument)
        if whole:
            found.add(text)
        elif text:
            found |= {module for module in files if module.startswith(text)}
    return found & files.keys()


def circles(root: Path) -> list[list[str]]:
    """Returns the strongly connected components of more than one module."""
    files = modules(root)
    graph = {name: imports(name, files) for name in files}
    reached = {name: reach(name, graph) for name in graph}
    found = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in graph
        if name in reached[name]
    }
    return sorted(map(list, found))


def reach(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Returns what can be reached by one import or more."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


def test_no_modules_import_each_other():
    assert circles(ROOT) == []


def test_only_what_lies_outside_of_the_package_is_imported_by_a_name_that_cannot_be_read():
    unread = {
        name
        for name, path in modules(ROOT).items()
        for argument in late_imports(path)
        if not beginning(argument)[0].startswith("rlhfjax.")
    }
    assert unread == FOREIGN


@pytest.mark.parametrize(
    "text",
    [
        "from toy.deep import b",
        "from toy.deep.b import f",
        "import toy.deep.b",
        "def f():\n    from toy.deep import b",
        'import importlib\ndef f():\n    importlib.import_module("toy.deep.b")',
        'from importlib import import_module\ndef f(x):\n    import_module(f"toy.deep.{x}")',
        "if TYPE_CHECKING:\n    import os\nelse:\n    import toy.deep.b",
    ],
)
def test_every_way_to_import_is_seen(tmp_path, text):
    package(tmp_path, a=text, b="from toy import c", c="import toy.a")
    assert circles(tmp_path / "toy") == [["toy.a", "toy.c", "toy.deep.b"]]


@pytest.mark.parametrize(
    "text",
    [
        "import os",
        "from toy import deep",
        'import importlib\nimportlib.import_module("json")',
        "import typing\nif typing.TYPE_CHECKING:\n    import toy.deep.b",
    ],
)
def test_what_is_no_circle_is_none(tmp_path, text):
    package(tmp_path, a=text, b="from toy import c", c="import toy.a")
    assert circles(tmp_path / "toy") == []


def package(folder: Path, *, a: str, b: str, c: str) -> None:
    """Writes a package `toy` of the modules a, c and deep.b."""
    (folder / "toy" / "deep").mkdir(parents=True)
    texts = {"__init__": "", "a": a, "c": c, "deep/__init__": "", "deep/b": b}
    for name, text in texts.items():
        (folder / "toy" / f"{name}.py").write_text(text)


# What a start must not import before it is needed: modules that take long, by the first module that
# a start imports. The starts are in one process, each importing more than the one before it.
LATE = {
    "rlhfjax.main": ["jax", "numpy", "pydantic", "rich", "ml_collections"],
    "rlhfjax.chat_terminal": [
        *(
            "grain",
            "pyarrow",
            "rlhfjax.rewards",
            "rlhfjax.stages",
            "rlhfjax.data.loader",
        ),
        *("rlhfjax.data.sources", "rlhfjax.train", "rlhfjax.report"),
    ],
    "rlhfjax.recipe": [
        *("tensorflow_datasets", "jax.experimental.pallas", "matplotlib", "scipy"),
        *(
            "pandas",
            "tensorboardX",
            "wandb",
            "gguf",
            "datasets",
            "gcsfs",
        ),
        *("rlhfjax.plan.compiler", "rlhfjax.corpus", "rlhfjax.sweep"),
    ],
}


def test_a_start_imports_nothing_heavy_that_it_does_not_need():
    code = f"""
import importlib, json, sys
late, found = {LATE!r}, dict()
for start in late:
    importlib.import_module(start)
    rest = list(late)[list(late).index(start):]
    found[start] = [name for key in rest for name in late[key] if name in sys.modules]
print(json.dumps(found))
"""
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == {start: [] for start in LATE}
