"""`rlhfjax plan`: chooses what to plan, prints it, and writes it as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import rich

from rlhfjax import precision, process
from rlhfjax.errors import ConfigError, cut
from rlhfjax.paths import Path
from rlhfjax.plan import (
    budget,
    by_hand,
    hand_tables,
    one_card,
    predict,
    price,
    search,
    search_tables,
    tables,
    variants,
)
from rlhfjax.plan.overrides import line, overrides
from rlhfjax.plan.shapes import Subject, parse_model, subject
from rlhfjax.plan.topology import HERE, target


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of the command, see `plan_flags`."""

    topology: str | None = None
    slices: int = 1
    chips: Sequence[str] = ()
    chips_given: bool = False
    compiles: int = 8
    vary: tuple[str, ...] = variants.VARY
    fits: str | None = None
    price: str | None = None
    tokens: float | None = None
    mfu: float | None = None
    stage: str | None = None
    model: str = ""
    reward_model: str = ""
    completions: int = 2
    programs: tuple[str, ...] = ()
    json: Path | None = None
    workdir: Path | None = None
    given: tuple[
        str, ...
    ] = ()  # dotted names of the options that --config.NAME=VALUE set


def run(config: Any, spec: str, options: Options) -> None:
    """Runs the command.

    Args:
      config: of a stage or a recipe; None: `options.model` alone.
      spec: what --config names, for the commands that are printed.
    """
    prices = price.parse(options.price)
    if config is None:
        _print_arithmetic(options, prices)
        return
    if options.tokens is not None or options.mfu is not None:
        raise ConfigError("--tokens and --mfu: with --model alone, without --config")
    chosen = subject(
        config,
        options.stage,
        options.workdir,
        model=options.model,
        reward_model=options.reward_model,
        dtype="" if options.topology == HERE else precision.fastest("tpu"),
    )
    if options.fits is not None:
        result = _fits(config, spec, chosen, options, prices)
    elif options.topology is None:
        raise ConfigError("--topology is required, or --fits")
    elif options.topology == "search":
        result = _search(config, spec, chosen, options, prices)
    else:
        result = _plan(chosen, options.topology, options, prices)
    if options.json:
        predict.write(options.json, result.as_dict())


def _print_arithmetic(options: Options, prices: price.Prices) -> None:
    model = parse_model(options.model)
    if options.tokens is None:
        rich.print(tables.arithmetic(model))
        return
    print(budget.text(model, options.tokens, options.topology, options.mfu, prices))


def _plan(
    chosen: Subject, topology: str, options: Options, prices: price.Prices
) -> by_hand.HandPlan | predict.Plan:
    """Plans one topology: GPUs by hand, the others with their compiler."""
    gpus = by_hand.cluster(topology)
    if gpus is not None:
        if options.slices > 1 or options.programs:
            raise ConfigError(
                f"--slices and --programs: not for {gpus.name}, {by_hand.BY_HAND}"
            )
        of_gpu = prices.of(gpus.chip.name)
        plan = by_hand.plan_by_hand(chosen, gpus, options.completions, of_gpu)
        rich.print(hand_tables.hand_tables(plan))
        return plan
    where = target(topology, options.slices)
    if options.price and where.chip is None:
        raise ConfigError(
            f"--price: the speed of {where.name} is not known, so the run has no time"
        )
    of_chip = prices.of(where.chip.name) if where.chip else None
    process.log.info("compiling %s, topology %s", chosen.name, topology)
    compiled = predict.make_plan(
        chosen, where, options.completions, only=options.programs
    )
    compiled = dataclasses.replace(compiled, price=of_chip)
    rich.print(tables.plan_tables(compiled))
    return compiled


def _search(
    config: Any, spec: str, chosen: Subject, options: Options, prices: price.Prices
) -> search.Search:
    if unknown := [name for name in options.vary if name not in variants.VARY]:
        known = ", ".join(variants.VARY)
        raise ConfigError(f"--vary={cut(unknown[0])}: expected some of {known}")
    result = search.search_chips(
        chosen,
        options.chips,
        options.compiles,
        options.completions,
        vary=options.vary,
        prices=prices,
    )
    rich.print(search_tables.search_tables(result, options.chips))
    if (best := result.best) is not None:
        changed = search.settings_of(chosen, best)
        words = overrides(config, chosen.name, changed, options.given)
        print(f"plan it: {_plan_line(spec, words, options, best.topology)}")
        print(f"run it:  {_run_line(config, spec, words, options)}")
    return result


def _fits(
    config: Any, spec: str, chosen: Subject, options: Options, prices: price.Prices
) -> one_card.Fits:
    if options.chips_given and len(options.chips) > 1:
        raise ConfigError("--chips: with --fits expected one chip")
    chip = options.chips[0] if options.chips_given else None
    card = one_card.parse_card(options.fits or "", chip)
    if options.price and card.chip is None:
        raise ConfigError(
            "--price: --fits has a size alone; name a chip, such as --chips=h100"
        )
    result = one_card.fit(chosen, card, options.completions, prices)
    rich.print(hand_tables.fits_tables(result))
    if (best := result.best) is not None:
        words = overrides(config, chosen.name, best.options, options.given)
        print(f"run it: {_run_line(config, spec, words, options)}")
    return result


def _plan_line(spec: str, words: Sequence[str], options: Options, topology: str) -> str:
    flags = {
        "stage": options.stage,
        "workdir": options.workdir,
        "model": options.model,
        "reward_model": options.reward_model,
        "topology": topology,
        "price": options.price,
    }
    given = [f"--{name}={value}" for name, value in flags.items() if value]
    if options.completions != 2:
        given.append(f"--completions={options.completions}")
    return line(["rlhfjax", "plan", f"--config={spec}", *given, *words])


def _run_line(config: Any, spec: str, words: Sequence[str], options: Options) -> str:
    command = "run" if "stages" in config else "train"
    workdir = options.workdir or "runs/NAME"
    given = [f"--config={spec}", f"--workdir={workdir}"]
    return line(["rlhfjax", command, *given, *words])
