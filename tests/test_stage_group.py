"""The group stage: its estimators on their own programs in the world of `benchmarks.optimum`.

And the whole stage.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import optimum
from benchmarks.optimum import EOS, PAD, TEMPERATURE
from rlhfjax import recipe, stages
from rlhfjax import state as states
from rlhfjax.algos import group as estimators
from rlhfjax.algos import kl
from rlhfjax.config import to_dict
from rlhfjax.data.batches import PromptBatch
from rlhfjax.data.tokenizer import load_tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.metrics import finalize
from rlhfjax.models.transformer import Model
from rlhfjax.optim import OptimConfig
from rlhfjax.rl import task
from rlhfjax.rl.config import HumanConfig, PtxConfig
from rlhfjax.rl.prompts import policy_batches
from rlhfjax.rl.rewards import add_human_reward
from rlhfjax.rl.rollout import Rollout, TokenIds
from rlhfjax.stages import group
from tests import small_world
from tests.small_world import response_logprobs
from tests.test_resume import _Crash, assert_same_stage, interrupt
from tests.test_stages import run_steps, stage_values

KEY = jax.random.key(5)
ONE = make_layout(MeshConfig(), jax.devices()[:1])
SGD = OptimConfig(
    name="sgd", learning_rate=0.1, b1=0.0, schedule="constant", clip_norm=0.0
)


def begin(estimator, **changes):
    config = optimum.group_config(
        4, estimator=estimator, **{"optim": SGD, "batch_size": 8, **changes}
    )
    return small_world.begin(config)


def iterate(algorithm, state, reference, key=KEY):
    """(state, experience, metrics) after one iteration."""
    _, episodes, pairs = optimum.experience(algorithm, state, reference, key)
    state, more = algorithm.programs.update(
        state, episodes, None, pairs, jax.random.fold_in(key, 1)
    )
    return state, episodes, finalize(jax.device_get({**pairs, **more}))


def assert_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def scores_and_penalties(algorithm, reference, rollout, beta):
    """The score and beta log pi/rho of each answer, in numpy."""
    rows = (rollout.tokens, rollout.attention_mask, 2, TEMPERATURE)
    ref = response_logprobs(algorithm.model, reference, *rows)[0]
    spent = (
        (np.asarray(rollout.logprobs, np.float64) - np.asarray(ref))
        * np.asarray(rollout.mask)
    ).sum(1)
    return np.asarray(
        optimum.reward(rollout.tokens, rollout.attention_mask, rollout.mask)
    ), beta * spent


# ------------------------------------------------------------------ advantages


def test_advantages_are_made_within_groups_of_consecutive_answers():
    """Against plain loops, at a policy that has left the reference, so that the KL in the reward
    counts.
    """
    algorithm, state, reference = begin("rloo")
    params = {"policy": small_world.moved(reference, 0.1)}
    rollout, _, _ = optimum.experience(
        algorithm, state.replace(params=params), reference, KEY
    )
    known = algorithm.programs.forward(params, reference, rollout)
    scores, penalties = scores_and_penalties(
        algorithm, reference, rollout, optimum.BETA
    )
    rewards = scores - penalties
    for name in ("rloo", "grpo", "dr_grpo", "dapo"):
        algorithm, state, _ = begin(name)
        episodes, pairs = algorithm.programs.make_experience(
            state, known, rollout, scores
        )
        assert abs(float(pairs["kl"][0])) > 0.05
        for first in range(0, 64, 8):
            for i in range(first, first + 8):
                others = [rewards[j] for j in range(first, first + 8)]
                advantage = rewards[i] - np.mean(others)
                if name == "rloo":
                    advantage = rewards[i] - np.mean(
                        [rewards[j] for j in range(first, first + 8) if j != i]
                    )
                if name in ("grpo", "dapo"):
                    rows = slice(first, first + 8)
                    advantage = scores[i] - np.mean(scores[rows])
                    advantage /= np.std(scores[rows], ddof=1) + 1e-4
                    advantage -= penalties[i] - np.mean(penalties[rows])
                assert float(episodes.advantages[i]) == pytest.approx(
                    advantage, rel=2e-3, abs=2e-4
                )


def test_the_kl_of_rloo_is_subtracted_from_the_score_and_has_no_gradient():
    """The gradient is that of -sum_t A log pi, A a number: nothing of beta is left in the loss."""
    algorithm, state, reference = begin("rloo", kl=optimum.KLConfig(2.0))
    _, episodes, _ = optimum.experience(algorithm, state, reference, KEY)

    def by_hand(params):
        logprobs = response_logprobs(
            algorithm.model,
            params,
            episodes.tokens,
            episodes.attention_mask,
            2,
            TEMPERATURE,
        )[0]
        return -jnp.mean(
            jnp.asarray(episodes.advantages) * (logprobs * episodes.mask).sum(1)
        )

    loss = algorithm.programs.loss
    ours = jax.jit(
        jax.grad(lambda p, beta: loss({"policy": p}, episodes, None, beta)[0])
    )
    expected = jax.jit(jax.grad(by_hand))(reference)
    for beta in (0.0, 2.0):
        assert_close(ours(reference, beta), expected, rtol=1e-4, atol=1e-6)


def test_the_kl_of_grpo_is_k3_in_the_loss():
    """mean over answers of 1/|o| sum_t (-A + beta k3) at ratio 1.

    The scores are not touched by it.
    """
    algorithm, state, reference = begin("grpo", kl=optimum.in_loss("grpo"))
    state, _, _ = iterate(algorithm, state, reference)
    rollout, episodes, _ = optimum.experience(algorithm, state, reference, KEY)
    groups = np.asarray(
        optimum.reward(rollout.tokens, rollout.attention_mask, rollout.mask)
    ).reshape(-1, 8)
    expected = (groups - groups.mean(1, keepdims=True)) / (
        groups.std(1, keepdims=True, ddof=1) + 1e-4
    )
    np.testing.assert_allclose(
        episodes.advantages, expected.ravel(), rtol=1e-4, atol=1e-5
    )
    k3 = kl.k3(episodes.logprobs, episodes.ref_logprobs)
    length = episodes.mask.sum(1)
    loss = jnp.mean(-episodes.advantages + 0.4 * (k3 * episodes.mask).sum(1) / length)
    ours, _ = jax.jit(algorithm.programs.loss)(state.params, episodes, None, 0.4)
    assert float(ours) == pytest.approx(float(loss), abs=2e-5)


def test_the_moving_baseline_is_the_average_of_the_iterations_before():
    """After rewards m1, m2 with decay d.

    Baseline (d m1 + m2) / (d + 1), without the zero that it began with.
    """
    algorithm, state, reference = begin(
        "reinforce", baseline_decay=0.8, kl=optimum.KLConfig(0.0)
    )
    means = []
    for step in range(3):
        rollout, episodes, pairs = optimum.experience(
            algorithm, state, reference, jax.random.fold_in(KEY, step)
        )
        scores = np.asarray(
            optimum.reward(rollout.tokens, rollout.attention_mask, rollout.mask)
        )
        weights = 0.8 ** np.arange(len(means))[::-1]
        baseline = np.dot(weights, means) / weights.sum() if means else 0.0
        np.testing.assert_allclose(episodes.advantages, scores - baseline, atol=1e-5)
        means.append(scores.mean())
        state, _ = algorithm.programs.update(state, episodes, None, pairs, KEY)


def test_minibatches_do_not_change_advantages_and_visit_every_answer_once():
    """Two halves with a vanishing step: the sum of their gradients is that of the whole batch."""
    small = dataclasses.replace(SGD, learning_rate=1e-4)
    after = []
    for minibatches in (1, 2):
        rate = dataclasses.replace(
            small, learning_rate=small.learning_rate / minibatches
        )
        algorithm, state, reference = begin("rloo", minibatches=minibatches, optim=rate)
        start = jax.device_get(reference)
        state, _, _ = iterate(algorithm, state, reference)
        after.append(
            jax.tree.map(
                lambda a, b: (np.asarray(a) - b) / 1e-4,
                jax.device_get(state.params["policy"]),
                start,
            )
        )
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(after[0])) > 0.1
    assert_close(after[1], after[0], atol=0.01)


def test_the_baseline_follows_what_the_advantages_are_made_of(monkeypatch):
    """Rewards less the KL, 8 / 4, and not scores: 0.8 * 1 + 0.2 * 2.

    The rate of 0.1 is linear over the four updates.
    """
    options = {
        "optim": dataclasses.replace(SGD, schedule="linear"),
        "baseline_decay": 0.8,
    }
    options |= {"batch_size": 4, "samples_per_prompt": 1, "epochs": 2, "minibatches": 2}
    config = optimum.group_config(1, estimator="reinforce", **options)
    programs = group.programs(config, Model(optimum.SHAPE), TokenIds(EOS, PAD))

    def loss(params, batch, key, beta):
        one = (jnp.ones(()), jnp.ones(()))
        return params["policy"], {"loss": one, "ratio_max": one}

    small_world.with_loss(monkeypatch, group, loss)
    extra = {"kl_coefficient": jnp.float32(0.0), "baseline": jnp.float32(1.0)}
    state = states.TrainState.create({"policy": jnp.zeros(())}, programs.tx, **extra)
    batch = group.Experience(*[jnp.zeros((4, 1))] * 6)
    sums = {"advantage_reward": 8.0, "score": 40.0, "reward": 400.0, "kl": 0.0}
    pairs = {name: (jnp.float32(total), jnp.float32(4)) for name, total in sums.items()}
    state, _ = programs.update(state, batch, None, pairs, KEY)
    assert float(state.extra["baseline"]) == pytest.approx(1.2, rel=1e-6)
    moved = -0.1 * (1 + 3 / 4 + 1 / 2 + 1 / 4)
    assert float(state.params["policy"]) == pytest.approx(moved, rel=1e-6)


# ------------------------------------------------------------------ losses

RATIOS = [[1.5, 0.5, 1.1], [1.5, 0.5, 1.0]]
LENGTHS, ADVANTAGES, APART = (
    (3, 2),
    (1.0, -2.0),
    0.4,
)  # APART: log pi/rho of every token


def surrogates(low, high):
    """-min(rho A, clip(rho) A) of every token, a list per response."""
    rows = zip(RATIOS, LENGTHS, ADVANTAGES, strict=True)
    clip = lambda ratio: min(max(ratio, 1 - low), 1 + high)  # noqa: E731
    return [[-min(x * a, clip(x) * a) for x in ratios[:n]] for ratios, n, a in rows]


@pytest.mark.parametrize("place", ["reward", "loss"])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_a_surrogate_has_the_configs_clips_length_and_kl(name, place):
    config = optimum.group_config(
        1,
        estimator=name,
        clip=0.2,
        clip_high=0.4,
        max_new_tokens=5,
        kl=optimum.KLConfig(0.5, place=place),
    )
    logprobs = jnp.full((2, 3), -1.0)
    mask = jnp.arange(3) < jnp.array(LENGTHS)[:, None]
    batch = group.Experience(
        tokens=None,
        attention_mask=None,
        mask=jnp.float32(mask),
        logprobs=logprobs - jnp.log(jnp.array(RATIOS)),
        advantages=jnp.array(ADVANTAGES),
        ref_logprobs=logprobs - APART,
    )
    loss, _ = group.ESTIMATORS[name].loss(config, logprobs, batch, 0.3)
    rows = surrogates(0.2, 0.4 if name == "dapo" else 0.2)
    k3 = np.exp(-APART) - 1 + APART
    expected = {
        "grpo": np.mean([np.mean(row) for row in rows])
        + (0.3 * k3 if place == "loss" else 0.0),
        "dr_grpo": sum(sum(row) for row in rows) / (2 * 5),
        "dapo": sum(sum(row) for row in rows) / 5,
    }
    assert float(loss) == pytest.approx(expected[name], rel=1e-5)


def test_entropy_and_kl_join_the_loss_of_dapo():
    """At ratio 1: -A + 0.7 k2 - 0.5 H over tokens, 0.7 the coefficient that the KL has come to."""
    kl_config = optimum.KLConfig(0.2, place="loss", estimator="k2")
    algorithm, _, reference = begin("dapo", entropy_coefficient=0.5, kl=kl_config)
    tokens = jnp.array([[1, 3, 4, 4], [1, 4, 5, EOS]])
    mask = jnp.ones((2, 2))
    segments = jnp.ones_like(tokens)

    @jax.jit
    def terms(params):
        rows = (tokens, segments, 2, TEMPERATURE)
        logprobs, entropy = response_logprobs(algorithm.model, params, *rows)
        others = {
            "advantages": jnp.array([1.0, -3.0]),
            "ref_logprobs": logprobs - APART,
        }
        batch = group.Experience(tokens, segments, mask, logprobs, **others)
        return algorithm.programs.loss({"policy": params}, batch, None, 0.7)[
            0
        ], entropy.mean()

    loss, entropy = terms(reference)
    assert float(entropy) > 0.5
    expected = 1.0 + 0.7 * APART**2 / 2 - 0.5 * float(entropy)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------ what counts


SMALL = {"batch_size": 2, "samples_per_prompt": 4, "kl": optimum.KLConfig(0.0)}


@functools.cache
def two_groups():
    """(rollout, what forward passes say of it).

    In the second group of 4 one answer ends and three hit the limit.
    """
    algorithm, state, reference = begin("dapo", **SMALL)
    tokens = jnp.array([[1, 3, EOS, PAD]] * 4 + [[1, 4, 4, 4]] * 3 + [[1, 4, 5, EOS]])
    mask = (tokens[:, 2:] != PAD).astype(jnp.float32)
    segments = (tokens != PAD).astype(jnp.int32)
    logprobs = (
        response_logprobs(algorithm.model, reference, tokens, segments, 2, TEMPERATURE)[
            0
        ]
        * mask
    )
    rollout = Rollout(tokens, segments, mask, logprobs)
    return rollout, algorithm.programs.forward(state.params, reference, rollout)


def crafted(estimator, beta=0.0, nats=0.0, **changes):
    """The experience of two groups of 4, with equal rewards in the first.

    Answers are `nats` [8] likelier than under the reference, at their first token.
    """
    algorithm, state, _ = begin(
        estimator, **SMALL | {"kl": optimum.KLConfig(beta)}, **changes
    )
    rollout, known = two_groups()
    known = known._replace(ref_logprobs=known.logprobs.at[:, 0].add(-nats))
    scores = jnp.array([0.5] * 4 + [0.1, 0.2, 0.3, 0.4])
    return algorithm.programs.make_experience(state, known, rollout, scores)


def test_informative_share_is_logged_and_may_be_all_that_counts():
    episodes, pairs = crafted("dapo")
    assert finalize(jax.device_get(pairs))["informative"] == 0.5
    np.testing.assert_array_equal(episodes.advantages[:4], 0)
    assert float(episodes.mask.sum()) == 12
    episodes, _ = crafted("dapo", only_informative=True)
    np.testing.assert_array_equal(episodes.mask.sum(1), [0, 0, 0, 0, 2, 2, 2, 2])


@pytest.mark.parametrize("estimator", ["grpo", "dapo"])
def test_pitfall_38_a_group_of_equal_scores_has_the_kls_advantage_alone(estimator):
    """KLs of 0.1 .. 0.4 nats, beta 0.5: -0.5 (KL - 0.25), which the KLs' std would make +-1.14."""
    nats = jnp.array([0.1, 0.2, 0.3, 0.4] * 2)
    episodes, pairs = crafted(estimator, beta=0.5, nats=nats)
    of_kl = np.array([0.075, 0.025, -0.025, -0.075])
    np.testing.assert_allclose(episodes.advantages[:4], of_kl, atol=1e-6)
    # Scores 0.1 .. 0.4: deviations of -0.15 .. 0.15, unbiased variance 0.05 / 3.
    of_scores = np.array([-0.15, -0.05, 0.05, 0.15]) / (np.sqrt(0.05 / 3) + 1e-4)
    np.testing.assert_allclose(episodes.advantages[4:], of_scores + of_kl, rtol=1e-5)
    metrics = finalize(jax.device_get(pairs))
    assert metrics["informative"] == 0.5
    assert metrics["kl"] == pytest.approx(0.25, rel=1e-5)
    assert metrics["group_std"] == pytest.approx(
        np.std([0.1, 0.2, 0.3, 0.4]) / 2, rel=1e-5
    )
    counted, _ = crafted(estimator, beta=0.5, nats=nats, only_informative=True)
    np.testing.assert_array_equal(counted.mask[:4], 0)


def test_overlong_answers_are_left_out_or_penalized():
    episodes, pairs = crafted("dapo", overlong="leave_out")
    np.testing.assert_array_equal(episodes.mask.sum(1), [1, 1, 1, 1, 0, 0, 0, 2])
    assert (
        finalize(jax.device_get(pairs))["response_length"] == 12 / 8
    )  # what was sampled, not what counts
    _, pairs = crafted("dapo", overlong_soft=1)  # two tokens of two: -1
    assert finalize(jax.device_get(pairs))["reward"] == pytest.approx(
        (4 * 0.5 + 1.0 - 4) / 8
    )
    assert finalize(jax.device_get(pairs))["score"] == pytest.approx(
        (4 * 0.5 + 1.0) / 8
    )


def test_a_batch_in_which_nothing_counts_leaves_the_policy_as_it_is():
    """Pitfall 23: a mean over no tokens is 0, not NaN."""
    algorithm, state, reference = begin("grpo", **SMALL, only_informative=True)
    episodes, pairs = crafted("grpo", only_informative=True)
    nothing = episodes._replace(mask=jnp.zeros_like(episodes.mask))
    before = jax.device_get(reference)
    state, more = algorithm.programs.update(state, nothing, None, pairs, KEY)
    assert_close(state.params["policy"], before, atol=0)
    assert all(np.isfinite(v) for v in finalize(jax.device_get(more)).values())


def test_repeated_prompts_are_consecutive_and_resumable(finished):
    class Counting:
        n = 0

        def __next__(self):
            self.n += 1
            tokens = np.arange(6).reshape(3, 2) + self.n
            return PromptBatch(tokens=tokens, attention_mask=None, index=None, cut=None)

        def get_state(self):
            return self.n

        def set_state(self, state):
            self.n = state

    config = optimum.group_config(1, samples_per_prompt=2, batch_size=4)
    tokenizer = load_tokenizer(finished / "00_tokenizer")
    stream = policy_batches(PtxConfig(), Counting(), tokenizer, config, ONE)
    np.testing.assert_array_equal(
        next(stream).prompts.tokens, [[1, 2], [1, 2], [3, 4], [3, 4], [5, 6], [5, 6]]
    )
    position, second = stream.get_state(), next(stream)
    assert position == 1
    stream.set_state(position)
    np.testing.assert_array_equal(next(stream).prompts.tokens, second.prompts.tokens)


# ------------------------------------------------------------------ the whole stage


def group_values(conversations, finished, estimator, **changes):
    """The tiny recipe's PPO as a group stage."""
    known = {f.name for f in dataclasses.fields(group.Config)}
    values = {
        k: v
        for k, v in stage_values("ppo", conversations, finished).items()
        if k in known
    }
    own = {
        "stage": "group",
        "estimator": estimator,
        "batch_size": 4,
        "samples_per_prompt": 4,
        "epochs": 1,
        "minibatches": 2,
    }
    if estimator == "grpo":
        own["kl"] = {"coefficient": 0.04, "place": "loss", "estimator": "grpo"}
    return values | own | changes


OTHERS = [
    pytest.param(name, marks=pytest.mark.nightly)
    for name in group.ESTIMATORS
    if name != "grpo"
]


@pytest.mark.parametrize("estimator", ["grpo", *OTHERS])
def test_pitfall_03_first_ratio_of_a_group_stage_is_one_and_kl_zero(
    estimator, conversations, finished
):
    """Temperature 0.9, policy == reference. Pitfall 7.

    The answers of one group are not copies of each other.
    """
    values = group_values(
        conversations, finished, estimator, minibatches=1, ptx={}, log={}
    )
    assert values["temperature"] == 0.9
    metrics, _ = run_steps("group", values, ONE, steps=1)
    assert abs(metrics[0]["first_ratio_max"] - 1) < 2e-5
    assert metrics[0]["approx_kl"] < 1e-9
    assert abs(metrics[0]["kl"]) < 1e-4
    assert metrics[0]["group_std"] > 1e-3


def test_a_human_reward_is_added_less_and_less_by_hand():
    config = HumanConfig(reward="x", weight=0.5, factor=0.25)
    scores, pairs = add_human_reward(
        config, np.array([1.0, 2.0]), np.array([8.0, -16.0]), jnp.int32(2)
    )
    np.testing.assert_allclose(
        scores, [1 + 8 / 32, 2 - 16 / 32]
    )  # 0.5 * 0.25^2 = 1 / 32
    assert finalize(jax.device_get(pairs)) == {"human": -4, "human_weight": 1 / 32}


@pytest.fixture(scope="module")
def with_a_human(conversations, finished):
    """(calls, metrics) of two steps of RLOO whose reward and human reward are the same rule."""
    rule = "rule:tests.rewards.some_rules:letters?workers=1"
    human = {"reward": rule, "weight": 0.5, "factor": 0.25}
    values = group_values(
        conversations, finished, "rloo", reward=rule, ptx={}, human=human
    )
    called = []

    def told(name, function):
        return lambda *args: called.append(name) or function(*args)

    programs = group.programs

    def spied(*args):
        found = programs(*args)
        return found._replace(forward=told("forward", found.forward))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "score", told("score", task.score))
        patch.setattr(group, "programs", spied)
        metrics, _ = run_steps("group", values, ONE)
    return called, metrics


def test_the_device_has_its_work_before_a_rule_scores(with_a_human):
    """Dispatch is asynchronous: what needs no score is asked for first, and computed while the host
    scores.
    """
    assert with_a_human[0] == ["forward", "score"] * 2


def test_a_stage_adds_its_human_reward(with_a_human):
    """R + w H with H = R: the score is (1 + w) times what the human gives."""
    for step, metrics in enumerate(with_a_human[1]):
        weight = 0.5 * 0.25**step
        assert metrics["human_weight"] == weight and metrics["human"] > 0
        assert metrics["score"] == pytest.approx(
            (1 + weight) * metrics["human"], abs=1e-6
        )


@pytest.mark.nightly
@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_four_devices_give_what_one_gives(estimator, conversations, finished):
    values = group_values(conversations, finished, estimator, epochs=2)
    one, params = run_steps("group", values, ONE)
    four, others = run_steps("group", values, make_layout(MeshConfig(data=2, fsdp=2)))
    for a, b in zip(one, four, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=2e-4)
    assert_close(params, others, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_pitfall_17_accumulation_does_not_change_the_update(conversations, finished):
    """DAPO's mean is over tokens, of which microbatches have unequal numbers."""
    sgd = {"name": "sgd", "learning_rate": 1e-2, "b1": 0.0, "schedule": "constant"}
    results = []
    for microbatches in (1, 4):
        values = group_values(
            conversations, finished, "dapo", optim=sgd, microbatches=microbatches
        )
        results.append(run_steps("group", values, ONE, steps=1)[1])
    assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_pitfall_30_a_group_stage_that_crashed_goes_on_to_the_same_bits(
    conversations, finished, tmp_path, monkeypatch
):
    """REINFORCE carries the most: moving baseline, KL coefficient, average of weights, two data
    positions.
    """
    values = group_values(conversations, finished, "reinforce", steps=4)
    recipe.run_stage(values, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, "group", 3, "exception")
        with pytest.raises(_Crash):
            recipe.run_stage(values, tmp_path / "run")
    recipe.run_stage(values, tmp_path / "run")
    assert_same_stage(tmp_path / "whole", tmp_path / "run")
    assert (tmp_path / "run" / "model" / "config.json").exists()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "group/val_kl" in lines and "group/val_gold" in lines


REFUSED = {
    "must be >= 2, rloo compares responses": {"samples_per_prompt": 1, "batch_size": 8},
    "there can be grpo": {
        "estimator": "grpo",
        "kl": {"place": "loss", "estimator": "k3"},
    },
    "put the KL in the reward": {
        "estimator": "dr_grpo",
        "kl": {"place": "loss", "estimator": "k3"},
    },
    "there can be sequence": {"kl": {"place": "loss", "estimator": "k1"}},
    "must be 0 with rloo; only the loss of dapo is a mean over tokens": {
        "entropy_coefficient": 0.1
    },
    "overlong_soft=9: must be <= max_new_tokens=8": {"overlong_soft": 9},
    "every response hits": {"overlong": "leave_out", "stop_at_eos": False},
    "clip=0.0: expected float >= 1.2e-38": {"clip": 0.0},
    "baseline_decay=1.0: expected float >= 0 and < 1": {
        "estimator": "reinforce",
        "baseline_decay": 1.0,
    },
    "which has no groups": {"estimator": "reinforce", "only_informative": True},
    "batch_size times samples_per_prompt=16": {"minibatches": 3},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_meant_is_refused(message):
    options = {
        "init_from": "x",
        "reward": "y",
        "prompt_length": 24,
        "max_new_tokens": 8,
        "batch_size": 4,
        "steps": 2,
    }
    values = stages.stage_config("group", **options | REFUSED[message])
    with pytest.raises(ConfigError, match=message) as refused:
        group.validate(recipe.check(to_dict(values), "group"), ONE, None)
    assert "\n" not in str(refused.value) and str(refused.value).startswith("group.")


def test_the_estimators_are_those_of_algos():
    assert group.ESTIMATORS["grpo"].advantages is estimators.grpo_advantages
    options = {
        "init_from": "x",
        "reward": "y",
        "prompt_length": 8,
        "max_new_tokens": 8,
        "batch_size": 4,
        "steps": 1,
    }
    with pytest.raises(ConfigError, match="expected one of 'rloo'"):
        recipe.check(
            {**to_dict(stages.stage_config("group", **options)), "estimator": "ppo"},
            "group",
        )
