"""Batches: what they hold, that none of it depends on hosts, and that a saved state goes on with
exactly the next.
"""

import itertools
import json

import jax
import numpy as np
import pytest

from rlhfjax.data import chat
from rlhfjax.data.encoded import OVERHEAD, Encoded
from rlhfjax.data.loader import (
    preference_batches,
    pretrain_batches,
    prompt_batches,
    sft_batches,
)
from rlhfjax.data.prompts import Prompts
from rlhfjax.data.sources import Rows
from rlhfjax.errors import CheckpointError, ConfigError, DataError
from tests.data.test_templates import make as make_tokenizer

KINDS = ("pretrain", "mixed", "cross_document", "sft", "prompts", "preferences")


@pytest.fixture
def make(tokenizer, conversations, documents, rankings):
    """make(kind, **options) -> Batches, of every kind of loader."""
    prompts = Prompts(conversations, per_conversation=2)
    loaders = {
        "pretrain": lambda **o: pretrain_batches(
            documents, tokenizer, **({"length": 16} | o)
        ),
        "mixed": lambda **o: pretrain_batches(
            [(documents, 3.0), (conversations, 1.0)], tokenizer, **({"length": 16} | o)
        ),
        "cross_document": lambda **o: pretrain_batches(
            documents, tokenizer, cross_document=True, **({"length": 16} | o)
        ),
        "sft": lambda **o: sft_batches(
            conversations, tokenizer, **({"length": 48} | o)
        ),
        "prompts": lambda **o: prompt_batches(
            prompts, tokenizer, **({"length": 24} | o)
        ),
        "preferences": lambda **o: preference_batches(
            rankings, tokenizer, **({"length": 24} | o)
        ),
    }
    return lambda kind, **options: loaders[kind](**({"batch_size": 4} | options))


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_pitfall_30_a_restored_iterator_goes_on_with_exactly_the_next_batch(make, kind):
    # 40 batches are several epochs of the little sets, so that states lie in the middle of one, and
    # of a packed bin. What happens after a save must not reach into its state: the run goes on to
    # the end before any is restored.
    running, whole, states = make(kind), [], {}
    for done in range(48):
        if done in (0, 1, 5, 40):
            states[done] = json.loads(json.dumps(running.get_state()))
        whole.append(next(running))
    for done, state in states.items():
        restored = make(kind)
        take(restored, 2)
        restored.set_state(state)
        assert restored.get_state() == state
        assert_equal(take(restored, 8), whole[done : done + 8])


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_pass_can_be_restored_anywhere_up_to_its_end(make, kind):
    running, restored, whole, states = (
        make(kind, train=False),
        make(kind, train=False),
        [],
        [],
    )
    while True:
        states.append(running.get_state())
        if (batch := next(running, None)) is None:
            break
        whole.append(batch)
    for done, state in enumerate(states):
        restored.set_state(state)
        assert_equal(list(restored), whole[done:])
    assert len(whole) > 1 and next(running, None) is None
    assert_equal(list(running.restart()), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_the_order_and_epochs_differ(make, kind):
    first = take(make(kind, seed=1), 12)
    assert_equal(take(make(kind, seed=1), 12), first)
    other = take(make(kind, seed=2), 12)
    assert not all(
        np.array_equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True)
    )


def test_every_epoch_holds_every_prompt_once_in_a_new_order(make):
    batches = make("prompts", batch_size=1)
    state_free = make("prompts", batch_size=1, train=False)
    count = len(list(state_free))
    epochs = [[int(batch.index[0]) for batch in take(batches, count)] for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(count))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def real_segments(batches):
    """Each segment of each row: inputs, targets, mask, positions."""
    for batch in batches:
        for row in range(len(batch.tokens)):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                where = batch.segment_ids[row] == segment
                yield [
                    getattr(batch, name)[row][where]
                    for name in ("tokens", "targets", "mask", "positions")
                ]


def test_packed_documents_hold_every_target_once_and_never_cross(
    make, tokenizer, documents
):
    # Reference: every document's (input, target) pairs, counted with a plain loop.
    expected = []
    for row in documents:
        ids = [tokenizer.bos_id, *tokenizer.encode(row["text"]), tokenizer.eos_id]
        expected += list(itertools.pairwise(ids))
    found = []
    for tokens, targets, mask, positions in real_segments(
        make("pretrain", train=False)
    ):
        assert positions.tolist() == list(range(len(tokens)))
        assert (
            targets[:-1].tolist() == tokens[1:].tolist()
        )  # the next token, within the segment
        assert (
            tokens[1:] != tokenizer.bos_id
        ).all() and mask.all()  # a new document is a new segment
        found += list(zip(tokens.tolist(), targets.tolist(), strict=True))
    assert (
        found == expected
    )  # in order, none lost where a document goes on in the next row


def test_documents_without_a_bos_are_packed_between_document_tokens():
    """Prose teaches the end of a document and never that of a turn (Qwen2, SmolLM2)."""
    tokenizer = make_tokenizer("chatml")
    texts = ["the cat", "a", "who sat?"]
    source = Rows([{"text": text} for text in texts], "text")
    end = tokenizer.token_id("<|endoftext|>")
    documents = [[*tokenizer.encode(text), end] for text in texts]
    options = {"batch_size": 1, "length": 12, "train": False}
    (batch,) = pretrain_batches(source, tokenizer, **options)
    inputs = [token for ids in documents for token in ids[:-1]]
    targets = [token for ids in documents for token in ids[1:]]
    real = batch.segment_ids[0] > 0
    assert batch.tokens[0][real].tolist() == inputs
    assert batch.targets[0][real].tolist() == targets and batch.mask[0][real].all()
    assert tokenizer.eos_id != end and tokenizer.eos_id not in targets

    # Across documents the separator is an input, and the word after it is no target.
    (batch,) = pretrain_batches(source, tokenizer, cross_document=True, **options)
    stream = [token for ids in documents for token in ids]
    real = batch.segment_ids[0] > 0
    assert batch.tokens[0][real].tolist() == stream
    learned = batch.mask[0][real] > 0
    assert learned.tolist() == [token != end for token in stream]
    after = np.array([*stream[1:], end])
    np.testing.assert_array_equal(batch.targets[0][real][learned], after[learned])


def test_cross_document_rows_are_one_stream(make, tokenizer, documents):
    stream = []
    for row in documents:
        stream += [tokenizer.bos_id, *tokenizer.encode(row["text"]), tokenizer.eos_id]
    batches = list(make("cross_document", train=False))
    kept = np.concatenate([batch.segment_ids.reshape(-1) for batch in batches]) == 1
    tokens = np.concatenate([batch.tokens.reshape(-1) for batch in batches])[kept]
    targets = np.concatenate([batch.targets.reshape(-1) for batch in batches])[kept]
    assert tokens.tolist() == stream
    assert targets.tolist() == [*stream[1:], tokenizer.bos_id]
    assert all(
        (batch.positions == np.arange(16) * batch.segment_ids).all()
        for batch in batches
    )


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_padding_counts_for_nothing_whatever_the_batch_size(make, tokenizer, kind):
    weights = set()
    for size in (1, 3, 4, 7):
        batches = list(make(kind, train=False, batch_size=size))
        assert {batch.tokens.shape[0] for batch in batches} == {size}
        for batch in batches:
            empty = batch.segment_ids == 0
            assert not batch.mask[empty].any() and not batch.positions[empty].any()
            assert (batch.tokens[empty] == tokenizer.pad_id).all()
            assert (batch.targets[empty] == tokenizer.pad_id).all()
        weights.add(sum(batch.mask.sum() for batch in batches))
    assert len(weights) == 1


def test_pitfall_02_eos_is_a_target_that_counts(make, tokenizer, documents):
    ends = sum(
        float(batch.mask[batch.targets == tokenizer.eos_id].sum())
        for batch in make("pretrain", train=False)
    )
    assert ends == len(documents)


def test_pitfall_24_sft_learns_each_answer_once_and_no_prompt(
    make, tokenizer, conversations
):
    expected = [
        (*tokenizer.encode(turn["content"]), tokenizer.eos_id)
        for row in conversations
        for turn in row["messages"]
        if turn["role"] == "assistant"
    ]
    found = []
    for tokens, targets, mask, positions in real_segments(
        make("sft", train=False, length=64)
    ):
        assert tokens[0] == tokenizer.bos_id and tokens[1] == tokenizer.token_id(
            chat.ROLES["user"]
        )
        assert positions.tolist() == list(range(len(tokens)))
        assert targets[:-1].tolist() == tokens[1:].tolist()
        answers = np.split(np.arange(len(mask)), np.flatnonzero(np.diff(mask)) + 1)
        for answer in answers:
            if mask[answer[0]]:
                assert tokens[answer[0]] == tokenizer.token_id(chat.ROLES["assistant"])
                found.append(tuple(targets[answer].tolist()))
    assert sorted(found) == sorted(expected)


def test_mixing_follows_the_weights(make, tokenizer):
    # Conversations carry markers, plain documents do not: count how many documents of each kind
    # begin.
    batches = take(make("mixed"), 120)
    starts = np.concatenate(
        [batch.targets[batch.tokens == tokenizer.bos_id] for batch in batches]
    )
    share = (starts == tokenizer.token_id(chat.ROLES["user"])).mean()
    assert abs(share - 0.25) < 0.02


def test_pitfall_01_prompts_are_padded_on_the_left_and_segments_tell(
    make, tokenizer, conversations
):
    prompts = Prompts(conversations, per_conversation=2)
    seen = []
    for batch in make("prompts", train=False):
        for row, segments, index in zip(
            batch.tokens, batch.attention_mask, batch.index, strict=True
        ):
            size = int(segments.sum())
            assert segments.tolist() == [0] * (24 - size) + [1] * size
            assert (row[: 24 - size] == tokenizer.pad_id).all()
            if index >= 0:
                seen.append(int(index))
                messages = prompts[int(index)]["messages"]
                assert messages[-1]["role"] == "user"
                assert (
                    row[24 - size :].tolist()
                    == chat.render_prompt(tokenizer, messages, max_tokens=24).tolist()
                )
            else:
                assert row.tolist() == batch.tokens[0].tolist()
    assert seen == list(range(len(prompts)))


def test_pitfall_39_what_was_cut_is_counted_in_the_batches(tokenizer):
    def user(text):
        return {"role": "user", "content": text}

    long, short = user("the cat sat on the mat. " * 4), user("who?")
    prompts = Rows(
        [{"prompt": [long]}, {"prompt": [short]}, {"prompt": [long]}], "prompt"
    )
    batch = next(
        prompt_batches(prompts, tokenizer, batch_size=4, length=16, train=False)
    )
    assert batch.cut.tolist() == [1, 0, 1, 1]  # the last only fills
    answer = {"role": "assistant", "content": "yes."}
    talks = Rows(
        [{"messages": [turn, answer]} for turn in (long, short, short, long, short)],
        "messages",
    )
    batches = list(sft_batches(talks, tokenizer, batch_size=3, length=16, train=False))
    cut, segments = (
        np.concatenate([getattr(batch, name) for batch in batches])
        for name in ("cut", "segment_ids")
    )
    assert cut.sum() == 2 and segments.max(1).sum() == 5
    # A row that the long one fills has no other example, and the rest of them were not cut.
    assert [count > 0 for count in cut] == [(row == 1).all() for row in segments]


def test_prompts_are_prefixes_and_the_seed_chooses_them(conversations):
    every = Prompts(conversations, per_conversation=None)
    assert len(every) == sum(
        turn["role"] == "user" for row in conversations for turn in row["messages"]
    )
    one, other = Prompts(conversations, seed=0), Prompts(conversations, seed=1)
    assert len(one) == len(conversations)
    assert [row["messages"] for row in one] == [
        row["messages"] for row in Prompts(conversations, seed=0)
    ]
    assert [row["messages"] for row in one] != [row["messages"] for row in other]
    for i, row in enumerate(one):
        assert conversations[i]["messages"][: len(row["messages"])] == row["messages"]
    with pytest.raises(ConfigError, match="not text"):
        Prompts(Rows([{"text": "a"}], "text"))


def test_completions_of_a_prompt_are_one_element(make, tokenizer, rankings):
    batches = list(make("preferences", train=False))
    assert batches[0].tokens.shape == (4, 4, 24) and len(batches) == 3  # 9 prompts by 4
    for batch in batches:
        for i, index in enumerate(batch.index):
            if index < 0:
                assert not batch.valid[i].any() and not batch.attention_mask[i].any()
                continue
            row = rankings[int(index)]
            prompt = chat.render_prompt(
                tokenizer, [{"role": "user", "content": row["prompt"]}]
            ).tolist()
            k = len(row["completions"])
            assert batch.valid[i].tolist() == [1.0] * k + [0.0] * (4 - k)
            assert batch.scores[i, :k].tolist() == row["scores"]
            longest = max(
                len(tokenizer.encode(text)) + 1 for text in row["completions"]
            )
            prompt = prompt[-max(1, 24 - longest) :]
            for j, text in enumerate(row["completions"]):
                response = [*tokenizer.encode(text), tokenizer.eos_id]
                size = len(prompt) + len(response)
                assert batch.tokens[i, j].tolist() == prompt + response + [
                    tokenizer.pad_id
                ] * (24 - size)
                assert batch.attention_mask[i, j].tolist() == [1] * size + [0] * (
                    24 - size
                )
                assert batch.lengths[i, j] == len(response)


def test_pitfall_06_stored_ids_are_used_as_they_were_sampled(tokenizer):
    # "the" spelled byte by byte: the same text, other ids than the tokenizer would choose.
    odd = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in b"the"]
    assert tokenizer.decode(odd) == "the" and tokenizer.encode("the") != odd
    row = {"prompt": "the", "completions": ["the", ""], "scores": [1.0, 2.0]}
    row |= {
        "prompt_tokens": [tokenizer.bos_id, *odd],
        "completion_tokens": [odd, [tokenizer.eos_id]],
    }
    batch = next(
        preference_batches(
            Rows([row], "preferences"), tokenizer, batch_size=1, length=8, train=False
        )
    )
    assert batch.tokens[0, 0].tolist() == [
        tokenizer.bos_id,
        *odd,
        *odd,
        tokenizer.pad_id,
    ]
    assert batch.lengths[0].tolist() == [3, 1]


def test_completions_that_do_not_fit(tokenizer):
    def batch(prompt, completions, length):
        row = {
            "prompt": "p",
            "completions": ["a"] * len(completions),
            "scores": [0.0] * len(completions),
        }
        rows = Rows(
            [row | {"prompt_tokens": prompt, "completion_tokens": completions}],
            "preferences",
        )
        return next(
            preference_batches(
                rows, tokenizer, batch_size=1, length=length, train=False
            )
        )

    cut = batch(
        [11, 12, 13, 14], [[21, 22, 23], [31]], 5
    )  # the prompt loses 11, 12 for both
    assert cut.tokens[0].tolist() == [[13, 14, 21, 22, 23], [13, 14, 31, 0, 0]]
    cut = batch(
        [11, 12], [[21, 22, 23, 24, 25], [31]], 4
    )  # half of the row is the prompt's
    assert cut.tokens[0].tolist() == [[11, 12, 21, 22], [11, 12, 31, 0]]
    assert cut.lengths[0].tolist() == [2, 1]
    assert cut.cut[0].tolist() == [1, 0]
    with pytest.raises(
        DataError, match="row 0: token id 99999 is outside the tokenizer's vocabulary"
    ):
        batch([99999], [[1], [2]], 4)


def test_a_state_of_other_data_or_settings_is_refused(make):
    state = make("pretrain").get_state()
    with pytest.raises(CheckpointError, match="saved with length=16, now length=32"):
        make("pretrain", length=32).set_state(state)
    with pytest.raises(CheckpointError, match="saved with seed=0, now seed=5"):
        make("pretrain", seed=5).set_state(state)
    with pytest.raises(CheckpointError, match="saved with kind=pretrain, now kind=sft"):
        make("sft").set_state(state)


def test_impossible_arguments_are_config_errors(
    make, tokenizer, documents, conversations
):
    with pytest.raises(ConfigError, match="batch_size=0: must be >= 1"):
        make("pretrain", batch_size=0)
    with pytest.raises(ConfigError, match="needs rows of kind messages, got text"):
        sft_batches(documents, tokenizer, batch_size=1, length=16)
    with pytest.raises(ConfigError, match="length=2: must be >= 4"):
        make("pretrain", length=2)
    with pytest.raises(ConfigError, match="weight=0\\.0 of a source: must be > 0"):
        pretrain_batches([(documents, 0.0)], tokenizer, batch_size=1, length=16)
    silent = Rows([{"messages": [{"role": "user", "content": "a"}]}], "messages")
    with pytest.raises(DataError, match="no conversation has an assistant turn"):
        sft_batches(silent, tokenizer, batch_size=1, length=16)


def test_a_row_is_encoded_once_while_there_is_room(documents):
    calls = []

    def encode(index, row):
        calls.append(index)
        return np.zeros(10)

    encoded = Encoded(documents, encode, max_items=25 + 2 * OVERHEAD)
    for index in (0, 1, 2, 0, 1, 2):
        encoded[index]
    assert calls == [0, 1, 2, 2]  # the third did not fit and is encoded anew
