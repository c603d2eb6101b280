"""The ids that end a response according to a model's folder; there may be several.

Llama 3 names three in generation_config.json, Qwen2 the end of a turn and that of a document.
"""

from collections.abc import Mapping
from typing import Any

from rlhfjax import json_text
from rlhfjax.errors import DataError
from rlhfjax.json_text import Object, shown
from rlhfjax.paths import Path

# The key with which tokenizer_config.json keeps the ids of the other files. Saved models have none
# of these files, and their tokenizers keep the ids.
END_IDS = "rlhfjax_eos_ids"
_KEY = "eos_token_id"
_FILES = ("config.json", "generation_config.json")


def end_ids(folder: Path, config: Mapping[str, Any]) -> list[int]:
    """Returns the ids that a folder's files name as eos, and those that `config` keeps, sorted.

    Args:
      config: the content of tokenizer_config.json.
    Raises:
      DataError: a file is damaged, or a value is neither an id nor a list of ids. Names the file.
    """
    ids = _ids(config.get(END_IDS), f"{folder}: {END_IDS}")
    for name in _FILES:
        file = folder / name
        values = json_text.read_if_there(file, Object) or {}
        ids |= _ids(values.get(_KEY), f"{file}: {_KEY}")
    return sorted(ids)


def _ids(value: Any, context: str) -> set[int]:
    if value is None:
        return set()
    ids = value if isinstance(value, list) else [value]
    for i in ids:
        if type(i) is not int or i < 0:
            raise DataError(f"{context} is {shown(value)}: expected ids, integers >= 0")
    return set(ids)
