"""Every host scores its own rows of a batch, and all have the scores that one host computes."""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import hosts
from rlhfjax.data import chat
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.rewards.load import load_reward
from rlhfjax.rewards.responses import TextReward
from rlhfjax.rewards.rules import Rule, RuleConfig
from rlhfjax.rewards.workers import Outcome

ROOT = Path(__file__).parents[2]
RULE = "rule:tests.rewards.some_rules:words"
WORDS = ("good", "bad", "so", "tea")
RESPONSES = np.array([[0, 0], [1, 1], [2, 0], [3, 3], [0, 1], [1, 3], [2, 2]])


class Words(Tokenizer):
    """A tokenizer of which a token is a word's index."""

    def __init__(self):
        pass

    def decode(self, ids):
        return " ".join(WORDS[i] for i in ids)


class Lengths:
    """A scorer of numbers of letters, with a metric, which keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, responses):
        return self.with_metrics(prompts, responses)[0]

    def with_metrics(self, prompts, responses):
        self.calls.append(list(responses))
        lengths = np.array([len(text) for text in responses], np.float32)
        return lengths, {"letters": (float(lengths.sum()), float(len(responses)))}


class FailsOnBad(Rule):
    """A rule that runs here instead of in processes."""

    def outcomes(self, prompts, responses):
        self.sizes = [*getattr(self, "sizes", []), len(responses)]
        return [
            Outcome(None, "no number") if text == "bad bad" else Outcome(len(text) / 3)
            for text in responses
        ]


def rows(n):
    prompts = np.zeros((n, 1), np.int32)
    tokens = jnp.asarray(np.concatenate([prompts, RESPONSES[:n]], axis=1))
    return tokens, jnp.ones_like(tokens), jnp.ones((n, 2))


@pytest.fixture
def as_hosts(monkeypatch):
    """Makes this process play all of so many hosts, one after the other."""
    monkeypatch.setattr(chat, "prompt_text", lambda tokenizer, ids: "p")

    def use(count):
        def share_all(make):
            parts = []
            for i in range(count):
                monkeypatch.setattr(hosts, "index", lambda i=i: i)
                parts.append(make())
            monkeypatch.setattr(hosts, "index", lambda: 0)
            return parts

        monkeypatch.setattr(hosts, "count", lambda: count)
        monkeypatch.setattr(hosts, "whole", lambda tree: tree)
        monkeypatch.setattr(hosts, "share", lambda make: make())
        monkeypatch.setattr(hosts, "share_all", share_all)

    return use


def test_parts_of_rows_are_disjoint_in_order_and_even(monkeypatch):
    for count in (1, 2, 3, 8):
        parts = []
        for i in range(count):
            monkeypatch.setattr(hosts, "index", lambda i=i: i)
            monkeypatch.setattr(hosts, "count", lambda count=count: count)
            parts.append(list(range(7))[hosts.own_rows(7)])
        assert [*itertools.chain(*parts)] == list(range(7))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("count", [2, 3, 9])
def test_any_number_of_hosts_gives_the_scores_and_metrics_of_one(count, as_hosts):
    as_hosts(1)
    alone, alone_metrics = TextReward(Lengths(), Words()).with_metrics(*rows(7))
    as_hosts(count)
    scorer = Lengths()
    scores, metrics = TextReward(scorer, Words()).with_metrics(*rows(7))
    np.testing.assert_array_equal(scores, alone)
    assert metrics == alone_metrics == {"letters": (50.0, 7.0)}
    assert len(scorer.calls) == min(count, 7)  # none without rows
    assert max(map(len, scorer.calls)) == -(-7 // count)
    assert [*itertools.chain(*scorer.calls)] == [*map(Words().decode, RESPONSES)]


def test_only_rows_that_count_are_divided(as_hosts):
    as_hosts(2)
    scorer = Lengths()
    counts = np.array([0, 1, 0, 0, 1, 1, 0])
    scores, _ = TextReward(scorer, Words()).with_metrics(*rows(7), counts)
    np.testing.assert_array_equal(scores, [0, 7, 0, 0, 8, 7, 0])
    assert scorer.calls == [["bad bad"], ["good bad", "bad tea"]]


def test_what_needs_all_rows_at_once_gets_them(as_hosts):
    as_hosts(3)
    for which in ("first", "together"):
        scorer = Lengths()
        TextReward(scorer, Words(), which)(*rows(7))
        assert [len(call) for call in scorer.calls] == [7]
    layout = make_layout(MeshConfig(), jax.devices()[:1])
    reward = load_reward(f"{RULE}?hosts=first", layout, Words())
    assert reward._hosts == "first"
    with pytest.raises(
        ConfigError, match="hosts='two': expected one of 'every', 'first'"
    ):
        load_reward(f"{RULE}?hosts=two", layout, Words())


def test_a_rule_may_fail_for_a_share_of_the_whole_batch(as_hosts):
    """One failure in seven is one in three of a host's own rows."""
    for count in (1, 3):
        as_hosts(count)
        rule = FailsOnBad(RuleConfig("a:b", failed=-1.0, max_failed=0.2))
        scores, metrics = TextReward(rule, Words()).with_metrics(*rows(7))
        expected = [len(Words().decode(ids)) / 3 for ids in RESPONSES]
        expected[1] = -1.0
        np.testing.assert_array_equal(scores, np.float32(expected))
        assert metrics == {"rule_failed": (1.0, 7.0), "rule_timed_out": (0.0, 7.0)}
        assert len(rule.sizes) == count
        strict = FailsOnBad(RuleConfig("a:b"))
        with pytest.raises(DataError, match=r"1 of 7 samples failed, more than"):
            TextReward(strict, Words())(*rows(7))


# A host of two that scores seven rows; argv: the host whose rule fails.
HOST = """
import sys
import threading
import jax.numpy as jnp
from rlhfjax import hosts, process
from rlhfjax.errors import DataError
from rlhfjax.data import chat
from rlhfjax.rewards.responses import TextReward
from tests.rewards.test_scoring_hosts import Lengths, Words, rows

class Failing(Lengths):
    def with_metrics(self, prompts, responses):
        if str(hosts.index()) == sys.argv[1]:
            raise DataError("the scorer has no answer")
        return super().with_metrics(prompts, responses)

def command():
    process.join_hosts(10, 60)
    chat.prompt_text = lambda tokenizer, ids: "p"
    scorer = Failing()
    scores, metrics = TextReward(scorer, Words()).with_metrics(*rows(7))
    print([float(x) for x in scores], metrics, len(scorer.calls[0]), flush=True)

process.run(command)
# A thread that still waits for the other hosts would end this one with SIGSEGV.
assert "hosts" not in [thread.name for thread in threading.enumerate()]
"""


def two_hosts(failing: str) -> list[tuple[int, str, list[str]]]:
    """Returns each host's exit code, output and messages."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for i in range(2):
        own = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(i),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", HOST, failing],
                cwd=ROOT,
                env=os.environ | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ends = []
    for process in processes:
        out, err = process.communicate(timeout=200)
        lines = [line for line in err.splitlines() if line.startswith("rlhfjax:")]
        ends.append((process.returncode, out, lines))
    return ends


@pytest.mark.slow
def test_two_processes_score_a_part_each():
    (code, out, _), (other_code, other_out, _) = two_hosts("")
    assert code == other_code == 0
    common = "[9.0, 7.0, 7.0, 7.0, 8.0, 7.0, 5.0] {'letters': (50.0, 7.0)}"
    assert (out, other_out) == (f"{common} 3\n", f"{common} 4\n")


@pytest.mark.parametrize(
    "failing",
    [
        pytest.param(0, marks=pytest.mark.nightly),
        pytest.param(1, marks=pytest.mark.slow),
    ],
)
def test_a_scorer_that_fails_on_one_host_ends_all_with_its_reason(failing):
    ends = two_hosts(str(failing))
    own, other = ends[failing][2], ends[1 - failing][2]
    assert own == ["rlhfjax: the scorer has no answer"]
    assert other == [f"rlhfjax: host {failing} ended: the scorer has no answer"]
    assert ends[0][0] == ends[1][0] == DataError.exit_code
