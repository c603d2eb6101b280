"""Rows that a chat template refuses: found when data is opened, with file and line, or left out."""

import json
import logging

import pytest

from rlhfjax.data import loader
from rlhfjax.data.accepted import accepted, validate_prompt
from rlhfjax.data.config import Limited
from rlhfjax.data.prompts import Prompts
from rlhfjax.data.sources import Concatenated, Rows, open_source
from rlhfjax.errors import DataError
from rlhfjax.rewards import center
from rlhfjax.stages import direct
from tests.data.test_templates import CUE, TURN, make

USER = {"role": "user", "content": "who?"}
BOT = {"role": "assistant", "content": "a cat"}
SYSTEM = {"role": "system", "content": "sing"}
LOOP = "{% for m in messages %}REFUSE" + TURN + "{% endfor %}" + CUE
REFUSALS = {
    "system": "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
    "content": "{% if 'bad' in m.content %}{{ raise_exception('no bad') }}{% endif %}",
    "error": "{{ 'x'.missing.deep if m.content == 'bad' }}",
    "slow": "{% if m.content == 'bad' %}{% for i in range(10**5) %}{% endfor %}{% endif %}",
}
WHY = {
    "system": "no system",
    "content": "no bad",
    "error": "has no attribute 'missing', line 1",
    "slow": "it exceeds the limit on time and output",
    "think": "it changes a message by more than trimming it",
}


@pytest.fixture(scope="module")
def tokenizers():
    made = {
        name: make("chatml", LOOP.replace("REFUSE", refusal))
        for name, refusal in REFUSALS.items()
    }
    split = TURN.replace("m['content']", "m['content'].split('</think>')[-1]")
    made["think"] = make("chatml", LOOP.replace("REFUSE" + TURN, split))
    return made


def bad(turn, name):
    text = "hm</think>bad" if name == "think" else "bad"
    return turn | {"content": text}


def refused(kind: str, name: str) -> dict:
    """Returns a row of a kind that the template `name` refuses."""
    first = SYSTEM if name == "system" else bad(USER, name)
    if kind == "messages":
        return {"messages": [first, *([USER] if name == "system" else []), BOT]}
    if kind == "prompt":
        return {"prompt": [first, USER] if name == "system" else [first]}
    prompt = [SYSTEM, USER] if name == "system" else [USER]
    completion = "ok" if name == "system" else bad(BOT, name)["content"]
    return {"prompt": prompt, "completions": ["a", completion], "scores": [1, 0]}


GOOD = {
    "messages": {"messages": [USER, BOT, USER, BOT]},
    "prompt": {"prompt": [USER, BOT, USER]},
    "preferences": {"prompt": "who?", "completions": ["a", "b"], "scores": [1, 0]},
}
LOADERS = {
    "pretrain": ("messages", loader.pretrain_batches),
    "sft": ("messages", loader.sft_batches),
    "prompts": ("prompt", loader.prompt_batches),
    "preferences": ("preferences", loader.preference_batches),
}


def write(path, kind, name):
    good = GOOD[kind]
    other = good | {"prompt": "else?"} if kind == "preferences" else good
    rows = [good, refused(kind, name), other]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


@pytest.mark.parametrize("name", WHY)
@pytest.mark.parametrize("load", LOADERS)
def test_a_refused_row_is_found_when_data_is_opened(load, name, tokenizers, tmp_path):
    kind, batches = LOADERS[load]
    options = {"tokenizer": tokenizers[name], "batch_size": 2, "length": 64}
    spec = write(tmp_path / "rows.jsonl", kind, name)
    source = open_source(spec, kind=kind, split="all")
    with pytest.raises(DataError) as error:
        batches(source, **options)
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:2: ")
    why = WHY[name]
    if (load, name) == ("preferences", "think"):  # a response with a thought
        why = "it leaves the thought out of the last response"
    assert why in str(error.value) and "\n" not in str(error.value)
    source = open_source(spec, kind=kind, split="all", on_bad_row="skip")
    for each in (source, Limited(source, 3), Concatenated([source, source])):
        stream = batches(each, **options, train=False)
        assert stream.skipped == (2 if isinstance(each, Concatenated) else 1)
        assert next(stream)


def test_the_rows_that_are_left_keep_their_places(tokenizers, tmp_path, caplog):
    spec = write(tmp_path / "rows.jsonl", "messages", "system")
    source = open_source(spec, kind="messages", split="all", on_bad_row="skip")
    with caplog.at_level(logging.WARNING, logger="rlhfjax"):
        rows = accepted(Prompts(source), tokenizers["system"], validate_prompt)
    assert len(rows) == 2 and rows.skipped == 1
    assert rows.locate(
        1
    ) == f"{tmp_path}/rows.jsonl:3, first 1 turns" or "3" in rows.locate(1)
    assert rows[0]["messages"][0] == USER
    assert f"1 rows are left out, which cannot be used; {tmp_path}" in caplog.text
    assert accepted(rows, tokenizers["system"], validate_prompt) is rows
    with pytest.raises(DataError, match=r"no row is left of 1; row 0: .*no system"):
        only = Rows([refused("prompt", "system")], "prompt")
        only.on_bad_row = "skip"
        accepted(only, tokenizers["system"], validate_prompt)


def test_other_readers_of_rows_find_it_too(tokenizers, tmp_path):
    spec = write(tmp_path / "rows.jsonl", "preferences", "content")
    source = open_source(spec, kind="preferences", split="all")
    config = direct.Config(
        init_from="x",
        preferences=("x",),
        length=64,
        batch_size=2,
        steps=1,
        loss=direct.LossConfig(name="kto"),
    )
    with pytest.raises(DataError, match=r"rows.jsonl:2: .*no bad"):
        direct.direct_batches(config, tokenizers["content"], source)
    source = open_source(spec, kind="preferences", split="all", on_bad_row="skip")
    batches = direct.direct_batches(config, tokenizers["content"], source)
    assert next(batches).mismatched is not None
    spec = write(tmp_path / "talks.jsonl", "messages", "content")
    talks = open_source(spec, kind="messages", split="all")
    with pytest.raises(DataError, match=r"talks.jsonl:2: .*no bad"):
        center.demonstrations(talks, tokenizers["content"], batch_size=2, length=64)


def test_an_error_of_encoding_names_the_row(tokenizers):
    long = {"role": "system", "content": "we sing " * 99}
    source = Rows([{"messages": [long, USER, BOT]}], "messages")
    batches = loader.sft_batches(
        source, tokenizers["content"], batch_size=1, length=32, train=False
    )
    with pytest.raises(
        DataError, match=r"^row 0: sft: a system message of .* leaves no room"
    ):
        next(batches)
