"""Stories in a small world: requests for them, and what a story is worth.

A story is a few sentences about two people who go to places, take and give things, meet and have
moods. A request says what must happen in it. Whether a story tells that and nothing else, and
whether its sentences agree with each other, is decided by following it (`worth`): the gold reward
of the studies. No length and no word makes a story good, since what is asked for differs between
requests; a model has to read the request and to keep track of who is where and has what.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

PEOPLE = (
    "Anna", "Ben", "Clara", "David", "Emma", "Finn", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo",
    "Mary", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Will",
)  # fmt: skip
COLORS = ("red", "green", "blue", "white", "black", "brown", "yellow", "gray")
THINGS = ("ball", "cup", "book", "hat", "key", "lamp", "bag", "coat", "box", "ring")
PLACES = ("Berlin", "Cairo", "Delhi", "Lima", "Oslo", "Paris", "Rome", "Tokyo")
MOODS = ("happy", "sad", "tired", "angry", "hungry", "proud")
HOME = "home"  # where everybody is before the first step
MOST_SENTENCES = 8  # of a story; each further one counts as one that does not agree

FORMS = {
    "went": re.compile(r"(\w+) went to (\w+)\."),
    "took": re.compile(r"(\w+) took a (\w+) (\w+)\."),
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
            "went": "{} went to {}.",
            "took": "{} took a {} {}.",
            "gave": "{} gave the {} to {}.",
            "lost": "{} lost the {}.",
            "met": "{} met {}.",
            "was": "{} was {}.",
        }
        return texts[self.form].format(*self.words)


class Wish(NamedTuple):
    """What a request asks for."""

    form: str  # a key of WISHES
    words: tuple[str, ...]

    def sentence(self) -> str:
        texts = {
            "takes": "{} took a {} {}.",
            "gets": "{} had the {}.",
            "meets": "{} met {}.",
            "ends": "{} went to {}.",
            "feels": "{} was {}.",
        }
        return texts[self.form].format(*self.words)


# The words of a request are those of a story, and the word before one tells its kind, so that small
# models can learn to use them: a color stands behind "a", a place behind "to".
WISHES = {
    "takes": re.compile(r"(\w+) took a (\w+) (\w+)\."),
    "gets": re.compile(r"(\w+) had the (\w+)\."),
    "meets": FORMS["met"],
    "ends": re.compile(r"(\w+) went to (\w+)\."),
    "feels": re.compile(r"(\w+) was (\w+)\."),
}
ABOUT = re.compile(r"Tell a story about (\w+) and (\w+)\.")


class Request(NamedTuple):
    """The people of a story, and what must happen."""

    people: tuple[str, str]
    wishes: tuple[Wish, ...]

    def text(self) -> str:
        about = "Tell a story about {} and {}.".format(*self.people)
        return " ".join([about, *(wish.sentence() for wish in self.wishes)])

    def asks_for(self, event: Event) -> bool:
        """Returns whether an event fulfills a wish, or is a step towards it."""
        return any(_leads_to(event, wish) for wish in self.wishes)


def _leads_to(event: Event, wish: Wish) -> bool:
    if wish.form == "gets":
        person, thing = wish.words
        taken = event.form == "took" and event.words[-1] == thing
        return taken or (event.form == "gave" and event.words[1:] == (thing, person))
    if wish.form == "meets":
        return event.form == "met"
    form = {"takes": "took", "ends": "went", "feels": "was"}[wish.form]
    return event == Event(form, wish.words)


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
        if wish.form == "meets":
            return any(event.form == "met" for event in self.events)
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
    """Returns the share of the wishes that come true, times the share of sentences that serve them.

    A sentence serves if it can be read, is about the people of the request, can happen after what
    was told before, and is asked for; sentences after the eighth do not. An empty story is worth 0.
    Without the last condition length alone was right on 63 % of the pairs, since a longer story
    fulfills more, and words such as "gave" on 68 %.
    """
    events = read_story(story)
    if not events or not request.wishes:
        return 0.0
    world = World(request.people)
    told = events[:MOST_SENTENCES]
    served = sum(
        event is not None and world.follow(event) and request.asks_for(event)
        for event in told
    )
    fulfilled = sum(map(world.fulfills, request.wishes)) / len(request.wishes)
    return fulfilled * served / len(events)


def score(prompt: str, response: str) -> float:
    """Returns what a response to the last user's turn is worth, 0 to 1.

    Args:
      prompt: with our chat markers.
    """
    request = read_request(prompt.rpartition("<|user|>")[2])
    return 0.0 if request is None else worth(request, response)
