"""Stages that train adapters: what they train, keep and share, beside what the tests of the model
say of adapters.
"""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from rlhfjax import recipe, stages, state
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.interop.peft import load_peft
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import lora, quantized
from rlhfjax.models.transformer import Model
from rlhfjax.programs import Recorder
from rlhfjax.roles import DISK, Loaded, Models
from rlhfjax.supervised import load_trained
from tests.test_resume import _Crash, assert_same_stage, interrupt
from tests.test_stages import run_steps, stage_values

ONE = make_layout(MeshConfig(), jax.devices()[:1])
LORA = {"rank": 2, "alpha": 8.0, "targets": "attention/(query|value)|mlp/down"}
ADAPTED = {"attention/query", "attention/value", "mlp/down"}


def values(name, conversations, finished, **changes):
    return stage_values(
        name, conversations, finished, lora=LORA | changes.pop("lora", {}), **changes
    )


def started(name, values):
    """The stage and the state before its first step."""
    config = recipe.check(values, name)
    stage = stages.find(name).build(config, ONE)
    return stage, stage.start(
        state.create_sharded(stage.init, jax.random.key(config.seed), stage.axes, ONE)
    )


def names(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(tree)
    }


def load(config) -> Loaded:
    """The model that a stage trains."""
    roles = stages.find(config.stage).roles(config)
    return load_trained(config, Models(config.stage, roles, ONE, DISK))[0]


def programs_of(stage, first):
    """The programs of a step by their names, with the frozen arrays that they are given.

    Of other arrays they have the shapes.
    """
    recorder = Recorder()
    batch = ONE.put(next(stage.batches))
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)  # noqa: E731
    with ONE.use(), recorder.record():
        stage.step(*jax.tree.map(shape, (first, batch, jax.random.key(0))))
    return {call.name: call for call in recorder.calls}


def reference_of(programs):
    return programs["know"].args[1]


def frozen_of(programs):
    """What an update reads besides what it trains."""
    return programs["update"].args[-1]


@pytest.fixture(scope="module")
def ppo_run(conversations, finished, tmp_path_factory):
    """The workdir of PPO with adapters for policy and value function, uninterrupted."""
    folder = tmp_path_factory.mktemp("lora") / "ppo"
    recipe.run_stage(values("ppo", conversations, finished, steps=4), folder)
    return folder


# ------------------------------------------------------------------ what is trained and kept


def test_checkpoints_hold_adapters_and_a_value_head_alone(ppo_run):
    """Parameters, two moments and the average.

    Of a policy's 7 matrices 3 are adapted, with two factors each.
    """
    saved = names(
        ocp.metadata(
            ppo_run / "checkpoints" / "4", checkpointable_name="state"
        ).metadata
    )
    adapters = {f"layers/layer_0/{path}/{x}" for path in ADAPTED for x in lora.NAMES}
    trained = {f"policy/backbone/{a}" for a in adapters} | {
        f"value/backbone/{a}" for a in adapters
    }
    trained |= {"value/head/kernel", "value/head/bias"}
    assert {
        path.removeprefix("params/") for path in saved if path.startswith("params/")
    } == trained
    others = [path for path in saved if not path.startswith("params/")]
    assert sum(path.startswith("extra/ema/") for path in others) == 6
    parts = {"lora_a", "lora_b", "kernel", "bias", "count", "step", "kl_coefficient"}
    assert {path.split("/")[-1] for path in others} <= parts
    assert not any("kernel" in path and "head" not in path for path in others)


def test_the_model_that_is_left_differs_from_its_base_in_the_adapted_kernels_alone(
    ppo_run, finished
):
    for left, base in (
        (ppo_run, finished / "02_sft"),
        (ppo_run / "value", finished / "04_reward"),
    ):
        saved, before = (store.load(folder, ONE) for folder in (left, base))
        assert saved.model == before.model
        before = names(before.params)
        changed = {
            path
            for path, x in names(saved.params).items()
            if not np.array_equal(x, before[path])
        }
        kernels = {f"backbone/layers/layer_0/{path}/kernel" for path in ADAPTED}
        assert changed == kernels | (
            {"head/kernel", "head/bias"} if left.name == "value" else set()
        )


def test_the_adapters_are_left_too_and_are_those_of_the_model(ppo_run, finished):
    """In PEFT's layout; merged into the base they are the model that is left, to the bit."""
    base = store.load(finished / "02_sft", ONE)
    model, adapters = load_peft(ppo_run / "adapter", base.model)
    assert (model.lora.rank, model.lora.alpha) == (2, 8.0)
    merged = lora.merge(
        model.lora, jax.tree.map(jnp.asarray, state.merge_params(base.params, adapters))
    )
    jax.tree.map(np.testing.assert_array_equal, merged, store.load(ppo_run, ONE).params)


@pytest.mark.slow
def test_a_stage_that_crashed_goes_on_to_the_same_bits(
    ppo_run, conversations, finished, tmp_path, monkeypatch
):
    config = values("ppo", conversations, finished, steps=4)
    with monkeypatch.context() as patch:
        interrupt(patch, "ppo", 3, "exception")
        with pytest.raises(_Crash):
            recipe.run_stage(config, tmp_path / "run")
    recipe.run_stage(config, tmp_path / "run")
    assert_same_stage(ppo_run, tmp_path / "run")


def test_the_policy_begins_as_its_reference_and_leaves_it(ppo_run):
    lines = [
        json.loads(line)
        for line in (ppo_run / "metrics.jsonl").read_text().splitlines()
    ]
    kls = [line["ppo/kl"] for line in lines if "ppo/kl" in line]
    assert abs(kls[0]) < 1e-4 and max(map(abs, kls[1:])) > 1e-4


# ------------------------------------------------------------------ one copy of the weights


@pytest.fixture(scope="module")
def ppo_begun(conversations, finished):
    """(stage, state before its first step, bytes of all arrays that came with them).

    Copy the state, a step donates.
    """
    before = {id(x) for x in jax.live_arrays()}
    stage, first = started("ppo", values("ppo", conversations, finished, ema=0.0))
    return (
        stage,
        first,
        sum(x.nbytes for x in jax.live_arrays() if id(x) not in before and x.ndim),
    )


def test_policy_reference_value_function_and_reward_are_the_same_arrays(ppo_begun):
    """Of a PPO stage with adapters nothing is in memory but two bases and what is trained."""
    stage, first, size = ppo_begun
    programs = programs_of(stage, first)
    frozen, reference = frozen_of(programs), reference_of(programs)
    reward = programs["score"].args[0]
    assert names(frozen["policy"]).keys() == names(reference).keys()
    assert all(
        x is names(reference)[path] for path, x in names(frozen["policy"]).items()
    )
    assert all(x is names(reward)[path] for path, x in names(frozen["value"]).items())
    bases = sum(x.nbytes for x in jax.tree.leaves((reference, reward)))
    trained = sum(x.nbytes for x in jax.tree.leaves(first.params))
    assert (
        size <= bases + 3 * trained + 2**12
    )  # parameters and two moments; the rest are keys and counters
    assert trained < bases / 4


def test_a_step_changes_and_donates_what_is_trained_alone(
    ppo_begun, conversations, finished
):
    begun = {
        "sft": started("sft", values("sft", conversations, finished)),
        "ppo": ppo_begun[:2],
    }
    for name, (stage, first) in begun.items():
        first = jax.tree.map(jnp.array, first)
        programs = programs_of(stage, first)
        frozen = frozen_of(programs) if name == "ppo" else programs["step"].args[0]
        before = jax.tree.map(np.array, frozen)
        trained = jax.tree.map(np.array, first.params)
        after, _ = stage.step(first, ONE.put(next(stage.batches)), jax.random.key(0))
        assert all(x.is_deleted() for x in jax.tree.leaves(first.params))
        after, _ = stage.step(
            after, ONE.put(next(stage.batches)), jax.random.key(1)
        )  # the first has learning rate 0
        jax.tree.map(
            np.testing.assert_array_equal, frozen, before
        )  # neither deleted nor written to
        moved = names(
            jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after.params, trained)
        )
        assert all(size > 0 for path, size in moved.items() if path.endswith("lora_b"))


@pytest.fixture
def constants_are_errors():
    """A program that is compiled with 16 numbers as constants is an error.

    The smallest frozen array has as many.
    """
    before = jax.config.jax_captured_constants_warn_bytes
    jax.config.update("jax_captured_constants_warn_bytes", 16 * 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "A large amount of constants")
        warnings.filterwarnings("error", "Closed-over constant")
        yield
    jax.config.update("jax_captured_constants_warn_bytes", before)


@pytest.mark.usefixtures("constants_are_errors")
def test_a_constant_of_a_program_is_an_error():
    array = jnp.ones(16)
    with pytest.raises(UserWarning, match="constant"):
        jax.jit(lambda x: x + array)(1.0)


def test_no_program_of_a_step_has_a_frozen_array_as_a_constant(
    ppo_begun, conversations, finished
):
    begun = [started("sft", values("sft", conversations, finished)), ppo_begun[:2]]
    for stage, first in begun:
        programs = programs_of(stage, first)
        assert programs.keys() in (
            {"step"},
            {"rollout", "know", "score", "prepare", "update"},
        )
        for call in programs.values():
            with ONE.use():
                consts = call.function.trace(*call.args, **call.static).jaxpr.consts
            assert max((np.size(x) for x in consts), default=0) <= 2, call.name


@pytest.mark.usefixtures("constants_are_errors")
def test_no_program_of_held_out_data_has_a_frozen_array_as_a_constant(ppo_begun):
    stage, first, _ = ppo_begun
    with ONE.use():
        assert "val_kl" in stage.evals(first)


# ------------------------------------------------------------------ every stage that trains


@pytest.mark.parametrize(
    "name",
    (
        pytest.param("reward", marks=pytest.mark.slow),
        pytest.param("ppo", marks=pytest.mark.nightly),
    ),
)
def test_four_devices_give_what_one_gives(name, conversations, finished):
    config = values(name, conversations, finished)
    one, params_one = run_steps(name, config, ONE)
    four, params_four = run_steps(
        name, config, make_layout(MeshConfig(data=1, fsdp=2, tensor=2))
    )
    for a, b in zip(one, four, strict=True):
        assert a.keys() == b.keys()
        for metric in a:
            np.testing.assert_allclose(
                b[metric], a[metric], rtol=2e-3, atol=2e-4, err_msg=metric
            )
    for a, b in zip(
        jax.tree.leaves(params_one), jax.tree.leaves(params_four), strict=True
    ):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_reward_model_with_adapters_is_normalized_by_its_head(
    conversations, finished, tmp_path
):
    """The merged model gives answers of the held-out split mean 0, as one that was trained whole;
    with dropout.
    """
    metrics = recipe.run_stage(
        values("reward", conversations, finished, lora={"dropout": 0.1}),
        tmp_path / "reward",
    )
    assert metrics["reward/grad_norm"] > 0
    saved = store.load(tmp_path / "reward", ONE)
    assert saved.model.head == "scalar" and not saved.model.lora.rank
    normal = dict(
        values("reward", conversations, finished),
        init_from=str(tmp_path / "reward"),
        lora={"rank": 0},
    )
    again = recipe.check(normal, "reward")
    stage = stages.find("reward").build(again, ONE)
    judged = stage.finish(
        stage.start(
            state.create_sharded(stage.init, jax.random.key(0), stage.axes, ONE)
        )
    )
    assert (
        abs(
            float(
                judged.metrics["reference_mean"][0]
                / judged.metrics["reference_mean"][1]
            )
        )
        < 1e-5
    )


def test_direct_preference_optimization_begins_at_its_reference(
    conversations, finished
):
    """With the base as the reference every log ratio is 0 at first: the loss is log 2."""
    common = stage_values("reward", conversations, finished)
    kept = (
        "preferences",
        "length",
        "batch_size",
        "optim",
        "steps",
        "log",
        "checkpoint",
    )
    config = {name: common[name] for name in kept} | {
        "init_from": str(finished / "02_sft"),
        "lora": LORA,
    }
    metrics, params = run_steps(
        "direct", stages.stage_config("direct", **config).to_dict(), ONE, steps=3
    )
    losses = [
        line["loss"] for line in metrics if "loss" in line
    ]  # a batch of ties alone has none
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5) and losses[-1] != losses[0]
    assert {path.split("/")[-1] for path in names(params)} == set(lora.NAMES)


@pytest.mark.slow
def test_a_group_estimator_and_a_value_head_on_the_policys_trunk(
    conversations, finished
):
    shared = values(
        "ppo", conversations, finished, value="shared", ptx={"coefficient": 0.0}
    )
    metrics, params = run_steps("ppo", shared, ONE, steps=1)
    assert (
        params["value"].keys() == {"head"}
        and abs(metrics[0]["first_ratio_max"] - 1) < 2e-5
    )
    common = stage_values("ppo", conversations, finished)
    kept = (
        "init_from",
        "reward",
        "prompts",
        "eval_prompts",
        "prompt_length",
        "max_new_tokens",
        "temperature",
        "steps",
    )
    config = {name: common[name] for name in kept} | {"batch_size": 4, "lora": LORA}
    metrics, params = run_steps(
        "group", stages.stage_config("group", **config).to_dict(), ONE, steps=1
    )
    assert {path.split("/")[-1] for path in names(params)} == set(lora.NAMES)
    assert metrics[0]["policy_grad_norm"] > 0


# ------------------------------------------------------------------ a quantized base


def test_the_base_is_quantized_once_for_policy_reference_and_value_function(
    conversations, finished
):
    """QLoRA: every kernel of the layers has 4 bits, whoever uses it; what is trained is as ever."""
    config = values(
        "ppo", conversations, finished, value="policy", lora={"base": "nf4"}
    )
    stage, first = started("ppo", config)
    programs = programs_of(stage, first)
    frozen = frozen_of(programs)
    policy, value = names(frozen["policy"]), names(frozen["value"])
    reference = names(reference_of(programs))
    kernels = [path for path in reference if path.endswith("/kernel")]
    assert len(kernels) == 7 and all(
        reference[path].dtype == jnp.uint4 for path in kernels
    )
    assert all(policy[path] is reference[path] for path in reference)
    assert all(value[path] is reference[path] for path in value)
    assert {path.split("/")[-1] for path in names(first.params)} == {
        *lora.NAMES,
        "kernel",
        "bias",
    }


@pytest.mark.parametrize(
    "kind",
    (
        pytest.param("nf4", marks=pytest.mark.slow),
        pytest.param("int8", marks=pytest.mark.nightly),
    ),
)
def test_the_model_that_is_left_is_the_quantized_base_in_floats_and_its_adapters(
    kind, conversations, finished, tmp_path
):
    config = values("sft", conversations, finished, steps=2, lora={"base": kind})
    metrics = recipe.run_stage(config, tmp_path / "sft")
    assert metrics["sft/grad_norm"] > 0
    before, left = (
        store.load(config["init_from"], ONE),
        store.load(tmp_path / "sft", ONE),
    )
    rounded = quantized.wide(
        quantized.base(before.params, before.model.axes(), kind), before.model.axes()
    )
    model, adapters = load_peft(tmp_path / "sft" / "adapter", before.model)
    merged = names(
        lora.merge(
            model.lora, jax.tree.map(jnp.asarray, state.merge_params(rounded, adapters))
        )
    )
    for path, x in names(left.params).items():
        np.testing.assert_allclose(x, merged[path], atol=1e-7, err_msg=path)
        assert x.dtype == jnp.float32
    moved = {
        path
        for path, x in names(before.params).items()
        if not np.array_equal(x, merged[path])
    }
    assert moved == {
        path for path in merged if "/layers/" in path and path.endswith("/kernel")
    }


# ------------------------------------------------------------------ what is refused


def test_what_cannot_be_meant_is_one_line(conversations, finished):
    new = values("pretrain", conversations, finished)
    with pytest.raises(
        ConfigError,
        match=r"pretrain.lora.rank=2: adapters need a trained model, `init_from`",
    ):
        started("pretrain", new)
    with pytest.raises(
        ConfigError,
        match=r"lora.base='nf4': must be float32 with lora.rank=0",
    ):
        started(
            "sft",
            values("sft", conversations, finished, lora={"rank": 0, "base": "nf4"}),
        )
    with pytest.raises(
        ConfigError, match=r"ppo.lora.dropout=0.1: must be 0 in a policy stage"
    ):
        started("ppo", values("ppo", conversations, finished, lora={"dropout": 0.1}))
    with pytest.raises(
        ConfigError,
        match=r"lora.targets='q_proj' matches none of backbone/layers/layer_0",
    ):
        started(
            "sft", values("sft", conversations, finished, lora={"targets": "q_proj"})
        )


def test_another_head_than_the_loaded_one_is_born(finished, tmp_path, conversations):
    """A reward model of an untied language model.

    The output matrix [d, v] is no scalar head; adapters need theirs.
    """
    saved = store.load(finished / "02_sft", ONE)
    model = Model(dataclasses.replace(saved.model.config, tie_embeddings=False))
    store.save(
        tmp_path / "untied",
        store.SavedModel(model, model.init(jax.random.key(0)), saved.tokenizer),
    )
    config = recipe.check(
        stage_values(
            "reward", conversations, finished, init_from=str(tmp_path / "untied")
        ),
        "reward",
    )
    start = load(config)
    assert "head" not in start.read()
    assert start.model.init_trained(jax.random.key(0))["head"]["kernel"].ndim == 1
    scalar = Model(model.config, "scalar")
    store.save(
        tmp_path / "scalar",
        store.SavedModel(scalar, scalar.init(jax.random.key(0)), saved.tokenizer),
    )
    config = values("sft", conversations, finished, init_from=str(tmp_path / "scalar"))
    with pytest.raises(
        ConfigError, match="adapters need a language-model head, found none"
    ):
        load(recipe.check(config, "sft"))
