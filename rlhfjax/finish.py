"""Writes what a stage that trains leaves: models, files and adapters."""

import logging
from typing import Any

import jax

from rlhfjax import hosts, sums
from rlhfjax.config import write_json
from rlhfjax.errors import ConfigError
from rlhfjax.interop import peft, store
from rlhfjax.mesh import Layout
from rlhfjax.paths import Path
from rlhfjax.stage import Stage
from rlhfjax.state import TrainState
from rlhfjax.types import Metrics, PyTree

logger = logging.getLogger("rlhfjax")


def write(stage: Stage, state: TrainState, workdir: Path, layout: Layout) -> Metrics:
    """Writes the stage's models and files, and returns its last metrics.

    This precedes the last save, so that a run that is killed in between writes them again.
    """
    finished = stage.finish(state)
    for name, model in finished.models.items():
        store.save(workdir / name, model)
    for name, content in finished.files.items():
        write_json(workdir / name, content)
    if finished.files:
        sums.write(workdir, finished.files)
    for name, (model, adapters) in finished.adapters.items():
        _save_adapters(workdir / name, model, adapters, layout)
    return finished.metrics


def _save_adapters(folder: Path, model: Any, adapters: PyTree, layout: Layout) -> None:
    """Writes LoRA adapters in PEFT's format, on the first host; warns if PEFT lacks the model."""
    replicate = jax.jit(lambda x: x, out_shardings=layout.replicated)
    on_host = jax.device_get(replicate(adapters))
    if not hosts.first():
        return
    try:
        peft.save_peft(folder, model, on_host)
    except ConfigError as e:
        logger.warning("%s is not written (the merged model is): %s", folder, e)
