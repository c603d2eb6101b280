"""Stages that sample, with continuous batching and with shared prefixes.

What they do is the same.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from rlhfjax import recipe
from rlhfjax.data.preferences import read_preferences
from rlhfjax.errors import ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.rl import placement
from rlhfjax.rl.responses import (
    PromptBatching,
    bucket_width,
    sample_responses,
    validate_buckets,
)
from rlhfjax.sampling import Sampling
from rlhfjax.stages import best_of_n
from tests import test_stage_best_of_n as pools
from tests.test_stage_group import group_values
from tests.test_stages import run_steps, stage_values

ONE = make_layout(MeshConfig(), jax.devices()[:1])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "options",
    [{"decode_batch": 8}, {"prompt_buckets": 4}],
    ids=["decode_batch", "buckets"],
)
def test_collect_draws_the_same_answers(options, conversations, finished, tmp_path):
    recipe.run(stage_values("collect", conversations, finished, **options), tmp_path)
    one, other = (
        read_preferences(folder / "preferences", "train")
        for folder in (tmp_path, finished / "03_collect")
    )
    assert len(one) == len(other) == 24
    for i in range(len(one)):
        for a, b in zip(
            one[i]["completion_tokens"], other[i]["completion_tokens"], strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_buckets_by_hand():
    """Of 10 slots in 4 parts of 3: a longest prompt of 1 to 3 takes 3, of 4 takes 6, of 10 what
    there is.
    """
    for longest, width in ((0, 3), (1, 3), (3, 3), (4, 6), (7, 9), (9, 9), (10, 10)):
        segments = np.arange(10)[None] >= 10 - np.array([[0], [longest]])
        assert bucket_width(segments.astype(np.int32), 4) == width
    assert bucket_width(np.ones((1, 10), np.int32), 1) == 10
    with pytest.raises(
        ConfigError,
        match=r"collect.prompt_buckets=11: must be <= prompt_length=10",
    ):
        validate_buckets(11, 10, "collect")


class Questions:
    """Prompts of so many words."""

    kind, skipped = "prompt", 0

    def __init__(self, words):
        self._words = words

    def __len__(self):
        return len(self._words)

    def __getitem__(self, index):
        return {"messages": [{"role": "user", "content": "why " * self._words[index]}]}

    def locate(self, index):
        return f"question {index}"


def test_the_sampler_is_compiled_once_a_bucket_and_says_so(finished, caplog):
    """Prompts one at a time, short and long ones in turn.

    Two programs, and rollouts of one width.
    """
    saved = store.load(finished / "02_sft", ONE)
    sampling = Sampling(
        max_new_tokens=3,
        eos_id=saved.tokenizer.eos_id,
        pad_id=saved.tokenizer.pad_id,
        temperature=1.234,  # of no other test: nothing is compiled yet
    )
    with caplog.at_level("INFO", "rlhfjax"), ONE.use():
        batches = sample_responses(
            Questions((1, 2, 9, 1, 9, 2)),
            saved,
            sampling,
            PromptBatching(batch_size=1, length=24, buckets=2),
            jax.random.key(0),
            ONE,
        )
        rollouts = [batch.rollout for batch in batches]
    lengths = [int(drawn.attention_mask[:, :24].sum()) for drawn in rollouts]
    assert [length > 12 for length in lengths] == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    said = [line for line in caplog.messages if "compiling the sampler" in line]
    assert [line.split("prompts of ")[1].split(" tokens")[0] for line in said] == [
        "12",
        "24",
    ]
    assert {drawn.tokens.shape for drawn in rollouts} == {(1, 27)}
    for drawn, length in zip(rollouts, lengths, strict=True):
        np.testing.assert_array_equal(
            drawn.attention_mask[0, :24], np.arange(24) >= 24 - length
        )


@pytest.mark.slow
def test_evaluate_draws_the_same_answers(conversations, finished, tmp_path):
    recipe.run(
        stage_values(
            "evaluate", conversations, finished, decode_batch=4, prompt_buckets=3
        ),
        tmp_path,
    )
    for name in ("policy", "baseline"):
        one, other = (
            lines(folder / "samples.jsonl")
            for folder in (tmp_path, finished / "06_evaluate")
        )
        assert [row[name] for row in one] == [row[name] for row in other]


def test_a_pool_is_the_same_in_slots_and_without_shared_prompts(
    conversations, finished, tmp_path, monkeypatch
):
    recipe.run_stage(
        pools.values(conversations, finished, decode_batch=4), tmp_path / "decode_batch"
    )
    monkeypatch.setattr(best_of_n, "_samples_per_prompt", lambda config: 1)
    recipe.run_stage(pools.values(conversations, finished), tmp_path / "alone")
    one, other = (
        lines(tmp_path / folder / "scores.jsonl")
        for folder in ("decode_batch", "alone")
    )
    for a, b in zip(one, other, strict=True):
        assert a["length"] == b["length"]
        assert a["answer"] == b["answer"]


def test_the_rows_of_a_pool_that_share_a_prefix_have_one_prompt():
    """For every batch of every pool: groups of gcd(pool, batch) rows do not straddle prompts."""
    for pool in range(1, 13):
        for batch in range(1, 13):
            config = best_of_n.Config(
                init_from="",
                proxy="",
                prompt_length=1,
                max_new_tokens=1,
                pool=pool,
                batch_size=batch,
            )
            samples_per_prompt = best_of_n._samples_per_prompt(config)
            for first in range(0, 5 * pool, batch):
                prompts = (
                    np.minimum(np.arange(first, first + batch), 5 * pool - 1) // pool
                )
                assert (
                    prompts.reshape(-1, samples_per_prompt)
                    == prompts[::samples_per_prompt, None]
                ).all()


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"decode_batch": 8}, marks=pytest.mark.nightly)],
    ids=["all", "decode_batch"],
)
def test_a_group_shares_its_prompt(changes, conversations, finished, monkeypatch):
    """Steps of RLOO as they are, and with the prompt of every response run on its own."""
    got, params = run_steps(
        "group", group_values(conversations, finished, "rloo", **changes), ONE
    )
    sample, shared = placement.sample, []

    def alone(*args, sampling):
        shared.append(sampling.samples_per_prompt)
        sampling = dataclasses.replace(sampling, samples_per_prompt=1)
        return sample(*args, sampling=sampling)

    monkeypatch.setattr(placement, "sample", alone)
    expected, same = run_steps(
        "group", group_values(conversations, finished, "rloo"), ONE
    )
    assert shared == [4, 4]
    for a, b in zip(got, expected, strict=True):
        for metric in b:
            np.testing.assert_allclose(
                a[metric], b[metric], rtol=1e-4, atol=1e-5, err_msg=metric
            )
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "decode_batch", "message"),
    [
        ("ppo", -4, "ppo.decode_batch=-4: expected int >= 0"),
        (
            "collect",
            3,
            "collect.decode_batch=3: must be 0 .off. or at least the 4 responses per prompt",
        ),
        ("evaluate", 6, "evaluate.decode_batch=6 is not divisible by the 4 devices"),
    ],
)
def test_slots_that_cannot_be_are_refused(
    stage, decode_batch, message, conversations, finished, tmp_path
):
    with pytest.raises(ConfigError, match=message):
        recipe.run(
            stage_values(stage, conversations, finished, decode_batch=decode_batch),
            tmp_path,
        )
