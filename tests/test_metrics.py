"""Accumulation is exact, files are reproducible, the progress line tells the truth."""

import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from rlhfjax import metrics, progress


def test_finalize_divides_once_and_omits_what_was_not_observed():
    total = {"loss": (6.0, 4.0), "never": (0.0, 0.0), "zero": (0.0, 2.0)}
    assert metrics.finalize(total, "sft/") == {"sft/loss": 1.5, "sft/zero": 0.0}


def test_finalize_sums_stacked_pairs():
    # Two scan iterations with 3 and 1 tokens: (6 + 10) / (3 + 1) = 4, not (2 + 10) / 2 = 6.
    stacked = {"loss": (jnp.array([6.0, 10.0]), jnp.array([3.0, 1.0]))}
    assert metrics.finalize(stacked) == {"loss": 4.0}


def test_add_takes_the_union_of_names():
    a, b = {"x": (1.0, 2.0)}, {"x": (3.0, 1.0), "y": (5.0, 1.0)}
    assert metrics.add(a, b) == {"x": (4.0, 3.0), "y": (5.0, 1.0)}
    assert a == {"x": (1.0, 2.0)}
    assert metrics.merge(a, b, b) == {"x": (7.0, 4.0), "y": (10.0, 2.0)}


def test_add_works_under_jit():
    out = jax.jit(metrics.add)({"x": (1.0, 2.0)}, {"x": (3.0, 1.0)})
    assert metrics.finalize(out) == {"x": pytest.approx(4 / 3)}


def test_pitfall_28_hosts_with_unequal_weights_average_exactly():
    # Host 0 saw 9 tokens of nll 1, host 1 one token of nll 11: the mean is 20/10 = 2; the mean of
    # means is 6.
    hosts = [{"loss": (9.0, 9.0)}, {"loss": (11.0, 1.0)}]
    assert metrics.finalize(metrics.merge(*hosts)) == {"loss": 2.0}


def test_pitfall_11_a_value_of_zero_is_written(tmp_path):
    with metrics.Writer(tmp_path) as w:
        w.write(0, metrics.finalize({"score": (0.0, 3.0)}))
    assert metrics.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 0, "score": 0.0}]


def test_lines_are_sorted_round_trip_and_are_valid_json(tmp_path):
    values = {
        "b": 0.1 + 0.2,
        "a": float(np.float32(1) / np.float32(3)),
        "n": math.nan,
        "i": -math.inf,
    }
    with metrics.Writer(tmp_path) as w:
        w.write(7, values)
        w.write(7, {"a/val": 1.0})
        w.write(8, {})
    text = (tmp_path / "metrics.jsonl").read_text()
    first, second = text.splitlines()
    assert (
        first
        == '{"step": 7, "a": 0.3333333432674408, "b": 0.30000000000000004, "i": null, "n": null}'
    )
    assert json.loads(first)["b"] == values["b"]
    assert json.loads(second) == {"step": 7, "a/val": 1.0}


def test_pitfall_35_a_value_that_is_null_is_nan_again(tmp_path):
    with metrics.Writer(tmp_path) as w:
        w.write(1, {"loss": 2.0, "kl": 3.0})
        w.write(2, {"loss": math.nan})
    expected = {"loss": math.nan, "kl": 3.0}
    assert metrics.last_values(tmp_path) == pytest.approx(expected, nan_ok=True)


def test_a_line_is_in_the_file_before_flush_so_that_a_kill_loses_none(tmp_path):
    w = metrics.Writer(tmp_path)
    w.write(1, {"loss": 1.0})
    assert metrics.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    w.close()


def test_timing_stays_out_of_the_metrics(tmp_path):
    with metrics.Writer(tmp_path) as w:
        w.write(1, {"loss": 1.0})
        w.timing(1, {"tokens_per_second": 123.0})
    assert "tokens_per_second" not in (tmp_path / "metrics.jsonl").read_text()
    assert metrics.read_jsonl(tmp_path / "timing.jsonl") == [
        {"step": 1, "tokens_per_second": 123.0}
    ]


def run(workdir, start, stop, resume_step=None):
    with metrics.Writer(workdir, resume_step) as w:
        for step in range(start, stop):
            w.write(step, {"loss": 1 / (3 + step), "nan": math.nan})
            if step % 2 == 0:
                w.write(step, {"val/loss": step / 7})


@pytest.mark.parametrize("cut", [0, 1, 7, 20])
def test_resume_gives_the_bytes_of_an_uninterrupted_run(tmp_path, cut):
    run(tmp_path / "whole", 0, 9)
    run(tmp_path / "cut", 0, 7)  # checkpoint at 4, killed at 6 while writing
    path = tmp_path / "cut" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: -cut or None])
    run(tmp_path / "cut", 5, 9, resume_step=4)
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "metrics.jsonl",
        "tb",
        "timing.jsonl",
    ]


def test_a_fresh_start_begins_with_empty_files(tmp_path):
    run(tmp_path, 0, 3)
    run(tmp_path, 0, 1)
    assert [row["step"] for row in metrics.read_jsonl(tmp_path / "metrics.jsonl")] == [
        0,
        0,
    ]


def test_a_secondary_host_writes_nothing(tmp_path):
    with metrics.Writer(tmp_path / "w", primary=False) as w:
        w.write(1, {"loss": 1.0})
        w.timing(1, {"s": 1.0})
        w.flush()
    assert not (tmp_path / "w").exists()


def events(folder):
    """Reads event files: length u64, crc u32, payload, crc u32."""
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            n = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + n])
            data = data[16 + n :]


def test_tensorboard_has_metrics_and_timings_and_purges_on_resume(tmp_path):
    with metrics.Writer(tmp_path) as w:
        w.write(3, {"sft/loss": 0.5})
        w.timing(3, {"sft/tokens_per_second": 8.0})
    scalars = {
        v.tag: (e.step, v.simple_value)
        for e in events(tmp_path / "tb")
        for v in e.summary.value
    }
    assert scalars == {"sft/loss": (3, 0.5), "sft/tokens_per_second": (3, 8.0)}
    for path in (tmp_path / "tb").iterdir():
        path.unlink()
    metrics.Writer(tmp_path, resume_step=3).close()
    starts = [e.step for e in events(tmp_path / "tb") if e.HasField("session_log")]
    assert starts == [4]  # TensorBoard forgets what it was told of step 4 and after


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_progress_prints_plain_lines_at_a_bounded_rate():
    stream, clock = io.StringIO(), Clock()
    with progress.Progress(
        100, "tok", title="sft", stream=stream, interval=10, clock=clock
    ) as p:
        for step in range(1, 101):
            clock.now += 1.0
            p.update(step, {"sft/loss": 2.0, "sft/lr": 1e-3}, count=500)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sft 1/100  1%  loss 2  ETA -"
    # Step 11: ten steps of 500 tokens in 10 s after the first, 89 steps to go at 1 s each.
    assert lines[1] == "sft 11/100  11%  loss 2  500 tok/s  ETA 1m29s"
    assert lines[-1] == "sft 100/100  100%  loss 2  500 tok/s  took 1m40s"
    assert len(lines) == 11


def test_progress_of_a_resumed_run_does_not_count_the_steps_before():
    stream, clock = io.StringIO(), Clock()
    p = progress.Progress(100, stream=stream, interval=0, start=90, clock=clock)
    for step in (91, 92):
        clock.now += 2.0
        p.update(step)
    assert stream.getvalue().splitlines()[-1] == "92/100  92%  0 tokens/s  ETA 16s"


def test_progress_of_a_recipe_has_the_time_of_later_stages_if_it_is_known():
    stream, clock = io.StringIO(), Clock()
    with progress.followed_by(100.0):
        p = progress.Progress(100, stream=stream, interval=0, clock=clock)
        for step in (1, 2):
            clock.now += 1.0
            p.update(step)
    p.update(3)
    lines = stream.getvalue().splitlines()
    # 98 s of this stage and 100 s of those after it.
    assert lines[1].endswith("ETA 1m38s  recipe about 3m20s left")
    assert "recipe" not in lines[0] + lines[2]


def test_progress_on_a_terminal_stays_on_one_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with progress.Progress(4, title="ppo", stream=stream) as p:
        for step in range(1, 5):
            p.update(step, {"ppo/loss": 1.0, "ppo/reward": 0.25}, count=1)
        p.print("a note [not markup]")
    text = stream.getvalue()
    assert "4/4  100%  reward 0.25" in text
    assert "a note [not markup]" in text


@pytest.mark.parametrize(
    ("metrics_", "text"),
    [
        ({"a/loss": 1.0, "a/reward": 0.5}, "reward 0.5"),
        ({"loss": 1.23456}, "loss 1.235"),
        ({"lr": 1.0}, ""),
    ],
)
def test_headline_prefers_the_reward(metrics_, text):
    assert progress.headline(metrics_) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(9.4, "9s"), (185, "3m05s"), (59.6, "1m00s"), (7620, "2h07m"), (math.inf, "-")],
)
def test_duration(seconds, text):
    assert progress.duration(seconds) == text
