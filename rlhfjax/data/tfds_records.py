"""Records of TFDS datasets: by name, or in a folder that TFDS wrote."""

import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from rlhfjax import network, paths
from rlhfjax.data import corpora, dataset_folders, kept
from rlhfjax.errors import DataError, UserError, first_line

HUGGING_FACE = "huggingface:"


class TfdsRecords:
    """A split of a TFDS dataset as records."""

    hint = ""

    def __init__(self, name: str, data: Sequence[Mapping[str, Any]]):
        self._name = name
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return _read(self.locate(index), lambda: self._data[index])

    def locate(self, index: int) -> str:
        return f"{self._name} record {index}"


class LargeTfdsRecords(TfdsRecords, kept.Kept):
    """A split of a dataset that is too large to read all of it at every start."""

    def __init__(self, name: str, data: Sequence[Mapping[str, Any]], folder: Any):
        TfdsRecords.__init__(self, name, data)
        kept.Kept.__init__(self, folder, name)

    def essence(self, index: int) -> bytes:
        return b""  # the dataset has its own splits


def open_records(
    spec: str,
    name: str,
    split: str,
    data_dir: Any,
    needed: Callable[[Collection[str]], Sequence[str]],
) -> TfdsRecords:
    """Returns a split of a dataset.

    Args:
      spec: the source, for errors.
      name: NAME[/CONFIG] or a folder.
      data_dir: as `sources.open_source` takes it.
      needed: takes the dataset's columns and returns those that it must have.
    Raises:
      DataError: there is no such dataset, split or column, or a file is damaged or missing.
    """
    builder = _builder(spec, name, data_dir)
    # A FeaturesDict, which TFDS's annotation does not say.
    features: Any = builder.info.features
    for column in needed(list(features)):
        if column not in features:
            raise DataError(
                f"source {spec!r}: no column {column!r}, found {', '.join(features)}; "
                "map it with columns="
            )
    try:
        # TFDS decorates the method, which hides its parameters.
        data = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
    except NotImplementedError as error:
        raise DataError(
            f"source {spec!r}: {builder.data_dir} is not in array_record format; remove it"
        ) from error
    except (ValueError, KeyError) as error:
        found = ", ".join(builder.info.splits)
        raise DataError(
            f"source {spec!r}: no split {split!r}, found {found} ({first_line(error)})"
        ) from error
    context = f"source {spec!r}"
    for info in builder.info.splits.values():
        for file in info.filepaths:
            _validate_there(file, context)
    _read(context, lambda: data[0] if len(data) else None)  # opens the first file
    name = f"tfds:{builder.name}[{split}]"
    files = [file for info in builder.info.splits.values() for file in info.filepaths]
    local = [paths.path(file) for file in files]
    folder = kept.kept_folder(local, [name, builder.info.full_name])
    if folder is None:
        return TfdsRecords(name, data)
    return LargeTfdsRecords(name, data, folder)


def _validate_there(file: os.PathLike, context: str) -> None:
    try:
        paths.validate_regular(paths.path(file))
    except FileNotFoundError:
        raise DataError(f"{context}: {file} is missing") from None


def _read(context: str, read: Callable[[], Any]) -> Any:
    """Returns what `read` reads out of files of ArrayRecord."""
    try:
        return read()
    except (IndexError, UserError):
        raise
    except Exception as error:
        why = first_line(error, kind=True)
        raise DataError(
            f"{context}: not a whole file of ArrayRecord ({why})"
        ) from error


def _builder(spec: str, name: str, data_dir: Any) -> tfds.core.DatasetBuilder:
    """Returns the builder of a dataset by name, or of a folder that TFDS wrote."""
    if dataset_folders.is_dataset(name):
        return corpora.open_folder(paths.path(name))
    folder = _data_dir(data_dir)
    return corpora.prepare_for(folder, _named(spec, name, folder))


def folder_to_prepare(spec: str, name: str, data_dir: Any) -> paths.Path | None:
    """Returns the folder that opening a dataset would write; None if the dataset is there.

    Raises:
      DataError: there is no such dataset.
    """
    if dataset_folders.is_dataset(name):
        return None
    folder = _data_dir(data_dir)
    builder = _named(spec, name, folder)
    target = folder / os.path.relpath(builder.data_dir, corpora.writable(folder))
    return None if (target / dataset_folders.INFO).exists() else target


def _data_dir(given: Any) -> paths.Path:
    default = tfds.core.constants.DATA_DIR  # pyright: ignore[reportAttributeAccessIssue]  # lazy
    return paths.path(given or default)


def _named(spec: str, name: str, data_dir: paths.Path) -> tfds.core.DatasetBuilder:
    """Returns the builder of a dataset of TFDS's catalogue, or one of our datasets."""
    if name.startswith((os.sep, ".", "~")) or (os.sep in name and os.path.isdir(name)):
        raise DataError(
            f"source {spec!r}: there is no dataset: no {dataset_folders.INFO} in such a folder"
        )
    if name.startswith(HUGGING_FACE):
        reason = network.unreachable(["https://huggingface.co"])
        if reason:
            raise DataError(f"source {spec!r}: {reason}; {corpora.OFFLINE}")
    make = corpora.BUILDERS.get(name) or functools.partial(tfds.builder, name)
    try:
        return make(data_dir=os.fspath(corpora.writable(data_dir)))
    except (tfds.core.DatasetNotFoundError, ImportError) as error:
        names = ", ".join(corpora.BUILDERS)
        raise DataError(
            f"source {spec!r}: no such TFDS dataset or folder (our own: {names})"
        ) from error
    except UserError:
        raise
    except Exception as error:
        why = first_line(error, kind=True)
        raise DataError(
            f"source {spec!r}: TFDS cannot open it in {data_dir}: {why}"
        ) from error
