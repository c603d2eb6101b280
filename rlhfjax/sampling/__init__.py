"""Sampling from a model with a KV cache: jitted batches, or one response token by token."""

from rlhfjax.sampling.config import Sampling, SamplingConfig
from rlhfjax.sampling.generate import generate, stream
from rlhfjax.sampling.samples import Samples

__all__ = ["Samples", "Sampling", "SamplingConfig", "generate", "stream"]
