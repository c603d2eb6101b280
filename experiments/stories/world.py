"""Stories in a small world: requests for them, stories that fulfill requests, and their worth.

    python -m experiments.stories.world data/stories

A story is a few sentences about two people who go to places, take and give things, meet and have
moods. A request says what must happen in it. Whether a story does that, and whether its sentences
agree with each other, is decided by following it: `score`, the gold reward of the studies. Neither
the length of a story nor any word makes it good, since what is asked for differs between requests;
a model needs to read the request and to keep track of who is where and has what.

The command writes, always the same:

    documents.jsonl    stories of mixed quality, for pretraining
    forum.jsonl        requests and stories of mixed quality, for pretraining
    chats_SPLIT.jsonl  requests and stories of labelers, for fine-tuning and as prompts
    prompted_test.jsonl  the prompts of chats_test.jsonl, each after two solved requests
"""

import dataclasses
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhfjax.jsonl import write_jsonl

PEOPLE = (
    "Anna", "Ben", "Clara", "David", "Emma", "Finn", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo",
    "Mary", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Will",
)  # fmt: skip
COLORS = ("red", "green", "blue", "white", "black", "brown", "yellow", "gray")
THINGS = ("ball", "cup", "book", "hat", "key", "lamp", "bag", "coat", "box", "ring")
PLACES = (
    "garden", "kitchen", "office", "market", "school", "church", "station", "park",
)  # fmt: skip
MOODS = ("happy", "sad", "tired", "angry", "hungry", "proud")
HOME = "home"  # where everybody is before the first step
MOST_SENTENCES = 8  # of a story; each further one counts as one that does not agree

FORMS = {
    "went": re.compile(r"(\w+) went to the (\w+)\."),
    "took": re.compile(r"(\w+) took the (\w+) (\w+)\."),
    "gave": re.compile(r"(\w+) gave the (\w+) to (\w+)\."),
    "lost": re.compile(r"(\w+) lost the (\w+)\."),
    "met": re.compile(r"(\w+) met (\w+)\."),
    "was": re.compile(r"(\w+) was (\w+)\."),
}


class Event(NamedTuple):
    """What a sentence of a story says."""

    form: str  # a key of FORMS
    words: tuple[str, ...]  # its groups

    def sentence(self) -> str:
        texts = {
            "went": "{} went to the {}.",
            "took": "{} took the {} {}.",
            "gave": "{} gave the {} to {}.",
            "lost": "{} lost the {}.",
            "met": "{} met {}.",
            "was": "{} was {}.",
        }
        return texts[self.form].format(*self.words)


class Wish(NamedTuple):
    """What a request asks for."""

    form: str  # takes, gets, ends or feels
    words: tuple[str, ...]

    def sentence(self) -> str:
        texts = {
            "takes": "{} takes the {} {}.",
            "gets": "{} gets the {}.",
            "ends": "At the end {} is in the {}.",
            "feels": "At the end {} is {}.",
        }
        return texts[self.form].format(*self.words)


WISHES = {
    "takes": re.compile(r"(\w+) takes the (\w+) (\w+)\."),
    "gets": re.compile(r"(\w+) gets the (\w+)\."),
    "ends": re.compile(r"At the end (\w+) is in the (\w+)\."),
    "feels": re.compile(r"At the end (\w+) is (\w+)\."),
}
ABOUT = re.compile(r"Tell a story about (\w+) and (\w+)\.")


class Request(NamedTuple):
    """The people of a story, and what must happen."""

    people: tuple[str, str]
    wishes: tuple[Wish, ...]

    def text(self) -> str:
        about = "Tell a story about {} and {}.".format(*self.people)
        return " ".join([about, *(wish.sentence() for wish in self.wishes)])


# ------------------------------------------------------------------ the world


@dataclasses.dataclass
class World:
    """Where the people are, who holds what, and how they feel."""

    people: tuple[str, str]
    place: dict[str, str] = dataclasses.field(default_factory=dict)
    holder: dict[str, str] = dataclasses.field(default_factory=dict)
    color: dict[str, str] = dataclasses.field(default_factory=dict)
    mood: dict[str, str] = dataclasses.field(default_factory=dict)
    events: list[Event] = dataclasses.field(default_factory=list)

    def agrees(self, event: Event) -> bool:
        """Returns whether an event can happen now, and has not happened already."""
        people = [word for word in event.words if word in PEOPLE]
        if not set(people) <= set(self.people) or event in self.events:
            return False
        return getattr(self, f"_{event.form}")(*event.words)

    def follow(self, event: Event) -> bool:
        """Lets an event happen if it can; returns whether it could."""
        if not self.agrees(event):
            return False
        first, *others = event.words
        if event.form == "went":
            self.place[first] = others[0]
        elif event.form == "took":
            color, thing = others
            self.holder[thing], self.color[thing] = first, color
        elif event.form == "gave":
            thing, receiver = others
            self.holder[thing] = receiver
        elif event.form == "lost":
            del self.holder[others[0]]
        elif event.form == "was":
            self.mood[first] = others[0]
        self.events.append(event)
        return True

    def fulfills(self, wish: Wish) -> bool:
        """Returns whether a wish has come true."""
        first, *others = wish.words
        if wish.form == "takes":
            return Event("took", wish.words) in self.events
        if wish.form == "gets":
            return self.holder.get(others[0]) == first
        if wish.form == "ends":
            return self.place.get(first) == others[0]
        return self.mood.get(first) == others[0]

    def are_together(self) -> bool:
        first, second = self.people
        return self.place.get(first, HOME) == self.place.get(second, HOME)

    def _went(self, person: str, place: str) -> bool:
        known = person in PEOPLE and place in PLACES
        return known and self.place.get(person) != place

    def _took(self, person: str, color: str, thing: str) -> bool:
        known = person in PEOPLE and color in COLORS and thing in THINGS
        return (
            known and thing not in self.holder and self.color.get(thing, color) == color
        )

    def _gave(self, giver: str, thing: str, receiver: str) -> bool:
        both = giver in PEOPLE and receiver in PEOPLE and giver != receiver
        return both and self.holder.get(thing) == giver and self.are_together()

    def _lost(self, person: str, thing: str) -> bool:
        return person in PEOPLE and self.holder.get(thing) == person

    def _met(self, person: str, other: str) -> bool:
        both = person in PEOPLE and other in PEOPLE and person != other
        again = Event("met", (other, person)) in self.events
        return both and not again and self.are_together()

    def _was(self, person: str, mood: str) -> bool:
        known = person in PEOPLE and mood in MOODS
        return known and self.mood.get(person) != mood


# ------------------------------------------------------------------ reading and scoring


def read_request(text: str) -> Request | None:
    """Returns the request in a user's turn; None if it has no people."""
    about = ABOUT.search(text)
    if about is None:
        return None
    found = [(m.start(), Wish(form, m.groups())) for form, m in _matches(WISHES, text)]
    return Request((about[1], about[2]), tuple(wish for _, wish in sorted(found)))


def _matches(
    forms: Mapping[str, re.Pattern[str]], text: str
) -> Iterator[tuple[str, re.Match[str]]]:
    for form, pattern in forms.items():
        for match in pattern.finditer(text):
            yield form, match


def read_story(text: str) -> list[Event | None]:
    """Returns the events of a story's sentences; None for a sentence of no known form."""
    events: list[Event | None] = []
    for sentence in re.findall(r"[^.]*\.|[^.]+$", text.strip()):
        found = (
            (form, pattern.fullmatch(sentence.strip()))
            for form, pattern in FORMS.items()
        )
        matched = [Event(form, match.groups()) for form, match in found if match]
        events.append(matched[0] if matched else None)
    return events


def worth(request: Request, story: str) -> float:
    """Returns the share of the wishes that come true, times the share of sentences that agree.

    A sentence agrees if it can be read, is about the people of the request, and can happen after
    what was told before; sentences after the eighth do not. An empty story is worth 0.
    """
    events = read_story(story)
    if not events or not request.wishes:
        return 0.0
    world = World(request.people)
    told = events[:MOST_SENTENCES]
    agreed = sum(event is not None and world.follow(event) for event in told)
    fulfilled = sum(map(world.fulfills, request.wishes)) / len(request.wishes)
    return fulfilled * agreed / len(events)


def score(prompt: str, response: str, metadata: Any = None) -> float:
    """Returns what a response to the last user's turn is worth, 0 to 1: a rule reward."""
    del metadata
    request = read_request(prompt.rpartition("<|user|>")[2])
    return 0.0 if request is None else worth(request, response)


# ------------------------------------------------------------------ drawing


def draw_request(rng: random.Random) -> Request:
    """Returns a request with one to four wishes that can come true together."""
    first, second = rng.sample(PEOPLE, 2)
    thing = rng.choice(THINGS)
    possible = [
        Wish("takes", (first, rng.choice(COLORS), thing)),
        Wish("gets", (second, thing)),
        Wish("ends", (rng.choice((first, second)), rng.choice(PLACES))),
        Wish("feels", (rng.choice((first, second)), rng.choice(MOODS))),
    ]
    kept = sorted(rng.sample(range(len(possible)), rng.randint(1, len(possible))))
    return Request((first, second), tuple(possible[i] for i in kept))


def draw_story(
    rng: random.Random, request: Request, fulfilled: float, agreeing: float
) -> str:
    """Returns a story.

    Args:
      fulfilled: probability of each wish to be told.
      agreeing: probability of each sentence to agree with those before it.
    """
    world = World(request.people)
    events: list[Event] = []

    def tell(event: Event) -> None:
        if rng.random() > agreeing:
            event = _any_event(rng, rng.sample(PEOPLE, 2))
        world.follow(event)
        events.append(event)

    for wish in request.wishes:
        if len(events) < 3 and rng.random() < 1 / 3:
            tell(_filler(rng, world, request))
        if rng.random() < fulfilled and not world.fulfills(wish):
            for event in _steps(rng, world, wish):
                tell(event)
    while len(events) < 3:
        tell(_filler(rng, world, request))
    return " ".join(event.sentence() for event in events)


def _steps(rng: random.Random, world: World, wish: Wish) -> Iterator[Event]:
    """Yields the events that make a wish come true, as the world is when each is asked for."""
    person, *others = wish.words
    if wish.form == "takes":
        yield Event("took", wish.words)
    elif wish.form == "ends":
        yield Event("went", wish.words)
    elif wish.form == "feels":
        yield Event("was", wish.words)
    else:
        thing = others[0]
        other = next(each for each in world.people if each != person)
        if world.holder.get(thing) is None:
            yield Event(
                "took", (other, world.color.get(thing) or rng.choice(COLORS), thing)
            )
        if not world.are_together():
            place = world.place.get(other)
            mover, place = (person, place) if place else (other, world.place[person])
            yield Event("went", (mover, place))
        yield Event("gave", (other, thing, person))


def _filler(rng: random.Random, world: World, request: Request) -> Event:
    """Returns an event that can happen and that no wish is about."""
    words = {word for wish in request.wishes for word in wish.words}
    while True:
        event = _any_event(rng, world.people)
        about_wish = event.form in ("went", "was") and event.words[0] in words
        about_wish |= event.form == "took" and event.words[-1] in words
        if (
            not about_wish
            and event.form not in ("lost", "gave")
            and world.agrees(event)
        ):
            return event


def _any_event(rng: random.Random, people: Sequence[str]) -> Event:
    """Returns an event about two people, whether it can happen or not."""
    first, second = rng.sample(list(people), 2)
    thing, form = rng.choice(THINGS), rng.choice(list(FORMS))
    words = {
        "went": (first, rng.choice(PLACES)),
        "took": (first, rng.choice(COLORS), thing),
        "gave": (first, thing, second),
        "lost": (first, thing),
        "met": (first, second),
        "was": (first, rng.choice(MOODS)),
    }
    return Event(form, words[form])


# ------------------------------------------------------------------ files

DOCUMENTS, FORUM = 20_000, 30_000
CHATS = {"train": 12_000, "validation": 600, "test": 1_000}
# Writers of what a model is pretrained on: some are careful, and one writes all turns of a page.
WRITERS = (
    {"fulfilled": 0.95, "agreeing": 0.98},
    {"fulfilled": 0.5, "agreeing": 0.85},
    {"fulfilled": 0.1, "agreeing": 0.6},
)
LABELERS = {"fulfilled": 0.75, "agreeing": 0.95}  # what is written for fine-tuning
EXAMPLES = 2  # solved requests before a prompt, for a model that was only pretrained


def documents(rng: random.Random, rows: int) -> Iterator[dict[str, str]]:
    """Yields stories that nobody asked for."""
    for _ in range(rows):
        request = draw_request(rng)
        yield {"text": draw_story(rng, request, **rng.choice(WRITERS))}


def forum(rng: random.Random, rows: int) -> Iterator[dict[str, Any]]:
    """Yields pages of one to three requests and stories, each page by one writer."""
    for _ in range(rows):
        writer, turns = rng.choice(WRITERS), rng.randint(1, 1 + EXAMPLES)
        yield {"messages": [m for _ in range(turns) for m in turn(rng, writer)]}


def chats(rng: random.Random, rows: int) -> Iterator[dict[str, Any]]:
    """Yields conversations of a request and a story."""
    for _ in range(rows):
        yield {"messages": turn(rng, LABELERS)}


def prompted(rng: random.Random, rows: int) -> Iterator[dict[str, Any]]:
    """Yields the conversations of `chats`, each after examples of a careful writer."""
    solved = random.Random("examples")
    for row in chats(rng, rows):
        before = [m for _ in range(EXAMPLES) for m in turn(solved, WRITERS[0])]
        yield {"messages": before + row["messages"]}


def turn(rng: random.Random, writer: Mapping[str, float]) -> list[dict[str, str]]:
    """Returns a request and a writer's story as messages."""
    request = draw_request(rng)
    story = draw_story(rng, request, **writer)
    return [
        {"role": "user", "content": request.text()},
        {"role": "assistant", "content": story},
    ]


def main(folder: str) -> None:
    """Writes all files into a folder."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    rng = random.Random
    write_jsonl(path / "documents.jsonl", documents(rng("documents"), DOCUMENTS))
    write_jsonl(path / "forum.jsonl", forum(rng("forum"), FORUM))
    for split, rows in CHATS.items():
        write_jsonl(path / f"chats_{split}.jsonl", chats(rng(split), rows))
    rows = CHATS["test"]
    write_jsonl(path / "prompted_test.jsonl", prompted(rng("test"), rows))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m experiments.stories.world FOLDER")
    main(sys.argv[1])
