"""Our models as Hugging Face folders."""

from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.interop.hf import save_hf
from rlhfjax.mesh import make_layout
from rlhfjax.paths import Path


def export(
    name: str | Path, folder: Path, *, dtype: str = "float32", drop_bias: bool = False
) -> None:
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
    ids = {
        name: getattr(saved.tokenizer, f"{name}_id") for name in ("pad", "bos", "eos")
    }
    save_hf(
        folder,
        saved.model,
        saved.params,
        dtype,
        special_ids=ids,
        tokenizer=saved.tokenizer,
        drop_bias=drop_bias,
    )
