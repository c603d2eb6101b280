"""The loop closes: labels by a rule, given in browsers and over HTTP, become a better policy."""

import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhfjax.labeling.client import label_by
from tests.labeling.label_rule import scorer

ROOT = Path(__file__).parents[2]
CHROMIUM = "/usr/bin/chromium"
RULE = "rule:tests.labeling.label_rule:share_of_punctuation"
LABELERS, BY_BROWSER = 3, 20  # labels per browser


def lower_bound(share: float, n: float) -> float:
    """Returns the lower end of Wilson's interval of 95 %."""
    z = 1.96
    center = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (center - half) / (1 + z * z / n)


def start(workdir: Path, config: str, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "rlhfjax", "run", f"--config={config}"]
    command += [f"--workdir={workdir}", *(f"--config.{one}" for one in overrides)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def links_of(process: subprocess.Popen, count: int) -> list[str]:
    """Returns the links of the labelers, which the stage prints once it serves."""
    links: list[str] = []
    while len(links) < count:
        line = process.stdout.readline()
        assert line, "the run has ended before it served the page"
        if found := re.match(r"labeler-\d+: (http\S+)", line):
            links.append(found[1])
    return links


def label_in_browser(link: str, count: int) -> None:
    """Compares as the rule does, by the keys of the page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(link)
        event = None
        for _ in range(count):
            page.wait_for_selector(f"#work:not([data-event='{event}']) article")
            event = page.locator("#work").get_attribute("data-event")
            texts = page.locator("#work article .text").all_text_contents()
            first, second = scorer(["", ""], texts)
            key = "1" if first > second else "2" if second > first else "0"
            page.keyboard.press(key)
            page.keyboard.press("Enter")
        page.wait_for_selector(f"#work:not([data-event='{event}'])")
        browser.close()


def run_in_threads(function: Any, arguments: list[tuple]) -> None:
    with ThreadPoolExecutor(len(arguments)) as pool:
        futures = [pool.submit(function, *one) for one in arguments]
        for future in futures:
            future.result()


def metrics_of(workdir: Path, stage: str) -> dict[str, float]:
    (folder,) = workdir.glob(f"*_{stage}")
    return json.loads((folder / "done.json").read_text())["metrics"]


def length_accuracy(rankings: Path) -> float:
    """Returns how many untied comparisons the better of "longer" and "shorter" explains."""
    longer = []
    for line in rankings.read_text().splitlines():
        row = json.loads(line)
        lengths = [len(text) for text in row["completions"]]
        margin = row["ranking"][1] - row["ranking"][0]
        if margin and lengths[0] != lengths[1]:
            longer.append((lengths[0] > lengths[1]) == (margin > 0))
    share = float(np.mean(longer))
    return max(share, 1 - share)


@pytest.mark.nightly
@pytest.mark.skipif(not os.path.exists(CHROMIUM), reason="needs Debian's Chromium")
def test_sixty_labels_in_browsers_and_two_thousand_over_http_train_a_better_policy(
    tmp_path,
):
    """Kept: what length explains, the reward model's accuracy, and PPO's win rate by the rule."""
    workdir = tmp_path / "human"
    config = "experiments/human/recipe.py:size=smoke,task=compare,labelers=3,count=2060"
    process = start(
        workdir,
        config,
        *("label_1.port=0", "label_1.grace=1.0", "label_1.validation=0.2"),
        *("collect_1.prompts.limit=1200", "reward_1.steps=400"),
        "reward_1.optim.learning_rate=0.002",
        *(f"ppo_1.gold={RULE}", "ppo_1.steps=40", "ppo_1.kl.coefficient=0.03"),
        *(f"evaluate_1.gold={RULE}", "evaluate_1.prompts.limit=256"),
    )
    try:
        links = links_of(process, LABELERS)
        run_in_threads(label_in_browser, [(link, BY_BROWSER) for link in links])
        run_in_threads(label_by, [(scorer, link) for link in links])
        process.communicate(timeout=3000)
    finally:
        process.kill()
    assert process.returncode == 0
    labels = metrics_of(workdir, "label_1")
    assert labels["label/labels"] >= 2060 and labels["label/labelers"] == LABELERS
    (folder,) = workdir.glob("*_label_1")
    assert length_accuracy(folder / "rankings.jsonl") <= 0.55
    held_out = len(
        (folder / "preferences" / "validation.jsonl").read_text().splitlines()
    )
    reward = metrics_of(workdir, "reward_1")
    policy = metrics_of(workdir, "evaluate_1")
    print(reward, policy)
    assert lower_bound(reward["reward/val_accuracy"], held_out) > 0.70
    assert policy["evaluate/gold_win_rate_wilson_low"] > 0.55


def test_the_bound_is_wilsons():
    assert lower_bound(0.5, 100) == pytest.approx(0.4038, abs=1e-4)
