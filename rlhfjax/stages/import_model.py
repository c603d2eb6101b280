"""A model that others have made, as one of ours: what the later stages of a recipe start from.

`hf:FOLDER`, `gguf:FILE` and `pip:PACKAGE` stand wherever a stage takes a model; this stage is for a recipe that wants
it read once, in another dtype, with scanned layers, or with another chat template.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from rlhfjax.interop import store
from rlhfjax.mesh import Layout, MeshConfig
from rlhfjax.metrics import Writer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    stage: str = "import_model"
    init_from: str  # hf:FOLDER, gguf:FILE, pip:PACKAGE, or one of our folders
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # dtype, remat, scan_layers, dropout, …
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def run(config: Config, workdir: Path, layout: Layout) -> dict[str, float]:
    """Writes model/; returns its size."""
    saved = store.override(store.load(config.init_from, layout), config.overrides, f"{config.stage}.overrides")
    store.save(workdir / store.FOLDER, saved)
    size = sum(leaf.size for leaf in jax.tree.leaves(saved.params))
    metrics = {f"{config.stage}/parameters": float(size)}
    with Writer(workdir) as writer:
        writer.write(0, metrics)
    return metrics
