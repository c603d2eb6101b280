"""The report is whole for any run, finished or not, and nothing that a model said gets out of its
box.
"""

import html.parser
import io
import json
import re

import numpy as np
import pytest
from made_up_run import EVALUATION, NASTY, make_recipe, make_stage
from matplotlib.figure import Figure
from rich.console import Console

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.report import figures, page, summary_table, tables, write_report
from rlhfjax.report.workdir import read_run
from tests.test_json_text import strict

BOTH = {"gold_baseline": 0.25, "gold_policy": 0.5}  # what makes metrics a comparison
VOID = {"meta", "br", "img", "hr", "input", "link"}


class Page(html.parser.HTMLParser):
    """Parses a page, fails on tags that do not match, and collects what a test asks for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.captions, self.text = [], [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href", "action", "data")
        ]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "figcaption":
            self.captions.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [
            value for name, value in attrs if name in ("src", "href", "xlink:href")
        ]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if "figcaption" in self.open:
            self.captions[-1] += data

    def names(self):
        return [caption.split()[0] for caption in self.captions]


def read(workdir):
    return Page(write_report(workdir).read_text())


@pytest.fixture(scope="module")
def recipe_workdir(tmp_path_factory):
    return make_recipe(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def text(recipe_workdir):
    """The page as it was written first."""
    return write_report(recipe_workdir).read_text()


@pytest.fixture(scope="module")
def whole(text):
    return Page(text)


def test_the_page_holds_everything_itself(text, whole, recipe_workdir):
    kinds = {link.partition(",")[0] for link in whole.links if link[0] != "#"}
    assert kinds == {"data:image/svg+xml;base64", "data:text/csv;charset=utf-8"}
    assert not {"script", "link", "iframe", "img"} & set(whole.tags)
    assert not re.search(r"url\((?!#)|@import", text)
    assert sorted(p.name for p in recipe_workdir.iterdir() if p.is_file()) == [
        "config.json",
        "report.html",
    ]


def test_generated_text_is_shown_as_it_is_and_never_run(whole, recipe_workdir):
    assert "<script" not in (recipe_workdir / "report.html").read_text()
    assert (
        whole.text.count(NASTY) >= 4
    )  # as a prompt and as an answer, and in the examples of collect


def test_the_headline_has_the_figures_of_evaluate(whole):
    interval = "Wilson 95 %: 78.1 % to 87.2 %"
    for shown in (
        "83.1 %",
        interval,
        "0.680",
        "0.210",
        "8.70",
        "81% of the baseline's",
    ):
        assert shown in whole.text


def test_every_curve_has_a_panel_and_training_and_held_out_share_one(
    whole, recipe_workdir
):
    expected = []
    for stage in read_run(recipe_workdir).stages:
        curves = [name for name, (steps, _) in stage.curves.items() if len(steps) > 1]
        expected += {name.removeprefix("val_") for name in curves}
    names = whole.names()
    for name in set(expected):
        assert names.count(name) == expected.count(name), name
    assert "loss 4.23 4.33" in [caption.strip() for caption in whole.captions]


def test_figures_take_their_colors_from_the_page_alone(text):
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(svgs) > 25
    for svg in svgs:
        assert not re.search(r"#[0-9a-f]{6}", svg)
        used = set(re.findall(r"var\((--\w+)\)", svg))
        assert (
            {"--muted", "--line"}
            <= used
            <= {"--ink", "--muted", "--line", "--card", "--first", "--second"}
        )


def test_the_same_run_gives_the_same_bytes(text, recipe_workdir):
    assert write_report(recipe_workdir).read_text() == text


def test_an_unfinished_run_says_so_and_shows_what_there_is(tmp_path):
    workdir = make_recipe(tmp_path / "half")
    for name in ("04_reward", "05_ppo", "06_evaluate"):
        for file in (workdir / name).glob("*.json*"):
            file.unlink()
        for file in (workdir / name / "tb").iterdir():
            file.unlink()
        (workdir / name / "tb").rmdir()
        (workdir / name).rmdir()
    (workdir / "02_sft" / "done.json").unlink()
    with (workdir / "02_sft" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 121, "sft/lo')
    got = read(workdir)
    assert "unfinished: results so far" in got.text
    assert "120 of 120" in got.text
    assert got.text.count("waiting") == 3
    assert "Reward and KL" not in got.text
    assert "Result" not in got.text


def test_a_single_stage_is_a_run(tmp_path):
    lines = [(step, {"loss": 1 / step}) for step in range(1, 4)]
    make_stage(
        tmp_path / "w", "sft", 3, lines, samples=[{"prompt": "hi", "text": NASTY}]
    )
    got = read(tmp_path / "w")
    assert got.names() == ["loss"]
    assert NASTY in got.text
    assert "1 stage " in got.text


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    (tmp_path / "config.json").write_text('{"stage": "sft", "steps": 10}')
    assert "0 of 10" in read(tmp_path).text


def test_values_that_are_not_finite_leave_gaps(tmp_path):
    lines = [
        (1, {"loss": 1.0, "bad": np.nan}),
        (2, {"loss": np.nan, "bad": np.inf}),
        (3, {"loss": 2.0, "bad": np.nan}),
    ]
    make_stage(tmp_path / "w", "sft", 3, lines, done=False)
    assert [caption.split() for caption in read(tmp_path / "w").captions] == [
        ["loss", "2"],
        ["bad", "n/a"],
    ]


def test_pitfall_35_the_frontier_leaves_out_what_is_null(tmp_path):
    measured = {1: (1.0, 0.5), 2: (np.nan, 0.6), 3: (3.0, 0.7), 4: (4.0, np.nan)}
    lines = [
        (step, {"val_kl": kl, "val_gold": gold})
        for step, (kl, gold) in measured.items()
    ]
    make_stage(tmp_path / "w", "ppo", 4, lines)
    run = read_run(tmp_path / "w")
    assert page._path(run.stages[0], "gold") == {"kl": [1.0, 3.0], "gold": [0.5, 0.7]}
    assert len(page.frontiers(run)) == 1


def test_pitfall_35_what_the_page_shows_as_json_is_json():
    shown = page.environment().filters["json"](
        {"rate": float("nan"), "at": [1.5, float("inf")]}
    )
    assert strict(shown) == {"rate": None, "at": [1.5, None]}


def test_iterated_ppo_draws_both_stages_on_one_frontier(tmp_path):
    (tmp_path / "config.json").write_text('{"stages": ["a", "b"], "a": {}, "b": {}}')
    for i, name in enumerate("ab"):
        make_stage(
            tmp_path / f"0{i}_{name}",
            "ppo",
            2,
            [(s, {"val_kl": s, "val_gold": s}) for s in (1, 2)],
        )
    run = read_run(tmp_path)
    assert [page._path(stage, "gold") for stage in run.stages] == [
        {"kl": [1.0, 2.0], "gold": [1.0, 2.0]}
    ] * 2
    (gold,) = page.frontiers(run)
    assert "var(--second)" in gold.svg
    assert "● validations of a \xa0 ● validations of b" in read(tmp_path).text


def make_stages(root, kinds, lines):
    """Writes a recipe: for each of some stages by name its kind, and the lines of its metrics."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps({"stages": list(kinds)}))
    for i, (name, kind) in enumerate(kinds.items()):
        make_stage(root / f"{i:02d}_{name}", kind, 2, lines[name])
    return root


@pytest.fixture
def drawn(monkeypatch):
    """Returns a function of a workdir: the curves of each frontier as (color, marker, dashed, KLs,
    rewards)."""
    made = []
    monkeypatch.setattr(figures, "render", lambda figure: made.append(figure) or "")

    def of(workdir):
        made.clear()
        page.frontiers(read_run(workdir))
        lines = [
            figure.axes[0].lines for figure in made
        ]  # without a marker: a KL of best-of-n
        return [
            [curve(one) for one in some if one.get_marker() != "None"] for some in lines
        ]

    def curve(line):
        dashed = line.get_linestyle() == "--"
        values = (list(line.get_xdata()), list(line.get_ydata()))
        return line.get_color(), line.get_marker(), dashed, *values

    return of


VALIDATIONS = [
    (s, {"val_kl": s / 2, "val_proxy": 1.5 * s, "val_gold": 1 - s / 8}) for s in (1, 2)
]


@pytest.mark.parametrize("kind", ["ppo", "group", "of_another_package"])
def test_every_policy_stage_has_its_curve(tmp_path, drawn, kind):
    """Whatever its name. A stage without KL or reward of held-out responses has none."""
    others = {
        "sft": [(1, {"val_loss": 2.0})],
        "other": [(1, {"val_kl": 1.0, "kl": 1.0, "reward": 2.0})],
    }
    kinds = {"sft": "sft", "other": "direct", "mine": kind}
    workdir = make_stages(tmp_path / "w", kinds, others | {"mine": VALIDATIONS})
    proxy = (figures.FIRST, "o", False, [0.5, 1.0], [1.5, 3.0])
    gold = (figures.FIRST, "o", False, [0.5, 1.0], [0.875, 0.75])
    assert drawn(workdir) == [[proxy], [gold]]
    key = read(workdir).text
    assert "● validations of mine" in key
    assert "best-of-n sampling \xa0" not in key
    assert "final policy" not in key


def test_a_stage_has_one_mark_in_both_figures_and_in_the_key(tmp_path, drawn):
    """Also where one before it has no gold reward; the marks of the first eight stages differ."""
    names = [f"s{i}" for i in range(9)]
    lines = dict.fromkeys(names, VALIDATIONS) | {
        "s0": [(1, {"val_kl": 1.0, "val_proxy": 2.0})]
    }
    workdir = make_stages(tmp_path / "w", dict.fromkeys(names, "group"), lines)
    proxy, gold = drawn(workdir)
    marks = [curve[:2] for curve in proxy]
    assert len(set(marks)) == 8
    assert marks[8] == marks[0]
    assert [curve[:2] for curve in gold] == marks[1:]
    key = read(workdir).text
    for character, name in zip("●●▲▲◆◆▼▼●", names, strict=True):
        assert f"{character} validations of {name} " in key


def test_best_of_n_is_known_by_the_kl_in_its_pool(tmp_path, drawn):
    """Not the KL and reward that a stage logs while it trains."""
    pool = [(n, {"kl": np.log(n), "kl_pool": 0.1, "proxy": 0.5 * n}) for n in (1, 2)]
    trained = [(s, {"kl": 9.0, "proxy": 9.0}) for s in (1, 2)]
    kinds = {"a": "best_of_n", "b": "mine", "c": "mine"}
    workdir = make_stages(tmp_path / "w", kinds, {"a": pool, "b": pool, "c": trained})
    one = (figures.MUTED, "s", True, [0.0, np.log(2)], [0.5, 1.0])
    assert drawn(workdir) == [[one, one]]
    assert "best-of-n sampling: a, b" in read(workdir).text


@pytest.mark.parametrize(
    ("least", "left", "first"), [(-0.5, -0.575, 0.05), (0.1, -0.0023, 0.02)]
)
def test_a_sampled_kl_below_0_is_on_the_axis(least, left, first):
    """1.15 times the least KL; without one below 0, 0.002 of the right end, here 1.15.

    The first tick has a tenth of the axis before it: with sqrt(0.575 / 1.15) = 0.71 to the left of
    0, sqrt(0.02 / 1.15) = 0.13 is too little.
    """
    axes = Figure().subplots()
    axes.plot([least, 1.0], [0.0, 1.0])
    figures._kl_axis(axes)
    assert axes.get_xlim() == pytest.approx((left, 1.15))
    assert list(axes.get_xticks()[:2]) == [0, first]


def test_the_last_comparison_ends_the_frontier_and_is_the_headline(tmp_path, drawn):
    """A comparison has metrics of a policy and of a baseline, whatever the stage is called."""
    first = {"kl": 1.0, "gold_baseline": 0.1, "gold_policy": 0.2}
    first |= {"proxy_baseline": 3.0, "proxy_policy": 4.0}
    last = {"kl": 2.5, "gold_baseline": 0.5, "gold_policy": 0.75}
    alone = {"reward_policy": 1.0, "other_baseline": 2.0}
    kinds = {"a": "evaluate", "b": "mine", "c": "sft"}
    lines = {"a": [(0, first)], "b": [(0, last)], "c": [(0, alone)]}
    workdir = make_stages(tmp_path / "w", kinds, lines)
    ((baseline, policy),) = drawn(workdir)
    assert baseline[3:] == ([0.0], [0.5])
    assert policy[3:] == ([2.5], [0.75])
    rows = {
        row.name: (row.baseline, row.policy)
        for row in tables.headlines(read_run(workdir))
    }
    assert rows == {"gold": ("0.500", "0.750"), "kl": ("", "2.50")}
    assert "★ final policy" in read(workdir).text


def test_the_frontier_pairs_reward_and_kl_of_one_step(tmp_path):
    lines = [
        (1, {"val_kl": 1.0}),
        (2, {"val_kl": 2.0, "val_gold": 0.2}),
        (4, {"val_gold": 9.0}),
    ]
    make_stage(tmp_path / "w", "ppo", 4, [*lines, (4, {"val_kl": 4.0})])
    (stage,) = read_run(tmp_path / "w").stages
    assert page._path(stage, "gold") == {"kl": [2.0, 4.0], "gold": [0.2, 9.0]}
    assert page._path(stage, "proxy") == {}


def test_a_missing_or_foreign_folder_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist$"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"neither config\.json nor metrics\.jsonl"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named_and_the_report_before_it_stays(tmp_path):
    make_stage(tmp_path / "w", "sft", 1, [(1, {"loss": 1.0})])
    before = write_report(tmp_path / "w").read_bytes()
    (tmp_path / "w" / "done.json").write_text("{")
    with pytest.raises(DataError, match=r"done\.json: not JSON: .*; restore it from"):
        write_report(tmp_path / "w")
    assert (tmp_path / "w" / "report.html").read_bytes() == before


def test_a_report_that_cannot_be_finished_leaves_the_one_before(tmp_path, monkeypatch):
    make_stage(tmp_path / "w", "sft", 1, [(1, {"loss": 1.0})])
    before = write_report(tmp_path / "w").read_bytes()
    monkeypatch.setattr(
        page, "render", lambda run: "half \ud800"
    )  # not encodable: the write itself fails
    with pytest.raises(UnicodeEncodeError):
        write_report(tmp_path / "w")
    assert (tmp_path / "w" / "report.html").read_bytes() == before


def test_the_terminal_has_the_same_tables(recipe_workdir):
    console = Console(file=io.StringIO(), width=160)
    console.print(summary_table(recipe_workdir))
    text = console.file.getvalue()
    for row in tables.headlines(read_run(recipe_workdir)):
        assert row.label in text
        assert row.policy in text
    assert re.search(r"ppo +done +100 +5m01s +41\.3 samples/s +val_gold 0\.700", text)


def test_the_terminal_takes_names_for_text_not_markup(tmp_path):
    make_stage(tmp_path / "w", "[bold]sft", 1, [(1, {"loss": 1.0})])
    console = Console(file=io.StringIO(), width=100)
    console.print(summary_table(tmp_path / "w"))
    assert "[bold]sft" in console.file.getvalue()


def test_headlines_pair_columns_and_fold_intervals(tmp_path):
    make_stage(tmp_path / "w", "evaluate", 0, [(0, EVALUATION)])
    rows = tables.headlines(read_run(tmp_path / "w"))
    assert [row.name for row in rows] == [
        "gold_win_rate",
        "gold",
        "proxy",
        "kl",
        "distinct_2",
        "words",
        "prompts",
    ]
    assert (rows[1].baseline, rows[1].policy) == ("0.210", "0.680")
    assert (rows[3].baseline, rows[3].policy, rows[3].note) == ("", "8.70", "")


def test_a_share_of_prompts_is_a_percentage_with_a_name(tmp_path):
    make_stage(tmp_path / "w", "evaluate", 0, [(0, BOTH | {"prompts_cut": 0.784})])
    gold, row = tables.headlines(read_run(tmp_path / "w"))
    assert (gold.baseline, gold.policy) == ("0.250", "0.500")
    assert (row.label, row.policy) == ("Prompts cut to the maximum length", "78.4 %")


NAMED = [
    ("_wilson", "Wilson"),
    ("_bca", "BCa"),
    ("_t", "Student's t"),
    ("", "percentile bootstrap"),
]


@pytest.mark.parametrize(("ends", "name"), NAMED)
def test_pitfall_36_an_interval_is_named(tmp_path, ends, name):
    """By its ends in the metrics; ends that say nothing are of a percentile bootstrap."""
    rate = "gold_win_rate"
    metrics = {rate: 0.83, f"{rate}{ends}_low": 0.79, f"{rate}{ends}_high": 0.872}
    make_stage(tmp_path / "w", "evaluate", 0, [(0, BOTH | metrics)])
    row, _ = tables.headlines(read_run(tmp_path / "w"))
    assert (row.policy, row.note) == ("83.0 %", f"{name} 95 %: 79.0 % to 87.2 %")
    assert row.note in read(tmp_path / "w").text


@pytest.mark.parametrize(
    ("x", "text"),
    [(0, "0"), (4096.0, "4,096"), (0.5, "0.500"), (4.3264, "4.33"), (-12.345, "-12.3"), (12345.6,
     "12,346"),
     (733.4, "733"), (99.96, "100"), (99.94, "99.9"), (999.7, "1,000"),
     (0.0374, "0.037"), (0.0037, "0.0037"), (3e-5, "3.0e-05"), (2e12, "2.0e+12"), (float("nan"),
      "n/a"),
     (float("inf"), "inf")],
)  # fmt: skip
def test_numbers_for_people(x, text):
    assert tables.number(x) == text
    assert tables.number(0.8314, percent=True) == "83.1 %"


def test_a_prompt_is_shown_turn_by_turn():
    prompt = "<|system|>Be kind.<|user|> hi\n<|assistant|>hello<|end|><|user|>a <| b<|assistant|>"
    assert page.turns(prompt) == [
        ("system", "Be kind."),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "a <| b"),
    ]
    assert page.turns("no markers") == [("", "no markers")]
    assert page.turns("") == []


def test_smoothing_keeps_straight_lines_and_averages_neighbors():
    line = np.linspace(3, -1, 200)
    np.testing.assert_allclose(
        figures.smooth(line), line, atol=1e-12
    )  # no lag, unlike an exponential average
    spike = np.zeros(80)  # windows of 80 // 40 = 2 to each side
    spike[40] = 1.0
    assert figures.smooth(spike)[37:44].tolist() == pytest.approx(
        [0, 0.2, 0.2, 0.2, 0.2, 0.2, 0]
    )


def test_ticks_keep_their_distance_on_the_square_root_axis():
    # On an axis to 4, KL 1 stands at sqrt(1/4) = 0.5, KL 2 at 0.71, KL 5 is off it.
    assert figures._apart([1, 2, 5], 4.0, 0.3) == [1]
    assert figures._apart([1, 2, 5], 4.0, 0.2) == [1, 2]


def test_where_the_time_went(whole, recipe_workdir):
    """Goodput, and the start as the sum of imports, building and restoring.

    Stages without a clock have no row.
    """
    assert "Where the time went" in whole.text
    times = {
        stage.name: tables.goodput_row(stage)
        for stage in read_run(recipe_workdir).stages
        if stage.goodput
    }
    assert set(times) == {"pretrain", "sft", "reward", "ppo"}
    row = times["pretrain"]
    assert (row["goodput"], row["step"], row["start"], row["starts"]) == (
        "75.0 %",
        "27s",
        "3s",
        "2",
    )
