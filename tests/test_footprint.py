"""The memory of a stage by hand: which of its models count, and how many bytes they have."""

import dataclasses
import logging

import pytest

from rlhfjax import footprint, recipe, stages
from rlhfjax.config import to_dict
from rlhfjax.errors import CheckpointError
from rlhfjax.mesh import MeshConfig
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.lora import LoraConfig
from rlhfjax.optim import OptimConfig
from rlhfjax.origins import Origins, roles_of
from rlhfjax.rewards.compose import MemberConfig
from rlhfjax.rewards.judge import JudgeConfig
from rlhfjax.rewards.rubric import ClassConfig
from rlhfjax.rl.config import HumanConfig, PtxConfig
from rlhfjax.stages import (
    best_of_n,
    collect,
    compose,
    critique,
    direct,
    evaluate,
    group,
    ppo,
    pretrain,
    recenter,
    reward,
    rubric,
    sft,
)
from rlhfjax.strategy import AXES
from tests import tiny

# Two models. Their parameters: the embedding, which is the output matrix too; layers of attention,
# SwiGLU and two norms; the final norm.
SHAPE = TransformerConfig(
    vocab_size=320, d_model=16, n_layers=2, n_heads=2, d_ff=32, max_length=32
)
WIDE = TransformerConfig(
    vocab_size=320, d_model=32, n_layers=1, n_heads=4, d_ff=48, max_length=32
)
LAYER = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16
N = 320 * 16 + 2 * LAYER + 16
M = 320 * 32 + (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
SCALAR_N, SCALAR_M = N + 17, M + 33  # a scalar head: a weight per feature, and a bias
LORA = LoraConfig(
    rank=4
)  # on query and value: 4 numbers per input and per output of each
ADAPTERS_N = 2 * 2 * 4 * (16 + 16)
ADAPTERS_M = 1 * 2 * 4 * (32 + 32)

LENGTH = {"length": 32, "batch_size": 8, "steps": 1}
SAMPLING = {"prompt_length": 24, "max_new_tokens": 8}
POLICY = {
    "init_from": "lm",
    "reward": "wide_judge",
    "batch_size": 16,
    "steps": 1,
    **SAMPLING,
}
OTHER_MESH = MeshConfig(devices="0:1")


def new(shape, **options):
    return pretrain.Config(tokenizer="t", model=shape, **LENGTH | options)


def a_ppo(**options):
    return ppo.Config(**{"minibatches": 2, **POLICY} | options)


def a_group(**options):
    return group.Config(**POLICY | options)


def a_direct(**options):
    return direct.Config(**{"init_from": "lm", **LENGTH} | options)


def loss(name):
    return direct.LossConfig(name=name)


# What a recipe's stages will have made, by their folders.
MADE = {
    "lm": new(SHAPE),
    "wide": new(WIDE),
    "judge": reward.Config(init_from="lm", **LENGTH),
    "wide_judge": reward.Config(init_from="wide", **LENGTH),
    "sum": compose.Config(
        members=(MemberConfig("judge"), MemberConfig("wide_judge", where="judge"))
    ),
    "ensemble": compose.Config(
        members=(MemberConfig("wide_judge"),) * 3, combine="mean"
    ),
    "rubric": rubric.Config(
        template="{response}",
        classes=(ClassConfig("A", 1.0), ClassConfig("B", 0.0)),
        judge=JudgeConfig(model="wide", length=32),
    ),
}


def nets_of(config):
    return Origins(MADE).nets(roles_of(config), config.stage)


def workload_of(config):
    return stages.find(config.stage).workload(config)


def need_of(config):
    return footprint.need_of(nets_of(config), workload_of(config))


def parts_of(config, phase="", **sizes):
    axes = dict.fromkeys(AXES, 1) | sizes
    return footprint.device_bytes(nets_of(config), workload_of(config), axes, phase)


# ------------------------------------------------------------------ which models count

COUNTED = [
    # config, trained parameters, frozen parameters, rows of a microbatch, their tokens
    pytest.param(new(SHAPE), N, 0, 8, 32, id="pretrain"),
    pytest.param(new(SHAPE, microbatches=4), N, 0, 2, 32, id="microbatches"),
    pytest.param(sft.Config(init_from="wide", **LENGTH), M, 0, 8, 32, id="sft"),
    pytest.param(
        sft.Config(init_from="wide", lora=LORA, **LENGTH),
        ADAPTERS_M,
        M,
        8,
        32,
        id="sft-lora",
    ),
    pytest.param(MADE["wide_judge"], SCALAR_M, 0, 8, 32, id="reward"),
    # the head is trained whole, its trunk by adapters
    pytest.param(
        reward.Config(init_from="lm", lora=LORA, **LENGTH),
        ADAPTERS_N + 17,
        SCALAR_N,
        8,
        32,
        id="reward-lora",
    ),
    pytest.param(a_direct(), N, N, 8, 32, id="direct"),
    pytest.param(a_direct(reference="wide"), N, M, 8, 32, id="direct-reference"),
    pytest.param(
        a_direct(reference_logprobs="precomputed"), N, N, 8, 32, id="direct-precomputed"
    ),
    pytest.param(a_direct(loss=loss("orpo")), N, 0, 8, 32, id="orpo"),
    pytest.param(a_direct(lora=LORA), ADAPTERS_N, N, 8, 32, id="direct-lora"),
    pytest.param(
        a_direct(lora=LORA, reference="wide"),
        ADAPTERS_N,
        N + M,
        8,
        32,
        id="direct-lora-reference",
    ),
    pytest.param(a_ppo(), N + SCALAR_M, N + SCALAR_M, 8, 32, id="ppo"),
    pytest.param(
        a_ppo(value="policy"), N + SCALAR_N, N + SCALAR_M, 8, 32, id="value-policy"
    ),
    pytest.param(a_ppo(value="shared"), N + 17, N + SCALAR_M, 8, 32, id="value-shared"),
    pytest.param(
        a_ppo(reference="wide"), N + SCALAR_M, M + SCALAR_M, 8, 32, id="ppo-reference"
    ),
    pytest.param(
        a_ppo(reward="gold:sentiment", value="policy"),
        N + SCALAR_N,
        N,
        8,
        32,
        id="rules",
    ),
    pytest.param(
        a_ppo(microbatches=4, ema=0.9),
        N + SCALAR_M,
        N + SCALAR_M,
        2,
        32,
        id="ppo-microbatches",
    ),
    # the policy's base is its reference, the reward model's trunk the value function's
    pytest.param(
        a_ppo(lora=LORA),
        ADAPTERS_N + ADAPTERS_M + 33,
        N + SCALAR_M,
        8,
        32,
        id="ppo-lora",
    ),
    pytest.param(
        a_ppo(lora=LORA, value="policy"),
        2 * ADAPTERS_N + 17,
        N + SCALAR_M,
        8,
        32,
        id="ppo-lora-value-policy",
    ),
    pytest.param(
        a_ppo(lora=LORA, value="shared"),
        ADAPTERS_N + 17,
        N + SCALAR_M,
        8,
        32,
        id="ppo-lora-value-shared",
    ),
    pytest.param(
        a_ppo(lora=LORA, reference="wide"),
        ADAPTERS_N + ADAPTERS_M + 33,
        N + M + SCALAR_M,
        8,
        32,
        id="ppo-lora-reference",
    ),
    # the value function starts from the first of several reward models
    pytest.param(
        a_ppo(reward="ensemble"), N + SCALAR_M, N + 3 * SCALAR_M, 8, 32, id="ensemble"
    ),
    pytest.param(
        a_ppo(reward="sum"), N + SCALAR_N, N + 2 * SCALAR_N + SCALAR_M, 8, 32, id="sum"
    ),
    pytest.param(
        a_ppo(reward="rubric", value="shared"), N + 17, N + M, 8, 32, id="rubric"
    ),
    pytest.param(
        a_ppo(frozen_mesh=OTHER_MESH), N + SCALAR_M, 0, 8, 32, id="judge-mesh"
    ),
    pytest.param(a_group(), N, N + SCALAR_M, 64, 32, id="group"),
    pytest.param(
        a_group(samples_per_prompt=8, minibatches=2, microbatches=2),
        N,
        N + SCALAR_M,
        32,
        32,
        id="group-of-8",
    ),
    pytest.param(a_group(lora=LORA), ADAPTERS_N, N + SCALAR_M, 64, 32, id="group-lora"),
    pytest.param(a_group(frozen_mesh=OTHER_MESH), N, 0, 64, 32, id="group-judge-mesh"),
    # jobs train nothing
    pytest.param(
        collect.Config(
            init_from="lm",
            labeler="judge",
            others=("gold:sentiment", "wide_judge", "rankings:people.jsonl"),
            **SAMPLING,
        ),
        0,
        N + SCALAR_N + SCALAR_M,
        32,
        32,
        id="collect",
    ),
    pytest.param(
        evaluate.Config(
            policy="lm",
            baseline="wide",
            gold="gold:sentiment",
            proxy="judge",
            **SAMPLING,
        ),
        0,
        N + M + SCALAR_N,
        64,
        32,
        id="evaluate",
    ),
    pytest.param(
        best_of_n.Config(init_from="lm", proxy="judge", gold="wide_judge", **SAMPLING),
        0,
        N + SCALAR_N + SCALAR_M,
        64,
        32,
        id="best-of-n",
    ),
    pytest.param(
        critique.Config(
            init_from="lm",
            critic="wide",
            principles="p.jsonl",
            length=28,
            max_new_tokens=8,
        ),
        0,
        N + M,
        32,
        28,
        id="critique",
    ),
    pytest.param(
        recenter.Config(init_from="judge", policy="wide", batch_size=8, **SAMPLING),
        0,
        SCALAR_N + M,
        8,
        32,
        id="recenter",
    ),
]


@pytest.mark.parametrize(("config", "trained", "frozen", "rows", "time"), COUNTED)
def test_every_model_of_a_stage_counts(config, trained, frozen, rows, time):
    need = need_of(config)
    assert (need.trained, need.frozen) == (trained, frozen)
    assert (need.rows, need.time) == (rows, time)


@pytest.mark.parametrize("config", [a_ppo(), a_group()], ids=["ppo", "group"])
def test_human_reward_and_gold_are_models_of_a_policy_stage(config):
    """The gold reward measures on the mesh of training, wherever the other rewards are."""
    before = need_of(config)
    human = HumanConfig(reward="judge")
    with_human = dataclasses.replace(config, human=human)
    with_both = dataclasses.replace(config, human=human, gold="wide")
    assert need_of(with_human).frozen == before.frozen + SCALAR_N
    assert need_of(with_both).frozen == before.frozen + SCALAR_N + SCALAR_M
    assert need_of(with_both).trained == before.trained
    alone = dict.fromkeys(AXES, 1)
    more = need_of(with_both).device_bytes(alone) - before.device_bytes(alone)
    assert more == 4 * (SCALAR_N + SCALAR_M)
    apart = dataclasses.replace(with_both, frozen_mesh=OTHER_MESH)
    assert need_of(apart).frozen == SCALAR_M


def test_a_mesh_has_to_divide_every_model_on_it():
    need = need_of(a_ppo())
    assert set(need.widths) == {16, 32}
    assert set(need.splits) == {2, 32, 320} | {
        4,
        48,
    }  # heads, keys' heads, MLP and vocabulary of both
    apart = need_of(a_ppo(value="policy", frozen_mesh=OTHER_MESH))
    assert (set(apart.widths), set(apart.splits)) == ({16}, {2, 32, 320})


def test_a_model_that_nobody_knows_yet_is_left_out_unless_it_is_the_stages_own():
    assert need_of(a_ppo(reward="nowhere", value="policy")).frozen == N
    with pytest.raises(CheckpointError, match="nowhere"):
        need_of(a_ppo(init_from="nowhere"))


def test_a_recipe_counts_the_models_of_stages_before(tmp_path, caplog):
    """One layer: 320 x 16 + 2,592 + 16 = 7,728 parameters, and 17 of a scalar head.

    PPO trains policy and value function; reference, reward, human reward and gold are frozen.
    """
    config = to_dict(tiny.get_config("data=nowhere"))
    for name in ("sft", "ppo"):
        config[name]["mesh"] = config[name]["mesh"] | {"strategy": "auto"}
    for reward_of in (
        {},
        {"human": {"reward": "stage:reward"}, "gold": "stage:reward"},
    ):
        changed = config | {"ppo": config["ppo"] | reward_of}
        folders = recipe.stage_folders(changed, tmp_path)
        resolved = {
            name: recipe.resolve(changed[name], folders, name)
            for name in changed["stages"]
        }
        with caplog.at_level(logging.INFO, "rlhfjax"):
            recipe.check_all(resolved, folders)
    assert "7,728 trained and 0 frozen parameters, 8 rows of 32" in caplog.text
    assert "15,473 trained and 15,473 frozen parameters, 8 rows of 32" in caplog.text
    assert "15,473 trained and 30,963 frozen parameters, 8 rows of 32" in caplog.text


# ------------------------------------------------------------------ how many bytes they are

# A row of 32 tokens of one layer, in float32: inputs of query, key, value and output; the scores;
# the input of the MLP, gate, up, silu(gate) and their product; inputs of two norms.
ROW = 4 * (32 * (16 + 2 * 16 + 2 * 16) + 2 * 32 * 32 + 32 * (16 + 4 * 32) + 32 * 2 * 16)
CHUNK = 3 * 4 * 2**23  # bytes of the logits that live at a time
OUTPUT = 320 * 16 * (4 + 4) + CHUNK  # the output matrix and its gradient


def test_bytes_of_one_device():
    """Eight rows; a second accumulator and half of the rows with two microbatches."""
    expected = {
        "parameters": 4 * N,
        "optimizer and average": 8 * N,
        "gradients": 4 * N,
        "activations": 2 * 8 * ROW,
        "gathered layers": 0,
        "output matrix": OUTPUT,
    }
    assert parts_of(new(SHAPE)) == expected
    assert parts_of(new(SHAPE, microbatches=2)) == expected | {
        "gradients": 8 * N,
        "activations": 2 * 4 * ROW,
    }


def test_bytes_of_a_device_of_a_mesh():
    """Eight rows are split over replica x data x fsdp, and tensor halves every token's numbers."""
    axes = {"replica": 2, "fsdp": 2, "tensor": 2, "sequence": 2}
    assert parts_of(new(SHAPE), **axes) == {
        "parameters": 4 * N / 4,
        "optimizer and average": 8 * N / 4,
        "gradients": 4 * N / 4,
        "activations": 2 * 2 * ROW / 2 / 2,
        "gathered layers": LAYER * (2 * 4 + 4) / 2,
        "output matrix": OUTPUT / 2,
    }
    assert parts_of(new(SHAPE), data=8)["activations"] == 2 * ROW
    odd = dataclasses.replace(SHAPE, vocab_size=321)  # which two devices cannot share
    assert parts_of(new(odd), tensor=2)["output matrix"] == 321 * 16 * 8 + CHUNK


def test_bytes_of_other_precisions_and_of_what_is_computed_again():
    """With remat=full the inputs of two layers and all of one; in bfloat16 two bytes per number."""
    full = new(dataclasses.replace(SHAPE, remat="full"))
    assert parts_of(full)["activations"] == 2 * 8 * 4 * 32 * 16 + 8 * ROW
    assert parts_of(full, tensor=2)["activations"] == 2 * 8 * 4 * 32 * 16 + 8 * ROW / 2
    half = new(dataclasses.replace(SHAPE, dtype="bfloat16"))
    assert parts_of(half)["activations"] == 2 * 8 * ROW / 2
    assert parts_of(half, fsdp=8)["gathered layers"] == LAYER * (2 * 2 + 4)
    assert parts_of(half)["parameters"] == 4 * N


@pytest.mark.parametrize(
    ("optim", "numbers"),
    [
        ({"name": "adamw"}, 2),
        ({"name": "adamw", "moments": "bfloat16"}, 1.5),
        ({"name": "rmsprop"}, 1),
        ({"name": "sgd", "b1": 0.9}, 1),
        ({"name": "sgd", "b1": 0.0}, 0),
    ],
)
def test_bytes_of_moments(optim, numbers):
    config = OptimConfig(**optim)
    assert (
        parts_of(new(SHAPE, optim=config))["optimizer and average"] == 4 * numbers * N
    )
    state = parts_of(a_ppo(value_optim=config, ema=0.9))["optimizer and average"]
    assert state == 4 * (
        2 * N + numbers * SCALAR_M + N
    )  # the policy's are Adam's, and its average


def test_bytes_of_ppo():
    """Eight rows of a minibatch over four devices."""
    parts = parts_of(a_ppo(ema=0.9), fsdp=4, tensor=2)
    assert parts == {
        "parameters": 4 * (2 * N + 2 * SCALAR_M) / 8,
        "optimizer and average": 4 * (3 * N + 2 * SCALAR_M) / 8,
        "gradients": 4 * (N + SCALAR_M) / 8,
        "activations": 2 * 2 * ROW / 2,
        "gathered layers": LAYER * (2 * 4 + 4) / 2,
        "output matrix": OUTPUT / 2,
    }
    need = need_of(a_ppo(ema=0.9))
    assert need.device_bytes(dict.fromkeys(AXES, 1) | {"fsdp": 4, "tensor": 2}) == sum(
        parts.values()
    )
    twice = a_ppo(
        ptx=PtxConfig(coefficient=1.0, ratio=2, length=32)
    )  # 16 rows of text in a minibatch
    assert parts_of(twice)["activations"] == 2 * 16 * ROW


def test_completions_of_a_prompt_are_rows():
    """Eight prompts in two microbatches, each with two completions."""
    assert parts_of(a_direct(microbatches=2))["activations"] == 2 * 8 * ROW
    assert (
        parts_of(a_group(samples_per_prompt=8, minibatches=2))["activations"]
        == 2 * 64 * ROW
    )


def test_a_cache_takes_the_place_of_gradients_and_activations_where_it_is_more():
    """Keys and values of 2 layers x 16 numbers x 32 slots, 4 bytes each, for every row decoded."""
    row = 2 * 2 * 16 * 32 * 4
    many = a_ppo(batch_size=2**15, minibatches=2**9)
    small = parts_of(a_ppo())
    assert "KV cache" not in small and "gradients" in small
    assert parts_of(a_ppo(), phase="rollout")["KV cache"] == 16 * row
    parts = parts_of(many)
    assert parts["KV cache"] == 2**15 * row > CHUNK + 2 * 64 * ROW
    assert parts.keys() == {"parameters", "optimizer and average", "KV cache"}
    assert "KV cache" not in parts_of(many, phase="update")
    assert parts_of(many, tensor=2)["KV cache"] == 2**15 * row / 2
    assert parts_of(many, phase="rollout", fsdp=8)["KV cache"] == 2**12 * row
    in_lanes = dataclasses.replace(many, decode_batch=64)
    assert "KV cache" not in parts_of(in_lanes)
    assert parts_of(in_lanes, phase="rollout")["KV cache"] == 64 * row
    three = dataclasses.replace(
        SHAPE, n_heads=4, n_kv_heads=1
    )  # one head, which two devices both keep
    nets = [net._replace(config=three) for net in nets_of(many)]
    axes = dict.fromkeys(AXES, 1) | {"tensor": 2}
    assert (
        footprint.device_bytes(nets, workload_of(many), axes)["KV cache"]
        == 2**15 * row / 4
    )


def test_a_job_keeps_its_models():
    config = best_of_n.Config(init_from="lm", proxy="judge", **SAMPLING)
    assert parts_of(config, fsdp=4, tensor=2) == {"parameters": 4 * (N + SCALAR_N) / 8}


@pytest.mark.parametrize(("base", "layer"), [("int8", 1.0), ("nf4", 0.5 + 4 / 64)])
def test_a_quantized_base_has_its_embeddings_in_float32(base, layer):
    """NF4 has a scale of four bytes for 64 numbers."""
    config = a_group(lora=dataclasses.replace(LORA, base=base))
    others = 4 * (ADAPTERS_N + SCALAR_M)
    assert (
        parts_of(config)["parameters"]
        == others + 4 * (N - 2 * LAYER) + layer * 2 * LAYER
    )
