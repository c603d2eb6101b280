"""Old names of options, stages and columns, with their present forms.

A config or a flag with an old name is an error that gives the new one. Files that were written with
old names are still read.
"""

from collections.abc import Mapping
from typing import Any

OPTIONS = {
    "behaviour_logprobs": "behavior_logprobs",
    "completions": "samples_per_prompt",
    "judge_mesh": "frozen_mesh",
    "labeller": "labeler",
    "max_new": "max_new_tokens",
    "normalise": "normalize",
    "normalise_before": "normalize_before",
    "slots": "decode_batch",
}
STAGES = {"recentre": "recenter"}
COLUMNS = {"labeller": "labeler"}


def config_with_present_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of a stage or of a recipe, read from a file, with present names."""
    if "stages" in config:
        return {
            name: config_with_present_names(part) if isinstance(part, Mapping) else part
            for name, part in config.items()
        }
    if "stage" not in config:
        return dict(config)
    present = {OPTIONS.get(name, name): value for name, value in config.items()}
    return present | {"stage": STAGES.get(config["stage"], config["stage"])}


def row_with_present_names(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of a data file with the present names of its columns."""
    return {COLUMNS.get(name, name): value for name, value in row.items()}


def hint(name: str, names: Mapping[str, str]) -> str:
    """Returns the end of an error about an old name; empty for any other name."""
    return f"; it is now called {names[name]}" if name in names else ""
