"""Known ways that RLHF code goes wrong, where several modules have a part in it and no other test
holds the whole.
"""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import optimum
from benchmarks.optimum import TEMPERATURE
from rlhfjax import main, recipe, stages, train
from rlhfjax.checkpoint import Checkpoints
from rlhfjax.config import CheckpointConfig, LogConfig, TrainConfig, to_dict
from rlhfjax.data.preferences import read_preferences
from rlhfjax.data.tokenizer import load_tokenizer
from rlhfjax.errors import ConfigError, Interrupted, Preempted
from rlhfjax.mesh import make_layout
from rlhfjax.metrics import finalize
from rlhfjax.optim import OptimConfig
from rlhfjax.rl.config import KLConfig
from rlhfjax.stage import Data, Finished, Stage
from rlhfjax.state import TrainState
from tests import small_world
from tests.small_world import response_logprobs

KEY = jax.random.key(13)
ONE = make_layout(devices=jax.devices()[:1])
ROOT = Path(__file__).parent.parent
SGD = OptimConfig(
    name="sgd", learning_rate=0.5, b1=0.0, schedule="constant", clip_norm=0.0
)
POLICY_STAGES = ("ppo", "group")
TARGET = 2.6  # near the KL of a policy that is `away_from` its reference


def begin(name, *, steps=4, **changes):
    """A policy stage's programs, state and reference in the world of `benchmarks.optimum`.

    64 episodes.
    """
    if name == "group":
        own = {"estimator": "dapo", "batch_size": 8, "minibatches": 1, "optim": SGD}
        return small_world.begin(optimum.group_config(steps, **(own | changes)))
    own = {
        "batch_size": 64,
        "epochs": 1,
        "minibatches": 1,
        "optim": SGD,
        "value_optim": SGD,
    }
    return small_world.begin(optimum.ppo_config(steps, **(own | changes)))


def away_from(reference, state):
    """The state with a policy that has left the reference, so that there is a KL."""
    return state.replace(
        params={**state.params, "policy": small_world.moved(reference, seed=17)}
    )


# ------------------------------------------------------------------ 4: one distribution, sampled
# from and scored


@pytest.mark.parametrize("name", POLICY_STAGES)
def test_pitfall_04_rollouts_are_drawn_from_the_whole_softmax(name):
    """Each of the 31 responses is as frequent as log pi says, the unlikely ones too.

    Log pi is what is reported.
    """
    algorithm, state, reference = begin(name)
    state = away_from(reference, state)
    prompts = jnp.repeat(jnp.asarray(optimum.PROMPTS), 2048, axis=0)
    rollout = optimum.rollout_of(algorithm, state.params["policy"], prompts, KEY)
    responses = np.asarray(rollout.responses)
    listed = {tuple(row): i for i, row in enumerate(optimum.responses()[0].tolist())}
    exact = np.exp(
        np.asarray(optimum.every_logprob(state.params["policy"])[0], np.float64)
    )
    assert exact.min() < 5e-3  # there are unlikely ones
    for prompt, p in enumerate(exact):
        rows = responses[2048 * prompt : 2048 * (prompt + 1)].tolist()
        seen = np.bincount([listed[tuple(row)] for row in rows], minlength=len(listed))
        np.testing.assert_array_less(
            np.abs(seen - 2048 * p), 4.5 * np.sqrt(2048 * p) + 2
        )
    scored = response_logprobs(
        algorithm.model,
        state.params["policy"],
        rollout.tokens,
        rollout.attention_mask,
        2,
        TEMPERATURE,
    )[0]
    np.testing.assert_allclose(rollout.logprobs, scored * rollout.mask, atol=2e-5)


@pytest.mark.parametrize("name", (*POLICY_STAGES, "collect"))
@pytest.mark.parametrize(
    "option", ({"top_k": 3}, {"top_p": 0.9}), ids=("top_k", "top_p")
)
def test_pitfall_04_a_training_stage_cannot_be_asked_to_truncate(name, option):
    options = {"init_from": "x", "prompt_length": 8, "max_new_tokens": 8}
    options |= (
        {"labeler": "gold:sentiment"}
        if name == "collect"
        else {"reward": "y", "batch_size": 8, "steps": 1}
    )
    values = to_dict(stages.stage_config(name, **options))
    recipe.check(values, name)
    with pytest.raises(ConfigError, match=next(iter(option))):
        recipe.check(values | option, name)


@pytest.mark.parametrize("name", POLICY_STAGES)
@pytest.mark.parametrize(
    "option", [{"min_p": 0.1}, {"repetition_penalty": 1.1}, {"stop": ("a",)}]
)
def test_pitfall_04_a_policy_stage_cannot_be_asked_to_shape_its_samples(name, option):
    options = {"init_from": "x", "prompt_length": 8, "max_new_tokens": 8}
    options |= {"reward": "y", "batch_size": 8, "steps": 1}
    values = to_dict(stages.stage_config(name, **options))
    with pytest.raises(ConfigError, match=next(iter(option))):
        recipe.check(values | option, name)


# ------------------------------------------------------------------ 6: the ids that were sampled


def test_pitfall_06_collected_answers_keep_their_ids(finished):
    tokenizer = load_tokenizer(finished / "02_sft" / "model")
    source = read_preferences(finished / "03_collect" / "preferences", "train")
    rows = [source[i] for i in range(len(source))]
    answers = [
        zip(row["completion_tokens"], row["completions"], strict=True) for row in rows
    ]
    ids = [(one.tolist(), text) for some in answers for one, text in some]
    assert all(tokenizer.decode(one) == text for one, text in ids)
    assert any(
        [*tokenizer.encode(text), tokenizer.eos_id] != one
        for one, text in ids
        if one[-1] == tokenizer.eos_id
    )
    assert any(
        one[-1] != tokenizer.eos_id for one, _ in ids
    )  # and what was cut off has no eos (pitfall 8)


# ------------------------------------------------------------------ 8: after the eos


@pytest.mark.parametrize("name", POLICY_STAGES)
def test_pitfall_08_what_stands_after_the_eos_is_in_no_kl_entropy_or_loss(name):
    """KL in the loss and an entropy bonus: both are sums over what was sampled, and other ids in
    the padding change neither a metric nor the gradient.
    """
    options = {
        "kl": KLConfig(0.4, place="loss", estimator="k3"),
        "entropy_coefficient": 0.1,
    }
    algorithm, state, reference = begin(name, **options)
    state = away_from(reference, state)
    rollout, episodes, pairs = optimum.experience(algorithm, state, reference, KEY)
    assert 0 < float((rollout.mask[:, 1] == 0).sum()) < len(rollout.mask)
    other = rollout._replace(
        tokens=jnp.where(rollout.attention_mask == 0, 5, rollout.tokens)
    )
    assert (np.asarray(other.tokens) != np.asarray(rollout.tokens)).any()
    changed, changed_pairs = optimum.experience_of(algorithm, state, reference, other)
    assert finalize(jax.device_get(changed_pairs)) == pytest.approx(
        finalize(jax.device_get(pairs)), abs=1e-6
    )

    @jax.jit
    def of(batch):
        loss = algorithm.programs.loss
        return jax.value_and_grad(lambda p: loss(p, batch, None, 0.4), has_aux=True)(
            state.params
        )

    found, expected = of(changed), of(episodes)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        found,
        expected,
    )
    (_, metrics), _ = expected
    rows = (rollout.tokens, rollout.attention_mask, 2, TEMPERATURE)
    logprobs, entropy = response_logprobs(
        algorithm.model, state.params["policy"], *rows
    )
    log_ratio = logprobs - response_logprobs(algorithm.model, reference, *rows)[0]
    k3 = np.exp(-np.asarray(log_ratio, np.float64)) - 1 + np.asarray(log_ratio)
    mask = np.asarray(rollout.mask)
    assert float(metrics["kl_loss"][0]) == pytest.approx((k3 * mask).sum(), rel=1e-4)
    assert float(metrics["entropy_loss"][0]) == pytest.approx(
        -0.1 * (np.asarray(entropy) * mask).sum(), rel=1e-4
    )
    assert {
        float(metrics[name][1]) for name in ("kl_loss", "entropy_loss", "entropy")
    } == {mask.sum()}


# ------------------------------------------------------------------ 15: what the KL controller is
# fed


@pytest.mark.parametrize("name", POLICY_STAGES)
def test_pitfall_15_a_stage_feeds_its_controller_the_mean_sequence_kl_to_the_reference(
    name,
):
    """By hand from the sampled logprobs; episodes are responses, whatever the batch size counts."""
    beta, target, horizon = 0.3, TARGET, 640
    algorithm, state, reference = begin(
        name, kl=KLConfig(beta, target=target, horizon=horizon)
    )
    state = away_from(reference, state)
    rollout, episodes, pairs = optimum.experience(algorithm, state, reference, KEY)
    ref = response_logprobs(
        algorithm.model,
        reference,
        rollout.tokens,
        rollout.attention_mask,
        2,
        TEMPERATURE,
    )[0]
    kl = float(
        (np.asarray(rollout.logprobs - ref, np.float64) * np.asarray(rollout.mask))
        .sum(1)
        .mean()
    )
    assert (
        0.02 < abs(kl / target - 1) < 0.18
    )  # within the clip of 0.2, so that the number itself shows
    state, _ = algorithm.programs.update(state, episodes, None, pairs, KEY)
    expected = beta * (1 + (kl / target - 1) * 64 / horizon)
    assert float(state.extra["kl_coefficient"]) == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------ 22: what a schedule counts


def test_pitfall_22_a_policys_schedule_ends_with_its_last_update():
    """2 epochs of 4 minibatches, 3 iterations: 24 updates. Microbatches are not updates.

    Iterations are 8 each.
    """
    slow = dataclasses.replace(SGD, learning_rate=0.01)
    loop = {"steps": 3, "epochs": 2, "minibatches": 4, "microbatches": 2}
    linear = dataclasses.replace(slow, schedule="linear")
    algorithm, state, reference = begin("ppo", optim=linear, value_optim=slow, **loop)
    assert algorithm.config.updates == 24
    state = away_from(reference, state)
    _, episodes, pairs = optimum.experience(algorithm, state, reference, KEY)
    sizes = []
    for _ in range(4):
        before = jax.tree.map(np.array, state.params["policy"])
        state, more = algorithm.programs.update(state, episodes, None, pairs, KEY)
        moves = jax.tree.map(
            lambda a, b: float(jnp.abs(a - b).max()), before, state.params["policy"]
        )
        sizes.append(max(jax.tree.leaves(moves)))
        assert np.isfinite(float(more["loss"][0]))
    assert (
        min(sizes[:3]) > 0 and sizes[3] == 0
    )  # it moves to the end, and is used up there


# ------------------------------------------------------------------ 25, 32: the loop


class Count:
    """The stream 1, 2, 3, ..."""

    position = 0

    def __next__(self):
        self.position += 1
        return {"x": np.full((2, 1), self.position, np.float32)}

    def get_state(self):
        return self.position

    def set_state(self, state):
        self.position = state


def small_stage(
    taken: list,
    *,
    signal_at: tuple[int | None, int] = (None, 0),
    head: list | None = None,
) -> Stage:
    """w, born as noise, follows what it sees; `taken` is what steps saw.

    A signal comes during one of the steps.
    """
    tx = optax.sgd(0.5, momentum=0.9)

    def init(key):
        return TrainState.create({"w": jax.random.normal(key, (3,))}, tx)

    def step(state, batch, key):
        if len(taken) == signal_at[0]:
            os.kill(os.getpid(), signal_at[1])
        taken.append(int(batch["x"][0, 0]))
        updates, opt_state = tx.update(
            {"w": state.params["w"] - batch["x"].mean()}, state.opt_state
        )
        params = optax.apply_updates(state.params, updates)
        pairs = {"loss": (jnp.abs(params["w"]).sum(), jnp.ones(()))}
        return state.replace(
            step=state.step + 1, params=params, opt_state=opt_state
        ), pairs

    def start(state):
        if head is not None:
            head.append(np.asarray(state.params["w"]))
        return state

    def finish(state):
        return Finished({}, {}, {"left.json": np.asarray(state.params["w"]).tolist()})

    return Stage(
        init=init,
        axes={"w": (None,)},
        start=start,
        step=step,
        batch=lambda _: {"x": jax.ShapeDtypeStruct((2, 1), np.float32)},
        open=lambda: Data(Count(), lambda state: {}, finish),
        units=2,
    )


def go(stage: Stage, workdir: Path, *, steps: int = 6, seed: int = 0) -> None:
    log = LogConfig(every=1, tensorboard=False)
    config = TrainConfig(
        stage="small",
        steps=steps,
        seed=seed,
        checkpoint=CheckpointConfig(every=4),
        log=log,
    )
    train.run(stage, config, workdir, ONE)


def test_pitfall_25_fresh_parameters_are_drawn_from_the_seed(tmp_path):
    """Those of a new head too: the seed is set before anything is born."""
    born = []
    for run, seed in enumerate((0, 0, 1)):
        go(small_stage([], head=born), tmp_path / str(run), steps=1, seed=seed)
    np.testing.assert_array_equal(born[0], born[1])
    assert np.abs(born[0] - born[2]).min() > 1e-3


@pytest.mark.parametrize(
    "during, number, kind",
    [(i, signal.SIGTERM, Preempted) for i in (0, 2, 3, 5)]
    + [(2, signal.SIGINT, Interrupted)],
)
def test_pitfall_32_a_preempted_run_ends_after_its_step_saved_and_the_same_command_goes_on(
    tmp_path, during, number, kind
):
    """In one process. A signal in a step: that step is finished and saved, and no other one begins.
    Then the same bytes.

    Also where a checkpoint is due anyway (step 4) and where the step was the last one.
    """
    whole, before, after = [], [], []
    go(small_stage(whole), tmp_path / "whole")
    with pytest.raises(
        kind,
        match=rf"stopped at step {during + 1} and was saved; run the same command",
    ):
        go(small_stage(before, signal_at=(during, number)), tmp_path / "run")
    assert before == whole[: during + 1]
    with Checkpoints(tmp_path / "run", CheckpointConfig()) as checkpoints:
        assert checkpoints.steps()[-1] == during + 1
    go(small_stage(after), tmp_path / "run")
    assert before + after == whole
    for file in ("metrics.jsonl", "left.json"):
        assert (tmp_path / "run" / file).read_bytes() == (
            tmp_path / "whole" / file
        ).read_bytes()


def some_config(folder: Path) -> Path:
    path = folder / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n\nget_config = lambda: ConfigDict({'stage': 'x'})\n"
    )
    return path


def test_pitfall_32_a_preempted_run_tells_its_launcher_to_start_it_again(
    monkeypatch, capsys, tmp_path
):
    """Exit code 75 and one line; a launcher that sees 1 would give up, one that sees 0 would go on
    to the next job.
    """
    config = some_config(tmp_path)

    def run(*_, **__):
        raise Preempted(
            "small stopped at step 3 and was saved; run the same command to resume"
        )

    monkeypatch.setattr(recipe, "run", run)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as left:
            main.main(
                [
                    "rlhfjax",
                    "train",
                    f"--config={config}",
                    f"--workdir={tmp_path / 'run'}",
                ]
            )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 75
    assert capsys.readouterr().err.splitlines()[-1:] == [
        "rlhfjax: small stopped at step 3 and was saved; run the same command to resume"
    ]


ELSEWHERE = """
import os, signal, sys, time
from rlhfjax import main, recipe

def run(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(300)

recipe.run = run
main.main(["rlhfjax", "train", "--config=" + sys.argv[1], "--workdir=" + sys.argv[2]])
"""


def test_pitfall_32_outside_of_the_loop_a_preempted_run_leaves_at_once(tmp_path):
    """While data are read or answers collected.

    What is on the disk is whole at any moment, so there is no waiting.
    """
    config = some_config(tmp_path)
    command = [sys.executable, "-c", ELSEWHERE, str(config), str(tmp_path / "run")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 75, done.stderr
    assert done.stderr.splitlines()[1:] == [
        "rlhfjax: stopped; run the same command to resume"
    ]
