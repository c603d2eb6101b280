"""Scores of conversations: those of the reward model, whatever the padding."""

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.data.chat import render
from rlhfjax.interop import store
from rlhfjax.mesh import make_layout
from rlhfjax.rewards.model import sequence_rewards
from rlhfjax.serve.score import load_scorer

CHAT = [
    {"role": "user", "content": "I love tea"},
    {"role": "assistant", "content": "good music"},
]
LONGER = [CHAT[0], {"role": "assistant", "content": "we hate rain today"}]


@pytest.fixture(scope="module")
def layout():
    return make_layout(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def scorer(finished, layout):
    policy = store.open_model(finished / "02_sft", layout)
    return load_scorer(str(finished / "04_reward"), layout, policy.tokenizer)


def test_scores_are_those_of_the_reward_model(served, serve, scorer, finished, layout):
    saved = store.load(finished / "04_reward", layout)
    expected = []
    for messages in (CHAT, LONGER):
        tokens, mask = render(saved.tokenizer, messages)
        end = np.flatnonzero(mask)[-1] + 1  # the eos is scored, what follows it is not
        row = jnp.asarray(tokens[None, :end])
        rewards = sequence_rewards(saved.model, saved.params, row, jnp.ones_like(row))
        expected.append(float(rewards[0]))
    url = serve(served(), scorer=scorer) + "/v1/score"
    reply = httpx.post(url, json={"messages": [CHAT, LONGER]}, timeout=60).json()
    assert "data" in reply, reply
    found = [row["score"] for row in reply["data"]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert expected[0] != expected[1] and reply["usage"]["prompt_tokens"] > 4
    one = httpx.post(url, json={"messages": LONGER}, timeout=60).json()
    assert [row["score"] for row in one["data"]] == found[1:]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": CHAT[:1]}, "messages: the last one must be the assistant's"),
        ({"messages": ["x"]}, "messages: expected a list of messages"),
        ({"messages": [[]]}, "messages"),
        ({"text": 1}, "unknown field 'text'"),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": "tea " * 40}]},
            "the reward model has room for 32 tokens, got",
        ),
    ],
)
def test_a_conversation_that_is_refused(served, serve, scorer, body, message):
    url = serve(served(), scorer=scorer) + "/v1/score"
    reply = httpx.post(url, json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(message)


def test_a_reward_without_a_model_has_the_tokenizer_of_the_policy(finished, layout):
    policy = store.open_model(finished / "02_sft", layout)
    scorer = load_scorer("gold:sentiment", layout, policy.tokenizer)
    happy, sad = (
        [CHAT[0], {"role": "assistant", "content": text}]
        for text in ("great happy good", "awful sad bad")
    )
    scores = scorer.scores([happy, sad]).scores
    assert scores[0] > scores[1]
