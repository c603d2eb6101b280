"""A decoder-only Transformer as functions of a parameter tree: `Model(config, head)` is all that other code sees.

    model = Model(TransformerConfig(...))
    params = model.init(jax.random.key(0))
    hidden = model.hidden(params, tokens, segments=segments)
    logprob, entropy = model.logprobs(params, hidden, targets)

The parameter tree is a plain nested dict of float32 arrays: "backbone" (embedding, layers, a final norm if the layers
are not post-norm) and "head" (a scalar head's kernel [d] and bias []; an untied language model's kernel [d, v]; absent
where the embedding is tied).
So a reward model initialized from a language model takes its "backbone" and makes a "head" of its own.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from rlhfjax.errors import ConfigError
from rlhfjax.mesh import constrain
from rlhfjax.models import blocks, logprobs, lora, quantized
from rlhfjax.models.attention import (
    cached_attention,
    causal_attention,
    dropout,
    rope_tables,
)
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.kernels import cudnn_attention, splash_attention
from rlhfjax.models.lora import LoraConfig
from rlhfjax.models.quantized import SCALE, Quantized
from rlhfjax.streams import LORA_DROPOUT

__all__ = [
    "Cache",
    "Model",
    "TransformerConfig",
    "last_slot",
    "positions_of",
    "stacked",
    "unstacked",
]

Params = dict[str, Any]


class Cache(NamedTuple):
    """Keys and values of the slots written so far: a layer each of [b, kv_heads, slots, head_dim], or quantized."""

    k: tuple[Float[Array, "b g s k"] | Quantized, ...]
    v: tuple[Float[Array, "b g s k"] | Quantized, ...]
    valid: Bool[Array, "b s"]  # slots that hold a real token


def positions_of(segments: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Position of each token within its segment, counting real tokens from 0; 0 on padding (segment 0)."""
    slot = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    before = jnp.concatenate(
        [jnp.zeros_like(segments[:, :1]), segments[:, :-1]], axis=1
    )
    start = jax.lax.cummax(jnp.where(segments != before, slot, 0), axis=1)
    return jnp.where(segments > 0, slot - start, 0)


def last_slot(segments: Int[Array, "b t"]) -> Int[Array, " b"]:
    """The slot of the last real token of each row (slot t - 1 where a row has none)."""
    return (
        segments.shape[1]
        - 1
        - jnp.argmax(segments[:, ::-1] > 0, axis=1).astype(jnp.int32)
    )


def stacked(params: Params) -> Params:
    """The parameters of a model whose layers are scanned, from those of one whose layers stand one by one."""
    layers = params["backbone"]["layers"]
    one_by_one = [layers[f"layer_{i}"] for i in range(len(layers))]
    return params | {
        "backbone": params["backbone"]
        | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)}
    }


def unstacked(params: Params) -> Params:
    """The way back of `stacked`."""
    layers = params["backbone"]["layers"]
    n = jax.tree.leaves(layers)[0].shape[0]
    one_by_one = {
        f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(n)
    }
    return params | {"backbone": params["backbone"] | {"layers": one_by_one}}


def _write(cached: Any, new: jax.Array, slot: Any) -> Any:
    """A layer's keys or values [b, g, t, k] into the slots from `slot` on."""
    if isinstance(cached, Quantized):
        new = quantized.absmax(new, (3,))
        return jax.tree.map(
            lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, slot, 2),
            cached,
            new,
        )
    return jax.lax.dynamic_update_slice_in_dim(cached, new, slot, 2)


ATTENTION = {"cudnn": cudnn_attention, "splash": splash_attention}
REMAT = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims(
        "device", "pinned_host"
    ),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A Transformer with a language-model head ("lm") or a scalar one ("scalar": reward models, critics).

    With `lora` on, what is trained are adapters and a scalar head; every function takes parameters with adapters
    attached and without them.
    """

    config: TransformerConfig
    head: str = "lm"
    lora: LoraConfig = LoraConfig()
    int8_cache: bool = False  # keys and values of sampling in int8; weights are by their own dtype (models.quantized)

    def __post_init__(self):
        if self.head not in ("lm", "scalar"):
            raise ConfigError(f"model head is {self.head!r}: accepted are lm, scalar")

    # ------------------------------------------------------------------ parameters

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters, a plain nested dict of float32 arrays (layers stacked when config.scan_layers)."""
        return lora.base(nn.meta.unbox(self._boxed(key)))

    def shapes(self) -> Params:
        """The tree of `init` with a jax.ShapeDtypeStruct in place of each array; a new tree per call."""
        return lora.base(nn.meta.unbox(_boxed_shapes(self)))

    def axes(self) -> Params:
        """The tree of `init` with a tuple of logical axis names in place of each array; a new tree per call."""
        return lora.base(self._axes())

    def init_trained(self, key: Key[Array, ""]) -> Params:
        """Fresh values of what is trained: all of `init`, or with `lora` on adapters and a scalar head.

        Raises:
          ConfigError: `lora.targets` is found in no projection's path.
        """
        return self._trained(nn.meta.unbox(self._boxed(key)))

    def trained_shapes(self) -> Params:
        """`shapes` of `init_trained`."""
        return self._trained(nn.meta.unbox(_boxed_shapes(self)))

    def trained_axes(self) -> Params:
        """Logical axis names in the shape of `init_trained`."""
        return self._trained(self._axes())

    def _trained(self, tree):
        if not self.lora.rank:
            return tree
        head = {"head": tree["head"]} if self.head == "scalar" else {}
        return lora.adapters(self.lora, tree) | head

    def _axes(self):
        boxed = _boxed_shapes(self)
        tree = jax.tree.map(
            lambda p: p.names, boxed, is_leaf=lambda x: isinstance(x, blocks.Named)
        )
        if self.config.scan_layers:

            def stacked(t):
                return ("layers", *t)

            layers = jax.tree.map(
                stacked,
                tree["backbone"]["layers"],
                is_leaf=lambda x: isinstance(x, tuple),
            )
            tree["backbone"]["layers"] = layers
        return tree

    def _boxed(self, key):
        c = self.config
        embed_key, layer_key, head_key = jax.random.split(key, 3)
        tokens = jnp.zeros((1, 1), jnp.int32)
        x = jnp.zeros((1, 1, c.d_model), c.dtype)
        rope = self._rope(tokens)

        def attend(q, k, v):
            return q

        def one(k):
            return self._block.init(k, x, rope, attend)["params"]

        keys = jax.random.split(layer_key, c.n_layers)
        layers = (
            jax.vmap(one)(keys)
            if c.scan_layers
            else {f"layer_{i}": one(keys[i]) for i in range(c.n_layers)}
        )
        backbone = {
            "embed": blocks.Embed(c).init(embed_key, tokens, tokens)["params"],
            "layers": layers,
        }
        if c.final_norm:
            backbone["norm"] = blocks.Norm(c).init(key, x)["params"]
        if self.head == "scalar":
            return {
                "backbone": backbone,
                "head": blocks.ScalarHead(c.d_model).init(head_key)["params"],
            }
        if c.tie_embeddings:
            return {"backbone": backbone}
        return {
            "backbone": backbone,
            "head": blocks.Unembed(c).init(head_key)["params"],
        }

    # ------------------------------------------------------------------ forward

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"] | None = None,
        segments: Int[Array, "b t"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t d"]:
        """Hidden states after the final norm, if any, in config.dtype.

        Segments: 0 is padding, >= 1 a document of a packed row; None is plain causal. Positions None: counted within
        each segment from 0 (without segments: 0, 1, 2, ...). A key turns dropout on; without one there is none.
        Raises ConfigError when the sequence is longer than the model's context.
        """
        if positions is None:
            positions = positions_of(
                jnp.ones_like(tokens) if segments is None else segments
            )
        x, _, layer = self._begin(params, tokens, positions, segments, key)
        x = self._run(self._remat(layer), params, x, self.config.n_layers)
        return self._norm(params, x)

    def last_hidden(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        segments: Int[Array, "b t"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b d"]:
        """`hidden` at the last real token of each row: what a scalar head looks at.

        Rows are one document each (segment 1), padded on either side. The last layer asks for that slot alone, which
        spares its queries and its MLP everywhere else; not so with dropout, or with scanned layers, which cannot be
        taken apart without a copy of the parameters: there all slots are made and one is taken.
        """
        c = self.config
        slots = last_slot(segments)[:, None, None]

        def pick(x):
            return jnp.take_along_axis(x, slots, axis=1)

        if c.scan_layers or (key is not None and self.drops):
            return pick(self.hidden(params, tokens, segments=segments, key=key))[:, 0]
        x, rope, layer = self._begin(
            params, tokens, positions_of(segments), segments, None
        )
        x = self._run(self._remat(layer), params, x, c.n_layers - 1)

        def attend(q, k, v):
            return cached_attention(q[:, :, 0], k, v, segments > 0)[:, :, None]

        x = self._block.apply(
            {"params": self._layer(params, c.n_layers - 1)}, x, rope, attend, pick=pick
        )
        return self._norm(params, x)[:, 0]

    def logits(
        self, params: Params, hidden: Float[Array, "*b d"]
    ) -> Float[Array, "*b v"]:
        """Float32 logits of hidden states."""
        output, scale = self._output_and_scale(params)
        logits = logprobs.unembed(hidden, output, self._tied)
        return logits if scale is None else logits * scale

    def scalar(
        self, params: Params, hidden: Float[Array, "*b d"]
    ) -> Float[Array, "*b"]:
        """Float32 scalar (a value or a reward) of hidden states."""
        head = params["head"]
        return hidden.astype(jnp.float32) @ head["kernel"] + head["bias"]

    def logprobs(
        self,
        params: Params,
        hidden: Float[Array, "b t d"],
        targets: Int[Array, "b t"],
        temperature: float = 1.0,
    ) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
        """log p(target) and entropy (nats) under softmax(logits / temperature); see models.logprobs."""
        output = self._output(params)
        return logprobs.logprobs(
            hidden, output, targets, float(temperature), tied=self._tied
        )

    def cross_entropy(
        self,
        params: Params,
        hidden: Float[Array, "b t d"],
        targets: Int[Array, "b t"],
        mask: Float[Array, "b t"],
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Summed masked negative log-likelihood (nats) and its weight; see models.logprobs."""
        return logprobs.cross_entropy(
            hidden, self._output(params), targets, mask, tied=self._tied
        )

    # ------------------------------------------------------------------ with a cache

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache of `length` slots a row."""
        c = self.config
        shape = (batch, c.kv_heads, length, c.head_dim)

        def empty() -> Any:
            if self.int8_cache:
                return Quantized(
                    jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:3], jnp.float32)
                )
            return jnp.zeros(shape, c.dtype)

        k, v = (tuple(empty() for _ in range(c.n_layers)) for _ in range(2))
        return Cache(k, v, jnp.zeros((batch, length), bool))

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "b p"],
        segments: Int[Array, "b p"],
        cache: Cache,
    ) -> tuple[Float[Array, "b d"], Cache]:
        """Run left-padded prompts, fill slots 0 .. p-1; returns the hidden state of the last slot and the cache."""
        positions = positions_of(segments)
        x = self._embed(params, tokens, positions, None)
        rope = self._rope(positions)
        k, v = list(cache.k), list(cache.v)
        for i in range(self.config.n_layers):

            def attend(q, new_k, new_v, i=i):
                k[i], v[i] = _write(k[i], new_k, 0), _write(v[i], new_v, 0)
                return causal_attention(q, new_k, new_v, segments)

            x = self._block.apply({"params": self._layer(params, i)}, x, rope, attend)
        valid = jax.lax.dynamic_update_slice(cache.valid, segments > 0, (0, 0))
        return self._norm(params, x[:, -1:])[:, 0], Cache(tuple(k), tuple(v), valid)

    def decode(
        self,
        params: Params,
        token: Int[Array, " b"],
        position: Int[Array, " b"],
        slot: Int[Array, ""],
        cache: Cache,
    ) -> tuple[Float[Array, "b d"], Cache]:
        """One token a row, all written to the same cache slot; returns its hidden state and the cache."""
        x = self._embed(params, token[:, None], position[:, None], None)
        rope = self._rope(position[:, None])
        valid = jax.lax.dynamic_update_slice(
            cache.valid, jnp.ones((token.shape[0], 1), bool), (0, slot)
        )
        k, v = list(cache.k), list(cache.v)
        for i in range(self.config.n_layers):

            def attend(q, new_k, new_v, i=i):
                k[i], v[i] = _write(k[i], new_k, slot), _write(v[i], new_v, slot)
                return cached_attention(q[:, :, 0], k[i], v[i], valid)[:, :, None]

            x = self._block.apply({"params": self._layer(params, i)}, x, rope, attend)
        return self._norm(params, x)[:, 0], Cache(tuple(k), tuple(v), valid)

    # ------------------------------------------------------------------ pieces

    @property
    def drops(self) -> bool:
        """Whether a key makes a difference to the forward pass: there is dropout."""
        return max(self.config.dropout, self.lora.dropout) > 0

    @property
    def _block(self):
        return blocks.Block(self.config, self.lora)

    @property
    def _tied(self):
        return self.config.tie_embeddings

    def _output(self, params):
        """The matrix that makes logits, in float32 where it is int8."""
        output, scale = self._output_and_scale(params)
        return (
            output
            if scale is None
            else output * (scale[:, None] if self._tied else scale)
        )

    def _output_and_scale(self, params):
        tree, name = (
            (params["backbone"]["embed"], "tokens")
            if self._tied
            else (params["head"], "kernel")
        )
        return tree[name], tree.get(name + SCALE)

    def _rope(self, positions):
        c = self.config
        return (
            rope_tables(positions, c.rope_dim, float(c.rope_theta))
            if c.positions == "rope"
            else None
        )

    def _begin(self, params, tokens, positions, segments, key):
        """The embedded tokens, the tables of their positions, and layer(x, parameters, index)."""
        c = self.config
        if tokens.shape[1] > c.max_length:
            raise ConfigError(
                f"a sequence of {tokens.shape[1]} tokens is longer than model.max_length = {c.max_length}"
            )
        embed_key, layer_key = (None, None) if key is None else jax.random.split(key)
        rope = self._rope(positions)

        def layer(x, p, i):
            own = None if key is None else jax.random.fold_in(layer_key, i)
            keys = (None, None) if own is None else jax.random.split(own)
            rngs = (
                None if own is None else {"lora": jax.random.fold_in(own, LORA_DROPOUT)}
            )
            attend = ATTENTION.get(c.attention) or functools.partial(
                causal_attention, rate=float(c.dropout), key=keys[0]
            )
            attend = functools.partial(attend, segments=segments)
            return self._block.apply({"params": p}, x, rope, attend, keys[1], rngs=rngs)

        return self._embed(params, tokens, positions, embed_key), rope, layer

    def _embed(self, params, tokens, positions, key):
        c = self.config
        x = blocks.Embed(c).apply(
            {"params": params["backbone"]["embed"]}, tokens, positions
        )
        return constrain(dropout(x, c.dropout, key), blocks.RESIDUAL)

    def _norm(self, params, x):
        c = self.config
        return (
            blocks.Norm(c).apply({"params": params["backbone"]["norm"]}, x)
            if c.final_norm
            else x
        )

    def _layer(self, params, i):
        layers = params["backbone"]["layers"]
        return (
            jax.tree.map(lambda p: p[i], layers)
            if self.config.scan_layers
            else layers[f"layer_{i}"]
        )

    def _remat(self, layer):
        if self.config.remat == "none":
            return layer
        return jax.checkpoint(layer, policy=REMAT[self.config.remat])

    def _run(self, layer, params, x, n):
        """layer(x, parameters, index) over the first n layers: one compiled body (scan, all of them) or unrolled."""
        if self.config.scan_layers:
            layers = params["backbone"]["layers"], jnp.arange(n)
            return jax.lax.scan(lambda x, p: (layer(x, *p), None), x, layers)[0]
        for i in range(n):
            x = layer(x, self._layer(params, i), i)
        return x


@functools.cache
def _boxed_shapes(model: Model) -> Params:
    """Shapes and axis names of all parameters, traced once per model; callers make trees of their own from it."""
    boxed = jax.eval_shape(model._boxed, jax.random.key(0))
    # Without the sharding that a mesh in use may give them.
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), boxed)
