"""`benchmarks.accelerator` at tiny sizes on the CPU."""

import itertools
import json
import sys

import jax
import pytest

from benchmarks import accelerator, accelerator_numerics
from benchmarks import accelerator_parts as parts
from benchmarks.accelerator_parts import FULL, TINY
from rlhfjax.models.presets import preset
from rlhfjax.models.size import parameters
from rlhfjax.plan import chips


def test_bf16_is_near_float32_and_the_kernel_near_einsum():
    result = accelerator_numerics.numerics(TINY)
    assert 0 < abs(result["loss_difference"]) < 0.01
    assert 0 < result["gradient_error"] < 0.03
    kernel = accelerator_numerics.attention_kernel(TINY)
    assert kernel["kernel"] == "xla"
    assert 0 < kernel["output_error"] < 0.02
    assert 0 < kernel["gradient_error"] < 0.03


def test_shares_need_the_peaks_of_the_device(monkeypatch):
    """A clock of the test: on a busy machine a prompt alone can take longer than with tokens."""
    clock = itertools.cycle((0.9, 0.2))  # with new tokens, and the prompt alone

    def seconds(call):
        jax.block_until_ready(call())
        return next(clock)

    monkeypatch.setattr(parts, "median_seconds", seconds)
    assert parts.device()["peak"] == "unknown peak"
    result = parts.generation(2, TINY)
    assert result["bandwidth_share"] is None
    assert result["decode_step_s"] == pytest.approx(0.7 / (TINY.new - 1))
    chip = chips.Chip("x", 1e9, 1e12, 4e9, 1.0, 1.0, "made up")
    monkeypatch.setattr(chips, "chip_of", lambda kind: chip, raising=False)
    result = parts.generation(2, TINY)
    moved = result["least_gb_per_step"] / result["decode_step_s"]
    assert result["bandwidth_share"] == pytest.approx(moved / 4)


def test_a_decode_step_reads_every_matrix_but_only_rows_of_an_untied_embedding():
    tied, untied = preset("gpt2-124m"), preset("llama2-7b")
    assert parts.decoded_parameters(tied) == parameters(tied)
    assert parts.decoded_parameters(untied) == parameters(untied) - 32000 * 4096


def test_parts_after_the_last_minute_are_skipped_and_a_failure_costs_only_its_part():
    class Clock:
        seconds = iter((9.0, 5.0, -1.0))

        def left(self):
            return next(self.seconds)

        def __call__(self, function, *args):
            if function is accelerator_numerics.numerics:
                return {"error": "ValueError: a | b"}
            return {"output_error": 0.25, "gradient_error": 0.5, "seconds": 200.0}

    names = ["numerics", "attention", "resume"]
    results = accelerator.measure(Clock(), FULL, names)
    text = accelerator.markdown(
        {"devices": 1, "kind": "K", "peak": "unknown peak"}, results, FULL
    )
    assert "| numerics | ValueError: a / b | — | — |" in text
    assert (
        "| attention | 0.25 output error; 0.5 gradient error; 200 s | — | — |" in text
    )
    assert "| resume | the minutes are spent | — | — | — |" in text


def test_the_table_has_mfu_and_memory_beside_the_plan():
    result = {"tokens_per_s": 1234.0, "mfu": 0.5, "peak_gb": 10.0, "plan_gb": 9.5}
    generated = {"gb_per_s": 4000.0, "bandwidth_share": 0.8}
    device = {"devices": 1, "kind": "K", "peak": "1 TFLOP/s"}
    results = {"pretrain_1b": result, "generation_second": generated}
    text = accelerator.markdown(device, results, FULL)
    expected = "| pretrain, llama3.2-1b | 1,234 tokens/s | 50 % MFU | 10, 9.5 | — |"
    assert expected in text
    expected = (
        "| generation, llama3.2-1b, batch 64 | 4,000 GB/s | 80 % of the bandwidth |"
    )
    assert expected in text


@pytest.mark.nightly
def test_every_part_has_a_result(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device
    monkeypatch.setattr(sys, "argv", ["accelerator", "--minutes=30", f"--out={out}"])
    accelerator.main()
    results = json.loads(out.read_text())["parts"]
    assert list(results) == list(accelerator.PARTS)
    problems = {k: v for k, v in results.items() if "error" in v or "skipped" in v}
    assert not problems
    assert results["resume"]["is_same"]
    assert set(results["ppo"]["programs"]) >= {"rollout"}
    assert "| resume | the same bits |" in capsys.readouterr().out
