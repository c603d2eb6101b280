"""Sampling from a model: prefill and decode with a KV cache, as a jitted batch or token by token."""

from rlhfjax.sampling.generate import generate, stream
from rlhfjax.sampling.samples import Samples

__all__ = ["Samples", "generate", "stream"]
