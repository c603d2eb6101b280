"""A conversation in the terminal, with the tiny recipe's model."""

import dataclasses
import importlib
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import chat_settings, chat_terminal, json_text
from rlhfjax.chat import Chat, Prompt, decode_stream
from rlhfjax.chat_settings import Options, choose_settings, shown_settings
from rlhfjax.chat_terminal import Screen, Session
from rlhfjax.data.chat import render_prompt
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop import store
from rlhfjax.mesh import make_layout
from rlhfjax.models import Model
from rlhfjax.models.presets import preset
from rlhfjax.rl.rollout import row_keys, sample
from rlhfjax.sampling import Sampling, generate
from rlhfjax.sampling.structured import Form
from rlhfjax.tokenize_text import visible


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


def test_a_growing_conversation_compiles_few_programs_and_gives_the_same_tokens(
    saved, monkeypatch
):
    """Prompts of 8 to 240 tokens: five prefills, two decode steps, and the tokens of `generate`."""
    monkeypatch.setattr("rlhfjax.chat.BUCKET", 16)
    monkeypatch.setattr("rlhfjax.chat.ENTRIES", 64)
    config = dataclasses.replace(saved.model.config, max_length=256)
    model = dataclasses.replace(saved.model, config=config)
    # Its package has a function of the same name.
    streaming = importlib.import_module("rlhfjax.sampling.generate")
    programs = (streaming._prefill, streaming._decode, streaming._next_token)
    before = [program._cache_size() for program in programs]
    talk = start(dataclasses.replace(saved, model=model))
    for length in (8, 15, 17, 33, 70, 100, 140, 200, 240):
        ids = np.arange(length, dtype=np.int32) % 50 + 10
        monkeypatch.setattr(talk, "prompt", lambda ids=ids: Prompt(ids))
        tokens = list(talk._sampled())
        if length in (17, 140, 240):
            rows = (jnp.asarray(ids)[None], jnp.ones((1, length), jnp.int32))
            key = jax.random.fold_in(jax.random.key(0), talk._turns - 1)[None]
            out = whole(model, saved.params, *rows, key, settings(saved))
            expected = out.tokens[0][out.mask[0] > 0].tolist()
            assert tokens == [id for id in expected if id != saved.tokenizer.eos_id]
    after = [program._cache_size() for program in programs]
    assert np.subtract(after, before).tolist() == [5, 2, 1]


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
    tokens, segments = talk._padded(talk.prompt().ids)
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
    assert lengths == {64, 128}
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


def test_responses_of_a_form(saved):
    """A model without an opinion on JSON writes what the schema says, and ends there."""
    talk = start(saved, temperature=1.0, max_new_tokens=12)
    with pytest.raises(ConfigError, match="json: Invalid type: x"):
        talk.set_form(Form("json", {"type": "x"}))
    talk.set_form(Form("json", {"enum": [12, "tea"]}))
    assert say(talk, "tea") in ("12", '"tea"')
    assert talk.last.end == "eos"
    talk.set_form(None)
    talk.reset()
    assert say(talk, "tea") not in ("12", '"tea"')


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
    """Commands are not said to the model, and the output holds responses alone."""
    store.save(tmp_path / "model", saved)
    typed = "rain today\n\n/reset\nrain today\n/bogus\n/quit\nnever read\n"
    out, notes = talk_in_terminal(tmp_path, typed, GREEDY)
    answer = say(start(saved), "rain today")
    assert out == [answer, answer]
    assert notes == [
        "(temperature=0.0 top_p=0.9 max_new_tokens=6; /help lists the commands)",
        "(compiling for prompts of up to 26 tokens…)",
        CUT,
        "(a new conversation)",
        CUT,
        "(/bogus is unknown; /help lists the commands)",
    ]


GREEDY = Options(temperature=0.0, max_new_tokens=6)
CUT = "(cut at max_new_tokens=6; /max_new_tokens N allows more)"


def talk_in_terminal(path, typed, options) -> tuple[list[str], list[str]]:
    """Returns the lines of responses and of notes."""
    out, notes = io.StringIO(), io.StringIO()
    files = {"inputs": io.StringIO(typed), "out": out, "notes": notes}
    chat_terminal.run(path, options, **files)
    return out.getvalue().splitlines(), notes.getvalue().splitlines()


def converse(talk: Chat, typed: str) -> tuple[list[str], list[str]]:
    """Returns the lines of responses and of notes of a session with a chat at hand."""
    out, notes = io.StringIO(), io.StringIO()
    screen = Screen(io.StringIO(typed), out, notes)
    Session(talk, screen).loop()
    return out.getvalue().splitlines(), notes.getvalue().splitlines()


def test_commands_change_the_sampler(saved):
    talk = start(saved)
    _, notes = converse(
        talk, "/temperature 0.5\n/top_k 3\n/min_p 0.1\n/max_new_tokens 5\n/top_p\n"
    )
    _, stops = converse(talk, "/repetition_penalty 1.2\n/stop a\\nb\n/stop -\n")
    assert [note.partition("max_new_tokens=5")[2] for note in stops[1:]] == [
        " stop='a\\nb')",
        ")",
    ]
    assert talk.sampling.repetition_penalty == 1.2
    talk.set_sampling(repetition_penalty=1.0)
    assert notes[-1] == "(temperature=0.5 top_k=3 min_p=0.1 max_new_tokens=5)"
    assert (talk.sampling.top_k, talk.sampling.temperature) == (3, 0.5)
    before = talk.sampling
    _, notes = converse(
        talk, "/temperature -1\n/top_k 1.5\n/top_p x\n/max_new_tokens 32\n"
    )
    assert notes == [
        "(temperature=-1.0: must be >= 0 (0: greedy))",
        "(top_k=1.5: expected an integer)",
        "(top_p=x: expected a number)",
        "(max_new_tokens=32: must be less than the model's context of 32)",
    ]
    assert talk.sampling is before


def test_retry_draws_anew_and_undo_forgets_a_turn(saved):
    talk = start(saved, 1.0)
    out, notes = converse(talk, "tea\n/retry\n")
    assert len(set(out)) == 2 and not any("same response" in note for note in notes)
    assert [m["content"] for m in talk.messages] == ["tea", out[1]]
    _, notes = converse(talk, "/undo\n/undo\n/retry\n/tokens\n")
    assert talk.messages == []
    assert notes == ["(forgot: tea)", *["(there is no message yet)"] * 3]
    _, notes = converse(start(saved), "tea\n/retry\n")
    assert notes[-1] == (
        "(the same response again: a higher temperature or top_p varies it)"
    )


def test_a_system_message_stands_first_and_survives_a_reset(saved):
    talk = start(saved)
    _, notes = converse(talk, "/system Be kind\n/reset\n/system\n")
    assert notes[-1] == "(system message: Be kind)"
    talk.messages.append({"role": "user", "content": "tea"})
    system = {"role": "system", "content": "Be kind"}
    want = render_prompt(talk.tokenizer, [system, *talk.messages])
    assert talk.prompt().ids.tolist() == want.tolist()
    converse(talk, "/system -\n")
    assert talk.system == ""


def test_lines_between_triple_quotes_are_one_message(saved):
    talk = start(saved)
    converse(talk, '"""\nrain\ntoday\n"""\n"""tea"""\n"""never ends\n')
    heard = [m["content"] for m in talk.messages if m["role"] == "user"]
    assert heard == ["rain\ntoday", "tea", "never ends"]


def test_what_is_left_out_is_said(saved):
    talk = start(saved)
    notes: list[str] = []
    talk._note = notes.append
    for text in ("tea", "rain today", "dogs and rain", "tea " * 40):
        say(talk, text)
    left_out = [note for note in notes if "are left out" in note]
    numbers = [int(re.search(r"oldest (\d+)", note)[1]) for note in left_out]
    assert numbers == sorted(set(numbers)) and numbers[-1] == 6
    assert [note for note in notes if "its beginning is left out" in note] == notes[-1:]


def test_a_stop_text_ends_a_response_at_once_and_is_not_part_of_it(saved):
    whole = say(start(saved, max_new_tokens=12), "tea")
    stop = whole[len(whole) // 2 :][:2]
    talk = start(saved, max_new_tokens=12)
    talk.set_sampling(stop=(stop, "never said"))
    out, _ = converse(talk, "tea\n/tokens\n")
    expected = whole[: whole.index(stop)]
    assert "\n".join(out) == visible(expected)
    assert talk.messages[-1] == {"role": "assistant", "content": expected}
    assert talk.last.end == "stop" and talk.last.tokens < 12
    talk.reset()
    talk.set_sampling(stop=(whole[:1],))
    assert converse(talk, "tea\n")[1][-1] == "(an empty response)"
    assert talk.messages[-1]["content"] == ""


def test_a_stop_id_ends_a_response_and_is_not_part_of_it(saved):
    whole = start(saved)
    whole.messages = [{"role": "user", "content": "tea"}]
    ids = list(whole._sampled())
    assert len(ids) == 6 and whole.last.end == "max_new_tokens"
    talk = start(saved)
    talk.set_sampling(extra_eos_ids=(ids[2],))
    first = ids.index(ids[2])
    assert say(talk, "tea") == talk.tokenizer.decode(ids[:first])
    assert (talk.last.end, talk.last.tokens) == ("eos", first + 1)


def test_ctrl_c_stops_a_response_and_keeps_what_was_said(saved):
    """The first piece is printed, then comes the interrupt; the next message is responded to."""
    talk = start(saved, max_new_tokens=20)

    class Interrupted(io.StringIO):
        times = 0

        def flush(self):
            self.times += 1
            if self.times == 1:
                raise KeyboardInterrupt

    out, notes = Interrupted(), io.StringIO()
    screen = Screen(io.StringIO("tea\nrain\n"), out, notes)
    screen.interactive = True
    screen._read_line = lambda prompt: screen._inputs.readline() or None
    Session(talk, screen).loop()
    stopped = re.search(r"\(stopped after (\d+) tokens\)", notes.getvalue())
    assert stopped and 1 <= int(stopped[1]) <= 20
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2
    first, second = (m["content"] for m in talk.messages[1::2])
    assert first
    assert visible(second) in out.getvalue()


def test_ctrl_c_ends_a_chat_whose_input_is_a_file(saved, tmp_path, monkeypatch):
    store.save(tmp_path / "model", saved)
    monkeypatch.setattr(Screen, "read", interrupt)
    with pytest.raises(SystemExit) as end:
        talk_in_terminal(tmp_path, "", GREEDY)
    assert end.value.code == 130


def interrupt(screen):
    raise KeyboardInterrupt


def test_responses_cannot_command_the_terminal(saved):
    out = io.StringIO()
    Screen(io.StringIO(), out, out).write("a\x1b[2J\tb\n")
    assert out.getvalue() == "a\\x1b[2J\tb\n"


def test_tokens_shows_the_conversation_as_the_model_sees_it(saved):
    talk = start(saved)
    _, notes = converse(talk, "tea\n/tokens\n")
    shown = json_text.parse(notes[1])
    assert shown[:2] == ["<s>", "<|user|>"] and "tea" in "".join(shown)
    assert re.fullmatch(r"\(\d+ tokens of a context of 32\)", notes[2])


def test_a_reward_model_is_refused_in_one_line(finished, tmp_path):
    with pytest.raises(ConfigError) as error:
        talk_in_terminal(finished / "04_reward", "", Options())
    assert str(error.value) == (
        f"{finished}/04_reward/model: is a reward model, which scores responses and writes none; "
        f"chat needs a language model, such as --workdir={finished}/05_ppo"
    )


def test_defaults_are_the_models_own_settings_then_ours(saved, tmp_path):
    opened = store.Opened(saved.model, saved.tokenizer, lambda: saved.params)
    ours = choose_settings("runs/x", opened, Options())
    assert shown_settings(ours.sampling) == "temperature=0.7 top_p=0.9 max_new_tokens=8"
    foreign = choose_settings(f"hf:{tmp_path}", opened, Options(top_p=1.0))
    assert shown_settings(foreign.sampling) == "temperature=0.2 max_new_tokens=8"
    own = {
        "temperature": 0.6,
        "top_p": 0,
        "max_new_tokens": 2048,
        "repetition_penalty": 1.1,
        "stop_strings": ["User:"],
        "num_beams": 2,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    chosen = choose_settings(f"hf:{tmp_path}", opened, Options())
    assert shown_settings(chosen.sampling) == (
        "temperature=0.6 top_p=0.5 repetition_penalty=1.1 max_new_tokens=16 stop='User:'"
    )
    assert chosen.notes == [
        "not applied of generation_config.json: num_beams=2, top_p=0.0"
    ]
    flags = Options(repetition_penalty=1.3, min_p=0.1, stop=["a", "b"])
    given = choose_settings(f"hf:{tmp_path}", opened, flags).sampling
    assert (given.repetition_penalty, given.min_p) == (1.3, 0.1)
    assert given.stop == ("a", "b")
    with pytest.raises(ConfigError, match=r"^--top_p=2.0: must be > 0 and <= 1"):
        choose_settings("runs/x", opened, Options(top_p=2.0))
    with pytest.raises(ConfigError, match=r"^--stop='': must not be empty"):
        choose_settings("runs/x", opened, Options(stop=[""]))
    with pytest.raises(ConfigError, match=r"^--max_new_tokens=32: must be less than"):
        choose_settings("runs/x", opened, Options(max_new_tokens=32))


def test_a_recipes_workdir_speaks_with_its_last_model(finished):
    assert store.find(finished) == finished / "05_ppo" / "model"


def test_a_workdir_without_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="no model here"):
        talk_in_terminal(tmp_path, "", Options())


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


def test_int8_is_the_default_of_large_dense_models_on_cpus(
    saved, tmp_path, monkeypatch
):
    dense = preset("smollm2-135m")
    mixture = dataclasses.replace(dense, n_experts=2, experts_per_token=1)
    assert chat_settings.int8_pays(Model(dense), "cpu")
    assert not chat_settings.int8_pays(Model(dense), "gpu")
    assert not chat_settings.int8_pays(Model(mixture), "cpu")
    assert not chat_settings.int8_pays(saved.model, "cpu")
    store.save(tmp_path / "model", saved)
    monkeypatch.setattr(chat_settings, "LARGE", 1)
    started = []
    original = chat_terminal.Chat

    def chat(saved, *args, **options):
        started.append(saved)
        return original(saved, *args, **options)

    monkeypatch.setattr(chat_terminal, "Chat", chat)
    for int8, noted in ((None, True), (False, False), (True, False)):
        options = dataclasses.replace(GREEDY, int8=int8)
        _, notes = talk_in_terminal(tmp_path, "", options)
        assert any("--noint8" in line for line in notes) == noted
    tokens = [s.params["backbone"]["embed"]["tokens"].dtype for s in started]
    assert tokens == [jnp.int8, jnp.float32, jnp.int8]
    assert [s.model.int8_cache for s in started] == [False, False, True]
