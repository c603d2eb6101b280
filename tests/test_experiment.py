"""Experiment files and their overrides: every mistake is one line with a remedy."""

import pytest

from rlhfjax import experiment
from rlhfjax.config import parse_arg
from rlhfjax.errors import ConfigError

CONFIG = """
from ml_collections import ConfigDict
from rlhfjax.config import parse_arg

def get_config(arg=None):
    arg = parse_arg(arg, run="runs/a", seed=0, fast=False)
    return ConfigDict({"run": arg.run, "seed": arg.seed, "kl": {"coefficient": 0.5},
                       "names": ("a", "b"), "on": True, "text": "x"})
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "2026-11-29T10:00:00,a=b [x]" / "exp.py"
    path.parent.mkdir()
    path.write_text(CONFIG)
    return path


def test_a_path_with_colons_is_a_path(file):
    loaded = experiment.load(f"{file}:seed=3,run=gs://b/x:y")
    assert (loaded.file, loaded.arg) == (str(file), "seed=3,run=gs://b/x:y")
    config = loaded.config()
    assert (config.seed, config.run) == (3, "gs://b/x:y")
    assert experiment.split("a/b.py:c.py:d") == ("a/b.py", "c.py:d")
    assert experiment.split("a/b.py") == ("a/b.py", None)
    assert experiment.split("a:b") == ("a", "b")


def test_an_argument_holds_any_text_in_quotes_and_an_existing_path_without(tmp_path):
    def run(arg):
        return parse_arg(arg, run="", seed=0)

    folder = tmp_path / "kl=0.05,seed=1"
    folder.mkdir()
    assert run(f"run={folder},seed=2") == run(f'seed=2,run="{folder}"')
    assert run(f"run={folder}").run == str(folder)
    assert run(r'run="a,b=\"c\"\n",seed=2').run == 'a,b="c"\n'
    assert run(f"run={tmp_path},seed=2").seed == 2
    with pytest.raises(ConfigError, match="expected a closing double quote"):
        run('run="a,b')
    with pytest.raises(ConfigError, match="argument seed: given twice"):
        run("seed=1,seed=2")
    with pytest.raises(
        ConfigError, match="'sead' is unknown; known: run, seed; did you mean seed"
    ):
        run("sead=1")


RETURN = "def get_config(arg=None):\n    return "
FILES = {
    "x = 1": "exp.py: it has no get_config(arg=None)",
    "get_config = 3": "it has no get_config(arg=None)",
    RETURN
    + "None": "its get_config returned None; expected an ml_collections.ConfigDict",
    RETURN + "[1]": "its get_config returned [1]",
    RETURN + "iter(())": "its get_config returned <",
    "def get_config():\n    return {}": "its get_config() cannot be called with 'a=b'",
    "def get_config(a, b):\n    return {}": "its get_config(a, b) cannot be called",
    "import sys\nsys.exit(3)": "exp.py:2: SystemExit: a config file must not end",
    RETURN + "open('/no/such/file')": "exp.py:2: FileNotFoundError",
    RETURN + "get_config()": "exp.py:2: RecursionError",
    "raise TypeError()": "exp.py:1: TypeError",
    "raise ValueError('two\\nlines')": "exp.py:1: ValueError: two lines",
    "x = 1\0": "source code string cannot contain null bytes",
    "def get_config(:": "exp.py:1: invalid syntax",
}


@pytest.mark.parametrize(("text", "said"), FILES.items(), ids=range(len(FILES)))
def test_a_file_without_a_config_says_so(text, said, file):
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        experiment.load(f"{file}:a=b").config()
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "--config=: there is no such file"),
        ("nowhere.py:a", "--config=nowhere.py: there is no such file"),
        ("a.yaml", "expected FILE.py"),
        ("gs://b/a.py", "is in a bucket"),
        ("/dev/null", "is a device"),
        (".", "is a folder"),
        ("a\0b.py", "there is no such file"),
        ("x" * 300 + ".py", "there is no such file"),
    ],
)
def test_what_is_no_file_is_named_before_anything_runs(spec, said):
    with pytest.raises(ConfigError) as caught:
        experiment.load(spec)
    assert said in str(caught.value) and "FILE.py[:ARGS]" in str(caught.value)


OVERRIDES = {
    "seed=abc": "--config.seed=abc: expected int",
    "seed=1.5": "--config.seed=1.5: expected int",
    "seed=": "--config.seed=: expected int",
    "seed": "--config.seed: a value is missing; expected --config.seed=VALUE",
    "sead=1": "the config has no option 'sead'; did you mean seed?",
    "seed.x=1": "--config.seed.x: seed has no options",
    "=1": "the config has no option ''",
    "kl..coefficient=1": "the config has no option ''",
    "kl.coefficient=x": "--config.kl.coefficient=x: expected float",
    "kl.coefficient=nan": "--config.kl.coefficient=nan: expected a finite float",
    "kl=3": "--config.kl=3: expected a dict",
    "names=(1,": "--config.names=(1,: expected a tuple, such as (1, 2)",
    "names=" + "(" * 999 + "1,": "expected a tuple",
    "names[9]=x": "names has no element [9]",
    "on=maybe": "--config.on=maybe: expected true or false",
    "seed=" + "9" * 5000: "…: expected int",
}


@pytest.mark.parametrize(("word", "said"), OVERRIDES.items(), ids=range(len(OVERRIDES)))
def test_an_override_that_cannot_be_meant_names_option_value_and_rule(word, said, file):
    config = experiment.load(str(file)).config()
    with pytest.raises(ConfigError) as caught:
        experiment.overridden(config, [f"--config.{word}"])
    assert said in str(caught.value) and len(str(caught.value)) < 500


def test_overrides_that_contradict_are_refused(file):
    config = experiment.load(str(file)).config
    with pytest.raises(ConfigError, match=r"--config.seed: given 2 times"):
        experiment.overridden(config(), ["--config.seed=1", "--config.seed=2"])
    with pytest.raises(ConfigError, match="one contains the other"):
        words = ["--config.kl.coefficient=1", "--config.kl={'coefficient': 2}"]
        experiment.overridden(config(), words)
    none = experiment.overridden(config(), ["--config.text=None", "--noconfig.on"])
    assert none.text is None and none.on is False
