"""The command `rlhfjax label`: its flags, the stage that it runs, and what organizers do."""

import shlex
from typing import Any

from absl import flags

from rlhfjax.errors import ConfigError

Flags = flags.FlagValues
TASKS = ["demonstrate", "rank", "compare", "edit", "feedback"]
MOST = 2**31 - 1
# Flags that are options of the stage; None or []: not given.
OPTIONS = (
    "task",
    "count",
    "labelers",
    "overlap",
    "guidelines",
    "screening",
    "calibration",
    "tokenizer",
    "host",
    "port",
)


def define(fv: Flags) -> None:
    flags.DEFINE_string(
        "from",
        None,
        "what is labeled: a folder that `collect` wrote, or a glob of JSON lines with prompt and "
        "completions",
        flag_values=fv,
    )
    flags.DEFINE_enum(
        "task", None, TASKS, "what labelers do; default: rank", flag_values=fv
    )
    _integer(fv, "count", "labels to collect; default: those that all items need", 0)
    flags.DEFINE_list("labelers", [], "pseudonyms to invite", flag_values=fv)
    _integer(fv, "overlap", "labelers per item; default: 1", 1)
    _text(fv, "guidelines", "text file that labelers can always read")
    _text(fv, "screening", "glob of known rankings, the test before work")
    _text(fv, "calibration", "glob of known rankings, shown among the work")
    _text(fv, "tokenizer", "a tokenizer's folder, for texts that were not sampled")
    _text(fv, "host", "address of the page; default: 127.0.0.1, this machine alone")
    _integer(
        fv, "port", "port of the page; default: 8100; 0 takes a free one", 0, 65535
    )
    _text(fv, "invite", "print a link for a new labeler of this pseudonym, and exit")
    _text(fv, "remove", "delete all data of the labeler of this pseudonym, and exit")
    flags.DEFINE_bool(
        "progress", False, "print counts, agreement and links, and exit", flag_values=fv
    )
    flags.DEFINE_bool(
        "export", False, "write the rows of the labels so far, and exit", flag_values=fv
    )


def _text(fv: Flags, name: str, meaning: str) -> None:
    flags.DEFINE_string(name, None, meaning, flag_values=fv)


def _integer(fv: Flags, name: str, meaning: str, least: int, most: int = MOST) -> None:
    flags.DEFINE_integer(name, None, meaning, least, most, flag_values=fv)


def run(fv: Flags) -> None:
    """Serves a page on which people label, and writes what they labeled.

    It prints a link for the organizer and one for each labeler. It ends when there are enough
    labels, and then writes rankings.jsonl, preferences/, demonstrations/ or feedback/ into the
    workdir. The same command, given again, continues; --workdir alone is enough then. The flags
    --invite, --remove, --progress and --export also work while the page is served, and for the
    stage `label` of a recipe.

    rlhfjax label --workdir=runs/labels --from=runs/quickstart/03_collect --labelers=ann,bob
    rlhfjax label --workdir=runs/labels --from=rows.jsonl --task=demonstrate --count=100
    rlhfjax label --workdir=runs/labels --invite=cleo
    rlhfjax label --workdir=runs/labels --progress
    """
    from rlhfjax import paths

    if not fv.workdir:
        raise ConfigError("--workdir is required")
    workdir = paths.path(fv.workdir)
    action = _chosen_action(fv)
    if action is None:
        _serve(fv, workdir)
    else:
        _organize(action, fv[action].value, workdir)


def _chosen_action(fv: Flags) -> str | None:
    """Returns the flag of what an organizer does; None if the page is to be served."""
    actions = [
        name for name in ("invite", "remove", "progress", "export") if fv[name].value
    ]
    if len(actions) > 1:
        raise ConfigError(
            f"--{actions[0]} and --{actions[1]}: give one of them, not both"
        )
    return actions[0] if actions else None


# ------------------------------------------------------------------ serving


def _serve(fv: Flags, workdir: Any) -> None:
    from rlhfjax import recipe, workdirs
    from rlhfjax.stages import stage_config

    values = {name: fv[name].value for name in OPTIONS}
    given = {name: value for name, value in values.items() if value not in (None, [])}
    if "labelers" in given:
        given["labelers"] = tuple(given["labelers"])
    config = workdirs.read_config(workdir)
    if config is not None and "stage:" in str(config):
        raise ConfigError(
            f"{workdir} is a stage of a recipe; rlhfjax run serves its page"
        )
    if fv["from"].value:
        config = stage_config("label", **_source(fv["from"].value), **given)
    elif config is not None:
        config = config | given
    else:
        raise ConfigError(
            "--from is required: a folder that `collect` wrote, or a glob"
        )
    metrics = recipe.run(config, workdir)
    name = shlex.quote(str(workdir))
    print(f"{metrics['label/labels']:.0f} labels in {name}")


def _source(name: str) -> dict[str, Any]:
    """Returns the option of the stage that a value of --from stands for."""
    from rlhfjax import paths
    from rlhfjax.data.dataset_folders import is_dataset

    for folder in (name, f"{name.rstrip('/')}/preferences"):
        if is_dataset(folder):
            return {"answers": (folder,)}
    if paths.path(name).is_dir():
        raise ConfigError(
            f"--from={name}: no dataset in this folder; the collect stage writes one"
        )
    return {"items": name}


# ------------------------------------------------------------------ what organizers do


def _organize(action: str, value: Any, workdir: Any) -> None:
    from rlhfjax import workdirs
    from rlhfjax.labeling import export
    from rlhfjax.labeling.store import FILE, Store
    from rlhfjax.web import access

    access.validate_installed("sqlalchemy")
    if not (workdir / FILE).exists():
        raise ConfigError(f"--workdir={workdir}: no labels here ({FILE})")
    config = workdirs.read_config(workdir) or {}
    store = Store(workdir / FILE)
    try:
        if action == "invite":
            person = store.invite(value)
            print(f"{person.name}: {_url(config)}/{person.token}/")
        elif action == "progress":
            _print_progress(store, config)
        else:
            if action == "remove":
                print(f"{store.remove(value)} events of {value} are deleted")
                _renew_preferences(store, workdir, config)
            counts = export.write(store, workdir, config.get("validation", 0.05))
            rows = (f"{count} {name}" for name, count in counts.items() if count)
            print(f"{workdir}: {', '.join(rows) or 'no rows'}")
    finally:
        store.close()


def _url(config: dict[str, Any]) -> str:
    """Returns where the page is, as far as the config tells."""
    port = config.get("port") or "PORT"
    return f"http://{config.get('host', '127.0.0.1')}:{port}"


def _print_progress(store: Any, config: dict[str, Any]) -> None:
    from rlhfjax.labeling import agreement

    labels = store.labels()
    print(f"organizer: {_url(config)}/{store.organizer().token}/")
    for person in store.people():
        own = agreement.summary(labels, person.name)
        counts = f"{own['labels']} labels, {own['skipped']} skipped"
        print(f"{person.name}: {counts}, {_url(config)}/{person.token}/")
    print(f"labels: {store.label_count()} for {store.item_count()} items")
    work = [label for label in labels if label.kind == "work"]
    for name, value in agreement.between(work).items():
        print(f"{name}: {value:.3g}")


def _renew_preferences(store: Any, workdir: Any, config: dict[str, Any]) -> None:
    """Writes preferences/ anew, if it is there, without a labeler who was removed."""
    from rlhfjax import paths, recipe
    from rlhfjax.data.preferences import write_preferences
    from rlhfjax.data.tokenizer import load_tokenizer
    from rlhfjax.interop.store import numbered
    from rlhfjax.labeling import export, preferences

    folder = workdir / "preferences"
    if not folder.exists():
        return
    siblings = {stage.name[3:]: stage for stage in numbered(workdir.parent)}
    config = recipe.resolve(config, siblings, workdir.name[3:])
    name = config.get("tokenizer")
    rows = preferences.rows(store.labels(), load_tokenizer(name) if name else None)
    if splits := export.both_splits(rows, config["validation"]):
        write_preferences(folder, splits, labeler="unnamed")
    else:
        paths.remove(folder)
