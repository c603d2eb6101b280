"""Rules in worker processes: nothing is lost, nothing hangs, and 0.0 is a score."""

import json
import logging
import time

import numpy as np
import pytest

from rlhfjax.data import chat
from rlhfjax.data.tokenizer import train_sentencepiece
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.rewards import rules
from rlhfjax.rewards.load import KINDS, describe
from rlhfjax.rewards.responses import texts
from rlhfjax.rewards.rules import Rule, RuleConfig, question
from rlhfjax.rewards.workers import Pool

HERE = "tests.rewards.some_rules"


def load_rule(name):
    """Returns the rule of a name, as a scorer of text."""
    kind, config = describe(name)
    KINDS[kind].check(config)
    return Rule(config)


@pytest.fixture(scope="module")
def misbehaving():
    rule = load_rule(
        f"rule:{HERE}:misbehave?timeout=4&failed=-1&workers=3&max_failed=1"
    )
    yield rule
    rule.close()


def test_every_failure_is_a_score_and_is_reported_and_the_others_are_right(
    misbehaving, caplog
):
    responses = [
        "fine",
        "raise",
        "half",
        "hang",
        "die",
        "zero",
        "leave",
        "nan",
        "none",
        "true",
        "hang",
        "fine",
        "zero",
    ]
    with caplog.at_level(logging.WARNING, "rlhfjax"):
        began = time.monotonic()
        scores, pairs = misbehaving.with_metrics(["p"] * len(responses), responses)
        assert time.monotonic() - began < 60
    np.testing.assert_array_equal(
        scores, [1, -1, 0.5, -1, -1, 0, -1, -1, -1, 1, -1, 1, 0]
    )
    assert pairs == {"rule_failed": (7.0, 13.0), "rule_timed_out": (2.0, 13.0)}
    assert (
        "7 of 13 samples failed and score -1; the first: ValueError: no number here"
        in caplog.text
    )
    errors = [
        one.error
        for one in misbehaving.outcomes(["p"] * 4, ["raise", "die", "nan", "none"])
    ]
    assert errors[:3] == [
        "ValueError: no number here",
        "its process died, exit code 3",
        "returned nan, not a finite float32",
    ]
    assert errors[3].startswith("TypeError")


def test_after_failures_the_pool_works_on(misbehaving):
    for _ in range(2):
        np.testing.assert_array_equal(
            misbehaving(["p"] * 3, ["half", "die", "zero"]), np.float32([0.5, -1, 0])
        )


def test_samples_run_side_by_side(misbehaving):
    misbehaving(["p"] * 3, ["fine"] * 3)  # the processes are up
    began = time.monotonic()
    misbehaving(["p"] * 6, ["sleep"] * 6)
    assert time.monotonic() - began < 0.4 * 6 * 0.75  # one after the other: 2.4 s


def test_pitfall_09_fractional_rewards_and_zero_are_kept(misbehaving):
    """An integer array would make 0.5 a 0; `score or default` would make 0.0 a failure."""
    scores, pairs = misbehaving.with_metrics(["p", "p"], ["half", "zero"])
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, [0.5, 0.0])
    assert pairs["rule_failed"] == (0.0, 2.0)


def test_metadata_is_found_by_the_last_question(tmp_path):
    rows = [
        {"prompt": "one?", "bonus": 10.0, "text": "a\u2028b"},
        {"prompt": [{"role": "user", "content": "two?"}], "bonus": 20.0},
    ]
    (tmp_path / "m.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
    rule = load_rule(
        f"rule:{HERE}:words?workers=1&failed=-7&max_failed=1&metadata={tmp_path}/*.jsonl"
    )
    prompts = [
        "<|user|>one?<|assistant|>",
        "<|system|>s<|user|>one?<|assistant|>x<|user|>two?<|assistant|>",
        "three?",
    ]
    np.testing.assert_array_equal(rule(prompts, ["a b", "a", "a"]), [12, 21, -7])
    assert rule.outcomes(prompts[2:], ["a"])[0].error == "no metadata for its prompt"
    (tmp_path / "n.jsonl").write_text(
        json.dumps({"prompt": "one?", "bonus": 0.0}) + "\n"
    )
    with pytest.raises(DataError, match=r"n\.jsonl:1: .*stands twice"):
        rules.read_metadata(f"{tmp_path}/*.jsonl")


def test_questions_of_prompts():
    assert question("<|user|>a\nb <|assistant|>") == "a\nb"
    assert question("plain text") == "plain text"
    assert question("what is left<|assistant|>yes<|user|>so?<|assistant|>") == "so?"
    assert question("what is left<|assistant|>") == "what is left"


def test_a_message_that_spells_a_marker_is_one_turn_for_a_rule(tmp_path):
    """From ids to the rule: neither the question nor the metadata is another turn's."""
    tokenizer = train_sentencepiece(["the cat", "two?"], tmp_path, vocab_size=280)
    asked = "say<|assistant|>10<|user|>two? <\\|user|>"
    (tmp_path / "m.jsonl").write_text(json.dumps({"prompt": asked, "bonus": 5}) + "\n")
    prompt = chat.render_prompt(tokenizer, [{"role": "user", "content": asked}])
    response = chat.response_tokens(tokenizer, "the cat")
    tokens = np.array([[*prompt, *response]])
    (text,), responses = texts(
        tokenizer, tokens, np.ones_like(tokens), np.ones((1, len(response)))
    )
    assert text == (
        "<|user|>say<\\|assistant|>10<\\|user|>two? <\\\\|user|><|assistant|>"
    )
    rule = load_rule(f"rule:{HERE}:words?workers=1&metadata={tmp_path}/*.jsonl")
    np.testing.assert_array_equal(rule([text], responses), [2 + 5])


def test_names_are_read_strictly():
    description = describe("rule:a.b:c?timeout=2&failed=-1&workers=3")
    assert description.config == RuleConfig("a.b:c", 2.0, -1.0, 3)
    for name, match in (
        ("rule:a:b?speed=3", "speed"),
        ("rule:a:b?timeout=fast", "timeout='fast': expected float"),
        ("rule:a:b?timeout=nan", "timeout=nan: expected a finite number"),
        ("rule:a:b?timeout=1e999", "timeout=inf: expected a finite number"),
        ("rule:a:b?timeout=-1", "timeout=-1.0: expected float > 0"),
        ("rule:a:b?timeout=", "timeout='': expected float"),
        ("rule:a:b?timeout", "'timeout': expected option=value"),
        ("rule:a:b?workers=1000000000", "workers=1000000000: expected int"),
        ("rule:a:b?workers=10**9", "workers='10\\*\\*9': expected int"),
        ("rule:a:b?workers=1&workers=2", "'workers' stands twice"),
        ("rule:a:b?function=os:system", "'function' stands twice"),
        ("rule:a:b?max_failed=2", "max_failed=2.0: expected float"),
        ("rule:a:b?=3", "no such option"),
    ):
        with pytest.raises(ConfigError, match=match):
            load_rule(name)


def test_no_calls_need_no_process():
    pool = Pool(f"{HERE}:words", workers=2, timeout=1.0)
    assert pool.map([]) == []
    assert not pool._workers
