"""The command line: exit codes, and one line for every mistake."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlhfjax import __version__, commands, recipe, stages
from rlhfjax import main as command_line

ROOT = Path(__file__).parent.parent
SFT = "experiments/stiennon2020/sft.py"
TINY = f"--config={ROOT}/tests/tiny.py"


def call(capsys, *args: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `rlhfjax ARGS`, in this process."""
    code = 0
    try:
        command_line.main(["rlhfjax", *args])
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *args: str, code: int = 2) -> str:
    """The one line on stderr of a command that must fail."""
    got, _, err = call(capsys, *args)
    lines = err.splitlines()
    assert got == code, err
    assert len(lines) == 1 and lines[0].startswith("rlhfjax: "), err
    return lines[0]


@pytest.mark.parametrize("command", list(command_line.COMMANDS))
def test_help_of_every_command(command, capsys):
    for flag in ("--help", "-h"):
        code, out, err = call(capsys, command, flag)
        assert code == 0 and not err
        assert out.startswith(f"usage: rlhfjax {command} ")
        assert "\n  --workdir=DIR " in out
        assert ("--temperature" in out) == (command in ("chat", "serve"))
        assert "absl" not in out and "flagfile" not in out
    assert out == call(capsys, "help", command)[1]


@pytest.mark.parametrize("command", list(command_line.COMMANDS))
def test_the_examples_of_a_command_parse(command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    examples = call(capsys, command, "--help")[1].partition("examples:\n")[2]
    assert examples
    for line in examples.splitlines():
        program, name, *words = shlex.split(line)
        words = [word.replace("my_sft.py", SFT) for word in words]
        command_line.parse([program, name, *words])
        assert name == command and len(line) <= 100


def test_help_gives_defaults_and_the_values_of_a_flag(capsys):
    _, out, _ = call(capsys, "sweep", "--help")
    assert "--metrics=A,B,…" in out and "default: local" in out
    assert "--dtype=float32|bfloat16|float16" in call(capsys, "export", "-h")[1]


def test_the_version_names_jax_and_python(capsys):
    out = call(capsys, "--version")[1]
    assert out.startswith(f"rlhfjax {__version__} (jax ") and "Python 3." in out


def test_help_lists_the_commands(capsys):
    for args in ((), ("--help",), ("help",)):
        code, out, _ = call(capsys, *args)
        assert code == 0
        assert all(f"\n  {name} " in out for name in command_line.COMMANDS)


def test_options_prints_what_a_stage_takes(capsys):
    code, out, _ = call(capsys, "options", "ppo")
    lines = [line.split(maxsplit=2) for line in out.splitlines()]
    assert code == 0 and out == call(capsys, "options", "--stage=ppo")[1]
    b1 = lines.index(["optim.b1", "0.9", "float >= 0 and < 1"])
    meaning = "    Decay rate of the first moment; of sgd the momentum, 0 for none."
    assert out.splitlines()[b1 + 1] == meaning
    assert ["steps", "required", "int >= 1"] in lines
    assert ["init_from", "required", "str"] in lines
    assert ["optim", "OptimConfig"] in lines
    assert max(map(len, out.splitlines())) <= 80
    assert "stage 'bogus' is unknown" in refused(capsys, "options", "bogus")
    assert refused(capsys, "options", "ppoo").endswith("did you mean ppo?")


def test_options_alone_lists_the_stages(capsys):
    code, out, _ = call(capsys, "options")
    assert code == 0
    for name in stages.names():
        assert re.search(rf"^  {name} +[A-Z]", out, re.MULTILINE)


CONFIGS = {
    "syntax.py": "def get_config(arg=None:\n    pass\n",
    "imports.py": "import there_is_no_such_module\n",
    "divides.py": "def get_config(arg=None):\n    return 1 / 0\n",
    "value.py": "def get_config(arg=None):\n    return int('x')\n",
    "empty.py": "x = 1\n",
    "option.py": (
        "from rlhfjax.stages import stage_config\n\n"
        "def get_config(arg=None):\n    return stage_config('tokenizer', vocab=3)\n"
    ),
    "stage.py": (
        "from rlhfjax.stages import stage_config\n\n"
        "def get_config(arg=None):\n    return stage_config('tokenizer', vocab_size=300)\n"
    ),
    "unknown.py": (
        "from ml_collections import ConfigDict\n\ndef get_config(arg=None):\n    return "
        "ConfigDict({'stage': 'x'})\n"
    ),
}


@pytest.fixture
def configs(tmp_path):
    for name, text in CONFIGS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ("bogus",),
            "command 'bogus' is unknown; known: run, train, sweep, eval, chat, serve, report",
        ),
        (("run",), "--config is required"),
        (("train",), "--config is required"),
        (("run", TINY), "--workdir is required"),
        (("sweep",), "--config is required"),
        (("sweep", TINY, "--workdir=W"), "it has no sweep(add)"),
        (("sweep", TINY, "--workdir=W", "--parallel=0"), "--parallel=0"),
        (("eval",), "--workdir is required"),
        (("chat",), "chat: give either --workdir"),
        (("report",), "--workdir is required"),
        (
            ("run", "--config=nowhere.py", "--workdir=W"),
            "--config=nowhere.py: there is no such file",
        ),
        (
            ("run", "--config", "nowhere.py", "--workdir=W"),
            "--config=nowhere.py: there is no such file",
        ),
        (("run", "--config=", "--workdir=W"), "--config=: there is no such file"),
        (("run", TINY, "--workdir=W", "more"), "argument 'more' is not a flag"),
        (
            ("run", TINY, "--workdir=W", "--bogus=1"),
            "--bogus: there is no such flag",
        ),
        (("run", TINY, "--wrokdir=W"), "no such flag; did you mean --workdir?"),
        (("rum",), "; did you mean run?"),
        (("run", "--config=", "--print_config"), "--config=: there is no such file"),
        (
            ("run", TINY + ":bogus=1", "--workdir=W"),
            "config argument 'bogus' is unknown; known: data, steps",
        ),
        (
            ("run", TINY + ":steps=x", "--workdir=W"),
            "config argument steps=x: expected int",
        ),
        (
            ("run", TINY, "--workdir=W", "--config.ppo.bogus=1"),
            "--config.ppo.bogus: the config has no option 'bogus'",
        ),
        (
            ("run", TINY, "--workdir=W", "--config.ppo.clipp=1"),
            "has no option 'clipp'; did you mean clip?",
        ),
        (
            ("run", TINY, "--workdir=W", "--config.ppo.kl.x=1"),
            "--config.ppo.kl.x: the config has no option 'x'",
        ),
        (("run", TINY, "--workdir=W", "--config.ppo.steps=x"), "--config.ppo.steps=x"),
        (
            ("run", TINY, "--workdir=W", "--config.ppo.steps=1.5"),
            "--config.ppo.steps=1.5",
        ),
        (
            ("run", TINY, "--workdir=W", "--config.ppo.kl.estimator=k9"),
            "ppo.kl.estimator='k9': expected one of 'k1'",
        ),
        (("train", TINY, "--workdir=W"), "this config is a recipe; rlhfjax run"),
        (
            ("run", "--config=C/stage.py", "--workdir=W"),
            "this config is a single stage; rlhfjax train",
        ),
        (("train", "--config=C/syntax.py", "--workdir=W"), "syntax.py:1: "),
        (
            ("train", "--config=C/imports.py", "--workdir=W"),
            "imports.py:1: ModuleNotFoundError",
        ),
        (
            ("train", "--config=C/divides.py", "--workdir=W"),
            "divides.py:2: ZeroDivisionError",
        ),
        (("train", "--config=C/value.py", "--workdir=W"), "value.py:2: ValueError"),
        (("train", "--config=C/empty.py", "--workdir=W"), "get_config"),
        (
            ("train", "--config=C/option.py", "--workdir=W"),
            "tokenizer.vocab: no such option",
        ),
        (("train", "--config=C/unknown.py", "--workdir=W"), "stage 'x' is unknown"),
        (
            ("train", "--config=C/stage.py", "--workdir=W"),
            "tokenizer.sources: at least one source",
        ),
        (("chat", "--workdir=W", "--temperature=-1"), "--temperature=-1"),
        (("chat", "--workdir=W", "--max_new_tokens=0"), "--max_new_tokens=0"),
        (("eval", "--workdir=C"), "no config.json here"),
        (("report", "--workdir=W"), "does not exist"),
        (("train", "--config=C/stage.py", "--workdir=C/stage.py"), "File exists"),
        (("train", "--config=C/stage.py", "--workdir="), "--workdir=: expected"),
        (("train", "--config=C/stage.py", "--workdir=C/a\0b"), "has no NUL"),
        (("train", "--config=C/stage.py", "--workdir=C/" + "x" * 300), "at most"),
        (("report", "--workdir=C/stage.py/x"), "stage.py/x"),
        (("report", "--workdir=W", "--workdir=C"), "--workdir: given 2 times"),
        (("report", "--workdir"), "--workdir: a value is missing"),
        (("run", TINY, TINY), "--config: given 2 times"),
        (("run", "--config.a=1"), "--config.a=1: expected --config=FILE.py with it"),
        (("run", "--flagfile=/no/such"), "--flagfile: "),
        (("eval", "--host_timeout=x"), "--host_timeout=x: expected int >= 1"),
        (("eval", "--host_timeout=" + "9" * 20), "expected int >= 1 and <= 2147483647"),
        (("chat", "--model="), "chat: give either --workdir"),
        (("chat", "--temperature=nan"), "--temperature=nan: expected a finite float"),
        (("chat", "--int8=maybe"), "--int8=maybe: expected true or false"),
        (("export", "--dtype=f8"), "--dtype=f8: expected one of float32, bfloat16"),
        (("sweep", TINY, '--metrics="a'), "expected a,b,c"),
        (("options", "--stage=two\nlines"), "stage 'two\\nlines' is unknown"),
        (("red\x1b[31m",), "command 'red\\x1b[31m' is unknown"),
    ],
)
def test_a_command_that_cannot_be_meant_is_one_line_and_exit_code_2(
    args, said, configs, capsys
):
    args = [
        a.replace("=W", f"={configs}/run").replace("=C", f"={configs}") for a in args
    ]
    assert said in refused(capsys, *args)
    assert not list((configs / "run").rglob("done.json"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("chat", "--workdir=W"), "no model here"),
        (("run", TINY + ":data=W", "--workdir=W"), "no file matches"),
    ],
)
def test_a_run_that_fails_is_one_line_and_exit_code_1(args, said, tmp_path, capsys):
    args = [a.replace("=W", f"={tmp_path}/none") for a in args]
    assert said in refused(capsys, *args, code=1)


IMPOSSIBLE = [
    (
        "--config.pretrain.batch_size=6",
        "pretrain.batch_size=6 is not divisible by the 4 devices",
    ),
    (
        "--config.pretrain.length=33",
        "pretrain.length=33 is longer than the model's context, max_length=32",
    ),
    (
        "--config.pretrain.model.n_heads=3",
        "n_heads = 3 does not divide model.d_model = 16",
    ),
    (
        "--config.pretrain.model.vocab_size=300",
        "pretrain.model.vocab_size=300 is less than the tokenizer's 320",
    ),
    ("--config.pretrain.mesh.data=3", "does not fit the 4 devices"),
    ("--config.pretrain.optim.name=adaam", "optim.name"),
    (
        "--config.sft.microbatches=3",
        "sft.batch_size=8: must be divisible by microbatches=3",
    ),
    (
        "--config.sft.microbatches=4",
        "a sft microbatch=2 is not divisible by the 4 devices",
    ),
    ("--config.sft.length=33", "sft.length=33 is longer than the model's context"),
    (
        "--config.collect.samples_per_prompt=1",
        "collect.samples_per_prompt=1: expected int >= 2",
    ),
    (
        "--config.collect.max_new_tokens=9",
        "collect.prompt_length + max_new_tokens=33 is longer",
    ),
    ("--config.reward.length=33", "reward.length=33 is longer"),
    (
        "--config.ppo.minibatches=3",
        "ppo.batch_size=16: must be divisible by minibatches=3",
    ),
    ("--config.ppo.minibatches=0", "ppo.minibatches=0: expected int >= 1"),
    (
        "--config.ppo.max_new_tokens=9",
        "ppo.prompt_length + max_new_tokens=33 is longer",
    ),
    ("--config.ppo.temperature=0.0", "ppo.temperature=0.0: expected float >= 0.0001"),
    ("--config.ppo.kl.horizon=0", "ppo.kl.horizon=0: must be > 0 with a target"),
    ("--config.evaluate.batch_size=6", "evaluate.batch_size=6 is not divisible"),
    ("--config.evaluate.policy=nowhere", "nowhere: no model here"),
    (
        "--config.evaluate.policy=stage:nobody",
        "the stages before it are tokenizer, pretrain",
    ),
]


@pytest.mark.parametrize(
    ("override", "said"),
    IMPOSSIBLE,
    ids=[o.removeprefix("--config.") for o, _ in IMPOSSIBLE],
)
def test_impossible_combinations_stop_a_recipe_before_its_first_stage(
    override, said, conversations, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        recipe, "run_stage", lambda *_: pytest.fail("a stage was started")
    )
    code = 1 if "no model here" in said else 2
    args = (
        "run",
        f"{TINY}:data={conversations}",
        f"--workdir={tmp_path}/run",
        override,
    )
    assert said in refused(capsys, *args, code=code)
    assert not (tmp_path / "run").exists()


def test_overrides_reach_the_stage_also_where_the_default_is_none(
    configs, capsys, monkeypatch
):
    seen = {}
    monkeypatch.setattr(
        recipe,
        "run",
        lambda config, workdir, **_: seen.update(config=config, workdir=workdir),
    )
    monkeypatch.setattr(commands, "report", lambda fv: None)
    overrides = (
        "--config.sft.init_from=there",  # a str or None
        "--config.pretrain.model.n_kv_heads=1",  # an int or None
        "--config.ppo.kl.coefficient=1",  # an int where a float is meant
        "--config.ppo.steps=7",
        "--config.stages=('pretrain', 'sft')",
        "--config.pretrain.log.tensorboard=false",
    )
    code, _, err = call(capsys, "run", TINY, f"--workdir={configs}/run", *overrides)
    assert code == 0, err
    config = seen["config"]
    assert config.sft.init_from == "there"
    assert config.pretrain.model.n_kv_heads == 1
    assert config.ppo.kl.coefficient == 1.0
    assert config.ppo.steps == 7
    assert tuple(config.stages) == ("pretrain", "sft")
    assert config.pretrain.log.tensorboard is False


def test_python_m_rlhfjax_is_the_same_program(tmp_path):
    """A real process: usage on stdout with code 0.

    A mistake is one line on stderr, no traceback, code 2.
    """
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    for args, code in ((["--help"], 0), (["train", f"--workdir={tmp_path}"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "rlhfjax", *args],
            capture_output=True,
            text=True,
            env=env,
        )
        assert done.returncode == code
        if code:
            assert done.stderr == "rlhfjax: --config is required\n" and not done.stdout
        else:
            assert done.stdout.startswith("usage: rlhfjax COMMAND") and not done.stderr


def test_ctrl_c_is_not_a_traceback(capsys, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(
        command_line.COMMANDS, "report", command_line.Command(interrupted)
    )
    assert call(capsys, "report", f"--workdir={tmp_path}")[0] == 130
