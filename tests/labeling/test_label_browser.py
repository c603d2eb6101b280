"""Every task done in Chromium, by mouse and by keyboard alone; hostile text stays text."""

import os

import pytest

from rlhfjax.labeling import queue
from rlhfjax.labeling.app import MOST_BYTES, Collection, application
from rlhfjax.labeling.store import Item
from rlhfjax.web.guard import guarded
from rlhfjax.web.server import Server
from tests.labeling.label_world import HOSTILE, new_store

CHROMIUM = "/usr/bin/chromium"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists(CHROMIUM), reason="needs Debian's Chromium"),
]
THREE = ["first response", "second response", HOSTILE]
ITEMS = {
    "rank": Item("rank", {"prompt": HOSTILE, "responses": THREE}),
    "compare": Item("compare", {"prompt": HOSTILE, "responses": THREE[:2]}),
    "edit": Item("edit", {"prompt": HOSTILE, "response": "bad"}),
    "demonstrate": Item("demonstrate", {"prompt": HOSTILE}),
    "both": Item("demonstrate", {"both_sides": True}),
    "feedback": Item(
        "feedback",
        {
            "prompt": "p",
            "response": "one two",
            "pieces": ["one", " two", ""],
            "seconds_per_token": 0.1,
        },
    ),
}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Returns a function that opens the page with one item; errors of the page fail the test."""
    contexts, servers, errors = [], [], []

    def open_page(name, width=900):
        store = new_store(tmp_path, "ann")
        store.add([ITEMS[name]])
        app = guarded(
            application(Collection(store, queue.Rules())),
            host="127.0.0.1",
            most_bytes=MOST_BYTES,
        )
        server = Server(app, "127.0.0.1", 0, grace=1)
        server.start()
        servers.append(server)
        context = browser.new_context(viewport={"width": width, "height": 800})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{server.url}/{store.people()[0].token}/")
        page.wait_for_selector("#work > *")
        return store, page

    yield open_page
    for context in contexts:
        context.close()
    for server in servers:
        server.stop()
    assert errors == []


def finished_label(store, page):
    """Returns the label, once the page says that all is done."""
    page.wait_for_selector("h1:has-text('All done')")
    (kept,) = store.labels()
    return kept


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


def of_shown(kept, column):
    """Returns a column of a label in the order of the page."""
    return [kept.value[column][i] for i in kept.shown["order"]]


@pytest.mark.parametrize("width", [390, 900, 1400])
def test_hostile_texts_stay_text_and_nothing_overflows(opened, width):
    _, page = opened("rank", width)
    assert page.title() == "Labeling"
    assert page.locator("#main img, #main script, #main style").count() == 0
    texts = page.locator("article .text").all_text_contents()
    assert sorted(texts) == sorted(THREE)
    assert page.locator("#conversation .text").text_content() == HOSTILE
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_rank_by_mouse_with_drag_rating_and_flag(opened):
    store, page = opened("rank")
    for i, lane in enumerate((2, 1, 1)):
        page.locator(".tile").filter(has_text="ABC"[i]).drag_to(
            page.locator(f".lane[data-rank='{lane}']")
        )
    card = page.locator("article").nth(0)
    card.get_by_label("Response A: quality 6").check(force=True)
    card.locator("summary").click()
    card.get_by_label("Gives harmful advice").check()
    page.click("#submit")
    kept = finished_label(store, page)
    assert of_shown(kept, "ranks") == [2, 1, 1]
    assert of_shown(kept, "ratings") == [6, None, None]
    assert of_shown(kept, "flags") == [["harmful"], [], []]
    assert 0 < kept.seconds < 60


def test_rank_by_keyboard_then_undo_and_again(opened):
    store, page = opened("rank")
    press(page, "2", "Tab", "ArrowRight")  # rank 2; the quality's second choice
    for name, rank in (("B", "1"), ("C", "3")):
        page.locator(f".tile:has-text('{name}')").focus()
        press(page, rank)
    press(page, "Control+Enter")
    page.wait_for_selector("h1:has-text('All done')")
    press(page, "u")
    page.wait_for_selector("#work > *")
    assert page.locator("input[name='rank-0']:checked").input_value() == "2"
    press(page, "3", "Control+Enter")
    kept = finished_label(store, page)
    assert of_shown(kept, "ranks") == [3, 1, 3]


def test_a_ranking_without_a_rank_is_not_sent(opened):
    store, page = opened("rank")
    press(page, "1", "Control+Enter")
    page.wait_for_selector("#message:has-text('Response B has no rank yet.')")
    assert page.evaluate("document.activeElement.name") == "rank-1"
    assert store.labels() == []


@pytest.mark.parametrize(
    ("key", "ranks"), [("1", [1, 2]), ("0", [1, 1]), ("2", [2, 1])]
)
def test_compare_by_keyboard(opened, key, ranks):
    store, page = opened("compare")
    press(page, key, "Enter")
    assert of_shown(finished_label(store, page), "ranks") == ranks


def test_compare_by_mouse(opened):
    store, page = opened("compare", 390)
    page.get_by_label("B is better").click()
    page.click("#submit")
    assert of_shown(finished_label(store, page), "ranks") == [2, 1]


def test_demonstrate_keeps_a_draft_over_a_reload(opened):
    store, page = opened("demonstrate")
    page.keyboard.type("An answer u s ? g")  # no shortcut within text
    page.reload()
    page.wait_for_selector("#work textarea")
    press(page, "Control+Enter")
    messages = finished_label(store, page).value["messages"]
    assert messages[-1] == {"role": "assistant", "content": "An answer u s ? g"}
    assert messages[0]["content"] == HOSTILE


def test_both_sides_by_mouse_and_keyboard(opened):
    store, page = opened("both")
    page.keyboard.type("Hi")
    press(page, "Tab")
    page.keyboard.type("Hello")
    page.click("text=Add a turn of the user")
    page.keyboard.type("So?")
    press(page, "Control+Enter")
    page.wait_for_selector("#message:has-text('last turn must be')")
    page.click("text=Add a turn of the assistant")
    page.keyboard.type("Well.")
    page.click("#submit")
    turns = finished_label(store, page).value["messages"]
    assert [turn["content"] for turn in turns] == ["Hi", "Hello", "So?", "Well."]


def test_edit_by_keyboard(opened):
    store, page = opened("edit")
    press(page, "Control+Enter")
    page.wait_for_selector("#message:has-text('Nothing was changed yet.')")
    press(page, "Control+End")
    page.keyboard.type(" but better")
    press(page, "Control+Enter")
    assert finished_label(store, page).value == {"text": "bad but better"}


def test_feedback_by_keyboard_and_by_mouse(opened):
    store, page = opened("feedback")
    press(page, "Enter")  # Start has the focus
    press(page, "+", "-")
    page.click("text=+ Good")
    page.get_by_role("button", name="Watch it again").click(
        trial=True
    )  # once it has ended
    press(page, "Control+Enter")
    kept = finished_label(store, page)
    pairs = kept.value["feedback"]
    assert [value for _, value in pairs] == [1.0, -1.0, 1.0]
    assert all(0 <= at < 3.5 for at, _ in pairs)


def test_skip_by_keyboard_with_a_reason(opened):
    store, page = opened("compare")
    press(page, "s", "ArrowDown", "Enter")
    page.wait_for_selector("h1:has-text('Nothing to do right now')")
    (kept,) = store.labels()
    assert (kept.action, kept.value["reason"]) == ("skip", "no_knowledge")


def test_a_label_waits_in_the_browser_for_a_server_that_is_away(opened):
    store, page = opened("compare")
    page.context.set_offline(True)
    press(page, "1", "Enter")
    page.wait_for_selector("#message:has-text('does not answer')")
    assert store.labels() == []
    page.context.set_offline(False)
    assert of_shown(finished_label(store, page), "ranks") == [1, 2]
