"""The types that signatures share."""

from typing import Any

from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

PyTree = Any
"""A tree of arrays, as jax.tree_util takes it: parameters, a state, a batch."""

Scalar = float | Float[Array, ""]
"""A hyper-parameter: a Python float, or a traced scalar where it changes during a run (KL coefficient)."""

Metric = tuple[ArrayLike, ArrayLike]
"""(sum, weight): the value is sum / weight, so that microbatches, minibatches and hosts add up exactly."""

Metrics = dict[str, Metric]

Loss = tuple[Float[Array, ""], Metrics]
"""What a loss returns: a scalar, equal to sum / weight of the metric "loss", and all metrics.

To accumulate over microbatches, differentiate `metrics["loss"][0]` and divide the summed gradient by the summed
weight: the result does not depend on how the batch was cut.
"""
