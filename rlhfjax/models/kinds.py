"""The attention of each layer of a model: which tokens it sees, and how it rotates positions.

A model has a few kinds of layers (`TransformerConfig.kinds`); the functions below return one thing
per kind, in that order, or choose that of one layer.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from rlhfjax.models.attention import Scoring
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.rope import RopeTables, identity, rope_of


def ropes_of(
    config: TransformerConfig, positions: Int[Array, "b t"]
) -> tuple[RopeTables | None, ...]:
    """Returns the RoPE tables of each kind; None for one without rotation."""
    return tuple(rope_of(config, positions, kind) for kind in config.kinds)


def scoring_of(config: TransformerConfig) -> Scoring:
    """Returns how all layers make their scores."""
    return Scoring(
        scale=config.attention_scale,
        softcap=config.attention_softcap,
        dtype=config.product_dtype,
    )


def attends_of(config: TransformerConfig, attend: Callable) -> tuple[Callable, ...]:
    """Returns attention over a whole sequence for each kind.

    Args:
      attend: `causal_attention` or a kernel.
    """
    scoring = scoring_of(config)
    windows = [config.window if kind == "window" else None for kind in config.kinds]
    return tuple(
        functools.partial(attend, window=window, scoring=scoring) for window in windows
    )


def index_of(config: TransformerConfig, layer: int) -> int:
    """Returns which of config.kinds a layer is."""
    return config.kinds.index(config.kind(layer))


def of_layer(
    config: TransformerConfig,
    layer: int | Int[Array, ""],
    ropes: Sequence[RopeTables | None],
    attends: Sequence[Callable],
) -> tuple[RopeTables | None, Callable]:
    """Returns the RoPE tables and the attention of a layer.

    Args:
      layer: its index. One body serves all scanned layers, so that their index is traced, and with
        several kinds the layer's is chosen at run time.
      ropes: what `ropes_of` returns.
      attends: what `attends_of` returns.
    """
    if len(config.kinds) == 1:
        return ropes[0], attends[0]
    if isinstance(layer, int):
        kind = index_of(config, layer)
        return ropes[kind], attends[kind]
    by_layer = [index_of(config, i) for i in range(config.n_layers)]
    kind = jnp.array(by_layer)[layer]

    def attend(q, k, v):
        return jax.lax.switch(kind, attends, q, k, v)

    return _chosen(ropes, kind), attend


def _chosen(ropes, kind):
    """Returns the tables of a kind that is known at run time; those of no rotation are 1 and 0."""
    some = next((tables for tables in ropes if tables is not None), None)
    if some is None:
        return None
    alike = [identity(some) if tables is None else tables for tables in ropes]
    return jax.tree.map(lambda *tables: jnp.stack(tables)[kind], *alike)
