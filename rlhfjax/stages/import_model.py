"""Imports a model of another framework as one of ours, to start later stages from.

workdir/model/    the model, as a training stage leaves it

`hf:FOLDER`, `gguf:FILE` and `pip:PACKAGE` are accepted wherever a stage takes a model. This stage
reads such a model once, with another dtype, scanned layers, or another chat template.
"""

import dataclasses
from typing import Any

import jax

from rlhfjax import paths
from rlhfjax.data.built_in_templates import BUILT_IN, read_template
from rlhfjax.data.hf_tokenizer import HuggingFaceTokenizer
from rlhfjax.data.sandbox import Program
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.interop import store
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.models.config import TransformerConfig
from rlhfjax.paths import Path
from rlhfjax.roles import Role

LEAVES_MODEL = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The model, and what is changed when it is imported."""

    stage: str = "import_model"
    """Name of the stage."""
    init_from: str
    """hf:FOLDER, gguf:FILE, pip:PACKAGE, or a folder with one of our models"""
    adapter: str = ""
    """PEFT folder that is merged into the model; empty: none"""
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    """changes to the model_config, such as dtype, remat, scan_layers or dropout"""
    chat_template: str = ""
    """ours, chatml, llama2, llama3 or a .jinja file; empty: the model's own"""
    mesh: MeshConfig = MeshConfig()
    """the devices that the model is read onto"""


def roles(config: Config) -> dict[str, Role]:
    """Returns the role of the imported model."""
    return {"model": Role(config.init_from, overrides=config.overrides)}


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    name = config.chat_template
    if not name or name in BUILT_IN:
        return
    if not name.endswith(".jinja") or not paths.path(name).is_file():
        accepted = ", ".join(BUILT_IN)
        raise ConfigError(
            f"import_model.chat_template={name!r}:"
            f" accepted are {accepted}, or a .jinja file that is there"
        )
    Program(
        read_template(paths.path(name)), name
    )  # validates it before the model is read


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes model/; returns its number of parameters."""
    opened = store.open_model(
        config.init_from,
        layout,
        config.overrides,
        f"{config.stage}.overrides",
        config.adapter,
    )
    validate(config, layout, opened.model.config)
    tokenizer = opened.tokenizer
    if config.chat_template:
        tokenizer = _with_template(tokenizer, config.chat_template)
    saved = store.SavedModel(opened.model, opened.params(), tokenizer)
    store.save(workdir / store.FOLDER, saved)
    size = sum(leaf.size for leaf in jax.tree.leaves(saved.params))
    metrics = {f"{config.stage}/parameters": float(size)}
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def _with_template(tokenizer: Tokenizer, name: str) -> Tokenizer:
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ConfigError(
            f"import_model.chat_template={name!r}:"
            " a SentencePiece tokenizer has the markers it was trained with"
        )
    template = name if name in BUILT_IN else read_template(paths.path(name))
    try:
        return tokenizer.with_template(template)
    except DataError as error:
        raise DataError(f"import_model.chat_template={name}: {error}") from None
