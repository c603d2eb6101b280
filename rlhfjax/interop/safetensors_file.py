"""Opens safetensors files, alone or as the shards of a folder.

The library validates files; here its errors become ours.
"""

import re
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from rlhfjax import json_text, paths
from rlhfjax.errors import CheckpointError, first_line
from rlhfjax.json_text import named, shown
from rlhfjax.paths import Path

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"\w[\w.-]*\.safetensors")
# The library parses any header of up to 100 MB, for eight seconds. A tensor needs about 100 bytes.
MOST_HEADER = 2**23
_LENGTH = 8  # bytes of the header's length, at the start of a file


def open_safetensors(path: Path) -> Any:
    """Returns an open file. Its tensors are read on demand, as numpy arrays.

    Raises:
      CheckpointError: the file is missing, cannot be read, or is not a whole safetensors file.
    """
    try:
        local = paths.local(path)
        paths.validate_regular(local, CheckpointError)
        with local.open("rb") as file:
            header = int.from_bytes(file.read(_LENGTH), "little")
        if MOST_HEADER < header <= local.stat().st_size:
            raise CheckpointError(
                f"{path}: its header has {header} bytes: accepted are {MOST_HEADER}"
            )
        return safe_open(local, framework="numpy")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror or first_line(error)}"
        ) from None
    except SafetensorError as error:
        why = first_line(error)
        raise CheckpointError(f"{path}: not a whole safetensors file: {why}") from None


class Folder:
    """The tensors of a folder by name, read on demand: one file, or an index and its shards.

    Raises:
      CheckpointError: a file is missing or damaged, or a tensor is in two of them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.file: dict[str, Path] = {}  # of each tensor
        self._open: dict[Path, Any] = {}
        if (folder / WEIGHTS).exists():
            self._add(folder / WEIGHTS)
            return
        index = _read_index(folder)
        for part in sorted(set(index.values())):
            if not (folder / part).exists():
                raise CheckpointError(
                    f"{folder / part}: there is no such file, which {INDEX} names"
                )
            self._add(folder / part)
        if unmatched := self.file.keys() ^ index.keys():
            raise CheckpointError(
                f"{folder / INDEX}: {named(min(unmatched))} is not in both the index and its files"
            )
        for name, part in index.items():
            if self.file[name] != folder / part:
                raise CheckpointError(
                    f"{folder / INDEX}: {named(name)} is in {self.file[name].name}, not in {part}"
                )

    def _add(self, path: Path) -> None:
        self._open[path] = open_safetensors(path)
        for name in list(self._open[path].keys()):
            if name in self.file:
                raise CheckpointError(
                    f"{path}: {named(name)} is in {self.file[name].name} too"
                )
            self.file[name] = path

    def slice(self, name: str) -> Any:
        """Returns a tensor of which nothing is read yet."""
        return self._open[self.file[name]].get_slice(name)

    def read(self, name: str) -> np.ndarray:
        return self._open[self.file[name]].get_tensor(name)


def _read_index(folder: Path) -> dict[str, str]:
    """Returns the name of each tensor's file."""
    path = folder / INDEX
    content = paths.read_if_there(path, CheckpointError)
    if content is None:
        raise _no_weights(folder)
    index = json_text.decode(content, path, error=CheckpointError)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise CheckpointError(
            f"{path}: expected a JSON object with weight_map: file names by tensor"
        )
    for name, file in files.items():
        # A name with a folder could read any file of this machine.
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise CheckpointError(
                f"{path}: expected a JSON object with weight_map: file names by tensor, "
                f"got {shown(file)} of {named(name)}: accepted are names NAME.safetensors"
            )
    return files


def _no_weights(folder: Path) -> CheckpointError:
    """Returns the error for a folder without safetensors."""
    missing = (
        f"{folder}: there is no {WEIGHTS} and no {INDEX}; other formats are not read"
    )
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if (folder / name).exists():
            return CheckpointError(
                f"{missing}; to convert {name}, in Python with transformers: "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
    return CheckpointError(missing)
