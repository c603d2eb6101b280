"""Streams that make a batch together: each example is in one, whichever host runs which."""

import dataclasses
import itertools
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import grain
import jax
import numpy as np
import pytest

from rlhfjax import hosts
from rlhfjax.data import chat, examples, packing
from rlhfjax.data.loader import (
    Shards,
    preference_batches,
    pretrain_batches,
    sft_batches,
)
from rlhfjax.data.sources import Rows
from rlhfjax.data.tokenizer import load_tokenizer
from rlhfjax.errors import CheckpointError, ConfigError

KINDS = ("pretrain", "mixed", "cross_document", "sft", "preferences")
SPLITS = {
    1: [(0, 1, 2, 3)],
    2: [(0, 1), (2, 3)],
    4: [(0,), (1,), (2,), (3,)],
}  # streams by host, of so many hosts


@pytest.fixture
def make(tokenizer, conversations, documents, rankings):
    """make(kind, **options) -> batches of 8 rows."""
    loaders = {
        "pretrain": lambda **o: pretrain_batches(documents, tokenizer, length=16, **o),
        "mixed": lambda **o: pretrain_batches(
            [(documents, 3.0), (conversations, 1.0)], tokenizer, length=16, **o
        ),
        "cross_document": lambda **o: pretrain_batches(
            documents, tokenizer, length=16, cross_document=True, **o
        ),
        "sft": lambda **o: sft_batches(conversations, tokenizer, length=48, **o),
        "preferences": lambda **o: preference_batches(
            rankings, tokenizer, length=24, **o
        ),
    }
    return lambda kind, **options: loaders[kind](**({"batch_size": 8} | options))


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is type(other)
        for ours, theirs in zip(
            jax.tree.leaves(one), jax.tree.leaves(other), strict=True
        ):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def on_hosts(monkeypatch, jobs):
    """Returns the results of one job per host, run at once; `hosts.gather` works between them."""
    said, barrier, this = (
        [None] * len(jobs),
        threading.Barrier(len(jobs), timeout=60),
        threading.local(),
    )

    def gather(value):
        said[this.host] = json.loads(json.dumps(value))
        barrier.wait()
        everything = list(said)
        barrier.wait()
        return everything

    def run(host):
        this.host = host
        return jobs[host]()

    with monkeypatch.context() as patch, ThreadPoolExecutor(len(jobs)) as pool:
        patch.setattr(hosts, "gather", gather)
        return list(pool.map(run, range(len(jobs))))


# ------------------------------------------------------------------ what is in which stream


def row_order(count, seed):
    """Rows of a source in the order of all epochs: shuffled anew in each."""
    return grain.MapDataset.range(count).shuffle(seed=seed).repeat()


@pytest.mark.parametrize("streams", (1, 2, 4))
def test_stream_j_has_every_streams_th_of_the_one_order_in_its_rows_of_every_batch(
    make, rankings, streams
):
    order = [row_order(len(rankings), 5)[i] for i in range(40)]
    batches = make("preferences", seed=5, shards=Shards(streams, tuple(range(streams))))
    found = [batch.index.reshape(streams, -1) for batch in take(batches, 5)]
    for j in range(streams):
        assert np.concatenate([rows[j] for rows in found]).tolist() == order[j::streams]


def packed_documents(tokenizer, documents, order, seed, size):
    ids = [examples.document(tokenizer, documents[i]) for i in order]
    pairs = [examples.shifted(one, np.ones(len(one), np.float32)) for one in ids]
    rows = packing.concatenate_and_split(
        grain.MapDataset.source(pairs).to_iter_dataset(), length=16
    )
    return grain.experimental.WindowShuffleIterDataset(
        rows, window_size=16 * size, seed=seed
    )


def packed_conversations(tokenizer, conversations, order, seed, size):
    found = [examples.fine_tuning(tokenizer, conversations[i], 48) for i in order]
    single = packing.flatten(grain.MapDataset.source(found).to_iter_dataset())
    return packing.first_fit(single, length=48, bins=64, seed=seed)


@pytest.mark.parametrize(
    ("streams", "kind"), [(1, "pretrain"), (4, "pretrain"), (4, "sft")]
)
def test_every_stream_packs_and_shuffles_by_itself(
    make, tokenizer, documents, conversations, kind, streams
):
    """Reference: a stream's part of the order, packed and shuffled as a single stream is."""
    source, pack = {
        "pretrain": (documents, packed_documents),
        "sft": (conversations, packed_conversations),
    }[kind]
    order, size = [row_order(len(source), 3)[i] for i in range(400)], 8 // streams
    found = take(make(kind, seed=3, shards=Shards(streams, tuple(range(streams)))), 6)
    for j in range(streams):
        rows = pack(tokenizer, source, order[j::streams], 3 + 104729 * j, size)
        packed = take(rows, 6 * size)
        expected = [packing.to_row(row, pad_id=tokenizer.pad_id) for row in packed]
        if kind == "sft":
            expected = [
                dataclasses.replace(a, cut=packing.examples_cut(b))
                for a, b in zip(expected, packed, strict=True)
            ]
        ours = [
            jax.tree.map(lambda x, row=j * size + i: x[row], batch)
            for batch in found
            for i in range(size)
        ]
        assert_equal(ours, expected)


def test_the_position_of_one_stream_has_the_form_of_before_there_were_several(make):
    """Checkpoints from then can be gone on from."""
    loader = {
        "batch_size": 8,
        "kind": "sft",
        "source_rows": [[23, 1.0]],
        "length": 48,
        "seed": 0,
        "train": True,
    }
    state = make("sft").get_state()
    assert state.keys() == {"loader", "rows"} and state["loader"] == loader
    assert state["rows"].keys() == {"parent", "next_row", "counter"}


def test_streams_are_disjoint_and_hold_every_document_once_an_epoch(tokenizer):
    """Every document comes exactly twice in two epochs.

    16 documents of 4 inputs each make a row each; 2 streams have 8 each per epoch. 16 batches of 2
    rows are 2 epochs, and a shuffling window is 16 rows of a stream.
    """
    words = ("the", "a", "cat", "dog", "bird", "sat", "ran", "sang")
    texts = [
        " ".join(some) for n in (1, 2, 3) for some in itertools.permutations(words, n)
    ]
    texts = [text for text in texts if len(tokenizer.encode(text)) == 3][:16]
    documents = Rows([{"text": text} for text in texts], "text")
    batches = pretrain_batches(
        documents, tokenizer, batch_size=2, length=4, shards=Shards(2, (0, 1))
    )
    found = [
        [tokenizer.decode(row[1:].tolist()) for row in batch.tokens]
        for batch in take(batches, 16)
    ]
    assert sorted(text for rows in found for text in rows) == sorted(texts * 2)
    order = [texts[row_order(16, 0)[i]] for i in range(32)]
    for j in (0, 1):
        mine = [rows[j] for rows in found]
        assert sorted(mine) == sorted(order[j::2])
        assert not set(order[:16][j::2]) & set(
            order[:16][1 - j :: 2]
        )  # an epoch's halves
    assert [rows[0] for rows in found] != order[
        0::2
    ]  # shuffled once more, within the window


def test_every_stream_is_mixed_by_the_same_weights(make, tokenizer):
    """3 to 1, by 4 streams: dealt out after mixing, one stream would have all conversations."""
    found = take(make("mixed", shards=Shards(4, (0, 1, 2, 3))), 100)
    for j in range(4):
        rows = slice(2 * j, 2 * j + 2)
        tokens, targets = (
            np.concatenate([getattr(batch, k)[rows] for batch in found])
            for k in ("tokens", "targets")
        )
        share = (
            targets[tokens == tokenizer.bos_id]
            == tokenizer.token_id(chat.ROLES["user"])
        ).mean()
        assert abs(share - 0.25) < 0.02


# ------------------------------------------------------------------ several hosts


@pytest.mark.parametrize(
    ("count", "kind"), [(2, "pretrain"), *((4, kind) for kind in KINDS)]
)
def test_hosts_with_some_of_the_streams_make_the_batches_of_one_with_all(
    make, kind, count
):
    whole = take(make(kind, shards=Shards(4, SPLITS[1][0])), 4)
    parts = [take(make(kind, shards=Shards(4, own)), 4) for own in SPLITS[count]]
    size = 8 // count
    for i, batch in enumerate(whole):
        for name, rows in vars(batch).items():
            if rows is None:
                continue
            for host, part in enumerate(parts):
                own = slice(host * size, (host + 1) * size)
                array = getattr(part[i], name)
                np.testing.assert_array_equal(array[own], rows[own])
                assert array.dtype == rows.dtype and array.shape == rows.shape
                # zeros, and nobody's rows
                assert not np.delete(array, own, axis=0).any()
            assert (rows[:size].any() and rows[size : 2 * size].any()) or name in (
                "scores",
                "cut",
            )


@pytest.mark.parametrize(
    ("kind", "done"),
    [
        ("pretrain", 20),
        ("mixed", 20),
        ("sft", 3),
        ("preferences", 3),
        ("preferences", 0),
    ],
)
def test_pitfall_30_a_position_of_two_hosts_is_gone_on_from_by_one_and_by_four(
    make, kind, done, monkeypatch
):
    def host(own, state=None):
        def job():
            batches = make(kind, shards=Shards(4, own))
            if state is None:
                take(batches, done)
                return batches.get_state(), batches
            next(batches)
            batches.set_state(state)
            return take(batches, 4), batches.get_state()

        return job

    ((alone, going_on),) = on_hosts(monkeypatch, [host(SPLITS[1][0])])
    expected = take(going_on, 4)
    states = [
        state for state, _ in on_hosts(monkeypatch, [host(own) for own in SPLITS[2]])
    ]
    assert states == [
        alone,
        alone,
    ]  # each host knows all of it: whichever writes it down
    state = json.loads(json.dumps(alone))
    assert len(state["rows"]) == 4
    if kind in (
        "pretrain",
        "mixed",
    ):  # beyond a window of shuffling, documents of unequal length behind them
        assert all(one != other for one, other in itertools.pairwise(state["rows"]))
    ends = []
    for splits in (SPLITS[1], SPLITS[4], [(0, 3), (1, 2)]):
        results = on_hosts(monkeypatch, [host(own, state) for own in splits])
        ends += [end for _, end in results]
        parts = zip(*(batches for batches, _ in results), strict=True)
        assembled = [
            jax.tree.map(lambda *arrays: sum(arrays), *hosts_parts)
            for hosts_parts in parts
        ]
        assert_equal(assembled, expected)
    assert all(end == ends[0] for end in ends) and ends[0] != state


@pytest.mark.parametrize("kind", ("pretrain", "sft", "preferences"))
def test_a_host_does_not_encode_what_is_not_its_own(
    kind, tokenizer, talk, monkeypatch, tmp_path
):
    """Two hosts ask the tokenizer for disjoint texts, each with its row's number, all together."""
    rng, asked = random.Random(0), []
    chats = [talk(rng, 4) for _ in range(600)]
    for i, messages in enumerate(chats):
        for turn in messages:
            turn["content"] += f" {i}"
    sources = {
        "pretrain": Rows(
            [{"text": messages[0]["content"]} for messages in chats], "text"
        ),
        "sft": Rows([{"messages": messages} for messages in chats], "messages"),
        "preferences": Rows(
            [
                {
                    "prompt": m[0]["content"],
                    "completions": [m[1]["content"], m[3]["content"]],
                    "scores": [0.0, 1.0],
                }
                for m in chats
            ],
            "preferences",
        ),
    }
    load = {
        "pretrain": pretrain_batches,
        "sft": sft_batches,
        "preferences": preference_batches,
    }[kind]
    tokenizer.save(tmp_path)
    encode = type(tokenizer).encode

    def counted(self, text, *args, **options):
        asked.append(text)
        return encode(self, text, *args, **options)

    def by(own):
        asked.clear()
        fresh = load_tokenizer(tmp_path)  # a chat template keeps what it has encoded
        take(
            load(sources[kind], fresh, batch_size=8, length=48, shards=Shards(4, own)),
            2,
        )
        return [text for text in asked if text[-1].isdigit()]

    monkeypatch.setattr(type(tokenizer), "encode", counted)
    everything, *halves = by((0, 1, 2, 3)), by((0, 1)), by((2, 3))
    assert set(halves[0]) | set(halves[1]) == set(everything) and not set(
        halves[0]
    ) & set(halves[1])
    assert len(everything) == sum(map(len, halves)) > 30
    assert all(0.4 < len(one) / len(everything) < 0.6 for one in halves)


# ------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_pass_is_whole_on_every_host(make, kind):
    assert_equal(
        list(make(kind, train=False, shards=Shards(4, (1,)))),
        list(make(kind, train=False)),
    )


def test_streams_that_cannot_share_a_batch_are_refused(make):
    with pytest.raises(
        ConfigError, match="data_shards=3: must divide the 8 rows of a batch"
    ):
        make("pretrain", shards=Shards(3, (0, 1, 2)))
    with pytest.raises(ConfigError, match="data_shards=16"):
        make("sft", shards=Shards(16, (0,)))
    with pytest.raises(ConfigError, match="data_shards=0"):
        make("preferences", shards=Shards(0, ()))
    with pytest.raises(ConfigError, match="at least one stream"):
        make("pretrain", shards=Shards(4, ()))


def test_a_position_of_other_streams_is_refused(make):
    one, four = make("pretrain"), make("pretrain", shards=Shards(4, SPLITS[1][0]))
    with pytest.raises(
        CheckpointError, match="saved with data_shards=1, now data_shards=4"
    ):
        four.set_state(one.get_state())
    with pytest.raises(
        CheckpointError, match="saved with data_shards=4, now data_shards=1"
    ):
        one.set_state(four.get_state())
    with pytest.raises(
        CheckpointError, match="saved with batch_size=8, now batch_size=4"
    ):
        make("pretrain", batch_size=4, shards=Shards(4, (0,))).set_state(
            four.get_state()
        )
