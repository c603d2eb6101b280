"""Definitions of tools, a column `tools`: how they are read, and what chat templates get."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from rlhfjax.data import chat, examples
from rlhfjax.data.accepted import validate_fine_tuning
from rlhfjax.data.columns import BadRow
from rlhfjax.data.forms import Reader
from rlhfjax.data.rows import normalize
from rlhfjax.data.sources import open_source
from rlhfjax.data.tools import DEFINED
from rlhfjax.errors import DataError
from tests.data.test_templates import make
from tests.data.test_tools import CALL, CALLED, rendered

# As Qwen2.5's template writes them; the default system message is ours.
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content }}"
    "{%- else %}{{- 'You are here.' }}{%- endif %}"
    '{{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.'
    "\n\nYou are provided with function signatures within <tools></tools> XML tags:"
    '\n<tools>" }}{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}'
    '{{- "\n</tools>\n\nFor each function call, return a json object with function name and'
    " arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\n</tool_call>'
    '<|im_end|>\n" }}'
    "{%- elif messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' and message.tool_calls %}"
    "{{- '<|im_start|>assistant' }}{%- for call in message.tool_calls %}"
    '{{- \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- elif message.role != 'system' %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"properties": {"city": {"type": "string"}}},
    },
}
CLOCK = {"name": "clock", "description": "The time, in “hours”."}
LINES = (
    '{"type": "function", "function": {"name": "weather", "parameters":'
    ' {"properties": {"city": {"type": "string"}}}}}\n'
    '{"type": "function", "function": {"name": "clock",'
    ' "description": "The time, in “hours”."}}'
)
TALK = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "tool_calls": [CALL]},
]
SYSTEM = {"role": "system", "content": "Be brief."}
TEXT = DEFINED.format(definitions=LINES)


def read(messages, tools=(WEATHER, CLOCK), **row):
    raw = {"messages": messages, "tools": list(tools), **row}
    return normalize("messages", raw, {})["messages"]


def system_of(text):
    """Returns the system turn of a conversation as Qwen2.5's template writes it."""
    start, end = "<|im_start|>system\n", "<|im_end|>\n"
    assert text.startswith(start)
    return text.removeprefix(start).split(end)[0]


def test_a_template_that_writes_definitions_gets_them():
    tokenizer = make("chatml", QWEN)
    rest = (
        "<|im_start|>user\nRain?<|im_end|>\n"
        f"<|im_start|>assistant\n{CALLED}<|im_end|>\n"
    )
    for talk, opening in (([SYSTEM, *TALK], "Be brief."), (TALK, "You are here.")):
        text, learned = rendered(tokenizer, read(talk))
        assert text == f"<|im_start|>system\n{opening}\n\n{TEXT}<|im_end|>\n{rest}"
        assert learned == [f"{CALLED}<|im_end|>"]
        prompt = chat.render_prompt(tokenizer, read(talk)[:-1])
        whole, _ = chat.render(tokenizer, read(talk))
        assert whole[: len(prompt)].tolist() == prompt.tolist()
    text, learned = rendered(tokenizer, read(TALK, tools=()))
    assert text == rest and learned == [f"{CALLED}<|im_end|>"]


def test_definitions_stay_when_a_conversation_is_cut():
    tokenizer = make("chatml", QWEN)
    talk = [*TALK, {"role": "tool", "content": "wet"}, TALK[0], TALK[1]]
    messages = read(talk)
    validate_fine_tuning(tokenizer, {"messages": messages})
    length = len(chat.render(tokenizer, [messages[0], *messages[4:]])[0])
    windows = examples.windows(tokenizer, messages, length)
    assert len(windows) == 2
    starts = {tuple(window[:40, 0].tolist()) for window in windows}
    assert len(starts) == 1
    cut = chat.render_prompt(tokenizer, messages[:-1], max_tokens=length)
    assert tuple(cut[:40].tolist()) in starts


@pytest.mark.parametrize("name", ["ours", "chatml"])
def test_any_other_template_gets_them_in_the_system_message(name):
    tokenizer = make(name)
    with_system, learned = rendered(tokenizer, read([SYSTEM, *TALK]))
    assert f"Be brief.\n\n{TEXT}" in with_system
    alone, again = rendered(tokenizer, read(TALK))
    assert alone == with_system.replace("Be brief.\n\n", "")
    assert learned == again and CALLED in learned[0]


def test_a_template_that_loses_them_is_refused():
    tokenizer = make("chatml", QWEN.replace("tool | tojson", "tool.type"))
    with pytest.raises(DataError, match="does not write the definitions of tools"):
        chat.render(tokenizer, read(TALK))


def test_a_definition_cannot_write_a_special_token():
    bad = {"name": "x", "description": "<|im_end|>"}
    with pytest.raises(DataError, match="a definition of a tool spells the special"):
        chat.render(make("chatml", QWEN), read(TALK, [bad]))
    tokens, _ = chat.render(tokenizer := make("chatml"), read(TALK, [bad]))
    assert (tokens == tokenizer.token_id("<|im_end|>")).sum() == 3


def test_every_kind_of_row_has_them():
    definitions = read(TALK)[0]["tools"]
    prompt, system = "Rain?", {"role": "system", "content": "", "tools": definitions}
    rows = {
        "messages": {"messages": TALK},
        "prompt": {"prompt": prompt},
        "preferences": {"prompt": prompt, "chosen": "Yes.", "rejected": "No."},
        "unpaired": {"prompt": prompt, "completion": "Yes.", "label": True},
        "steps": {"prompt": prompt, "completions": ["Yes."], "labels": [True]},
    }
    for kind, raw in rows.items():
        for tools in ([WEATHER, CLOCK], json.dumps([WEATHER, CLOCK])):
            row = Reader(kind, {})(raw | {"tools": tools})
            assert row["messages"][0] == system and "tools" not in row
            assert row["messages"][1] == TALK[0]
        # What is written is read again.
        turns = row["messages"]
        if kind in ("prompt", "preferences"):
            row = {**row, "prompt": row.pop("messages")}
        again = Reader(kind, {})(json.loads(json.dumps(row)))
        assert again["messages"] == turns
        for none in (None, [], "", "[]"):
            row = Reader(kind, {})(raw | {"tools": none})
            assert "tools" not in str(row)
    mapped = Reader("messages", {"tools": "functions"})
    assert mapped({"messages": TALK, "functions": [WEATHER]})["messages"][0]["tools"]


def test_fields_that_arrow_adds_are_left_out(tmp_path):
    table = pa.Table.from_pylist(
        [{"messages": TALK[:1], "tools": [one]} for one in (WEATHER, CLOCK)]
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    source = open_source(f"{tmp_path}/rows.parquet", kind="prompt", split="all")
    assert [source[i]["messages"][0]["tools"] for i in range(2)] == [
        f"[{line}]" for line in LINES.split("\n")
    ]


@pytest.mark.parametrize(
    ("tools", "why"),
    [
        (["weather"], "'tools': a tool needs a function with 'name', got 'weather'"),
        ([{"type": "function"}], "a tool needs a function with 'name'"),
        ([{"name": 3}], "column 'name' must be text"),
        ({"name": "x"}, "column 'tools' must be a list, got dict"),
        ("weather", "'tools': not JSON"),
        ([{"name": "x", "y": float("nan")}], "'tools'"),
    ],
)
def test_what_is_no_definition_is_named(tools, why):
    with pytest.raises(BadRow, match=why):
        normalize("messages", {"messages": TALK, "tools": tools}, {})
