"""What is answered over HTTP: the labeler's page, the organizer's page, and what they ask for.

    /TOKEN/                 the page of whom the token belongs to
    /TOKEN/api/start        GET: the guidelines, and the names of flags and reasons
    /TOKEN/api/next         GET: the item on the labeler's screen, see `queue`
    /TOKEN/api/submit       POST {"event", "value", "seconds"}: a label of what was shown as `event`
    /TOKEN/api/skip         POST {"event", "value": {"reason", "note"}, "seconds"}
    /TOKEN/api/undo         POST: takes the last label back; its item is next
    /TOKEN/api/progress     GET, organizer: counts, agreement, labelers
    /TOKEN/api/invite       POST {"name"}, organizer
    /TOKEN/api/finish       POST, organizer: ends the collection
    /TOKEN/api/rankings.jsonl and the other files of `export`: GET, organizer

The token in the path is the whole permission: without one, nothing is answered, not even a page. A
label is on the disk before its reply is sent, and may be sent again.
"""

import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rlhfjax import json_text, paths
from rlhfjax.errors import ConfigError
from rlhfjax.labeling import agreement, export, queue, tasks
from rlhfjax.labeling.queue import Rules
from rlhfjax.labeling.store import Person, Refused, Store
from rlhfjax.labeling.tables import ORGANIZER, SCREENING, SKIP, SUBMIT, WORK
from rlhfjax.web.replies import error, page

PAGES = "rlhfjax.labeling.pages"
FILES = {
    ORGANIZER: ("organizer.js", "dom.js", "label.css", "icon.svg"),
    "labeler": ("label.js", "tasks.js", "rank.js", "dom.js", "label.css", "icon.svg"),
}
FIRST_PAGE = {ORGANIZER: "organizer.html", "labeler": "label.html"}
EXPORTED = (
    "rankings.jsonl",
    "demonstrations/train.jsonl",
    "demonstrations/validation.jsonl",
    "feedback/train.jsonl",
    "feedback/validation.jsonl",
    "skipped.jsonl",
    "events.jsonl",
)
MOST_BYTES = 4 * 2**20  # of a request: a conversation of many turns


class Collection(NamedTuple):
    """What is collected, and by which rules."""

    store: Store
    rules: Rules
    guidelines: str = ""  # text that labelers can always read
    validation: float = 0.05  # share of the prompts in the validation split


def application(collection: Collection) -> Starlette:
    """Returns the pages and the API of one collection; `web.guard` goes around it."""

    def endpoint(
        role: str, answer: Callable[[Collection, Person, Any], Any]
    ) -> Callable[[Request], Any]:
        """Returns an endpoint for the people of one role; `answer` runs in a thread."""

        async def reply(request: Request) -> Response:
            body = await request.body()
            return await run_in_threadpool(_answer, request, body, role, answer)

        return reply

    def _answer(
        request: Request,
        body: bytes,
        role: str,
        answer: Callable[[Collection, Person, Any], Any],
    ) -> Response:
        person = collection.store.person(request.path_params["token"])
        if person is None or role not in ("", person.role):
            return _not_found()
        try:
            given = json_text.parse(body) if body else request.path_params
            result = answer(collection, person, given)
        except json_text.NotJson as mistake:
            return error(400, f"the request is not JSON: {mistake}")
        except (tasks.Invalid, ConfigError) as mistake:
            return error(422, str(mistake))
        except Refused as mistake:
            return error(409, str(mistake))
        return result if isinstance(result, Response) else JSONResponse(result)

    def get(path: str, role: str, answer: Callable[..., Any]) -> Route:
        return Route(f"/{{token}}/{path}", endpoint(role, answer), methods=["GET"])

    def post(path: str, role: str, answer: Callable[..., Any]) -> Route:
        return Route(f"/{{token}}/{path}", endpoint(role, answer), methods=["POST"])

    return Starlette(
        routes=[
            get("api/start", "labeler", start),
            get("api/next", "labeler", next_item),
            post("api/submit", "labeler", submit),
            post("api/skip", "labeler", skip),
            post("api/undo", "labeler", undo),
            get("api/progress", ORGANIZER, progress),
            post("api/invite", ORGANIZER, invite),
            post("api/finish", ORGANIZER, finish),
            get("api/{file:path}", ORGANIZER, exported),
            get("{file}", "", static),
            get("", "", static),
        ],
        exception_handlers={404: lambda *_: _not_found(), 405: lambda *_: _not_found()},
    )


def _not_found() -> Response:
    """Returns the same for a wrong token, a wrong path and a page of the other role."""
    return error(404, "there is nothing here; open the link of your invitation")


def static(collection: Collection, person: Person, given: Any) -> Response:
    """Returns a page, or a file that it needs."""
    name = given.get("file", FIRST_PAGE[person.role])
    if name not in (*FILES[person.role], FIRST_PAGE[person.role]):
        return _not_found()
    return page(PAGES, name)


# ------------------------------------------------------------------ labelers


def start(collection: Collection, person: Person, given: Any) -> dict[str, Any]:
    return {
        "name": person.name,
        "guidelines": collection.guidelines,
        "flags": tasks.FLAGS,
        "reasons": tasks.REASONS,
        "highest_rating": tasks.HIGHEST_RATING,
    }


def next_item(collection: Collection, person: Person, given: Any) -> dict[str, Any]:
    store, rules = collection.store, collection.rules
    found = queue.next_item(store, person.name, rules)
    counts = store.counts(person.name)
    done = counts.get((WORK, SUBMIT), 0)
    left = max(0, queue.wanted(store, rules) - store.label_count())
    reply: dict[str, Any] = {"progress": {"done": done, "left": left}}
    reply["can_undo"] = bool(counts)
    if isinstance(found, str):
        return reply | {"state": found}
    reply |= {"state": "item", "event": found.event, "before": None}
    reply["item"] = tasks.shown(found.task, found.content, found.order)
    if found.before is not None:
        reply["before"] = tasks.as_shown(found.task, found.order, found.before)
    if found.kind == SCREENING:
        tested = sum(counts.get((SCREENING, action), 0) for action in (SUBMIT, SKIP))
        reply["test"] = {"number": tested + 1, "of": store.item_count(SCREENING)}
    return reply


def submit(collection: Collection, person: Person, given: Any) -> dict[str, Any]:
    store = collection.store
    event, seconds = _event(given)
    item, order = queue.shown_as(store, person.name, event)
    value = tasks.stored(item.task, item.content, order, given.get("value"))
    return {"label": store.append(person.name, SUBMIT, event, value, seconds)}


def skip(collection: Collection, person: Person, given: Any) -> dict[str, Any]:
    event, seconds = _event(given)
    value = tasks.reason(given.get("value"))
    label = collection.store.append(person.name, SKIP, event, value, seconds)
    return {"label": label}


def undo(collection: Collection, person: Person, given: Any) -> dict[str, Any]:
    return {"undone": collection.store.undo(person.name)}


def _event(given: Any) -> tuple[int, float]:
    """Returns the number of a showing, and the seconds of work. Raises Invalid."""
    event = given.get("event") if isinstance(given, dict) else None
    if type(event) is not int or not 0 <= event < 2**63:
        raise tasks.Invalid("event: the number of what was shown is needed")
    return event, tasks.seconds(given.get("seconds", 0))


# ------------------------------------------------------------------ the organizer


def progress(collection: Collection, person: Person, given: Any) -> dict[str, Any]:
    """Returns what the organizer's page shows."""
    store = collection.store
    labels = store.labels()
    work = [label for label in labels if label.kind == WORK]
    people = store.people()
    return {
        "labels": store.label_count(),
        "wanted": queue.wanted(store, collection.rules),
        "items": store.item_count(),
        "skipped": sum(label.action == SKIP for label in work),
        "is_complete": queue.is_complete(store, collection.rules),
        "agreement": agreement.between(work),
        "labelers": [
            {
                "name": one.name,
                "path": f"/{one.token}/",
                "admitted": queue.is_admitted(store, one.name, collection.rules),
                **agreement.summary(labels, one.name),
            }
            for one in people
        ],
        "files": EXPORTED,
    }


def invite(collection: Collection, person: Person, given: Any) -> dict[str, Any]:
    name = given.get("name") if isinstance(given, dict) else None
    if not isinstance(name, str):
        raise tasks.Invalid("name: a pseudonym is needed")
    invited = collection.store.invite(name.strip())
    return {"name": invited.name, "path": f"/{invited.token}/"}


def finish(collection: Collection, person: Person, given: Any) -> dict[str, Any]:
    collection.store.finish(person.name)
    return {"finished": True}


def exported(collection: Collection, person: Person, given: Any) -> Response:
    """Returns one of the files that the end of the collection writes, as it would be now."""
    name = given["file"]
    if name not in EXPORTED:
        return _not_found()
    with tempfile.TemporaryDirectory() as folder:
        export.write(collection.store, paths.path(folder), collection.validation)
        content = paths.read_if_there(paths.path(folder) / name) or b""
    attached = f'attachment; filename="{name.replace("/", "-")}"'
    headers = {"Content-Disposition": attached, "Cache-Control": "no-store"}
    return PlainTextResponse(content, headers=headers)
