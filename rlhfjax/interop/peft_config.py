"""Reads PEFT's adapter_config.json, strictly.

Every key is read, known to change nothing, or an error. Which modules have adapters is not read
here: the names of the tensors say it.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from rlhfjax import json_text, ranges
from rlhfjax.errors import CheckpointError
from rlhfjax.json_text import named, shown
from rlhfjax.paths import Path

CONFIG = "adapter_config.json"
# Options of PEFT with the one value that we read and write.
PLAIN = {"bias": "none", "use_dora": False, "peft_type": "LORA"}
# What is read, and its types.
_READ = {
    "r": ranges.Size,
    "lora_alpha": ranges.Positive,
    "lora_dropout": ranges.ShareBelow1 | None,
    "use_rslora": bool | None,
    "rank_pattern": dict[str, ranges.Size] | None,
    "alpha_pattern": dict[str, ranges.Positive] | None,
    "modules_to_save": list[str] | None,
}
_REQUIRED = ("r", "lora_alpha")
_TASKS = ("CAUSAL_LM", "SEQ_CLS")
# How the factors began. These leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA
# subtract from it what the fresh adapter adds.
_INITS = (True, False, "gaussian", "eva", "orthogonal")
# Keys that say where an adapter comes from, which modules it is for, or how it was trained.
_SILENT = """
auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules
fan_in_fan_out inference_mode layers_pattern layers_to_transform loftq_config lora_dtype
lora_ga_config lorap_emb_lr lorap_lr_ratio megatron_core peft_version qalora_group_size revision
runtime_config target_modules
"""
_OFF = (None, False, "", [], {})
# A key of a pattern is a regular expression of somebody else's: one of these takes forever.
_MOST_REPEATS = 3
_REPEATED_GROUP = re.compile(r"\)[*+?{]")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What an adapter_config.json says about the numbers of an adapter."""

    path: Path
    rank: int
    alpha: float
    dropout: float
    rank_stabilized: bool
    """The scale is alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023, eq. 4) instead of alpha / r."""
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """Returns the rank of a module, named as in `transformers`."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Returns the factor of a module's product B A."""
        return self._scale(
            _matching(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        )

    @property
    def scale(self) -> float:
        """The factor of modules that no pattern names."""
        return self._scale(self.alpha, self.rank)

    @property
    def plain_alpha(self) -> float:
        """The alpha with which alpha / r is the scale."""
        return self.alpha * (math.sqrt(self.rank) if self.rank_stabilized else 1.0)

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read(path: Path) -> AdapterConfig:
    """Returns the content of an adapter_config.json that describes plain low-rank adapters.

    Raises:
      CheckpointError: it is missing or damaged, or of another kind; names the key and what is
        accepted.
    """
    content = json_text.read_object(path, error=CheckpointError)
    for key, value in PLAIN.items():
        given = content.get(key)
        if given is not None and (given != value or type(given) is not type(value)):
            raise _invalid(path, key, given, repr(value))
    _validate_task(path, content.get("task_type"))
    _validate_init(path, content.get("init_lora_weights"))
    known = {*_SILENT.split(), *_READ, *PLAIN, "task_type", "init_lora_weights"}
    for key in content.keys() - known:
        given = content[key]
        if not any(_is_same(given, off) for off in _OFF):
            raise _invalid(path, key, given, "None, which is an adapter without it")
    for key in _REQUIRED:
        if key not in content:
            raise CheckpointError(f"{path}: there is no {key}")
    values = {
        key: json_text.validate(
            content.get(key), f"{path}: {key}", hint, error=CheckpointError
        )
        for key, hint in _READ.items()
    }
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in values[key] or ():
            _validate_pattern(path, key, pattern)
    return AdapterConfig(
        path=path,
        rank=values["r"],
        alpha=values["lora_alpha"],
        dropout=values["lora_dropout"] or 0.0,
        rank_stabilized=bool(values["use_rslora"]),
        rank_pattern=values["rank_pattern"] or {},
        alpha_pattern=values["alpha_pattern"] or {},
        modules_to_save=tuple(values["modules_to_save"] or ()),
    )


def _validate_task(path: Path, task: Any) -> None:
    if task is not None and task not in _TASKS:
        raise _invalid(path, "task_type", task, " or ".join(map(repr, _TASKS)))


def _validate_init(path: Path, given: Any) -> None:
    """Raises CheckpointError for an initialization that is not known to leave the base alone."""
    if given is not None and not any(_is_same(given, init) for init in _INITS):
        accepted = ", ".join(map(repr, _INITS))
        raise CheckpointError(
            f"{path}: init_lora_weights is {shown(given)}, which may change the base model too: "
            f"accepted are {accepted}; in Python with peft, save_pretrained(NEW_FOLDER, "
            "path_initial_model_for_weight_conversion=…) writes a plain adapter"
        )


def _validate_pattern(path: Path, key: str, pattern: str) -> None:
    repeats = len(re.findall(r"[*+?{]", pattern))
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        repeats = _MOST_REPEATS + 1
    if repeats > _MOST_REPEATS or _REPEATED_GROUP.search(pattern):
        raise CheckpointError(
            f"{path}: {key} has the key {named(pattern)}: accepted are regular expressions "
            f"with at most {_MOST_REPEATS} repetitions and without repeated groups"
        )


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of a module's name.

    As PEFT does (`peft.utils.other.get_pattern_key`).
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_same(value: Any, other: Any) -> bool:
    """Returns whether two JSON values are equal. In Python 0 == False; in JSON they differ."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _invalid(path: Path, key: str, given: Any, accepted: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {named(key)} is {shown(given)}: accepted is {accepted}"
    )
