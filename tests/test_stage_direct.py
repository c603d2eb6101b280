"""The direct stage: every loss learns, and does not depend on how a batch is cut, placed or
interrupted.
"""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import recipe, stages, state
from rlhfjax.config import to_dict
from rlhfjax.data import examples, loader
from rlhfjax.data.batches import DirectBatch
from rlhfjax.data.config import open_preferences
from rlhfjax.data.mismatched import Mismatched
from rlhfjax.data.preferences import write_preferences
from rlhfjax.data.sources import Rows
from rlhfjax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.interop import store
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.metrics import finalize
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.rewards.direct import (
    Completions,
    LossConfig,
    completion_logprobs,
    implicit_rewards,
    make_loss,
    token_logprobs,
)
from rlhfjax.stages import direct, stage_config
from rlhfjax.supervised import language_loss
from tests.test_resume import _Crash, assert_same_stage, interrupt

VARIANTS = ("robust", "dpo_norm", "irpo", "dpop")
LOSSES = ("dpo", "cdpo", *VARIANTS, "ipo", "kto", "orpo", "simpo")
ONE = make_layout(MeshConfig(), jax.devices()[:1])
SGD = {"name": "sgd", "learning_rate": 1e-2, "b1": 0.0, "schedule": "constant"}
ADAM = {"learning_rate": 1e-2, "schedule": "constant"}
GOOD, BAD = (
    ("love happy", "good great tea", "love"),
    ("hate", "sad awful rain", "bad hate"),
)
MIDDLE = ("books", "dogs we")


@pytest.fixture(scope="session")
def separable(finished, tmp_path_factory):
    """Rankings that words alone decide, of two to four answers of unequal length, some tied."""
    tokenizer = load_tokenizer(finished / "00_tokenizer")
    rng = np.random.default_rng(0)

    def row(i):
        prompt = [
            {
                "role": "user",
                "content": ("you", "I see dogs", "what do they want today")[i % 3],
            }
        ]
        texts = [
            (GOOD[i % 3], 1.0),
            (BAD[(i // 3) % 3], -1.0),
            (MIDDLE[i % 2], 0.0),
            (GOOD[(i + 1) % 3], 1.0),
        ]
        chosen = [texts[j] for j in rng.permutation(2 + i % 3)]
        return {
            "prompt": prompt[0]["content"],
            "prompt_tokens": np.array(examples.chat.render_prompt(tokenizer, prompt)),
            "completions": [text for text, _ in chosen],
            "completion_tokens": [
                np.array([*tokenizer.encode(text), tokenizer.eos_id])
                for text, _ in chosen
            ],
            "scores": [score for _, score in chosen],
        }

    folder = tmp_path_factory.mktemp("separable") / "preferences"
    splits = {
        "train": [row(i) for i in range(40)],
        "validation": [row(i) for i in range(40, 54)],
    }
    write_preferences(folder, splits, labeler="words")
    return folder


@pytest.fixture(scope="session")
def lopsided(separable, tmp_path_factory):
    """The same, but every fourth prompt's answers are tied, so that it has no pair.

    Microbatches weigh differently.
    """
    splits = {}
    for split in ("train", "validation"):
        rows = [
            json.loads(line)
            for line in (separable / f"{split}.jsonl").read_text().splitlines()
        ]
        for row in rows[::4]:
            row |= {
                "scores": [0.0] * len(row["scores"]),
                "ranks": [1] * len(row["scores"]),
            }
        splits[split] = rows
    folder = tmp_path_factory.mktemp("lopsided") / "preferences"
    write_preferences(folder, splits, labeler="words")
    return folder


def values(finished, folder, name="dpo", **changes):
    loss = {"name": name} | changes.pop("loss", {})
    defaults = {
        "init_from": str(finished / "02_sft"),
        "preferences": (str(folder),),
        "length": 32,
        "batch_size": 8,
        "steps": 6,
        "optim": ADAM,
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": 2},
    }
    return to_dict(stage_config("direct", loss=loss, **(defaults | changes)))


def run_steps(config, layout=None, steps=2, held_out=True):
    """(metrics of each step, final parameters, held-out metrics before, after)."""
    layout = layout or ONE
    config = recipe.check(config, "direct")
    direct.validate(config, layout, None)
    with layout.use():
        stage = direct.build(config, layout)
        key = jax.random.key(config.seed)
        current = stage.start(state.create_sharded(stage.init, key, stage.axes, layout))
        before = finalize(stage.evals(current)) if held_out else {}
        metrics = []
        for step in range(steps):
            current, pairs = stage.step(
                current, layout.put(next(stage.batches)), jax.random.fold_in(key, step)
            )
            metrics.append(finalize(jax.device_get(pairs)))
        after = finalize(stage.evals(current)) if held_out else {}
    return metrics, jax.device_get(current.params), before, after


def assert_close(ours, theirs, *, rtol, atol):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def test_pitfall_39_pairs_that_became_equal_weigh_nothing_in_a_direct_stage(tmp_path):
    """Of two rankings one is of completions that differ after the row's end; the loss is that of
    the other."""
    tokenizer = train_sentencepiece(
        ["the cat sat on the mat"] * 9, tmp_path, vocab_size=275
    )
    start = list(range(20, 30))
    rows = [
        {
            "prompt": "p",
            "completions": ["a", "b"],
            "scores": [1, 0],
            "prompt_tokens": [1, 7],
            "completion_tokens": ids,
        }
        for ids in ([[*start, 40], [*start, 41]], [[40, 2], [41, 2]])
    ]
    model = Model(
        TransformerConfig(
            vocab_size=300, d_model=8, n_layers=1, n_heads=1, d_ff=8, max_length=8
        ),
        "lm",
    )
    params = jax.jit(model.init)(jax.random.key(1))
    loss = jax.jit(direct.direct_loss(model, LossConfig(name="orpo")))

    def of(*chosen):
        source = Rows([rows[i] for i in chosen], "preferences")
        batch = next(
            loader.preference_batches(
                source, tokenizer, batch_size=len(chosen), length=8, train=False
            )
        )
        batch = DirectBatch.of(jax.tree.map(jnp.asarray, batch))
        return loss(params, batch, None)

    (both, pairs), (alone, _) = of(0, 1), of(1)
    np.testing.assert_allclose(both, alone, rtol=1e-6)
    assert [float(x) for x in pairs["loss"]][1] == 1
    assert [float(x) for x in pairs["rows_cut"]] == [2, 4]
    assert [float(x) for x in pairs["pairs_dropped"]] == [1, 2]


def some(*names):
    """All losses, of which these are not left to the nightly tests."""
    return [
        name if name in names else pytest.param(name, marks=pytest.mark.nightly)
        for name in LOSSES
    ]


@pytest.mark.parametrize("name", some("dpo", "kto", "orpo"))
def test_every_loss_learns_what_is_preferred(name, finished, separable):
    _, _, before, after = run_steps(values(finished, separable, name), steps=20)
    assert after["val_loss"] < before["val_loss"]
    # KTO sees labels and no pairs: an answer in the middle is half desirable, and where it ends up
    # is open
    assert after["val_accuracy"] > (0.8 if name == "kto" else 0.95)
    assert after["val_margin"] > max(before["val_margin"], 0)
    if name in (
        "dpo",
        "cdpo",
        "robust",
        "dpo_norm",
        "dpop",
        "ipo",
        "kto",
    ):  # policy == reference: every implicit reward is 0
        assert before["val_accuracy"] == pytest.approx(0.5, abs=0.05)
        expected = {"ipo": 25.0, "kto": 0.5}.get(name, math.log(2))
        assert before["val_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", some("dpo"))
def test_pitfall_17_accumulation_does_not_change_a_direct_update(
    name, finished, lopsided
):
    """Prompts have one to five pairs, or none; one and four microbatches give the same update."""
    other = (
        {}
        if name in ("orpo", "simpo")
        else {"reference": str(finished / "01_pretrain")}
    )
    results = [
        run_steps(
            values(finished, lopsided, name, microbatches=n, optim=SGD, **other),
            steps=1,
            held_out=name == "kto",
        )
        for n in (1, 4)
    ]
    (one, params, _, after), (four, same, _, again) = results
    for a, b in ((one[0], four[0]), (after, again)):
        assert a.keys() == b.keys()
        for metric in a:
            np.testing.assert_allclose(
                b[metric], a[metric], rtol=2e-5, atol=1e-6, err_msg=metric
            )
    assert_close(same, params, rtol=1e-5, atol=1e-7)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ("dpo", "kto", "orpo"))
@pytest.mark.parametrize(
    "axes",
    [{"data": 4}, {"data": 1, "fsdp": 2, "tensor": 2}],
    ids=["data", "fsdp-tensor"],
)
def test_four_devices_give_a_direct_stage_what_one_gives(
    name, axes, finished, separable
):
    config = values(finished, separable, name, optim=SGD)
    one = run_steps(config)
    four = run_steps(config | {"mesh": axes}, make_layout(MeshConfig(**axes)))
    for a, b in zip((*one[0], one[3]), (*four[0], four[3]), strict=True):
        assert a.keys() == b.keys()
        for metric in a:
            np.testing.assert_allclose(
                b[metric], a[metric], rtol=2e-3, atol=2e-4, err_msg=metric
            )
    assert_close(four[1], one[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("dpo", "ipo")),
        "kto",
    ],
)
def test_precomputed_reference_logprobs_are_the_live_ones(name, finished, separable):
    """Over more than an epoch (40 prompts, 7 batches of 8), from another model."""
    other = {"reference": str(finished / "01_pretrain"), "optim": SGD}
    live = run_steps(
        values(finished, separable, name, **other), steps=7, held_out=False
    )
    ahead = run_steps(
        values(finished, separable, name, reference_logprobs="precomputed", **other),
        steps=7,
        held_out=False,
    )
    for a, b in zip(live[0], ahead[0], strict=True):
        for metric in a:
            np.testing.assert_allclose(
                b[metric], a[metric], rtol=1e-5, atol=2e-5, err_msg=metric
            )
    assert_close(ahead[1], live[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, mode, streams",
    [
        pytest.param("dpo", "live", 1, marks=pytest.mark.nightly),
        pytest.param("kto", "precomputed", 4, marks=pytest.mark.slow),
    ],
)
def test_a_direct_stage_that_crashed_goes_on_to_the_same_bits(
    name, mode, streams, finished, separable, tmp_path, monkeypatch
):
    options = {"reference_logprobs": mode, "data_shards": streams}
    config = values(finished, separable, name, mesh={"data": 4}, **options)
    recipe.run_stage(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, "direct", 3, "exception")
        with pytest.raises(_Crash):
            recipe.run_stage(config, tmp_path / "cut")
    recipe.run_stage(config, tmp_path / "cut")
    assert_same_stage(tmp_path / "whole", tmp_path / "cut")
    assert store.load(tmp_path / "cut", make_layout()).model.head == "lm"
    steps = [
        json.loads(line)
        for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    ]
    assert "direct/val_accuracy" in steps[-2] | steps[-1]


# ------------------------------------------------------------------ the numbers


def plain_logprob(logits, tokens, first):
    """sum_{t >= first} log p(x_t | x_<t) of one sequence.

    What stands after it cannot matter. float64 softmax.
    """
    rows = np.asarray(
        logits(jnp.array([tokens + [0] * (32 - len(tokens))])), np.float64
    )[0]
    total = 0.0
    for t in range(first, len(tokens)):
        row = rows[t - 1]
        total += row[tokens[t]] - row.max() - math.log(np.exp(row - row.max()).sum())
    return total


def test_z_of_kto_is_the_mean_log_ratio_of_answers_to_other_prompts(
    finished, separable
):
    """Three prompts p in turn over the rows 3 n + p.

    Row i has the answers of row 3 n + (p + 1) % 3, one by one.
    """
    source = open_preferences((str(separable),), "train")
    tokenizer = load_tokenizer(finished / "00_tokenizer")
    logits = {}
    for folder in ("02_sft", "01_pretrain"):
        saved = store.load(finished / folder, ONE)
        logits[folder] = jax.jit(
            lambda x, s=saved: s.model.logits(s.params, s.model.hidden(s.params, x))
        )
    batch = next(loader.preference_batches(source, tokenizer, batch_size=8, length=32))
    ratios = []
    for i in batch.index:
        prompt = source[int(i)]["prompt_tokens"].tolist()
        donor = 3 * (int(i) // 3) + (int(i) + 1) % 3
        for answer in source[donor if donor < 40 else donor % 3][
            "completion_tokens"
        ]:  # prompt 0 has a row more
            one, other = (
                plain_logprob(f, prompt + answer.tolist(), len(prompt))
                for f in logits.values()
            )
            ratios.append(one - other)
    z = np.mean(ratios)
    assert abs(z) > 1e-2
    policy, reference = list(logits)[
        :: 1 if z > 0 else -1
    ]  # below 0 it would count as 0
    origin = {
        "init_from": str(finished / policy),
        "reference": str(finished / reference),
    }
    config = values(finished, separable, "kto", optim=SGD, microbatches=2, **origin)
    metrics, *_ = run_steps(config, steps=1, held_out=False)
    assert metrics[0]["kl"] == pytest.approx(abs(z), rel=1e-4)


def test_mismatched_rows_keep_their_prompt_and_take_other_answers(finished):
    rows = [
        {
            "prompt": f"p{i}",
            "completions": ["a", "b"],
            "scores": [0, 1],
            "prompt_tokens": [1, 10 + i],
            "completion_tokens": [[20 + i, 2], [30 + i, 2]],
        }
        for i in range(5)
    ]
    mixed = Mismatched(
        Rows(rows, "preferences"), load_tokenizer(finished / "00_tokenizer")
    )
    assert [mixed[i]["prompt_tokens"].tolist() for i in range(5)] == [
        [1, 10 + i] for i in range(5)
    ]
    assert [mixed[i]["completion_tokens"][1].tolist() for i in range(5)] == [
        [30 + (i + 2) % 5, 2] for i in range(5)
    ]


class NoTokenizer(Tokenizer):
    """Rows with stored ids need none."""


def with_prompts(*prompts):
    """Rows with these prompts, whose completions tell the row: ids 50 + row."""
    ids = {prompt: 10 + i for i, prompt in enumerate(dict.fromkeys(prompts))}
    rows = [
        {
            "prompt": prompt,
            "completions": ["a", "b"],
            "scores": [0, 1],
            "prompt_tokens": [1, ids[prompt]],
            "completion_tokens": [[50 + i], [2]],
        }
        for i, prompt in enumerate(prompts)
    ]
    return Rows(rows, "preferences")


@pytest.mark.parametrize(
    ("prompts", "donors"),
    [
        ("ABAB", [1, 0, 3, 2]),
        ("AAAB", [3, 3, 3, 0]),
        ("ABCABC", [1, 2, 0, 4, 5, 3]),  # a file that is read twice
        ("ABCDABCD", [2, 3, 0, 1, 6, 7, 4, 5]),
        ("ABCDE", [2, 3, 4, 0, 1]),
    ],
)
def test_pitfall_40_mismatched_answers_are_of_another_prompt(prompts, donors):
    mixed = Mismatched(with_prompts(*prompts), NoTokenizer())
    assert [
        int(mixed[i]["completion_tokens"][0][0]) - 50 for i in range(len(prompts))
    ] == donors
    assert all(prompts[i] != prompts[donor] for i, donor in enumerate(donors))


@pytest.mark.parametrize("prompts", ["A", "AAAA"])
def test_pitfall_40_one_prompt_alone_is_an_error(prompts):
    with pytest.raises(
        DataError, match=f"kto: all {len(prompts)} rows have one prompt"
    ):
        Mismatched(with_prompts(*prompts), NoTokenizer())


def test_pitfall_40_a_text_and_one_user_turn_are_the_same_prompt():
    rows = [
        {"prompt": prompt, "completions": ["a", "b"], "scores": [0, 1]}
        for prompt in ("hi", [{"role": "user", "content": "hi"}])
    ]
    with pytest.raises(DataError, match="all 2 rows have one prompt"):
        Mismatched(Rows(rows, "preferences"), NoTokenizer())


def plain_variant(name, c, w, l, ref_w, ref_l, n, m):
    """A variant of DPO, of responses of n and m tokens."""
    log_sigmoid = lambda x: -math.log1p(math.exp(-x))  # noqa: E731
    w_ratio, l_ratio = w - ref_w, l - ref_l
    if name == "dpo_norm":
        return -log_sigmoid(c.strength * (w_ratio / n - l_ratio / m))
    h = w_ratio - l_ratio
    if name == "dpop":
        h -= c.drop_penalty * max(0, -w_ratio)
    right, wrong = (log_sigmoid(sign * c.strength * h) for sign in (1, -1))
    if name == "robust":
        eps = c.smoothing
        return (-(1 - eps) * right + eps * wrong) / (1 - 2 * eps)
    return -right - (c.nll * w / n if name == "irpo" else 0)


def plain_pair_loss(name, c, w, l, ref_w, ref_l):
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    if name == "simpo":
        return -math.log(sigmoid(c.strength * (w - l) - c.margin))
    if name == "orpo":
        odds = math.log(math.exp(w) / (1 - math.exp(w))) - math.log(
            math.exp(l) / (1 - math.exp(l))
        )
        return -w - c.strength * math.log(sigmoid(odds))
    h = (w - ref_w) - (l - ref_l)
    if name == "ipo":
        return (h - 1 / (2 * c.strength)) ** 2
    eps = c.smoothing if name == "cdpo" else 0
    return -(1 - eps) * math.log(sigmoid(c.strength * h)) - eps * math.log(
        sigmoid(-c.strength * h)
    )


def implicit_by_hand(c, total, mean, reference):
    """The reward that every answer is worth to the policy, [p, k]."""
    if c.name == "simpo":
        return c.strength * mean
    if c.name == "orpo":
        return c.strength * np.log(np.exp(mean) / (1 - np.exp(mean)))
    if c.name == "dpo_norm":
        return c.strength * (total - reference) * mean / total
    return c.strength * (total - reference)


def pair_numbers(chosen, rejected):
    """Reward of the better answer, of the worse, the margin, and whether the policy agrees."""
    return chosen, rejected, chosen - rejected, float(chosen > rejected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_prompt_counts_once_however_many_pairs_it_has(name):
    """Mean over prompts with a pair of the mean over their pairs, by loops in doubles.

    So are metrics. Rewards: beta log pi/rho, beta log pi / |y| (SimPO), beta log odds (ORPO).
    """
    rng = np.random.default_rng(3)
    config = LossConfig(name=name, beta=0.3)
    total, reference = -rng.uniform(5, 20, (5, 4)), -rng.uniform(5, 20, (5, 4))
    lengths = rng.integers(6, 10, (5, 4)).astype(np.int32)
    mean = total / lengths
    scores = np.array(
        [[0, 1, 2, 3], [1, 1, 0, 9], [2, 2, 2, 2], [0, 5, 5, 1], [3, 1, 0, 0]],
        np.float32,
    )
    valid = np.array(
        [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]],
        np.float32,
    )
    rewards = implicit_by_hand(config, total, mean, reference)
    z, by_prompt, told = 0.7, [], []
    for p in range(5):
        pairs = [
            (i, j)
            for i in range(4)
            for j in range(4)
            if valid[p, i] and valid[p, j] and scores[p, i] > scores[p, j]
        ]
        if name == "kto":

            def reward(i, p=p):
                return config.strength * (total[p, i] - reference[p, i] - z)

            losses = [
                x
                for w, l in pairs
                for x in (1 / (1 + math.exp(reward(w))), 1 / (1 + math.exp(-reward(l))))
            ]
        elif name in VARIANTS:
            columns = (total, reference, lengths)
            losses = [
                plain_variant(
                    name, config, *(column[p, i] for column in columns for i in pair)
                )
                for pair in pairs
            ]
        else:
            source = mean if name in ("orpo", "simpo") else total
            losses = [
                plain_pair_loss(
                    name,
                    config,
                    source[p, w],
                    source[p, l],
                    reference[p, w],
                    reference[p, l],
                )
                for w, l in pairs
            ]
        by_prompt += [np.mean(losses)] if losses else []
        chosen, rejected = ([rewards[p, pair[i]] for pair in pairs] for i in (0, 1))
        numbers = [pair_numbers(*pair) for pair in zip(chosen, rejected, strict=True)]
        told += [np.mean(numbers, axis=0)] if pairs else []
    assert len(by_prompt) == 3
    arrays = [
        jnp.asarray(x, jnp.float32) for x in (total, mean, reference, scores, valid, z)
    ]
    completions = Completions(*arrays, lengths=jnp.asarray(lengths))
    loss, pairs = make_loss(config)(completions)
    np.testing.assert_allclose(loss, np.mean(by_prompt), rtol=1e-5)
    good, bad = (
        ("desirable", "undesirable") if name == "kto" else ("chosen", "rejected")
    )
    found = finalize(jax.device_get(pairs))
    names = (f"{good}_reward", f"{bad}_reward", "margin", "accuracy")
    np.testing.assert_allclose(
        [found[key] for key in names], np.mean(told, axis=0), rtol=1e-5
    )
    ours = implicit_rewards(config, completions)
    np.testing.assert_allclose(ours[valid > 0], rewards[valid > 0], rtol=1e-5)


def test_kto_by_a_threshold_takes_every_answer_once():
    config = LossConfig(name="kto", beta=0.5, desirable_above=0.0, desirable_weight=2.0)
    one = lambda *x: jnp.array([x], jnp.float32)  # noqa: E731
    total, mean, reference = (
        one(-3, -4, -2, -9),
        one(-1, -1, -1, -1),
        one(-4, -4, -4, -4),
    )
    scores, valid = one(2, 0, 1, 1), one(1, 1, 1, 0)
    loss, _ = make_loss(config)(
        Completions(total, mean, reference, scores, valid, jnp.zeros(()))
    )
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    desirable = 2 * (1 - sigmoid(0.5)) + 2 * (1 - sigmoid(1.0))
    np.testing.assert_allclose(loss, (desirable + (1 - sigmoid(0.0))) / 3, rtol=1e-6)


def test_what_counts_of_an_answer_is_what_counts_in_fine_tuning(finished):
    """log pi(y | x) is minus the summed loss of sft on the same exchange.

    The answer and its eos, nothing else.
    """
    tokenizer = load_tokenizer(finished / "00_tokenizer")
    saved = store.load(finished / "02_sft", ONE)
    rows = [("you see", "love tea"), ("what", "hate")]
    chats = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in rows
    ]
    pairs = [
        {"prompt": q, "completions": [a, "rain " + a], "scores": [1, 0]}
        for q, a in rows
    ]
    batch = next(
        loader.preference_batches(
            Rows(pairs, "preferences"), tokenizer, batch_size=2, length=32, train=False
        )
    )
    total, mean = jax.jit(functools.partial(completion_logprobs, saved.model))(
        saved.params, batch
    )
    loss_of = jax.jit(language_loss(saved.model))
    for i, messages in enumerate(chats):
        source = Rows([{"messages": messages}], "messages")
        packed = next(
            loader.sft_batches(source, tokenizer, batch_size=1, length=32, train=False)
        )
        nll, weight = loss_of(saved.params, packed, None)[1]["loss"]
        np.testing.assert_allclose(total[i, 0], -nll, rtol=1e-5)
        np.testing.assert_allclose(mean[i, 0], -nll / weight, rtol=1e-5)
        assert batch.lengths[i, 0] == weight == len(tokenizer.encode(rows[i][1])) + 1


def test_padding_of_answers_changes_nothing(finished, separable):
    tokenizer = load_tokenizer(finished / "00_tokenizer")
    saved = store.load(finished / "02_sft", ONE)
    logprobs_of = jax.jit(functools.partial(token_logprobs, saved.model))
    source = open_preferences((str(separable),), "validation")
    sums = []
    for length in (26, 32):
        batch = next(
            loader.preference_batches(
                source, tokenizer, batch_size=4, length=length, train=False
            )
        )
        logprobs, mask, _ = logprobs_of(saved.params, batch)
        np.testing.assert_array_equal(mask.sum(1), batch.lengths.ravel())
        sums.append((logprobs * mask).sum(1))
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-5)


def test_dropout_is_of_the_trained_policy_alone(finished, separable):
    """With dropout the first loss is not log 2.

    Evaluated without it, policy and reference agree.
    """
    metrics, _, before, _ = run_steps(
        values(finished, separable, overrides={"dropout": 0.5}), steps=1
    )
    assert abs(metrics[0]["loss"] - math.log(2)) > 1e-3
    assert before["val_loss"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {
                "init_from": None,
                "tokenizer": "x",
                "model": {
                    "vocab_size": 320,
                    "d_model": 16,
                    "n_layers": 1,
                    "n_heads": 2,
                    "d_ff": 32,
                    "max_length": 32,
                },
            },
            "needs one",
        ),
        ({"loss": {"name": "orpo"}, "reference": "somewhere"}, "has no reference"),
        (
            {"loss": {"name": "simpo"}, "reference_logprobs": "precomputed"},
            "has no reference",
        ),
        ({"loss": {"beta": 0.0}}, "loss.beta=0.0: expected float >= 1.2e-38"),
        (
            {"loss": {"name": "cdpo", "smoothing": 0.5}},
            "loss.smoothing=0.5: expected float >= 0 and < 0.5",
        ),
        ({"preferences": ()}, "at least one folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, message, finished, separable):
    with pytest.raises(ConfigError, match=message):
        run_steps(values(finished, separable, **changes))


def test_the_stage_is_found_by_name():
    assert "direct" in stages.names()
