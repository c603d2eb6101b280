"""Compiled programs of sft and PPO have exactly the collectives of their strategy.

On 8 devices instead of the tests' 4:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest tests/test_strategy_hlo.py

On CPUs a reduce-scatter is an all-reduce and a slice, since only the TPU and GPU compilers join
them (ReduceScatterCreator). So the gradients of sharded parameters are among the all-reduces.
"""

import functools
import itertools
import math

import jax
import pytest

from rlhfjax.config import to_dict
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import Model, logprobs
from rlhfjax.plan import programs, shapes
from rlhfjax.plan.hlo import Module
from rlhfjax.plan.hlo_cost import module_cost
from rlhfjax.programs import Held
from tests import tiny
from tests.collectives import Collective, collectives

# Sizes that make an array known by its shape.
MODEL = {
    "vocab_size": 192,
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_head": 6,
    "d_ff": 40,
    "max_length": 32,
}
BATCH, TIME, CHUNKS = 16, 32, 4
SLOW = pytest.mark.slow
DEVICES = jax.device_count()
STRATEGIES = {
    "data": {"strategy": "data"},
    "fsdp": {"strategy": "fsdp"},
    "hsdp": {"strategy": "hsdp", "replica": 2},
    "fsdp_tensor": {"strategy": "fsdp_tensor", "tensor": 2},
    "context": {"strategy": "context", "sequence": 2, "tensor": max(1, DEVICES // 4)},
}
GRADIENTS = {("all-reduce", "parameter"), ("all-reduce", "scalar")}
FSDP = GRADIENTS | {("all-gather", "parameter")}
TENSOR = FSDP | {
    ("all-reduce", "activation"),
    ("all-reduce", "softmax"),
    ("all-reduce", "rows"),
}
KEYS = {("all-gather", "keys"), ("all-reduce", "keys")}  # and of their gradients
EXPECTED = {
    "data": GRADIENTS,
    "fsdp": FSDP,
    "hsdp": FSDP,
    "fsdp_tensor": TENSOR,
    "context": (TENSOR if DEVICES >= 8 else FSDP) | KEYS,
}


def programs_of(stage, mesh, devices=None, **changes):
    """The programs of a stage of tests/tiny.py on a mesh."""
    config = to_dict(tiny.get_config("data=nowhere"))
    config["pretrain"]["model"] |= MODEL
    config[stage] |= {"batch_size": BATCH, **changes}
    config[stage]["mesh"] |= mesh
    layout = make_layout(MeshConfig(**mesh), devices)
    subject = shapes.subject(config, stage)
    return (
        subject.model,
        dict(layout.mesh.shape),
        programs.step_programs(subject, layout).programs,
    )


@functools.cache
def parameter_shapes(model, fsdp, tensor):
    """Returns the shapes of all parameters, whole or sharded; heads and head_dim are one axis."""
    found = set()
    for x in jax.tree.leaves(jax.eval_shape(Model(model).init, jax.random.key(0))):
        flat = x.shape if x.ndim < 3 else (math.prod(x.shape[:-1]), x.shape[-1])
        other = x.shape if x.ndim < 3 else (x.shape[0], math.prod(x.shape[1:]))
        for shape in (flat, other):
            for cut in itertools.product((1, fsdp, tensor), repeat=len(shape)):
                found.add(
                    tuple(sorted(n // c for n, c in zip(shape, cut, strict=True)))
                )
    return found


def kind_of_array(shape, model, mesh):
    """What an array of a collective is, by its shape alone."""
    core = tuple(sorted(n for n in shape if n > 1))
    rows = (
        BATCH // (mesh["replica"] * mesh["data"] * mesh["fsdp"]) * TIME
    )  # of one device, if sequences are whole
    mine = rows // mesh["sequence"]
    sizes = {
        mine * model.d_model: "activation",
        rows * model.kv_heads * model.head_dim // mesh["tensor"]: "keys",
        mine // CHUNKS: "softmax",
        mine // CHUNKS * model.d_model: "rows",
    }
    if not core:
        return "scalar"
    if core in parameter_shapes(model, mesh["fsdp"], mesh["tensor"]):
        return "parameter"
    return sizes.get(math.prod(core), f"other {shape}")


def kinds_of(found: list[Collective], model, mesh):
    return {
        (x.kind, kind_of_array(shape, model, mesh)) for x in found for shape in x.shapes
    }


def small_chunks(monkeypatch, mesh):
    layout = make_layout(MeshConfig(**mesh))
    rows = BATCH // layout.batch_shards * TIME // layout.mesh.shape["sequence"]
    vocab = MODEL["vocab_size"] // layout.mesh.shape["tensor"]
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", rows // CHUNKS * vocab)


def assert_state_stays_split(program, compiled, mesh):
    """Asserts that parameters and moments are sharded before the step and after it."""
    state = [x for x in program.inputs if isinstance(x, Held) and x.owner == "state"]
    share = mesh["fsdp"] * mesh["tensor"]
    for x, after in zip(
        state, jax.tree.leaves(compiled.output_shardings[0]), strict=True
    ):
        assert after.is_equivalent_to(x.sharding, len(x.shape))
        if len(x.shape) >= 2:
            assert math.prod(x.sharding.shard_shape(x.shape)) * share == math.prod(
                x.shape
            )


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("fsdp", "context") else pytest.param(n, marks=SLOW)
        for n in STRATEGIES
    ],
)
def test_a_step_has_the_collectives_of_its_strategy(name, monkeypatch, optimized):
    small_chunks(monkeypatch, STRATEGIES[name])
    model, mesh, (step,) = programs_of("sft", STRATEGIES[name])
    compiled = step.lower().compile()
    found = collectives(compiled.as_text())
    assert kinds_of(found, model, mesh) == EXPECTED[name]
    assert_state_stays_split(step, compiled, mesh)
    summed = sum(
        math.prod(s)
        for x in found
        for s in x.shapes
        if x.kind == "all-reduce" and len(s) == 2
    )
    size = sum(
        x.size
        for x in jax.tree.leaves(jax.eval_shape(Model(model).init, jax.random.key(0)))
        if x.ndim > 1
    )
    if name in (
        "data",
        "fsdp",
    ):  # the tied matrix's two gradients, as embedding and as output, are summed apart
        assert summed == size + model.vocab_size * model.d_model
        assert {x.times for x in found} == {1}
    gathered = [x for x in found if x.kind == "all-gather"]
    if (
        name == "hsdp"
    ):  # parameters never cross from replica to replica; their gradients' parts do
        assert {x.devices for x in gathered} == {mesh["fsdp"]}


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["context"])
def test_ppo_shares_its_work_and_gathers_no_logits(name, monkeypatch, optimized):
    """No collective has an array with a vocabulary axis, except parameters.

    The FLOPs of all devices add up to those of one, except in decode steps, whose one token
    `sequence` cannot split.
    """
    changes = {"batch_size": 2 * BATCH}
    alone = programs_of("ppo", {"data": 1}, jax.devices()[:1], **changes)[2]
    expected = [
        module_cost(Module(p.lower().compile().as_text())).flops for p in alone
    ]  # one chunk: nothing is padded
    small_chunks(monkeypatch, STRATEGIES[name])
    model, mesh, many = programs_of("ppo", STRATEGIES[name], **changes)
    vocab = {model.vocab_size, model.vocab_size // mesh["tensor"]}
    known = parameter_shapes(model, mesh["fsdp"], mesh["tensor"])
    for flops, program in zip(expected, many, strict=True):
        compiled = program.lower().compile()
        text = compiled.as_text()
        for x in collectives(text):
            for shape in x.shapes:
                assert (
                    not vocab & set(shape)
                    or tuple(sorted(n for n in shape if n > 1)) in known
                ), (program.name, x)
        if program.name == "update":
            assert_state_stays_split(program, compiled, mesh)
        if mesh["sequence"] == 1 or program.name in ("know", "update"):
            assert module_cost(Module(text)).flops * DEVICES == pytest.approx(
                flops, rel=0.01
            ), program.name
