"""The reward stage beyond its default: losses by name, normalization, recentring, ensembles."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import recipe, stages, state
from rlhfjax.data import chat, loader
from rlhfjax.data.sources import Rows
from rlhfjax.data.tokenizer import load_tokenizer, train_sentencepiece
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.interop import store
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.metrics import finalize
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.rewards.load import load_reward
from rlhfjax.rewards.losses import LossConfig as RewardLossConfig
from rlhfjax.rewards.losses import make_loss as make_reward_loss
from rlhfjax.rewards.model import ModelReward
from rlhfjax.rewards.responses import score
from rlhfjax.stages import reward, stage_config
from tests import tiny
from tests.test_stage_direct import lopsided, separable
from tests.test_stages import run_steps, stage_values

__all__ = ["lopsided", "separable"]

ONE = make_layout(MeshConfig(), jax.devices()[:1])
OTHERS = [
    pytest.param(name, marks=pytest.mark.nightly)
    for name in ("soft", "rao_kupper", "plackett_luce")
]


@pytest.fixture(scope="module")
def saved(finished):
    return store.load(finished / "04_reward", ONE)


def chats(conversations, split):
    return {
        "spec": f"jsonl:{conversations}/{split}.jsonl",
        "kind": "messages",
        "split": "all",
    }


def test_pitfall_39_pairs_that_became_equal_weigh_nothing_in_a_reward_stage(tmp_path):
    """Of two rankings one is of completions that differ after the row's end; the loss is that of
    the other."""
    tokenizer = train_sentencepiece(
        ["the cat sat on the mat"] * 9, tmp_path, vocab_size=275
    )
    start = list(range(20, 30))
    rows = [
        {
            "prompt": "p",
            "completions": ["a", "b"],
            "scores": [1, 0],
            "prompt_tokens": [1, 7],
            "completion_tokens": ids,
        }
        for ids in ([[*start, 40], [*start, 41]], [[40, 2], [41, 2]])
    ]
    model = Model(
        TransformerConfig(
            vocab_size=300, d_model=8, n_layers=1, n_heads=1, d_ff=8, max_length=8
        ),
        "scalar",
    )
    params = model.init(jax.random.key(1))
    loss = jax.jit(reward.reward_loss(model, make_reward_loss(RewardLossConfig())))

    def of(*chosen):
        source = Rows([rows[i] for i in chosen], "preferences")
        batch = next(
            loader.preference_batches(
                source, tokenizer, batch_size=len(chosen), length=8, train=False
            )
        )
        return loss(params, jax.tree.map(jnp.asarray, batch), None)

    (both, pairs), (alone, _) = of(0, 1), of(1)
    np.testing.assert_allclose(both, alone, rtol=1e-6)
    assert [float(x) for x in pairs["loss"]][1] == 1
    assert [float(x) for x in pairs["rows_cut"]] == [2, 4]
    assert [float(x) for x in pairs["pairs_dropped"]] == [1, 2]


@pytest.mark.parametrize("name", ["margin", *OTHERS])
def test_pitfall_17_every_loss_accumulates_exactly_in_the_stage(
    name, conversations, finished, lopsided
):
    """Prompts have two to four answers, some of them tied."""
    sgd = {"name": "sgd", "learning_rate": 1e-2, "b1": 0.0, "schedule": "constant"}
    changes = {
        "preferences": (str(lopsided),),
        "optim": sgd,
        "checkpoint": {},
        "log": {},
    }
    results = [
        run_steps(
            "reward",
            stage_values(
                "reward",
                conversations,
                finished,
                loss={"name": name},
                microbatches=n,
                **changes,
            ),
            ONE,
            steps=1,
        )
        for n in (1, 4)
    ]
    np.testing.assert_allclose(
        results[1][0][0]["loss"], results[0][0][0]["loss"], rtol=1e-5
    )
    for a, b in zip(
        jax.tree.leaves(results[0][1]), jax.tree.leaves(results[1][1]), strict=True
    ):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)


def test_centering_trains_the_heads_bias_towards_rewards_around_0(
    conversations, finished, lopsided
):
    """From a bias of 5: a loss of comparisons leaves it, whatever the optimizer; centering not."""
    config = stage_values("reward", conversations, finished) | {
        "init_from": str(finished / "04_reward"),
        "preferences": (str(lopsided),),
        "model": None,
        "normalize": "none",
    }
    ends = {}
    for centering in (0.0, 0.1):
        loss = {"name": "bradley_terry", "centering": centering}
        values = recipe.check(config | {"loss": loss}, "reward")
        stage = reward.build(values, ONE)
        key = jax.random.key(0)
        with ONE.use():
            current = stage.start(
                state.create_sharded(stage.init, key, stage.axes, ONE)
            )
            head = current.params["head"]
            head = {**head, "bias": jnp.full_like(head["bias"], 5.0)}
            current = current.replace(params={**current.params, "head": head})
            for _ in range(5):
                batch = ONE.put(next(stage.batches))
                current, metrics = stage.step(current, batch, key)
        ends[centering] = float(current.params["head"]["bias"])
        assert ("centering" in metrics) == bool(centering)
    assert ends[0.0] == 5.0
    assert ends[0.1] < 5.0


def test_centering_of_a_choice_without_pairs_is_refused(conversations, finished):
    loss = {"name": "best_of_k", "centering": 0.1}
    values = stage_values("reward", conversations, finished) | {"loss": loss}
    with pytest.raises(
        ConfigError, match=r"reward\.loss\.centering=0\.1: must be 0 with best_of_k"
    ):
        reward.build(recipe.check(values, "reward"), ONE)


def started(values):
    """The stage and the state before its first step."""
    config = recipe.check(values, "reward")
    stage = stages.find("reward").build(config, ONE)
    return stage, stage.start(
        state.create_sharded(stage.init, jax.random.key(0), stage.axes, ONE)
    )


@functools.partial(jax.jit, static_argnums=0)
def reward_at(model, params, tokens, last):
    """The scalar head on slot `last` of one row; what stands behind it is not seen.

    Attention is causal.
    """
    return model.scalar(params, model.hidden(params, tokens)[0, last])


def rewards_of_rows(model, params, tokenizer, rows, length):
    """r(x, y) of (prompt ids, answer ids), one row at a time."""
    out = []
    for prompt, answer in rows:
        ids = [*prompt, *answer][:length]
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(ids)] = ids
        out.append(float(reward_at(model, params, padded, len(ids) - 1)))
    return np.array(out)


def validation_rows(finished):
    lines = (
        (finished / "03_collect" / "preferences" / "validation.jsonl")
        .read_text()
        .splitlines()
    )
    return [
        (row["prompt_tokens"], ids)
        for row in map(json.loads, lines)
        for ids in row["completion_tokens"]
    ]


@pytest.mark.parametrize(
    "how", ["none", pytest.param("mean", marks=pytest.mark.nightly), "mean_std"]
)
def test_normalized_before_training_has_mean_0_and_std_1_on_the_policys_answers(
    how, conversations, finished
):
    stage, first = started(
        stage_values("reward", conversations, finished, normalize_before=how)
    )
    tokenizer = load_tokenizer(finished / "02_sft" / "model")
    model = store.describe(store.find(finished / "04_reward"))
    values = rewards_of_rows(
        model, first.params, tokenizer, validation_rows(finished), 32
    )
    if how == "none":
        assert abs(values.mean()) > 1e-3
        assert abs(values.std() - 1) > 1e-3
        return
    np.testing.assert_allclose(values.mean(), 0, atol=2e-5)
    if how == "mean_std":
        np.testing.assert_allclose(values.std(), 1, rtol=1e-4)
    stage.step(first, ONE.put(next(stage.batches)), jax.random.key(0))


def demonstration_rows(conversations, split, tokenizer, length=32):
    """The last assistant turn of each conversation and what comes before it."""
    rows = []
    for line in (conversations / f"{split}.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        answer = [*tokenizer.encode(messages[-1]["content"]), tokenizer.eos_id]
        prompt = chat.render_prompt(
            tokenizer, messages[:-1], max_tokens=max(16, length - len(answer))
        )
        rows.append((prompt, answer))
    return rows


def test_demonstrations_score_0_when_normalized_on_them(conversations, finished):
    """What is logged is of the rewards before: means of demonstrations and of held-out answers."""
    demonstrations = (chats(conversations, "test"),)
    values = stage_values(
        "reward",
        conversations,
        finished,
        normalize="demonstrations",
        demonstrations=demonstrations,
    )
    stage, first = started(values)
    finished_stage = stage.finish(first)
    kept = finished_stage.models["model"]
    model, params, tokenizer = kept.model, kept.params, kept.tokenizer
    rows = demonstration_rows(conversations, "test", tokenizer)
    np.testing.assert_allclose(
        rewards_of_rows(model, params, tokenizer, rows, 32).mean(), 0, atol=2e-5
    )
    before = rewards_of_rows(model, first.params, tokenizer, rows, 32)
    assert abs(before.mean()) > 1e-3
    answers = rewards_of_rows(
        model, first.params, tokenizer, validation_rows(finished), 32
    )
    means = {"demonstration_mean": before.mean(), "reference_mean": answers.mean()}
    logged = finalize(jax.device_get(finished_stage.metrics))
    uncut = demonstration_rows(conversations, "test", tokenizer, length=1000)
    cut = [
        len(whole) > len(prompt)
        for (whole, _), (prompt, _) in zip(uncut, rows, strict=True)
    ]
    means |= {"demonstrations_cut": np.mean(cut)}
    assert logged == pytest.approx(
        means | {"reference_std": answers.std()}, rel=1e-3, abs=2e-5
    )
    np.testing.assert_array_equal(
        params["head"]["kernel"], first.params["head"]["kernel"]
    )


def test_demonstrations_without_their_sources_are_refused(conversations, finished):
    with pytest.raises(ConfigError, match="demonstrations"):
        started(
            stage_values("reward", conversations, finished, normalize="demonstrations")
        )


def test_pitfall_36_a_reward_of_nan_centers_nothing(finished, tmp_path, monkeypatch):
    """Only a completion that exists counts; a mean of NaN would be the bias of the new model."""
    rewards, valid = (
        np.array([[1.0, np.nan], [np.nan, 2.0]]),
        np.array([[1.0, 0.0], [1.0, 1.0]]),
    )
    samples = (rewards, valid, np.zeros(2), {})
    monkeypatch.setattr(stages.find("recenter"), "_score_rows", lambda *_: samples)
    said = (
        r"^recenter\.init_from=.*/04_reward: the score of prompt 1, response 0 is nan"
    )
    with pytest.raises(DataError, match=said):
        recenter(
            finished,
            tmp_path,
            preferences=(str(finished / "03_collect" / "preferences"),),
            length=32,
        )
    assert not (tmp_path / "recentered" / "model").exists()


def recenter(finished, tmp_path, **values):
    config = stage_config(
        "recenter", init_from=str(finished / "04_reward"), batch_size=8, **values
    )
    recipe.run(config, tmp_path / "recentered")
    return store.load(tmp_path / "recentered", ONE)


def test_recentring_moves_the_bias_alone(conversations, finished, saved, tmp_path):
    new = recenter(
        finished,
        tmp_path,
        demonstrations=(chats(conversations, "validation"),),
        length=32,
    )
    before, after = (jax.tree.map(np.asarray, one.params) for one in (saved, new))
    assert before["head"].pop("bias") != after["head"].pop("bias")
    jax.tree.map(np.testing.assert_array_equal, before, after)
    tokenizer = new.tokenizer
    rows = demonstration_rows(conversations, "validation", tokenizer)
    np.testing.assert_allclose(
        rewards_of_rows(new.model, new.params, tokenizer, rows, 32).mean(), 0, atol=2e-5
    )


def test_recentring_on_a_policys_answers_and_on_completions(
    conversations, finished, saved, tmp_path
):
    sampling = {
        k: tiny.SAMPLING[k] for k in ("prompt_length", "max_new_tokens", "temperature")
    }
    prompts = {
        "source": chats(conversations, "test"),
        "limit": 6,
    }  # fewer than a batch: fillers must not count
    new = recenter(
        finished,
        tmp_path / "a",
        policy=str(finished / "02_sft"),
        prompts=prompts,
        **sampling,
    )
    again = stage_config(
        "recenter",
        init_from=str(tmp_path / "a" / "recentered"),
        batch_size=8,
        policy=str(finished / "02_sft"),
        prompts=prompts,
        **sampling,
    )
    assert abs(recipe.run(again, tmp_path / "again")["recenter/reference_mean"]) < 2e-5
    assert float(new.params["head"]["bias"]) != float(saved.params["head"]["bias"])
    folder = str(finished / "03_collect" / "preferences")
    new = recenter(finished, tmp_path / "b", preferences=(folder,), length=32)
    lines = (
        (finished / "03_collect" / "preferences" / "train.jsonl")
        .read_text()
        .splitlines()
    )
    rows = [
        (row["prompt_tokens"], ids)
        for row in map(json.loads, lines)
        for ids in row["completion_tokens"]
    ]
    tokenizer = new.tokenizer
    np.testing.assert_allclose(
        rewards_of_rows(new.model, new.params, tokenizer, rows, 32).mean(), 0, atol=2e-5
    )


def test_recentring_needs_exactly_one_kind_of_samples(finished, tmp_path):
    with pytest.raises(
        ConfigError, match="one of policy, preferences and demonstrations"
    ):
        recenter(finished, tmp_path, length=32)


# ------------------------------------------------------------------ ensembles


@pytest.fixture(scope="module")
def members(finished, saved, tmp_path_factory):
    """Three reward models of one shape: the trained one and two with other heads."""
    folder = tmp_path_factory.mktemp("members")
    for i in range(3):
        params = (
            {**saved.params, "head": saved.model.init(jax.random.key(i))["head"]}
            if i
            else saved.params
        )
        store.save(
            folder / f"m{i}" / "model",
            store.SavedModel(saved.model, params, saved.tokenizer),
        )
    return [str(folder / f"m{i}") for i in range(3)]


def rows_to_score(n=8):
    tokens = (
        np.random.default_rng(0).integers(4, tiny.VOCAB, size=(n, 32)).astype(np.int32)
    )
    segments = np.ones((n, 32), np.int32)
    segments[::2, 28:] = 0
    return tokens, segments, np.ones((n, 8), np.float32)


def composed(members, tmp_path, **options):
    config = stage_config(
        "compose", members=tuple({"reward": m} for m in members), **options
    )
    recipe.run(config, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def one_by_one(members):
    """[members, rows] float64: what each gives."""
    scores = []
    for name in members:
        one = store.load(name, ONE)
        scores.append(
            np.asarray(
                ModelReward(one.model, one.params)(*map(jnp.asarray, rows_to_score()))
            )
        )
    return np.array(scores, np.float64)


FOUR = make_layout(MeshConfig(data=2, fsdp=2))
BY = ("mean-one", "worst-four", "pessimistic-four")


@pytest.mark.parametrize(
    "how, layout", [("mean", ONE), ("worst", FOUR), ("pessimistic", FOUR)], ids=BY
)
def test_an_ensembles_score_is_what_its_members_give_one_by_one(
    how, layout, one_by_one, members, tmp_path
):
    tokenizer = load_tokenizer(store.find(members[0]))
    folder = composed(members, tmp_path, combine=how, coefficient=0.7)
    tokens, segments, mask = rows_to_score()
    placed = layout.put({"tokens": tokens, "segments": segments, "mask": mask})
    with layout.use():
        reward = load_reward(str(folder), layout, tokenizer)
        scores, pairs = score(
            reward, placed["tokens"], placed["segments"], placed["mask"]
        )
        plain = reward(placed["tokens"], placed["segments"], placed["mask"])
    mean, std = (
        one_by_one.mean(0),
        np.sqrt(((one_by_one - one_by_one.mean(0)) ** 2).mean(0)),
    )
    expected = {
        "mean": mean,
        "worst": one_by_one.min(0),
        "pessimistic": mean - 0.7 * std,
    }[how]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(plain, scores)
    total, weight = pairs["reward_disagreement"]
    np.testing.assert_allclose(float(total) / float(weight), std.mean(), rtol=1e-4)


def test_an_ensemble_costs_one_forward_whatever_its_size(members, tmp_path):
    """The number of matrix products in the program does not grow with the members.

    They are one batched product.
    """
    tokenizer = load_tokenizer(store.find(members[0]))
    products = []
    for some in (members[:2], members):
        reward = load_reward(
            str(composed(some, tmp_path / str(len(some)), combine="mean")),
            ONE,
            tokenizer,
        )
        tokens, segments, _ = map(jnp.asarray, rows_to_score())
        products.append(
            str(
                jax.make_jaxpr(reward._rewards)(reward.stacked, tokens, segments)
            ).count("dot_general")
        )
    assert products[0] == products[1] > 0


def test_the_workdir_of_an_ensemble_can_be_moved(members, tmp_path, saved):
    (tmp_path / "run").mkdir()
    for i in range(2):
        store.save(tmp_path / "run" / f"m{i}" / "model", saved)
    names = [str(tmp_path / "run" / f"m{i}") for i in range(2)]
    composed(names, tmp_path / "run" / "ensemble", combine="worst")
    (tmp_path / "run").rename(tmp_path / "moved")
    reward = load_reward(str(tmp_path / "moved" / "ensemble"), ONE, saved.tokenizer)
    rows = tuple(map(jnp.asarray, rows_to_score()))
    np.testing.assert_allclose(
        reward(*rows), ModelReward(saved.model, saved.params)(*rows), rtol=1e-5
    )


@pytest.mark.slow
def test_a_policy_trains_on_an_ensemble_and_its_value_starts_from_the_first_member(
    members, conversations, finished, tmp_path
):
    folder = composed(members, tmp_path, combine="pessimistic")
    values = stage_values("ppo", conversations, finished, reward=str(folder))
    config = recipe.check(values, "ppo")
    stage = stages.find("ppo").build(config, ONE)
    first = stage.start(
        state.create_sharded(stage.init, jax.random.key(0), stage.axes, ONE)
    )
    expected = store.load(members[0], ONE).params
    jax.tree.map(np.testing.assert_array_equal, first.params["value"], expected)
    metrics, _ = run_steps("ppo", values, ONE, steps=1)
    assert np.isfinite(metrics[0]["score"])


def test_what_is_no_ensemble_is_refused(members, finished, tmp_path):
    with pytest.raises(ConfigError, match="needs at least 2, got 1"):
        composed(members[:1], tmp_path, combine="mean")
    folder = composed([members[0], "gold:sentiment"], tmp_path / "b", combine="worst")
    with pytest.raises(
        ConfigError, match="gold:sentiment: an ensemble has reward models, not 'gold'"
    ):
        load_reward(str(folder), ONE, load_tokenizer(store.find(members[0])))
    with pytest.raises(ConfigError, match="weight and where"):
        config = {"reward": members[0], "weight": 2.0}, {"reward": members[1]}
        recipe.run(
            stage_config("compose", members=config, combine="mean"), tmp_path / "c"
        )


def test_a_weighted_sum_adds_its_members_and_reports_each(members, tmp_path):
    from rlhfjax.rewards.gold import Sentiment

    tokenizer = load_tokenizer(store.find(members[0]))
    config = stage_config(
        "compose",
        members=(
            {"reward": members[1], "name": "rm", "weight": 0.5},
            {"reward": "gold:sentiment", "name": "gold", "weight": 2.0},
        ),
    )
    recipe.run(config, tmp_path)
    rows = tuple(map(jnp.asarray, rows_to_score()))
    scores, pairs = score(load_reward(str(tmp_path), ONE, tokenizer), *rows)
    one = store.load(members[1], ONE)
    rm = np.asarray(ModelReward(one.model, one.params)(*rows))
    answers = [tokenizer.decode(row[-8:].tolist()) for row in np.asarray(rows[0])]
    gold = np.array([Sentiment().score(answer) for answer in answers], np.float32)
    np.testing.assert_allclose(scores, 0.5 * rm + 2 * gold, rtol=1e-5)
    np.testing.assert_allclose(pairs["score_rm"], (rm.sum(), 8), rtol=1e-5)
    np.testing.assert_allclose(pairs["score_gold"], (gold.sum(), 8), rtol=1e-5)
