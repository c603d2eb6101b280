"""The formats of a source's files: one table. Its rows are what specs, `format=` and errors name.

    parse("csv:pairs/*.csv.gz")         Named("csv", "pairs/*.csv.gz")
    parse("chats.jsonl")                Named("jsonl", "chats.jsonl"), by the name's ending
    parse("hf-dataset:squad")           Named("hf-dataset", "squad")

A new format is a `files.Reader` and a row here.
"""

import os
from collections.abc import Callable
from typing import Literal, NamedTuple

from rlhfjax import paths
from rlhfjax.data import hf_arrow, tables
from rlhfjax.data.compressed import ENDINGS
from rlhfjax.data.dataset_folders import INFO
from rlhfjax.data.files import JsonLines, Reader, TextFiles, files_of
from rlhfjax.data.json_array import JsonArray
from rlhfjax.errors import ConfigError, DataError

FormatName = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "text"]
TFDS, HF_DATASET = "tfds", hf_arrow.SCHEME


class Format(NamedTuple):
    """A format of files."""

    endings: tuple[str, ...]  # of the names of such files
    reader: Callable[[str, str], Reader]  # takes the spec, for errors, and `documents`


FORMATS: dict[str, Format] = {
    "jsonl": Format((".jsonl", ".ndjson"), lambda spec, documents: JsonLines()),
    "json": Format((".json",), lambda spec, documents: JsonArray()),
    "csv": Format((".csv",), lambda spec, documents: tables.Csv(",")),
    "tsv": Format((".tsv",), lambda spec, documents: tables.Csv("\t")),
    "parquet": Format((".parquet",), lambda spec, documents: tables.Parquet()),
    "arrow": Format((".arrow", ".feather"), lambda spec, documents: tables.Arrow()),
    "text": Format((".txt", ".md"), TextFiles),
}
OF_TEXTS = ("csv", "tsv")
"""Formats that have texts alone."""
SCHEMES = (TFDS, HF_DATASET, *FORMATS)
FILES = ", ".join(f"{name}:GLOB" for name in FORMATS)
SPECS = (
    f"{TFDS}:NAME[/CONFIG], {HF_DATASET}:NAME[/CONFIG], {FILES}, or files named "
    + ", ".join(f"*{format.endings[0]}" for format in FORMATS.values())
    + f" (also with {' or '.join(ENDINGS)})"
)
"""What a source's spec may be, for errors and for the help of options."""


class Named(NamedTuple):
    """What a spec names: a dataset, or files of one format."""

    scheme: str  # one of SCHEMES
    rest: str  # a name, a folder or a glob


def parse(spec: str, format: str | None = None, context: str = "") -> Named:
    """Returns what a spec names.

    Args:
      context: the option with its value, for errors.
      format: one of FORMATS, for a spec without a scheme; None: by the names of the files.
    Raises:
      ConfigError: it names nothing.
    """
    context = context or f"source {spec!r}"
    if format is not None and format not in FORMATS:
        raise ConfigError(
            f"{context}: format {format!r} is none of {', '.join(FORMATS)}"
        )
    scheme = paths.scheme(spec, SCHEMES) if isinstance(spec, str) else ""
    if scheme:
        rest = spec.removeprefix(f"{scheme}:")
        if format not in (None, scheme):
            raise ConfigError(f"{context}: format={format!r} contradicts {scheme}:")
    elif isinstance(spec, str) and spec and (not _is_url(spec)):
        rest = spec
        scheme = format or _by_name(spec)
    if not scheme or not rest:
        raise ConfigError(f"{context}: expected {SPECS}")
    return Named(scheme, rest)


def without_scheme(spec: str) -> str:
    """Returns the path, glob or name of a spec."""
    scheme = paths.scheme(spec, SCHEMES)
    return spec.removeprefix(f"{scheme}:") if scheme else spec


def is_spec(name: str) -> bool:
    """Returns whether a name is that of a source, and not of a folder of preferences.

    A folder's name may have a colon, too.
    """
    return bool(paths.scheme(name, SCHEMES)) or bool(by_ending(name))


def _is_url(name: str) -> bool:
    return paths.remote(name) and not name.startswith(paths.SCHEME)


def _by_name(name: str) -> str:
    """Returns the scheme of a path or glob; "" if its name does not say it."""
    if found := by_ending(name):
        return found
    if _is_there(name, hf_arrow.STATE) or _is_there(name, hf_arrow.SPLITS):
        return "arrow"
    if _is_there(name, INFO):
        return TFDS
    found = {by_ending(os.fspath(file)) for file in paths.glob(name)}
    return found.pop() if len(found) == 1 else ""


def _is_there(folder: str, name: str) -> bool:
    return paths.exists(paths.path(folder) / name)


def by_ending(name: str) -> str:
    """Returns the format of a file by the ending of its name; "" if there is none."""
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    for format_name, format in FORMATS.items():
        if name.endswith(format.endings):
            return format_name
    return ""


class Chosen(NamedTuple):
    """The files of a source."""

    files: list[paths.Path]
    split: str | None  # the split that is taken of their rows by a hash; None: all rows
    reader: Reader
    options: list[
        str
    ]  # JSON value: what decides, beside the files, what the records are


def choose(spec: str, named: Named, split: str, documents: str) -> Chosen:
    """Returns the files of a spec that is not `tfds:`, and how they are read.

    Raises:
      ConfigError: an option is invalid, or a library is missing.
      DataError: there are no such files.
    """
    scheme = "arrow" if named.scheme == HF_DATASET else named.scheme
    reader = FORMATS[scheme].reader(spec, documents)
    if named.scheme == HF_DATASET:
        files, by_hash = hf_arrow.downloaded_files(spec, named.rest, split), None
    elif scheme == "arrow" and (folder := hf_arrow.saved_folder(named.rest, split)):
        files, by_hash = hf_arrow.saved_files(spec, folder, split)
    else:
        files, by_hash = files_of(spec, named.rest, split)
    options = [scheme, documents if scheme == "text" else ""]
    return Chosen(files, by_hash, reader, options)


def validate(option: str, spec: str, named: Named, split: str) -> None:
    """Validates that the files of a spec are there, without opening them.

    Raises:
      ConfigError, DataError: they are not, or a library is missing.
    """
    if named.scheme == HF_DATASET:
        hf_arrow.library(spec)
        return
    pattern = named.rest.replace("{split}", split)
    if named.scheme == "arrow" and hf_arrow.saved_folder(named.rest, split):
        return
    if not paths.glob(named.rest) and not paths.glob(pattern):
        raise DataError(f"{option}={pattern}: no file matches")
