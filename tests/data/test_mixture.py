"""Sources mixed by weight, documents within fine-tuning, and what is counted of the rows."""

import itertools
import json
import random

import jax
import numpy as np
import pytest

from rlhfjax.data import chat, examples
from rlhfjax.data.config import SourceConfig, open_mixture, open_sources
from rlhfjax.data.loader import (
    Joined,
    Shards,
    preference_batches,
    pretrain_batches,
    prompt_batches,
    sft_batches,
)
from rlhfjax.data.mismatched import Mismatched
from rlhfjax.data.mixture import Mixed, combined, mixed_like
from rlhfjax.data.prompts import Prompts
from rlhfjax.data.sources import Concatenated, Rows
from rlhfjax.errors import CheckpointError, ConfigError, DataError
from tests.data.conftest import conversation, sentence
from tests.data.test_shards import row_order
from tests.data.test_templates import make as make_tokenizer

PER_SOURCE = 7919


def rankings(count, mark):
    rows = [
        {"prompt": f"{mark} {i}", "completions": ["a", "cat"], "scores": [0.0, 1.0]}
        for i in range(count)
    ]
    return Rows(rows, "preferences")


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize("streams", (1, 2))
def test_a_mixture_draws_by_weight_and_from_each_source_in_its_own_order(
    tokenizer, streams
):
    """3 : 1, of every stream, at every length of the draw; each source goes on by itself."""
    parts = [rankings(7, "the"), rankings(5, "dog")]
    options = {"length": 32, "seed": 4, "batch_size": 2 * streams}
    shards = Shards(streams, tuple(range(streams)))
    batches = preference_batches(
        Mixed(parts, [0.75, 0.25]), tokenizer, shards=shards, **options
    )
    found = [batch.index.reshape(streams, -1) for batch in take(batches, 40)]
    for j in range(streams):
        drawn = np.concatenate([rows[j] for rows in found]).tolist()
        counts = [0, 0]
        for n, index in enumerate(drawn, start=1):
            counts[index >= 7] += 1
            assert abs(counts[0] - 0.75 * n) <= 1
        for i, (first, source) in enumerate(zip((0, 7), parts, strict=True)):
            order = row_order(len(source), 4 + PER_SOURCE * i)
            of_stream = [first + order[j + streams * n] for n in range(counts[i])]
            assert [x for x in drawn if (x >= 7) == bool(i)] == of_stream


def test_rows_of_a_mixture_have_the_numbers_of_the_sources_in_a_row(tokenizer):
    parts = [rankings(3, "the"), rankings(4, "dog")]
    every = Concatenated(parts)
    batches = preference_batches(
        Mixed(parts, [1.0, 5.0]), tokenizer, batch_size=1, length=32
    )
    for batch in take(batches, 20):
        example = examples.preference(
            tokenizer, every[int(batch.index[0])], k=2, length=32
        )
        np.testing.assert_array_equal(batch.tokens[0], example.tokens)


def test_completions_of_other_prompts_are_mixed_in_the_same_order(tokenizer):
    source = Mixed([rankings(5, "the"), rankings(4, "dog")], [2.0, 1.0])
    others = mixed_like(source, Mismatched(source, tokenizer))
    options = {"tokenizer": tokenizer, "batch_size": 3, "length": 32}
    streams = {
        "": preference_batches(source, **options),
        "other/": preference_batches(others, **options),
    }
    both = Joined(lambda *pair: pair, streams)
    for own, other in take(both, 20):
        np.testing.assert_array_equal(own.index, other.index)
    whole = Concatenated(source.sources)
    assert mixed_like(whole, whole) is whole


def test_a_single_pass_and_sources_without_weights_are_concatenated(tokenizer):
    rng = random.Random(0)
    parts = [
        Rows([{"text": sentence(rng, 9)} for _ in range(n)], "text") for n in (5, 3)
    ]
    options = {"tokenizer": tokenizer, "batch_size": 2, "length": 16}
    mixed, plain = (
        list(pretrain_batches(source, train=False, **options))
        for source in (Mixed(parts, [9.0, 1.0]), Concatenated(parts))
    )
    assert_equal(mixed, plain)
    one = combined(parts, [None, None], "x")
    assert type(one) is Concatenated and combined(parts[:1], [None], "x") is parts[0]
    assert isinstance(combined(parts, [1.0, 2.0], "x"), Mixed)
    with pytest.raises(ConfigError, match=r"^x\[1\].weight=None: other sources have"):
        combined(parts, [1.0, None], "x")


def test_the_options_of_a_stage_reach_the_loader(tmp_path, tokenizer):
    files = []
    for name, count in (("a", 6), ("b", 2)):
        file = tmp_path / f"{name}.jsonl"
        rows = [json.dumps({"text": f"{name} the cat {i}"}) for i in range(count)]
        file.write_text("\n".join(rows))
        files.append(f"jsonl:{file}")
    configs = [
        SourceConfig(spec, kind="text", split="all", weight=weight)
        for spec, weight in zip(files, (1.0, 3.0), strict=True)
    ]
    source = open_mixture(configs, "sft.sources")
    state = pretrain_batches(source, tokenizer, batch_size=2, length=16).get_state()
    assert state["loader"]["source_rows"] == [[6, 1.0], [2, 3.0]]
    with pytest.raises(ConfigError, match=r"^x\[0\].weight=1.0: only training data is"):
        open_sources(configs, "x")
    configs[1] = SourceConfig(files[1], kind="text", split="all")
    with pytest.raises(ConfigError, match=r"^x\[1\].weight=None: other sources have"):
        open_mixture(configs, "x")
    assert type(open_sources(configs[1:] * 2, "x")) is Concatenated
    with pytest.raises(ConfigError, match=r"^x: at least one source is needed"):
        open_mixture([], "x")


# ------------------------------------------------------------------ documents in fine-tuning


@pytest.fixture(scope="module")
def chatml():
    return make_tokenizer("chatml")


@pytest.fixture(scope="module")
def talk():
    rng = random.Random(8)
    chats = [{"messages": conversation(rng, 2, longest=4)} for _ in range(9)]
    documents = [{"text": sentence(rng, 1 + 19 * i)} for i in range(4)]
    return Rows(chats, "messages"), Rows(documents, "text")


def segments(batches):
    """Yields inputs, targets, mask and marks of every example."""
    for batch in batches:
        for row in range(len(batch.tokens)):
            for number in range(1, batch.segment_ids[row].max() + 1):
                at = batch.segment_ids[row] == number
                names = ("tokens", "targets", "mask", "documents", "positions")
                yield tuple(getattr(batch, name)[row][at].tolist() for name in names)


def test_documents_are_packed_beside_conversations_and_all_their_targets_count(
    chatml, talk
):
    chats, documents = talk
    options = {"tokenizer": chatml, "batch_size": 2, "length": 64, "train": False}
    batches = list(sft_batches([chats, documents], documents=True, **options))
    found = list(segments(batches))
    marked = [x for x in found if x[3][0]]
    plain = [x for x in found if not x[3][0]]

    # Reference: the text and the end of a document, in pieces of at most 64 pairs.
    end = chatml.token_id("<|endoftext|>")
    expected = []
    for row in documents:
        ids = [*chatml.encode(row["text"]), end]
        pairs = list(itertools.pairwise(ids))
        for i in range(0, len(pairs), 64):
            expected.append(pairs[i : i + 64])
    assert any(len(piece) == 64 for piece in expected)
    assert sorted(list(zip(x[0], x[1], strict=True)) for x in marked) == sorted(
        expected
    )
    for tokens, targets, mask, marks, positions in marked:
        assert mask == [1.0] * len(tokens) == marks
        assert positions == list(range(len(tokens)))
        assert chatml.eos_id not in targets  # prose does not teach the end of a turn

    alone = list(sft_batches(chats, **options))
    assert alone[0].documents is None
    conversations = [
        (row[at].tolist(), batch.mask[i][at].tolist())
        for batch in alone
        for i, row in enumerate(batch.tokens)
        for number in range(1, batch.segment_ids[i].max() + 1)
        for at in [batch.segment_ids[i] == number]
    ]
    assert sorted((x[0], x[2]) for x in plain) == sorted(conversations)


def test_documents_have_their_share_of_the_rows(tokenizer):
    """9 : 1; one-word documents and two-turn conversations are one example each."""
    rng = random.Random(3)
    chats = Rows([{"messages": conversation(rng, 2)} for _ in range(30)], "messages")
    documents = Rows([{"text": sentence(rng, 3)} for _ in range(7)], "text")
    mixed = Mixed([chats, documents], [0.9, 0.1])
    batches = sft_batches(
        mixed, tokenizer, batch_size=4, length=96, documents=True, seed=2
    )
    marks = [x[3][0] for x in segments(take(batches, 60))]
    assert len(marks) > 400 and abs(np.mean(marks) - 0.1) < 0.02


def test_documents_are_mixed_in_only_where_they_are_asked_for(tokenizer, talk):
    chats, documents = talk
    options = {"tokenizer": tokenizer, "batch_size": 1, "length": 32}
    with pytest.raises(ConfigError, match="needs rows of kind messages, got mixed"):
        sft_batches([chats, documents], **options)
    with pytest.raises(DataError, match="no conversation has an assistant turn"):
        sft_batches(documents, documents=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("streams", (1, 2))
def test_a_mixture_is_resumed_in_its_middle(tokenizer, talk, streams):
    chats, documents = talk

    def make(weights=(0.8, 0.2)):
        return sft_batches(
            Mixed([chats, documents], weights),
            tokenizer,
            batch_size=4,
            length=48,
            documents=True,
            shards=Shards(streams, tuple(range(streams))),
        )

    running, states, whole = make(), {}, []
    for done in range(24):
        if done in (0, 3, 17):
            states[done] = json.loads(json.dumps(running.get_state()))
        whole.append(next(running))
    for done, state in states.items():
        resumed = make()
        take(resumed, 2)
        resumed.set_state(state)
        assert_equal(take(resumed, 6), whole[done : done + 6])
    said = r"saved with source_rows=\[\[9, 0.8\], \[4, 0.2\]\], now source_rows="
    with pytest.raises(CheckpointError, match=said):
        make((0.5, 0.5)).set_state(states[3])


# ------------------------------------------------------------------ counts


def turns(*contents):
    """Messages of the roles that the first letter of each content names."""
    roles = {"u": "user", "a": "assistant"}
    return [{"role": roles[text[0]], "content": text} for text in contents]


def test_turns_that_are_merged_are_counted_and_the_rows_are_as_they_were(
    tokenizer, tmp_path
):
    assert chat.merge_turns(turns("u1", "u2", "a1", "u3", "u4", "u5")).merged == 3
    assert chat.merge_turns(turns("u1", "a1")) == turns("u1", "a1")
    rows = [turns("u1", "u2", "a1"), turns("u1", "a1"), turns("u1", "a1", "a2", "a3")]
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"messages": messages}) for messages in rows]
    file.write_text("\n".join([*lines, '{"messages": 3}']))
    config = SourceConfig(
        f"jsonl:{file}", kind="messages", split="all", on_bad_row="skip"
    )
    options = {"tokenizer": tokenizer, "batch_size": 1, "length": 32}
    source = open_sources([config], "x")
    assert source[0]["messages"] == [
        {"role": "user", "content": "u1\nu2"},
        {"role": "assistant", "content": "a1"},
    ]
    for each, times in ((source, 1), (Concatenated([source, source]), 2)):
        batches = sft_batches(each, **options)
        assert (batches.skipped, batches.merged) == (times, 3 * times)
    sharded = sft_batches(
        source, shards=Shards(2, (0, 1)), **(options | {"batch_size": 2})
    )
    assert (sharded.skipped, sharded.merged) == (1, 3)
    prompts = Prompts(source)
    assert prompt_batches(prompts, **options).merged == 3
    joined = Joined(
        lambda *pair: pair, {"": sharded, "ptx/": sft_batches(source, **options)}
    )
    assert (joined.skipped, joined.merged) == (2, 6)
