"""Readers of names, options and command lines."""

import contextlib
import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhfjax import main, paths, profile, recipe, stages
from rlhfjax.config import Argument, parse_arg
from rlhfjax.data.sources import open_source
from rlhfjax.interop import foreign
from rlhfjax.plan.shapes import parse_model
from rlhfjax.ranges import PositiveCount
from rlhfjax.rewards import judge, registry, rules
from rlhfjax.sweep import command, expand
from tests.fuzz.inputs import SEPARATOR, json_bytes, text_bytes, words_bytes
from tests.fuzz.readers.rows import read_all
from tests.fuzz.readers.table import Reader, Table, Trial, dumped, text_reader

TABLE: Table = {}
NUMBERS = (
    "0",
    "-1",
    "1e400",
    "nan",
    "inf",
    "1_000",
    "٣",
    "0x10",
    "1e3",
    "2.5",
    "9" * 5000,
)

# ------------------------------------------------------------------ names


def _arguments(text: str) -> None:
    parse_arg(
        text,
        size=("full", "smoke"),
        seed=0,
        rate=0.5,
        fast=False,
        data="",
        steps=Argument(3, PositiveCount),
    )


def _model(name: str) -> None:
    if not in_bucket(name):
        foreign.find(name)


def in_bucket(name: str) -> bool:
    """Returns whether a name would be looked for in the network."""
    return paths.SCHEME in name or "gs:/" in name


def _reward(name: str) -> None:
    if in_bucket(name):
        return
    registry.validate(name, "ppo.reward", labels=True)
    registry.describe(name)


def _rule(text: str) -> None:
    values = {"kind": "rule", **rules.parse(text)}
    registry.validate(values, "ppo.reward")


def _source(spec: str, **options: str) -> None:
    if spec.startswith("tfds:") or in_bucket(
        spec
    ):  # a name would be prepared, or looked for in the network
        return
    for kind in ("text", "preferences"):
        read_all(open_source(spec, kind=kind, **options))


def _path(name: str) -> None:
    path = paths.path(name)
    if paths.remote(name):
        return
    paths.read_if_there(path)
    paths.glob(name)
    paths.absolute(path)
    paths.relative(name, paths.path("."))


def _profile(text: str) -> None:
    profile._traced_steps(text)


def _template(text: str) -> None:
    """A prompt template of a judge or of a rubric."""
    values = {"prompt": "who? {a}", "a": "x\\1", "b": "{prompt}", "principle": "\\g<0>"}
    judge.fill(text, values)
    judge.readable(text)


SPECS = (
    "jsonl:",
    "text:",
    "tfds:",
    "{split}",
    "*",
    "**/",
    "[a-",
    "?",
    "./",
    "/dev/zero",
)
text_reader(
    TABLE,
    "config_argument",
    ["size=smoke,seed=3,rate=1.5,fast"],
    (
        *("seed=", "size=", "rate=", "fast=", "steps=", "data=", "=", ",", "full"),
        *NUMBERS,
    ),
    _arguments,
)
text_reader(
    TABLE,
    "reward_name",
    ["gold:sentiment", "rule:json:dumps?timeout=2"],
    (
        *(
            "gold:",
            "rule:",
            "rankings:",
            "@",
            "?",
            "&",
            "model:",
            "sentiment",
            "compose:",
        ),
        *("timeout=", "failed=", "workers=", "metadata=", "dense:", *NUMBERS),
    ),
    _reward,
)
text_reader(
    TABLE,
    "rule_options",
    ["json:dumps?timeout=2&failed=-1&workers=1"],
    (
        *(
            "timeout=",
            "failed=",
            "workers=",
            "metadata=",
            "function=",
            "kind=",
            "&",
            "?",
        ),
        *NUMBERS,
    ),
    _rule,
)
SOURCES = ("jsonl:x/{split}/*.jsonl", "text:*.txt")
text_reader(TABLE, "source_spec", SOURCES, SPECS, _source)
text_reader(TABLE, "source_split", SOURCES, SPECS, partial(_source, split="x"))
text_reader(TABLE, "path_name", ["x/y.json", "gs://bucket/x"], SPECS, _path)
text_reader(
    TABLE,
    "model_name",
    ["hf:x", "gguf:x.gguf", "pip:llm-x"],
    (
        "hf:",
        "gguf:",
        "pip:",
        ".",
        "..",
        "pip:.",
        "pip:json",
        "hf:/dev",
        "gguf:/dev/zero",
    ),
    _model,
)
text_reader(
    TABLE,
    "preset",
    ["gpt3-1.3b:dtype=bfloat16,scan_layers=true"],
    (
        *(
            "dtype=",
            "n_layers=",
            "d_model=",
            "n_heads=",
            "vocab_size=",
            ",",
            ":",
            *NUMBERS,
        ),
    ),
    parse_model,
)
text_reader(
    TABLE,
    "stage_name",
    ["sft", "json:Config", "rlhfjax.stages.sft:Config"],
    (
        ".",
        ":",
        "..",
        "json",
        "os",
        "Config",
        "rlhfjax",
        "stages",
    ),
    lambda name: stages.config_class(name),
)
text_reader(TABLE, "profile_steps", ["10:15"], (":", *NUMBERS), _profile)
text_reader(
    TABLE,
    "prompt_template",
    ["{prompt} {a} {b}"],
    (
        "{",
        "}",
        "{{",
        "{a",
        "{0}",
        "{a.b}",
        "\\1",
        "<|user|>",
        "<|assistant|>",
        "<|",
    ),
    _template,
)

# ------------------------------------------------------------------ the command line

FILE = '''"""An experiment."""
from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config


def get_config(arg=None):
    arg = parse_arg(arg, size=("full", "smoke"), seed=0)
    return stage_config("tokenizer", sources=({"spec": "text:x"},), vocab_size=330)


def sweep(add):
    add({"vocab_size": 340})
    add({"vocab_size": 350, "arg.seed": 1})
'''
WORDS = (
    *("--config=x.py", "--config", "--config=x.py:seed=1", "--config=x.py:a", "x.py"),
    *("--config=", "--config=.", "--config=/dev/null", "--config=missing.py"),
    *("--config.vocab_size=3", "--config.vocab_size=", "--config.vocab_size=x"),
    *("--config.sources[0].spec=x", "--config.sources=3", "--config.a.b=1"),
    *("--config.vocab_size", "--config.", "--config.sources[9]=x", "--config.x[=1"),
    *("--config.sources=('a',)", "--config.stage=sft", "--workdir=w", "--workdir"),
    *("--workdir=", "--workdir=gs://b/x", "--temperature=nan", "--temperature=x"),
    *("--max_new_tokens=0", "--seed=-1", "--seed=" + "9" * 5000, "--int8=maybe"),
    *("--model=x", "--dry_run", "--parallel=0", "--launcher='", "--metrics=a,b"),
    *("--host_timeout=x", "--join_timeout=-1", "--flagfile=x.py", "--flagfile=."),
    *("--undefok=x", "--no", "--nodry_run", "--", "-", "---", "-h=1", "--help=x"),
    *("--chips=x", "--topology=v5e:4x4", "--stage=ppo", "--slices=0", "--json=x"),
)
COMMANDS = [["rlhfjax", name, "--config=x.py", "--workdir=w"] for name in main.COMMANDS]


def words_of(content: bytes) -> list[str]:
    return content.decode("utf-8", "surrogateescape").split(SEPARATOR)


def _quiet(call: Any, *arguments: Any) -> Any:
    """Calls a function that prints by design."""
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*arguments)


def _command_line(folder: Path) -> Trial:
    (folder / "x.py").write_text(FILE)
    seeds = [SEPARATOR.join(words).encode() for words in (COMMANDS[0], COMMANDS[1])]
    call = lambda content: _quiet(main.parse, words_of(content))  # noqa: E731
    return Trial(seeds, words_bytes(COMMANDS, WORDS), call)


PYTHON = (
    *("def get_config(arg=None):\n    return 3\n", "def get_config(): return {}\n"),
    *(
        "get_config = 3\n",
        "import nothing\n",
        "raise SystemExit\n",
        "raise ValueError\n",
    ),
    *("1/0\n", "print('x')\n", "(", "\t", "    ", "\x0c"),
    *("import sys; sys.exit(3)\n", "return", "yield", "None", "3", "()", "{}", "[]"),
    *(
        "def get_config(arg=None):\n    from ml_collections import ConfigDict\n"
        "    return ConfigDict({'stages': ('a', 'a')})\n",
    ),
    *("raise ExceptionGroup('x', [ValueError()])\n", "class E(BaseException): pass\n"),
    *("sources=", "vocab_size=", "float('nan')", "object()", "'\\ud800'", "lambda: 0"),
    *("def sweep(add): add(3)\n", "def sweep(add): add({3: 4})\n", "sweep = 3\n"),
    *("def sweep(add): add({'vocab_size': [1]})\n", "def sweep(): pass\n"),
)


def _experiment(folder: Path) -> Trial:
    file = folder / "x.py"

    def call(content: bytes) -> None:
        file.write_bytes(content)
        words = ["rlhfjax", "train", f"--config={file}", f"--workdir={folder}/w"]
        _quiet(_validate, words)
        _quiet(expand.expand, str(file), folder)

    strategy = text_bytes([FILE], PYTHON)
    return Trial([FILE.encode()], strategy, call)


def _validate(words: Sequence[str]) -> None:
    parsed = main.parse(list(words))
    if parsed is not None and parsed[1].config is not None:
        recipe.validate(parsed[1].config)


TABLE["command_line"] = Reader(_command_line, 120)
TABLE["experiment_file"] = Reader(_experiment, 80)

# ------------------------------------------------------------------ sweeps


def _sweep_values(folder: Path) -> Trial:
    """Values of any JSON type: one of our errors, or a command line that leads to the value."""
    (folder / "x.py").write_text(FILE)
    values = {"vocab_size": 340, "model_type": "bpe", "arg.seed": 1, "stage": "x"}
    seeds = dumped(values, {"vocab_size": 350})

    def call(content: bytes) -> None:
        try:
            overrides = json.loads(content)
        except (ValueError, RecursionError):
            return
        if isinstance(overrides, dict):
            expand.name_of(overrides)
            command.job_name(("local",), expand.name_of(overrides))
            given = {key: v for key, v in overrides.items() if key.startswith("arg.")}
            expand.with_arguments("size=smoke", given)

    return Trial(seeds, json_bytes(seeds), call)


TABLE["sweep_values"] = Reader(_sweep_values)
text_reader(
    TABLE,
    "sweep_launcher",
    ["local", "slurm --nodes=2", "ssh {name}"],
    (*("'", '"', "tpu", "gke", "slurm", "--name=", "{name}", "{", "}", "{0}", "ssh"),),
    lambda text: command.launcher(text),
)
