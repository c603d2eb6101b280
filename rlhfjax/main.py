"""The command line `rlhfjax COMMAND`: a table of commands, and the parsing of their flags."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags

from rlhfjax import (
    __version__,
    arguments,
    command_flags,
    commands,
    label_command,
    manual,
    plan_flags,
    process,
    serve_flags,
    server_commands,
)
from rlhfjax.errors import ConfigError, cut, first_line

Flags = flags.FlagValues
HELP = ("--help", "-h", "-help", "--helpfull", "--helpshort")


class Command(NamedTuple):
    """A command. The docstring of its function is its help."""

    run: Callable[[Flags], None]
    define_flags: Callable[[Flags], None] | None = None  # the command's own flags
    usage: str = "--workdir=DIR"  # what it needs
    config: bool = False  # it takes --config
    several_hosts: bool = False  # several hosts run it together
    goes_on: bool = False  # run again after SIGTERM, it continues
    positional: str = ""  # the flag whose value may stand without its name
    mapping: str = ""  # the flag that is given as --flag.NAME=VALUE


COMMANDS = {
    "run": Command(
        commands.run,
        command_flags.run,
        "--config=FILE.py[:ARGS] --workdir=DIR",
        config=True,
        several_hosts=True,
        goes_on=True,
    ),
    "train": Command(
        commands.train,
        command_flags.train,
        "--config=FILE.py[:ARGS] --workdir=DIR",
        config=True,
        several_hosts=True,
        goes_on=True,
    ),
    "sweep": Command(
        commands.sweep,
        command_flags.sweep,
        "--config=FILE.py[:ARGS] --workdir=DIR",
        config=True,
    ),
    "eval": Command(commands.evaluate, config=True, several_hosts=True),
    "chat": Command(commands.chat, command_flags.chat, "--workdir=DIR | --model=MODEL"),
    "serve": Command(
        server_commands.serve, serve_flags.define, "--workdir=DIR | --model=MODEL"
    ),
    "report": Command(commands.report),
    "label": Command(
        label_command.run,
        label_command.define,
        "--workdir=DIR --from=DIR",
        goes_on=True,
    ),
    "import": Command(
        commands.import_model,
        command_flags.import_model,
        "--model=MODEL --workdir=DIR",
        several_hosts=True,
    ),
    "export": Command(commands.export, command_flags.export, "--workdir=DIR --to=DIR"),
    "plan": Command(
        commands.plan,
        plan_flags.define,
        "--config=FILE.py[:ARGS] --topology=CHIP:SHAPE",
        config=True,
    ),
    "options": Command(
        commands.options, command_flags.options, "[STAGE]", positional="stage"
    ),
    "tokenize": Command(
        commands.tokenize,
        command_flags.tokenize,
        "--model=MODEL [TEXT]",
        positional="text",
    ),
    "data": Command(
        commands.data, command_flags.data, "--source=SPEC", mapping="columns"
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Runs the command that `argv` names. The exit codes are those of `process`."""
    process.run(lambda: _run(sys.argv if argv is None else argv))


def _run(argv: list[str]) -> None:
    _greet(argv)
    parsed = parse(argv)
    if parsed is None:
        return
    command, fv = parsed
    if command.goes_on:
        process.exit_on_sigterm()
    if command.several_hosts:
        process.join_hosts(fv.host_timeout, fv.join_timeout)
    command.run(fv)


def _greet(argv: list[str]) -> None:
    """Prints what begins, before the seconds that importing jax takes."""
    if len(argv) < 2 or argv[1] not in COMMANDS or not COMMANDS[argv[1]].goes_on:
        return
    given: dict[str, str] = {}
    for argument in argv[2:]:
        name, _, value = argument.lstrip("-").partition("=")
        given[name] = value
    if given.get("config") and given.get("workdir"):
        what = f"{given['config']} in {given['workdir']}"
        process.log.info("rlhfjax %s: %s; loading JAX", __version__, what)


def parse(argv: Sequence[str]) -> tuple[Command, Flags] | None:
    """Returns the command and its flags; None if `argv` asks for a text, which is printed."""
    program, *words = argv
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words or words[0] in HELP:
        runs = {name: command.run for name, command in COMMANDS.items()}
        print(manual.overview(runs))
        return None
    if words[0] == "--version":
        print(manual.versions())
        return None
    name, *words = words
    if name not in COMMANDS:
        raise ConfigError(
            f"command {cut(repr(name))} is unknown; known: {', '.join(COMMANDS)}"
            f"{arguments.did_you_mean(name, COMMANDS)}"
        )
    command = COMMANDS[name]
    if set(HELP) & set(words):
        fv = _own_flags(command)
        if command.config:
            command_flags.config(fv)
        print(manual.page(name, command.usage, command.run, fv))
        return None
    return command, _parse(command, [program, *words])


def _parse(command: Command, words: list[str]) -> Flags:
    """Returns the flags of a command with their values."""
    fv = _own_flags(command)
    try:
        words = fv.read_flags_from_files(words, force_gnu=False)
    except flags.Error as e:
        raise ConfigError(f"--flagfile: {first_line(e)}") from None
    if command.config:
        words = _config_flag(fv, words)
    if command.mapping:
        words = [_pair_as_value(word, command.mapping) for word in words]
    try:
        rest = arguments.parse(fv, words)[1:]
    except flags.Error as e:
        raise ConfigError(str(e)) from None
    if rest and command.positional and fv[command.positional].value is None:
        fv[command.positional].value = " ".join(rest)
    elif rest:
        raise ConfigError(f"argument {rest[0]!r} is not a flag; flags are --name=value")
    return fv


def _pair_as_value(word: str, flag: str) -> str:
    """Returns --flag.NAME=VALUE as --flag=NAME=VALUE, and any other word as it is."""
    for prefix in (f"--{flag}.", f"-{flag}."):
        if word.startswith(prefix):
            return f"--{flag}={word.removeprefix(prefix)}"
    return word


def _own_flags(command: Command) -> Flags:
    """Returns the flags of a command except for --config."""
    fv = Flags()
    if command.positional:
        fv.set_gnu_getopt()  # flags may follow it
    command_flags.workdir(fv)
    if command.define_flags:
        command.define_flags(fv)
    if command.several_hosts:
        command_flags.hosts(fv)
    command_flags.helps(fv)
    return fv


def _config_flag(fv: Flags, argv: list[str]) -> list[str]:
    """Defines --config with its overrides; returns `argv` without the word, or two, of --config.

    Raises:
      ConfigError: --config is given twice, or an override without it; or as `experiment.load`.
    """
    from rlhfjax import experiment

    specs, rest = _split_config(argv)
    if len(specs) > 1:
        raise ConfigError(f"--config: given {len(specs)} times; expected once")
    if not specs:
        lost = [word for word in rest if word.startswith(("--config.", "-config."))]
        if lost:
            raise ConfigError(f"{lost[0]}: expected --config=FILE.py with it")
        command_flags.config(fv)
        return rest
    config = experiment.load(specs[0]).config()
    experiment.define_config(fv, config, rest[1:], command_flags.CONFIG)
    flag: Any = fv["config"]
    flag.spec = specs[0]  # for `sweep`, which loads it again
    return rest


def _split_config(argv: list[str]) -> tuple[list[str], list[str]]:
    """Returns the values of --config, and the other words."""
    specs: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word in ("--config", "-config"):
            specs.append(next(words, ""))
        elif word.startswith(("--config=", "-config=")):
            specs.append(word.partition("=")[2])
        else:
            rest.append(word)
    return specs, rest
