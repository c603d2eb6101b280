"""A conversation in the terminal, with the tiny recipe's model."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import chat
from rlhfjax.chat import Chat, decode_stream
from rlhfjax.data.chat import render_prompt
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import make_layout
from rlhfjax.rl.rollout import row_keys, sample
from rlhfjax.sampling import Sampling, generate


@pytest.fixture(scope="module")
def saved(finished):
    """The tokenizer of the tiny recipe and a model of its shape with an opinion.

    Six steps of training give none.
    """
    tiny = store.load(finished / "02_sft", make_layout(devices=jax.devices()[:1]))
    config = dataclasses.replace(tiny.model.config, init_std=0.5, tie_embeddings=False)
    model = dataclasses.replace(tiny.model, config=config)
    return store.SavedModel(model, model.init(jax.random.key(1)), tiny.tokenizer)


whole = jax.jit(generate, static_argnames=("model", "sampling"))


def settings(saved, temperature=0.0, max_new_tokens=6) -> Sampling:
    return Sampling(
        max_new_tokens=max_new_tokens,
        eos_id=saved.tokenizer.eos_id,
        pad_id=saved.tokenizer.pad_id,
        temperature=temperature,
    )


def start(saved, temperature=0.0, max_new_tokens=6, seed=0) -> Chat:
    return Chat(saved, settings(saved, temperature, max_new_tokens), seed=seed)


def say(talk: Chat, text: str) -> str:
    return "".join(talk.respond(text))


def test_the_pieces_make_the_answer_that_generate_gives(saved):
    """Streaming and the batch sampler: same prompt, same key, same tokens, same text."""
    for temperature in (0.0, 1.0):
        talk = start(saved, temperature)
        pieces = list(talk.respond("I love tea"))
        tokenizer = talk.tokenizer
        ids = render_prompt(tokenizer, [{"role": "user", "content": "I love tea"}])
        out = whole(
            saved.model,
            saved.params,
            jnp.asarray(ids)[None],
            jnp.ones((1, len(ids)), jnp.int32),
            jax.random.fold_in(jax.random.key(0), 0)[None],
            settings(saved, temperature),
        )
        answer = tokenizer.decode(out.tokens[0][out.mask[0] > 0].tolist())
        assert "".join(pieces) == answer and answer
        assert talk.messages[-1] == {"role": "assistant", "content": answer}


def test_temperature_zero_is_deterministic_and_above_it_the_seed_decides(saved):
    greedy = {say(start(saved, seed=seed), "rain today") for seed in range(3)}
    assert len(greedy) == 1 and greedy != {""}
    sampled = [say(start(saved, 1.0, seed=seed), "rain today") for seed in range(3)]
    assert len(set(sampled)) == 3
    assert say(start(saved, 1.0, seed=1), "rain today") == sampled[1]


def test_a_turn_hears_what_was_said_before_and_reset_forgets_it(saved):
    talk = start(saved)
    first = say(talk, "tea")
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    tokens, segments = talk_prompt(talk, "dogs")
    heard = talk.tokenizer.decode(tokens[segments > 0].tolist())
    assert "tea" in heard and "dogs" in heard
    talk.reset()
    tokens, segments = talk_prompt(talk, "dogs")
    assert "tea" not in talk.tokenizer.decode(tokens[segments > 0].tolist())
    talk.reset()
    assert say(talk, "tea") == first


def talk_prompt(talk: Chat, text: str) -> tuple[np.ndarray, np.ndarray]:
    """What the model would be given for one more turn."""
    kept, talk.messages = (
        talk.messages,
        [*talk.messages, {"role": "user", "content": text}],
    )
    tokens, segments = talk._prompt()
    talk.messages = kept
    return tokens[0], segments[0]


def test_each_turn_draws_anew(saved):
    """The same question after a reset: another answer, for a constant key would repeat itself."""
    talk, answers = start(saved, 1.0), []
    for _ in range(3):
        talk.reset()
        answers.append(say(talk, "rain today"))
    assert len(set(answers)) == 3


def test_a_long_conversation_loses_its_oldest_turns_whole(saved):
    talk = start(saved)
    for i in range(4):
        talk.messages += [
            {"role": "user", "content": f"w{i}"},
            {"role": "assistant", "content": f"a{i}"},
        ]
    tokens, segments = talk_prompt(talk, "last")
    real = tokens[segments > 0].tolist()
    assert len(tokens) <= saved.model.config.max_length - 6
    newest = [*talk.messages, {"role": "user", "content": "last"}]
    suffixes = [
        render_prompt(talk.tokenizer, newest[i:]).tolist()
        for i in range(0, len(newest), 2)
    ]
    assert (
        real in suffixes[1:]
    )  # some turns are gone, whole ones, and the rest is as it was
    assert isinstance(
        say(talk, "and still it answers " * 20), str
    )  # one turn longer than the context


def test_a_prompt_is_padded_on_the_left_to_a_few_lengths(saved, finished):
    talk = start(dataclasses.replace(saved, model=longer(saved.model)))
    lengths = {len(talk_prompt(talk, "tea " * n)[0]) for n in range(1, 40)}
    assert lengths <= {32, 64, 96, 128, 160, 192, 224, 250}
    tokens, segments = talk_prompt(talk, "tea")
    assert segments[-1] == 1 and segments[0] == 0 and (np.diff(segments) >= 0).all()
    assert (tokens[segments == 0] == talk.tokenizer.pad_id).all()


def longer(model):
    return dataclasses.replace(
        model, config=dataclasses.replace(model.config, max_length=256)
    )


def test_unfinished_characters_are_held_back(saved):
    tokenizer = start(saved).tokenizer
    text = "tea 🌧 é!"
    pieces = list(decode_stream(tokenizer, tokenizer.encode(text)))
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))
    assert all("\ufffd" not in piece for piece in pieces) and len(pieces) > 2


def test_a_model_that_cannot_speak_is_refused(finished, saved):
    with pytest.raises(
        ConfigError, match="chat: needs a language model, this one has a scalar head"
    ):
        start(
            store.load(finished / "04_reward", make_layout(devices=jax.devices()[:1]))
        )
    with pytest.raises(
        ConfigError,
        match="--max_new_tokens=32: must be less than the model's context of 32",
    ):
        start(saved, max_new_tokens=32)


def test_the_terminal(saved, tmp_path):
    """Commands are not said to the model."""
    store.save(tmp_path / "model", saved)
    out = io.StringIO()
    typed = io.StringIO("rain today\n\n/reset\nrain today\n/bogus\n/quit\nnever read\n")
    chat.run(tmp_path, temperature=0.0, max_new_tokens=6, seed=0, inputs=typed, out=out)
    answer = say(start(saved), "rain today")
    head, *lines = out.getvalue().splitlines()
    assert str(tmp_path / "model") in head
    assert lines == [
        answer,
        "(a new conversation)",
        answer,
        f"(/bogus is unknown: {chat.HELP})",
    ]


def test_a_recipes_workdir_speaks_with_its_last_model(finished):
    assert store.find(finished) == finished / "05_ppo" / "model"


def test_a_workdir_without_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="no model here"):
        chat.run(
            tmp_path,
            temperature=0.0,
            max_new_tokens=4,
            seed=0,
            inputs=io.StringIO(),
            out=io.StringIO(),
        )


# ------------------------------------------------------------------ what sampling draws


def test_pitfall_29_no_two_rows_steps_or_hosts_share_a_key(saved):
    """One seed, rows numbered over the whole batch.

    Two hosts that hold halves of it draw from different keys.
    """
    keys = [
        row_keys(jax.random.fold_in(jax.random.key(0), step), 64) for step in range(4)
    ]
    data = np.concatenate([np.asarray(jax.random.key_data(k)) for k in keys])
    assert len(np.unique(data, axis=0)) == 4 * 64
    small = jax.random.key_data(row_keys(jax.random.fold_in(jax.random.key(0), 0), 32))
    np.testing.assert_array_equal(
        small, data[:32]
    )  # a row's key does not depend on how many there are


def test_pitfall_29_equal_prompts_get_different_answers_on_every_device(saved):
    layout = make_layout()
    tokenizer = start(saved).tokenizer
    ids = render_prompt(tokenizer, [{"role": "user", "content": "rain"}])
    rows = layout.put(
        {"p": np.tile(ids, (16, 1)), "s": np.ones((16, len(ids)), np.int32)}
    )
    sampling = settings(saved, temperature=1.0, max_new_tokens=8)
    params = jax.device_put(saved.params, layout.replicated)
    draws = [
        sample(saved.model, params, *rows.values(), key, sampling=sampling)
        for key in (jax.random.key(0), jax.random.key(1))
    ]
    answers = np.concatenate([np.asarray(d.responses) for d in draws])
    assert len(np.unique(answers, axis=0)) == 32
    one = make_layout(devices=jax.devices()[:1])
    alone = one.put(
        {"p": np.tile(ids, (16, 1)), "s": np.ones((16, len(ids)), np.int32)}
    )
    same = sample(
        saved.model,
        saved.params,
        *alone.values(),
        jax.random.key(0),
        sampling=sampling,
    )
    np.testing.assert_array_equal(
        same.responses, draws[0].responses
    )  # one device draws what four do
