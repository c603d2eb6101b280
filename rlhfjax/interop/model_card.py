"""The model card of an export, README.md: what the model is, how to use it, and its provenance."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from rlhfjax import __version__, json_text, provenance
from rlhfjax.interop import foreign, store
from rlhfjax.paths import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """What a card says about a model."""

    folder: str
    source: str  # the workdir or foreign name
    adapter: str  # the PEFT folder that was merged into it; empty: none
    architecture: str
    parameters: int
    dtype: str
    is_reward: bool
    has_template: bool
    dropped_bias: float  # constant of a reward that its weights lack


def described(exported: Exported) -> str:
    """Returns architecture, number of parameters and dtype."""
    return (
        f"{exported.architecture}, {exported.parameters:,} parameters, {exported.dtype}"
    )


def usage(exported: Exported, folder: str) -> list[str]:
    """Returns lines of Python that use the model in a folder."""
    auto = (
        "AutoModelForSequenceClassification"
        if exported.is_reward
        else "AutoModelForCausalLM"
    )
    return [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f"folder = {json_text.encode(folder, folder)}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {auto}.from_pretrained(folder)",
        *_inputs(exported),
        *_outputs(exported),
    ]


def _inputs(exported: Exported) -> list[str]:
    if not exported.has_template:
        return ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
    options = "" if exported.is_reward else "add_generation_prompt=True, "
    options += 'return_dict=True, return_tensors="pt"'
    answer = '    {"role": "assistant", "content": "Hi! How are you?"},'
    return [
        "messages = [",
        '    {"role": "user", "content": "Hello!"},',
        *([answer] if exported.is_reward else []),
        "]",
        "inputs = tokenizer.apply_chat_template(",
        f"    messages, {options}",
        ")",
    ]


def _outputs(exported: Exported) -> list[str]:
    if exported.is_reward:
        return ["print(model(**inputs).logits[0, 0].item())"]
    return [
        "output = model.generate(**inputs)[0]",
        'response = output[inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(response, skip_special_tokens=True))",
    ]


def origins(name: str | Path) -> dict[str, Mapping[str, Any]]:
    """Returns the last start of each stage up to the one that made a model, by its folder's name.

    Empty for foreign models, and for workdirs of older versions.
    """
    if foreign.find(name):
        return {}
    folder = store.find(name)
    workdir = folder.parent if folder.name == store.FOLDER else folder
    stages = [workdir]
    if re.match(r"\d\d_", workdir.name):
        stages = [
            stage
            for stage in store.numbered(workdir.parent)
            if stage.name <= workdir.name
        ]
    starts = {stage.name: provenance.read(stage) for stage in stages}
    return {stage: rows[-1] for stage, rows in starts.items() if rows}


def text(exported: Exported, starts: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a model card in Markdown.

    Args:
      starts: see `origins`.
    """
    name = exported.folder.rstrip("/").rpartition("/")[-1]
    kind = "reward model" if exported.is_reward else "language model"
    lines = [
        "---",
        "library_name: transformers",
        "tags: [rlhfjax]",
        "# license: add one before you publish the model",
        "---",
        "",
        f"# {name}",
        "",
        f"A {kind}: {described(exported)}. It was exported by rlhfjax {__version__}.",
        "",
        "## Use",
        "",
        "```python",
        *usage(exported, name),
        "```",
        "",
        *_notes(exported),
        "",
        "## Training",
        "",
        *_training(starts),
        "",
        "## Data, license, limitations",
        "",
        "Not filled in. Name the data, its license, and what the model must not be used for.",
    ]
    return "\n".join(lines) + "\n"


def _notes(exported: Exported) -> list[str]:
    lines = []
    if exported.is_reward:
        lines.append(
            "The score is read at the last token of the conversation; higher is better."
        )
    if exported.adapter:
        name = exported.adapter.rstrip("/").rpartition("/")[-1]
        lines.append(f"The LoRA adapter {name} is merged into the weights.")
    if exported.dropped_bias:
        lines.append(
            f"Scores are lower than in training by the constant {exported.dropped_bias:.6g}."
        )
    lines.append(
        "Special tokens that a message spells out are read as special tokens by "
        "`transformers`, and as ordinary text by rlhfjax."
    )
    return lines


def _training(starts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not starts:
        return ["There is no record of how the model was trained."]
    lines = ["| stage | started | commit | seed |", "|---|---|---|---|"]
    for stage, start in starts.items():
        commit = start.get("commit") or "unknown"
        if start.get("clean") is False:
            commit += " with changes"
        seeds = ", ".join(map(str, start.get("seeds", {}).values()))
        lines.append(f"| {stage} | {start.get('date', '')} | {commit} | {seeds} |")
    last = list(starts.values())[-1]
    versions = last.get("versions", {})
    hardware = last.get("hardware", {})
    return [
        *lines,
        "",
        f"- command: `{last.get('command', 'unknown')}`",
        f"- hardware: {hardware.get('devices', 'unknown')}, hosts: {hardware.get('hosts', 1)}",
        f"- versions: {', '.join(f'{name} {v}' for name, v in versions.items())}",
    ]
