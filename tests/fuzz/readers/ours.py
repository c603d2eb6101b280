"""Readers of the package's own files: workdirs, checkpoints and saved models."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax import checkpoint, claims, json_text, jsonl, metrics, recipe
from rlhfjax.clock import Clock
from rlhfjax.config import to_dict
from rlhfjax.data.tokenizer import train_sentencepiece
from rlhfjax.interop import store
from rlhfjax.lab import Comparison, Figure, Study, results
from rlhfjax.lab import page as study_page
from rlhfjax.lab.found import Found, of_plan
from rlhfjax.models.config import TransformerConfig
from rlhfjax.report import summary_table
from rlhfjax.report.page import render
from rlhfjax.report.workdir import read_run
from rlhfjax.rewards.load import models_of
from rlhfjax.rewards.registry import describe
from rlhfjax.stages import stage_config
from tests.fuzz.inputs import binary_bytes, json_bytes, lines_bytes
from tests.fuzz.readers.table import (
    Reader,
    Strategy,
    Table,
    Trial,
    dumped,
    file_reader,
    files_reader,
    lines,
)
from tests.report import made_up_run

TABLE: Table = {}
CONFIG = TransformerConfig(
    vocab_size=330, d_model=16, n_layers=1, n_heads=2, d_ff=32, max_length=32
)
TEXTS = ["the cat sat on the mat.", "who ran? a happy dog sang!", "I 12 é🙂 yes no"] * 9

# ------------------------------------------------------------------ JSON


def _parse(folder: Path) -> Trial:
    seeds = dumped({"a": [1, 2.5, {"b": None}], "c": "é"}, [1, "x", True])
    return Trial(seeds, json_bytes(seeds), json_text.parse)


def _decode(folder: Path) -> Trial:
    hint = dict[str, list[float] | dict[str, int] | str]
    seeds = dumped({"a": [1, 2.5], "b": {"c": 3}, "d": "x"})
    read = functools.partial(json_text.decode, context="x.json", hint=hint)
    return Trial(seeds, json_bytes(seeds), read)


TABLE["json_parse"] = Reader(_parse, accepted=(json_text.NotJson,))
TABLE["json_decode"] = Reader(_decode)
ROWS = [{"step": 1, "sft/loss": 2.5}, {"step": 2, "sft/loss": None, "text": "é"}]


def _lines(read: Callable[[Path], Any]) -> Callable:
    return lambda folder: (
        folder / "x.jsonl",
        [lines(*ROWS)],
        lambda: read(folder / "x.jsonl"),
    )


file_reader(
    TABLE, "jsonl", lines_bytes, _lines(lambda file: list(jsonl.located_rows(file)))
)
file_reader(TABLE, "jsonl_unfinished", lines_bytes, _lines(jsonl.read_jsonl))
file_reader(TABLE, "jsonl_text", binary_bytes, _lines(jsonl.read_jsonl), examples=50)

# ------------------------------------------------------------------ workdirs


def _metrics(folder: Path) -> tuple[Path, list[bytes], Callable]:
    def read() -> None:
        for resume in (1, 2):
            metrics.Writer(folder, resume, tensorboard=False).close()
        metrics.last_values(folder)

    rows = lines(*({"step": i, "sft/loss": 1.0 / i} for i in range(1, 4)))
    return folder / "metrics.jsonl", [rows], read


def _done(folder: Path) -> tuple[Path, list[bytes], Callable]:
    done = {"stage": "00_sft", "kind": "sft", "steps": 3, "seconds": 1.5}
    seeds = dumped(done | {"metrics": {"sft/loss": 1.5, "sft/kl": None}})
    return folder / "done.json", seeds, lambda: recipe.read_done(folder)


def _goodput(folder: Path) -> tuple[Path, list[bytes], Callable]:
    def read() -> None:
        clock = Clock(folder)
        clock.summary()
        clock.describe_start()

    parts = {"step": 27.0, "compile": 1.0, "restart": 0.5}
    kept = {"at": 1.7e9, "starts": 2, "goodput": 0.75, "seconds": parts}
    return folder / "goodput.json", dumped(kept), read


def _stage_values() -> dict[str, Any]:
    source = {"spec": "jsonl:x.jsonl", "kind": "messages"}
    config = stage_config(
        "sft",
        init_from="x",
        sources=(source,),
        eval_sources=(source,),
        length=32,
        batch_size=8,
        steps=3,
        optim={"learning_rate": 1e-3},
    )
    return to_dict(config)


def _policy_values() -> dict[str, Any]:
    prompts = {"source": {"spec": "jsonl:x.jsonl", "kind": "messages"}}
    config = stage_config(
        "ppo",
        init_from="x",
        reward={"kind": "gold", "name": "sentiment"},
        gold="rule:json:dumps?timeout=2",
        prompts=prompts,
        eval_prompts=prompts,
        prompt_length=16,
        max_new_tokens=8,
        batch_size=8,
        steps=3,
        optim={"learning_rate": 1e-3},
    )
    return to_dict(config)


def _recipe_values() -> dict[str, Any]:
    return {"stages": ["sft"], "sft": _stage_values()}


def _config(folder: Path) -> tuple[Path, list[bytes], Callable]:
    values = _stage_values()
    (folder / "metrics.jsonl").write_text("")  # the config may not be replaced
    seeds = dumped(values, {"stage": "sft"})

    def read() -> None:
        claims.compare(folder, values)

    file = folder / "config.json"
    file.write_bytes(seeds[0])
    read()
    return file, seeds[:1], read


def _values(folder: Path) -> Trial:
    """Configs of Python values, as an experiment file gives them."""
    seeds = dumped(_stage_values(), _policy_values(), _recipe_values())

    def call(content: bytes) -> None:
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            return
        if isinstance(values, dict):
            recipe.validate(values)

    return Trial(seeds, json_bytes(seeds), call)


file_reader(TABLE, "metrics_on_resume", lines_bytes, _metrics)
file_reader(TABLE, "done_json", json_bytes, _done)
file_reader(TABLE, "goodput_json", json_bytes, _goodput)
file_reader(TABLE, "config_json", json_bytes, _config, examples=50)
TABLE["config_values"] = Reader(_values, examples=50)

# ------------------------------------------------------------------ results of studies

SERIES = {"kl": {"step": [1.0, 2.0], "value": [0.5, None]}}
ROW = {
    "hash": "00",
    "condition": "a",
    "overrides": {"sft.steps": 3},
    "seeds": {"arg.seed": 0},
    "metrics": {"sft/loss": 1.5, "sft/kl": None},
    "curves": SERIES,
    "seconds": 2.5,
    "stages": {"sft": {"id": "00", "seconds": 2.5}},
    "dtype": ["float32"],
    "rule": "00",
    "commit": "00",
    "clean": True,
    "hardware": {"devices": "1 x cpu"},
    "versions": {"jax": "0.10"},
}


def _results(folder: Path) -> tuple[Path, list[bytes], Callable]:
    file = folder / "results.jsonl"
    condition = {"option": 1.0}
    comparison = Comparison(
        name="c", value="loss", condition="a", baseline=0.0, expected="less"
    )
    study = Study(
        claim="c",
        paper="p",
        figure="f",
        conditions={"a": condition},
        seeds=2,
        values={"loss": "sft/loss"},
        primary=(comparison,),
        curves=("kl",),
        drawing=Figure(x="step", y="kl", title="t"),
    )
    plan = [results.Planned("r", "a", condition, {"arg.seed": 0}, "00", {})]

    def read() -> None:
        rows = of_plan(results.read(file), plan)
        found = Found(study, plan, results.by_hash(rows), results.repeats(rows))
        study_page.render(found, found.verdict())

    return file, [lines(ROW, ROW | {"date": "2021"})], read


file_reader(TABLE, "results", lines_bytes, _results, examples=20)

# ------------------------------------------------------------------ reports

CALIBRATION = {
    "confidence": [0.6, 0.8],
    "accuracy": [0.5, 0.9],
    "count": [3, 4],
    "ece": 0.1,
}


def _made_up(folder: Path) -> Path:
    run = folder / "run"
    values = [(i, {"loss": 1.0 / i, "val_loss": 1.0}) for i in (1, 2, 3)]
    samples = [{"prompt": "<|user|>hi", "baseline": "a", "policy": "b", "reward": 1.0}]
    made_up_run.make_stage(
        run, "sft", 3, values, timing={"step_seconds": 0.1}, samples=samples
    )
    (run / "calibration.json").write_bytes(dumped(CALIBRATION)[0])
    return run


def _report(file: str, folder: Path) -> tuple[Path, list[bytes], Callable]:
    run = _made_up(folder)
    return run / file, [(run / file).read_bytes()], lambda: summary_table(run)


def _run_of(file: str) -> Callable:
    return functools.partial(_report, file)


for _file in ("config", "done", "goodput", "calibration"):
    file_reader(TABLE, f"report_{_file}", json_bytes, _run_of(f"{_file}.json"))
for _file in ("metrics", "timing", "samples"):
    file_reader(TABLE, f"report_{_file}", lines_bytes, _run_of(f"{_file}.jsonl"))


def _page(folder: Path) -> tuple[dict[Path, Strategy], Callable]:
    run = _made_up(folder)
    names = {
        "metrics.jsonl": lines_bytes,
        "samples.jsonl": lines_bytes,
        "calibration.json": json_bytes,
        "done.json": json_bytes,
    }
    files = {run / name: strategy for name, strategy in names.items()}
    return files, lambda: render(read_run(run))


files_reader(TABLE, "report_page", _page, examples=6)

# ------------------------------------------------------------------ saved models


def _tokenizer_bytes(folder: Path) -> bytes:
    train_sentencepiece(TEXTS, folder / "trained", vocab_size=330)
    return (folder / "trained" / "tokenizer.model").read_bytes()


def _model_config(folder: Path) -> tuple[Path, list[bytes], Callable]:
    (folder / "params").mkdir()
    values = {"head": "lm", "transformer": to_dict(CONFIG)}
    seeds = dumped(values, values | {"head": "scalar"})
    return folder / "config.json", seeds, lambda: store.describe(folder)


def _model_tokenizer(folder: Path) -> tuple[Path, list[bytes], Callable]:
    content = _tokenizer_bytes(folder)

    def read() -> None:
        tokenizer = store.tokenizer(folder)
        tokenizer.decode(tokenizer.encode("who sat? <|user|> é"))
        tokenizer.byte_lengths()
        tokenizer.template.render([{"role": "user", "content": "hi"}], cue=True)

    return folder / "tokenizer.model", [content], read


def _reward_json(folder: Path) -> tuple[Path, list[bytes], Callable]:
    seeds = dumped(
        {"kind": "gold", "name": "sentiment"},
        {"kind": "rule", "function": "json:dumps", "timeout": 2.0},
        {"kind": "model", "model": "nowhere"},
        {"kind": "compose", "members": [{"reward": "gold:sentiment", "weight": 2.0}]},
    )

    def read() -> None:
        describe(str(folder))
        models_of(str(folder), store)

    return folder / "reward.json", seeds, read


def _checkpoint(folder: Path) -> tuple[dict[Path, Strategy], Callable]:
    path = folder / "params"
    arrays = {"a": jnp.arange(6.0), "b": {"c": jnp.ones((2, 3))}}
    checkpoint.save_tree(path, arrays)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays
    )
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.stat().st_size:
            is_json = file.read_bytes().startswith(b"{")
            files[file] = json_bytes if is_json else binary_bytes
    return files, lambda: checkpoint.load_tree(path, abstract)


file_reader(TABLE, "model_config", json_bytes, _model_config)
file_reader(TABLE, "model_tokenizer", binary_bytes, _model_tokenizer)
file_reader(TABLE, "reward_json", json_bytes, _reward_json)
files_reader(TABLE, "checkpoint", _checkpoint, examples=30)
