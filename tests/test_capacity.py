"""What cannot fit is refused before anything is allocated, with both numbers; what fits runs."""

import dataclasses
import re

import pytest

from rlhfjax import capacity, device_bytes, process, recipe
from rlhfjax.chat import Chat
from rlhfjax.config import to_dict
from rlhfjax.data.tokenizer import Tokenizer
from rlhfjax.errors import ConfigError
from rlhfjax.interop.store import SavedModel
from rlhfjax.models.config import TransformerConfig
from rlhfjax.models.transformer import Model
from rlhfjax.optim import OptimConfig
from rlhfjax.recipe import stage_folders
from rlhfjax.roles import Role, Workload
from rlhfjax.sampling import Sampling
from tests import tiny

GIB = 2.0**30
SHAPE = TransformerConfig(
    vocab_size=320, d_model=16, n_layers=2, n_heads=2, d_ff=32, max_length=32
)


@pytest.fixture
def laptop(monkeypatch):
    monkeypatch.setattr(device_bytes, "devices_memory", lambda: 4 * GIB)


def validate(tmp_path, stage, changes):
    """Validates the smallest recipe with changed options of one of its stages."""
    config = to_dict(tiny.get_config("data=nowhere"))
    for option, value in changes.items():
        *parents, last = option.split(".")
        part = config[stage]
        for parent in parents:
            part = part[parent]
        part[last] = value
    folders = stage_folders(config, tmp_path)
    resolved = {name: recipe.resolve(config[name], folders, name) for name in folders}
    typed = {name: recipe.check(resolved[name], name) for name in folders}
    capacity.validate(typed, folders, recipe.DONE)


@pytest.mark.parametrize(
    ("stage", "changes", "part"),
    [
        ("pretrain", {"model.d_model": 2**20}, "parameters"),
        ("pretrain", {"model.d_ff": 2**20, "model.n_layers": 1024}, "the optimizer"),
        ("pretrain", {"model.vocab_size": 2**24, "model.d_model": 2**14}, "gradients"),
        ("pretrain", {"batch_size": 2**20, "length": 2**10}, "activations"),
        ("pretrain", {"length": 2**20, "model.max_length": 2**20}, "attention scores"),
        ("pretrain", {"length": 2**24, "batch_size": 2**20}, "attention scores"),
        ("sft", {"batch_size": 2**20, "length": 2**12}, "activations"),
        ("reward", {"batch_size": 2**20, "length": 2**12}, "activations"),
        ("ppo", {"max_new_tokens": 2**24}, ""),
        (
            "collect",
            {"samples_per_prompt": 2**20, "max_new_tokens": 2**10},
            "the KV cache",
        ),
        ("ppo", {"batch_size": 2**20, "max_new_tokens": 2**10}, ""),
        ("ppo", {"decode_batch": 2**20, "max_new_tokens": 2**10}, "the KV cache"),
        ("collect", {"max_new_tokens": 2**24}, "the KV cache"),
        ("collect", {"batch_size": 2**20, "max_new_tokens": 2**10}, "the KV cache"),
        ("evaluate", {"batch_size": 2**20, "max_new_tokens": 2**10}, "the KV cache"),
    ],
)
def test_what_needs_more_than_there_is_names_both(
    laptop, tmp_path, stage, changes, part
):
    with pytest.raises(
        ConfigError,
        match=rf"^{stage}: needs at least [0-9.]+ [GTPE]iB of memory \(.*{part} [0-9.]+ .*\);"
        r" \d+ devices? here with 4 GiB: make the model, batch_size or the lengths smaller$",
    ):
        validate(tmp_path, stage, changes)


def test_what_is_finished_needs_nothing(laptop, tmp_path):
    changes = {"batch_size": 2**20, "length": 2**10}
    with pytest.raises(ConfigError, match=r"^pretrain: needs at least"):
        validate(tmp_path, "pretrain", changes)
    (tmp_path / "01_pretrain").mkdir()
    (tmp_path / "01_pretrain" / recipe.DONE).write_text("{}")
    validate(tmp_path, "pretrain", changes)


def test_a_recipe_passes_where_there_is_enough_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(device_bytes, "devices_memory", lambda: 1e5)
    with pytest.raises(ConfigError, match=r"^pretrain: needs at least"):
        validate(tmp_path, "pretrain", {})
    monkeypatch.setattr(device_bytes, "devices_memory", lambda: 4 * GIB)
    validate(tmp_path, "pretrain", {})


def test_a_run_is_refused_before_it_writes(laptop, tmp_path):
    config = to_dict(tiny.get_config("data=nowhere"))["pretrain"]
    config |= {"tokenizer": None, "sources": ({"spec": "text:" + __file__},)}
    config["eval_sources"] = config["sources"]
    config["batch_size"] = 2**20
    config["length"] = 2**10
    config["model"]["max_length"] = 2**10
    with pytest.raises(ConfigError, match="needs at least"):
        recipe.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_least_bytes_by_hand():
    """Two roles of one frozen source count once; Adam keeps two numbers, an EMA one."""
    net = capacity.Net
    n = net("policy", Role(SHAPE), SHAPE).numbers
    trained = Role(SHAPE, optim=OptimConfig(learning_rate=1.0), averaged=True)
    nets = [
        net("policy", trained, SHAPE),
        net("reference", Role("frozen"), SHAPE),
        net("again", Role("frozen"), SHAPE),
    ]
    update = Workload(rows=6, batch=6, length=32)
    assert capacity.least(nets, update) == {
        "parameters": 4 * n + 4 * n,
        "the optimizer": 3 * 4 * n,
        "gradients": 4 * n,
        "activations": 2 * 6 * 32 * 16 * 4,  # layers, rows, tokens, d_model, bytes
        "attention scores": 6 * 2 * 32 * 32 * 4,  # rows, heads, tokens, tokens, bytes
    }
    sampled = update._replace(decoded=10**6, sampled=8)
    cache = (
        2 * 2 * 2 * 8 * 10**6 * 8 * 4
    )  # k and v, layers, heads, d, rows, tokens, bytes
    assert capacity.least(nets, sampled)["the KV cache"] == cache
    assert capacity.least([], update) == {}


def test_memory_is_that_of_the_machine_or_of_its_container(tmp_path, monkeypatch):
    whole = device_bytes.devices_memory()
    assert whole is not None and whole > GIB / 4
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(device_bytes, "_CONTAINER", (str(limit), "/no/such/file"))
    limit.write_text("max\n")
    assert device_bytes.devices_memory() >= whole
    limit.write_text("123456789\n")
    assert device_bytes.devices_memory() == 123456789


class NoTokenizer(Tokenizer):
    def __init__(self):
        pass


def test_chat_refuses_a_response_that_does_not_fit(laptop):
    config = dataclasses.replace(SHAPE, n_layers=64, max_length=2**24)
    saved = SavedModel(Model(config, "lm"), {}, NoTokenizer())
    sampling = Sampling(max_new_tokens=2**24 - 1, eos_id=1, pad_id=0)
    with pytest.raises(
        ConfigError, match=r"^chat: needs at least .* --max_new_tokens sm"
    ):
        Chat(saved, sampling, seed=0)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), r"^out of memory: make"),
        (
            MemoryError("Unable to allocate 8 TiB"),
            r"^out of memory \(Unable .* TiB\): m",
        ),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating"), r"\(RESOURCE_"),
        (RuntimeError("INTERNAL: something else"), r"^$"),
    ],
)
def test_what_did_not_fit_after_all_is_one_line(error, line):
    message = process.out_of_memory(error)
    assert re.search(line, message)
    assert "\n" not in message
