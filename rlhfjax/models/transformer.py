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
from rlhfjax.models import blocks, decoding, kinds, logprobs, lora
from rlhfjax.models.attention import (
    cached_attention,
    causal_attention,
    dropout,
)
from rlhfjax.models.cache import Cache, empty_cache, write
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.experts import ROUTING, Routing, routing_of
from rlhfjax.models.kernels import cudnn_attention, splash_attention
from rlhfjax.models.lora import LoraConfig, Params
from rlhfjax.models.params import axis_names, init_named, stacked, unstacked
from rlhfjax.models.quantized import SCALE
from rlhfjax.models.rope import RopeTables
from rlhfjax.models.softcap import capped
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

    A model may have more rows of embeddings than its tokenizer has ids, so that devices share them
    evenly. `restricted` leaves these ids out of the distribution that is sampled from and of its
    log-probabilities. `logits` and `cross_entropy` are of all ids.
    """

    config: TransformerConfig
    head: str = "lm"  # "lm" or "scalar"
    lora: LoraConfig = LoraConfig()
    int8_cache: bool = False  # whether the key/value cache of sampling is int8
    sampled_ids: int | None = None  # only ids below it are sampled; None: all

    def __post_init__(self):
        if self.head not in ("lm", "scalar"):
            raise ConfigError(f"model head is {self.head!r}: accepted are lm, scalar")
        if self.config.n_experts and self.lora.base != "float32":
            raise ConfigError(
                f"lora.base={self.lora.base!r}: the base of a mixture of experts is float32"
            )

    def restricted(self, vocab_size: int) -> "Model":
        """Returns the model that samples only ids of a vocabulary; 0: its size is not known."""
        if not 0 < vocab_size < self.config.vocab_size:
            return self
        return dataclasses.replace(self, sampled_ids=vocab_size)

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
        """Returns the hidden states after the final norm, if any.

        See `hidden_and_routing`.
        """
        return self.hidden_and_routing(params, tokens, positions, segment_ids, key)[0]

    def hidden_and_routing(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b t d"], Routing | None]:
        """Returns the hidden states, and how the tokens were routed to experts, if there are any.

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
        x, routing = self._run(self._remat(layer), params, x, self.config.n_layers)
        return self._norm(params, x), routing

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
        x, ropes, layer = self._begin(params, tokens, positions, attention_mask, None)
        last = c.n_layers - 1
        x, _ = self._run(self._remat(layer), params, x, last)
        rope, scoring = ropes[kinds.index_of(c, last)], kinds.scoring_of(c)

        def attend(q, k, v):
            query, seen = q[:, :, 0], attention_mask > 0
            if c.kind(last) == "window" and c.window is not None:
                seen &= jnp.arange(tokens.shape[1]) > index[..., 0] - c.window
            return cached_attention(query, k, v, seen, scoring)[:, :, None]

        x = self._apply_block(params, last, x, rope, attend, pick=pick)
        return self._norm(params, x)[:, 0]

    def last_hidden_and_routing(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        attention_mask: Int[Array, "b t"],
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b d"], Routing | None]:
        """Returns `last_hidden`, and how all tokens were routed, in the last layer too."""
        if not self.config.n_experts:
            return self.last_hidden(params, tokens, attention_mask, key), None
        hidden, routing = self.hidden_and_routing(
            params, tokens, segment_ids=attention_mask, key=key
        )
        index = last_index(attention_mask)[:, None, None]
        return jnp.take_along_axis(hidden, index, axis=1)[:, 0], routing

    def logits(
        self,
        params: Params,
        hidden: Float[Array, "*b d"],
    ) -> Float[Array, "*b v"]:
        """Returns the float32 logits of hidden states."""
        output, scale = self._output_and_scale(params)
        dtype = self.config.product_dtype
        logits = logprobs.unembed(hidden, output, self._tied, dtype)
        logits = logits if scale is None else logits * scale
        return capped(logits, self.config.logit_softcap)

    def sampling_logits(
        self,
        params: Params,
        hidden: Float[Array, "*b d"],
    ) -> Float[Array, "*b v"]:
        """Returns `logits` with probability 0 for ids that are not sampled."""
        return logprobs.below(self.logits(params, hidden), self.sampled_ids)

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

        The softmax is over the ids that are sampled. See `models.logprobs.logprobs`.
        """
        return logprobs.logprobs(
            hidden,
            self._output(params),
            targets,
            float(temperature),
            tied=self._tied,
            softcap=self.config.logit_softcap,
            dtype=self.config.product_dtype,
            ids=self.sampled_ids,
        )

    def vocabulary_kl(
        self,
        params: Params,
        hidden: Float[Array, "b t d"],
        other_params: Params,
        other_hidden: Float[Array, "b t d"],
        temperature: float = 1.0,
    ) -> Float[Array, "b t"]:
        """Returns KL(p || q) of two models with this config, nats per position.

        p and q are over the ids that are sampled, at a temperature. See
        `models.logprobs.vocabulary_kl`.

        Args:
          hidden, other_hidden: hidden states of p's model and of q's.
        """
        c = self.config
        return logprobs.vocabulary_kl(
            (hidden, other_hidden),
            (self._output(params), self._output(other_params)),
            float(temperature),
            how=logprobs.Output(c.tie_embeddings, c.logit_softcap, c.product_dtype),
            ids=self.sampled_ids,
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
            hidden,
            self._output(params),
            targets,
            mask,
            tied=self._tied,
            softcap=self.config.logit_softcap,
            dtype=self.config.product_dtype,
        )

    # ------------------------------------------------------------------ with a cache

    def for_decoding(self, params: Params, rows: int) -> Params:
        """Returns the parameters that a decoding loop over `rows` rows reads; see `decoding`."""
        return decoding.rounded(self.config, params, rows)

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
        c, positions = self.config, positions_of(attention_mask)
        x = self._embed(params, tokens, positions, None)
        ropes = kinds.ropes_of(c, positions)
        attends = kinds.attends_of(c, causal_attention)
        k, v = list(cache.k), list(cache.v)
        for i in range(c.n_layers):
            rope, causal = kinds.of_layer(c, i, ropes, attends)

            def attend(q, new_k, new_v, i=i, causal=causal):
                k[i], v[i] = write(k[i], new_k, 0), write(v[i], new_v, 0)
                return causal(q, new_k, new_v, attention_mask)

            x = self._apply_block(params, i, x, rope, attend)
        cache = cache.mark(attention_mask > 0, 0)
        cache = cache._replace(k=tuple(k), v=tuple(v))
        return self._norm(params, x[:, -1:])[:, 0], cache

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
        c = self.config
        ropes, scoring = kinds.ropes_of(c, position[:, None]), kinds.scoring_of(c)
        cache = cache.mark(jnp.ones((token.shape[0], 1), bool), entry)
        k, v = list(cache.k), list(cache.v)
        for i in range(c.n_layers):
            place, valid = cache.place(i, entry), cache.valid_of(i)

            def attend(q, new_k, new_v, i=i, place=place, valid=valid):
                k[i], v[i] = write(k[i], new_k, place), write(v[i], new_v, place)
                out = cached_attention(q[:, :, 0], k[i], v[i], valid, scoring)
                return out[:, :, None]

            rope = ropes[kinds.index_of(c, i)]
            x = self._apply_block(params, i, x, rope, attend)
        return self._norm(params, x)[:, 0], cache._replace(k=tuple(k), v=tuple(v))

    def run(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        attend: Callable,
    ) -> Float[Array, "b t d"]:
        """Returns the hidden states of tokens whose attention the caller computes.

        Args:
          attend: attend(layer, q, k, v) returns the attention of a layer [b, h, t, k] from the
            queries, keys and values of these tokens [b, h or kv_heads, t, k].
        """
        c = self.config
        x = self._embed(params, tokens, positions, None)
        ropes = kinds.ropes_of(c, positions)
        for i in range(c.n_layers):
            rope = ropes[kinds.index_of(c, i)]
            of_layer = functools.partial(attend, i)
            x = self._apply_block(params, i, x, rope, of_layer)
        return self._norm(params, x)

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
            tree, name = decoding.tied_output(params)
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
        """Returns the embedded tokens, the RoPE tables, and layer(x, layer_params, index).

        The layer returns its output and its Routing, None without experts.
        """
        c = self.config
        if tokens.shape[1] > c.max_length:
            raise ConfigError(
                f"model.max_length={c.max_length}: must be at least the sequence length, "
                f"{tokens.shape[1]} tokens"
            )
        embed_key, layer_key = (None, None) if key is None else jax.random.split(key)
        ropes = kinds.ropes_of(c, positions)

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
            rope, attend = kinds.of_layer(c, i, ropes, kinds.attends_of(c, attend))
            x, sown = blocks.Block(c, self.lora).apply(
                {"params": layer_params},
                x,
                rope,
                attend,
                keys[1],
                rngs=rngs,
                mutable=[ROUTING],
            )
            if not c.n_experts:
                return x, None
            real = jnp.ones_like(tokens) if segment_ids is None else segment_ids
            return x, routing_of(sown[ROUTING]["mlp"], real)

        return self._embed(params, tokens, positions, embed_key), ropes, layer

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
        # The index selects the kind of attention, so it must be static.
        static = len(self.config.kinds) > 1 and not self.config.scan_layers
        return jax.checkpoint(
            layer,
            policy=REMAT[self.config.remat],
            static_argnums=(2,) if static else (),
        )

    def _run(
        self,
        layer: Callable,
        params: Params,
        x: Float[Array, "b t d"],
        n: int,
    ) -> tuple[Float[Array, "b t d"], Routing | None]:
        """Returns x after layer(x, layer_params, index) of the first n layers, and their routing.

        Scanned layers share one compiled body, and n is then all of them.
        """
        if self.config.scan_layers:
            layers = params["backbone"]["layers"], jnp.arange(n)
            return jax.lax.scan(lambda x, p: layer(x, *p), x, layers)
        routings = []
        for i in range(n):
            x, routing = layer(x, self._layer(params, i), i)
            routings.append(routing)
        if not (self.config.n_experts and n):
            return x, None
        return x, jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *routings)


@functools.cache
def _named_shapes(model: Model) -> Params:
    """Returns shapes and axis names of all parameters, traced once per model.

    Callers build their own trees from it.
    """
    named = jax.eval_shape(model._init_named, jax.random.key(0))
    # Without the shardings that a mesh in use may give them.
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), named)
