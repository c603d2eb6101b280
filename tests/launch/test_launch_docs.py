"""docs/launching.md and launch/README.md.

Every command in them has flags and words that there are.
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from absl import flags

from launch import shell
from rlhfjax import commands as command_functions
from rlhfjax import main

ROOT = Path(__file__).parents[2]
PAGES = ("docs/launching.md", "launch/README.md", "README.md", "docs/scaling.md")


def commands(pattern: str) -> list[str]:
    """The commands of the pages' code blocks and quotes that match."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text().replace("\\\n", " ")
        blocks = [line.strip() for line in text.splitlines() if line.startswith("    ")]
        quoted = re.findall(r"`([^`\n]+)`", text)
        found += [
            line.partition("  #")[0].partition(" | ")[0]
            for line in (*blocks, *quoted)
            if re.match(pattern, line)
        ]
    return sorted(set(found))


@pytest.mark.parametrize("line", commands(r"python -m launch\.\w+ \w"))
def test_a_documented_launcher_parses(line):
    words = [word for word in shlex.split(line) if word != "…"]
    module = importlib.import_module(words[2])
    fv = flags.FlagValues()
    shell.common_flags(fv)
    module._flags(fv)
    cut = words.index("--") if "--" in words else len(words)
    word, *rest = fv(words[2:cut])[1:]
    assert rest == [] and word in Path(module.__file__).read_text()


@pytest.mark.parametrize("line", commands(r"rlhfjax sweep .*--launcher"))
def test_a_documented_sweep_parses_and_so_does_its_launcher(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(
        line.replace("--config=…", "--config=experiments/quickstart/recipe.py")
    )
    if "…" in words:  # a quote that leaves words out
        words = [
            *(word for word in words if word != "…"),
            "--config=experiments/quickstart/recipe.py",
        ]
    command, fv = main.parse(words)
    assert command.run is command_functions.sweep
    name, *rest = shlex.split(fv.launcher)
    module, own = importlib.import_module(f"launch.{name}"), flags.FlagValues()
    shell.common_flags(own)
    module._flags(own)
    assert own([name, *rest])[1:] == []
