"""Runs recipes: stages one after the other, each in its own folder.

A recipe's config has `stages`, a tuple of names, and the config of each name. In these configs
`"stage:NAME"` or `"stage:NAME/FILE"` stands for the folder of an earlier stage, also after a scheme
(`"jsonl:stage:NAME/FILE"`) or a parameter (`"rule:MODULE:FUNCTION?metadata=stage:NAME/FILE"`). Any
other text with `stage:` in it is text. The same command run again continues where the recipe
stopped.
"""

import contextlib
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from rlhfjax import (
    announce,
    best,
    capacity,
    checkpoint,
    claims,
    footprint,
    host_memory,
    hosts,
    json_text,
    pace,
    paths,
    precision,
    profile,
    provenance,
    references,
    stages,
    template_date,
    trackers,
    train,
    workdirs,
)
from rlhfjax.clock import Clock
from rlhfjax.config import TrainConfig, build, to_dict, write_json
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop import store
from rlhfjax.jsonl import write_jsonl
from rlhfjax.mesh import Layout, make_layout
from rlhfjax.metrics import METRICS_FILE, read_rows
from rlhfjax.models.config import TransformerConfig
from rlhfjax.origins import Origins, Unknown, roles_of
from rlhfjax.paths import Path
from rlhfjax.stage_cache import Cache
from rlhfjax.workdirs import CONFIG, DONE

MOST_STAGES = 100  # the folders of stages are numbered by two digits
# (what stands before the reference, name of the stage, file)
_REFERENCE = re.compile(r"((?:\S*[:=])?)stage:([^\s/]*)((?:/.*)?)", re.DOTALL)
_TEXTS = ("option", "template", "token")  # options that a model reads


def run(
    config: Mapping[str, Any] | ConfigDict,
    workdir: Path,
    *,
    last: str = "",
    cache: Path | None = None,
) -> dict[str, float]:
    """Runs a recipe, or the one stage that the config describes.

    Args:
      last: the stage of the recipe after which to stop; default: the last one.
      cache: folder of finished stages, see `stage_cache`; None: every stage is computed.

    Returns:
      The last value of every metric of every stage.

    Raises:
      ConfigError: before anything is computed, if a stage's config is invalid, refers to something
        that is not there, or differs from the workdir's.
    """
    given = to_dict(config)
    values = hosts.share(lambda: precision.resolved(given, workdir))
    stage_cache = Cache(cache) if cache is not None else None
    if "stages" not in values:
        return run_stage(values, workdir, cache=stage_cache)
    folders = stage_folders(values, workdir)
    resolved = {name: resolve(values[name], folders, name) for name in folders}
    typed = check_all(resolved, folders)
    hosts.share(lambda: references.validate(typed, folders, DONE))
    capacity.validate(typed, folders, DONE)
    hosts.share(lambda: claims.claim(workdir, values))
    done = {name for name, folder in folders.items() if (folder / DONE).exists()}
    announce.stages(folders, done)
    if len(done) < len(folders):
        seeds = {
            name: stage.seed for name, stage in typed.items() if hasattr(stage, "seed")
        }
        hosts.share(lambda: provenance.record(workdir, seeds=seeds))
    metrics: dict[str, float] = {}
    names = list(folders)
    to_run = {name: typed[name] for name in names[: names.index(last or names[-1]) + 1]}
    for i, (name, stage_values) in enumerate(resolved.items(), start=1):
        title = f"[{i}/{len(folders)}] {name}"
        with _date_of(workdir), pace.announced(name, to_run, folders):
            metrics |= run_stage(
                stage_values,
                folders[name],
                record=values[name],
                title=title,
                cache=stage_cache,
            )
        hosts.share(lambda: collect_metrics(workdir, folders))
        if name == last:
            break
    return metrics


def validate(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """Returns every stage's typed config by name; looks at no device, file or workdir.

    Raises:
      ConfigError: a stage's config is invalid, or names a stage that does not come before it.
    """
    values = to_dict(config)
    if "stages" not in values:
        return {values.get("stage", ""): check(values, values.get("stage", ""))}
    folders = stage_folders(values, paths.path("."))
    resolved = {name: resolve(values[name], folders, name) for name in folders}
    return {name: check(resolved[name], name) for name in folders}


def run_stage(
    config: dict[str, Any],
    workdir: Path,
    record: dict[str, Any] | None = None,
    title: str = "",
    cache: Cache | None = None,
) -> dict[str, float]:
    """Runs one stage and returns its metrics; of a finished stage only returns its metrics.

    Args:
      record: the workdir's config.json. In a recipe it is the config with its `stage:` references,
        so that the recipe's folder may be moved.
      title: the stage's name for the log; default: the kind of stage.
      cache: finished stages; a stage that is there is copied, not computed.
    """
    stages.find(config.get("stage", ""))
    name = config["stage"]
    title = title or name
    configs = check_all({name: config}, {name: workdir})
    hosts.share(lambda: references.validate(configs, {name: workdir}, DONE))
    capacity.validate(configs, {name: workdir}, DONE)
    record = config if record is None else record
    hosts.share(lambda: claims.claim(workdir, record))
    key = hosts.share(lambda: cache.key(config, workdir)) if cache else None
    if done := hosts.share(lambda: read_done(workdir)):
        return done["metrics"]
    if cache is None or key is None:
        return _compute(configs[name], workdir, title)
    with (
        _date_of(workdir),
        cache.locked(key, title) if hosts.first() else contextlib.nullcontext(),
    ):
        if hosts.share(lambda: cache.restore(key, workdir, DONE)):
            hosts.share(lambda: write_json(workdir / CONFIG, record))
            done = hosts.share(lambda: read_done(workdir)) or {}
            announce.cached(title, done)
            hosts.share(lambda: trackers.log_finished_stage(workdir))
            return done["metrics"]
        metrics = _compute(configs[name], workdir, title)
        hosts.share(lambda: cache.store(key, workdir))
    return metrics


def _date_of(workdir: Path) -> contextlib.AbstractContextManager[None]:
    """Pins the date that chat templates write to that of the workdir's first start."""
    date = hosts.share(lambda: provenance.first_template_date(workdir))
    return template_date.pinned(date)


def _compute(config: Any, workdir: Path, title: str) -> dict[str, float]:
    """Runs a stage that is not finished, writes its done.json, and returns its metrics."""
    with _date_of(workdir), template_date.recorded() as dates:
        return _compute_dated(config, workdir, title, dates)


def _compute_dated(
    config: Any, workdir: Path, title: str, dates: dict[str, str]
) -> dict[str, float]:
    module = stages.find(config.stage)
    layout = layout_of(config, Origins({}))
    nets = announce.models(config)
    precision.warn_if_slow(net.config.dtype for net in nets)
    memory = capacity.device_bytes(config, nets, layout.mesh.shape)
    announce.stage(config, title, nets, layout, memory)
    seeds = {config.stage: config.seed} if hasattr(config, "seed") else {}
    sizes = {net.name: net.numbers for net in nets}
    hosts.share(lambda: provenance.record(workdir, seeds=seeds, parameters=sizes))
    clock = Clock(workdir)
    host_memory.release_after_compiling()
    if getattr(module, "ON_ONE_HOST", False):
        metrics = hosts.share(lambda: module.run(config, workdir, layout))
    elif hasattr(module, "run"):
        metrics = module.run(config, workdir, layout)
    else:
        with layout.use():
            stage = module.build(config, layout)
        metrics = train.run(stage, config, workdir, layout, clock)
    steps = getattr(config, "steps", 0)
    if isinstance(
        config, TrainConfig
    ):  # fewer than config.steps without patience for more
        steps = hosts.share(lambda: checkpoint.latest_step(workdir)) or steps
    done = {
        "stage": json_text.unicode(workdir.name),
        "kind": config.stage,
        "steps": steps,
        "seconds": round(clock.worked(), 1),
        "metrics": json_text.null_nonfinite(metrics),
    }
    if dates:
        done[workdirs.DATES] = dates
    if record := best.describe(config, metrics):
        done["best"] = record
    if hasattr(module, "run"):
        hosts.share(lambda: trackers.log_finished_stage(workdir))
    hosts.share(lambda: write_json(workdir / DONE, done))
    if steps == getattr(config, "steps", 0):
        pace.keep(config, nets, clock)
    return metrics


def read_done(workdir: Path) -> dict[str, Any] | None:
    """Returns a finished stage's done.json, NaN for metrics that are null; None if unfinished."""
    done = workdirs.read_done(workdir)
    if done is None:
        return None
    return {**done, "metrics": json_text.nan_for_null(done["metrics"])}


def evaluate(
    config: Mapping[str, Any] | ConfigDict | None, workdir: Path
) -> dict[str, float]:
    """Returns the held-out metrics of a stage's latest checkpoint; changes nothing in the workdir.

    Args:
      config: another config for the same model, with other held-out data for instance; None: the
        workdir's own.

    Raises:
      ConfigError: the workdir holds no stage that trains.
      CheckpointError: the stage has no checkpoint.
    """
    if config is None:
        config = workdirs.read_config(workdir)
        if config is None:
            raise ConfigError(
                f"{workdir}: no config.json here; expected the workdir of a stage"
            )
    values = precision.resolved(to_dict(config), workdir)
    if "stages" in values:
        raise ConfigError(
            f"{workdir} is the workdir of a recipe; name one of its stages: {workdir}/NN_name"
        )
    module = stages.find(values.get("stage", ""))
    if not hasattr(module, "build"):
        raise ConfigError(
            f"{workdir}: the stage {values['stage']} has no checkpoint to evaluate;"
            " name a stage that trains"
        )
    siblings = {folder.name[3:]: folder for folder in store.numbered(workdir.parent)}
    typed = check(resolve(values, siblings, workdir.name[3:]), values["stage"])
    layout = layout_of(typed, Origins({}))
    with layout.use(), _date_of(workdir):
        return train.evaluate(module.build(typed, layout), typed, workdir, layout)


def can_talk(workdir: Path) -> bool:
    """Returns whether the model that `rlhfjax chat` would load is a language model."""
    try:
        return store.describe(workdir).head == "lm"
    except CheckpointError:
        return False


def stage_folders(config: Mapping[str, Any], workdir: Path) -> dict[str, Path]:
    """Returns {name: workdir/NN_name} for the stages of a recipe, in order.

    Raises:
      ConfigError: a stage without a config, a config without a stage, or a name given twice.
    """
    names = config["stages"]
    is_list = isinstance(names, list | tuple)
    if not is_list or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"recipe: stages={json_text.shown(names)}: expected the names of stages"
        )
    names = list(names)
    if not names:
        raise ConfigError("recipe: `stages` is empty; expected the names of stages")
    for name in names:
        if not isinstance(config.get(name), Mapping):
            raise ConfigError(
                f"recipe: stage {name!r} is in `stages` but has no config"
            )
        workdirs.validate_name(name, "recipe: stages", ConfigError)
    extra = sorted(set(config) - set(names) - {"stages"})
    if extra:
        raise ConfigError(
            f"recipe: {extra[0]!r} is not in `stages`: {', '.join(names)}"
        )
    if len(names) > MOST_STAGES:
        raise ConfigError(
            f"recipe: {len(names)} stages; at most {MOST_STAGES} are accepted"
        )
    if len(set(names)) < len(names):
        raise ConfigError(
            f"recipe: a name appears twice in `stages`: {', '.join(names)}"
        )
    return {name: workdir / f"{i:02d}_{name}" for i, name in enumerate(names)}


def finished(config: Mapping[str, Any], workdir: Path) -> bool:
    """Returns whether the recipe, or the one stage, has run to its end in this workdir."""
    folders = [workdir]
    if "stages" in config:
        folders = list(stage_folders(config, workdir).values())
    done = all(workdirs.read_done(folder) is not None for folder in folders)
    return done and not claims.raised(workdir, config)


def resolve(value: Any, folders: Mapping[str, Path], name: str) -> Any:
    """Returns a config with references to stages replaced by paths.

    Args:
      name: the stage whose config it is; it can refer to the stages before it.

    Raises:
      ConfigError: a reference to any other stage.
    """
    if isinstance(value, Mapping):
        return {
            key: part if key in _TEXTS else resolve(part, folders, name)
            for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [resolve(v, folders, name) for v in value]
    reference = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if reference is None:
        return value
    prefix, target, file = reference.groups()
    names = list(folders)
    earlier = names[: names.index(name)] if name in folders else []
    if target not in earlier:
        known = ", ".join(earlier) or "none"
        raise ConfigError(
            f"recipe: {name} refers to {value!r}; the stages before it are {known}"
        )
    return f"{prefix}{folders[target]}{file}"


def check(config: Mapping[str, Any], where: str) -> Any:
    """Returns the stage's typed config. Raises ConfigError if it is invalid."""
    typed = build(stages.config_class(config.get("stage", "")), config, where)
    if isinstance(typed, TrainConfig):
        profile.validate(typed)
        best.validate(typed)
    return typed


def check_all(
    configs: Mapping[str, Mapping[str, Any]], folders: Mapping[str, Path]
) -> dict[str, Any]:
    """Returns the typed configs of all stages, validated against their meshes and models.

    Raises:
      ConfigError: for the first config that is invalid.
      CheckpointError: a stage starts from a model that is not there and that no stage will make.
    """
    typed = {
        name: check(precision.resolved(config), name)
        for name, config in configs.items()
    }
    vocabularies = {
        str(folders[name]): config.vocab_size
        for name, config in typed.items()
        if hasattr(config, "vocab_size")
    }
    earlier: dict[str, Any] = {}  # typed configs of the stages before, by folder
    for name, config in typed.items():
        origins = Origins(earlier)
        model_config = _main_model(config, origins)
        tokens = vocabularies.get(getattr(config, "tokenizer", None) or "", 0)
        if model_config is not None and model_config.vocab_size < tokens:
            size = model_config.vocab_size
            raise ConfigError(
                f"{name}.model.vocab_size={size} is less than the tokenizer's {tokens}"
            )
        # Strategy "auto" needs the model; without it the config is validated when the stage begins.
        has_mesh = model_config is not None or config.mesh.strategy != "auto"
        validate_stage = getattr(stages.find(config.stage), "validate", None)
        if has_mesh and validate_stage:
            validate_stage(config, layout_of(config, origins), model_config)
        earlier[str(folders[name])] = config
    return typed


def _main_model(config: Any, origins: Origins) -> TransformerConfig | None:
    """Returns the model_config of a stage's first role; None if there is none, or none yet."""
    for role in roles_of(config).values():
        if not role.source:
            return None  # `validate` names what is missing
        try:
            return origins.of_role(role, f"{config.stage}.overrides").config
        except Unknown:
            return None
    return None


def layout_of(config: Any, origins: Origins) -> Layout:
    """Returns the mesh of a stage's config; strategy "auto" chooses it by the stage's models."""
    workload = getattr(stages.find(config.stage), "workload", None)
    if config.mesh.strategy != "auto" or workload is None:
        return make_layout(config.mesh)
    try:
        nets = origins.nets(roles_of(config), config.stage)
    except Unknown:
        return make_layout(config.mesh)
    return make_layout(config.mesh, need=footprint.need_of(nets, workload(config)))


def collect_metrics(workdir: Path, folders: Mapping[str, Path]) -> None:
    """Writes the recipe's metrics.jsonl: all lines of its stages so far, with the stage's name."""
    rows: list[dict[str, Any]] = []
    for name, folder in folders.items():
        rows += [{"stage": name, **row} for row in read_rows(folder / METRICS_FILE)]
    write_jsonl(workdir / METRICS_FILE, rows)
