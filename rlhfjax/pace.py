"""How long stages take, by what this machine has reached in earlier ones.

A stage takes a fixed time (reading, compiling, evaluating, saving) and the time of its work: the
FLOPs of its passes, and the tokens that it decodes, which take longer than their FLOPs say. A stage
that ends is kept in ~/.cache/rlhfjax/rates.json with its work and its seconds, unless it was too
short to tell a rate. An estimate takes

  the last stage of the same kind whose model has about the same size, and scales its work; or
  the FLOP/s of a stage that decodes nothing, and the tokens/s of one that decodes, each the one
  whose model is closest in size.

No result depends on this file. RLHFJAX_RATES=FILE names another one, RLHFJAX_RATES=off none.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from typing_extensions import TypedDict

from rlhfjax import announce, hosts, json_text, paths, stages, workdirs
from rlhfjax.clock import Clock
from rlhfjax.errors import UserError
from rlhfjax.footprint import Net
from rlhfjax.models.size import active_parameters, token_flops
from rlhfjax.origins import Origins
from rlhfjax.paths import Path
from rlhfjax.progress import followed_by
from rlhfjax.roles import Pass, Workload

MOST_KEPT = 200
# Seconds and steps from which a rate can be told: the first steps are slow, and a job's seconds
# contain the reading of its models. Fewer steps tell the rate of a stage that decodes for `LONG`.
SHORTEST = 3.0
FEWEST = 10
LONG = 60.0
_FILE = "~/.cache/rlhfjax/rates.json"
_ROLLOUT = "rollout"  # the program whose passes are counted as decoded tokens


class Work(NamedTuple):
    """What a whole stage computes."""

    parameters: int  # of its first model
    flops: (
        float  # of the passes through its models, as PaLM counts them, without decoding
    )
    decoded: float  # tokens
    programs: int  # different programs, each of which is compiled
    trains: bool

    @property
    def load(self) -> float:
        """All FLOPs: a decoded token takes 2 per parameter."""
        return self.flops + 2.0 * self.parameters * self.decoded


_NOTHING = Work(parameters=0, flops=0.0, decoded=0.0, programs=0, trains=False)


class Measured(TypedDict):
    """What a finished stage took."""

    kind: str
    device: str
    parameters: int
    flops: float
    decoded: float
    programs: int
    trains: bool
    steps: int
    seconds: float  # of the work
    fixed: float  # seconds of everything else


def work_of(measured: Measured) -> Work:
    return Work(*(measured[name] for name in Work._fields))


# ------------------------------------------------------------------ work


def model_passes(nets: Sequence[Net], workload: Workload) -> Iterator[tuple[Pass, Net]]:
    """Yields the passes of a step with their models.

    A reward of several models has a pass for each of them, in a separate program.
    """
    for model_pass in workload.passes:
        for net in nets:
            if not f"{net.name}_".startswith(f"{model_pass.role}_"):
                continue
            suffix = net.name.removeprefix(model_pass.role)
            yield model_pass._replace(program=model_pass.program + suffix), net


def step_flops(nets: Sequence[Net], workload: Workload) -> dict[str, float]:
    """Returns the model FLOPs of a step on all devices, by program, as PaLM counts them.

    A forward pass alone is a third of a training step.
    """
    flops: dict[str, float] = {}
    for model_pass, net in model_passes(nets, workload):
        size = active_parameters(net.config, net.role.head)
        per_token = float(token_flops(size, net.config, model_pass.length))
        share = 1.0 if model_pass.trains else 1 / 3
        name = model_pass.program
        flops[name] = flops.get(name, 0.0) + model_pass.tokens * per_token * share
    return flops


def work(config: Any, nets: Sequence[Net], completions: int = 2) -> Work | None:
    """Returns what a stage computes; None if its models are not known, or only its data tells.

    Args:
      config: the stage's typed config.
      nets: its models.
      completions: responses per prompt of a stage whose data decides it.
    """
    module = stages.find(config.stage)
    if not hasattr(module, "workload"):
        return _NOTHING
    count = _number_of_steps(module, config)
    if not nets or count is None:
        return None
    workload = module.workload(config, completions)
    flops = step_flops(nets, workload)
    decodes = workload.decoded > 0
    return Work(
        parameters=nets[0].numbers,
        flops=count * sum(n for name, n in flops.items() if name != _ROLLOUT),
        decoded=float(count * workload.units) if decodes else 0.0,
        programs=len(flops.keys() - {_ROLLOUT}) + decodes,
        trains=hasattr(module, "build"),
    )


def _number_of_steps(module: Any, config: Any) -> int | None:
    """Returns the steps of a stage that trains, or the batches of a job; None if not known."""
    if hasattr(module, "build"):
        return config.steps
    return module.batches(config) if hasattr(module, "batches") else None


def _completions(config: Any, earlier: Mapping[str, Any]) -> int:
    """Returns the responses per prompt that a stage of the recipe collects for this one."""
    for source in getattr(config, "preferences", None) or ():
        spec = getattr(source, "spec", source)
        folder = str(spec).rpartition("/")[0]
        if folder in earlier:
            return getattr(earlier[folder], "samples_per_prompt", 2)
        with contextlib.suppress(UserError):
            values = workdirs.read_config(paths.path(folder)) or {}
            return int(values.get("samples_per_prompt", 2))
    return 2


# ------------------------------------------------------------------ estimates


def estimate(
    configs: Mapping[str, Any], folders: Mapping[str, Path]
) -> dict[str, float | None]:
    """Returns the seconds that each stage of a recipe takes as a whole; None if unknown.

    Args:
      configs: typed configs of all stages, in their order.
      folders: their workdirs.
    """
    measured, device = kept(), device_name()
    measured = [one for one in measured if one["device"] == device and _tells(one)]
    earlier: dict[str, Any] = {}
    result: dict[str, float | None] = {}
    for name, config in configs.items():
        nets = announce.models(config, Origins(earlier))
        stage_work = work(config, nets, _completions(config, earlier))
        result[name] = None
        if stage_work is not None:
            result[name] = seconds(config.stage, stage_work, measured)
        earlier[str(folders[name])] = config
    return result


def tokens(
    configs: Mapping[str, Any], folders: Mapping[str, Path]
) -> dict[str, float | None]:
    """Returns the tokens that each stage of a recipe trains on or samples.

    None: the stage has no such number, or only its data tells.

    Args: as `estimate`.
    """
    earlier: dict[str, Any] = {}
    result: dict[str, float | None] = {}
    for name, config in configs.items():
        module = stages.find(config.stage)
        result[name] = None
        if hasattr(module, "workload"):
            count = _number_of_steps(module, config)
            workload = module.workload(config, _completions(config, earlier))
            result[name] = None if count is None else float(count * workload.units)
        earlier[str(folders[name])] = config
    return result


@contextlib.contextmanager
def announced(
    name: str, configs: Mapping[str, Any], folders: Mapping[str, Path]
) -> Iterator[None]:
    """Logs the time left before a stage, and gives that of later stages to its progress line.

    Args:
      name: the stage; if it is finished, nothing is logged.
      configs: typed configs of the stages to run.
    """
    left = [stage for stage in configs if workdirs.read_done(folders[stage]) is None]
    if name not in left:
        yield
        return
    estimates = estimate(configs, folders)
    announce.time_left({stage: estimates[stage] for stage in left})
    after = [estimates[stage] for stage in left if stage != name]
    known = [value for value in after if value is not None]
    with followed_by(sum(known, 0.0) if len(known) == len(after) else None):
        yield


def seconds(kind: str, work: Work, measured: Sequence[Measured]) -> float | None:
    """Returns the seconds of a stage, by what others took on the same device; None if unknown."""
    same = [one for one in measured if one["kind"] == kind]
    last = _closest(work, same)
    if last and _distance(work, last) <= math.log(2):
        ratio = work.load / last_load if (last_load := work_of(last).load) else 0.0
        return ratio * last["seconds"] + last["fixed"]
    if not work.load:
        return None
    passes = _closest(work, [one for one in measured if _only_passes(one)])
    total = 0.0
    if work.flops:
        if passes is None:
            return None
        total += work.flops * passes["seconds"] / passes["flops"]
    decoder = _closest(work, [one for one in measured if one["decoded"]])
    if work.decoded:
        if decoder is None:
            return None
        total += work.decoded * _seconds_per_token(decoder, passes)
    return total + _fixed(work, measured)


def _fixed(work: Work, measured: Sequence[Measured]) -> float:
    """Returns the fixed seconds of a stage; most of them are spent on compiling its programs."""
    with_models = [one for one in measured if one["programs"]]
    alike = [one for one in with_models if one["trains"] == work.trains]
    model = _closest(work, alike or with_models)
    if model is None:
        return 0.0
    return model["fixed"] * (1 + work.programs) / (1 + model["programs"])


def _tells(one: Measured) -> bool:
    """Returns whether a stage worked for long enough; one without work tells its fixed seconds."""
    if not work_of(one).load:
        return True
    if one["steps"] < FEWEST:
        return one["decoded"] > 0 and one["seconds"] >= LONG
    return one["seconds"] >= SHORTEST


def _only_passes(one: Measured) -> bool:
    return one["flops"] > 0 and not one["decoded"]


def _distance(work: Work, one: Measured) -> float:
    """Returns the logarithm of the ratio of the models' sizes."""
    return abs(math.log((1 + work.parameters) / (1 + one["parameters"])))


def _closest(work: Work, measured: Sequence[Measured]) -> Measured | None:
    """Returns the stage whose model is closest in size, the last of several."""
    latest = list(reversed(measured))
    return min(latest, key=lambda one: _distance(work, one), default=None)


def _seconds_per_token(decoder: Measured, passes: Measured | None) -> float:
    """Returns the seconds that a stage decoded for, per token; at least a tenth of its seconds."""
    decoding = decoder["seconds"]
    if passes:
        decoding -= decoder["flops"] * passes["seconds"] / passes["flops"]
    return max(decoding, 0.1 * decoder["seconds"]) / decoder["decoded"]


# ------------------------------------------------------------------ what was measured


def keep(config: Any, nets: Sequence[Net], clock: Clock) -> None:
    """Keeps what a stage took that ended just now, on the first host."""
    file = _file()
    if file is None or not hosts.first():
        return
    stage_work = work(config, nets, _completions(config, {}))
    if stage_work is None:
        return
    busy, total = _seconds(config, stage_work, clock)
    row: Measured = {
        "kind": config.stage,
        "device": device_name(),
        **stage_work._asdict(),  # pyright: ignore[reportAssignmentType]
        "steps": _number_of_steps(stages.find(config.stage), config) or 0,
        "seconds": busy,
        "fixed": total - busy,
    }
    if not _tells(row):
        return  # it would replace what a longer run has measured
    key = ("kind", "device", "parameters")
    others = [one for one in kept() if any(one[name] != row[name] for name in key)]
    rows = [*others, row][-MOST_KEPT:]
    with contextlib.suppress(OSError, UserError):  # an estimate is not worth an error
        paths.make_folder(file.parent)
        text = json_text.encode(rows, file, indent=1)
        paths.write(file, text + "\n")


def _seconds(config: Any, work: Work, clock: Clock) -> tuple[float, float]:
    """Returns the seconds that the work took, and those of the whole stage."""
    clock.goodput()  # counts until now
    ours = clock.seconds | {"imports": 0.0, "restart": 0.0}
    part = "step" if hasattr(stages.find(config.stage), "build") else "build"
    busy = ours[part] if work.load else 0.0
    return busy, sum(ours.values())


def kept() -> list[Measured]:
    """Returns what was measured on this machine; [] if nothing was, or the file is damaged."""
    file = _file()
    if file is None:
        return []
    with contextlib.suppress(UserError, OSError):
        return json_text.read_if_there(file, list[Measured]) or []
    return []


def _file() -> Path | None:
    name = os.environ.get("RLHFJAX_RATES", _FILE)
    name = os.path.expanduser(name)
    return None if name == "off" or name.startswith("~") else paths.path(name)


def device_name() -> str:
    """Returns the devices of this process; of a CPU also its cores."""
    device = jax.devices()[0]
    name = f"{jax.device_count()} x {device.device_kind}"
    return f"{name}, {os.cpu_count()} cores" if device.platform == "cpu" else name
