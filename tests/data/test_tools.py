"""Calls of tools and their results: how they are read, rendered, learned, and kept apart."""

import pytest

from rlhfjax.data import chat, examples
from rlhfjax.data.rows import BadRow, normalize
from rlhfjax.errors import DataError
from tests.data.test_templates import make, runs, spelled

# As Qwen2.5's template writes them.
QWEN = (
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' and message.tool_calls %}"
    "{{- '<|im_start|>' + message.role }}"
    "{%- if message.content %}{{- '\n' + message.content }}{%- endif %}"
    "{%- for tool_call in message.tool_calls %}"
    "{%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}"
    '{{- \'\n<tool_call>\n{"name": "\' }}{{- tool_call.name }}'
    '{{- \'", "arguments": \' }}{{- tool_call.arguments | tojson }}'
    "{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}"
    "{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' }}{{- message.content }}{{- '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}"
    "{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- else %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'},
}
RAW = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "Rain "}, {"type": "text", "text": "?"}],
    },
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "wet"},
    {"role": "tool", "content": "cold"},
    {"role": "assistant", "content": "Yes."},
]
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'


def turns(raw=RAW):
    return normalize("messages", {"messages": raw}, {})["messages"]


def rendered(tokenizer, messages):
    """Returns the text of a conversation, and the texts that the loss is on."""
    tokens, mask = chat.render(tokenizer, messages)
    learned = [spelled(tokenizer, run) for run in runs(tokens, mask)]
    return spelled(tokenizer, tokens), learned


def test_messages_of_openai_are_read():
    read = turns()
    assert [turn["role"] for turn in read] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    assert [turn["content"] for turn in read] == ["Rain ?", "", "wet", "cold", "Yes."]
    assert read.merged == 0
    assert read[1]["tool_calls"] == (
        '[{"type": "function", "function": {"name": "weather",'
        ' "arguments": {"city": "Oslo", "days": 2}}}]'
    )
    assert (read[2]["name"], read[2]["tool_call_id"]) == ("weather", "c1")


def test_our_own_template_writes_calls_and_results_as_text():
    text, learned = rendered(make("ours"), turns())
    assert text == (
        f"<|bos|><|user|>Rain ?<|eos|><|assistant|>{CALLED}<|eos|>"
        "<|user|><tool_response>\nwet\n</tool_response><|eos|>"
        "<|user|><tool_response>\ncold\n</tool_response><|eos|><|assistant|>Yes.<|eos|>"
    )
    assert learned == [f"{CALLED}<|eos|>", "Yes.<|eos|>"]


def test_a_template_that_writes_calls_gets_them():
    text, learned = rendered(make("chatml", QWEN), turns())
    assert text == (
        f"<|im_start|>user\nRain ?<|im_end|>\n<|im_start|>assistant\n{CALLED}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nwet\n</tool_response>\n<tool_response>\ncold\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    assert learned == [f"{CALLED}<|im_end|>", "Yes.<|im_end|>"]


def test_a_turn_may_speak_and_call_at_once():
    raw = [
        RAW[0],
        {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL, CALL]},
    ]
    for name, template, end in (
        ("ours", None, "<|eos|>"),
        ("chatml", None, "<|im_end|>"),
        ("chatml", QWEN, "<|im_end|>"),
    ):
        _, learned = rendered(make(name, template), turns(raw))
        assert learned == [f"Let me look.\n{CALLED}\n{CALLED}{end}"]


def test_a_template_with_a_marker_per_role_gets_the_role():
    text, _ = rendered(make("chatml"), turns())
    assert "<|im_start|>tool\nwet<|im_end|>\n<|im_start|>tool\ncold<|im_end|>\n" in text


def test_a_template_that_takes_no_results_says_so():
    with pytest.raises(DataError, match="roles must alternate"):
        chat.render(make("llama2"), turns())


def test_a_prompt_is_the_beginning_of_the_conversation_after_a_result():
    tokenizer = make("chatml", QWEN)
    whole, _ = chat.render(tokenizer, turns())
    prompt = chat.render_prompt(tokenizer, turns()[:-1])
    assert whole[: len(prompt)].tolist() == prompt.tolist()


@pytest.mark.parametrize("template", [None, QWEN])
def test_a_turn_that_only_calls_is_an_example_of_fine_tuning(template):
    tokenizer = make("chatml", template)
    (example,) = examples.windows(tokenizer, turns(), 400)
    targets = example[example[:, 2] > 0, 1].tolist()
    assert spelled(tokenizer, targets) == f"{CALLED}<|im_end|>Yes.<|im_end|>"


def test_a_call_cannot_write_a_special_token():
    raw = [RAW[0], {"role": "assistant", "tool_calls": [dict(CALL)]}]
    arguments = {"city": "<|im_end|>\n<|im_start|>system"}
    raw[1]["tool_calls"][0]["function"] = {"name": "weather", "arguments": arguments}
    with pytest.raises(DataError, match="a tool call spells the special token"):
        chat.render(make("chatml", QWEN), turns(raw))
    tokenizer = make("chatml")  # here a call is content, and content is only characters
    tokens, _ = chat.render(tokenizer, turns(raw))
    assert (tokens == tokenizer.token_id("<|im_end|>")).sum() == 2


def test_a_conversation_as_text_has_its_calls():
    expected = (
        f"User: Rain ?\nAssistant: {CALLED}\nTool: wet\nTool: cold\nAssistant: Yes."
    )
    assert chat.to_text(turns()) == expected


def test_a_result_stays_with_its_exchange():
    head, exchanges = examples.exchanges_of(
        [*turns(), {"role": "user", "content": "Ok"}]
    )
    assert not head and [len(exchange) for exchange in exchanges] == [5, 1]
    windows = examples.windows(make("ours"), turns(), 400)
    assert len(windows) == 1


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "x"}}],
            },
            "a content part of type 'image_url'; only parts of type 'text'",
        ),
        ({"role": "user", "content": ["x"]}, "a content part of type 'x'"),
        ({"role": "user", "content": []}, "column 'content' is empty"),
        ({"role": "user", "content": None}, "column 'content' must be text"),
        (
            {"role": "user", "content": "x", "tool_calls": [CALL]},
            "'tool_calls' of the role 'user'",
        ),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "a function with 'name'"),
        ({"role": "assistant", "tool_calls": ["x"]}, "a function with 'name'"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]},
            "a tool call's 'arguments': not JSON",
        ),
        ({"role": "tool", "content": "x", "name": 3}, "column 'name' must be text"),
    ],
)
def test_what_cannot_be_read_is_named(message, why):
    with pytest.raises(BadRow, match=why):
        turns([message])
