"""Names of models, units and intervals, tokens in color, provenance, and files to download."""

import base64
import csv
import io
import json
import re
import shutil
import urllib.parse
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from rich.console import Console

from rlhfjax import provenance
from rlhfjax.errors import DataError
from rlhfjax.metrics import SAMPLES_FILE
from rlhfjax.report import (
    names,
    origin,
    page,
    summary_table,
    sweep,
    tables,
    write_report,
)
from rlhfjax.report.downloads import csv_text, drawing
from rlhfjax.report.rollouts import rollouts
from rlhfjax.report.workdir import read_run
from tests.report.made_up_run import (
    CORPUS,
    EVALUATION,
    NASTY,
    comparisons,
    make_recipe,
    make_stage,
)
from tests.report.test_report import Page

TAX = {
    "chat_loss_pretrained": 4.0,
    "chat_loss_baseline": 3.5,
    "chat_loss_policy": 3.75,
    "text_loss_baseline": 4.5,
    "text_loss_policy": 4.25,
}
INTERVALS = {
    "gold_baseline_bca_low": 0.1,
    "gold_baseline_bca_high": 0.3,
    "gold_policy_bca_low": 0.6,
    "gold_policy_bca_high": 0.75,
    "gold_win_rate_equal_length": 0.7,
    "gold_win_rate_equal_length_wald_low": 0.6,
    "gold_win_rate_equal_length_wald_high": 0.8,
}
ROLLOUT = {
    "prompt": "<|user|>hi<|assistant|>",
    "response": f"ha{NASTY}",
    "score": 0.5,
    "pieces": ["ha", NASTY, ""],
    "log_ratio": [0.5, -0.25, 0.0],
    "reward": [-0.05, 0.025, 0.5],
    "advantage": [1.0, None, -2.0],
}
START = {
    "date": "2026-01-01T00:00:00+00:00",
    "command": f"rlhfjax run --workdir={NASTY}",
    "commit": "abcdef",
    "clean": True,
    "versions": {"jax": "0.10.2"},
    "hardware": {"devices": "8 x TPU v5e", "hosts": 2, "cores": 96, "system": "Linux"},
    "seeds": {"ppo": 3},
    "parameters": {},
}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_run(root):
    """The made-up recipe with few curves, and with all else that a present run has."""
    make_recipe(root)
    for name in ("02_sft", "04_reward"):
        (root / name / "metrics.jsonl").unlink()
    shutil.rmtree(root / "05_ppo")
    steps = [
        (s, {"entropy": 2.0, "val_kl": s, "val_gold": s / 9, "val_proxy": s / 5})
        for s in range(10, 101, 10)
    ]
    make_stage(root / "05_ppo", "ppo", 100, steps)
    folder = root / "06_evaluate"
    samples = [
        row | {"length_baseline": 5 + i % 7, "length_policy": 9 + i % 5}
        for i, row in enumerate(comparisons(np.random.default_rng(0), 16))
    ]
    models = {"policy": "stage:ppo", "baseline": "stage:sft"}
    models |= {"tax": {"pretrained": "stage:pretrain"}}
    shutil.rmtree(folder)
    metrics = EVALUATION | TAX | INTERVALS
    make_stage(folder, "evaluate", 0, [(0, metrics)], samples=samples)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | models))
    shown = [{"step": step, **ROLLOUT} for step in (1, 1, *range(10, 101, 10))]
    (root / "05_ppo" / SAMPLES_FILE).write_text(lines(*shown))
    parameters = START | {"parameters": {"policy": 1234567}}
    (root / "00_tokenizer" / "corpus.json").write_text(json.dumps(CORPUS))
    (root / provenance.FILE).write_text(lines(START, START | {"clean": False}))
    (root / "05_ppo" / provenance.FILE).write_text(lines(parameters))
    return root


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("parts") / "quickstart")


@pytest.fixture(scope="module")
def text(workdir):
    return write_report(workdir).read_text()


@pytest.fixture(scope="module")
def shown(text):
    return Page(text)


# ------------------------------------------------------------------ names, units, intervals


def test_models_have_their_names(shown, workdir):
    """In tables, figures' keys and samples, on the page and in the terminal."""
    assert "○ SFT \xa0 ★ final PPO, held-out prompts" in shown.text
    assert "SFT: 0.210 gold reward per response" in shown.text
    assert re.search(
        r"PPO · gold -?\d\.\d\d · proxy -?\d\.\d\d · \d+ tokens", shown.text
    )
    console = Console(file=io.StringIO(), width=200)
    console.print(summary_table(workdir))
    terminal = console.file.getvalue()
    assert re.search(r"SFT +PPO +unit +interval", terminal)
    assert re.search(
        r"Gold reward +0\.210 +0\.680 +gold reward per response +"
        r"BCa 95 %: SFT 0\.100 to 0\.300, PPO 0\.600 to 0\.750",
        terminal,
    )
    assert "baseline" not in terminal.replace("_baseline", "")
    assert re.search(r"pretrained +SFT +PPO +PPO - SFT +unit", terminal)


def run_of(folder, *stages):
    """A run that has not begun, of stages by name with their configs."""
    configs = dict(stages)
    recipe = {"stages": list(configs)} | configs
    (folder / "config.json").write_text(json.dumps(recipe))
    return read_run(folder)


SFT = ("sft", {"stage": "sft"})


@pytest.mark.parametrize(
    ("policy", "config", "expected"),
    [
        ("stage:rl", {"stage": "ppo"}, "PPO"),
        ("stage:rl/model", {"stage": "ppo"}, "PPO"),
        ("runs/x/01_rl", {"stage": "ppo"}, "PPO"),
        ("stage:rl", {"stage": "group", "estimator": "dr_grpo"}, "Dr. GRPO"),
        ("stage:rl", {"stage": "group", "estimator": "rloo"}, "RLOO"),
        ("stage:rl", {"stage": "reinforce_pp"}, "REINFORCE++"),
        ("stage:rl", {"stage": "direct", "loss": {"name": "ipo"}}, "IPO"),
        ("stage:rl", {"stage": "import_model"}, "rl"),
        ("stage:rl", {"stage": "of_no_package"}, "rl"),
        ("stage:rl", {"stage": "sft"}, "rl"),  # not SFT against SFT
        ("elsewhere/model", {"stage": "ppo"}, "policy"),
        (None, {"stage": "ppo"}, "policy"),
    ],
)
def test_a_policy_is_named_by_the_stage_that_made_it(
    policy, config, expected, tmp_path
):
    compared = {"stage": "evaluate", "policy": policy, "baseline": "stage:sft"}
    compared = ("evaluate", compared | {"tax": 3})
    run = run_of(tmp_path, SFT, ("rl", config), compared)
    found = names.of_models(run, run.stages[-1])
    assert found["policy"] == expected
    assert found["baseline"] == ("sft" if config["stage"] == "sft" else "SFT")


def test_every_row_has_a_unit_and_intervals_of_both_models(workdir):
    rows = {row.name: row for row in tables.headlines(read_run(workdir))}
    assert all(row.unit and row.hint for row in rows.values())
    assert rows["gold"].note == ("BCa 95 %: SFT 0.100 to 0.300, PPO 0.600 to 0.750")
    equal = rows["gold_win_rate_equal_length"]
    assert (equal.policy, equal.unit) == ("70.0 %", "of prompts")
    assert equal.note == "Wald 95 %: 60.0 % to 80.0 %"
    assert rows["distinct_2"].note == "81% of the SFT model's"
    assert not [name for name in rows if "loss" in name or "_bca" in name]


@pytest.mark.parametrize(
    ("metrics", "sentence", "cards"),
    [
        (
            {"gold_policy": 1.0, "gold_baseline": 0.0, "gold_win_rate": 1.0},
            "The gold reward is the labeler's own.",
            ["gold_win_rate", "gold"],
        ),
        (
            {"proxy_policy": 1.0, "proxy_baseline": 0.0, "proxy_win_rate": 1.0},
            "No gold reward was given",
            ["proxy_win_rate", "proxy"],
        ),
        (
            {"words_policy": 1.0, "words_baseline": 2.0},
            "so there is no win rate",
            [],
        ),
    ],
)
def test_it_says_which_reward_decides(tmp_path, metrics, sentence, cards):
    make_stage(tmp_path / "w", "evaluate", 0, [(0, metrics)])
    run = read_run(tmp_path / "w")
    assert sentence in tables.rewards_note(run)
    assert sentence in Page(write_report(tmp_path / "w").read_text()).text.replace(
        "\n", " "
    )
    assert [row.name for row in tables.cards(tables.headlines(run))] == cards


def test_the_alignment_tax_is_policy_minus_baseline(workdir, shown):
    chat, text = tables.tax_rows(read_run(workdir))
    assert chat.values == {"pretrained": "4", "baseline": "3.50", "policy": "3.75"}
    assert (chat.change, chat.unit) == ("+0.250", "nats per token")
    assert text.values == {"baseline": "4.50", "policy": "4.25"}
    assert text.change == "-0.250"
    assert "PPO − SFT" in shown.text


# ------------------------------------------------------------------ sections, hints, files


def test_the_table_of_contents_leads_to_every_section(text):
    (nav,) = re.findall(r"<nav>(.*?)</nav>", text)
    links = re.findall(r'<a href="#(\w+)">', nav)
    assert links == re.findall(r'<h2[^>]* id="(\w+)"', text)
    assert len(links) == len(page.SECTIONS)


def test_an_empty_run_has_the_sections_that_it_needs(tmp_path):
    (tmp_path / "config.json").write_text('{"stage": "sft", "steps": 10}')
    text = write_report(tmp_path).read_text()
    assert re.findall(r'<a href="#(\w+)">', text) == ["stages", "configuration"]


def test_metrics_are_explained_on_hover(text):
    hinted = re.findall(r'<span class="hint" title="([^"]*)">(.*?)</span>', text)
    found = {name: title for title, name in hinted}
    assert found["entropy"].startswith("Entropy of the policy")
    assert "Unit: nats per token. Bad: Falling" in found["entropy"]
    assert "Alignment" not in found
    assert found["Win rate by gold reward"].startswith("Prompts where")


def test_every_figure_comes_as_svg_and_csv(text, workdir):
    files = re.findall(r'<a download="([^"]+)" href="data:([^"]+)">', text)
    assert len(files) == 2 * text.count("<figure")
    links = dict(files)
    content = urllib.parse.unquote(links["pretrain_loss.csv"].partition(",")[2])
    rows = list(csv.DictReader(io.StringIO(content)))
    curve = read_run(workdir).stages[1].curves["loss"]
    assert [float(row["loss"]) for row in rows] == pytest.approx(curve[1], rel=1e-5)
    assert [int(row["step_loss"]) for row in rows] == curve[0]
    assert [row["val_loss"] for row in rows if row["val_loss"]][-1] == rows[5][
        "val_loss"
    ]
    svgs = [link for name, link in files if name.endswith(".svg")]
    for link in svgs:
        svg = base64.b64decode(link.partition(",")[2]).decode()
        assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in svg and "script" not in svg


def test_a_csv_file_has_gaps_where_there_is_no_number():
    columns = {"a,b": [1, 2.5, float("nan")], 'c"': [0.1 + 0.2]}
    assert csv_text(columns) == '"a,b","c"""\n1,0.3\n2.5,\n,\n'


def test_names_of_files_are_plain():
    named = drawing('../<a> "b"/\udce9', "<svg ></svg>", {"x\udce9": [1]})
    assert re.fullmatch(r"[\w.-]+", named.file)
    assert "%5Cudce9" in named.csv_link
    assert len(drawing("x" * 999, "", {}).file) < 100


# ------------------------------------------------------------------ figures


def test_reward_and_length_have_their_correlation(shown):
    captions = [one.strip() for one in shown.captions if "correlation" in one]
    assert len(captions) == 2
    number = r"-?\d\.\d\d"
    model = rf"{number} \(95 %: {number} to {number}\)"
    pattern = rf"correlation of length and gold reward: SFT {model}, PPO {model}"
    assert re.fullmatch(pattern, captions[0])


def test_gold_and_proxy_share_a_figure_over_steps(workdir):
    ((stage, figure),) = page.over_steps(read_run(workdir))
    assert stage == "ppo"
    assert list(figure.columns) == ["step_proxy", "proxy", "step_gold", "gold"]
    assert figure.columns["step_gold"] == list(range(10, 101, 10))
    assert {"proxy reward", "gold reward"} <= set(
        re.findall(r">([a-z ]+)</text>", figure.svg)
    )


# ------------------------------------------------------------------ samples over training


def test_some_steps_are_shown_with_the_first_and_the_last(workdir):
    found = rollouts(read_run(workdir).stages[5])
    assert found is not None
    assert list(found.steps) == [1, 20, 40, 60, 80, 100]
    assert len(found.steps[1]) == 2
    assert list(found.colors) == [
        "log_ratio",
        "advantage",
        "reward",
    ]  # no value function


def test_a_color_is_a_number_relative_to_the_largest(workdir):
    found = rollouts(read_run(workdir).stages[5])
    assert found is not None
    first, second, last = found.steps[100][0].tokens
    # In the order log-ratio, advantage, reward; the largest are 0.5, 2 and 0.5.
    assert first.style == "--l:100;--a:50;--r:-10"
    assert second.style == "--l:-50;--r:5"
    assert last.style == "--l:0;--a:-100;--r:100"
    assert last.text == "∅"
    assert "share of the reward 0.500" in last.hint


def test_tokens_are_shown_and_never_run(text, shown):
    assert "<script" not in text
    assert shown.text.count(f"ha{NASTY}") >= 7
    options = re.findall(r'<option value="(\w+)">', text)
    assert options == ["none", "log_ratio", "advantage", "reward"]
    assert 'class="t" style="--l:100;--a:50;--r:-10"' in text


def test_a_damaged_line_is_named(tmp_path):
    make_stage(tmp_path / "w", "ppo", 1, [(1, {"loss": 1.0})])
    damaged = ROLLOUT | {"step": 1, "pieces": "x"}
    (tmp_path / "w" / SAMPLES_FILE).write_text(lines(damaged))
    with pytest.raises(DataError, match=rf"{SAMPLES_FILE}:1: .*pieces"):
        write_report(tmp_path / "w")


# ------------------------------------------------------------------ provenance


def test_provenance_is_shown(workdir, shown):
    rows = dict(origin.rows(read_run(workdir)))
    assert rows == {
        "Command": START["command"],
        "Commit": "abcdef (clean); abcdef (with uncommitted changes)",
        "Date": "2026-01-01T00:00:00+00:00, 2 starts",
        "Hardware": "8 x TPU v5e, 2 hosts, 96 cores, Linux",
        "Versions": "jax 0.10.2",
        "Seeds": "ppo 3",
        "Parameters, ppo": "policy 1,234,567",
    }
    for text in rows.values():
        assert text in shown.text


def test_a_stage_alone_has_its_own_and_an_old_workdir_none(tmp_path):
    make_stage(tmp_path / "w", "sft", 1, [(1, {"loss": 1.0})])
    assert origin.rows(read_run(tmp_path / "w")) == []
    assert "Provenance" not in write_report(tmp_path / "w").read_text()
    start = START | {"commit": None, "clean": None, "parameters": {"model": 5}}
    (tmp_path / "w" / provenance.FILE).write_text(lines(start))
    rows = dict(origin.rows(read_run(tmp_path / "w")))
    assert rows["Commit"].startswith("unknown")
    assert rows["Seeds"] == "ppo 3"
    assert rows["Parameters, sft"] == "model 5"


def test_a_damaged_provenance_is_named(tmp_path):
    make_stage(tmp_path / "w", "sft", 1, [(1, {"loss": 1.0})])
    (tmp_path / "w" / provenance.FILE).write_text('{"seeds": 3}\n')
    with pytest.raises(DataError, match=rf"{provenance.FILE}:1: .*seeds"):
        write_report(tmp_path / "w")


def test_a_sweep_has_provenance_meanings_and_files():
    """Of all its runs; metrics of a recipe are called STAGE/NAME."""
    results = [
        sweep.Result(
            name=f"r{i}",
            setting={"rl.kl.coefficient": float(i)},
            seeds={},
            status="done",
            metrics={"rl/val_kl": float(i), "rl/entropy": 1.0},
            starts=[START | {"commit": commit}],
            kinds={"rl": "ppo"},
        )
        for i, commit in enumerate(("abc", "abc", "def"))
    ]
    text = sweep.render("s", results, ["rl/val_kl", "rl/entropy"])
    shown = Page(text)
    assert "abc (clean); def (clean)" in shown.text
    assert "3 starts" in shown.text
    assert 'title="Held-out. KL of the policy to the reference' in text
    assert shown.text.count("nats per response") == 1
    assert text.count('download="rl_val_kl.csv"') == 1
    assert re.findall(r'<a href="#(\w+)">', text) == re.findall(r'<h2 id="(\w+)"', text)
