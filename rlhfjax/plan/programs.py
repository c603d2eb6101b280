"""The jitted functions of a stage, and the shapes they are called with: no data, no checkpoint, no array.

The functions are the stage's own: made by the same `assemble`, `parts` and algorithms that `build` calls, given shapes
in the place of parameters. tests/plan/test_programs.py holds them against what a stage that was really built lowers to.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax import state as states
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import Layout, make_layout
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.optim import make_optimizer, make_schedule
from rlhfjax.plan import chips
from rlhfjax.plan.memory import parameters
from rlhfjax.plan.shapes import Subject
from rlhfjax.plan.topology import Target
from rlhfjax.rewards.losses import make_loss
from rlhfjax.rewards.model import ModelReward, sequence_rewards
from rlhfjax.stages import Batches, direct, find, group, ppo, reward
from rlhfjax.stages.parts.common import Start, assemble, frozen_part
from rlhfjax.stages.parts.language import language_loss
from rlhfjax.stages.parts.placing import need_of
from rlhfjax.stages.parts.policy import Task, Tokens, fresh_state
from rlhfjax.stages.parts.rollout import Rollout

PyTree = Any
RANKED = ("reward", "direct")  # stages that learn from several answers to a prompt
LANGUAGE = {"tokens": np.int32, "targets": np.int32, "segments": np.int32, "positions": np.int32, "mask": np.float32}


class Program(NamedTuple):
    """One jitted function of a stage's step."""

    name: str
    lower: Callable[[], Any]  # -> jax.stages.Lowered
    inputs: PyTree  # ShapeDtypeStructs with shardings
    model_flops: float  # of the whole mesh, what the mathematics needs: see `chips.token_flops`
    passes: float = 1.0  # so many times those are computed, at least: see `passes`


class Sketch(NamedTuple):
    """A stage as its programs; a step runs each of them once, in this order."""

    programs: list[Program]
    tokens: int  # a step: of batches, or of responses
    steps: int
    batch: int  # sequences of the largest forward-backward pass, for the table by hand
    time: int
    held: PyTree = ()  # what is on the devices all the time, whichever program runs: state and frozen models


def layout_for(subject: Subject, target: Target) -> Layout:
    """The mesh over a target's devices that the stage's config asks for."""
    config = subject.config
    need = need_of(config, subject.model, subject.reward) if config.mesh.strategy == "auto" else None
    return make_layout(config.mesh, target.devices, need, target.capacity)


def sketch(subject: Subject, layout: Layout, completions: int = 2) -> Sketch:
    """All programs of a stage.

    Args:
      completions: answers to a prompt, where the data decides that: reward and direct stages.
    Raises:
      ConfigError: batch and mesh do not fit each other, or the stage or an option of it is none of those known here.
    """
    makers = {"pretrain": _language, "sft": _language, "reward": _ranked, "direct": _direct}
    makers |= {"ppo": _policy, "group": _policy}
    kind = subject.config.stage
    if kind not in makers:
        raise ConfigError(f"plan: stage {kind!r} is not among those that can be planned: {', '.join(makers)}")
    if (base := subject.config.lora.base) != "float32":
        raise ConfigError(f"plan: lora.base={base!r} cannot be planned; with lora.base=float32 it is an upper bound")
    for option in ("rollout_mesh", "judge_mesh", "one_step_off"):
        if getattr(subject.config, option, None):
            raise ConfigError(f"plan: {kind}.{option} cannot be planned; plan without it, on one mesh and step by step")
    if check := getattr(find(kind), "check", None):
        check(subject.config, layout, subject.model)
    with layout.use():
        return makers[kind](subject, layout, completions)


def placed(tree: PyTree, axes: PyTree, layout: Layout) -> PyTree:
    return states.abstract(tree, axes, layout)


def parameters_of(model: Model, layout: Layout) -> PyTree:
    """A model's parameters as shapes."""
    return placed(model.shapes(), model.axes(), layout)


def rows(layout: Layout, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array whose first axis is the batch."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding("batch"))


def a_key(layout: Layout) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=layout.replicated)


# ---------------------------------------------------------------------- stages with one loss


def _language(subject: Subject, layout: Layout, _: int) -> Sketch:
    c = subject.config
    batch = {name: rows(layout, (c.batch_size, c.length), dtype) for name, dtype in LANGUAGE.items()}
    if c.stage == "sft":
        batch["cut"] = rows(layout, (c.batch_size,), np.float32)
    model = Model(subject.model, "lm", c.lora)
    return _one_loss(subject, layout, model, language_loss(model), batch, c.batch_size * c.length)


def _answers(c: Any, layout: Layout, k: int) -> PyTree:
    """A batch of `loader.preference_batches`."""
    tokens = {name: rows(layout, (c.batch_size, k, c.length), np.int32) for name in ("tokens", "segments")}
    shape = (c.batch_size, k)
    floats = {name: rows(layout, shape, np.float32) for name in ("scores", "valid", "cut")}
    integers = {name: rows(layout, shape, np.int32) for name in ("lengths", "same")}
    return {**tokens, **floats, **integers, "index": rows(layout, (c.batch_size,), np.int32)}


def _ranked(subject: Subject, layout: Layout, k: int) -> Sketch:
    c = subject.config
    model = Model(subject.model, "scalar", c.lora)
    loss = reward.reward_loss(model, make_loss(c.loss))
    return _one_loss(subject, layout, model, loss, _answers(c, layout, k), c.batch_size * k * c.length)


def _direct(subject: Subject, layout: Layout, k: int) -> Sketch:
    """The passes that know log-probabilities without a gradient, then the step.

    The reference is taken to be of the policy's shape, and is on the devices all the time, also where its
    log-probabilities were computed before training.
    """
    c, model = subject.config, Model(subject.model, "lm", subject.config.lora)
    batch, base = _answers(c, layout, k), parameters_of(Model(subject.model), layout)
    known = {direct.REFERENCE: rows(layout, (c.batch_size, k), np.float32)} if c.loss.needs_reference else {}
    if c.loss.name == "kto":
        known["kl"] = rows(layout, (c.batch_size,), np.float32)
    loss, tokens = direct.direct_loss(model, c.loss), c.batch_size * k * c.length
    sketch = _one_loss(subject, layout, model, loss, batch | known, tokens, base)
    (step,) = sketch.programs
    frozen, state = step.inputs[:2]
    models = {"reference": base, "mismatched_reference": base, "mismatched": states.attach(frozen, state.params)}
    total = direct.total_logprobs(model, c.microbatches)
    before = [
        Program(name, _lower(total, layout, models[name], batch), (models[name], batch), flops)
        for name, flops in step_flops(subject, k).items()
        if name in models
    ]
    held = (state, base) if c.loss.needs_reference else ()
    return sketch._replace(programs=[*before, step], held=held)


def _one_loss(
    subject: Subject,
    layout: Layout,
    model: Model,
    loss: Callable[..., Any],
    batch: PyTree,
    tokens: int,
    base: PyTree = None,
) -> Sketch:
    """Args:
    base: what adapters are of, where it is used elsewhere too.
    """
    c = subject.config
    params = (base or parameters_of(model, layout)) if c.lora.rank else None
    start = Start(model, _Ids(), params)
    options = {"tx": make_optimizer(c.optim, c.steps), "schedule": make_schedule(c.optim, c.steps)}
    stage = assemble(c, start, loss=loss, batches=_NoData(), evals=lambda state: {}, units=tokens, **options)
    state = placed(jax.eval_shape(stage.init, jax.random.key(0)), stage.axes, layout)
    inputs = (*stage.step.args, state, batch, a_key(layout))
    flops, lower = _loss_flops(subject, tokens, model.head), _lower(stage.step.func, layout, *inputs)
    step = Program("step", lower, inputs, flops, passes(c.lora.rank, subject.model))
    return Sketch([step], tokens, c.steps, tokens // c.length // c.microbatches, c.length)


def passes(rank: int, *trained: TransformerConfig) -> float:
    """The products that training computes over the 3 passes that PaLM counts (forward, to the inputs, to the weights).

    Adapters alone need no gradient of the weights; remat=full goes forward once more. The least of several models.
    """
    return min((2 if rank else 3) + (model.remat == "full") for model in trained) / 3


def _loss_flops(subject: Subject, tokens: int, head: str) -> float:
    return float(tokens * chips.token_flops(parameters(subject.model, head), subject.model, subject.config.length))


def step_flops(subject: Subject, completions: int = 2) -> dict[str, float]:
    """What the mathematics of a step needs, of the whole mesh, by program; what trains is under "update"."""
    c = subject.config
    if c.stage in ("ppo", "group"):
        return _flops(subject)
    tokens = c.batch_size * c.length * (completions if c.stage in RANKED else 1)
    update = _loss_flops(subject, tokens, "scalar" if c.stage == "reward" else "lm")
    return dict.fromkeys(_before(c), update / 3) | {"update": update}


def _before(c: Any) -> list[str]:
    """The passes of a direct stage's step that have no gradient: of a reference, and KTO's of mismatched answers."""
    if c.stage != "direct" or not c.loss.needs_reference:
        return []
    names = ["reference"] if c.reference_logprobs == "live" else []
    if c.loss.name == "kto":
        names += [f"mismatched_{name}" for name in names] + ["mismatched"]
    return names


def _lower(function: Any, layout: Layout, *inputs: PyTree) -> Callable[[], Any]:
    def lower() -> Any:
        with layout.use():
            return function.lower(*inputs)

    return lower


class _NoData(Batches):
    """A plan takes no batch."""


class _Ids(Tokenizer):
    """A tokenizer as far as the jitted functions know one: three numbers that are not equal."""

    pad_id, eos_id = 0, 1

    def token_id(self, piece: str) -> int:
        """Any piece's."""
        return 2


# ---------------------------------------------------------------------- policy stages


def _policy(subject: Subject, layout: Layout, _: int) -> Sketch:
    c, task = subject.config, _task(subject, layout)
    if c.stage == "ppo":
        made = ppo.parts(c, task)
        algorithm, born, axes, frozen, extra = made.algorithm, made.born, made.axes, made.frozen, {}
    else:
        model = task.start.model
        algorithm = group.Algorithm(c, model, Tokens.of(c, task.tokenizer))
        born, axes, frozen = lambda key: {"policy": model.init_trained(key)}, {"policy": model.trained_axes()}, {}
        extra = {"baseline": jnp.zeros(())} if c.estimator == "reinforce" else {}
    frozen = {"policy": frozen_part(task.start.model, task.start.params), **frozen}
    init = fresh_state(c, algorithm, born, extra)
    state = placed(jax.eval_shape(init, jax.random.key(0)), axes, layout)
    programs = _policy_programs(subject, layout, task, algorithm, state, frozen)
    batch = c.episodes // c.minibatches // c.microbatches
    held = (state, frozen, task.reference, task.reward.params if task.reward is not None else ())
    return Sketch(programs, c.episodes * c.max_new, c.steps, batch, c.prompt_length + c.max_new, held)


def _task(subject: Subject, layout: Layout) -> Task:
    """The models of a policy stage, all of them shapes."""
    c, ids = subject.config, _Ids()
    model = Model(subject.model, "lm", c.lora)
    params = parameters_of(Model(subject.model), layout)
    scorer: Any = None
    if subject.reward is not None:
        judge = Model(subject.reward, "scalar")
        scorer = ModelReward(judge, parameters_of(judge, layout))
    return Task(store.SavedModel(model, params, ids), ids, scorer, params)


def _policy_programs(
    subject: Subject, layout: Layout, task: Task, algorithm: Any, state: states.TrainState, frozen: PyTree
) -> list[Program]:
    """Returns rollout, know, score, prepare, update: each takes what those before it return.

    A program is traced here only if another needs the shapes that it returns. Those of a rollout
    are known: its layers are unrolled, so that tracing it takes as long as all the rest.
    """
    c = subject.config
    params = states.attach(frozen, state.params)
    prompts = [rows(layout, (c.episodes, c.prompt_length), np.int32) for _ in range(2)]
    sizes = _flops(subject)
    programs: list[Program] = []

    def program(name: str, function: Any, *inputs: PyTree) -> Callable[[], PyTree]:
        """Adds a program. Returns a function that traces it, and returns its outputs' shapes."""
        jitted = function if hasattr(function, "lower") else jax.jit(function)
        times = passes(c.lora.rank, *trained_models(subject)) if name == "update" else 1.0
        programs.append(Program(name, _lower(jitted, layout, *inputs), inputs, float(sizes.get(name, 0.0)), times))
        return lambda: _as_rows(jax.eval_shape(jitted, *inputs), layout, c.episodes)

    answers = functools.partial(algorithm.rollout, each=c.each)
    program("rollout", answers, params["policy"], *prompts, a_key(layout))
    rollout = _rollout(c, layout)
    known = program("know", algorithm.know, params, task.reference, rollout)()
    if task.reward is not None:
        judge = functools.partial(sequence_rewards, task.reward.model)
        program("score", judge, task.reward.params, rollout.tokens, rollout.segments)
    scores = rows(layout, (c.episodes,), np.float32)
    experience, pairs = program("prepare", algorithm.prepare, state, known, rollout, scores)()
    text = {}
    if c.ptx.coefficient:
        shape = (c.episodes * c.ptx.ratio, c.ptx.length)
        text = {name: rows(layout, shape, dtype) for name, dtype in LANGUAGE.items()}
    program("update", algorithm.update, state, experience, text, pairs, a_key(layout), frozen)
    return programs


def _rollout(c: Any, layout: Layout) -> Rollout:
    """Returns the shapes of a rollout, its rows over the batch axes."""
    whole, response = (c.episodes, c.prompt_length + c.max_new), (c.episodes, c.max_new)
    return Rollout(
        tokens=rows(layout, whole, np.int32),
        segments=rows(layout, whole, np.int32),
        mask=rows(layout, response, np.float32),
        logprobs=rows(layout, response, np.float32),
    )


def _as_rows(tree: PyTree, layout: Layout, n: int) -> PyTree:
    """What a program returns as the next one takes it: rows over the batch axes, scalars everywhere."""

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = layout.sharding("batch") if x.shape[:1] == (n,) else layout.replicated
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, tree)


def trained_models(subject: Subject) -> list[TransformerConfig]:
    """The models of a policy stage that have an optimiser: policy, and a value function with a trunk of its own."""
    c, models = subject.config, [subject.model]
    if c.stage == "ppo" and c.value != "shared":
        models.append(subject.reward if c.value == "reward" and subject.reward is not None else subject.model)
    return models


def _flops(subject: Subject) -> dict[str, float]:
    """Of each program, as PaLM counts: a forward pass is a third of a training step. Answers share their prompt's."""
    c, time = subject.config, subject.config.prompt_length + subject.config.max_new
    tokens, sampled = c.episodes * time, c.batch_size * c.prompt_length + c.episodes * c.max_new

    def a_token(shape: TransformerConfig, head: str, length: int) -> float:
        return float(chips.token_flops(parameters(shape, head), shape, length))

    policy = a_token(subject.model, "lm", time)
    value = sum(a_token(trunk, "scalar", time) for trunk in trained_models(subject)[1:])
    scored = 1 + (c.behaviour_logprobs == "forward")
    update = c.epochs * tokens * (policy + value)
    if c.ptx.coefficient:
        text = c.episodes * c.ptx.ratio * c.ptx.length
        update += c.epochs * text * a_token(subject.model, "lm", c.ptx.length)
    judged = a_token(subject.reward, "scalar", time) if subject.reward is not None else 0.0
    return {
        "rollout": sampled * policy / 3,
        "know": tokens * (scored * policy + value) / 3,
        "score": tokens * judged / 3,
        "update": update,
    }
