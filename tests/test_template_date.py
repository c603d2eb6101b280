"""The date that a chat template writes is that of the workdir's first start, until its end."""

import datetime
import types

import pytest

from rlhfjax import json_text, provenance, recipe, stages, template_date
from rlhfjax.errors import DataError
from tests.data.test_templates import CUE, TURN, make
from tests.test_recipe import two

DATED = (
    "{{ '<|im_start|>system\\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>' }}"
    "{% for m in messages %}" + TURN + "{% endfor %}" + CUE
)
MESSAGES = [{"role": "user", "content": "who sat?"}]


@pytest.fixture
def day(monkeypatch):
    """Sets the day of this machine's clock."""

    def set_day(number: int) -> None:
        now = datetime.datetime(2026, 3, number, 23, 59, 58, 765)
        clock = types.SimpleNamespace(now=lambda: now)
        monkeypatch.setattr(
            template_date, "datetime", types.SimpleNamespace(datetime=clock)
        )

    return set_day


def written() -> str:
    """Returns what a tokenizer that is made now writes before a conversation."""
    text = make("chatml", DATED).template.text(MESSAGES)
    return text.removeprefix("<|im_start|>system\nToday: ").partition("<")[0]


def test_a_resumed_recipe_and_its_stages_keep_the_date_and_a_chat_has_todays(
    tmp_path, monkeypatch, day
):
    texts, stop = [], [True]

    def run(config, workdir, layout):
        texts.append((workdir.name, written()))
        if workdir.name == "01_b" and stop[0]:
            raise DataError("stopped")
        return {}

    monkeypatch.setattr(stages.find("tokenizer"), "run", run)
    day(1)
    with pytest.raises(DataError, match="stopped"):
        recipe.run(two(), tmp_path)
    day(2)
    with pytest.raises(DataError, match="stopped"):
        recipe.run(two(), tmp_path)
    stop[0] = False
    day(3)
    recipe.run(two()["b"], tmp_path / "01_b")  # the stage without its recipe
    assert texts == [("00_a", "01 Mar 2026"), *[("01_b", "01 Mar 2026")] * 3]
    assert written() == "03 Mar 2026"
    recipe.run(two(), tmp_path / "new")
    assert texts[-1] == ("01_b", "03 Mar 2026")
    last = provenance.read(tmp_path)[-1]
    assert last["template_date"] == "2026-03-02T23:59:58"


def test_a_workdir_of_an_older_version_has_the_date_of_its_first_start(tmp_path, day):
    day(9)
    assert provenance.first_template_date(tmp_path) == template_date.now()
    file = tmp_path / provenance.FILE
    starts = ["2025-01-02T03:04:05+00:00", "2025-01-03T03:04:05+00:00"]
    rows = [json_text.encode({"date": date}, file) + "\n" for date in starts]
    file.write_text("".join(rows))
    expected = datetime.datetime.fromisoformat(starts[0]).astimezone()
    assert provenance.first_template_date(tmp_path) == expected.replace(tzinfo=None)
    file.write_text('{"template_date": "tomorrow"}\n')
    with pytest.raises(DataError, match=r"provenance\.jsonl:1: 'tomorrow' is no date"):
        provenance.first_template_date(tmp_path)


def test_what_a_template_writes_is_recorded_with_its_form():
    with template_date.pinned(datetime.datetime(2026, 3, 1)):
        with template_date.recorded() as dates:
            assert written() == "01 Mar 2026"
        assert dates == {"%d %b %Y": "01 Mar 2026"}
        assert template_date.is_now(dates)
        with template_date.recorded() as none:
            make("chatml", DATED.replace("strftime_now('%d %b %Y')", "'x'"))
        assert none == {}
    with template_date.pinned(datetime.datetime(2026, 3, 2)):
        assert not template_date.is_now(dates)
        assert template_date.is_now({"%B": "March"})
