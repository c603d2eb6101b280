"""Exponential moving average of weights."""

import jax
from jax import Array
from jaxtyping import Float, PyTree

from rlhfjax.types import Scalar

# pyright: reportUndefinedVariable=false
# jaxtyping's "T" names a tree structure; pyright reads it as a forward reference.


def ema_update(
    average: PyTree[Float[Array, "..."], "T"],
    params: PyTree[Float[Array, "..."], "T"],
    *,
    decay: Scalar,
) -> PyTree[Float[Array, "..."], "T"]:
    """Returns decay a + (1 - decay) theta, leaf by leaf.

    The average starts as the initial weights, so that there is no bias correction.

    Source: Ouyang et al. 2022, appendix C.4 (decay 0.992).
    """
    return jax.tree.map(
        lambda a, theta: decay * a + (1 - decay) * theta, average, params
    )
