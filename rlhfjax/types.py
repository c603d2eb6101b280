"""The types that signatures share."""

from typing import Any

from jax import Array
from jaxtyping import Float

PyTree = Any
"""A tree of arrays, as jax.tree_util takes it: parameters, a state, a batch."""

Scalar = float | Float[Array, ""]
"""A hyperparameter: a Python float, or a traced scalar if it changes during a run."""

Metric = tuple[Any, Any]
"""(sum, weight), each a float or an array of jax or NumPy: the value is sum / weight.

Sums and weights add up exactly over microbatches, minibatches and hosts.
"""

Metrics = dict[str, Metric]

Loss = tuple[Float[Array, ""], Metrics]
"""What a loss returns: a scalar, equal to sum / weight of the metric "loss", and all metrics.

To accumulate over microbatches, differentiate `metrics["loss"][0]` and divide the summed gradient
by the summed weight: the result does not depend on how the batch was cut.
"""
