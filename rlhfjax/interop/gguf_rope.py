"""The scaling of rotary frequencies in a GGUF file.

Kinds "linear" and "yarn" are in the metadata. Kind "llama3" is a tensor of factors that divide the
frequencies; it is read if it is the formula of Llama 3.1, 3.2 and 3.3, whose numbers no key has.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from rlhfjax.errors import CheckpointError
from rlhfjax.interop.gguf_families import ROPE_FACTORS, Architecture
from rlhfjax.interop.gguf_values import Metadata
from rlhfjax.models.config import RopeScaling
from rlhfjax.models.rope import usual_factor

_KEY = "rope.scaling"
_ORIGINAL = f"{_KEY}.original_context_length"
_LLAMA3 = {"low_frequency": 1.0, "high_frequency": 4.0}
_LLAMA3_LENGTH = 8192  # tokens


def read(
    architecture: Architecture,
    values: Metadata,
    *,
    rotated: int,
    theta: float,
    max_length: int,
    factors: np.ndarray | None,
) -> dict[str, Any]:
    """Returns the fields of the RopeScaling that a file describes.

    Args:
      rotated: number of dimensions that are rotated.
      theta: base of the wavelengths.
      factors: content of the tensor ROPE_FACTORS, if there is one.
    Raises:
      CheckpointError: the architecture has no such scaling.
    """
    kind = values.get(f"{_KEY}.type", str, "linear")  # llama.cpp's default
    older = values.get("rope.scale_linear", float, 1.0)
    factor = values.get(f"{_KEY}.factor", float, older) or 1.0
    accepted = ("none", *(name for name in architecture.scalings if name != "llama3"))
    if kind not in accepted:
        raise values.refuse(f"{_KEY}.type", kind, " or ".join(map(repr, accepted)))
    if not (factor == 1 if kind == "none" else factor >= 1):
        raise values.refuse(f"{_KEY}.factor", factor)
    length = values.get(_ORIGINAL, int, None)
    attention = values.get(f"{_KEY}.attn_factor", float, 1.0)
    if kind == "yarn":
        fields = _yarn(values, factor, attention) | {
            "original_length": length or max_length
        }
    elif attention != 1:
        raise values.refuse(f"{_KEY}.attn_factor", attention, "1.0 without yarn")
    else:
        fields = {"kind": "linear", "factor": factor} if factor != 1 else {}
    if factors is None:
        return fields
    if fields or "llama3" not in architecture.scalings:
        raise CheckpointError(
            f"{values.path}: our Transformer has no place for the tensor {ROPE_FACTORS} "
            f"in an architecture {values.start[:-1]} with {fields or 'no scaling'}"
        )
    return _of_factors(values, factors, rotated, theta, length)


def describe(
    scaling: RopeScaling, rotated: int, theta: float
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Returns what `read` reads: metadata, and the tensor of factors if there is one."""
    if scaling.kind == "linear":
        return {f"{_KEY}.type": "linear", f"{_KEY}.factor": scaling.factor}, None
    if scaling.kind == "yarn":
        return _described_yarn(scaling), None
    metadata: dict[str, Any] = {f"{_KEY}.type": "none"}
    if scaling.kind == "none":
        return metadata, None
    if scaling.original_length != _LLAMA3_LENGTH:
        metadata[_ORIGINAL] = scaling.original_length
    return metadata, llama3_factors(rotated, theta, scaling)


def _described_yarn(scaling: RopeScaling) -> dict[str, Any]:
    """Returns the metadata of kind "yarn", without its betas: llama.cpp has those of the paper."""
    metadata = {
        f"{_KEY}.type": "yarn",
        f"{_KEY}.factor": scaling.factor,
        _ORIGINAL: scaling.original_length,
    }
    # llama.cpp multiplies by the usual factor before this one.
    if scaling.attention_factor is not None:
        relative = scaling.attention_factor / usual_factor(scaling.factor)
        metadata[f"{_KEY}.attn_factor"] = relative
    return metadata


def llama3_factors(dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Returns what divides each rotary frequency in kind "llama3", float32 [dim / 2]."""
    low, high = scaling.low_frequency, scaling.high_frequency
    with np.errstate(all="ignore"):  # a file may have any base
        frequencies = theta ** (-np.arange(0, dim, 2) / dim)
        turns = (scaling.original_length or 0) * frequencies / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return (1 / ((1 - kept) / scaling.factor + kept)).astype(np.float32)


def _yarn(values: Metadata, factor: float, attention: float) -> dict[str, Any]:
    return {
        "kind": "yarn",
        "factor": factor,
        "beta_fast": values.get(f"{_KEY}.yarn_beta_fast", float, 32.0),
        "beta_slow": values.get(f"{_KEY}.yarn_beta_slow", float, 1.0),
        "attention_factor": None
        if attention == 1
        else attention * usual_factor(factor),
    }


def _of_factors(
    values: Metadata, factors: np.ndarray, rotated: int, theta: float, length: Any
) -> dict[str, Any]:
    """Returns the fields of the scaling that has these factors."""
    scaling = RopeScaling(
        kind="llama3",
        factor=float(str(np.float32(factors.max(initial=1)))),
        original_length=length or _LLAMA3_LENGTH,
        **_LLAMA3,
    )
    if 2 * len(factors) == rotated:
        expected = llama3_factors(rotated, theta, scaling)
        if np.allclose(factors, expected, rtol=1e-4):
            return {} if scaling.factor == 1 else dataclasses.asdict(scaling)
    raise CheckpointError(
        f"{values.path}: the tensor {ROPE_FACTORS} is not that of Llama 3.1 with the "
        f"factor {scaling.factor}, the original length {scaling.original_length} and "
        "the frequency factors 1 and 4; others are not read"
    )
