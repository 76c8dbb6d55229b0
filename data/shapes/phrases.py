"""Phrases that name one object of a scene: what they mean, how they are worded, and how they are drawn."""

import math
import random
from collections.abc import Iterator

from .scenes import FAMILIES, FAMILY_WEIGHTS, HELD_OUT, Description, Expression, Phrase, Scene, SceneObject

MIN_VISIBLE_AREA = 0.012  # of the image; no phrase names an object that shows less
MIN_COVER, NO_COVER = 0.004, 0.0005  # of the image, hidden by another object: clearly in front, clearly not
BORDER_MARGIN, ORDER_GAP, RELATION_OFFSET = 0.03, 0.06, 0.1  # of the image's side
DISTANCE_RATIO, AREA_RATIO, RADIUS_RATIO = 1.3, 1.3, 1.12  # between the object that is named and the next one
MAX_WORDS = 10

# --- what phrases mean ------------------------------------------------------------------------------------------

_LOW, _HIGH, _MIDDLE, _ANY = (-math.inf, 0.4), (0.6, math.inf), (0.35, 0.65), (-math.inf, math.inf)
PLACES = {  # where the centre lies, across and down, as shares of the image's side
    "left": (_LOW, _ANY),
    "right": (_HIGH, _ANY),
    "top": (_ANY, _LOW),
    "bottom": (_ANY, _HIGH),
    "middle": (_MIDDLE, _MIDDLE),
    "top left": (_LOW, _LOW),
    "top right": (_HIGH, _LOW),
    "bottom left": (_LOW, _HIGH),
    "bottom right": (_HIGH, _HIGH),
}
# The way one counts from a side, across and down; and where one stands beside another, likewise.
DIRECTIONS = {"left": (1, 0), "right": (-1, 0), "top": (0, 1), "bottom": (0, -1)}
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
RELATIONS = (*SIDES, "in front of", "behind", "closest to")
EXTREMES = {"leftmost": "left", "rightmost": "right", "topmost": "top", "bottommost": "bottom"}
SUPERLATIVES = ("largest", "smallest", *EXTREMES)


def referents(expression: Expression, scene: Scene) -> list[int]:
    """Indices of the objects that the expression describes; none, too, where an object stands within a margin."""
    things, family, word = scene.objects, expression.family, expression.word
    fitting = [i for i, thing in enumerate(things) if expression.target.fits(thing)]
    if family == "attribute":
        return fitting
    if family == "relation":
        anchors = [i for i, thing in enumerate(things) if expression.anchor.fits(thing)]
        if len(anchors) != 1:
            return []
        anchor = anchors[0]
        fitting = [i for i in fitting if i != anchor]
    if family == "position" or family == "relation" and word != "closest to":
        if family == "position":
            verdicts = [_is_at_place(word, things[i], scene.image_size) for i in fitting]
        else:
            verdicts = [_is_related(word, i, anchor, scene) for i in fitting]
        return [] if None in verdicts else [i for i, verdict in zip(fitting, verdicts) if verdict]
    if len(fitting) < 2:  # all that follows compares objects with each other
        return []
    if family == "relation":
        there = things[anchor].x, things[anchor].y
        distances = {i: math.log(math.dist((things[i].x, things[i].y), there) + 1e-6) for i in fitting}
        return _object_at_rank(distances, 1, math.log(DISTANCE_RATIO))
    if word in ("largest", "smallest"):
        sign = -1 if word == "largest" else 1
        areas = {i: sign * math.log(things[i].visible_area) for i in fitting}
        radii = {i: sign * math.log(things[i].radius) for i in fitting}
        by_area = _object_at_rank(areas, 1, math.log(AREA_RATIO))
        by_radius = _object_at_rank(radii, 1, math.log(RADIUS_RATIO))
        return by_area if by_area == by_radius else []
    places = {i: _position_along(EXTREMES.get(word, word), things[i]) for i in fitting}
    return _object_at_rank(places, expression.rank or 1, ORDER_GAP * scene.image_size)


def _is_at_place(word: str, thing: SceneObject, image_size: int) -> bool | None:
    """Whether an object stands where a word of `PLACES` says; `None` if people could disagree."""
    across, down = PLACES[word]
    verdicts = _is_within(thing.x / image_size, *across), _is_within(thing.y / image_size, *down)
    return False if False in verdicts else None if None in verdicts else True


def _is_within(value: float, low: float, high: float) -> bool | None:
    """Whether `value` lies in the interval; `None` if it lies within the margin of one of its borders."""
    if low + BORDER_MARGIN <= value <= high - BORDER_MARGIN:
        return True
    return False if value < low - BORDER_MARGIN or value > high + BORDER_MARGIN else None


def _is_related(word: str, index: int, anchor: int, scene: Scene) -> bool | None:
    """Whether object `index` and the anchor stand as a word of `RELATIONS` says; `None` if people could disagree."""
    if word in SIDES:
        one, other = scene.objects[index], scene.objects[anchor]
        x, y = (one.x - other.x) / scene.image_size, (one.y - other.y) / scene.image_size
        along = x * SIDES[word][0] + y * SIDES[word][1]
        aside = abs(x * SIDES[word][1]) + abs(y * SIDES[word][0])
        if along >= max(RELATION_OFFSET, aside):
            return True
        return False if along <= -BORDER_MARGIN else None
    front, back = (index, anchor) if word == "in front of" else (anchor, index)
    share = scene.covers[front][back] / scene.image_size**2
    return True if share >= MIN_COVER else False if share <= NO_COVER else None


def _position_along(word: str, thing: SceneObject) -> float:
    """How far away from a side of the image an object stands, in pixels up to a constant."""
    across, down = DIRECTIONS[word]
    return across * thing.x + down * thing.y


def _object_at_rank(values: dict[int, float], rank: int, gap: float) -> list[int]:
    """The object whose value is the `rank`-th smallest; none if another value is nearer to it than `gap`."""
    order = sorted(values, key=values.get)
    neighbours = zip(order[max(0, rank - 2) : rank], order[max(0, rank - 2) + 1 : rank + 1])
    if rank > len(order) or any(values[after] - values[before] < gap for before, after in neighbours):
        return []
    return [order[rank - 1]]


# --- how phrases are worded -------------------------------------------------------------------------------------

NOUNS = ("object", "one", "shape", "thing")
SYNONYMS = {"large": ("large", "big"), "small": ("small", "little"), "dotted": ("dotted", "spotted")}
TEXTURE_TAILS = {"striped": "with stripes", "dotted": "with dots"}
_SIDE_WORDINGS = ("{side} {target}", "{target} on the {side}", "{target} on {side}", "{target} on the {side} side")
_END_WORDINGS = ("{side} {target}", "{target} at the {side}", "{target} at {side}")
_CORNER_WORDINGS = ("{side} {target}", "{target} in the {side} corner", "{target} on the {side}", "{target} {side}")
WORDINGS = {
    ("position", "left"): _SIDE_WORDINGS,
    ("position", "right"): _SIDE_WORDINGS,
    ("position", "top"): _END_WORDINGS,
    ("position", "bottom"): _END_WORDINGS,
    ("position", "middle"): ("{target} in the middle of the image", "{target} in the center", "center {target}"),
    ("relation", "left of"): ("{target} left of {anchor}", "{target} to the left of {anchor}"),
    ("relation", "right of"): ("{target} right of {anchor}", "{target} to the right of {anchor}"),
    ("relation", "above"): ("{target} above {anchor}",),
    ("relation", "below"): ("{target} below {anchor}",),
    ("relation", "in front of"): ("{target} in front of {anchor}", "{target} covering {anchor}"),
    ("relation", "behind"): ("{target} behind {anchor}", "{target} partly behind {anchor}"),
    ("relation", "closest to"): ("{target} closest to {anchor}", "{target} nearest to {anchor}"),
    ("superlative", "largest"): ("largest {target}", "biggest {target}"),
    ("superlative", "smallest"): ("smallest {target}",),
    ("superlative", "leftmost"): ("leftmost {target}", "{target} farthest left", "{target} furthest to the left"),
    ("superlative", "rightmost"): ("rightmost {target}", "{target} farthest right", "{target} furthest to the right"),
    ("superlative", "topmost"): ("topmost {target}", "highest {target}"),
    ("superlative", "bottommost"): ("lowest {target}", "bottommost {target}"),
}
RANK_WORDS = {1: "first", 2: "second", 3: "third"}


def _word_expression(rng: random.Random, expression: Expression) -> str:
    """One of the phrases that have this meaning."""
    family, word = expression.family, expression.word
    target = _word_description(rng, expression.target, tails=family == "attribute")
    if family == "attribute":
        text = target
    elif family == "ordinal":
        text = f"{RANK_WORDS[expression.rank]} {target} from {rng.choice(('the ', 'the ', ''))}{word}"
    else:
        anchor = ""
        if expression.anchor:
            anchor = rng.choice(("the ", "the ", "the ", "")) + _word_description(rng, expression.anchor)
        side = word
        if " " in word and family == "position":
            side = word.replace("top", rng.choice(("top", "upper"))).replace("bottom", rng.choice(("bottom", "lower")))
        template = rng.choice(WORDINGS.get((family, word), _CORNER_WORDINGS))
        text = template.format(target=target, anchor=anchor, side=side)
    return f"the {text}" if rng.random() < 0.35 else text


def _word_description(rng: random.Random, description: Description, tails: bool = False) -> str:
    """A phrase such as "small striped red star", with `tails` sometimes "small red star with stripes"."""
    tail = TEXTURE_TAILS.get(description.texture) if tails and rng.random() < 0.4 else None
    words = [
        rng.choice(SYNONYMS.get(attribute, (attribute,)))
        for attribute in (description.size, None if tail else description.texture, description.color)
        if attribute
    ]
    words.append(description.shape or rng.choice(NOUNS))
    return " ".join(words + ([tail] if tail else []))


# --- which phrases are drawn ------------------------------------------------------------------------------------

# The chances that a phrase says shape, colour, texture and size of its target, by family, and of a relation's anchor.
CHANCES_TO_BE_SAID = {
    "attribute": (0.85, 0.6, 0.3, 0.35),
    "position": (0.75, 0.35, 0.1, 0.1),
    "relation": (0.7, 0.25, 0.1, 0.1),
    "superlative": (0.55, 0.25, 0.1, 0.0),
    "ordinal": (0.5, 0.2, 0.1, 0.05),
    "anchor": (0.8, 0.7, 0.1, 0.1),
}


def draw_phrases(rng: random.Random, scene: Scene, index: int, split: str) -> tuple[Phrase, ...]:
    """One to three phrases that name object `index` and nothing else; none if it is not to be referred to."""
    thing = scene.objects[index]
    if thing.visible_area < MIN_VISIBLE_AREA * scene.image_size**2:
        return ()
    if split == "unseen" and (thing.color, thing.shape) not in HELD_OUT:
        return ()
    wanted = rng.choices((1, 2, 3), (0.2, 0.35, 0.45))[0]
    phrases: dict[str, Phrase] = {}
    for _ in range(4 * wanted):
        if len(phrases) == wanted:
            break
        family = rng.choices(FAMILIES, FAMILY_WEIGHTS[split])[0]
        for _ in range(4):
            proposals = _propose_expressions(rng, scene, index, family)
            expression = next((e for e in proposals if referents(e, scene) == [index]), None)
            if expression:
                text = _word_expression(rng, expression)
                if len(text.split()) <= MAX_WORDS:
                    phrases.setdefault(text.removeprefix("the "), Phrase(text, expression))
                break
    return tuple(phrases.values())


def _propose_expressions(rng: random.Random, scene: Scene, index: int, family: str) -> Iterator[Expression]:
    """Expressions of the family that may mean object `index`: one description of it, with each fitting word in random
    order."""
    thing, size = scene.objects[index], scene.image_size
    target = _describe(rng, thing, family)
    alike = [other for other in scene.objects if target.fits(other)]
    if family == "attribute":
        if target != Description():
            yield Expression(family, target)
    elif family == "position":
        places = [place for place in PLACES if _is_at_place(place, thing, size)]
        yield from (Expression(family, target, place) for place in rng.sample(places, len(places)))
    elif family == "relation":
        other = rng.choice([i for i in range(len(scene.objects)) if i != index])
        anchor = _describe(rng, scene.objects[other], "anchor")
        needed = len(alike) > 1 + target.fits(scene.objects[other])  # the attributes alone name several objects
        if anchor != Description() and (needed or rng.random() < 0.5):
            words = [word for word in RELATIONS if word == "closest to" or _is_related(word, index, other, scene)]
            yield from (Expression(family, target, word, anchor) for word in rng.sample(words, len(words)))
    elif len(alike) > 1 and family == "superlative":
        yield from (Expression(family, target, word) for word in rng.sample(SUPERLATIVES, len(SUPERLATIVES)))
    elif len(alike) > 1:
        for word in rng.sample(tuple(DIRECTIONS), len(DIRECTIONS)):
            rank = 1 + sum(_position_along(word, other) < _position_along(word, thing) for other in alike)
            if rank in RANK_WORDS:
                yield Expression(family, target, word, rank=rank)


def _describe(rng: random.Random, thing: SceneObject, role: str) -> Description:
    """Some attributes of an object, drawn by the chances of its role, which is a family or "anchor"."""
    shape, color, texture, size = (rng.random() < chance for chance in CHANCES_TO_BE_SAID[role])
    return Description(
        thing.shape if shape else None,
        thing.color if color else None,
        thing.texture if texture else None,
        thing.size if size and thing.size != "medium" else None,
    )
