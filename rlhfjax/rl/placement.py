"""Where a rollout is sampled: the layout of the weights, the way there, and the way back."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import jax

from rlhfjax import state as states
from rlhfjax.mesh import Layout, MeshConfig, make_layout
from rlhfjax.models import quantized
from rlhfjax.models.params import in_compute_dtype
from rlhfjax.models.transformer import Model
from rlhfjax.programs import Program, placed, recording, reshard
from rlhfjax.rl.config import PolicyConfig, policy_workload
from rlhfjax.rl.rollout import Rollout, TokenIds, sample
from rlhfjax.roles import Workload
from rlhfjax.sampling import layout as layouts
from rlhfjax.sampling.config import Sampling
from rlhfjax.types import PyTree

log = logging.getLogger("rlhfjax")
Int8 = Literal["none", "cache", "all"]


@dataclasses.dataclass(frozen=True)
class Placement:
    """The layout that a model samples in, on the devices of training or some of them."""

    home: Layout  # of training
    layout: Layout  # of rollouts; `home` itself if nothing moves
    model: Model
    place: Callable[[PyTree], PyTree]
    """Returns the weights in the layout of rollouts: a copy, unless that is the home's."""

    def sample(
        self,
        params: PyTree,
        prompts: Any,
        attention_mask: Any,
        key: Any,
        sampling: Sampling,
    ) -> Rollout:
        """Returns a response to every row, in the training layout.

        Args:
          params: what `place` has returned.
        """
        if self.layout is self.home:
            return sample(
                self.model, params, prompts, attention_mask, key, sampling=sampling
            )
        rows = (prompts, attention_mask)
        prompts, attention_mask = reshard(rows, self.layout.sharding("batch"))
        # A key's array goes to any mesh, but its shape (when recording) belongs to one.
        if recording():
            key = reshard(key, self.layout.replicated)
        with self.layout.use():
            rollout = sample(
                self.model, params, prompts, attention_mask, key, sampling=sampling
            )
        return reshard(rollout, self.home.sharding("batch"))


def at_home(layout: Layout, model: Model) -> Placement:
    """Returns the placement of a model that samples as it is trained, without a copy."""
    return Placement(layout, layout, model, place=lambda params: params)


def policy_placement(config: PolicyConfig, layout: Layout, model: Model) -> Placement:
    """Returns where the rollouts of a policy stage are sampled.

    Raises:
      ConfigError: the devices of `rollout_mesh` cannot share the rollout's batch, or those of
        `rollout_tensor` the weights.
    """
    if config.rollout_mesh is not None:
        return _on_mesh(config, config.rollout_mesh, layout, model)
    decode = _decode_layout(config, layout, model)
    return _placement(layout, decode, model, config.rollout_int8)


def make_sampler(
    config: PolicyConfig, layout: Layout, model: Model, ids: TokenIds
) -> Callable[..., Rollout]:
    """Returns a function (params, prompts, attention_mask, key) -> a response to every row.

    The weights go to the layout of rollouts before every rollout, and their copy is freed after it.

    Raises:
      ConfigError: see `policy_placement`.
    """
    sampling = Sampling.from_config(config, ids, config.samples_per_prompt)
    sampling = dataclasses.replace(sampling, cache_parts=config.rollout_cache_parts)
    placement = policy_placement(config, layout, model)

    def sample_rows(
        params: PyTree, prompts: Any, attention_mask: Any, key: Any
    ) -> Rollout:
        params = placement.place(params)
        return placement.sample(params, prompts, attention_mask, key, sampling)

    return sample_rows


def held_out_placement(config: PolicyConfig, layout: Layout, model: Model) -> Placement:
    """Returns where held-out responses are sampled: as rollouts, but never in int8.

    A `rollout_mesh` need not divide a held-out batch, so that they are sampled at home.
    """
    if config.rollout_mesh is not None:
        return at_home(layout, model)
    return _placement(layout, _decode_layout(config, layout, model), model, "none")


def job_placement(
    layout: Layout, model: Model, rows: int, length: int, sampling: Sampling
) -> Placement:
    """Returns where a model samples that is not trained, by `mesh.strategy`.

    Args:
      rows: responses of a batch.
      length: tokens of a prompt.
    """
    if layout.need is None or model.lora.rank:
        return at_home(layout, model)
    workload = Workload(
        rows=rows,
        batch=rows,
        length=length + sampling.max_new_tokens,
        decoded=sampling.decode_batch if sampling.decode_batch > 0 else rows,
        sampled=sampling.max_new_tokens,
    )
    return _placement(layout, _chosen(layout, model, workload), model, "none")


# ------------------------------------------------------------------ the decode layout


def _decode_layout(config: PolicyConfig, layout: Layout, model: Model) -> Layout | None:
    """Returns the decode layout of a policy stage; None: rollouts have the layout of training.

    Raises:
      ConfigError: `rollout_tensor` does not divide the model or the mesh.
    """
    workload, axes = policy_workload(config), layouts.sizes_of(layout)
    if config.rollout_tensor:
        n = layouts.given(model.config, axes, config.rollout_tensor, config.stage)
        return _split(layout, model, n, "")
    if config.rollout_layout == "decode":
        return _split(layout, model, *layouts.choose(model.config, workload, axes))
    if config.rollout_layout == "training" or config.lora.rank:
        return None
    return _chosen(layout, model, workload)


def _chosen(layout: Layout, model: Model, workload: Workload) -> Layout | None:
    """Returns the layout that strategy "auto" chooses; None: that of training."""
    if layout.need is None:
        return None
    axes = layouts.sizes_of(layout)
    held = layout.need.held_bytes(axes)
    n, why = layouts.choose(model.config, workload, axes, held, layout.memory)
    return _split(layout, model, n, why)


def _split(layout: Layout, model: Model, n: int | None, why: str) -> Layout | None:
    if n is None or layout.mesh.shape["fsdp"] == 1:  # no weight is gathered
        return None
    if why:
        _log_once(why)
    return layouts.decode_layout(layout, model.config, n)


@functools.cache
def _log_once(why: str) -> None:
    """Logs a reason, which is the same for rollouts and held-out responses."""
    log.info(why)


def _placement(
    home: Layout, decode: Layout | None, model: Model, int8: Int8
) -> Placement:
    """Returns the placement in a layout on the mesh of training."""
    if decode is None and int8 == "none":
        return at_home(home, model)
    layout = decode or home
    sampler = model
    if int8 != "none":
        sampler = dataclasses.replace(model, int8_cache=True)
    if decode is None and int8 == "cache":
        return at_home(home, sampler)
    place = make_reshard(model, home, layout, quantize=int8 == "all")
    return Placement(home, layout, sampler, place)


def make_reshard(
    model: Model, home: Layout, layout: Layout, quantize: bool = False
) -> Program:
    """Returns the program params -> the weights of a rollout, in a layout of the same devices.

    Matrices are cast to the compute dtype, or quantized, before they are sent. Then every device
    sends its part of `embed` to those that keep the same heads, MLP columns or ids (an
    all-to-all), and gathers what is left of its own (an all-gather): no device ever holds a whole
    matrix that is sharded afterwards.
    """
    rest = [axis for axis in home.rules["embed"] if axis not in layouts.MODEL_AXES]
    halfway = dataclasses.replace(layout, rules={**layout.rules, "embed": tuple(rest)})

    def in_rollout_dtype(params: PyTree) -> PyTree:
        if quantize:
            params = quantized.weights(params, model.axes())
        return in_compute_dtype(model.config, params, model.axes())

    def shardings(params: PyTree, layout: Layout) -> PyTree:
        axes = quantized.weight_axes(params, model.axes())
        return states.shardings(params, axes, layout)

    @jax.jit
    def run(params: PyTree) -> PyTree:
        params = in_rollout_dtype(params)
        for step in (halfway, layout):
            steps = shardings(params, step)
            params = jax.lax.with_sharding_constraint(params, steps)
        return params

    def shapes(params: PyTree) -> PyTree:
        weights = jax.eval_shape(in_rollout_dtype, params)
        return jax.tree.map(placed, weights, shardings(weights, layout))

    return Program("reshard", run, shapes)


# ------------------------------------------------------------------ another mesh


def _on_mesh(
    config: PolicyConfig, mesh: MeshConfig, home: Layout, model: Model
) -> Placement:
    """Returns the placement with other mesh sizes, on all devices or some of them."""
    layout = make_layout(mesh, list(home.mesh.devices.flat))
    context = f"{config.stage}.batch_size, over rollout_mesh,"
    layout.validate_batch(config.episodes, context)
    return Placement(home, layout, model, functools.partial(_move, model, layout))


def _move(model: Model, layout: Layout, params: PyTree) -> PyTree:
    """Returns parameters on a mesh of other devices, or of the same in another order."""
    return reshard(params, states.shardings(params, model.axes(), layout))
