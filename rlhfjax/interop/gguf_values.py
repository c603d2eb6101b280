"""The values of a GGUF file's metadata, taken key by key, so that no key is passed over unseen."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhfjax import paths
from rlhfjax.errors import CheckpointError
from rlhfjax.interop.gguf_families import NEUTRAL
from rlhfjax.interop.hf_values import REQUIRED, ConfigValues
from rlhfjax.paths import Path


class Metadata(ConfigValues):
    """The values of an architecture's keys, which are named without its prefix here."""

    def __init__(self, path: str | Path, name: str, metadata: Mapping[str, Any]):
        self.start = f"{name}."
        keys = [key for key in metadata if key.startswith(self.start)]
        super().__init__(paths.path(path), {key: metadata[key] for key in keys})

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """Removes a key and returns its value, or the default if it is absent.

        A float32 is read as the decimal that was meant: 1e-05, not 9.999999747378752e-06.
        """
        value = self.take(self.start + key, kind, default)
        if kind is float and value is not default:
            return float(str(np.float32(value)))
        return value

    def refuse(self, key: str, value: Any, accepted: str = "") -> CheckpointError:
        """Returns the error for a value that our Transformer cannot express."""
        return self.invalid(self.start + key, value, accepted)

    def validate_rest(self) -> None:
        """Raises CheckpointError for a key that is left, unless it changes nothing."""
        for key, value in self.left.items():
            if value not in NEUTRAL.get(key.removeprefix(self.start), ()):
                raise self.invalid(key, value)
