"""TFDS datasets: our builders by name, folders that TFDS wrote, and how both are prepared.

TensorFlow is not needed.
"""

import contextlib
import io
import logging
import os
import pathlib
import shutil
import sys

import tensorflow_datasets as tfds

from rlhfjax import json_text, network, paths
from rlhfjax.data.chinese import ChineseWords, Xiehouyu
from rlhfjax.data.chitchat import Chitchat, ChitchatRatings
from rlhfjax.data.dataset_folders import INFO, locked
from rlhfjax.data.package_corpora import Corpus, KingJamesBible
from rlhfjax.data.stories import (
    ForumStories,
    PromptedStories,
    Stories,
    StoryDocuments,
)
from rlhfjax.errors import DataError, UserError, first_line
from rlhfjax.paths import Path

log = logging.getLogger("rlhfjax")
FEATURES = "features.json"
FEATURE_MODULES = f"{tfds.core.__name__}.features"
BUILDERS: dict[str, type[Corpus]] = {
    builder.name: builder
    for builder in (
        Chitchat,
        KingJamesBible,
        ChitchatRatings,
        ChineseWords,
        Xiehouyu,
        Stories,
        PromptedStories,
        ForumStories,
        StoryDocuments,
    )
}
OFFLINE = (
    f"without a network there are tfds:{', tfds:'.join(BUILDERS)}, tfds:FOLDER of a dataset that"
    " was prepared elsewhere, and files such as jsonl:GLOB and text:GLOB"
)
DEFAULT_KIND = {
    "chitchat": "messages",
    "kjv": "text",
    "chitchat_ratings": "preferences",
    "zh_words": "messages",
    "xiehouyu": "messages",
    "stories": "messages",
    "stories_prompted": "messages",
    "stories_forum": "messages",
    "stories_documents": "text",
}


def open_folder(folder: paths.Path) -> tfds.core.DatasetBuilder:
    """Returns the builder of a folder that TFDS wrote.

    Raises:
      DataError: a file of the folder is damaged or missing.
    """
    json_text.read(folder / INFO, json_text.Object)
    _validate_classes(folder / FEATURES)
    try:
        # TFDS prints a banner where a feature or a dtype needs TensorFlow.
        with contextlib.redirect_stdout(io.StringIO()):
            return tfds.builder_from_directory(paths.local(folder))
    except Exception as error:
        why = first_line(error, kind=True)
        raise DataError(
            f"{folder}: {INFO} or {FEATURES} is not one that TFDS wrote ({why})"
        ) from error


def _validate_classes(file: paths.Path) -> None:
    """Raises DataError if a file names a class that is none of TFDS's features.

    TFDS imports the module of any class that is named there; its own are there already.
    """
    inside = [json_text.read(file, json_text.Object)]
    while inside:
        value = inside.pop()
        if isinstance(value, dict):
            inside += value.values()
            # TFDS reads both spellings.
            for key in ("pythonClassName", "python_class_name"):
                name = value.get(key)
                if not isinstance(name, str):
                    continue
                module = name.rpartition(".")[0]
                if not (module.startswith(FEATURE_MODULES) and module in sys.modules):
                    raise DataError(
                        f"{file}: {key} is {json_text.shown(name)}: "
                        f"accepted are classes of {FEATURE_MODULES}"
                    )
        elif isinstance(value, list):
            inside += value


def writable(data_dir: Path) -> Path:
    """Returns the folder to write a data_dir's datasets in: ArrayRecord needs a local disk."""
    return paths.scratch() / "datasets" if paths.remote(data_dir) else data_dir


def prepare_for(
    data_dir: Path, builder: tfds.core.DatasetBuilder
) -> tfds.core.DatasetBuilder:
    """Prepares a builder in `writable(data_dir)`; returns a builder that reads its files.

    If data_dir is in a bucket, the files are kept there, for the next process that needs them.
    """
    if not paths.remote(data_dir):
        return prepare(builder)
    kept = data_dir / os.path.relpath(builder.data_dir, writable(data_dir))
    if not (kept / INFO).exists():
        with paths.replacing(kept, INFO) as new:
            shutil.copytree(prepare(builder).data_dir, new, dirs_exist_ok=True)
    return open_folder(kept)


def prepare(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetBuilder:
    """Writes a builder's ArrayRecord files unless they exist; returns a builder that reads them.

    This is safe against a second process and against being killed. TFDS writes into a temporary
    folder and renames it. The lock makes a second process wait instead of doing the same work. What
    a killed process left behind is removed by the next one that holds the lock.
    """
    folder = pathlib.Path(builder.data_dir)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f".{folder.name}.lock"):
            if not folder.exists():
                for leftover in folder.parent.glob(f"incomplete.*_{folder.name}"):
                    shutil.rmtree(leftover)
                _write(builder)
    # The given builder does not know what another process wrote.
    return open_folder(folder)


def write_quietly(builder: tfds.core.DatasetBuilder) -> None:
    """Prepares a builder in ArrayRecord, without TFDS's progress bars and announcements."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format="array_record")
    tfds.enable_progress_bar()


def _write(builder: tfds.core.DatasetBuilder) -> None:
    """Writes ours, which take seconds, without progress; a download by TFDS shows its own."""
    log.info("preparing tfds:%s in %s, once", builder.name, builder.data_dir)
    if isinstance(builder, Corpus):
        write_quietly(builder)
    else:
        _download(builder)


def _download(builder: tfds.core.DatasetBuilder) -> None:
    """Prepares a dataset of TFDS's catalogue.

    Raises:
      DataError: its servers cannot be reached, or TFDS fails for another reason.
    """
    name = f"tfds:{builder.info.full_name}"
    # TFDS asks a server that cannot be reached for minutes.
    reason = network.unreachable(_needed_urls(builder))
    if reason:
        raise DataError(
            f"{name}: not in {builder.data_dir}, and it cannot be downloaded: {reason}; {OFFLINE}"
        )
    try:
        builder.download_and_prepare(file_format="array_record")
    except UserError:
        raise
    except Exception as error:
        why = first_line(error, kind=True)
        raise DataError(f"{name}: TFDS cannot prepare it: {why}") from error


def _needed_urls(builder: tfds.core.DatasetBuilder) -> list[str]:
    """Returns what TFDS will download: it keeps what it has, and takes what it is given."""
    downloads = pathlib.Path(builder.data_dir_root) / "downloads"
    given = {file.name for file in (downloads / "manual").glob("*")}
    kept = set()
    for note in downloads.glob("*.INFO"):
        kept |= set(json_text.read(note, json_text.Object).get("urls") or ())
    return [
        url
        for url in builder.url_infos or ()
        if url not in kept and url.rpartition("/")[2] not in given
    ]
