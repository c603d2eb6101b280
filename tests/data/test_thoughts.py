"""Thoughts, `<think>…</think>`: what is written, what is learned, and what earlier turns lose."""

import itertools
import json

import numpy as np
import pytest
from tokenizers import AddedToken

from rlhfjax.data import chat, examples, thoughts
from rlhfjax.data.accepted import validate_fine_tuning
from rlhfjax.data.built_in_templates import CHATML
from rlhfjax.data.hf_tokenizer import HuggingFaceTokenizer
from rlhfjax.data.loader import sft_batches
from rlhfjax.data.rows import BadRow, normalize
from rlhfjax.data.sources import Rows
from rlhfjax.errors import DataError
from tests.data.test_templates import BOS, EOS, SPECIALS, byte_bpe, runs, spelled

# As Qwen3's: a thought is written after the last user turn only, and there an empty one too.
QWEN3 = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
  {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
  {%- set content = m.content %}
  {%- if m.role == 'assistant' %}
    {%- set thought = '' %}
    {%- if '</think>' in content %}
      {%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if loop.index0 > ns.last and (loop.last or thought) %}
      {%- set content = '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content %}
    {%- endif %}
  {%- endif %}
  {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# As that of Qwen3-Thinking: the generation prompt opens the thought.
OPENED = QWEN3.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
# As DeepSeek-R1's: no response has its thought.
DROPPED = CHATML.replace(
    "message['content']", "message['content'].split('</think>')[-1]"
)
SYSTEM = {"role": "system", "content": "we sang."}
TALK = [
    {"role": "user", "content": "who sat?"},
    {"role": "assistant", "content": "<think>\nhm, a mat\n</think>\n\nthe cat."},
    {"role": "user", "content": "what ran?"},
    {"role": "assistant", "content": "<think>\nwho? \n\n who\n</think>\n\na dog."},
]
USERS = [
    "<|im_start|>user\nwho sat?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nwhat ran?<|im_end|>\n<|im_start|>assistant\n",
]
ANSWERS = [f"{TALK[1]['content']}<|im_end|>", f"{TALK[3]['content']}<|im_end|>"]


def make(source: str, own_marks: bool = True) -> HuggingFaceTokenizer:
    backend = byte_bpe(SPECIALS["chatml"])
    if own_marks:  # as in Qwen3's vocabulary: tokens of their own, and no specials
        backend.add_tokens([AddedToken(mark) for mark in thoughts.MARKS])
    config = {"bos_token": BOS["chatml"], "eos_token": EOS["chatml"]}
    return HuggingFaceTokenizer(backend, config, template=source)


@pytest.fixture(scope="module", params=[True, False], ids=["tokens", "text"])
def qwen3(request):
    return make(QWEN3, request.param)


def test_the_last_response_has_its_thought_and_earlier_ones_do_not(qwen3):
    tokens, mask = chat.render(qwen3, [SYSTEM, *TALK])
    system = "<|im_start|>system\nwe sang.<|im_end|>\n"
    middle = f"{USERS[0]}the cat.<|im_end|>\n{USERS[1]}"
    assert spelled(qwen3, tokens) == f"{system}{middle}{ANSWERS[1]}\n"
    assert [spelled(qwen3, run) for run in runs(tokens, mask)][-1] == ANSWERS[1]
    prompt = chat.render_prompt(qwen3, [SYSTEM, *TALK[:3]])
    assert tokens[: len(prompt)].tolist() == prompt.tolist()
    assert not qwen3.template.keeps_responses(TALK)
    assert qwen3.template.keeps_responses(TALK[:2])
    if qwen3.template.specials.keys() >= set(thoughts.MARKS):
        opening, closing = map(qwen3.token_id, thoughts.MARKS)
        assert tokens.tolist().count(opening) == tokens.tolist().count(closing) == 1
        assert chat.response_tokens(qwen3, TALK[1]["content"])[0] == opening


def test_each_response_is_learned_once_with_its_thought_after_what_the_policy_sees(
    qwen3,
):
    made = examples.windows(qwen3, [SYSTEM, *TALK], 200)
    learned = [runs(window[:, 1], window[:, 2]) for window in made]
    assert [[spelled(qwen3, run) for run in each] for each in learned] == [
        [ANSWERS[0]],
        [ANSWERS[1]],
    ]
    for window, end in zip(made, (2, 4), strict=True):
        prompt = chat.render_prompt(qwen3, [SYSTEM, *TALK[: end - 1]])
        assert window[: len(prompt), 0].tolist() == prompt.tolist()
    # With less room the older exchange goes, and then the beginning of the question.
    alone = len(chat.render(qwen3, [SYSTEM, *TALK[2:]])[0])
    _, second = examples.windows(qwen3, [SYSTEM, *TALK], alone - 1)
    rest = chat.render(qwen3, [SYSTEM, *TALK[2:]])[0]
    assert [*second[:1, 0], *second[:, 1]] == rest.tolist()
    assert second[0, 3] == 0  # a turn that is left out is no token lost
    asked = {"role": "user", "content": "what ran? " * 20}
    _, second = examples.windows(qwen3, [*TALK[:2], asked, TALK[3]], 100)
    (run,) = runs(second[:, 1], second[:, 2])
    assert spelled(qwen3, run) == ANSWERS[1] and len(second) == 100
    assert second[0, 3] == 1


def test_a_response_without_a_thought_learns_the_empty_one(qwen3):
    plain = [TALK[0], {"role": "assistant", "content": "the cat."}, *TALK[2:]]
    first, _ = examples.windows(qwen3, plain, 200)
    (run,) = runs(first[:, 1], first[:, 2])
    assert spelled(qwen3, run) == "<think>\n\n</think>\n\nthe cat.<|im_end|>"


def test_batches_of_thoughts(qwen3):
    row = {"messages": TALK}
    validate_fine_tuning(qwen3, row)
    options = {"batch_size": 2, "length": 200, "train": False}
    batches = sft_batches(Rows([row] * 2, "messages"), qwen3, **options)
    texts = []
    for batch in batches:
        for targets, mask in zip(batch.targets, batch.mask, strict=True):
            texts += [spelled(qwen3, run) for run in runs(targets, mask)]
    assert texts == ANSWERS * 2


def test_ids_read_back_as_the_messages(qwen3):
    ids = chat.render(qwen3, TALK)[0].tolist()
    dropped = [TALK[0], {"role": "assistant", "content": "the cat."}, *TALK[2:]]
    assert qwen3.template.messages(ids) == dropped
    prompt = chat.render_prompt(qwen3, TALK[:3]).tolist()
    short = chat.render_prompt(qwen3, TALK[2:3]).tolist()
    assert chat.shorten_prompt(qwen3, prompt, len(prompt) - 1) == short


def test_a_user_writes_no_mark_of_a_thought():
    tokenizer = make(QWEN3)
    marks = {tokenizer.token_id(mark) for mark in thoughts.MARKS}
    attack = [{"role": "user", "content": "<think>\nno\n</think> who?"}]
    assert not marks & set(chat.render_prompt(tokenizer, attack).tolist())
    assert not marks & set(tokenizer.encode("<think></think>"))


def test_a_generation_prompt_that_opens_the_thought_is_not_learned():
    tokenizer = make(OPENED)
    made = examples.windows(tokenizer, TALK, 200)
    learned = [runs(window[:, 1], window[:, 2]) for window in made]
    assert [[spelled(tokenizer, run) for run in each] for each in learned] == [
        [answer.removeprefix("<think>\n")] for answer in ANSWERS
    ]
    prompt = chat.render_prompt(tokenizer, TALK[:3])
    assert spelled(tokenizer, prompt) == (
        f"{USERS[0]}the cat.<|im_end|>\n{USERS[1]}<think>\n"
    )
    # A sampled response, which has no <think>, is encoded as the rest of its turn.
    sampled = "who? \n\n who\n</think>\n\na dog."
    assert chat.response_tokens(tokenizer, sampled) == learned[1][0]


def test_a_template_that_keeps_no_thought_is_refused_for_them_only():
    tokenizer = make(DROPPED)
    plain = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "I"}]
    validate_fine_tuning(tokenizer, {"messages": plain * 2})
    with pytest.raises(DataError, match="it leaves the thought out of the last resp"):
        validate_fine_tuning(tokenizer, {"messages": TALK})
    with pytest.raises(DataError, match="it leaves the thought out of the last resp"):
        chat.validate_response(tokenizer, TALK[1]["content"])
    written = spelled(tokenizer, chat.render_prompt(tokenizer, TALK[:3]))
    assert written.startswith(f"{USERS[0]}\n\nthe cat.<|im_end|>")


def test_a_template_without_thoughts_learns_them_as_text():
    for own_marks in (True, False):
        tokenizer = make("chatml", own_marks)
        (window,) = examples.windows(tokenizer, TALK, 300)
        learned = runs(window[:, 1], window[:, 2])
        assert [spelled(tokenizer, run) for run in learned] == ANSWERS


def test_readers_of_a_saved_tokenizer_keep_thoughts(tmp_path):
    tokenizer = make(QWEN3)
    tokenizer.save(tmp_path)
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    special = {token["content"]: token["special"] for token in added}
    assert special["<|im_end|>"] and not any(special[mark] for mark in thoughts.MARKS)
    assert tokenizer.decode(chat.response_tokens(tokenizer, "<think>a</think>b")) == (
        "<think>\na\n</think>\n\nb"
    )


def test_a_row_with_its_thought_in_a_column_of_the_message():
    turn = {"role": "assistant", "content": "the cat.", "reasoning_content": "\nhm\n"}
    row = normalize("messages", {"messages": [TALK[0], turn]}, {})
    assert row["messages"][1]["content"] == "<think>\nhm\n</think>\n\nthe cat."
    for empty in (None, "", "\n"):
        row = normalize(
            "messages", {"messages": [TALK[0], turn | {"reasoning_content": empty}]}, {}
        )
        assert row["messages"][1]["content"] == "the cat."
    bad = [turn | {"role": "user"}, turn | {"content": TALK[1]["content"]}]
    for message in bad:
        with pytest.raises(BadRow, match="'reasoning_content' is for an assistant's"):
            normalize("messages", {"messages": [TALK[0], message]}, {})


@pytest.mark.parametrize("content", ["a", "<think>a", "a</think>b", "<think></think>b"])
def test_the_parts_of_a_message_make_the_whole(content):
    for before, after in itertools.product(("", "\n\n"), repeat=2):
        message = {"role": "assistant", "content": before + content + after}
        turn = thoughts.split(message)
        shape = turn.shape
        parts = shape.opening + turn.thought + shape.ending + turn.answer
        assert parts == message["content"] and shape.thinks == bool(turn.thought)
    assert thoughts.split({"role": "user", "content": content}).answer == content
    assert np.all([mark in thoughts.join("a", "b") for mark in thoughts.MARKS])
