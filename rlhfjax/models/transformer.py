"""A decoder-only Transformer as functions of a parameter tree.

`Model(config, head)` is the interface to all other code:

    model = Model(TransformerConfig(...))
    params = model.init(jax.random.key(0))
    hidden = model.hidden(params, tokens, segment_ids=segment_ids)
    logprob, entropy = model.logprobs(params, hidden, targets)

The parameters are a nested dict of float32 arrays: "backbone" (embedding, layers, and a final norm
unless the layers are post-norm) and "head" (kernel [d] and bias [] of a scalar head; kernel [d, v]
of an untied language model; absent if the embedding is tied). A reward model initialized from a
language model takes its "backbone" and has a fresh "head".
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from rlhfjax.errors import ConfigError
from rlhfjax.mesh import constrain
from rlhfjax.models import blocks, logprobs, lora
from rlhfjax.models.attention import (
    RopeTables,
    cached_attention,
    causal_attention,
    dropout,
    rope_of,
)
from rlhfjax.models.cache import Cache, empty_cache, write
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.kernels import cudnn_attention, splash_attention
from rlhfjax.models.lora import LoraConfig, Params
from rlhfjax.models.params import axis_names, init_named, stacked, unstacked
from rlhfjax.models.quantized import SCALE
from rlhfjax.streams import LORA_DROPOUT

__all__ = [
    "Cache",
    "Model",
    "TransformerConfig",
    "positions_of",
    "stacked",
    "unstacked",
]

ATTENTION = {"cudnn": cudnn_attention, "splash": splash_attention}
REMAT = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims(
        "device", "pinned_host"
    ),
}


def positions_of(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Returns the position of each token within its document, from 0; 0 on padding (id 0)."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    zeros = jnp.zeros_like(segment_ids[:, :1])
    previous = jnp.concatenate([zeros, segment_ids[:, :-1]], axis=1)
    start = jax.lax.cummax(jnp.where(segment_ids != previous, index, 0), axis=1)
    return jnp.where(segment_ids > 0, index - start, 0)


def last_index(attention_mask: Int[Array, "b t"]) -> Int[Array, " b"]:
    """Returns the index of the last real token of each row (t - 1 if a row has none)."""
    padding = jnp.argmax(attention_mask[:, ::-1] > 0, axis=1)
    return attention_mask.shape[1] - 1 - padding.astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Model:
    """A Transformer with a language-model head or a scalar one (reward models, value functions).

    With `lora`, the trained parameters are adapters and a scalar head. Every function takes
    parameters with or without adapters in them. Quantized weights are recognized by their dtype
    (models.quantized).
    """

    config: TransformerConfig
    head: str = "lm"  # "lm" or "scalar"
    lora: LoraConfig = LoraConfig()
    int8_cache: bool = False  # whether the key/value cache of sampling is int8

    def __post_init__(self):
        if self.head not in ("lm", "scalar"):
            raise ConfigError(f"model head is {self.head!r}: accepted are lm, scalar")

    # ------------------------------------------------------------------ parameters

    def init(self, key: Key[Array, ""]) -> Params:
        """Returns fresh parameters in float32; layers are stacked if config.scan_layers."""
        return lora.base(nn.meta.unbox(self._init_named(key)))

    def shapes(self) -> Params:
        """Returns the tree of `init` with jax.ShapeDtypeStruct leaves; a new tree per call."""
        return lora.base(nn.meta.unbox(_named_shapes(self)))

    def axes(self) -> Params:
        """Returns the tree of `init` with tuples of logical axis names; a new tree per call."""
        return lora.base(axis_names(self.config, _named_shapes(self)))

    def init_trained(self, key: Key[Array, ""]) -> Params:
        """Returns fresh trainable parameters: all, or with `lora` adapters and a scalar head.

        Raises:
          ConfigError: `lora.targets` matches no projection's path.
        """
        return self._trained(nn.meta.unbox(self._init_named(key)))

    def trained_shapes(self) -> Params:
        """Returns the tree of `init_trained` with jax.ShapeDtypeStruct leaves."""
        return self._trained(nn.meta.unbox(_named_shapes(self)))

    def trained_axes(self) -> Params:
        """Returns the tree of `init_trained` with tuples of logical axis names."""
        return self._trained(axis_names(self.config, _named_shapes(self)))

    def _trained(self, tree: Params) -> Params:
        if not self.lora.rank:
            return tree
        head = {"head": tree["head"]} if self.head == "scalar" else {}
        return lora.adapters(self.lora, tree) | head

    def _init_named(self, key):
        return init_named(self.config, self.head, self.lora, key)

    # ------------------------------------------------------------------ forward

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t d"]:
        """Returns the hidden states after the final norm, if any, in config.dtype.

        Args:
          positions: by default counted from 0 within each document.
          segment_ids: 0 on padding and >= 1 on the documents of a packed row; an attention mask if
            a row is one document. None: one document without padding.
          key: turns dropout on.

        Raises:
          ConfigError: the sequence is longer than the model's context.
        """
        if positions is None:
            documents = jnp.ones_like(tokens) if segment_ids is None else segment_ids
            positions = positions_of(documents)
        x, _, layer = self._begin(params, tokens, positions, segment_ids, key)
        x = self._run(self._remat(layer), params, x, self.config.n_layers)
        return self._norm(params, x)

    def last_hidden(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b d"]:
        """Returns `hidden` at the last real token of each row, the input of a scalar head.

        A row is one document with padding on either side. The last layer computes queries and MLP
        only at that token. Two cases compute all positions and select one: dropout, and scanned
        layers, which cannot be separated without a copy of the parameters.
        """
        c = self.config
        index = last_index(attention_mask)[:, None, None]

        def pick(x):
            return jnp.take_along_axis(x, index, axis=1)

        if c.scan_layers or (key is not None and self.drops):
            hidden = self.hidden(params, tokens, segment_ids=attention_mask, key=key)
            return pick(hidden)[:, 0]
        positions = positions_of(attention_mask)
        x, rope, layer = self._begin(params, tokens, positions, attention_mask, None)
        x = self._run(self._remat(layer), params, x, c.n_layers - 1)

        def attend(q, k, v):
            return cached_attention(q[:, :, 0], k, v, attention_mask > 0)[:, :, None]

        x = self._apply_block(params, c.n_layers - 1, x, rope, attend, pick=pick)
        return self._norm(params, x)[:, 0]

    def logits(
        self,
        params: Params,
        hidden: Float[Array, "*b d"],
    ) -> Float[Array, "*b v"]:
        """Returns the float32 logits of hidden states."""
        output, scale = self._output_and_scale(params)
        logits = logprobs.unembed(hidden, output, self._tied)
        return logits if scale is None else logits * scale

    def scalar(
        self,
        params: Params,
        hidden: Float[Array, "*b d"],
    ) -> Float[Array, "*b"]:
        """Returns the float32 scalar (a value or a reward) of hidden states."""
        head = params["head"]
        return hidden.astype(jnp.float32) @ head["kernel"] + head["bias"]

    def logprobs(
        self,
        params: Params,
        hidden: Float[Array, "b t d"],
        targets: Int[Array, "b t"],
        temperature: float = 1.0,
    ) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
        """Returns log p(target) and the entropy (nats) of p = softmax(logits / temperature).

        See `models.logprobs.logprobs`.
        """
        return logprobs.logprobs(
            hidden, self._output(params), targets, float(temperature), tied=self._tied
        )

    def cross_entropy(
        self,
        params: Params,
        hidden: Float[Array, "b t d"],
        targets: Int[Array, "b t"],
        mask: Float[Array, "b t"],
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the summed masked negative log-likelihood (nats) and its weight.

        See `models.logprobs.cross_entropy`.
        """
        return logprobs.cross_entropy(
            hidden, self._output(params), targets, mask, tied=self._tied
        )

    # ------------------------------------------------------------------ with a cache

    def init_cache(self, batch: int, length: int) -> Cache:
        """Returns an empty cache of `length` entries per row."""
        return empty_cache(self.config, batch, length, self.int8_cache)

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "b p"],
        attention_mask: Int[Array, "b p"],
        cache: Cache,
    ) -> tuple[Float[Array, "b d"], Cache]:
        """Runs left-padded prompts and writes cache entries 0 .. p-1.

        Returns the hidden state of the last token of each prompt, and the cache.
        """
        positions = positions_of(attention_mask)
        x = self._embed(params, tokens, positions, None)
        rope = rope_of(self.config, positions)
        k, v = list(cache.k), list(cache.v)
        for i in range(self.config.n_layers):

            def attend(q, new_k, new_v, i=i):
                k[i], v[i] = write(k[i], new_k, 0), write(v[i], new_v, 0)
                return causal_attention(q, new_k, new_v, attention_mask)

            x = self._apply_block(params, i, x, rope, attend)
        valid = jax.lax.dynamic_update_slice(cache.valid, attention_mask > 0, (0, 0))
        return self._norm(params, x[:, -1:])[:, 0], Cache(tuple(k), tuple(v), valid)

    def decode(
        self,
        params: Params,
        token: Int[Array, " b"],
        position: Int[Array, " b"],
        entry: Int[Array, ""],
        cache: Cache,
    ) -> tuple[Float[Array, "b d"], Cache]:
        """Runs one token per row; returns its hidden state and the cache.

        Args:
          position: of the token in its row's document.
          entry: the cache entry that its keys and values are written to, the same for all rows.
        """
        x = self._embed(params, token[:, None], position[:, None], None)
        rope = rope_of(self.config, position[:, None])
        written = jnp.ones((token.shape[0], 1), bool)
        valid = jax.lax.dynamic_update_slice(cache.valid, written, (0, entry))
        k, v = list(cache.k), list(cache.v)
        for i in range(self.config.n_layers):

            def attend(q, new_k, new_v, i=i):
                k[i], v[i] = write(k[i], new_k, entry), write(v[i], new_v, entry)
                return cached_attention(q[:, :, 0], k[i], v[i], valid)[:, :, None]

            x = self._apply_block(params, i, x, rope, attend)
        return self._norm(params, x)[:, 0], Cache(tuple(k), tuple(v), valid)

    # ------------------------------------------------------------------ pieces

    @property
    def drops(self) -> bool:
        """Whether there is dropout, so that a key changes the forward pass."""
        return max(self.config.dropout, self.lora.dropout) > 0

    @property
    def _tied(self):
        return self.config.tie_embeddings

    def _output(self, params) -> jax.Array:
        """Returns the matrix that makes logits, dequantized if it is int8."""
        output, scale = self._output_and_scale(params)
        if scale is None:
            return output
        return output * (scale[:, None] if self._tied else scale)

    def _output_and_scale(self, params) -> tuple[jax.Array, jax.Array | None]:
        if self._tied:
            tree, name = params["backbone"]["embed"], "tokens"
        else:
            tree, name = params["head"], "kernel"
        return tree[name], tree.get(name + SCALE)

    def _begin(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None,
        key: Key[Array, ""] | None,
    ):
        """Returns the embedded tokens, their RoPE tables, and layer(x, layer_params, index)."""
        c = self.config
        if tokens.shape[1] > c.max_length:
            raise ConfigError(
                f"model.max_length={c.max_length}: must be at least the sequence length, "
                f"{tokens.shape[1]} tokens"
            )
        embed_key, layer_key = (None, None) if key is None else jax.random.split(key)
        rope = rope_of(c, positions)

        def layer(x, layer_params, i):
            keys, rngs = (None, None), None
            if layer_key is not None:
                own_key = jax.random.fold_in(layer_key, i)
                keys = jax.random.split(own_key)
                rngs = {"lora": jax.random.fold_in(own_key, LORA_DROPOUT)}
            attend = ATTENTION.get(c.attention) or functools.partial(
                causal_attention, rate=float(c.dropout), key=keys[0]
            )
            attend = functools.partial(attend, segment_ids=segment_ids)
            return blocks.Block(c, self.lora).apply(
                {"params": layer_params}, x, rope, attend, keys[1], rngs=rngs
            )

        return self._embed(params, tokens, positions, embed_key), rope, layer

    def _embed(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        key: Key[Array, ""] | None,
    ):
        c = self.config
        embed = {"params": params["backbone"]["embed"]}
        x: Any = blocks.Embed(c).apply(embed, tokens, positions)
        return constrain(dropout(x, c.dropout, key), blocks.RESIDUAL)

    def _norm(self, params, x) -> Any:
        c = self.config
        if not c.final_norm:
            return x
        norm = {"params": params["backbone"]["norm"]}
        return blocks.Norm(c).apply(norm, x)

    def _apply_block(
        self,
        params: Params,
        i: int,
        x: Float[Array, "b t d"],
        rope: RopeTables | None,
        attend: Callable,
        pick: Callable = blocks.all_positions,
    ) -> Any:
        block = blocks.Block(self.config, self.lora)
        layer_params = {"params": self._layer(params, i)}
        return block.apply(layer_params, x, rope, attend, pick=pick)

    def _layer(self, params, i):
        layers = params["backbone"]["layers"]
        if self.config.scan_layers:
            return jax.tree.map(lambda p: p[i], layers)
        return layers[f"layer_{i}"]

    def _remat(self, layer):
        if self.config.remat == "none":
            return layer
        return jax.checkpoint(layer, policy=REMAT[self.config.remat])

    def _run(
        self,
        layer: Callable,
        params: Params,
        x: Float[Array, "b t d"],
        n: int,
    ) -> Float[Array, "b t d"]:
        """Returns x after layer(x, layer_params, index) of the first n layers.

        Scanned layers share one compiled body, and n is then all of them.
        """
        if self.config.scan_layers:
            layers = params["backbone"]["layers"], jnp.arange(n)
            return jax.lax.scan(lambda x, p: (layer(x, *p), None), x, layers)[0]
        for i in range(n):
            x = layer(x, self._layer(params, i), i)
        return x


@functools.cache
def _named_shapes(model: Model) -> Params:
    """Returns shapes and axis names of all parameters, traced once per model.

    Callers build their own trees from it.
    """
    named = jax.eval_shape(model._init_named, jax.random.key(0))
    # Without the shardings that a mesh in use may give them.
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), named)
