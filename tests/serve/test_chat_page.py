"""The chat page in Chromium: what a person does with it, and what the server and the file get."""

import re
import shutil

import pytest

from rlhfjax import jsonl, paths
from rlhfjax.serve.comparisons import Comparisons
from tests.serve.test_api_chat import until

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TOKEN = "0123456789abcdef"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        options = {
            "executable_path": CHROMIUM,
            "args": ["--no-sandbox", "--disable-gpu"],
        }
        browser = playwright.chromium.launch(**options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """open_page(url, **options of a context) -> a page without errors and foreign requests."""
    opened = []

    def go(url, **options):
        page = browser.new_context(**options).new_page()
        page.set_default_timeout(5000)
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: m.type == "error" and problems.append(m.text))
        page.on("request", lambda r: r.url.startswith(url) or problems.append(r.url))
        opened.append((page, problems))
        page.goto(url)
        return page

    yield go
    for page, problems in opened:
        page.context.close()
        # The console has a line for each reply with an error.
        refused = re.compile("status of 40[01]")
        assert [text for text in problems if not refused.search(text)] == []


@pytest.fixture
def numbered(served):
    """numbered(**options) -> a model whose response says how many requests it had."""

    def make(**options):
        def write(request):
            return f"reply {len(model.engine.requests)}"

        model = served(write, **options)
        return model

    return make


def enter(page, text):
    page.locator("#send:enabled").wait_for()  # the server has named its models
    page.fill("#text", text)
    page.press("#text", "Enter")


def say(page, text):
    enter(page, text)
    page.locator("#send").wait_for()


def bubbles(page):
    return page.locator(".bubble").all_text_contents()


def asked(words, model, index=-1):
    """Returns the turns that the engine was given."""
    turns = words.template.messages(model.engine.requests[index].tokens)
    return [(turn["role"], turn["content"]) for turn in turns if turn["content"]]


def test_a_conversation_with_edit_regenerate_and_new(serve, open_page, numbered, words):
    model = numbered()
    page = open_page(serve(model))
    say(page, "the cat")
    say(page, "a dog\nran")
    assert bubbles(page) == ["the cat", "reply 1", "a dog\nran", "reply 2"]
    expected = [("user", "the cat"), ("assistant", "reply 1"), ("user", "a dog\nran")]
    assert asked(words, model) == expected
    page.get_by_role("button", name="Regenerate").click()
    page.get_by_text("reply 3").wait_for()
    assert asked(words, model) == expected
    page.get_by_role("button", name="Edit").first.click()
    page.fill(".editor", "it")
    page.press(".editor", "Enter")
    page.get_by_text("reply 4").wait_for()
    assert bubbles(page) == ["it", "reply 4"]
    assert asked(words, model) == [("user", "it")]
    page.keyboard.press("Alt+n")
    assert bubbles(page) == [] and page.get_by_text("Write a message").is_visible()


def test_a_conversation_that_is_too_long_goes_on_without_its_oldest_turns(
    serve, open_page, numbered, words
):
    model = numbered(length=64)
    page = open_page(serve(model))
    page.click("#open-settings")
    page.fill("#system", "a")
    texts = [f"{i} the cat ran under it" for i in range(4)]
    for text in texts:
        say(page, text)
    turns = asked(words, model)
    assert turns[:2] == [("system", "a"), ("user", texts[2])]  # not the first pairs
    assert turns[-1] == ("user", texts[3]) and len(turns) == 4
    # A quarter of the length is left for a response; one more pair would leave less.
    prompts = [len(request.tokens) for request in model.engine.requests]
    assert prompts[-1] <= 64 - 16 < prompts[-1] + (prompts[1] - prompts[0])
    note = page.get_by_text("the oldest 4 messages were left out")
    assert note.is_visible() and len(bubbles(page)) == 8
    say(page, "the cat ran under it " * 9)  # too long by itself
    assert page.get_by_text("this model has room for 64 tokens").is_visible()
    page.evaluate("localStorage.clear()")


def test_settings_reach_the_engine_and_stay(serve, open_page, numbered, words):
    model = numbered(sampling={"temperature": 0.25})
    url = serve(model)
    page = open_page(url)
    page.click("#open-settings")
    assert page.get_attribute("#temperature", "placeholder") == "0.25"
    page.fill("#system", "a cat")
    for name, value in {"temperature": "0.5", "top_k": "7", "max_tokens": "9"}.items():
        page.fill(f"#{name}", value)
    page.fill("#seed", "5")
    page.keyboard.press("Escape")
    assert not page.is_visible("#settings")
    say(page, "hi")
    (request,) = model.engine.requests
    assert (request.temperature, request.top_k, request.seed) == (0.5, 7, 5)
    assert request.max_tokens == 9
    assert asked(words, model) == [("system", "a cat"), ("user", "hi")]
    page.reload()
    assert page.input_value("#system") == "a cat"


def test_stop_keeps_the_text_and_frees_the_lane(serve, open_page, served):
    model = served("the cat ran " * 20, seconds=0.05)
    page = open_page(serve(model))
    enter(page, "hi")
    page.get_by_text("the cat").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("stopped").wait_for()
    assert bubbles(page)[1].startswith("the cat")
    until(lambda: model.engine.busy == 0)


def test_tokens_and_their_rate_are_shown(serve, open_page, served, words):
    page = open_page(serve(served("the cat ran", seconds=0.01)))
    say(page, "hi")
    count = len(words.encode("the cat ran")) + 1
    assert page.locator(".foot span").text_content().startswith(f"{count} tokens · ")
    assert page.get_by_text("tokens/s").is_visible()


def test_text_stays_text(serve, open_page, served):
    html = "<img src=x onerror=alert(1)><b>the cat</b>"
    page = open_page(serve(served(html)))
    say(page, html)
    assert bubbles(page) == [html, html]
    assert page.locator(".bubble *").count() == 0


def test_a_vote_is_stored_with_what_it_was_about(
    serve, open_page, served, words, tmp_path
):
    file = paths.path(tmp_path / "votes.jsonl")
    models = served("the cat", name="one"), served("a dog", name="two")
    page = open_page(serve(*models, comparisons=Comparisons(file)))
    page.click("#compare")
    say(page, "hi")
    names = page.locator(".name").all_text_contents()
    assert names == ["Response A", "Response B"]  # blind
    texts = bubbles(page)[1:]
    better = texts.index("a dog")
    page.get_by_role("button", name="AB"[better] + " is better").click()
    page.get_by_text("You preferred two.").wait_for()
    page.get_by_text("Vote stored").wait_for()
    ((_, row),) = jsonl.located_rows(file)
    assert row["prompt"] == [{"role": "user", "content": "hi"}]
    assert row["completions"] == texts
    assert row["scores"] == [float(i == better) for i in range(2)]
    assert row["models"] == [{"the cat": "one", "a dog": "two"}[text] for text in texts]
    say(page, "it")
    expected = [("user", "hi"), ("assistant", "a dog"), ("user", "it")]
    assert asked(words, models[0]) == asked(words, models[1]) == expected
    page.keyboard.press("Alt+3")
    page.get_by_text("A tie of").wait_for()
    page.get_by_text("Vote stored (2").wait_for()


def test_the_page_asks_for_the_token(serve, open_page, numbered):
    page = open_page(serve(numbered(), token=TOKEN))
    page.fill("#token", "x" * 16)
    page.get_by_role("button", name="Continue").click()
    page.get_by_text("That was not the token.").wait_for()
    page.fill("#token", TOKEN)
    page.get_by_role("button", name="Continue").click()
    page.locator("#ask-token").wait_for(state="hidden")
    say(page, "hi")
    assert bubbles(page) == ["hi", "reply 1"]


def test_a_message_waits_for_the_names_of_the_models(serve, open_page, numbered):
    """A message that is sent earlier has no model: it was lost in an error of the script."""
    url = serve(numbered(), token=TOKEN)
    page = open_page(url)
    held = []
    page.fill("#token", TOKEN)
    page.route(f"{url}/settings", lambda route: held.append(route))
    page.get_by_role("button", name="Continue").click()
    page.locator("#ask-token").wait_for(state="hidden")
    until(lambda: held or page.wait_for_timeout(10))
    page.fill("#text", "hi")
    page.press("#text", "Enter")
    assert bubbles(page) == [] and page.locator("#send").is_disabled()
    held[0].continue_()
    page.locator("#send:enabled").wait_for()
    page.press("#text", "Enter")
    page.get_by_text("reply 1").wait_for()


def test_an_error_is_shown_and_can_be_tried_again(serve, open_page, numbered):
    model = numbered(crash="no memory")
    page = open_page(serve(model))
    say(page, "hi")
    assert page.locator(".error").first.text_content() == "no memory"
    model.engine.crash = ""
    page.get_by_role("button", name="Retry").click()
    page.get_by_text("reply 2").wait_for()


def test_colors_follow_the_system_until_they_are_chosen(serve, open_page, numbered):
    page = open_page(serve(numbered()), color_scheme="dark")

    def background():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    assert background() == "rgb(22, 24, 29)"
    page.click("#open-settings")
    page.get_by_label("Light").check()
    assert background() == "rgb(255, 255, 255)"
    page.reload()
    assert background() == "rgb(255, 255, 255)"


@pytest.mark.parametrize("width", [320, 390, 900, 1400])
def test_nothing_is_wider_than_the_window(serve, open_page, served, width):
    models = [served("x" * 200, name=name * 30) for name in ("one", "two")]
    page = open_page(serve(*models), viewport={"width": width, "height": 700})
    page.click("#compare")
    say(page, "y" * 200)
    page.click("#open-settings")
    script = "[document.documentElement, document.getElementById('turns')]"
    script += ".map(box => box.scrollWidth - box.clientWidth)"
    assert page.evaluate(script) == [0, 0]


def test_the_up_key_edits_the_last_message(serve, open_page, numbered):
    page = open_page(serve(numbered()))
    say(page, "the cat")
    page.press("#text", "ArrowUp")
    assert page.input_value(".editor") == "the cat"
    page.press(".editor", "Escape")
    assert bubbles(page) == ["the cat", "reply 1"]
