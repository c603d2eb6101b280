"""Responses that a policy stage writes while it trains, with numbers per token."""

import json
import types

import numpy as np
import pytest

from rlhfjax import metrics, train
from rlhfjax.data.tokenizer import load_tokenizer, train_sentencepiece
from rlhfjax.rl.rollout import Rollout
from rlhfjax.rl.samples import MOST_TOKENS, StepSamples, pieces, token_rewards


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(["tea and rain", "dogs and books"] * 9, folder, vocab_size=280)
    return load_tokenizer(folder)


def test_the_reward_of_tokens_by_hand():
    """-beta log-ratio, and the score at the last token; a response without tokens has none."""
    log_ratio = np.array([[0.5, -1.0, 0.0], [0.0, 0.0, 0.0]])
    mask = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    rewards = token_rewards(np.array([2.0, 9.0]), log_ratio, mask, beta=0.1)
    assert rewards == pytest.approx(np.array([[-0.05, 2.1, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("text", ["tea and rain", "é🙂 dogs", "a\n b", ""])
def test_pieces_are_the_text_cut_at_tokens(tokenizer, text):
    """A character of several bytes is its last token's, and eos has no text."""
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text
    assert found[-1] == ""
    assert "\ufffd" not in "".join(found)


def test_half_a_character_at_the_end_is_the_last_tokens(tokenizer):
    ids = tokenizer.encode("a🙂")[:-1]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
    assert pieces(tokenizer, ids)[-1] != ""


def test_a_long_response_loses_its_end(tokenizer):
    ids = tokenizer.encode("a") * 2 * MOST_TOKENS
    assert len(pieces(tokenizer, ids)) == MOST_TOKENS


def kept(samples, tokenizer, advantages):
    """Keeps two responses to `tea`: `and` with eos, and nothing but eos."""
    prompt, word = tokenizer.encode("tea")[:1], tokenizer.encode("and")[:1]
    eos, pad = tokenizer.eos_id, tokenizer.pad_id
    tokens = np.array([[*prompt, *word, eos], [*prompt, eos, pad]])
    mask = np.array([[1.0, 1.0], [1.0, 0.0]])
    rollout = Rollout(
        tokens=tokens,
        attention_mask=np.array([[1, 1, 1], [1, 1, 0]]),
        mask=mask,
        logprobs=np.full((2, 2), -1.0),
    )
    samples.keep(
        rollout,
        scores=np.array([2.0, np.nan]),
        logprobs=np.full((2, 2), -1.0) * mask,
        ref_logprobs=np.array([[-1.5, -0.5], [-1.0, -7.0]]),
        advantages=advantages,
        beta=np.float32(0.5),
        values=np.array([[0.25, 0.75], [0.0, 9.0]]),
    )
    return tokenizer.decode(word)


def test_rows_have_the_numbers_of_counted_tokens(tokenizer):
    samples = StepSamples(tokenizer, beta_in_reward=True)
    samples.wanted = True
    word = kept(samples, tokenizer, np.array([[1.0, -1.0], [3.0, 4.0]]))
    first, second = samples.rows(samples.take(), 5)
    assert first == {
        "prompt": tokenizer.decode(tokenizer.encode("tea")[:1]),
        "response": word,
        "score": 2.0,
        "pieces": [word, ""],
        "log_ratio": [0.5, -0.5],
        "reward": [-0.25, 2.25],
        "advantage": [1.0, -1.0],
        "value": [0.25, 0.75],
    }
    assert second["pieces"] == [""]
    assert second["score"] is None  # JSON has no NaN
    assert second["advantage"] == [3.0]
    assert samples.take() is None


def test_a_response_has_one_advantage_in_the_group_stage(tokenizer):
    """And with the KL in the loss, the reward is the score alone."""
    samples = StepSamples(tokenizer, beta_in_reward=False)
    samples.wanted = True
    kept(samples, tokenizer, np.array([1.5, -1.5]))
    (row,) = samples.rows(samples.take(), 1)
    assert row["advantage"] == [1.5, 1.5]
    assert row["reward"] == [0.0, 2.0]


def test_nothing_is_kept_unless_it_is_wanted(tokenizer):
    samples = StepSamples(tokenizer, beta_in_reward=True)
    kept(samples, tokenizer, np.zeros(2))
    assert samples.take() is None


def test_a_resumed_run_writes_the_samples_after_its_checkpoint_again(tmp_path):
    def run(folder, start, stop, resume_step=None):
        with metrics.Writer(folder, resume_step, samples=True) as writer:
            for step in range(start, stop):
                writer.samples(step, [{"prompt": f"p{step}", "pieces": ["a", "b"]}])

    run(tmp_path / "whole", 1, 6)
    run(tmp_path / "cut", 1, 5)  # the checkpoint is at 3
    run(tmp_path / "cut", 4, 6, resume_step=3)
    files = [tmp_path / name / metrics.SAMPLES_FILE for name in ("whole", "cut")]
    whole, cut = (file.read_text() for file in files)
    assert whole == cut
    assert json.loads(cut.splitlines()[0])["step"] == 1


@pytest.mark.parametrize(
    ("every", "due"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [1, 3, 6]), (10, [1])]
)
def test_samples_are_written_at_step_1_and_every_so_many_steps(every, due):
    samples = types.SimpleNamespace(wanted=False)
    stage = types.SimpleNamespace(samples=samples)
    config = types.SimpleNamespace(log=types.SimpleNamespace(samples_every=every))
    log = train._MetricsLog.__new__(train._MetricsLog)
    log._config, log._stage = config, stage
    found = []
    for step in range(1, 7):
        log.before_step(step)
        found += [step] * samples.wanted
    assert found == due


def test_a_policy_stage_writes_them(finished):
    """The tiny recipe has 6 steps of PPO and the default, step 1 and every 10th."""
    rows = metrics.read_jsonl(finished / "05_ppo" / metrics.SAMPLES_FILE)
    assert [row["step"] for row in rows] == [1] * 4
    for row in rows:
        # Before the first update the policy is its reference.
        assert row["log_ratio"] == pytest.approx([0.0] * len(row["pieces"]), abs=1e-3)
        assert row["reward"][-1] == pytest.approx(row["score"], abs=1e-3)
        assert len(row["value"]) == len(row["advantage"]) == len(row["pieces"])
        assert "".join(row["pieces"]) == row["response"]
    assert not (finished / "02_sft" / metrics.SAMPLES_FILE).exists()
