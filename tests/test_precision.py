"""What dtype="auto" becomes, where it is recorded, and that a resumed run keeps it."""

import json
import logging

import pytest

from rlhfjax import precision, processor, recipe
from rlhfjax.config import write_json
from rlhfjax.errors import Preempted
from rlhfjax.interop import store
from rlhfjax.plan.shapes import parse_model, subject
from rlhfjax.precision import here
from rlhfjax.workdirs import CONFIG
from tests.test_resume import assert_same_stage, interrupt
from tests.test_stages import stage_values


@pytest.mark.parametrize(
    ("platform", "features", "dtype"),
    [
        ("tpu", "", "bfloat16"),
        ("gpu", "", "bfloat16"),
        ("cuda", "", "bfloat16"),
        ("cpu", "sse4_2 avx2 avx512f amx_bf16 amx_int8", "bfloat16_products"),
        ("cpu", "avx2 avx512_bf16 avx512_vnni", "bfloat16_products"),
        ("cpu", "sse4_2 avx2 avx512f", "float32"),
        ("cpu", "bf16 asimd", "float32"),  # an Arm processor's name of it
        ("cpu", "", "float32"),
    ],
)
def test_the_fastest_dtype_by_platform_and_features(platform, features, dtype):
    assert precision.fastest(platform, features.split()) == dtype


def test_here_is_of_this_cpu(monkeypatch):
    for features, dtype in (("amx_bf16", "bfloat16_products"), ("avx2", "float32")):
        monkeypatch.setattr(processor, "features", {features}.copy)
        assert here() == dtype


@pytest.fixture
def slow_cpu(monkeypatch):
    monkeypatch.setattr(precision, "here", lambda: precision.fastest("cpu", ["avx2"]))


@pytest.fixture
def fast_cpu(monkeypatch):
    monkeypatch.setattr(
        precision, "here", lambda: precision.fastest("cpu", ["amx_bf16"])
    )


RECIPE = {
    "stages": ["pretrain", "sft"],
    "pretrain": {"model": {"dtype": "auto", "d_model": 8}, "note": {"dtype": "auto"}},
    "sft": {"overrides": {"dtype": "auto"}},
}


def test_auto_is_replaced_where_models_are_configured(fast_cpu):
    found = precision.resolved(RECIPE)
    products = "bfloat16_products"
    assert found["pretrain"]["model"] == {"dtype": products, "d_model": 8}
    assert found["sft"]["overrides"] == {"dtype": products}
    assert found["pretrain"]["note"] == {"dtype": "auto"}  # not a model
    assert RECIPE["pretrain"]["model"]["dtype"] == "auto"
    other = precision.resolved(RECIPE, dtype="bfloat16")
    assert other["sft"]["overrides"] == {"dtype": "bfloat16"}


def test_a_workdir_keeps_its_dtype(tmp_path, slow_cpu):
    before = precision.resolved(RECIPE, dtype="bfloat16_products")
    write_json(tmp_path / CONFIG, before)
    assert precision.resolved(RECIPE, tmp_path) == before
    assert precision.resolved(RECIPE, tmp_path / "new") == precision.resolved(
        RECIPE, dtype="float32"
    )


def test_one_warning_where_the_dtype_is_slow(slow_cpu, caplog):
    caplog.set_level(logging.WARNING, "rlhfjax")
    precision.warn_if_slow(["float32", "bfloat16_products", "bfloat16_products"])
    (record,) = caplog.records
    assert record.getMessage() == (
        "dtype=bfloat16_products is slow on this CPU, where float32 is fastest; the model keeps it"
    )


def test_no_warning_where_it_is_fast(fast_cpu, caplog):
    caplog.set_level(logging.WARNING, "rlhfjax")
    precision.warn_if_slow(["float32", "bfloat16_products"])
    assert not caplog.records


def test_a_plan_takes_the_dtype_of_its_topology(fast_cpu):
    config = {
        "stage": "pretrain",
        "steps": 1,
        "batch_size": 8,
        "length": 8,
        "sources": ({"spec": "jsonl:texts.jsonl", "kind": "text"},),
        "eval_sources": (),
        "tokenizer": "tokenizer",
        "model": {
            "vocab_size": 16,
            "d_model": 8,
            "n_layers": 1,
            "n_heads": 1,
            "d_ff": 8,
            "max_length": 8,
            "dtype": "auto",
        },
    }
    assert subject(config).model.dtype == "bfloat16_products"
    assert subject(config, dtype="bfloat16").model.dtype == "bfloat16"
    assert parse_model("tiny:dtype=auto", "bfloat16").dtype == "bfloat16"


@pytest.mark.slow
def test_a_run_resumes_on_a_slower_cpu_to_the_same_bits(
    conversations, finished, tmp_path, monkeypatch, fast_cpu, caplog
):
    values = stage_values("sft", conversations, finished)
    values |= {"overrides": {"dtype": "auto"}, "steps": 3}
    recipe.run(values, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, "sft", 2, "sigterm")
        with pytest.raises(Preempted):
            recipe.run(values, tmp_path / "run")
    monkeypatch.setattr(precision, "here", lambda: "float32")
    caplog.set_level(logging.WARNING, "rlhfjax")
    recipe.run(values, tmp_path / "run")
    assert_same_stage(tmp_path / "whole", tmp_path / "run")
    warnings = [r.getMessage() for r in caplog.records if "is slow" in r.getMessage()]
    assert len(warnings) == 1
    config = json.loads((tmp_path / "run" / CONFIG).read_text())
    assert config["overrides"] == {"dtype": "bfloat16_products"}
    assert store.describe(tmp_path / "run").config.dtype == "bfloat16_products"
