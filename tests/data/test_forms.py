"""Forms of rows: each golden row is recognized, with its own columns and with mapped ones."""

import json

import numpy as np
import pytest

from rlhfjax.data import loader
from rlhfjax.data.forms import FORMS, Reader, gives
from rlhfjax.data.rows import BadRow, normalize
from rlhfjax.data.sources import Rows, open_source, texts
from rlhfjax.errors import ConfigError, DataError
from tests.data.row_forms import ASK, GOLDEN, OAK, PAIR, SYSTEM, WREN, in_turns, ranked


def plain(row):
    """Returns a row with lists for arrays."""
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in row.items()
    }


def written(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{file}"


def test_every_form_has_a_golden_row():
    assert list(GOLDEN) == [name for name in FORMS if name in GOLDEN]
    assert set(GOLDEN) == set(FORMS)


@pytest.mark.parametrize("form", GOLDEN)
def test_a_golden_row_is_recognized_and_read(tmp_path, form):
    golden = GOLDEN[form]
    spec = written(tmp_path, golden.raw)
    for kind, named in ((None, None), (golden.kind, None), (golden.kind, form)):
        source = open_source(spec, kind=kind, form=named, split="all")
        assert (source.kind, source.form) == (golden.kind, form)
        assert plain(source[0]) == golden.row


@pytest.mark.parametrize("form", GOLDEN)
def test_a_golden_row_is_read_with_mapped_columns(tmp_path, form):
    golden = GOLDEN[form]
    renamed = {f"my {name}": value for name, value in golden.raw.items()}
    columns = {name: f"my {name}" for name in golden.raw}
    if form == "preferences":
        columns |= {"extra": "more"}
        renamed |= {"more": 7}
    spec = written(tmp_path, renamed)
    for kind in (None, golden.kind):
        source = open_source(spec, kind=kind, columns=columns, split="all")
        extra = {"extra": 7} if form == "preferences" else {}
        assert source.form == form
        assert plain(source[0]) == golden.row | extra


@pytest.mark.parametrize("form", [form for form in GOLDEN if form != "text"])
def test_the_prompt_of_every_form(form):
    """The prompt is what comes before the response, as the golden row shows."""
    golden = GOLDEN[form]
    row = golden.row
    expected = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    expected = [turn for turn in expected if turn["role"] != "assistant"]
    columns = {} if "prompt" not in golden.raw else {"prompt": "prompt"}
    read = Reader("prompt", columns, form)
    assert gives(form, "prompt")
    assert read(golden.raw)["messages"] == expected


def test_a_prompt_ends_with_the_last_user_turn():
    raw = {"messages": [ASK, WREN, {"role": "user", "content": "Why?"}, OAK, SYSTEM]}
    turns = Reader("prompt", {})(raw)["messages"]
    assert turns == raw["messages"][:3]
    with pytest.raises(BadRow, match="no user turn"):
        Reader("prompt", {})({"messages": [SYSTEM, WREN]})


def test_rows_of_our_own_form_are_those_of_normalize():
    for kind in ("text", "messages", "prompt", "preferences"):
        raw = GOLDEN[kind].raw | {"more": 1}
        for columns in ({}, {"n": "more"}):
            assert Reader(kind, columns)(raw) == normalize(kind, raw, columns)
    pair = {"q": "who?", "good": "a", "bad": "b", "margin": 3, "score_chosen": 9}
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert Reader("preferences", columns)(pair) == normalize(
        "preferences", pair, columns
    )


def test_text_stays_the_kind_of_rows_with_a_text():
    """A dataset of Alpaca's form with the rendered text beside it, read as before."""
    raw = GOLDEN["alpaca"].raw | {"text": "Below is an instruction."}
    read = Reader(None, {})
    assert read(raw) == {"text": "Below is an instruction."} and read.kind == "text"
    assert Reader("messages", {})(raw) == GOLDEN["alpaca"].row


# ------------------------------------------------------------------ several forms, and none


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        ({"messages": [ASK], "prompt": "x"}, ("messages", "prompt")),
        (GOLDEN["pair"].raw | {"messages": [ASK, WREN]}, ("messages", "pair")),
        (GOLDEN["alpaca"].raw | {"conversations": []}, ("sharegpt", "alpaca")),
    ],
)
def test_columns_of_two_forms_name_both_and_the_option(tmp_path, raw, names):
    with pytest.raises(ConfigError) as error:
        open_source(written(tmp_path, raw), split="all")
    message = str(error.value)
    first, second = names
    assert message.startswith("source 'jsonl:") and "\n" not in message
    assert f"{first} and {second}; form={first!r} or form={second!r}" in message


def test_an_option_and_the_kind_choose_among_forms():
    raw = GOLDEN["pair"].raw | {"messages": [ASK, WREN]}
    assert Reader(None, {}, "pair")(raw) == GOLDEN["pair"].row
    assert Reader("messages", {})(raw) == {"messages": [ASK, WREN]}
    assert Reader("preferences", {})(raw) == GOLDEN["pair"].row


def test_labels_are_not_forgotten_by_a_narrower_form():
    """Undesirable responses are no demonstrations, unless the config says so."""
    raw = GOLDEN["kto"].raw
    why = "no column 'messages', .*columns of form 'kto', of kind unpaired"
    with pytest.raises(BadRow, match=why):
        Reader("messages", {})(raw)
    assert Reader("messages", {}, "prompt_completion")(raw)["messages"] == [ASK, OAK]


def test_a_form_and_a_kind_that_do_not_fit():
    with pytest.raises(ConfigError, match="gives rows of kind steps, not messages"):
        Reader("messages", {}, "prm800k")
    with pytest.raises(ConfigError, match="did you mean alpaca"):
        Reader(None, {}, "alpacca")


def test_a_row_of_another_form_is_a_bad_row(tmp_path):
    alpaca = GOLDEN["alpaca"]
    spec = written(tmp_path, {"x": 1}, alpaca.raw, GOLDEN["sharegpt"].raw, alpaca.raw)
    why = r"rows\.jsonl:1: no column 'instruction', found x; .*form 'alpaca'"
    with pytest.raises(DataError, match=why):
        open_source(spec, kind="messages", split="all")
    source = open_source(spec, kind="messages", split="all", on_bad_row="skip")
    assert (len(source), source.skipped, source.form) == (2, 2, "alpaca")
    assert source[1] == alpaca.row
    lazy = open_source(spec, split="all", validate=False)
    with pytest.raises(DataError, match=r"3: no column 'instruction', .*form 'alpaca'"):
        lazy[2]


def test_the_kind_is_known_before_rows_are_validated(tmp_path):
    spec = written(tmp_path, GOLDEN["kto"].raw)
    assert open_source(spec, split="all", validate=False).kind == "unpaired"


def test_rows_that_begin_alike_are_in_one_split_in_every_form(tmp_path):
    """The split is that of the first user turn, whatever the form and the kind."""
    texts = [f"Name bird {i}." for i in range(200)]
    alpaca = [{"instruction": text, "output": "A wren."} for text in texts]
    pairs = [{"prompt": text, "chosen": "a", "rejected": "b"} for text in texts]
    prompts = []
    for rows, kind in ((alpaca, "messages"), (alpaca, "prompt"), (pairs, "prompt")):
        source = open_source(written(tmp_path, *rows), kind=kind, split="validation")
        prompts.append([source[i]["messages"][0] for i in range(len(source))])
    assert prompts[0] == prompts[1] == prompts[2] and 0 < len(prompts[0]) < 40


# ------------------------------------------------------------------ what a form may hold


def read(raw, kind=None, form=None):
    return Reader(kind, {}, form)(raw)


def test_spellings_of_sharegpt():
    names = ["system", "HUMAN", "gpt", "user", "ChatGPT", "observation", "assistant"]
    turns = [{"from": name, "value": f"{i}"} for i, name in enumerate(names)]
    row = read({"conversations": turns})
    assert [turn["role"] for turn in row["messages"]] == [
        *("system", "user", "assistant", "user", "assistant", "tool", "assistant")
    ]
    columns = {"from": ["human", "gpt"], "value": ["Name a bird.", "A wren."]}
    assert read({"conversations": columns})["messages"] == [ASK, WREN]  # as TFDS has it
    same = read({"conversations": json.dumps([ASK, WREN]), "system": "Be brief."})
    assert same["messages"] == [SYSTEM, ASK, WREN]


def test_merged_turns_are_counted():
    turns = [{"from": "human", "value": "Name"}, {"from": "human", "value": "a bird."}]
    row = read({"conversations": [*turns, {"from": "gpt", "value": "A wren."}]})
    assert row["messages"][0]["content"] == "Name\na bird."
    assert row["messages"].merged == 1
    text = "\n\nHuman: Name\n\nHuman: a bird.\n\nAssistant:"
    row = read({"chosen": f"{text} A wren.", "rejected": f"{text} An oak."})
    assert row["messages"].merged == 1 and row["completions"] == PAIR
    assert read(GOLDEN["messages"].raw)["messages"].merged == 0


def test_alpaca_without_input_and_with_a_system_prompt():
    raw = {"instruction": "Name a bird.", "input": "", "output": "A wren."}
    assert read(raw)["messages"] == [ASK, WREN]
    raw |= {"input": None, "system": "Be brief."}
    assert read(raw)["messages"] == [SYSTEM, ASK, WREN]


def test_prompt_and_completion_as_messages():
    raw = {"prompt": [SYSTEM, ASK], "completion": [WREN]}
    assert read(raw)["messages"] == [SYSTEM, ASK, WREN]


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": [ASK], "chosen": [WREN], "rejected": [OAK]},
        {"prompt": [ASK], "chosen": [ASK, WREN], "rejected": [ASK, OAK]},
        {"prompt": "Name a bird.", "chosen": [ASK, WREN], "rejected": [ASK, OAK]},
        {"chosen": [ASK, WREN], "rejected": [ASK, OAK]},
        {
            "chosen": "\n\nHuman: Name a bird.\n\nAssistant: A wren.",
            "rejected": "\n\nHuman: Name a bird.\n\nAssistant: An oak.",
        },
    ],
)
def test_pairs_with_messages_are_one_row(raw):
    assert read(raw) == in_turns(ranked(PAIR, [1.0, 0.0]))


def test_turns_of_hh_are_those_of_the_conversation():
    text = "\n\nHuman: Name a bird.\n\nAssistant: A wren.\n\nHuman: Why?\nOh.\n\nAssistant: "
    row = read({"chosen": f"{text}It sings.\n\nLoudly.", "rejected": text})
    assert row["messages"] == [ASK, WREN, {"role": "user", "content": "Why?\nOh."}]
    assert row["completions"] == ["It sings.\n\nLoudly.", ""]


@pytest.mark.parametrize(
    ("extra", "scores"),
    [
        ({}, [1.0, 0.0]),
        ({"margin": 3}, [3.0, 0.0]),
        ({"margin": None, "score_chosen": 4.5}, [1.0, 0.0]),
        ({"score_chosen": 4.5, "score_rejected": 2}, [4.5, 2.0]),
        ({"score_chosen": 2, "score_rejected": 2}, [2.0, 2.0]),  # a tie stays one
    ],
)
def test_margins_and_scores_are_differences_of_scores(extra, scores):
    assert read(GOLDEN["pair"].raw | extra)["scores"] == scores


def test_a_margin_of_zero_keeps_the_order():
    first, second = read(GOLDEN["pair"].raw | {"margin": 0})["scores"]
    assert second == 0 < first < 1e-5


def test_shp_without_scores_has_its_label():
    raw = {name: GOLDEN["shp"].raw[name] for name in FORMS["shp"].columns}
    assert read(raw)["scores"] == [0.0, 1.0]
    assert read(raw | {"labels": 1})["scores"] == [1.0, 0.0]


def test_kto_with_messages():
    raw = {"prompt": [SYSTEM, ASK], "completion": [WREN], "label": 1}
    row = read(raw)
    assert row == {"messages": [SYSTEM, ASK], "response": "A wren.", "desirable": True}


def test_a_path_of_prm800k_ends_before_a_step_without_a_rating():
    steps = [
        {"completions": [{"text": "a", "rating": 1}], "chosen_completion": 0},
        {"completions": [{"text": "b", "rating": None}], "chosen_completion": 0},
        {"completions": [{"text": "c", "rating": 1}], "chosen_completion": 0},
    ]
    raw = {"question": {"problem": "q"}, "label": {"steps": steps}}
    assert read(raw)["steps"] == ["a"]
    with pytest.raises(BadRow, match="0 steps and 0 labels"):
        read({"question": {"problem": "q"}, "label": {"steps": steps[1:]}})


BAD = [
    ("sharegpt", {"conversations": []}, "has no messages"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "needs 'from' and 'value'"),
    (
        "sharegpt",
        {"conversations": [{"from": "Bob", "value": "x"}]},
        "role 'bob' is none of",
    ),
    ("alpaca", {"instruction": "x", "output": ""}, "column 'output' is empty"),
    ("alpaca", {"instruction": "x"}, "no column 'output', found instruction"),
    ("alpaca", {"instruction": "x", "output": "y", "input": 3}, "'input' must be text"),
    ("prompt_completion", {"prompt": "x", "completion": 3}, "must be a list, got int"),
    ("pair", {"prompt": "x", "chosen": [ASK], "rejected": [OAK]}, "turns of: user"),
    ("pair", GOLDEN["pair"].raw | {"margin": -1}, "'margin' must be >= 0, got -1"),
    ("pair", GOLDEN["pair"].raw | {"margin": "2"}, "column 'margin' must hold"),
    (
        "pair",
        GOLDEN["pair"].raw | {"score_chosen": 1, "score_rejected": 2},
        "score_chosen=1.0 is below score_rejected=2.0",
    ),
    (
        "pair",
        {"prompt": "Who?", "chosen": [ASK, WREN], "rejected": [ASK, OAK]},
        "column 'prompt' is not what 'chosen' and 'rejected' begin with",
    ),
    (
        "implicit_pair",
        {"chosen": [ASK, WREN], "rejected": [SYSTEM, ASK, OAK]},
        "must differ in their last response alone",
    ),
    ("implicit_pair", {"chosen": "a", "rejected": "b"}, "must begin with 'Human:'"),
    ("ranks", GOLDEN["ranks"].raw | {"ranks": [1, 2]}, "3 completions but 2 scores"),
    ("ranks", GOLDEN["ranks"].raw | {"ranks": [0, 1, 2]}, "3 whole numbers from 1"),
    ("ranks", GOLDEN["ranks"].raw | {"ranks": [1.5, 1, 2]}, "non-negative integers"),
    ("nectar", {"prompt": "x", "answers": ["a"]}, "objects with answer and rank"),
    ("shp", GOLDEN["shp"].raw | {"labels": 1}, "labels=1 contradicts the scores"),
    ("shp", GOLDEN["shp"].raw | {"labels": 2}, "must be true or false, got 2"),
    ("kto", GOLDEN["kto"].raw | {"label": "yes"}, "must be true or false, got 'yes'"),
    ("kto", GOLDEN["kto"].raw | {"completion": [ASK]}, "turns of: user"),
    ("stepwise", GOLDEN["stepwise"].raw | {"labels": [1]}, "2 steps and 1 labels"),
    ("stepwise", GOLDEN["stepwise"].raw | {"labels": [1, 2]}, "from -1 to 1, got 2"),
    ("prm800k", {"question": "x", "label": {}}, "must hold an object with 'problem'"),
    (
        "prm800k",
        {
            "question": {"problem": "x"},
            "label": {"steps": [{"completions": [], "chosen_completion": 2}]},
        },
        "chosen_completion=2: no such completion",
    ),
    ("math_shepherd", {"input": "x", "label": "x"}, "a question and steps that end"),
    (
        "math_shepherd",
        {"input": "x Step 1: y ки", "label": "x Step 1: y ?"},
        "with \\+ or - in place of ки, got '\\?'",
    ),
]


@pytest.mark.parametrize(("form", "raw", "why"), BAD)
def test_a_malformed_row_of_a_form_says_what_is_accepted(form, raw, why):
    with pytest.raises(BadRow, match=why) as error:
        read(raw, form=form)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


# ------------------------------------------------------------------ loaders take the rows


def test_a_tokenizer_is_trained_on_all_texts_of_a_row():
    rows = {kind: Rows([GOLDEN[kind].raw], kind) for kind in ("unpaired", "steps")}
    assert list(texts(rows["unpaired"])) == ["Name a bird.", "A wren."]
    assert list(texts(rows["steps"])) == ["Name a bird.", "It sings.", "A wren."]


def test_fine_tuning_learns_the_output_of_alpaca(tmp_path, tokenizer):
    spec = written(tmp_path, GOLDEN["alpaca"].raw)
    source = open_source(spec, kind="messages", split="all")
    batches = loader.sft_batches(
        source, tokenizer, batch_size=1, length=64, train=False
    )
    batch = next(batches)
    learned = batch.targets[0][batch.mask[0] > 0]
    assert tokenizer.decode(learned.tolist()) == "a bird"


def test_a_reward_model_gets_the_margin(tmp_path, tokenizer):
    spec = written(tmp_path, GOLDEN["implicit_pair"].raw | {"margin": 3})
    source = open_source(spec, kind="preferences", split="all")
    batches = loader.preference_batches(source, tokenizer, batch_size=1, length=64)
    np.testing.assert_array_equal(next(batches).scores, [[3.0, 0.0]])


def test_columns_of_no_form_are_named_with_the_remedy():
    why = "found question, good; no form of rows has these columns; columns= maps ours"
    with pytest.raises(BadRow, match=why):
        Reader(None, {})({"question": "Hi", "good": "Hello."})
