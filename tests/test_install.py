"""Every extra that a page, an example or an error names exists."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("rlhfjax", "launch", "docs", "experiments", "examples", "benchmarks")
SUFFIXES = (".py", ".md", ".toml", ".sh")
# 'rlhfjax[quickstart]', '.[test]', "rlhfjax[cuda12] @ git+…"
EXTRAS = re.compile(r"(?:rlhfjax|(?<![\w.\])])\.)\[([a-z][a-z0-9_, -]*)\]")


def mentioned() -> dict[str, set[str]]:
    """Returns {extra: files that name it}."""
    files = [*ROOT.glob("*.md"), ROOT / "pyproject.toml"]
    for folder in FOLDERS:
        files += [
            file for file in (ROOT / folder).rglob("*") if file.suffix in SUFFIXES
        ]
    found: dict[str, set[str]] = {}
    for file in files:
        for names in EXTRAS.findall(file.read_text(encoding="utf-8")):
            for name in names.split(","):
                found.setdefault(name.strip(), set()).add(str(file.relative_to(ROOT)))
    return found


def test_every_extra_that_is_named_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    found = mentioned()
    missing = {name: files for name, files in found.items() if name not in extras}
    assert not missing
    assert {"quickstart", "test", "cuda12", "gguf"} <= found.keys()
