"""What is answered over HTTP: nothing without a token, labels once, errors in one line."""

import json

import pytest
from starlette.testclient import TestClient

from rlhfjax.labeling import app, queue, tasks
from rlhfjax.labeling.app import MOST_BYTES, Collection, application
from rlhfjax.labeling.store import Item
from rlhfjax.web.guard import guarded
from tests.labeling.label_world import HOSTILE, compare, new_store, rank

NOTHING = "there is nothing here; open the link of your invitation"


@pytest.fixture
def site(tmp_path):
    """(store, client, link of ann, link of the organizer)"""
    store = new_store(tmp_path, "ann", "bob")
    collection = Collection(store, queue.Rules(), "Be fair.")
    guard = guarded(application(collection), host="127.0.0.1", most_bytes=MOST_BYTES)
    client = TestClient(guard, base_url="http://127.0.0.1:8100")
    ann = f"/{store.people()[0].token}/"
    return store, client, ann, f"/{store.organizer().token}/"


def post(client, path, body):
    return client.post(path, content=json.dumps(body))


def test_without_a_token_there_is_nothing_not_even_a_page(site):
    _, client, ann, organizer = site
    for path in (
        *(
            "/",
            "/label.html",
            "/label.css",
            "/favicon.ico",
            "/api/next",
            "/x/",
            "/x/api/next",
        ),
        *(
            f"{ann[:-2]}/",
            ann + "api/progress",
            ann + "organizer.js",
            organizer + "api/next",
        ),
        *(ann + "../store.py", ann + "store.py", organizer + "api/labels.sqlite"),
        organizer + "api/../../labels.sqlite",
    ):
        reply = client.get(path)
        assert reply.status_code == 404, path
        assert reply.json()["error"]["message"] == NOTHING
    assert client.post(ann + "api/next").status_code == 404
    assert client.post(ann + "api/finish").status_code == 404


def test_pages_have_no_external_resources_and_headers_that_forbid_them(site):
    _, client, ann, organizer = site
    for link, names in (
        (ann, app.FILES["labeler"]),
        (organizer, app.FILES["organizer"]),
    ):
        page = client.get(link)
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert page.headers["referrer-policy"] == "no-referrer"
        for text in (page.text, *(client.get(link + name).text for name in names)):
            assert "http:" not in text.replace("http://www.w3.org/2000/svg", "")
            assert "https:" not in text
            for unsafe in (
                "innerHTML",
                "outerHTML",
                "insertAdjacent",
                "document.write",
                "eval(",
            ):
                assert unsafe not in text


def test_requests_of_other_pages_and_hosts_are_refused(site):
    _, client, ann, _ = site
    other = {"Origin": "http://evil.example"}
    assert client.post(ann + "api/undo", headers=other).status_code == 403
    rebound = client.get(ann, headers={"Host": "evil.example"})
    assert rebound.status_code == 403


def test_a_label_from_the_first_page_to_undo(site):
    store, client, ann, _ = site
    store.add([rank(0, k=3)])
    about = client.get(ann + "api/start").json()
    assert (about["name"], about["guidelines"]) == ("ann", "Be fair.")
    assert about["flags"] == tasks.FLAGS and about["highest_rating"] == 7
    shown = client.get(ann + "api/next").json()
    assert shown["state"] == "item" and shown["progress"] == {"done": 0, "left": 1}
    order = tasks.order_for(rank(0).id, "ann", 3)
    assert shown["item"]["responses"] == [f"r0.{i}" for i in order]
    value = {
        "ranks": [1, 2, 3],
        "ratings": [7, 4, None],
        "flags": [[], ["harmful"], []],
    }
    body = {"event": shown["event"], "value": value, "seconds": 3.25}
    first = post(client, ann + "api/submit", body)
    assert first.status_code == 200
    assert post(client, ann + "api/submit", body).json() == first.json()
    (kept,) = store.labels()
    assert kept.seconds == 3.25
    assert [kept.value["ranks"][i] for i in order] == [1, 2, 3]
    assert client.get(ann + "api/next").json()["state"] == "finished"
    assert post(client, ann + "api/undo", {}).status_code == 200
    again = client.get(ann + "api/next").json()
    assert again["before"] == value
    assert post(client, ann + "api/undo", {}).status_code == 409


def test_what_cannot_be_meant_is_one_line(site):
    store, client, ann, _ = site
    store.add([compare()])
    event = client.get(ann + "api/next").json()["event"]
    for body, status, message in (
        (
            {"event": event, "value": {}},
            422,
            "ranks: one is needed for each of the 2 responses",
        ),
        (
            {"event": event, "value": {"ranks": [1, 2]}, "seconds": -1},
            422,
            "seconds must be",
        ),
        (
            {"event": event + 1, "value": {"ranks": [1, 2]}},
            409,
            "nothing was shown to you",
        ),
        ({"event": "1"}, 422, "event: the number"),
        ([], 422, "event: the number"),
    ):
        reply = post(client, ann + "api/submit", body)
        assert reply.status_code == status
        assert message in reply.json()["error"]["message"]
        assert "\n" not in reply.json()["error"]["message"]
    assert client.post(ann + "api/submit", content=b"{").status_code == 400
    assert client.post(ann + "api/submit", content=b'{"event": NaN}').status_code == 400
    assert (
        client.post(ann + "api/submit", content=b"x" * (MOST_BYTES + 1)).status_code
        == 413
    )
    assert store.labels() == []


def test_skips_keep_their_reason(site):
    store, client, ann, _ = site
    store.add([compare()])
    event = client.get(ann + "api/next").json()["event"]
    body = {
        "event": event,
        "value": {"reason": "language", "note": " Maltese "},
        "seconds": 1,
    }
    assert post(client, ann + "api/skip", body).status_code == 200
    (kept,) = store.labels()
    assert (kept.action, kept.value) == (
        "skip",
        {"reason": "language", "note": "Maltese"},
    )


def test_the_screening_test_is_counted_for_the_labeler(site):
    store, client, ann, _ = site
    store.add([compare(i, kind="screening", known={"ranks": [1, 2]}) for i in range(2)])
    assert client.get(ann + "api/next").json()["test"] == {"number": 1, "of": 2}


def test_the_organizer_sees_progress_invites_exports_and_ends(site):
    store, client, ann, organizer = site
    store.add([compare(0, overlap=2), compare(1)])
    for who in ("ann", "bob"):
        shown = queue.next_item(store, who, queue.Rules())
        store.append(who, "submit", shown.event, {"ranks": [1, 2]}, 30.0)
    progress = client.get(organizer + "api/progress").json()
    assert (progress["labels"], progress["wanted"], progress["items"]) == (2, 3, 2)
    assert [one["name"] for one in progress["labelers"]] == ["ann", "bob"]
    assert progress["labelers"][0]["seconds"] == 30.0
    assert progress["labelers"][0]["path"] == ann
    invited = post(client, organizer + "api/invite", {"name": " cleo "}).json()
    assert client.get(invited["path"]).status_code == 200
    assert post(client, organizer + "api/invite", {"name": ""}).status_code == 422
    rows = client.get(organizer + "api/rankings.jsonl")
    assert len(rows.text.splitlines()) == 2
    assert "attachment" in rows.headers["content-disposition"]
    assert post(client, organizer + "api/finish", {}).status_code == 200
    assert client.get(organizer + "api/progress").json()["is_complete"]


def test_hostile_texts_come_through_as_they_are(site):
    store, client, ann, _ = site
    content = {"prompt": HOSTILE, "responses": [HOSTILE, "b"]}
    store.add([Item("compare", content)])
    item = client.get(ann + "api/next").json()["item"]
    assert item["prompt"] == [{"role": "user", "content": HOSTILE}]
    assert HOSTILE in item["responses"]
