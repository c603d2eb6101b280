"""Export of our models as Hugging Face folders."""

import math

import jax

from rlhfjax import json_text, paths
from rlhfjax.config import write_json
from rlhfjax.data.tokenizer import MODEL_FILE
from rlhfjax.data.tokenizer_files import FILE as TOKENIZER_JSON
from rlhfjax.errors import ConfigError
from rlhfjax.interop import foreign, generation_config, model_card, store
from rlhfjax.interop.hf import save_hf
from rlhfjax.interop.model_card import Exported
from rlhfjax.mesh import make_layout
from rlhfjax.models import Model
from rlhfjax.paths import Path

_CARD = "README.md"


def export(
    name: str | Path, folder: Path, *, dtype: str = "float32", drop_bias: bool = False
) -> str:
    """Writes a model and its tokenizer as a folder that `transformers` loads, whole or not at all.

    A language model's folder has the sampling settings of `chat` too. README.md says where the
    model comes from.

    Args:
      name: one of our models, or a foreign name.
      dtype, drop_bias: see `save_hf`.
    Returns:
      What was written and how it is loaded, for people.
    Raises:
      ConfigError: the folder exists, or no Hugging Face architecture expresses the model.
      CheckpointError: there is no such model.
    """
    if folder.exists():
        raise ConfigError(f"--to={folder}: it exists; name a new folder")
    saved = store.load(name, make_layout())
    tokenizer = saved.tokenizer
    ids = {
        "pad": tokenizer.pad_id,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
    }
    written: list[Exported] = []

    def write_others(temporary: Path) -> None:
        tokenizer.export(temporary)
        if saved.model.head == "lm" and not foreign.find(name):
            settings = generation_config.of_ours(saved.model.config.max_length, ids)
            write_json(temporary / generation_config.FILE, settings)
        config = json_text.read(temporary / "config.json", json_text.Object)
        exported = Exported(
            folder=str(folder),
            source=str(name),
            architecture=config["architectures"][0],
            parameters=_count(saved.model),
            dtype=dtype,
            is_reward=saved.model.head == "scalar",
            has_template=bool(tokenizer.template.source),
            dropped_bias=float(config.get("rlhfjax_reward_bias", 0.0)),
        )
        card = model_card.text(exported, model_card.origins(name))
        paths.write(temporary / _CARD, card)
        written.append(exported)
        for file in paths.files(temporary):
            sizes[file.name] = paths.size(file)

    sizes: dict[str, int] = {}
    save_hf(
        folder,
        saved.model,
        saved.params,
        dtype,
        special_ids=ids,
        write_others=write_others,
        drop_bias=drop_bias,
    )
    return _summary(written[0], sizes)


def _count(model: Model) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes()))


def _summary(exported: Exported, sizes: dict[str, int]) -> str:
    lines = [f"wrote {exported.folder}: {model_card.described(exported)}"]
    width = max(map(len, sizes))
    for name, size in sizes.items():
        lines.append(f"  {name:{width}}  {_readable(size)}")
    if MODEL_FILE in sizes and TOKENIZER_JSON not in sizes:
        lines.append(
            f"no {TOKENIZER_JSON}, so AutoTokenizer cannot read it: "
            f"only our BPE tokenizers are converted; {MODEL_FILE} is for SentencePiece"
        )
    lines.append(f"{_CARD}: add the license and the data before you publish it")
    lines.append("load it in Python:")
    lines += [
        f"  {line}" if line else ""
        for line in model_card.usage(exported, exported.folder)
    ]
    if not exported.is_reward:
        lines.append(f"or: rlhfjax chat --model=hf:{exported.folder}")
    return "\n".join(lines)


def _readable(size: int | float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
