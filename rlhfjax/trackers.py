"""Experiment trackers: what TensorBoard and Weights & Biases are told beside the metrics.

TensorBoard gets every option of the stage and where the run comes from as hyperparameters, which
its HPARAMS page compares between runs, and the command as text.

In wandb one recipe is one run, however often it is interrupted and wherever its folder is moved:
the run's id is kept in the recipe's folder, in `wandb_id.txt`. Each stage logs with a step of its
own (`sft/loss` over `sft/step`), so that wandb drops nothing of a stage that resumes at an earlier
step. Jobs and stages that were taken from the cache are logged from their files. By default a run
is named like its folder, and the runs of a sweep are a group. wandb's own variables come first:
WANDB_NAME, WANDB_RUN_GROUP, WANDB_MODE, WANDB_ENTITY and others.
"""

import contextlib
import importlib
import os
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rlhfjax import json_text, paths, provenance, workdirs
from rlhfjax.errors import ConfigError, DataError, first_line, install
from rlhfjax.jsonl import read_jsonl
from rlhfjax.paths import Path

METRICS = "metrics.jsonl"
ID = "wandb_id.txt"
WANDB_FILES = ("wandb", ID)
SWEEP = "sweep.json"  # in a sweep's folder: the names of its runs


# ------------------------------------------------------------------ what a run is


class Run(NamedTuple):
    """What is one run for a tracker: a recipe, or a stage that runs alone."""

    folder: Path
    config: dict[str, Any]
    stage: str  # name of a stage of the recipe; "" if it runs alone

    def stages(self) -> Iterator[tuple[str, Path]]:
        """Yields name and workdir of the recipe's stages."""
        for i, name in enumerate(self.config.get("stages", ())):
            yield name, self.folder / f"{i:02d}_{name}"


def run_of(workdir: Path) -> Run:
    """Returns the run that the workdir of a stage belongs to."""
    recipe = Run(workdir.parent, _config(workdir.parent), "")
    for name, folder in recipe.stages():
        if folder == workdir:
            return recipe._replace(stage=name)
    return Run(workdir, _config(workdir), "")


def _config(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(DataError):  # the file of another program
        return workdirs.read_config(folder) or {}
    return {}


def _last_start(folder: Path) -> dict[str, Any]:
    return next(reversed(provenance.read(folder)), {})


# ------------------------------------------------------------------ TensorBoard


def tensorboard(folder: Path, workdir: Path, resume_step: int | None) -> Any:
    """Returns a SummaryWriter; a new one begins with the options and the command.

    Args:
      folder: local folder to write `tb/` in.
      workdir: of the stage.
      resume_step: the step that a run resumes from; TensorBoard forgets later ones.
    """
    # Imported here because it takes half a second, which `--help` should not.
    from tensorboardX import SummaryWriter

    first_step = 0 if resume_step is None else resume_step + 1
    folder = folder / "tb"
    # A start in the same second would overwrite a file without a number.
    number = len(paths.files(folder)) if folder.exists() else 0
    writer = SummaryWriter(
        str(folder),
        purge_step=first_step,
        flush_secs=10,
        filename_suffix=f".{number}",
    )
    if resume_step is None:
        _describe(writer, workdir)
    return writer


def _describe(writer: Any, workdir: Path) -> None:
    """Writes a stage's options, its provenance and its command."""
    from tensorboardX.summary import hparams

    options = json_text.leaves(_config(workdir))
    values = {name: _hyperparameter(value) for name, value in options.items() if name}
    start = _last_start(workdir)
    values |= dict(_origin(start))
    if values:
        # Without the summary `experiment`, TensorBoard takes the columns from all runs together.
        _, session, _ = hparams(values, {})
        writer.file_writer.add_summary(session, 0)
    if start:
        writer.add_text("command", f"    {start['command']}", 0)


def _hyperparameter(value: Any) -> Any:
    is_plain = value is None or isinstance(value, bool | int | float | str)
    return value if is_plain else str(value)


def _origin(start: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the parts of a start's provenance that runs are compared by."""
    for name in ("commit", "clean"):
        if name in start:
            yield f"provenance.{name}", start[name]
    for part in ("versions", "hardware"):
        for name, value in start.get(part, {}).items():
            yield f"provenance.{part}.{name}", value


# ------------------------------------------------------------------ wandb


class Wandb:
    """The wandb run, as one stage logs to it."""

    def __init__(self, workdir: Path, project: str):
        """Starts the run, or continues it.

        Args:
          workdir: of the stage.

        Raises:
          ConfigError: wandb is not installed, or does not start.
        """
        wandb = _import_wandb()
        self._workdir, self._run = workdir, run_of(workdir)
        self._prefixes: set[str] = set()  # those whose step is defined
        folder = self._run.folder
        known = paths.read_if_there(folder / ID)
        name = known.decode().strip() if known else secrets.token_hex(8)
        self._mirror = paths.Mirror(folder)
        paths.make_folder(self._mirror.folder)
        options = {
            "project": project,
            "id": name,
            "resume": "allow",
            "dir": str(self._mirror.folder),
            "config": {**self._run.config, "provenance": _last_start(folder)},
            "allow_val_change": True,  # the provenance of a later start
            **_names(folder),
        }
        try:
            self._wandb = wandb.init(**options)
        except Exception as e:
            raise ConfigError(f"log.wandb={project}: {first_line(e)}") from e
        if not known:
            paths.write(folder / ID, f"{name}\n")
            self._log_finished_stages()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs a line of metrics; wandb has them as STAGE/NAME over STAGE/step."""
        self._log(self._run.stage, step, values)

    def log_file(self) -> None:
        """Logs the whole metrics.jsonl of a stage."""
        self._log_file(self._run.stage, self._workdir)

    def sync(self) -> None:
        """Copies wandb's files to the bucket that the run is in, if it is in one."""
        self._mirror.sync()

    def close(self, failed: bool = False) -> None:
        """Ends the run until the next stage continues it."""
        self._wandb.finish(exit_code=int(failed))
        self._mirror.close()

    def _log_finished_stages(self) -> None:
        """Logs the stages before this one, if the run is new and they are not."""
        for name, folder in self._run.stages():
            is_other = name != self._run.stage
            if is_other and workdirs.read_done(folder) and _project(self._run, name):
                self._log_file(name, folder)

    def _log_file(self, stage: str, folder: Path) -> None:
        for row in read_jsonl(folder / METRICS):
            step = row.pop("step")
            self._log(stage, step, json_text.nan_for_null(row))

    def _log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        named: dict[str, float] = {}
        for metric, value in values.items():
            kind, _, name = metric.partition("/")
            prefix = stage or kind
            self._define_step(prefix)
            named[f"{prefix}/step"] = step
            named[f"{prefix}/{name or kind}"] = float(value)
        self._wandb.log(named)

    def _define_step(self, prefix: str) -> None:
        if prefix not in self._prefixes:
            self._prefixes.add(prefix)
            step = f"{prefix}/step"
            self._wandb.define_metric(step, hidden=True)
            self._wandb.define_metric(f"{prefix}/*", step_metric=step)


def forget_wandb(folder: Path, previous: Path) -> None:
    """Moves the id of a recipe's wandb run to the stages that run again: they get a new run."""
    if name := paths.read_if_there(folder / ID):
        paths.write(previous / ID, name)
        (folder / ID).unlink()


def log_finished_stage(workdir: Path) -> None:
    """Logs the metrics.jsonl of a job, or of a stage from the cache, to the recipe's wandb run.

    It does nothing if no stage of the recipe logs to wandb.
    """
    run = run_of(workdir)
    if project := _project(run, run.stage):
        wandb = Wandb(workdir, project)
        wandb.log_file()
        wandb.close()


def _project(run: Run, stage: str) -> str:
    """Returns the project of a stage; that of a job is the recipe's first."""
    config = run.config.get(stage, run.config)
    if "log" in config:
        return config["log"].get("wandb", "")
    projects = [
        run.config[name].get("log", {}).get("wandb", "")
        for name in run.config.get("stages", ())
    ]
    return next(filter(None, projects), "")


def _names(folder: Path) -> dict[str, str]:
    """Returns name and group of the run, those that wandb's own variables do not give."""
    folder = paths.absolute(folder)
    names = {}
    if not os.environ.get("WANDB_NAME"):
        names["name"] = folder.name
    sweep = json_text.read_if_there(folder.parent / SWEEP, json_text.Object) or {}
    if folder.name in sweep.get("runs", ()) and not os.environ.get("WANDB_RUN_GROUP"):
        names["group"] = folder.parent.name
    return names


def _import_wandb() -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        wandb = None
    if not hasattr(wandb, "init"):  # a folder `wandb` can be imported too
        raise ConfigError(
            f"log.wandb: wandb is not installed; {install('wandb')}, or leave it empty"
        )
    return wandb
