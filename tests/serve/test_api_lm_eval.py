"""lm-evaluation-harness as a client: log-likelihoods, and responses up to a stop text.

It needs the package `lm_eval`, here or in the environment of another Python that RLHFJAX_LM_EVAL
names; the tests write task files and compare every number with the model's own.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import json_text, paths
from rlhfjax.data.chat import render_prompt
from rlhfjax.sampling import Sampling, generate
from rlhfjax.sampling.stop import find_stop
from rlhfjax.serve.app import Api
from rlhfjax.web.server import Server
from tests.serve.real import real_served, tiny_model

DATA = pathlib.Path(__file__).parent / "data"
HERE = sys.executable if importlib.util.find_spec("lm_eval") else ""
PYTHON = os.environ.get("RLHFJAX_LM_EVAL", HERE)
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not PYTHON, reason="needs lm_eval; see RLHFJAX_LM_EVAL"),
]


@pytest.fixture(scope="module")
def server(words):
    with Server(Api([real_served(words)]).app(), "127.0.0.1", 0) as server:
        yield server


@pytest.fixture
def lm_eval(tmp_path, words, server):
    """lm_eval(model, path, task, *arguments) -> the samples of a task, in order."""
    tasks, tokenizer = tmp_path / "tasks", tmp_path / "tokenizer"
    tasks.mkdir()
    tokenizer.mkdir()
    for file in DATA.glob("tiny_*.yaml"):
        text = file.read_text().replace("DATA", str(DATA))
        (tasks / file.name).write_text(text)
    words.export(paths.path(tokenizer))
    class_name = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config = tokenizer / "tokenizer_config.json"
    kept = json_text.parse(config.read_text()) if config.exists() else {}
    config.write_text(json_text.encode(kept | class_name, ""))

    def run(model, path, task, *arguments):
        options = (
            f"model=tiny,base_url={server.url}{path},num_concurrent=4,max_length=127"
        )
        options += f",tokenizer={tokenizer}"
        command = [PYTHON, "-m", "lm_eval", "--model", model, "--model_args", options]
        command += ["--tasks", task, "--include_path", str(tasks), "--log_samples"]
        command += ["--output_path", str(tmp_path / "out"), *arguments]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
        rows = [json_text.parse(line) for line in samples.read_text().splitlines()]
        return sorted(rows, key=lambda row: row["doc_id"])

    return run


def test_log_likelihoods_of_a_multiple_choice_task(lm_eval, words):
    model, params = tiny_model(words.vocab_size)

    def expected(question, choice):
        whole, first = words.encode(question + choice), len(words.encode(question))
        row = jnp.asarray(whole)[None]
        logits = model.logits(params, model.hidden(params, row))[0]
        logprobs = np.asarray(jax.nn.log_softmax(logits))[first - 1 : -1]
        rest = np.array(whole[first:])
        total = np.take_along_axis(logprobs, rest[:, None], 1).sum()
        return total, bool((logprobs.argmax(1) == rest).all())

    path = "/v1/completions"
    rows = lm_eval("local-completions", path, "tiny_choices", "--batch_size", "2")
    assert len(rows) == 4
    for row in rows:
        doc = row["doc"]
        found = [pair[0] for pair in row["resps"]]
        for choice, (logprob, is_greedy) in zip(doc["choices"], found, strict=True):
            total, greedy = expected(doc["question"], choice)
            assert float(logprob) == pytest.approx(total, abs=1e-4)
            assert str(is_greedy) == str(greedy)
        best = np.argmax([float(logprob) for logprob, _ in found])
        assert row["acc"] == float(best == doc["answer"])


def test_responses_of_a_generate_until_task(lm_eval, words):
    model, params = tiny_model(words.vocab_size)
    sampling = Sampling(
        max_new_tokens=8, eos_id=words.eos_id, pad_id=words.pad_id, temperature=0.0
    )
    path = "/v1/chat/completions"
    arguments = ("--apply_chat_template",)
    rows = lm_eval("local-chat-completions", path, "tiny_questions", *arguments)
    assert len(rows) == 3
    for row in rows:
        message = {"role": "user", "content": row["doc"]["question"]}
        ids = render_prompt(words, [message])
        prompt = jnp.asarray(ids)[None], jnp.ones((1, len(ids)), jnp.int32)
        out = generate(model, params, *prompt, jax.random.key(0)[None], sampling)
        text = words.decode(out.tokens[0][out.mask[0] > 0].tolist())
        end = find_stop(text, ["345", "q"])
        assert row["resps"][0][0] == (text if end is None else text[:end])
