"""What is said about scenes: captions, instructions that change one, questions with answers.

Every `draw_*` function takes a `random.Random` and draws from one of two worlds that share no
combination of background, colours, shapes and counts: the one for training and the held-out one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random

from bagel_mot.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    MAX_THINGS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Kind,
    Scene,
    Thing,
    Wanted,
    is_held_out,
    place_things,
)

NUMBERS = ("zero", "one", "two", "three", "four", "five")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}


@dataclass(frozen=True)
class Caption:
    """A description, and what it asks of a picture.

    Attributes:
        text: the words.
        kinds: what there is, nothing else.
        background: None leaves it open.
        sizes: "small", "big" or None for each of `kinds`.
        place: of `PLACES`, for a caption of one thing; None leaves it open.
        relation: of `RELATIONS`, how the first of two things lies to the second; None likewise.
    """

    text: str
    kinds: tuple[Kind, ...]
    background: str | None = None
    sizes: tuple[str | None, ...] = ()
    place: str | None = None
    relation: str | None = None


@dataclass(frozen=True)
class Painting:
    """A caption and one scene that it describes."""

    caption: Caption
    scene: Scene


@dataclass(frozen=True)
class Edit:
    """An instruction, and a scene before and after.

    Attributes:
        task: recolour, remove, add or background.
        place: where an added thing belongs, of `PLACES`; None for the other tasks.
    """

    task: str
    text: str
    before: Scene
    after: Scene
    place: str | None = None


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Attributes:
        task: colour, shape, count, background, exists or describe.
        told: the scene in words, for a question without a picture; None for one with.
    """

    task: str
    text: str
    answer: str
    scene: Scene
    told: str | None = None

    @property
    def prompt(self) -> str:
        """All that is said, the scene in words included."""
        return self.text if self.told is None else f"{self.told}. {self.text}"


def draw_painting(
    random: Random, *, held_out: bool = False, size: tuple[int, int] | None = None
) -> Painting:
    """A caption with a scene.

    Args:
        held_out: from the combinations that training does not see.
        size: (height, width) in pixels; one of `SIZES` by chance if None.
    """
    while True:
        height, width = random.choice(SIZES) if size is None else size
        background = random.choice(list(BACKGROUNDS))
        kinds = _draw_kinds(random)
        if is_held_out(background, kinds) is not held_out:
            continue
        sizes, place, relation = _draw_arrangement(random, kinds)
        wanted = [
            Wanted(kind.colour, kind.shape, size_word, place)
            for kind, size_word in zip(kinds, sizes, strict=True)
            for _ in range(kind.count)
        ]
        things = place_things(random, height, width, wanted, relation=relation)
        if things is None:
            continue
        said_background = background if random.random() < 0.85 else None
        text = caption_text(kinds, said_background, sizes, place, relation)
        caption = Caption(
            _casual(random, text), tuple(kinds), said_background, sizes, place, relation
        )
        return Painting(caption, Scene(height, width, background, things))


def draw_edit(
    random: Random, *, held_out: bool = False, size: tuple[int, int] | None = None
) -> Edit:
    """An instruction that changes a scene.

    Args:
        held_out: the result is a combination that training does not see.
        size: as in `draw_painting`.
    """
    makers = (_recolour, _remove, _remove, _add, _add, _change_background)
    while True:
        before = draw_painting(random, size=size, held_out=held_out and random.random() < 0.5)
        edit = random.choice(makers)(random, before.scene)
        if edit is not None and edit.after.held_out is held_out:
            return replace(edit, text=_casual(random, edit.text))


def draw_question(
    random: Random,
    *,
    held_out: bool = False,
    size: tuple[int, int] | None = None,
    told: bool = False,
) -> Question:
    """A question about a scene.

    Args:
        held_out, size: as in `draw_painting`.
        told: the scene is described in words, not shown.
    """
    makers = [_ask_colour, _ask_shape, _ask_count, _ask_count, _ask_background, _ask_exists]
    if not told:
        makers.append(_ask_description)
    while True:
        scene = draw_painting(random, held_out=held_out, size=size).scene
        task, text, answer = random.choice(makers)(random, scene)
        if text:
            words = description(scene) if told else None
            return Question(task, _casual(random, text), answer, scene, words)


def caption_text(
    kinds: Sequence[Kind],
    background: str | None,
    sizes: Sequence[str | None] = (),
    place: str | None = None,
    relation: str | None = None,
) -> str:
    """The words of a caption; see `Caption`."""
    sizes = sizes or [None] * len(kinds)
    phrases = [noun_phrase(kind, size) for kind, size in zip(kinds, sizes, strict=True)]
    text = f" {relation} ".join(phrases) if relation else _listed(phrases)
    if place is not None:
        text += f" {place}"
    return text if background is None else f"{text} on a {background} background"


def description(scene: Scene) -> str:
    """The one caption of a scene that leaves out sizes and positions; kinds in a fixed order."""
    return caption_text(scene.kinds, scene.background)


def noun_phrase(kind: Kind, size: str | None = None) -> str:
    """ "a small red circle", "three red circles"."""
    words = [size, kind.colour, kind.shape if kind.count == 1 else PLURALS[kind.shape]]
    first = NUMBERS[kind.count]
    phrase = " ".join(word for word in words if word)
    if kind.count == 1:
        first = "an" if phrase[0] in "aeiou" else "a"
    return f"{first} {phrase}"


def _draw_kinds(random: Random) -> list[Kind]:
    """What a scene holds, in the order a caption says it."""
    counts = random.choice(
        ((1,), (1,), (1,), (1, 1), (1, 1), (1, 1), (2,), (3,), (4,), (2, 1), (2, 2), (1, 1, 1))
    )
    pairs: list[tuple[str, str]] = []
    while len(pairs) < len(counts):
        pair = (random.choice(list(COLOURS)), random.choice(SHAPES))
        if pair not in pairs:
            pairs.append(pair)
    return [Kind(*pair, count) for pair, count in zip(pairs, counts, strict=True)]


def _draw_arrangement(
    random: Random, kinds: Sequence[Kind]
) -> tuple[tuple[str | None, ...], str | None, str | None]:
    """Sizes, place and relation that the caption will name."""
    total = sum(kind.count for kind in kinds)
    sizes: tuple[str | None, ...] = (None,) * len(kinds)
    place = relation = None
    if total <= 2 and len(kinds) == total and random.random() < 0.4:
        sizes = tuple(random.choice(("small", "big", None)) for _ in kinds)
    if total == 1 and random.random() < 0.5:
        place = random.choice(list(PLACES))
    if len(kinds) == total == 2 and random.random() < 0.5:
        relation = random.choice(list(RELATIONS))
    return sizes, place, relation


def _recolour(random: Random, scene: Scene) -> Edit | None:
    kind = random.choice(scene.kinds)
    colour = random.choice([name for name in COLOURS if name != kind.colour])
    if any((other.colour, other.shape) == (colour, kind.shape) for other in scene.kinds):
        return None
    things = tuple(
        replace(thing, colour=colour) if _is(thing, kind) else thing for thing in scene.things
    )
    text = f"make the {_named(random, scene, kind)} {colour}"
    return Edit("recolour", text, scene, replace(scene, things=things))


def _remove(random: Random, scene: Scene) -> Edit | None:
    if len(scene.kinds) < 2:
        return None
    kind = random.choice(scene.kinds)
    things = tuple(thing for thing in scene.things if not _is(thing, kind))
    text = f"remove the {_named(random, scene, kind)}"
    return Edit("remove", text, scene, replace(scene, things=things))


def _add(random: Random, scene: Scene) -> Edit | None:
    if len(scene.things) >= MAX_THINGS - 1:
        return None
    place = random.choice(list(PLACES))
    wanted = Wanted(random.choice(list(COLOURS)), random.choice(SHAPES), None, place)
    if any((kind.colour, kind.shape) == (wanted.colour, wanted.shape) for kind in scene.kinds):
        return None
    added = place_things(random, scene.height, scene.width, [wanted], among=scene.things)
    if added is None:
        return None
    text = f"add {noun_phrase(Kind(wanted.colour, wanted.shape))} {place}"
    return Edit("add", text, scene, replace(scene, things=scene.things + added), place)


def _change_background(random: Random, scene: Scene) -> Edit | None:
    ground = random.choice([name for name in BACKGROUNDS if name != scene.background])
    text = f"make the background {ground}"
    return Edit("background", text, scene, replace(scene, background=ground))


def _ask_colour(random: Random, scene: Scene) -> tuple[str, str, str]:
    kinds = [kind for kind in scene.kinds if _only(scene, "shape", kind.shape)]
    if not kinds:
        return "colour", "", ""
    kind = random.choice(kinds)
    colour = random.choice(("colour", "color"))
    if kind.count == 1:
        return "colour", f"what {colour} is the {kind.shape}?", kind.colour
    return "colour", f"what {colour} are the {PLURALS[kind.shape]}?", kind.colour


def _ask_shape(random: Random, scene: Scene) -> tuple[str, str, str]:
    kinds = [k for k in scene.kinds if _only(scene, "colour", k.colour) and k.count == 1]
    if not kinds:
        return "shape", "", ""
    kind = random.choice(kinds)
    return "shape", f"what shape is {kind.colour}?", kind.shape


def _ask_count(random: Random, scene: Scene) -> tuple[str, str, str]:
    shapes = {kind.shape for kind in scene.kinds}
    form = random.random()
    if form < 0.2:
        return "count", "how many things are there?", NUMBERS[len(scene.things)]
    if form < 0.6:
        shape = random.choice(SHAPES if random.random() < 0.2 else sorted(shapes))
        count = sum(kind.count for kind in scene.kinds if kind.shape == shape)
        return "count", f"how many {PLURALS[shape]} are there?", NUMBERS[count]
    kind = random.choice(scene.kinds)
    colour = random.choice(list(COLOURS)) if random.random() < 0.2 else kind.colour
    count = sum(k.count for k in scene.kinds if (k.colour, k.shape) == (colour, kind.shape))
    return "count", f"how many {colour} {PLURALS[kind.shape]} are there?", NUMBERS[count]


def _ask_background(random: Random, scene: Scene) -> tuple[str, str, str]:
    colour = random.choice(("colour", "color"))
    return "background", f"what {colour} is the background?", scene.background


def _ask_exists(random: Random, scene: Scene) -> tuple[str, str, str]:
    kind = random.choice(scene.kinds)
    colour, shape = kind.colour, kind.shape
    if random.random() < 0.6:  # a thing that is not there, but often nearly
        if random.random() < 0.7:
            colour = random.choice(list(COLOURS))
        if colour == kind.colour or random.random() < 0.3:
            shape = random.choice(SHAPES)
    there = any((k.colour, k.shape) == (colour, shape) for k in scene.kinds)
    text = f"is there {noun_phrase(Kind(colour, shape))}?"
    return "exists", text, "yes" if there else "no"


def _ask_description(random: Random, scene: Scene) -> tuple[str, str, str]:
    return "describe", "describe the picture.", description(scene)


def _named(random: Random, scene: Scene, kind: Kind) -> str:
    """ "circle" where that is clear, else "red circle"; plural for several."""
    noun = kind.shape if kind.count == 1 else PLURALS[kind.shape]
    if _only(scene, "shape", kind.shape) and random.random() < 0.6:
        return noun
    return f"{kind.colour} {noun}"


def _only(scene: Scene, attribute: str, value: str) -> bool:
    """Whether one kind alone has this shape, or colour."""
    return sum(getattr(kind, attribute) == value for kind in scene.kinds) == 1


def _is(thing: Thing, kind: Kind) -> bool:
    return (thing.colour, thing.shape) == (kind.colour, kind.shape)


def _listed(phrases: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(part for part in (", ".join(phrases[:-1]), phrases[-1]) if part)


def _casual(random: Random, text: str) -> str:
    """As people type it: now and then with a capital or a full stop."""
    if random.random() < 0.15:
        text = text[0].upper() + text[1:]
    if text[-1].isalpha() and random.random() < 0.15:
        text += "."
    return text


def texts(random: Random, count: int) -> Iterable[str]:
    """A sample of everything that is said, to make a tokenizer from."""
    for _ in range(count):
        yield draw_painting(random).caption.text
        yield draw_edit(random).text
        question = draw_question(random)
        yield question.text
        yield question.answer
