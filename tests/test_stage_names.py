"""What works for any stage names none: it goes by what a stage says of itself, or by its files."""

import ast
import re
from pathlib import Path

import pytest

import rlhfjax
from rlhfjax import stages
from tests.sources import tree

ROOT = Path(rlhfjax.__file__).parent
# Words that are stages' names as well, by file.
OTHER_MEANINGS = {
    "report/rollouts.py": {"reward"},  # a number per token
    "report/sweep.html": {"group"},  # runs that differ by their seeds alone
    "report/sweep.py": {"group"},
    "report/tables.py": {"reward"},  # a metric
    "recipe.py": {"tokenizer"},  # an option
    "references.py": {
        "feedback",
        "tokenizer",
    },  # options
}


def named(path: Path, known: set[str]) -> set[str]:
    """Returns the stages that a Python file or a template names: in strings that are such a name,
    and by importing their modules. A class of a style sheet is no such name."""
    if path.suffix == ".html":
        text = re.sub(r'class="[^"]*"', "", path.read_text())
        return known & set(re.findall(r"""["'](\w+)["']""", text))
    words = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant):
            words.add(node.value)
        if isinstance(node, ast.ImportFrom) and node.module == "rlhfjax.stages":
            words |= {alias.name for alias in node.names}
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        words |= {
            name.split(".")[2] for name in modules if name.startswith("rlhfjax.stages.")
        }
    return known & words


PARTS = (
    "footprint.py",
    "origins.py",
    "recipe.py",
    "references.py",
    "report",
    "roles.py",
    "strategy.py",
    "train.py",
)


@pytest.mark.parametrize("part", PARTS)
def test_it_names_no_stage(part):
    place = ROOT / part
    files = (
        [place] if place.is_file() else [*place.rglob("*.py"), *place.rglob("*.html")]
    )
    known = set(stages.names())
    found = {str(path.relative_to(ROOT)): named(path, known) for path in files}
    assert {path: names for path, names in found.items() if names} == {
        path: names for path, names in OTHER_MEANINGS.items() if path in found
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", 'run.of_kind("ppo")'),
        ("a.py", 'TABLE = {"ppo": 1}'),
        ("a.py", "from rlhfjax.stages import ppo"),
        ("a.py", "from rlhfjax.stages.ppo import Config"),
        ("a.py", "import rlhfjax.stages.ppo"),
        ("a.html", "{% if run.of_kind('ppo') %}PPO{% endif %}"),
    ],
)
def test_every_way_to_name_a_stage_is_seen(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert named(tmp_path / name, {"ppo", "sft"}) == {"ppo"}


def test_a_class_of_a_style_sheet_is_no_name(tmp_path):
    text = """<td class="sft ppo">{{ run["sft"] }}</td>"""
    (tmp_path / "a.html").write_text(text)
    assert named(tmp_path / "a.html", {"ppo", "sft"}) == {"sft"}


def test_prose_is_no_name(tmp_path):
    text = '"""Draws ppo."""\nppo = "a ppo stage"\nfrom rlhfjax.stages import stage_config\n'
    (tmp_path / "a.py").write_text(text)
    assert named(tmp_path / "a.py", {"ppo"}) == set()
