"""The values of a config.json, taken key by key, so that no key is passed over unseen."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhfjax.errors import CheckpointError
from rlhfjax.interop.hf_families import NEUTRAL, SILENT, Family
from rlhfjax.json_text import named, shown
from rlhfjax.paths import Path

REQUIRED = object()
QUANTIZATION = "quantization_config"


class ConfigValues:
    """The values of a config.json, taken key by key; `finish` rejects what is left."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path = path
        self.left = {key: value for key, value in values.items() if value is not None}
        self._null = {key for key, value in values.items() if value is None}

    def take(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """Removes a key and returns its value, or the default if it is absent or null."""
        value = self.left.pop(key, default)
        if value is REQUIRED:
            raise CheckpointError(f"{self.path}: there is no {key}")
        if kind is float and type(value) is int:
            value = float(value)
        if value is not default and type(value) is not kind:
            raise CheckpointError(
                f"{self.path}: {key} is {shown(value)}: expected {kind.__name__}"
            )
        return value

    def take_or_none(self, key: str, kind: type, default: Any) -> Any:
        """Does what `take` does, but null is None: for keys whose absence means something else."""
        return None if key in self._null else self.take(key, kind, default)

    def take_equal(self, keys: Sequence[str], kind: type, default: Any) -> Any:
        """Removes keys and returns the value that they have in common.

        An absent key has the default.
        """
        first, *others = keys
        value = self.take(first, kind, default)
        for key in others:
            if (other := self.take(key, kind, default)) != value:
                raise self.invalid(key, other, f"that of {first}, {value!r}")
        return value

    def take_first(self, keys: Sequence[str], kind: type, default: Any) -> Any:
        """Removes keys and returns the value that all present ones have in common.

        Raises:
          CheckpointError: two keys differ, or none is present and `default` is REQUIRED.
        """
        present = [key for key in keys if key in self.left]
        if not present:
            return self.take(keys[0], kind, default)
        values = {key: self.take(key, kind) for key in present}
        first = values[present[0]]
        for key, value in values.items():
            if value != first:
                raise self.invalid(key, value, f"what it says elsewhere, {first}")
        return first

    def flatten(self, key: str) -> None:
        """Replaces an object by its members, "key.member"."""
        for name, value in self.take(key, dict, {}).items():
            if value is not None:
                self.left[f"{key}.{name}"] = value

    def finish(self, family: Family) -> None:
        """Raises CheckpointError for a key that is left, unless it changes nothing."""
        neutral = {**NEUTRAL, **family.neutral}
        # The kind of a thing, such as "gptq", before its numbers.
        for key in sorted(self.left, key=_is_detail):
            value = self.left[key]
            if key in SILENT or key in family.silent:
                continue
            accepted = neutral.get(key, ())
            # An empty list is one value.
            elements = value if isinstance(value, list) and value else [value]
            if not all(_is_one_of(element, accepted) for element in elements):
                choices = " or ".join(map(repr, accepted))
                raise self.invalid(key, value, choices or "a config.json without it")

    def invalid(
        self, key: str, value: Any, accepted: str = "", reason: str = ""
    ) -> CheckpointError:
        """Returns the error for a value that our Transformer cannot express."""
        accepted = f"; accepted is {accepted}" if accepted else ""
        if key.startswith(f"{QUANTIZATION}."):
            accepted = "; take the model's folder from before quantization"
        told = f"{named(key)} = {shown(value)}"
        return CheckpointError(
            f"{self.path}: our Transformer cannot do what {told} says{reason}{accepted}"
        )


def _is_detail(key: str) -> bool:
    """Returns whether a key is none that names a kind of scaling or quantization."""
    return key.rpartition(".")[2] not in ("rope_type", "type", "quant_method")


def _is_one_of(value: Any, accepted: Sequence[Any]) -> bool:
    """Returns whether a value is accepted. In Python 0 == False; in JSON they differ."""
    return any(
        value == other and isinstance(value, bool) == isinstance(other, bool)
        for other in accepted
    )
