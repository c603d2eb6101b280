"""The Transformer and its heads: the only place that imports flax.linen."""
