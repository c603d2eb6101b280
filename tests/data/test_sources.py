"""Sources: what is read, how it is split, and how a malformed row is reported."""

import json
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rlhfjax.data.rows import BadRow, normalize, split_key, split_of
from rlhfjax.data.sources import Concatenated, Rows, open_source, texts
from rlhfjax.errors import ConfigError, DataError

GOOD = {
    "text": {"text": "a cat"},
    "messages": {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yes"},
        ]
    },
    "prompt": {"prompt": "who sat?"},
    "preferences": {"prompt": "who?", "completions": ["a", "b"], "scores": [0.5, -1]},
}


def write_lines(path, *lines):
    raw = [
        line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines
    ]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return f"jsonl:{path}"


def changed(kind, **columns):
    return GOOD[kind] | columns


BAD = [
    ("text", b'{"text": "a', "not a JSON object (EOF while parsing a string"),
    ("text", b'["text"]', "expected a JSON object, got list"),
    ("text", {"body": "a"}, "no column 'text', found body"),
    ("text", {"text": 3}, "column 'text' must be text, got int"),
    ("text", {"text": None}, "column 'text' must be text, got NoneType"),
    ("text", {"text": " \n"}, "column 'text' is empty"),
    ("text", b'{"text": "\xff\xfe"}', "invalid UTF-8"),
    ("text", b'{"text": "\\ud800"}', "lone surrogate"),
    ("messages", {"messages": []}, "has no messages"),
    ("messages", {"messages": "hello"}, "neither a list of messages nor its JSON"),
    (
        "messages",
        {"messages": [{"role": "user"}]},
        "a message needs 'role' and 'content'",
    ),
    (
        "messages",
        {"messages": [{"role": "bot", "content": "x"}]},
        "role 'bot' is none of user",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": ""}]},
        "column 'content' is empty",
    ),
    (
        "prompt",
        {"prompt": [{"role": "assistant", "content": "x"}]},
        "must end with a user turn, ends with assistant",
    ),
    ("preferences", changed("preferences", scores=[1.0]), "2 completions but 1 scores"),
    (
        "preferences",
        changed("preferences", scores=[1.0, float("nan")]),
        "JSON has no NaN and no infinity",
    ),
    (
        "preferences",
        changed("preferences", scores=[1.0, True]),
        "must hold finite numbers in the range of float32, got True",
    ),
    (
        "preferences",
        changed("preferences", completions=["a"], scores=[1]),
        "at least 2 completions, got 1",
    ),
    (
        "preferences",
        changed("preferences", completions="ab"),
        "column 'completions' must be a list, got str",
    ),
    ("preferences", changed("preferences", prompt_tokens=[1]), "go together"),
    (
        "preferences",
        changed("preferences", prompt_tokens=[1], completion_tokens=[[1], [0.5]]),
        "non-negative integers",
    ),
]


@pytest.mark.parametrize(("kind", "row", "why"), BAD)
def test_a_malformed_row_stops_with_file_and_line_or_is_counted(
    tmp_path, kind, row, why
):
    spec = write_lines(tmp_path / "rows.jsonl", GOOD[kind], b"", row, GOOD[kind])
    with pytest.raises(DataError) as stopped:
        open_source(spec, kind=kind, split="all")
    message = str(stopped.value)
    assert (
        message.startswith(f"{tmp_path}/rows.jsonl:3: ")
        and why in message
        and "\n" not in message
    )
    source = open_source(spec, kind=kind, split="all", on_bad_row="skip")
    assert (len(source), source.skipped) == (2, 1)
    assert source.locate(1) == f"{tmp_path}/rows.jsonl:4"


def test_complex_scores_are_refused():
    """TFDS reads them where features.json has such a dtype."""
    row = changed("preferences", scores=np.array([1, 2], np.complex64))
    with pytest.raises(BadRow, match=r"finite numbers .*1\+0j"):
        normalize("preferences", row, {})
    real = changed("preferences", scores=np.array([1, 2], np.float32))
    assert normalize("preferences", real, {})["scores"] == [1.0, 2.0]


def test_without_validation_a_bad_row_is_found_when_it_is_read(tmp_path):
    spec = write_lines(tmp_path / "rows.jsonl", GOOD["text"], {"text": ""})
    source = open_source(spec, split="all", validate=False)
    assert source[0] == {"text": "a cat"}
    with pytest.raises(DataError, match=r"rows\.jsonl:2: column 'text' is empty"):
        source[1]


def test_columns_are_renamed_and_extra_ones_passed_through(tmp_path):
    spec = write_lines(
        tmp_path / "rows.jsonl", {"dialogue": GOOD["messages"]["messages"], "n": 7}
    )
    source = open_source(
        spec,
        kind="messages",
        split="all",
        columns={"messages": "dialogue", "number": "n"},
    )
    assert source[0] == GOOD["messages"] | {"number": 7}


def test_chosen_and_rejected_are_two_ranked_completions(tmp_path):
    spec = write_lines(
        tmp_path / "rows.jsonl", {"q": "who?", "good": "a cat", "bad": "no"}
    )
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    row = open_source(spec, kind="preferences", split="all", columns=columns)[0]
    assert row == {
        "prompt": "who?",
        "completions": ["a cat", "no"],
        "scores": [1.0, 0.0],
    }


def test_a_prompt_is_text_or_a_conversation():
    chat = [*GOOD["messages"]["messages"], {"role": "user", "content": "who?"}]
    for value in (chat, json.dumps(chat), json.dumps(chat).encode()):
        assert normalize("prompt", {"prompt": value}, {}) == {"messages": chat}
    for text in ("[1, 2] sort these", "[3, 1, 2]", '{"a": 1}', "12"):
        assert normalize("prompt", {"prompt": text}, {}) == {
            "messages": [{"role": "user", "content": text}]
        }
    source = Rows([GOOD["preferences"] | {"prompt": chat}], "preferences")
    row = source[0]
    assert (
        row["prompt"] == "User: hi\nAssistant: yes\nUser: who?"
        and row["messages"] == chat
    )
    assert list(texts(source)) == ["hi", "yes", "who?", "a", "b"]


def test_messages_come_as_lists_as_json_or_as_tfds_sequences():
    expected = GOOD["messages"]["messages"]
    sequence = {"role": [b"user", b"assistant"], "content": [b"hi", b"yes"]}
    for value in (
        expected,
        json.dumps(expected),
        json.dumps(expected).encode(),
        sequence,
    ):
        assert normalize("messages", {"messages": value}, {})["messages"] == expected
    with pytest.raises(BadRow, match="invalid UTF-8"):
        normalize("text", {"text": b"\xff"}, {})


def test_rows_split_by_hash_are_disjoint_and_complete_and_named_splits_are_files(
    tmp_path,
):
    spec = write_lines(
        tmp_path / "rows.jsonl", *[{"text": f"row {i}"} for i in range(600)]
    )
    found = {
        split: {row["text"] for row in open_source(spec, split=split)}
        for split in ("train", "validation", "test")
    }
    assert sum(map(len, found.values())) == 600 == len(set.union(*found.values()))
    assert all(
        15 <= len(found[split]) <= 50 for split in ("validation", "test")
    )  # 30 expected
    for split in ("train", "test"):
        write_lines(tmp_path / f"{split}.jsonl", {"text": split})
    assert [
        row["text"]
        for row in open_source(f"jsonl:{tmp_path}/{{split}}.jsonl", split="test")
    ] == ["test"]


def parts(spec, **options):
    return {
        split: open_source(spec, split=split, **options)
        for split in ("train", "validation", "test")
    }


def in_several(found):
    """Returns the keys that are in more than one split."""
    seen = [set(keys) for keys in found]
    return (seen[0] & seen[1]) | (seen[0] & seen[2]) | (seen[1] & seen[2])


def turns(*contents):
    return [
        {"role": ("user", "assistant")[i % 2], "content": text}
        for i, text in enumerate(contents)
    ]


@pytest.mark.parametrize("kind", ["prompt", "preferences"])
def test_pitfall_41_a_prompt_is_in_one_split(tmp_path, kind):
    """60 prompts with 5 rows each that differ elsewhere: the hash of the prompt gives the split."""
    rows = [
        {
            "q": f"who sat {i % 60}?",
            "id": i,
            "completions": [f"a {i}", "b"],
            "scores": [i, 0],
        }
        for i in range(300)
    ]
    found = parts(
        write_lines(tmp_path / "rows.jsonl", *rows),
        kind=kind,
        columns={"prompt": "q", "id": "id"},
    )
    asked = {split: [
        row["messages"][0]["content"] if kind == "prompt" else row["prompt"] for row in source]
             for split, source in found.items()}  # fmt: skip
    assert sum(map(len, asked.values())) == 300 and not in_several(asked.values())
    for split, prompts in asked.items():
        assert {split_of(prompt) for prompt in prompts} == {split}
        assert len(prompts) == 5 * len(set(prompts))


def test_pitfall_41_conversations_that_begin_alike_are_in_one_split(tmp_path):
    """The first user turn decides, whatever system message and responses stand beside it."""
    system = {"role": "system", "content": "be brief"}
    chats = [talk for i in range(60) for talk in (
        turns(f"hi {i}", "yes"),
        turns(f"hi {i}", "no", "why?", "so"),
        [system, *turns(f"hi {i}", "yes")],
    )]  # fmt: skip
    prompts = [talk if talk[-1]["role"] == "user" else talk[:-1] for talk in chats]
    for kind, rows in (
        ("messages", chats),
        ("prompt", prompts),
        ("preferences", prompts),
    ):
        column = "messages" if kind == "messages" else "prompt"
        rows = [
            {column: talk, "completions": ["a", "b"], "scores": [0, 1]} for talk in rows
        ]
        found = parts(write_lines(tmp_path / "rows.jsonl", *rows), kind=kind)
        for split, source in found.items():
            first = [
                next(
                    turn["content"]
                    for turn in row["messages"]
                    if turn["role"] == "user"
                )
                for row in source
            ]
            assert {split_of(text) for text in first} == {split} and len(
                first
            ) == 3 * len(set(first))


def test_pitfall_41_a_document_is_in_one_split_whatever_stands_beside_it(tmp_path):
    """The same text with another id, at the end of a file without a newline, or in JSON lines."""
    lines = [f"row {i}" for i in range(60)]
    doubled = [{"text": text, "id": i} for i in range(2) for text in lines]
    json_lines = parts(write_lines(tmp_path / "rows.jsonl", *doubled), kind="text")
    for i, text in enumerate(lines):
        (tmp_path / f"{i:02d}.txt").write_text(
            f"{text}\n{text}"
        )  # one line with its end, and one without
    plain = parts(f"text:{tmp_path}/*.txt", documents="line")
    for split in json_lines:
        texts = [[row["text"] for row in found[split]] for found in (json_lines, plain)]
        assert (
            sorted(texts[0])
            == sorted(texts[1])
            == sorted([text for text in lines if split_of(text) == split] * 2)
        )


def test_pitfall_41_a_row_without_a_prompt_is_still_reported(tmp_path):
    """Without a user the first turn decides; a malformed row's bytes do, and it is reported."""
    alone = {"messages": [{"role": "assistant", "content": "hello"}]}
    spec = write_lines(tmp_path / "rows.jsonl", alone, {"messages": []})
    said = []
    for split in ("train", "validation", "test"):
        with pytest.raises(DataError) as stopped:
            open_source(spec, kind="messages", split=split, on_bad_row="error")
        said.append(str(stopped.value))
    assert (
        sum("rows.jsonl:2: column 'messages' has no messages" in why for why in said)
        >= 1
    )
    assert split_key("messages", alone) == "hello"


def test_text_files_by_file_paragraph_and_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbffour\r\n")
    spec = f"text:{tmp_path}/*.txt"

    def rows(documents):
        source = open_source(spec, split="all", documents=documents)
        return [
            (source[i]["text"], source.locate(i).rsplit("/")[-1])
            for i in range(len(source))
        ]

    assert rows("file") == [
        ("one\ntwo\n\n\nthree\n", "a.txt:1"),
        ("four\r\n", "b.txt:1"),
    ]
    assert rows("paragraph") == [
        ("one\ntwo", "a.txt:1"),
        ("three", "a.txt:5"),
        ("four", "b.txt:1"),
    ]
    assert rows("line") == [
        ("one", "a.txt:1"),
        ("two", "a.txt:2"),
        ("three", "a.txt:5"),
        ("four", "b.txt:1"),
    ]


def test_text_with_invalid_utf8_names_the_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\xff\nthree\n")
    with pytest.raises(DataError, match=r"a\.txt:1: invalid UTF-8 on line 2"):
        open_source(f"text:{tmp_path}/a.txt", split="all")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.txt:1: column 'text' is empty"):
        open_source(f"text:{tmp_path}/empty.txt", split="all")


def test_our_corpora_by_name(data_dir):
    options = {"split": "validation", "data_dir": data_dir}
    every, long = (
        open_source("tfds:chitchat", **options),
        open_source("tfds:chitchat", min_turns=6, **options),
    )
    turns = [len(row["messages"]) for row in every]
    assert every.kind == "messages" and min(turns) == 1
    assert (
        len(long) == sum(n >= 6 for n in turns) < len(every)
        and min(len(row["messages"]) for row in long) == 6
    )
    plain = open_source("tfds:chitchat", kind="text", **options)
    assert plain[0]["text"].startswith("User: ") and len(plain) == len(every)
    rated = open_source(
        "tfds:chitchat", columns={"ratings": "ratings", "id": "id"}, **options
    )
    assert rated[0]["ratings"].shape == (3,) and isinstance(rated[0]["id"], str)
    assert open_source("tfds:kjv", **options).kind == "text"


class AnyReviews(tfds.core.GeneratorBasedBuilder):
    """A dataset with two configs. Defining the class registers it with TFDS."""

    pkg_dir_path = pathlib.Path(__file__).parent
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name=name, version=tfds.core.Version("1.0.0"))
        for name in ("long", "short")
    ]

    def _info(self):
        features = {"review": tfds.features.Text(), "stars": np.int32}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(8), "dev": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"review": f"{self.builder_config.name} {i}", "stars": i}


def test_any_tfds_dataset_by_name_config_and_folder(tmp_path):
    options = {"columns": {"text": "review", "stars": "stars"}, "data_dir": tmp_path}
    short = open_source("tfds:any_reviews/short", split="dev", **options)
    assert sorted((row["text"], int(row["stars"])) for row in short) == [
        ("short 0", 0),
        ("short 1", 1),
    ]
    assert (
        len(open_source("tfds:any_reviews/long", split="train[:50%]", **options)) == 4
    )
    folder = tmp_path / "any_reviews" / "short" / "1.0.0"
    assert len(open_source(f"tfds:{folder}", columns={"text": "review"})) == 8
    with pytest.raises(
        DataError,
        match=r"tfds:any_reviews\[dev\] record 0: column 'text' must be text, got int",
    ):
        open_source(f"tfds:{folder}", columns={"text": "stars"}, split="dev")


def test_tfds_errors_name_what_is_there(data_dir):
    with pytest.raises(DataError, match=r"no column 'body', found .*text"):
        open_source("tfds:kjv", data_dir=data_dir, columns={"text": "body"})
    with pytest.raises(DataError, match=r"no split 'dev', found .*validation"):
        open_source("tfds:kjv", data_dir=data_dir, split="dev")
    with pytest.raises(
        DataError, match=r"no such TFDS dataset or folder \(our own: chitchat, kjv, "
    ):
        open_source("tfds:no_such_set", data_dir=data_dir)


@pytest.mark.parametrize(
    ("spec", "options", "why"),
    [
        ("http://x", {}, "expected tfds:"),
        ("jsonl:", {}, "expected tfds:"),
        ("text:x", {"on_bad_row": "ignore"}, "on_bad_row must be"),
        ("text:x", {"kind": "table"}, "kind 'table' is none of text, messages"),
        ("text:x", {"documents": "page"}, "documents must be"),
        ("text:x", {"split": "dev"}, "split 'dev' is none of"),
        ("text:x", {"validate": False, "on_bad_row": "skip"}, "need validate=True"),
        ("text:x", {"columns": {"text": ""}}, "must be the name of a column"),
    ],
)
def test_a_senseless_spec_is_a_config_error(spec, options, why):
    with pytest.raises(ConfigError, match=why):
        open_source(spec, **options)


def test_no_file_and_no_rows_are_errors(tmp_path):
    with pytest.raises(DataError, match="no file matches"):
        open_source(f"jsonl:{tmp_path}/*.jsonl")
    (tmp_path / "a.txt").write_text("one document")
    with pytest.raises(
        DataError,
        match=r"no rows are left of 0; rows are split 90/5/5 .* documents='file'",
    ):
        open_source(
            f"text:{tmp_path}/a.txt",
            split="validation" if _is_train(tmp_path / "a.txt") else "train",
        )


def _is_train(path):
    return split_of(path.read_bytes()) == "train"


def test_concatenated_sources_keep_their_rows_and_places():
    both = Concatenated(
        [
            Rows([{"text": "a"}, {"text": "b"}], "text"),
            Rows([GOOD["messages"]], "messages"),
        ]
    )
    assert [len(both), both[1]["text"], both[2], both.locate(2)] == [
        3,
        "b",
        GOOD["messages"],
        "row 0",
    ]
    assert both.kind == "mixed"
    assert list(texts(both, Rows([GOOD["preferences"]], "preferences"))) == [
        "a",
        "b",
        "hi",
        "yes",
        "who?",
        "a",
        "b",
    ]
    with pytest.raises(IndexError):
        both[3]
