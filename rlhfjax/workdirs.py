"""Reads the JSON files of a workdir. An error about a damaged one says what to do.

config.json   the config of a stage, or of a recipe
done.json     how a stage ended; only a finished stage has it
"""

from typing import Annotated, Any, NotRequired

from annotated_types import Interval
from pydantic import AfterValidator
from typing_extensions import TypedDict

from rlhfjax import json_text
from rlhfjax.errors import DataError, UserError
from rlhfjax.paths import Path
from rlhfjax.ranges import Count, Share
from rlhfjax.renamed import config_with_present_names

CONFIG, DONE, CALIBRATION = "config.json", "done.json", "calibration.json"
DATES = "template_dates"  # of DONE
RESTORE = "restore it from a copy, or start again in a new --workdir"
RUN_AGAIN = "restore it from a copy, or delete it to run the stage again"

# A thousand years: larger numbers are no measurement.
Seconds = Annotated[float, Interval(ge=0, le=3.2e10)]
Metrics = dict[str, float | None]
"""Metrics as a file has them: null for a number that was not finite."""


class _Calibration(TypedDict):
    """`evals.stats.Calibration` as a file has it: three lists with a number per bin."""

    confidence: list[Share]
    accuracy: list[Share]
    count: list[Count]
    ece: Share


def _validate_bins(calibration: _Calibration) -> _Calibration:
    lengths = [len(calibration[name]) for name in ("confidence", "accuracy", "count")]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"confidence, accuracy and count must have one length, got {lengths}"
        )
    return calibration


Calibration = Annotated[_Calibration, AfterValidator(_validate_bins)]


class Done(TypedDict, extra_items=Any):
    """How a stage ended. Only `metrics` is in the files of all versions."""

    stage: NotRequired[str]
    kind: NotRequired[str]
    steps: NotRequired[Count]
    seconds: NotRequired[Seconds]
    metrics: Metrics
    calibration: NotRequired[Calibration]
    template_dates: NotRequired[dict[str, str]]
    """What chat templates wrote of the date, by form of strftime; absent: nothing."""


class _Stage(TypedDict, extra_items=Any):
    """The config of a stage, as far as it is known without the stage."""

    stage: NotRequired[str]
    steps: NotRequired[Count]


class _Recipe(TypedDict, extra_items=Any):
    """The config of a recipe; `stages` name the other keys."""

    stages: list[str]


def read(path: Path, hint: Any, remedy: str) -> Any:
    """Returns the value of a JSON file that a run wrote; None if there is no such file.

    Raises:
      DataError: the file is damaged; the message ends with the remedy.
    """
    try:
        return json_text.read_if_there(path, hint)
    except DataError as error:
        raise DataError(f"{error}; {remedy}") from None


def read_config(workdir: Path) -> dict[str, Any] | None:
    """Returns the config of a workdir with present names; None if there is no config.json.

    Raises:
      DataError: the file is damaged, or holds no config.
    """
    path = workdir / CONFIG
    config = read(path, json_text.Object, RESTORE)
    if config is None:
        return None
    try:
        _validate_config(config, path)
    except DataError as error:
        raise DataError(f"{error}; {RESTORE}") from None
    return config_with_present_names(config)


def _validate_config(config: json_text.Object, path: Path) -> None:
    if "stages" not in config:
        if "stage" not in config:
            raise DataError(f"{path}: neither `stage` nor `stages` is in this config")
        json_text.validate(config, path, _Stage)
        return
    json_text.validate(config, path, _Recipe)
    for i, name in enumerate(config["stages"]):
        validate_name(name, f"{path}: stages[{i}]")
        part = json_text.validate(
            config.get(name, {}), f"{path}: {name}", json_text.Object
        )
        json_text.validate(part, f"{path}: {name}", _Stage)


def validate_name(name: str, context: str, error: type[UserError] = DataError) -> None:
    """Raises an error if no folder `NN_NAME` can have the name of a stage."""
    if not name or len(name.encode(errors="replace")) > 200 or {"/", "\0"} & set(name):
        shown = json_text.shown(name)
        raise error(f"{context}: expected a name that a folder can have, got {shown}")


def read_done(workdir: Path) -> Done | None:
    """Returns a finished stage's done.json; None if the stage is unfinished.

    Raises:
      DataError: the file is damaged.
    """
    return read(workdir / DONE, Done, RUN_AGAIN)
