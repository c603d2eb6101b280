"""Finds the Arrow files of Hugging Face datasets: folders of `save_to_disk`, names of the hub."""

import importlib
import os
from typing import Any

from rlhfjax import json_text, paths
from rlhfjax.data.rows import SPLITS as HASHED
from rlhfjax.errors import ConfigError, DataError, first_line, install

SCHEME = "hf-dataset"
STATE = "state.json"  # in the folder of a Dataset
SPLITS = "dataset_dict.json"  # in the folder of a DatasetDict


def saved_folder(name: str, split: str) -> paths.Path | None:
    """Returns the folder that `save_to_disk` wrote; None if a name is not that of one.

    Args:
      split: what {split} in the name stands for.
    """
    for choice in (name, name.replace("{split}", split)):
        if any(char in choice for char in "*?"):
            continue
        folder = paths.path(choice)
        if paths.exists(folder / STATE) or paths.exists(folder / SPLITS):
            return folder
    return None


def saved_files(
    spec: str, folder: paths.Path, split: str
) -> tuple[list[paths.Path], str | None]:
    """Returns the Arrow files of a saved folder, and the split to take of their rows by a hash.

    Args:
      split: a split of a DatasetDict, or "all"; of a Dataset, as `files.files_of` takes it.
    Raises:
      DataError: there is no such split, a file is missing, or the rows are a selection.
    """
    if paths.exists(folder / SPLITS):
        described = json_text.read(folder / SPLITS, dict[str, Any])
        known = json_text.validate(
            described.get("splits"), f"{folder / SPLITS}: splits", list[str]
        )
        if split != "all" and split not in known:
            raise DataError(
                f"source {spec!r}: no split {split!r}, found {', '.join(known)}"
            )
        if not known:
            raise DataError(f"{folder / SPLITS}: splits names no split")
        chosen = known if split == "all" else [split]
        return [file for name in chosen for file in _files(folder / name)], None
    if split not in (*HASHED, "all"):
        raise ConfigError(
            f"source {spec!r}: split {split!r} is none of {', '.join(HASHED)}, all"
        )
    return _files(folder), None if split == "all" else split


def _files(folder: paths.Path) -> list[paths.Path]:
    """Returns the Arrow files of a folder that `Dataset.save_to_disk` wrote."""
    state = json_text.read(folder / STATE, dict[str, Any])
    if state.get("_indices_data_files") or paths.exists(folder / "indices.arrow"):
        raise DataError(
            f"{folder}: its rows are a selection (indices.arrow);"
            " dataset.flatten_indices().save_to_disk(FOLDER) writes them as they are"
        )
    context = f"{folder / STATE}: _data_files"
    entries = json_text.validate(
        state.get("_data_files"), context, list[dict[str, Any]]
    )
    names = [
        json_text.validate(entry.get("filename"), context, str) for entry in entries
    ]
    files = [folder / os.path.basename(name) for name in names]
    for file in files:
        if not paths.exists(file):
            raise DataError(f"{file}: is missing; {STATE} names it")
        if not paths.remote(file):
            paths.validate_regular(file)
    if not files:
        raise DataError(f"{context} names no file")
    return files


# ------------------------------------------------------------------ names


def library(spec: str) -> Any:
    """Returns the package `datasets`. Raises ConfigError if it is not installed."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        datasets = None
    if not hasattr(datasets, "load_dataset"):  # a folder `datasets` can be imported too
        raise ConfigError(
            f"source {spec!r}: datasets is not installed; {install('datasets')}"
        )
    return datasets


def downloaded_files(spec: str, name: str, split: str) -> list[paths.Path]:
    """Returns the Arrow files that `datasets.load_dataset` keeps of one split.

    Args:
      name: OWNER/NAME, OWNER/NAME/CONFIG, or NAME/CONFIG of a folder or a dataset without an owner.
      split: a split's name, or "all".
    Raises:
      DataError: it cannot be loaded, or the split is a part of one.
    """
    datasets = library(spec)
    if not split.replace("_", "").replace(".", "").isalnum():
        raise DataError(
            f"source {spec!r}: split {split!r} is not the name of a split; limit= takes"
            " the first rows"
        )
    try:
        dataset = datasets.load_dataset(*_parts(name), split=split)
    except Exception as error:
        why = first_line(error, kind=True)
        raise DataError(f"source {spec!r}: datasets cannot load it: {why}") from error
    files = [paths.path(entry["filename"]) for entry in dataset.cache_files]
    if not files:
        raise DataError(f"source {spec!r}: datasets keeps no file of it")
    return files


def _parts(name: str) -> list[str]:
    """Returns the name of a dataset and of its config, if there is one."""
    name = os.path.expanduser(name)
    head, _, config = name.rpartition("/")
    is_config = not os.path.isdir(name) and ("/" in head or os.path.isdir(head))
    return [head, config] if is_config else [name]
