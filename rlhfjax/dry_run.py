"""Describes what a run would do, without writing anything: `rlhfjax run --dry_run`."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import rich
from rich.table import Table
from rich.text import Text

from rlhfjax import (
    announce,
    capacity,
    checkpoint,
    claims,
    device_bytes,
    footprint,
    json_text,
    pace,
    precision,
    recipe,
    references,
    rerun,
)
from rlhfjax.config import to_dict
from rlhfjax.data import formats, indexed
from rlhfjax.data.config import SourceConfig, open_preferences, split_of_preferences
from rlhfjax.models.size import active_parameters
from rlhfjax.origins import Origins
from rlhfjax.paths import Path
from rlhfjax.progress import duration
from rlhfjax.redact import printable
from rlhfjax.stage_cache import Cache
from rlhfjax.workdirs import DONE


class Stage(NamedTuple):
    """What would become of one stage."""

    name: str
    action: str
    runs: bool  # whether anything is computed
    models: str
    memory: float | None  # bytes per device at the peak; None: not known yet
    seconds: float | None  # None: unknown


class Data(NamedTuple):
    """A source of rows that a stage reads."""

    stage: str
    spec: str
    rows: str


def show(
    config: Any,
    workdir: Path,
    choice: rerun.Choice | None = None,
    cache: Path | None = None,
) -> None:
    """Prints the stages of a recipe, or the one stage, with their data, models, memory and time.

    Raises: what the run would raise before its first step.
    """
    values = precision.resolved(to_dict(config), workdir)
    folders, resolved = _resolved(values, workdir)
    typed = recipe.check_all(resolved, folders)
    references.validate(typed, folders, DONE)
    capacity.validate(typed, folders, DONE)
    if choice is None:
        claims.compare(workdir, values)
    actions = _actions(values, resolved, folders, workdir, choice, cache)
    found = list(_stages(typed, folders, actions))
    rich.print(_stage_table(found))
    _print_totals(found)
    running = {stage.name: typed[stage.name] for stage in found if stage.runs}
    if data := list(_data(running, folders)):
        print()
        rich.print(_data_table(data))
    print("\nThe config is valid. This was a dry run: nothing was computed or written.")


class Cost(NamedTuple):
    """What a stage of several runs costs. Runs that share it compute it once."""

    name: str
    runs: int  # that have it
    seconds: float | None  # at this machine's measured rate; None: unknown
    tokens: (
        float | None
    )  # that it trains on or samples; None: unknown, or it has no such number


def total_seconds(
    runs: Iterable[tuple[dict[str, Any], Path]], shared: bool
) -> float | None:
    """Returns the time of all stages that are not finished; None if no stage's is known.

    Args: as `costs`.
    """
    found = costs(runs, shared)
    known = [cost.seconds for cost in found if cost.seconds is not None]
    return sum(known) if known else None


def costs(runs: Iterable[tuple[dict[str, Any], Path]], shared: bool) -> list[Cost]:
    """Returns what the stages cost that are not finished, in their order.

    Args:
      runs: (config, workdir) per run.
      shared: whether a stage that is the same in several runs is computed once.
    """
    found: dict[str, Cost] = {}
    for config, workdir in runs:
        values = precision.resolved(config, workdir)
        folders, resolved = _resolved(values, workdir)
        typed = {name: recipe.check(resolved[name], name) for name in folders}
        seconds = pace.estimate(typed, folders)
        tokens = pace.tokens(typed, folders)
        for name in folders:
            if (folders[name] / DONE).exists():
                continue
            key = identity(values, name) if shared else str(folders[name])
            before = found.get(key)
            count = before.runs if before else 0
            found[key] = Cost(name, count + 1, seconds.get(name), tokens.get(name))
    return list(found.values())


def identity(values: Mapping[str, Any], name: str) -> str:
    """Returns the config of a stage of a recipe, with those of the stages that it refers to."""
    if "stages" not in values:
        return json_text.encode(values, name, sort_keys=True)
    text = json_text.encode(values[name], name, sort_keys=True)
    sources = sorted(set(re.findall('stage:([^/"]*)', text)) & set(values["stages"]))
    return "\n".join([text, *(identity(values, source) for source in sources)])


def _resolved(
    values: dict[str, Any], workdir: Path
) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """Returns the folders and the configs of the stages, `stage:NAME` replaced by folders."""
    if "stages" not in values:
        name = str(values.get("stage", ""))
        return {name: workdir}, {name: values}
    folders = recipe.stage_folders(values, workdir)
    resolved = {name: recipe.resolve(values[name], folders, name) for name in folders}
    return folders, resolved


# ------------------------------------------------------------------ what each stage does


def _actions(
    values: dict[str, Any],
    resolved: Mapping[str, dict[str, Any]],
    folders: Mapping[str, Path],
    workdir: Path,
    choice: rerun.Choice | None,
    cache: Path | None,
) -> dict[str, str]:
    """Returns what happens to every stage."""
    moved: list[str] = []
    if choice is not None:
        moved, _ = rerun.to_move(values, folders, workdir, choice)
    goes_on = claims.raised(workdir, values)
    store = Cache(cache) if cache is not None else None
    actions: dict[str, str] = {}
    ended = False
    for name, folder in folders.items():
        key = store.key(resolved[name], folder) if store else None
        if ended:
            actions[name] = "does not run"
        elif name in moved:
            actions[name] = "runs again"
        elif (folder / DONE).exists() and folder not in goes_on:
            actions[name] = "done"
        elif store and key and store.has(key):
            actions[name] = "is taken from the cache"
        else:
            actions[name] = _start(folder)
        ended |= choice is not None and choice == ("only", name)
    return actions


def _start(folder: Path) -> str:
    step = checkpoint.latest_step(folder)
    return "runs" if step is None else f"resumes at step {step:,}"


def _stages(
    typed: Mapping[str, Any], folders: Mapping[str, Path], actions: Mapping[str, str]
) -> Iterator[Stage]:
    seconds = pace.estimate(typed, folders)
    earlier: dict[str, Any] = {}
    for name, config in typed.items():
        runs = actions[name].startswith(("runs", "resumes"))
        origins = Origins(earlier)
        nets = capacity.known_nets(config, origins)
        earlier[str(folders[name])] = config
        yield Stage(
            name=name,
            action=actions[name] + _steps(config, actions[name]),
            runs=runs,
            models="\n".join(_model(net) for net in nets),
            memory=_memory(config, nets, origins),
            seconds=seconds.get(name) if runs else None,
        )


def _steps(config: Any, action: str) -> str:
    steps = getattr(config, "steps", 0)
    if not steps or not action.startswith(("runs", "resumes")):
        return ""
    return f" of {steps:,}" if action.startswith("resumes") else f", {steps:,} steps"


def _model(net: footprint.Net) -> str:
    text = f"{net.name} {announce.number(net.numbers)}"
    if not net.config.n_experts:
        return text
    active = active_parameters(net.config, net.role.head)
    return f"{text}, {announce.number(active)} active"


def _memory(
    config: Any, nets: Sequence[footprint.Net], origins: Origins
) -> float | None:
    """Returns the bytes per device at the stage's peak; None if its models are not known."""
    if not nets:
        return None
    axes = recipe.layout_of(config, origins).mesh.shape
    return capacity.device_bytes(config, nets, axes)


# ------------------------------------------------------------------ data


def _data(typed: Mapping[str, Any], folders: Mapping[str, Path]) -> Iterator[Data]:
    """Yields the sources of stages, each opened once, to count its rows."""
    counted: dict[SourceConfig | str, str] = {}
    makers = {str(folder): name for name, folder in folders.items()}
    for name, config in typed.items():
        seen: set[str] = set()
        for option, value in references.leaves(config, name):
            is_rankings = references.last_name(option) == "preferences"
            if not isinstance(value, SourceConfig) and not is_rankings:
                continue
            spec = value.spec if isinstance(value, SourceConfig) else str(value)
            key = repr(value)
            if key in seen:
                continue
            seen.add(key)
            maker = next((makers[f] for f in makers if f in spec), None)
            if key not in counted:
                counted[key] = (
                    f"made by {maker}" if maker else _rows(value, is_rankings)
                )
            yield Data(name, _label(value), counted[key])


def _label(value: SourceConfig | str) -> str:
    return (
        f"{value.spec}, {value.split}"
        if isinstance(value, SourceConfig)
        else f"{value}, train"
    )


def _rows(value: SourceConfig | str, is_rankings: bool) -> str:
    if isinstance(value, str):
        return f"{len(open_preferences((value,), 'train')):,} rows"
    named = formats.parse(value.spec, value.format)
    if named.scheme == formats.HF_DATASET:
        return "loaded by the run"
    if named.scheme == formats.TFDS:
        from rlhfjax.data import tfds_records

        folder = tfds_records.folder_to_prepare(value.spec, named.rest, value.data_dir)
        if folder is not None:
            return f"not there yet; the run prepares it in {folder}"
    else:
        split = split_of_preferences(value, "train") if is_rankings else value.split
        chosen = formats.choose(value.spec, named, split, value.documents)
        folder = indexed.folder_to_write(
            chosen.files, chosen.reader, chosen.options, value.data_dir
        )
        if folder is not None:
            return f"not indexed yet; the run does so in {folder}"
    if is_rankings:
        kinds = ("preferences", "unpaired", "steps")
        source = open_preferences((value,), "train", kinds=kinds)
    else:
        source = value.read()
    skipped = f", {source.skipped:,} malformed ones left out" if source.skipped else ""
    return f"{len(source):,} rows{skipped}"


# ------------------------------------------------------------------ text


def _stage_table(stages: Sequence[Stage]) -> Table:
    columns = ["stage", "what it does", "parameters", "memory per device"]
    has_time = any(stage.seconds is not None for stage in stages)
    table = _table([*columns, "time"] if has_time else columns)
    for stage in stages:
        memory = device_bytes.shown(stage.memory) if stage.memory and stage.runs else ""
        cells = [stage.name, stage.action, stage.models if stage.runs else "", memory]
        if has_time:
            cells.append("" if stage.seconds is None else duration(stage.seconds))
        table.add_row(*map(_cell, cells))
    return table


def _print_totals(stages: Sequence[Stage]) -> None:
    running = [stage for stage in stages if stage.runs]
    if not running:
        print("\nThere is nothing to compute.")
        return
    print()
    most = max((stage.memory or 0.0 for stage in running), default=0.0)
    there = _device_memory()
    if most and there:
        print(
            f"memory: {device_bytes.shown(most)} of {device_bytes.shown(there)} per device"
            f" ({most / there:.0%}), by estimate"
        )
    known = [stage.seconds for stage in running if stage.seconds is not None]
    if known:
        unknown = len(running) - len(known)
        rest = f", without {unknown} stages whose speed is unknown" if unknown else ""
        print(f"time: about {duration(sum(known))} at this machine's speed{rest}")


def _device_memory() -> float | None:
    there = device_bytes.devices_memory()
    return None if there is None else there / jax.device_count()


def _data_table(data: Sequence[Data]) -> Table:
    table = _table(["stage", "data", "rows"])
    last = ""
    for row in data:
        name = "" if row.stage == last else row.stage
        table.add_row(*map(_cell, (name, row.spec, row.rows)))
        last = row.stage
    return table


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column)
    return table


def _cell(text: str) -> Text:
    """Returns the lines of a cell, without escapes of the terminal."""
    return Text("\n".join(map(printable, text.split("\n"))))
