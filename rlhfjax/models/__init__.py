"""The Transformer, its heads and its presets; only this package uses flax.linen."""

from rlhfjax.models.transformer import Model, TransformerConfig, positions_of

__all__ = ["Model", "TransformerConfig", "positions_of"]
