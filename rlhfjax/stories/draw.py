"""Draws requests, and stories of careful and of careless writers, from a random.Random."""

import random
from collections.abc import Iterator, Mapping, Sequence

from rlhfjax.stories.world import (
    COLORS,
    FORMS,
    MOODS,
    PEOPLE,
    PLACES,
    THINGS,
    Event,
    Request,
    Wish,
    World,
)

# Writers of what a model is pretrained on: some are careful, and one writes all turns of a page.
WRITERS = (
    {"fulfilled": 0.95, "agreeing": 0.98, "fillers": 0.05, "omitted": 0.2},
    {"fulfilled": 0.5, "agreeing": 0.85, "fillers": 0.4, "omitted": 0.2},
    {"fulfilled": 0.1, "agreeing": 0.6, "fillers": 0.7, "omitted": 0.2},
)
# Of what is written for fine-tuning. Half of the wishes are misread, and nearly none left out:
# stories for one request have the same length and verbs, and differ in names, things and places.
# Length is right on 51 % of their pairs, and a vote of the ten best words on 52 %.
LABELERS = {"fulfilled": 0.5, "agreeing": 1.0, "fillers": 0.0, "omitted": 0.05}
ECHOES = 1 / 2  # share of a forum's turns that repeat a story or words
WORDS = (*PEOPLE, *COLORS, *THINGS, *PLACES, *MOODS)
EXAMPLES = 2  # solved requests before a prompt, for a model that was only pretrained


def draw_request(rng: random.Random) -> Request:
    """Returns a request with one to four of five wishes that can come true together."""
    first, second = rng.sample(PEOPLE, 2)
    thing = rng.choice(THINGS)
    possible = [
        Wish("takes", (first, rng.choice(COLORS), thing)),
        Wish("gets", (second, thing)),
        Wish("meets", (first, second)),
        Wish("ends", (rng.choice((first, second)), rng.choice(PLACES))),
        Wish("feels", (rng.choice((first, second)), rng.choice(MOODS))),
    ]
    kept = sorted(rng.sample(range(len(possible)), rng.randint(1, 4)))
    return Request((first, second), tuple(possible[i] for i in kept))


def draw_story(
    rng: random.Random,
    request: Request,
    fulfilled: float,
    agreeing: float,
    fillers: float,
    omitted: float = 0.0,
) -> str:
    """Returns a story.

    Args:
      fulfilled: probability of each wish to be told as it is, and not with a mistake.
      agreeing: probability of each sentence to agree with those before it.
      fillers: probability, before each wish and at the end, of a sentence that nobody asked for.
      omitted: share of the wishes that are not told as they are to leave out.
    """
    world = World(request.people)
    events: list[Event] = []

    def tell(event: Event) -> None:
        if rng.random() > agreeing:
            event = _any_event(rng, rng.sample(PEOPLE, 2))
        world.follow(event)
        events.append(event)

    for wish in request.wishes:
        if rng.random() < fillers:
            tell(_filler(rng, world, request))
        told = wish
        if rng.random() >= fulfilled:
            told = _mistaken(rng, wish, request, omitted)
        if told is not None and not world.fulfills(told):
            for event in _steps(rng, world, told):
                tell(event)
    if not events or rng.random() < fillers:
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
    elif wish.form == "meets":
        yield Event("met", wish.words)
    else:
        thing = others[0]
        other = next(each for each in world.people if each != person)
        if world.holder.get(thing) is None:
            yield Event(
                "took", (other, world.color.get(thing) or rng.choice(COLORS), thing)
            )
        yield Event("gave", (other, thing, person))


def _mistaken(
    rng: random.Random, wish: Wish, request: Request, omitted: float
) -> Wish | None:
    """Returns the wish with a wrong word or person, or None: it is left out."""
    person, *others = wish.words
    if rng.random() < omitted:
        return None
    if wish.form == "meets":  # somebody whom nobody asked for
        strangers = [each for each in PEOPLE if each not in request.people]
        return Wish(wish.form, (person, rng.choice(strangers)))
    kinds = {"takes": COLORS, "gets": THINGS, "ends": PLACES, "feels": MOODS}[wish.form]
    changed = list(wish.words)
    if rng.random() < 1 / 2:  # the other person
        changed[0] = next(each for each in request.people if each != person)
    else:
        changed[1] = rng.choice([word for word in kinds if word != others[0]])
    return Wish(wish.form, tuple(changed))


def _filler(rng: random.Random, world: World, request: Request) -> Event:
    """Returns an event that can happen, that no wish is about, and that keeps none from coming
    true.
    """
    words = {word for wish in request.wishes for word in wish.words}
    together = any(wish.form in ("gets", "meets") for wish in request.wishes)
    while True:
        event = _any_event(rng, world.people)
        about_wish = event.form in ("went", "was") and event.words[0] in words
        about_wish |= event.form == "took" and event.words[-1] in words
        separates = event.form == "went" and together
        if about_wish or separates or request.asks_for(event):
            continue
        if event.form not in ("lost", "gave") and world.agrees(event):
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


def turn(rng: random.Random, writer: Mapping[str, float]) -> list[dict[str, str]]:
    """Returns a request and a writer's story as messages."""
    request = draw_request(rng)
    story = draw_story(rng, request, **writer)
    return [
        {"role": "user", "content": request.text()},
        {"role": "assistant", "content": story},
    ]


def echo(rng: random.Random, writer: Mapping[str, float]) -> list[dict[str, str]]:
    """Returns messages that ask for a story again, or for words without order, word by word.

    They teach to use what stands in a prompt. From requests alone a small model learns that late,
    and from stories it learns it for one kind of word after the other.
    """
    if rng.random() < 3 / 4:
        text = " ".join(rng.sample(WORDS, rng.randint(6, 18)))
    else:
        text = draw_story(rng, draw_request(rng), **writer)
    return [
        {"role": "user", "content": f"Tell it again. {text}"},
        {"role": "assistant", "content": text},
    ]
