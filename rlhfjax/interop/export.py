"""Export of our models as Hugging Face folders, and as files for llama.cpp."""

import math

import jax

from rlhfjax import json_text, paths
from rlhfjax.config import write_json
from rlhfjax.data.tokenizer import MODEL_FILE, Tokenizer
from rlhfjax.data.tokenizer_files import FILE as TOKENIZER_JSON
from rlhfjax.errors import ConfigError
from rlhfjax.interop import (
    foreign,
    generation_config,
    model_card,
    qwen2_folder,
    store,
)
from rlhfjax.interop.gguf import save_gguf
from rlhfjax.interop.gguf_file import open_gguf
from rlhfjax.interop.hf import save_hf
from rlhfjax.interop.model_card import Exported
from rlhfjax.mesh import make_layout
from rlhfjax.models import Model
from rlhfjax.paths import Path

_CARD = "README.md"


def export(
    name: str | Path,
    folder: Path,
    *,
    dtype: str = "float32",
    drop_bias: bool = False,
    adapter: str = "",
) -> str:
    """Writes a model and its tokenizer as a folder that `transformers` loads, whole or not at all.

    A language model's folder has the sampling settings of `chat` too. README.md says where the
    model comes from.

    Args:
      name: one of our models, or a foreign name.
      dtype, drop_bias: see `save_hf`.
      adapter: a PEFT folder, which is merged into the model; empty: none.
    Returns:
      What was written and how it is loaded, for people.
    Raises:
      ConfigError: the folder exists, or no Hugging Face architecture expresses the model.
      CheckpointError: there is no such model.
    """
    if folder.exists():
        raise ConfigError(f"--to={folder}: it exists; name a new folder")
    loaded = store.load(name, make_layout(), adapter)
    saved = qwen2_folder.for_transformers(loaded)
    tokenizer = saved.tokenizer
    ids = _special_ids(tokenizer, saved.model.head)
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
            adapter=adapter,
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
    summary = _summary(written[0], sizes)
    return summary if saved is loaded else f"{qwen2_folder.NOTE}\n{summary}"


def _special_ids(tokenizer: Tokenizer, head: str) -> dict[str, int | list[int]]:
    """Returns the ids of pad, bos and eos; of a language model all ids that end a response."""
    ids: dict[str, int | list[int]] = {
        "pad": tokenizer.pad_id,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
    }
    if head == "lm" and tokenizer.extra_eos_ids:
        ids["eos"] = [tokenizer.eos_id, *tokenizer.extra_eos_ids]
    return ids


def export_gguf(
    name: str | Path,
    file: Path,
    *,
    dtype: str = "float16",
    adapter: str = "",
) -> str:
    """Writes a language model, its tokenizer and its chat template as one GGUF file.

    Args:
      name: one of our models, or a foreign name.
      dtype: see `save_gguf`.
      adapter: see `export`.
    Returns:
      What was written and how it is used, for people.
    Raises:
      ConfigError: the file exists, llama.cpp cannot express the model or the tokenizer, or the gguf
        package is not installed.
      CheckpointError: there is no such model.
    """
    if file.exists():
        raise ConfigError(f"--to={file}: it exists; name a new file")
    saved = store.load(name, make_layout(), adapter)
    save_gguf(file, saved.model, saved.params, saved.tokenizer, dtype)
    architecture = open_gguf(file)[0]["general.architecture"]
    lines = [
        f"wrote {file}: {architecture}, {_count(saved.model):,} parameters, {dtype}, "
        f"{_readable(paths.size(file))}",
        f"with llama.cpp: llama-cli -m {file}",
        f"or: rlhfjax chat --model=gguf:{file}",
    ]
    return "\n".join(lines)


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
