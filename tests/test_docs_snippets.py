"""The Python files that docs/ has a reader write do what the pages say; links lead somewhere."""

import importlib
import re
import runpy
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import __version__
from rlhfjax.stages import group
from tests import doc_commands


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes the files of a page into an empty working directory, whose modules are importable."""

    def write(page: str) -> Path:
        for name, text in doc_commands.files(page).items():
            (tmp_path / name).write_text(text)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(group, "ESTIMATORS", dict(group.ESTIMATORS))
        return tmp_path

    before = set(sys.modules)
    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


LINK = re.compile(r"\]\(([^()\s]*)\)")


@pytest.mark.parametrize("page", [*doc_commands.pages(), "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for link in LINK.findall((doc_commands.ROOT / page).read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (
            (doc_commands.ROOT / page).parent / name
            if name
            else doc_commands.ROOT / page
        )
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def test_the_citation_has_the_version():
    text = (doc_commands.ROOT / "CITATION.cff").read_text()
    fields = dict(re.findall(r"^([\w-]+): (.+)$", text, re.MULTILINE))
    assert fields["version"] == __version__ and fields["license"] == "Apache-2.0"


def test_the_rule_of_the_tutorial(written):
    written("docs/tutorial.md")
    asks = importlib.import_module("my_rewards").asks
    assert asks("", "Fine. And you?", {}) == 1.0
    assert asks("", "Why? Why?", {}) == asks("", "Fine.", {}) == 0.0


def test_the_rules_of_extending(written):
    written("docs/extending.md")
    rules = importlib.import_module("my_rewards")
    assert rules.short("", "one two", {}) == 1.0
    assert rules.short("", " ".join(["word"] * 20), {}) == 0.5
    assert rules.correct("", "It is 42.", {"answer": 42}) == 1.0
    assert rules.correct("", "It is 41.", {"answer": 42}) == 0.0


def test_an_estimator_of_ones_own(written):
    written("docs/extending.md")
    module = importlib.import_module("my_algorithm")
    scores = jnp.asarray([[3.0, 1.0, 2.0], [5.0, 5.0, 1.0]])
    penalties = jnp.zeros((2, 3)).at[0, 0].set(1.5)  # 3 - 1.5 is the middle one
    advantages = module.rank_advantages(scores, penalties)
    np.testing.assert_allclose(advantages, [[0.0, -1.0, 1.0], [0.5, 0.5, -1.0]])
    assert module.Config.estimator in group.ESTIMATORS


@pytest.mark.slow
def test_a_stage_from_python(written, capsys):
    written("docs/extending.md")
    runpy.run_path("stage.py")
    runpy.run_path("talk.py")
    assert capsys.readouterr().out.splitlines()[-1] == "Your ball is green."
