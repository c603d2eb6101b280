"""Items, stores and labels for the tests of labeling."""

from pathlib import Path
from typing import Any

from rlhfjax import paths
from rlhfjax.labeling import queue, tasks
from rlhfjax.labeling.store import Item, Store

WORDS = ("good", "tea", "is", "rain", "happy", "sad", "books", "we", "like", "dogs")
HOSTILE = (
    "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
    "</div><style>body{display:none}</style>&lt;b&gt; \u202eabc\u202c ${1} {{1}}"
)


RULES = queue.Rules()


def new_store(folder: Path, *labelers: str) -> Store:
    store = Store(paths.path(folder) / "labels.sqlite")
    for name in labelers:
        store.invite(name)
    return store


def compare(i: int = 0, **changes: Any) -> Item:
    content = {"prompt": f"prompt {i}", "responses": [f"a{i}", f"b{i}"]}
    return Item("compare", content, **changes)


def rank(i: int = 0, k: int = 3, **changes: Any) -> Item:
    content = {"prompt": f"prompt {i}", "responses": [f"r{i}.{j}" for j in range(k)]}
    return Item("rank", content, **changes)


def label(store: Store, who: str, value: Any, rules: queue.Rules = RULES) -> str:
    """Submits a label in the item's own order; returns the id of the item."""
    shown = queue.next_item(store, who, rules)
    assert not isinstance(shown, str), shown
    given = tasks.as_shown(shown.task, shown.order, value)
    stored = tasks.stored(shown.task, shown.content, shown.order, given)
    store.append(who, "submit", shown.event, stored, 2.0)
    return shown.item


def skip(store: Store, who: str, rules: queue.Rules = RULES) -> None:
    shown = queue.next_item(store, who, rules)
    assert not isinstance(shown, str), shown
    store.append(who, "skip", shown.event, {"reason": "unclear", "note": ""}, 1.0)
