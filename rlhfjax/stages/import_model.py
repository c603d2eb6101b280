"""A model that others have made, as one of ours: what the later stages of a recipe start from.

`hf:FOLDER`, `gguf:FILE` and `pip:PACKAGE` stand wherever a stage takes a model; this stage is for a recipe that wants
it read once, in another dtype, with scanned layers, or with another chat template.
"""

import dataclasses
from typing import Any

import jax

from rlhfjax import paths
from rlhfjax.data.hf_tokenizer import HuggingFaceTokenizer
from rlhfjax.data.template import BUILT_IN
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer
from rlhfjax.models.config import TransformerConfig
from rlhfjax.paths import Path
from rlhfjax.roles import Role

LEAVES_MODEL = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    stage: str = "import_model"
    init_from: str  # hf:FOLDER, gguf:FILE, pip:PACKAGE, or one of our folders
    overrides: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # dtype, remat, scan_layers, dropout, …
    chat_template: str = (
        ""  # ours, chatml, llama2, llama3 or a .jinja file; empty: the model's own
    )
    mesh: MeshConfig = MeshConfig()


def roles(config: Config) -> dict[str, Role]:
    return {"model": Role(config.init_from, overrides=config.overrides)}


def validate(
    config: Config, layout: Layout, model_config: TransformerConfig | None
) -> None:
    """Validates the config. Raises ConfigError."""
    name = config.chat_template
    if (
        name
        and name not in BUILT_IN
        and not (name.endswith(".jinja") and paths.path(name).is_file())
    ):
        accepted = ", ".join(BUILT_IN)
        raise ConfigError(
            f"import_model.chat_template={name!r}: accepted are {accepted}, or a .jinja file that is there"
        )


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes model/; returns its size."""
    opened = store.open_model(
        config.init_from, layout, config.overrides, f"{config.stage}.overrides"
    )
    validate(config, layout, opened.model.config)
    saved = store.SavedModel(opened.model, opened.params(), opened.tokenizer)
    if config.chat_template:
        saved = dataclasses.replace(
            saved, tokenizer=_in_template(saved.tokenizer, config.chat_template)
        )
    store.save(workdir / store.FOLDER, saved)
    size = sum(leaf.size for leaf in jax.tree.leaves(saved.params))
    metrics = {f"{config.stage}/parameters": float(size)}
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics


def _in_template(tokenizer: Tokenizer, name: str) -> Tokenizer:
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ConfigError(
            "import_model.chat_template: a SentencePiece tokenizer has the markers it was trained with"
        )
    return tokenizer.with_template(
        name if name in BUILT_IN else paths.path(name).read_text()
    )
