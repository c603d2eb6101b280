"""A workdir as a recipe leaves it, made up.

Curves of plausible shape, and texts that try to break the page.
"""

import json

import numpy as np

from rlhfjax.clock import PARTS
from rlhfjax.evals.stats import calibration
from rlhfjax.json_text import null_nonfinite, unicode
from rlhfjax.metrics import Writer

NASTY = '<script>alert("x")</script> & <b>bold</b> {{ 7 * 7 }} $x^2$'


def make_stage(
    folder,
    kind,
    steps,
    lines,
    *,
    timing=None,
    samples=(),
    done=True,
    seconds=61.0,
    extra=None,
):
    """Writes a stage's folder; `lines` are (step, {name: value}) with names without the stage."""
    folder.mkdir(parents=True)
    config = {"stage": kind, "steps": steps, "seed": 0, "optim": {"lr": 3e-4}}
    (folder / "config.json").write_text(json.dumps(config))
    last = {}
    with Writer(folder) as w:
        for step, values in lines:
            values = {f"{kind}/{name}": float(value) for name, value in values.items()}
            w.write(step, values)
            last |= values
        for step in range(0, steps, max(steps // 4, 1)) if timing else ():
            w.timing(step, {f"{kind}/{name}": value for name, value in timing.items()})
    if timing:
        parts = dict.fromkeys(PARTS, 1.0) | {"step": 27.0}
        kept = {"at": 0.0, "starts": 2, "goodput": 0.75, "seconds": parts}
        (folder / "goodput.json").write_text(json.dumps(kept))
    if samples:
        (folder / "samples.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in samples)
        )
    if done:
        record = {
            "stage": unicode(folder.name),
            "kind": kind,
            "steps": steps,
            "seconds": seconds,
            "metrics": null_nonfinite(last),
        }
        (folder / "done.json").write_text(json.dumps(record | (extra or {})))


def language(rng, start, end, n, noise=0.08):
    for step in range(1, n + 1):
        loss = end + (start - end) * np.exp(-5 * step / n) + noise * rng.normal()
        yield (
            step,
            {
                "loss": loss,
                "lr": 3e-4 * min(1, 20 * step / n) * (1 - step / n),
                "grad_norm": 1 + rng.random(),
            },
        )
        if step % (n // 6) == 0:
            yield step, {"val_loss": loss + 0.1, "val_nats_per_byte": loss / 2.4}


def ppo_lines(rng, n):
    names = (
        "entropy",
        "clip_fraction",
        "approx_kl",
        "length",
        "eos_rate",
        "value_loss",
        "kl_coef",
    )
    for step in range(n):
        t = step / n
        row = {
            "reward": 2.2 * np.sqrt(t) + 0.15 * rng.normal(),
            "kl": 9 * t + 0.3 * rng.random(),
        }
        row |= {"explained_variance": 1 - np.exp(-4 * t) + 0.05 * rng.normal()}
        row |= {name: 0.2 + 0.1 * t + 0.02 * rng.normal() for name in names}
        yield step + 1, row
        if step % 10 == 9:
            gold = 0.2 + 0.6 * np.sqrt(t) - 0.1 * t**3
            yield (
                step + 1,
                {"val_kl": 9 * t, "val_proxy": 2.1 * np.sqrt(t), "val_gold": gold},
            )


def comparisons(rng, n):
    prompts = [
        "How was your weekend?",
        "Hi! What do you like to do for fun?",
        NASTY,
        "I lost my keys today.",
    ]
    baseline = [
        "it was ok i guess. how about you?",
        "i like to play games and watch movies",
        "",
        "oh no, where?",
    ]
    policy = [
        "It was great! I love the weekend, thanks for asking.",
        "I love hiking, it is so fun! What do you like?",
        "Haha, " + NASTY,
        "Oh no! I hope you find them soon, that would be great.",
    ]
    for i in range(n):
        gold = rng.normal([0.15, 0.6], 0.3)
        yield {
            "prompt": prompts[i % 4],
            "baseline": baseline[i % 4],
            "policy": policy[i % 4],
            "gold_baseline": gold[0],
            "gold_policy": gold[1],
            "proxy_baseline": gold[0] * 2,
            "proxy_policy": gold[1] * 3,
        }


EVALUATION = {
    "gold_win_rate": 0.831,
    "gold_win_rate_wilson_low": 0.781,
    "gold_win_rate_wilson_high": 0.872,
    "gold_baseline": 0.21,
    "gold_policy": 0.68,
    "proxy_baseline": 0.05,
    "proxy_policy": 2.02,
    "kl": 8.7,
    "distinct_2_baseline": 0.62,
    "distinct_2_policy": 0.5,
    "words_baseline": 11.2,
    "words_policy": 14.9,
    "prompts": 256,
}


CORPUS = {
    "kind": "text",
    "sources": [
        {
            "spec": f"jsonl:{NASTY}",
            "weight": 0.5,
            "rows": 1000,
            "skipped": 3,
            "left": 720,
            "files": "{split}/00-*.jsonl",
        }
    ],
    "filters": [
        {"name": "language", "removed": 200, "left": 800},
        {"name": "near", "removed": 80, "left": 720},
    ],
    "splits": {"train": 700, "test": 20},
    "words": {"train": 9000, "test": 300},
    "cut": 7,
    "ignored": 2,
    "quality_auc": 0.9123,
    "languages": {"en": 800, "de": 200},
    "lengths": {"before": [10, 490, 300, 200, 0], "after": [0, 400, 320, 0, 0]},
    "examples": {
        "language": [{"place": NASTY, "text": NASTY, "why": "de, probability 0.99"}],
        "near": [{"place": "x:2", "text": "a b", "why": "", "like": NASTY}],
    },
}


def make_recipe(root):
    """A finished recipe of seven stages."""
    rng = np.random.default_rng(0)
    names = ["tokenizer", "pretrain", "sft", "collect", "reward", "ppo", "evaluate"]
    root.mkdir(parents=True)
    config = {"stages": names} | {name: {"stage": name} for name in names}
    (root / "config.json").write_text(json.dumps(config))
    speed = {"tokens_per_second": 18500.0, "seconds_per_step": 0.2}
    difference = rng.normal(size=3000) * 1.5
    margin = np.where(
        rng.random(3000) < 1 / (1 + np.exp(-0.8 * difference)), difference, -difference
    )
    make_stage(
        root / "00_tokenizer",
        "tokenizer",
        0,
        [(0, {"vocab_size": 4096, "bytes_per_token": 3.91})],
        seconds=2.1,
    )
    make_stage(
        root / "01_pretrain",
        "pretrain",
        300,
        language(rng, 8.3, 4.1, 300),
        timing=speed,
        seconds=241.0,
    )
    make_stage(
        root / "02_sft",
        "sft",
        120,
        language(rng, 4.4, 3.6, 120),
        timing=speed,
        seconds=88.0,
    )
    rows = [
        {"prompt": "Hello!", "completions": ["hi", NASTY], "scores": [0.0, 0.5]}
    ] * 3
    make_stage(
        root / "03_collect",
        "collect",
        0,
        [(0, {"prompts": 1024, "mean_score": 0.21})],
        samples=rows,
    )
    accuracy = (
        (s, {"val_accuracy": 0.5 + 0.3 * s / 60, "val_length_accuracy": 0.57})
        for s in range(0, 61, 10)
    )
    lines = [
        (s, {"loss": 0.7 - 0.004 * s, "accuracy": 0.5 + 0.005 * s})
        for s in range(1, 61)
    ]
    make_stage(
        root / "04_reward",
        "reward",
        60,
        [*lines, *accuracy],
        timing=speed,
        seconds=75.0,
        extra={"calibration": calibration(margin).as_dict()},
    )
    make_stage(
        root / "05_ppo",
        "ppo",
        100,
        ppo_lines(rng, 100),
        timing={"samples_per_second": 41.3},
        seconds=301.0,
    )
    make_stage(
        root / "06_evaluate",
        "evaluate",
        0,
        [(0, EVALUATION)],
        samples=list(comparisons(rng, 64)),
        seconds=22.0,
    )
    return root
