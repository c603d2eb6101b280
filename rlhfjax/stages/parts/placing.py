"""What a stage asks of a mesh, for `mesh.strategy=auto`: parameters, rows, activations, from its config and shapes."""

import math
from typing import Any

import jax

from rlhfjax import optim
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.lora import LoraConfig
from rlhfjax.models.transformer import Model
from rlhfjax.strategy import Need


def need_of(config: Any, shape: TransformerConfig, reward: TransformerConfig | None = None) -> Need:
    """Counts the models of a stage: trained ones with gradients and moments, the others by their weights alone.

    A policy stage has a reference (with adapters the very base of the policy), a reward if it is a model, and PPO a
    value function with a trunk of its own unless `value="shared"`. A job without an optimiser trains nothing. What
    `judge_mesh` has elsewhere is not counted.

    Args:
      reward: the shape of the model that scores, None where none does.
    """
    trains, lora = hasattr(config, "optim"), getattr(config, "lora", LoraConfig())
    whole = count(Model(shape))
    trained = count(Model(shape, lora=lora), trained=True) if trains else 0
    frozen = whole if lora.rank or not trains else 0
    here = getattr(config, "judge_mesh", None) is None
    if hasattr(config, "reference") and not lora.rank and here:
        frozen += whole
    if reward is not None and here:
        frozen += count(Model(reward, "scalar"))
    if getattr(config, "value", "shared") != "shared":
        trained += count(Model(reward or shape, "scalar", lora), trained=True)
    rows = getattr(config, "episodes", getattr(config, "batch_size", 1))
    rows //= getattr(config, "minibatches", 1) * getattr(config, "microbatches", 1)
    time = getattr(config, "length", 0) or getattr(config, "prompt_length", 0) + getattr(config, "max_new", 0)
    widths = (shape.n_heads, shape.kv_heads, shape.d_ff, shape.vocab_size)
    return Need(
        trained,
        frozen,
        optim.kept(config.optim) if trains else 0.0,
        max(rows, 1),
        max(time, 1),
        row_bytes(shape, max(time, 1)) if trains else 0.0,
        shape.d_model,
        widths if reward is None else (*widths, reward.n_heads, reward.kv_heads, reward.d_ff, reward.vocab_size),
    )


def count(model: Model, trained: bool = False) -> int:
    """Parameters of a model, or those of them that are trained."""
    made = model.trained_shapes() if trained else model.shapes()
    return sum(math.prod(x.shape) for x in jax.tree.leaves(made))


def row_bytes(c: TransformerConfig, time: int) -> float:
    """Activations of one sequence that the backward pass reads, about.

    remat "full" keeps each layer's input, d a token; else the inputs of each product: 8 d + 4 f a token, and the
    heads x time scores of a query (Korthikanti et al. 2022, section 4.1).
    """
    size = 2.0 if c.dtype == "bfloat16" else 4.0
    a_token = c.d_model if c.remat == "full" else 8 * c.d_model + 4 * c.d_ff + c.n_heads * time
    return size * c.n_layers * time * a_token
