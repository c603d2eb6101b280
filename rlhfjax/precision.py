"""What `dtype="auto"` of a model is on these devices.

A stage resolves it once, when it begins: config.json and the saved model have the dtype that was
computed with. A run that resumes keeps it, also on other devices.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax

from rlhfjax import processor, workdirs
from rlhfjax.paths import Path

log = logging.getLogger("rlhfjax")
AUTO = "auto"
# Features of CPUs that multiply bfloat16 numbers faster than float32 ones.
FAST_FEATURES = frozenset({"amx_bf16", "avx512_bf16"})
# Options that are, or change, a model_config.
_MODELS = ("model", "overrides")


def fastest(platform: str, features: Collection[str] = ()) -> str:
    """Returns the dtype that a platform computes fastest.

    Args:
      platform: of jax: "cpu", "tpu", "gpu", "cuda" or "rocm".
      features: of a CPU.
    """
    if platform != "cpu":
        return "bfloat16"
    return "float32" if FAST_FEATURES.isdisjoint(features) else "bfloat16_products"


def here() -> str:
    """Returns the dtype that the devices of this process compute fastest."""
    return fastest(jax.devices()[0].platform, processor.features())


def resolved(
    config: Mapping[str, Any], workdir: Path | None = None, dtype: str = ""
) -> dict[str, Any]:
    """Returns the config of a stage or a recipe with the dtypes that "auto" stands for.

    Args:
      workdir: the dtypes in its config.json stay as they are; None: there is no workdir.
      dtype: of all others; default: the fastest one here.
    """
    before = None
    if workdir is not None and workdir.is_dir():
        before = workdirs.read_config(workdir)
    return _resolved(config, before, dtype, "")


def _resolved(values: Any, before: Any, dtype: str, parent: str) -> Any:
    """Returns a part of a config; `before` is the same part of the workdir's."""
    if not isinstance(values, Mapping):
        return values
    before = before if isinstance(before, Mapping) else {}
    found = {}
    for name, value in values.items():
        if name == "dtype" and value == AUTO and parent in _MODELS:
            found[name] = before.get(name) or dtype or here()
        else:
            found[name] = _resolved(value, before.get(name), dtype, name)
    return found


def warn_if_slow(dtypes: Iterable[str]) -> None:
    """Logs a warning if a dtype of models that were made elsewhere is slow on this CPU."""
    best = here()
    slow = {"bfloat16", "bfloat16_products"} & set(dtypes) - {best}
    if slow and jax.devices()[0].platform == "cpu":
        name = min(slow)
        log.warning(
            "dtype=%s is slow on this CPU, where %s is fastest; the model keeps it",
            name,
            best,
        )
