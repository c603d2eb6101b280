"""Steps of any training stage on random models and random batches; nothing is read from a disk.

The stage is built by its own `build` and its step is that of `rlhfjax train`. Only the sources of
its models and its data are replaced.
"""

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhfjax import programs, recipe, stages
from rlhfjax import state as states
from rlhfjax.config import to_dict
from rlhfjax.interop import store
from rlhfjax.mesh import Layout, make_layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.origins import Origins, roles_of
from rlhfjax.plan.predict import Plan, make_plan
from rlhfjax.plan.shapes import Shapes, Subject
from rlhfjax.plan.topology import HERE, target
from rlhfjax.stages import stage_config

POLICY, REWARD = "random_policy", "random_reward"  # the sources of the models
OPTIMIZER = {"name": "adamw", "learning_rate": 1e-4, "schedule": "constant"}


class RandomModels(Shapes):
    """Models whose parameters are made on the devices that they live on."""

    def open_model(
        self,
        source: str,
        layout: Layout,
        changes: Mapping[str, Any] = {},
        context: str = "",
    ) -> store.Opened:
        opened = super().open_model(source, layout, changes, context)
        model = opened.model
        shapes = states.abstract(model.shapes(), model.axes(), layout)
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        init = jax.jit(model.init, out_shardings=shardings)
        return opened._replace(params=functools.partial(init, jax.random.key(0)))


class Ticks(NamedTuple):
    """Seconds of every step: wall time, and CPU time of all threads."""

    wall: np.ndarray  # [steps]
    cpu: np.ndarray  # [steps]


class Steps:
    """A stage that can run its steps, and be planned.

    Args:
      name: of the stage, such as "pretrain" or "ppo".
      values: its options, without those that say where models and data come from.
      model_config: of all of its models.
    """

    def __init__(
        self, name: str, values: Mapping[str, Any], model_config: TransformerConfig
    ):
        given = _sources_of(name) | {"optim": OPTIMIZER} | dict(values)
        self.config = recipe.check(to_dict(stage_config(name, **given)), name)
        models = {
            POLICY: Model(model_config),
            REWARD: Model(model_config, "scalar"),
        }
        self._sources = RandomModels(models, Origins({}))
        self.layout = make_layout(self.config.mesh)
        with self.layout.use():
            module = stages.find(name)
            self.stage = module.build(self.config, self.layout, self._sources)

    def run(
        self, make_batch: Callable[[np.random.Generator], Any], count: int
    ) -> Ticks:
        """Runs steps one after the other, and waits for each."""
        key, rng = jax.random.key(0), np.random.default_rng(0)
        stage, times = self.stage, []
        with self.layout.use():
            state = states.create_sharded(stage.init, key, stage.axes, self.layout)
            state = stage.start(state)
            for step in range(count):
                batch = self.layout.put(make_batch(rng))
                jax.block_until_ready((state, batch))
                start = np.array((time.perf_counter(), time.process_time()))
                step_key = jax.random.fold_in(key, step)
                state, metrics = stage.step(state, batch, step_key)
                jax.block_until_ready((state, metrics))
                times.append((time.perf_counter(), time.process_time()) - start)
        return Ticks(*np.array(times).T)

    def plan(self) -> Plan:
        """Returns what XLA says of the step's programs on these devices."""
        roles = Origins({}).single(roles_of(self.config))
        shapes = Shapes(self._sources.models, Origins({}))
        subject = Subject(self.config.stage, self.config, shapes, roles)
        return make_plan(subject, target(HERE))


def _sources_of(name: str) -> dict[str, Any]:
    """Returns the options that name models and data; no data is opened."""
    unread = {"spec": "jsonl:unread.jsonl", "kind": "messages"}
    given: dict[str, Any] = {"init_from": POLICY}
    if name in ("pretrain", "sft"):
        return given | {"sources": (unread,), "eval_sources": (unread,)}
    if name == "reward":
        return given | {"preferences": ("unread",)}
    prompts = {"prompts": {"source": unread}, "eval_prompts": {"source": unread}}
    given |= prompts | {"reward": REWARD, "stop_at_eos": False}
    return given | ({"value_optim": OPTIMIZER} if name == "ppo" else {})


@contextlib.contextmanager
def program_seconds() -> Iterator[dict[str, list[float]]]:
    """Times every call of a named program within this context; each call is waited for."""
    seconds: dict[str, list[float]] = defaultdict(list)
    plain = programs.Program.__call__

    def timed(self: programs.Program, *args: Any, **static: Any) -> Any:
        if programs.recording():
            return plain(self, *args, **static)
        jax.block_until_ready((args, static))
        start = time.perf_counter()
        result = jax.block_until_ready(plain(self, *args, **static))
        seconds[self.name].append(time.perf_counter() - start)
        return result

    programs.Program.__call__ = timed
    try:
        yield seconds
    finally:
        programs.Program.__call__ = plain
