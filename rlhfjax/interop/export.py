"""Our models as Hugging Face folders."""

import os
import shutil
from pathlib import Path

from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.interop.hf import save_hf
from rlhfjax.mesh import make_layout


def export(name: str | Path, folder: Path, *, dtype: str = "float32", drop_bias: bool = False) -> None:
    """Writes a model and its tokenizer as a folder that `transformers` loads, whole or not at all.

    Args:
      name: one of our models, or a foreign name.
    Raises:
      ConfigError: the folder exists, or Hugging Face's form has no place for what the model is.
      CheckpointError: there is no such model.
    """
    if folder.exists():
        raise ConfigError(f"--to={folder}: it exists; name a new folder")
    saved = store.load(name, make_layout())
    tokenizer = saved.tokenizer
    ids = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    save_hf(temporary, saved.model, saved.params, dtype, special_ids=ids, drop_bias=drop_bias)
    tokenizer.save(temporary)
    os.replace(temporary, folder)
