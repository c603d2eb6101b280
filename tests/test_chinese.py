"""The Chinese recipe at its smoke size with fewer steps, on the real package."""

import json
import math
import runpy
from pathlib import Path

import pytest

from rlhfjax import recipe
from rlhfjax.config import to_dict
from rlhfjax.data.chinese import INSTALL
from rlhfjax.interop import store
from rlhfjax.metrics import METRICS_FILE, Values, read_rows
from tests.needs import needs

RECIPE = Path(__file__).parents[1] / "experiments" / "chinese" / "recipe.py"
STEPS = {"pretrain": 24, "sft": 6, "reward": 4, "ppo": 2}


def small() -> dict:
    config = to_dict(runpy.run_path(str(RECIPE))["get_config"]("size=smoke"))
    for stage, steps in STEPS.items():
        config[stage]["steps"] = config[stage]["eval_every"] = steps
        config[stage]["checkpoint"]["every"] = steps
        config[stage]["optim"]["warmup_steps"] = 2
    config["ppo"]["value_optim"]["warmup_steps"] = 2
    config["collect"]["prompts"]["limit"] = 32
    config["ppo"]["batch_size"] = 16
    config["ppo"]["eval_prompts"]["limit"] = 16
    config["evaluate"]["prompts"]["limit"] = 32
    return config


@pytest.mark.nightly
@needs("jionlp", install=INSTALL)
def test_from_chinese_text_to_ppo(tmp_path):
    recipe.run(small(), tmp_path)
    values = {}
    for row in read_rows(tmp_path / METRICS_FILE, Values):
        values.update(row)
    # At the start all 4,096 ids are equally likely.
    assert values["pretrain/val_loss"] < 0.95 * math.log(4096)
    # A token of the dictionary has three bytes, the end of a document or a turn none.
    bytes_per_token = values["tokenizer/bytes_per_token"]
    assert 2.9 < bytes_per_token < 4
    for loss, per_byte in (
        ("pretrain/val_loss", "pretrain/val_nats_per_byte"),
        ("evaluate/chat_loss_policy", "evaluate/chat_nats_per_byte_policy"),
    ):
        assert 2 < values[loss] / values[per_byte] < bytes_per_token
    assert 0 < values["evaluate/distinct_2_policy"] <= 1
    samples = tmp_path / "06_evaluate" / "samples.jsonl"
    responses = [json.loads(line) for line in samples.read_text().splitlines()]
    assert "是什么意思？" in responses[0]["prompt"]
    report = (tmp_path / "report.html").read_text()
    assert "是什么意思？" in report and "�" * 3 not in report
    tokenizer = store.load_tokenizer(tmp_path / "00_tokenizer")
    text = "“晨风”是什么意思？厦门、𠮷野家。"  # the last characters are of no corpus
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
