"""A run in a bucket is the run on a disk, stopped and resumed or not, and whatever reads a run
reads it there.
"""

import io
import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest

from rlhfjax import chat_terminal, metrics, paths, recipe
from rlhfjax.chat_settings import Options
from rlhfjax.checkpoint import COMMITTED, Checkpoints, load_tree, save_tree
from rlhfjax.config import CheckpointConfig, to_dict
from rlhfjax.data.sources import open_source
from rlhfjax.data.tokenizer import load_tokenizer, train_sentencepiece
from rlhfjax.errors import CheckpointError, ConfigError, DataError, Preempted
from rlhfjax.interop import gguf, peft, store
from rlhfjax.interop.hf import load_hf, save_hf
from rlhfjax.mesh import make_layout
from rlhfjax.models import Model
from rlhfjax.rewards.rankings import Ranking, read_rankings, write_rankings
from rlhfjax.rewards.rules import read_metadata
from rlhfjax.sweep import command, pool
from tests import tiny, tiny_hosts
from tests.interop import test_gguf, test_peft
from tests.interop.test_hf import FAMILIES, random_params
from tests.test_checkpoint import EVERYTHING, restore, same, save, shapes, tree
from tests.test_hosts import Job, assert_same_numbers
from tests.test_main import call, refused
from tests.test_metrics import run as write_lines
from tests.test_resume import assert_same_stage, interrupt, recipe_folder
from tests.test_stages import stage_values
from tests.test_sweep import write as write_sweep_file

ROOT = Path(__file__).parent.parent


def names(folder) -> list[str]:
    return [str(file.relative_to(folder)) for file in paths.files(folder)]


# ------------------------------------------------------------------ checkpoints


def test_what_was_saved_comes_back_and_what_is_not_kept_goes(bucket):
    assert restore(bucket) is None
    save(bucket, [1, 2, 3], CheckpointConfig(keep_last=2))
    state, data = restore(bucket)
    assert same(state, tree(3)) and data == {"position": 3}
    assert {name.split("/")[1] for name in names(bucket)} == {"2", "3"}


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(bucket, caplog):
    save(bucket, [1, 2])
    arrays = max(
        (
            file
            for file in paths.files(bucket / "checkpoints" / "2")
            if file.parent.name == "d"
        ),
        key=lambda file: file.stat().length,
    )
    paths.write(arrays, arrays.read_bytes()[: arrays.stat().length // 2])
    damaged = names(bucket / "checkpoints" / "2")
    with caplog.at_level(logging.WARNING, "rlhfjax"):
        state, data = restore(bucket)
    assert same(state, tree(1)) and data == {"position": 1}
    assert f"{bucket}/checkpoints/2 is damaged" in caplog.text
    assert (
        names(bucket / "damaged_checkpoints" / "2") == damaged
        and not (bucket / "checkpoints" / "2").exists()
    )
    save(bucket, [2])  # the step can be saved again
    assert same(restore(bucket)[0], tree(2))


def test_a_half_written_checkpoint_is_not_one(bucket, caplog):
    """A bucket cannot rename: what a kill in the middle of a save leaves has the name already, and
    no COMMITTED.
    """
    save(bucket, [1, 2])
    (bucket / "checkpoints" / "2" / COMMITTED).unlink()
    with (
        caplog.at_level(logging.WARNING, "rlhfjax"),
        Checkpoints(bucket, EVERYTHING) as checkpoints,
    ):
        assert checkpoints.steps() == [1]
        state, _ = checkpoints.restore(shapes(tree()))
        assert same(state, tree(1)) and not caplog.text
        checkpoints.save(2, tree(3), {"position": 2})
    assert same(restore(bucket)[0], tree(3))


def test_parameters_are_there_whole_or_not_at_all(bucket):
    with pytest.raises(CheckpointError, match="no parameters here"):
        load_tree(bucket / "params", shapes(tree()))
    save_tree(bucket / "params", tree(1))
    save_tree(bucket / "params", tree(2))  # replaces
    assert same(load_tree(bucket / "params", shapes(tree())), tree(2))
    (bucket / "params" / COMMITTED).unlink()
    with pytest.raises(CheckpointError, match="no parameters here"):
        load_tree(bucket / "params", shapes(tree()))


# ------------------------------------------------------------------ lines


def test_flush_brings_every_line_to_the_bucket_and_a_line_alone_does_not(bucket):
    with metrics.Writer(bucket) as writer:
        writer.write(1, {"loss": 1.0})
        writer.flush()
        writer.write(2, {"loss": 2.0})
        assert metrics.read_jsonl(bucket / "metrics.jsonl") == [
            {"step": 1, "loss": 1.0}
        ]
    assert [row["step"] for row in metrics.read_jsonl(bucket / "metrics.jsonl")] == [
        1,
        2,
    ]
    assert {name.split("/")[0] for name in names(bucket)} == {
        "metrics.jsonl",
        "timing.jsonl",
        "tb",
    }


def test_without_a_flush_lines_come_when_the_last_upload_is_old(bucket, monkeypatch):
    monkeypatch.setattr(metrics, "UPLOAD_EVERY", 0.2)
    with metrics.Writer(bucket, tensorboard=False) as writer:
        time.sleep(0.25)
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 2.0})
        assert [
            row["step"] for row in metrics.read_jsonl(bucket / "metrics.jsonl")
        ] == [1]


@pytest.mark.parametrize("cut", [0, 7])
def test_resume_gives_the_bytes_of_an_uninterrupted_run(bucket, tmp_path, cut):
    write_lines(tmp_path, 0, 9)
    write_lines(bucket, 0, 7)  # checkpoint at 4, killed at 6
    file = bucket / "metrics.jsonl"
    paths.write(file, file.read_bytes()[: -cut or None])
    write_lines(bucket, 5, 9, resume_step=4)
    assert file.read_bytes() == (tmp_path / "metrics.jsonl").read_bytes()


# ------------------------------------------------------------------ data, tokenizers and models


@pytest.fixture
def chats(conversations, bucket):
    """The conversations, in a bucket."""
    for file in conversations.iterdir():
        paths.write(bucket / "chats" / file.name, file.read_bytes())
    return bucket / "chats"


def test_lines_and_texts_are_read_as_from_a_disk(conversations, chats):
    for split in ("train", "validation"):
        here, there = (
            open_source(f"jsonl:{folder}/{{split}}.jsonl", kind="messages", split=split)
            for folder in (conversations, chats)
        )
        assert [there[i] for i in range(len(there))] == [
            here[i] for i in range(len(here))
        ]
    assert there.locate(3) == f"{chats}/validation.jsonl:4"
    paths.write(chats / "a" / "book.txt", "one\n\ntwo\n")
    book = open_source(f"text:{chats}/**/*.txt", documents="paragraph", split="all")
    assert [book[i]["text"] for i in range(len(book))] == ["one", "two"]
    paths.write(chats / "bad.jsonl", '{"messages": []}\n')
    with pytest.raises(DataError, match=rf"^{chats}/bad\.jsonl:1: "):
        open_source(f"jsonl:{chats}/bad.jsonl", kind="messages", split="all")
    with pytest.raises(DataError, match=f"no file matches '{chats}/nowhere"):
        open_source(f"jsonl:{chats}/nowhere*", kind="messages")


def test_a_corpus_is_prepared_in_a_bucket_once(bucket, tmp_path, monkeypatch):
    first = open_source("tfds:kjv", split="validation", data_dir=bucket)
    prepared = names(bucket)
    assert "kjv/1.0.0/dataset_info.json" in prepared and any(
        "array_record" in name for name in prepared
    )
    monkeypatch.setattr(paths, "replacing", None)  # it is not written again
    again = open_source("tfds:kjv", split="validation", data_dir=bucket)
    named = open_source(f"tfds:{bucket}/kjv/1.0.0", split="validation")
    assert (
        first[3]["text"] == again[3]["text"] == named[3]["text"]
        and len(first) == len(named) > 3
    )


def test_rankings_and_a_rules_metadata(bucket):
    rankings = [Ranking("q", ("a", "b"), (1, 2), "who")]
    write_rankings(bucket / "r" / "1.jsonl", rankings)
    assert read_rankings(f"{bucket}/r/*.jsonl") == rankings
    paths.write(bucket / "m.jsonl", '{"prompt": "q", "answer": 3}\n')
    assert read_metadata(f"{bucket}/m*.jsonl") == {"q": {"answer": 3}}


def test_tokenizers_are_written_and_read(bucket, tmp_path):
    ours = train_sentencepiece(
        ["the cat sat on the mat"] * 9, bucket / "ours", vocab_size=275
    )
    assert (
        load_tokenizer(bucket / "ours")
        == load_tokenizer(f"{bucket}/ours/tokenizer.model")
        == ours
    )
    with pytest.raises(DataError, match=f"^{bucket}/nowhere"):
        load_tokenizer(bucket / "nowhere")


def test_hugging_faces_folders_and_adapters_are_written_and_read(bucket):
    model = Model(FAMILIES["llama-gqa"])
    save_hf(bucket / "hf", model, random_params(model), shard_bytes=20_000)
    assert (
        len([name for name in names(bucket / "hf") if name.endswith(".safetensors")])
        > 1
    )
    again, params = load_hf(bucket / "hf")
    assert again.config == model.config and same(params, random_params(model))
    with pytest.raises(CheckpointError, match="exists already"):
        save_hf(bucket / "hf", model, random_params(model))
    adapted = Model(model.config, "lm", test_peft.ALL)
    adapters = test_peft.random_adapters(adapted)
    peft.save_peft(bucket / "adapter", adapted, adapters)
    assert same(peft.load_peft(bucket / "adapter", model)[1], adapters)
    with pytest.raises(CheckpointError, match=f"{bucket}/hf: no whole PEFT adapter"):
        peft.load_peft(bucket / "hf", model)


def test_a_gguf_file_is_read(bucket, tmp_path):
    test_gguf.write(
        tmp_path / "m.gguf", test_gguf.GROUPED, test_gguf.weights(2, 8, True)
    )
    paths.write(bucket / "m.gguf", (tmp_path / "m.gguf").read_bytes())
    here, there = (
        gguf.load_gguf(tmp_path / "m.gguf"),
        gguf.load_gguf(f"{bucket}/m.gguf"),
    )
    assert here[0] == there[0] and same(here[1], there[1])
    with pytest.raises(
        CheckpointError, match=f"^{bucket}/n.gguf: there is no such file"
    ):
        gguf.describe_gguf(bucket / "n.gguf")


# ------------------------------------------------------------------ the command line


def test_what_is_wrong_with_a_bucket_is_one_line(capsys, cloud, bucket, conversations):
    tiny_config = f"--config={ROOT}/tests/tiny.py:data={conversations},until=tokenizer"
    assert "gs://nowhere/run/config.json: there is no such bucket" in refused(
        capsys, "run", tiny_config, "--workdir=gs://nowhere/run"
    )
    assert "expected a local path or one of Google Cloud Storage (gs://" in refused(
        capsys, "report", "--workdir=s3://bucket/run"
    )
    assert f"workdir {bucket} does not exist" in refused(
        capsys, "report", f"--workdir={bucket}"
    )
    assert f"{bucket}: no model here" in refused(
        capsys, "chat", f"--workdir={bucket}", code=1
    )
    assert f"expected a local folder; there is no {bucket}/config.json" in refused(
        capsys, "chat", f"--model=hf:{bucket}", code=1
    )
    paths.write(bucket / "x", "")
    assert f"--to={bucket}: it exists" in refused(
        capsys, "export", "--workdir=W", f"--to={bucket}"
    )


def test_a_bucket_that_cannot_be_reached_is_one_line_and_not_one_that_is_empty(
    bucket, capsys, monkeypatch
):
    """A run that took an outage for an empty folder would begin anew."""
    import gcsfs

    save(bucket, [1])

    async def lost(*_, **__):
        raise aiohttp.ClientOSError(101, "Network is unreachable")

    monkeypatch.setattr(gcsfs.core.GCSFileSystem, "_request", lost)
    for look in (paths.children, paths.files, recipe.read_done, store.find):
        with pytest.raises((aiohttp.ClientOSError, DataError), match="Network is unr"):
            look(bucket)
    said = refused(capsys, "report", f"--workdir={bucket}", code=1)
    assert said.startswith("rlhfjax: ") and said.endswith("Network is unreachable")


def test_without_gcsfs_every_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for args in (
        ("run", f"--config={ROOT}/tests/tiny.py", "--workdir=gs://b/x"),
        ("report", "--workdir=gs://b/x"),
        ("chat", "--model=hf:gs://b/x"),
    ):
        said = refused(capsys, *args)
        assert said.startswith("rlhfjax: gs://b/x") and said.endswith(
            "pip install -e '.[gcs]'"
        )


def test_a_sweep_keeps_its_logs_in_the_bucket_and_adds_to_them(bucket):
    says = [
        sys.executable,
        "-c",
        "print('out'); import sys; print('why', file=sys.stderr); sys.exit(3)",
    ]
    for _ in range(2):
        assert pool.run_all({"a": says}, bucket, say=lambda line: None) == {"a": 3}
    assert (bucket / "logs" / "a.txt").read_text() == "out\nwhy\nout\nwhy\n"
    assert command.why({"a": 3}, bucket, ["a"]) == ["a (exit code 3: why)"]
    with (
        pool._locked(bucket),
        pytest.raises(ConfigError, match=f"{bucket}: a sweep is running here"),
    ):
        pool.run_all({"a": says}, bucket)


@pytest.mark.slow
def test_a_sweep_in_a_bucket_runs_writes_its_tables_and_knows_what_is_finished(
    bucket, conversations, tmp_path, capsys
):
    file = write_sweep_file(tmp_path, "add({'arg.vocab': 300})", data=conversations)
    args = ("sweep", f"--config={file}", f"--workdir={bucket}/sweep")
    code, out, err = call(capsys, *args)
    assert code == 0 and f"table: {bucket}/sweep/sweep.html" in out, err
    assert "300" in (bucket / "sweep" / "sweep.csv").read_text()
    assert (bucket / "sweep" / "vocab=300" / "tokenizer.model").exists() and (
        bucket / "sweep" / "logs"
    ).exists()
    assert "1 run, 1 of them finished" in call(capsys, *args)[1]


# ------------------------------------------------------------------ runs


@pytest.mark.slow
def test_a_run_leaves_there_what_it_leaves_here_and_what_reads_it_reads_it_there(
    chats, conversations, finished, bucket, capsys
):
    """The tiny recipe up to its reward model, from data in the bucket.

    Then report, eval, chat, export and import.
    """
    run = bucket / "run"
    recipe.run(to_dict(tiny.get_config(f"data={chats},until=reward")), run)
    for number, name in enumerate(tiny.STAGES[:5]):
        assert_same_stage(
            finished / f"{number:02d}_{name}", run / f"{number:02d}_{name}"
        )
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert (
        lines
        and (finished / "metrics.jsonl").read_text().splitlines()[: len(lines)] == lines
    )

    code, out, _ = call(capsys, "report", f"--workdir={run}")
    assert (
        code == 0
        and f"report: {run}/report.html" in out
        and "pretrain" in (run / "report.html").read_text()
    )

    code, out, _ = call(capsys, "eval", f"--workdir={run}/02_sft")
    assert code == 0 and json.loads(out) == recipe.evaluate(None, finished / "02_sft")

    said = []
    for folder in (finished, run):
        options = Options(temperature=0.0, max_new_tokens=6)
        typed, out = io.StringIO("hello\n"), io.StringIO()
        chat_terminal.run(folder / "02_sft", options, inputs=typed, out=out)
        said.append(out.getvalue().splitlines())
    assert said[0] == said[1] != []

    assert (
        call(capsys, "export", f"--workdir={run}/02_sft", f"--to={bucket}/hf")[0] == 0
    )
    assert (
        call(capsys, "import", f"--model=hf:{bucket}/hf", f"--workdir={bucket}/ours")[0]
        == 0
    )
    saved, again = (
        store.load(folder, make_layout())
        for folder in (run / "02_sft", bucket / "ours")
    )
    assert same(saved.params, again.params) and saved.tokenizer == again.tokenizer


@pytest.mark.slow
def test_sigterm_saves_there_and_the_run_goes_on_to_the_same_bits(
    conversations, finished, bucket, monkeypatch
):
    values = stage_values("sft", conversations, finished)
    with monkeypatch.context() as patch:
        interrupt(patch, "sft", 3, "sigterm")
        with pytest.raises(Preempted, match="stopped at step 4 and was saved"):
            recipe.run_stage(values, bucket / "run")
    assert (bucket / "run" / "checkpoints" / "4" / COMMITTED).exists()
    recipe.run_stage(values, bucket / "run")
    assert_same_stage(recipe_folder(finished, "sft"), bucket / "run")


@pytest.mark.nightly
def test_a_killed_run_goes_on_there_to_the_same_bits(chats, finished, bucket):
    """SIGKILL, once the bucket has a checkpoint.

    Lines after it may or may not have been uploaded.
    """
    arg, run = f"data={chats},until=pretrain", bucket / "run"
    command = [
        sys.executable,
        "-m",
        "rlhfjax",
        "run",
        f"--config=tests/tiny.py:{arg}",
        f"--workdir={run}",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    while (
        not (run / "01_pretrain" / "checkpoints" / "2" / COMMITTED).exists()
        and process.poll() is None
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    assert not (run / "01_pretrain" / "done.json").exists()
    assert {
        row["step"] for row in metrics.read_jsonl(run / "01_pretrain" / "metrics.jsonl")
    } >= {1, 2}
    recipe.run(to_dict(tiny.get_config(arg)), run)
    for number, name in enumerate(tiny.STAGES[:2]):
        assert_same_stage(
            finished / f"{number:02d}_{name}", run / f"{number:02d}_{name}"
        )


@pytest.mark.nightly
def test_two_hosts_write_one_run_there(conversations, finished, bucket, tmp_path):
    """The first writes the files, each its shards of the state, and both read."""
    arg = f",only=pretrain,tokenizer={finished}/00_tokenizer"  # a Job adds shards=4
    Job(
        2,
        tmp_path / "logs",
        conversations,
        f"--workdir={bucket}/run",
        command="train",
        arg=arg,
    ).finish()
    recipe.run_stage(
        to_dict(tiny_hosts.get_config(f"data={conversations},shards=4{arg}")),
        tmp_path / "alone",
    )
    there = metrics.read_jsonl(bucket / "run" / "metrics.jsonl")
    assert_same_numbers(metrics.read_jsonl(tmp_path / "alone" / "metrics.jsonl"), there)
    written = names(bucket / "run")
    assert (
        any("ocdbt.process_1" in name for name in written)
        and sum("metrics.jsonl" in name for name in written) == 1
    )
    assert store.load(bucket / "run", make_layout()).model.config.n_layers == 1
