"""Export of our models as Hugging Face folders."""

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
      dtype, drop_bias: see `save_hf`.
    Raises:
      ConfigError: the folder exists, or no Hugging Face architecture expresses the model.
      CheckpointError: there is no such model.
    """
    if folder.exists():
        raise ConfigError(f"--to={folder}: it exists; name a new folder")
    saved = store.load(name, make_layout())
    tokenizer = saved.tokenizer
    save_hf(
        folder,
        saved.model,
        saved.params,
        dtype,
        special_ids={
            "pad": tokenizer.pad_id,
            "bos": tokenizer.bos_id,
            "eos": tokenizer.eos_id,
        },
        tokenizer=tokenizer,
        drop_bias=drop_bias,
    )
