"""Texts of a run can neither add elements and attributes to a page, nor color a terminal."""

import html.parser
import io
import json
import logging
import math

import pytest
import rich.console

from rlhfjax.redact import printable
from rlhfjax.report import summary_table, sweep, write_report
from rlhfjax.report.page import render
from rlhfjax.report.workdir import read_run
from tests.report.made_up_run import make_stage

HOSTILE = [
    "<script>alert(1)</script>",
    "</script></style></svg></title><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;&#60;<!-- ]]>",
    "$x^2$ ${ \\frac{ $",
    "_^%\\{}$$",
    "[red]x[/] [/] [link=http://x]y",
    "\x1b[31mred\x1b]0;title\x07",
    "a\u2028b\u202e\0\x0b",
    "日本語 🙂",
    "x" * 10_000,
]


SAFE = [f"name{i}" for i in range(len(HOSTILE))]


class Structure(html.parser.HTMLParser):
    """The elements and attributes of a page, without figures' coordinates, and its texts."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        links = [
            v.partition(",")[0] if v.startswith("data:") else v
            for k, v in attrs
            if k in ("href", "src") and not v.startswith("#")
        ]
        if tag not in ("path", "use", "defs", "g", "text", "clippath", "rect", "svg"):
            self.elements.append((tag, names, links))
        assert not [name for name in names if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def write(folder, texts):
    """A run whose metrics, samples and config have these texts."""
    lines = [(step, {texts[i]: 1.0 / step for i in (0, 6)}) for step in (1, 2)]
    samples = [
        {"prompt": text, text: text, "gold": 0.5, "deep": {text: [text]}}
        for text in texts[:8]
    ]
    stage = folder / "00_stage"
    make_stage(stage, "sft", 3, lines, samples=samples)
    config = json.loads((stage / "config.json").read_text())
    config |= dict.fromkeys(texts, texts)
    (stage / "config.json").write_text(json.dumps(config))
    config = {"stages": ["stage"], "stage": config}
    (folder / "config.json").write_text(json.dumps(config))
    return read_run(folder)


def test_a_report_has_the_elements_of_a_harmless_one(tmp_path):
    safe = Structure(render(write(tmp_path / "safe", SAFE)))
    for texts in (HOSTILE, HOSTILE[::-1]):
        page = Structure(render(write(tmp_path / texts[0][-3:].strip("/"), texts)))
        assert page.elements == safe.elements
        assert "name0" in safe.text and HOSTILE[4] in page.text


def results(texts):
    metric, *options = texts
    return [
        sweep.Result(
            name=f"run{i}",
            setting={options[0]: options[i], options[i + 1]: i},
            seeds={"seed": 0},
            status="done",
            metrics={metric: float(i)},
            telling=(metric,),
            page="run/report.html",
        )
        for i in range(len(options) - 1)
    ]


def test_a_sweep_page_has_the_elements_of_a_harmless_one(recwarn):
    safe = Structure(sweep.render("name", results(SAFE), SAFE[:1]))
    for texts in (HOSTILE, HOSTILE[::-1]):
        page = Structure(sweep.render(texts[0], results(texts), texts[:1]))
        assert page.elements == safe.elements
    assert not recwarn.list


@pytest.mark.parametrize("text", [HOSTILE[6], HOSTILE[9], HOSTILE[12]], ids="abc")
def test_an_axis_may_have_any_name(text):
    """The option's name stands at the axis."""
    swept = [
        sweep.Result(f"r{x}", {text: x}, {}, "done", {"kl": math.sqrt(x)})
        for x in (1, 2, 30)
    ]
    assert "<svg" in sweep.render("s", swept, ["kl"])


def test_the_terminal_shows_texts_and_obeys_none(tmp_path):
    for i, text in enumerate(HOSTILE):
        make_stage(tmp_path / str(i), "sft", 1, [(1, {f"a{text}": 1})])
        out = io.StringIO()
        console = rich.console.Console(file=out, width=20_000)
        console.print(summary_table(tmp_path / str(i)))
        shown = out.getvalue()
        assert not {"\x1b", "\x07", "\0", "\u2028", "\u202e"} & set(shown)
        assert printable(text.rpartition("/")[2]) in shown


def test_a_name_that_is_not_unicode_has_a_page(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL, "rlhfjax")  # xdist cannot send the name in a log
    folder = tmp_path / "caf\udce9"  # a byte of Latin-1, as Python shows it
    make_stage(folder, "sft", 1, [(1, {"loss": 1})])
    assert write_report(folder).read_bytes().decode()
