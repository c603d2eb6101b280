"""Rules that cannot work are refused before training, and rules that fail stop the run."""

import logging
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import stages, user_code
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.rewards import workers
from rlhfjax.rewards.compose import ComposeConfig, MemberConfig, WeightedSum
from rlhfjax.rewards.load import KINDS, describe
from rlhfjax.rewards.responses import TextReward
from rlhfjax.rewards.rules import Rule, RuleConfig
from rlhfjax.rewards.workers import call, find_function, validate_function

HERE = "tests.rewards.some_rules"
SIGNATURE = "def f(prompt: str, response: str, metadata: dict) -> float"


@pytest.mark.parametrize(
    "name", ["fits", "instance", "method", "short", "anything", "partial"]
)
def test_whatever_takes_three_texts_is_a_rule(name):
    assert call(find_function(f"{HERE}:{name}"), ("p", "r", {})).value in (1.0, 2.0)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (f"{HERE}:two", r"its signature is \(prompt, response\) \(too many"),
        (f"{HERE}:four", "missing a required argument: 'more'"),
        (f"{HERE}:keywords", "too many positional arguments"),
        (f"{HERE}:one_bound", "too many positional arguments"),
        (f"{HERE}:decorated", "too many positional arguments"),
        (f"{HERE}:coroutine", "a coroutine function"),
        (f"{HERE}:asynchronous", "a coroutine function"),
        (f"{HERE}:generator", "a generator function"),
        (f"{HERE}:Callable", "a class"),
        (f"{HERE}:unreadable", "its signature cannot be read"),
        (f"{HERE}:NUMBER", "of type int"),
        (f"{HERE}:missing", "has no 'missing'"),
        ("math:sqrt", "a builtin"),
        ("builtins:len", "a builtin"),
        ("builtins:eval", "a builtin"),
        ("os:system", "a builtin"),
        ("json:dumps", "its signature is"),
        ("no.such.module:f", "No module named 'no'"),
    ],
)
def test_another_signature_is_refused_with_the_one_that_is_expected(name, problem):
    with pytest.raises(ConfigError, match=problem) as error:
        find_function(name)
    assert SIGNATURE in str(error.value)
    assert "\n" not in str(error.value)


NO_NAMES = """
||x|:|x:|:f|.x|.x:f|..:f|a..b:f|a b:f|a:f g| a:f|a:f |a\0:f|a:f\0|a:b:c|a::f|a:C.f|a:1|a-b:f
|a/b.py:f|a/b:f|a.py:f|a.py|/a.py:f|../a.py:f|C:\\a.py:f"""


@pytest.mark.parametrize("function", NO_NAMES.replace("\n", "").split("|")[1:])
def test_what_is_no_module_and_function_is_refused_in_the_config(function):
    for source in (f"rule:{function}", {"kind": "rule", "function": function}):
        with pytest.raises(
            ConfigError, match=r"expected package\.module:function"
        ) as e:
            describe(source)
        assert SIGNATURE in str(e.value)


@pytest.mark.parametrize("path", ["./a/b.py", "a/b.py", "a/b", "{here}/a/b.py"])
def test_a_path_is_told_what_it_is_as_a_module(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = path.format(here=tmp_path)
    for refuse in (
        lambda: describe(f"rule:{name}:f"),
        lambda: stages.find(f"{name}:f"),
    ):
        with pytest.raises(
            ConfigError, match=r"a path, .*, which would be a\.b:f; exp"
        ):
            refuse()


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (
            "raise ValueError('one\\ntwo')",
            r"cannot be imported \(ValueError: one two\)",
        ),
        ("import sys; sys.exit(3)", r"\(SystemExit: 3\)"),
        ("import os; os._exit(4)", "its process died, exit code 4"),
        ("import time; time.sleep(60)", "not imported within 1 s"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f(:", "SyntaxError"),
        ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
    ],
)
def test_a_module_that_cannot_be_imported_ends_its_own_process(
    code, problem, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    user_code.add_working_directory()
    if "sleep" in code:
        monkeypatch.setattr(workers, "STARTING", 1.0)
    (tmp_path / "bad_module.py").write_text(code)
    kind, config = describe("rule:bad_module:f")
    with pytest.raises(ConfigError, match=problem):
        KINDS[kind].check(config)


def test_the_working_directory_is_importable_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    elsewhere = [folder for folder in sys.path if folder]
    monkeypatch.setattr(sys, "path", elsewhere)
    (tmp_path / "json.py").write_text("raise ValueError('not this one')")
    (tmp_path / "my_rules.py").write_text("def f(p, r, m): return len(r)")
    (tmp_path / "my_stage.py").write_text("class Config: pass\ndef run(): pass")
    validate_function("my_rules:f")
    scores = Rule(RuleConfig("my_rules:f", workers=1))(["p"], ["four"])
    np.testing.assert_array_equal(scores, [4.0])
    assert stages.config_class("my_stage:Config").__name__ == "Config"
    with pytest.raises(ConfigError, match="the module json has no 'f'"):
        user_code.load("json:f", "rule", user_code.RULE)
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize("stage", [3, None, "a/b.py:Config", "sys:Config"])
def test_a_stage_that_is_none_is_refused(stage):
    with pytest.raises(ConfigError, match="stage"):
        stages.config_class(stage)


def raises(error):
    raise error


class Hostile:
    """Its number and its text are errors."""

    def __float__(self):
        raise UnspeakableError


class UnspeakableError(Exception):
    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, "TypeError"),
        ("3", "returned a str, not a number"),
        (b"3", "returned a bytes, not a number"),
        (np.ones(1), "returned a ndarray, not a number"),
        (np.ones(2), "returned a ndarray, not a number"),
        ((1.0,), "TypeError"),
        ([1.0], "TypeError"),
        ({}, "TypeError"),
        (1j, "TypeError"),
        (iter([1.0]), "TypeError"),
        (float("nan"), "returned nan, not a finite float32"),
        (float("-inf"), "returned -inf, not a finite float32"),
        (1e300, r"returned 1e\+300, not a finite float32"),
        (10**400, "OverflowError"),
        (Hostile(), "UnspeakableError"),
    ],
)
def test_what_is_no_finite_number_is_a_failure(value, error):
    with np.testing.suppress_warnings():
        outcome = call(lambda *_: value, ("p", "r", {}))
    assert outcome.value is None
    assert error.replace("\\", "") in outcome.error


@pytest.mark.parametrize("value", [1, True, np.float16(1), np.array(1), jnp.ones(())])
def test_numbers_of_other_libraries_are_scores(value):
    assert call(lambda *_: value, ("p", "r", {})).value == 1.0


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), RecursionError("x" * 10**6)]
)
def test_whatever_a_rule_raises_is_one_short_line(error):
    outcome = call(lambda *_: raises(error), ("p", "r", {}))
    assert outcome.error.startswith(type(error).__name__)
    assert len(outcome.error) < 400


@pytest.fixture(scope="module")
def pool_of_one():
    rule = Rule(RuleConfig(f"{HERE}:fails_on_bad", workers=1, failed=-1.0))
    yield rule
    rule.close()


@pytest.mark.parametrize(("bad", "n"), [(64, 64), (7, 64), (1, 4), (2, 10), (1, 1)])
def test_more_than_a_tenth_of_failures_stops_the_run(pool_of_one, bad, n):
    responses = ["good"] * (n - bad) + ["bad"] * bad
    with pytest.raises(
        DataError,
        match=rf"^rule {HERE}:fails_on_bad: {bad} of {n} samples failed, more than"
        r" max_failed=0.1; the first: ValueError: no number here; correct the rule",
    ):
        pool_of_one(["p"] * n, responses)


@pytest.mark.parametrize(("bad", "n"), [(6, 64), (1, 10), (3, 30), (0, 4)])
def test_a_tenth_of_failures_is_a_warning(pool_of_one, bad, n, caplog):
    responses = ["good"] * (n - bad) + ["bad"] * bad
    with caplog.at_level(logging.WARNING, "rlhfjax"):
        scores = pool_of_one(["p"] * n, responses)
    np.testing.assert_array_equal(scores, [1.0] * (n - bad) + [-1.0] * bad)
    assert (f"{bad} of {n} samples failed and score -1" in caplog.text) == bool(bad)


class Words(Tokenizer):
    """A tokenizer of which a token is a word's index."""

    def __init__(self):
        self.words = ("good", "bad")

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


def test_a_member_is_only_called_where_it_counts(pool_of_one, monkeypatch):
    """Prompts to which a rule does not apply are no failures, in nested sums too."""
    monkeypatch.setattr(
        "rlhfjax.rewards.responses.chat.prompt_text", lambda tokenizer, ids: "p"
    )
    tokens = jnp.array([[0, 1], [0, 0], [0, 1], [0, 0]])
    rows = (tokens, jnp.ones_like(tokens), jnp.ones((4, 1)))
    reward = TextReward(pool_of_one, Words())

    def where(tokens, attention_mask, mask):
        return jnp.array([0.0, 1.0, 0.0, 0.5])

    inner_config = ComposeConfig(members=(MemberConfig("gold:sentiment"),))
    outer_config = ComposeConfig(
        members=(MemberConfig("gold:sentiment", name="x", where="gold:sentiment"),)
    )
    inner = WeightedSum(inner_config, [(reward, None)])
    for member, prefix in ((reward, "rule_failed_x"), (inner, "rule_failed_0_x")):
        scores, metrics = WeightedSum(outer_config, [(member, where)]).with_metrics(
            *rows
        )
        np.testing.assert_array_equal(scores, [0, 1, 0, 0.5])
        assert metrics[prefix] == (0.0, 2.0)
        assert metrics["applied_x"] == (1.5, 4.0)
    nowhere = WeightedSum(outer_config, [(reward, lambda *rows: jnp.zeros(4))])
    np.testing.assert_array_equal(nowhere(*rows), np.zeros(4))
