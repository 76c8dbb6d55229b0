"""A synthetic referring set drawn from a seed: the project's embedded default. Look at it with

    python -m data.shapes --output shapes.png

A scene holds two to four textured shapes, some of them partly hidden, and phrases that name one object each. What a
phrase means is an `Expression`; `referents` says which objects of a scene fit it, and a phrase is used only when that
is exactly one object. All borders have margins, and a phrase is dropped when any object that matters stands within
one, so that reasonable readings agree. With S the side of the image, in pixels:

* attribute ("small striped star"): the only object with these attributes. Middle sizes are neither small nor large.
* position ("circle on the left"): the only circle whose centre lies in the left 40 % of the image (right, top and
  bottom alike; corners are two of them at once; the middle is the square from 0.35 S to 0.65 S), and no circle's
  centre lies within 0.03 S of that border. The circle on the left is therefore the leftmost circle too.
* relation ("star left of the green circle"): the only star whose centre lies left of the anchor's by 0.1 S or more,
  within 45° of that direction. In front of and behind: one hides at least 0.4 % of the image of the other.
  Closest to: by centres, others at least 1.3 times as far.
* superlative ("largest circle", "leftmost object"): by visible area and by radius, 1.3 and 1.12 times the next;
  by centre, 0.06 S from the next.
* ordinal ("second circle from the left"): by centre, 0.06 S from its neighbours in that order.

Colour and shape pairs in `HELD_OUT` appear in the split `unseen` only, and every object referred to there is of one.
"""

import argparse
import colorsys
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import cv2
import datasets
import numpy as np
import pyarrow as pa
from datasets.fingerprint import Hasher
from PIL import Image, ImageDraw, ImageFont

from .records import FEATURES

DEFAULT_SIZES = {"train": 4000, "val": 250, "testA": 200, "testB": 200, "unseen": 150}  # images
FAMILIES = ("attribute", "position", "relation", "superlative", "ordinal")
# How often each family is tried. Some fit more rarely than others: the shares that come out are near RefCOCO's,
# about 45, 25, 12, 10 and 8 %.
_ALL = (0.45, 0.23, 0.16, 0.10, 0.06)
FAMILY_WEIGHTS = {
    "train": _ALL,
    "val": _ALL,
    "testA": (0.64, 0.36, 0, 0, 0),
    "testB": (0, 0, 0.50, 0.30, 0.20),
    "unseen": _ALL,
}

COLORS = {  # hue in degrees, saturation, value
    "red": (0, 0.88, 0.86),
    "yellow": (54, 0.88, 0.96),
    "green": (130, 0.80, 0.62),
    "blue": (220, 0.85, 0.88),
    "white": (0, 0.0, 0.97),
    "black": (0, 0.0, 0.08),
}
TEXTURES = ("plain", "striped", "dotted")
TEXTURE_PERIOD = 6.5  # pixels of an image of side 96
RADII = {"small": (13.0, 15.0), "medium": (18.0, 20.5), "large": (25.0, 27.5)}  # pixels of an image of side 96
HELD_OUT = {
    ("red", "star"),
    ("yellow", "ring"),
    ("green", "triangle"),
    ("blue", "cross"),
    ("white", "square"),
    ("black", "circle"),
}

MIN_IMAGE_SIZE = 48
MAX_IMAGES, ID_STRIDE = 10**7, 10  # room for ids: of images in a split, of objects in an image
REFERENCE_SIZE = 96
MIN_OBJECTS, OBJECT_COUNT_WEIGHTS = 2, (0.35, 0.40, 0.25)  # how often a scene has two objects, three, four
MAX_OBJECTS = MIN_OBJECTS + len(OBJECT_COUNT_WEIGHTS) - 1
MAX_OBJECT_SCALE = 1.25  # the largest star just fits into the image
MIN_VISIBLE_SHARE = 0.6  # of an object's own pixels
MIN_VISIBLE_AREA = 0.012  # of the image; below that an object is not referred to
MIN_COVER, NO_COVER = 0.004, 0.0005  # of the image: clearly in front, clearly not
BORDER_MARGIN = 0.03
ORDER_GAP = 0.06
RELATION_OFFSET = 0.1
DISTANCE_RATIO, AREA_RATIO, RADIUS_RATIO = 1.3, 1.3, 1.12
MAX_WORDS = 10
SUPERSAMPLING, SUBPIXEL_BITS = 4, 4
HALF = 128  # in 255ths: a pixel belongs to an object that covers half of it


class Description(NamedTuple):
    """Attributes that an object must have; `None` leaves one open."""

    shape: str | None = None
    color: str | None = None
    texture: str | None = None
    size: str | None = None

    def fits(self, thing: "SceneObject") -> bool:
        return (
            self.shape in (None, thing.shape)
            and self.color in (None, thing.color)
            and self.texture in (None, thing.texture)
            and self.size in (None, thing.size)
        )


class Expression(NamedTuple):
    """What a phrase means: the target's attributes and, but for the family "attribute", a condition on its place.

    `word` is a key of `PLACES`, `RELATIONS`, `SUPERLATIVES` or `DIRECTIONS`, as the family has it; `anchor` describes
    a relation's other object; `rank` counts an ordinal from 1.
    """

    family: str
    target: Description
    word: str = ""
    anchor: Description | None = None
    rank: int = 0


class Phrase(NamedTuple):
    text: str
    expression: Expression


@dataclass(frozen=True)
class SceneObject:
    """One shape. `x, y` is its centre and `radius` that of a disc of equal outer area over 0.75, in pixels; `angle`
    and `grain` turn the outline and the texture, in radians; `visible_area` counts the pixels that show it."""

    shape: str
    color: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    grain: float
    rgb: tuple[float, float, float]
    visible_area: int = 0


@dataclass(frozen=True)
class Scene:
    """Objects from back to front. `covers[i][j]` counts the pixels where object `i` shows and hides object `j`;
    `phrases[i]` are those that name object `i`, none when it is not referred to; `key` seeds what is left to chance in
    the picture."""

    key: str
    image_size: int
    objects: tuple[SceneObject, ...]
    covers: tuple[tuple[int, ...], ...]
    phrases: tuple[tuple[Phrase, ...], ...] = ()


# --- shapes and pixels ------------------------------------------------------------------------------------------


def _polygon(corners: int, inner: float = 1.0) -> np.ndarray:
    turns = np.arange(corners) / corners * 2 * np.pi - np.pi / 2
    return np.stack([np.cos(turns), np.sin(turns)], 1) * np.where(np.arange(corners) % 2, inner, 1.0)[:, None]


def _outlines() -> dict[str, list[np.ndarray]]:
    """Closed polygons (corners, 2) of each shape, its bounding box centred on 0 and its outer area 0.75 π."""
    arm = 0.36
    cross = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
    outer = {
        "circle": _polygon(48),
        "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
        "triangle": _polygon(3),
        "star": _polygon(10, inner=0.45),
        "cross": np.array(cross + [(-x, -y) for x, y in cross]),
        "ring": _polygon(48),
    }
    outlines = {}
    for shape, points in outer.items():
        points = points - (points.max(0) + points.min(0)) / 2
        following = np.roll(points, -1, 0)
        area = abs(np.sum(points[:, 0] * following[:, 1] - points[:, 1] * following[:, 0])) / 2
        outlines[shape] = [points * math.sqrt(0.75 * math.pi / area)]
    outlines["ring"].append(outlines["ring"][0] * 0.52)
    return outlines


OUTLINES = _outlines()
SHAPES = tuple(OUTLINES)
REACH = {shape: float(np.linalg.norm(polygons[0], axis=1).max()) for shape, polygons in OUTLINES.items()}
MAX_TILT = {"circle": 0.0, "ring": 0.0, "star": 0.6, "square": 0.2}  # radians; 0.3 for the rest


def _coverage(thing: SceneObject, image_size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """A window of the image around the object (with room for its shadow) and the share of each pixel it covers."""
    reach = thing.radius * REACH[thing.shape] + image_size / 24
    left, top = max(0, int(thing.x - reach)), max(0, int(thing.y - reach))
    right, bottom = min(image_size, int(thing.x + reach) + 1), min(image_size, int(thing.y + reach) + 1)
    cosine, sine = math.cos(thing.angle) * thing.radius, math.sin(thing.angle) * thing.radius
    turn = np.array([[cosine, sine], [-sine, cosine]])
    origin = np.array([thing.x - left, thing.y - top])
    # OpenCV counts from the middle of the first pixel.
    polygons = [
        np.rint((((points @ turn + origin) * SUPERSAMPLING) - 0.5) * 2**SUBPIXEL_BITS).astype(np.int32)
        for points in OUTLINES[thing.shape]
    ]
    canvas = np.zeros(((bottom - top) * SUPERSAMPLING, (right - left) * SUPERSAMPLING), np.uint8)
    cv2.fillPoly(canvas, polygons, 255, shift=SUBPIXEL_BITS)
    cv2.polylines(canvas, polygons, True, 127, shift=SUBPIXEL_BITS)  # else the outline would be filled on both sides
    coverage = cv2.resize(canvas, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
    return (slice(top, bottom), slice(left, right)), coverage


def _silhouette(thing: SceneObject, image_size: int) -> np.ndarray:
    mask = np.zeros((image_size, image_size), bool)
    window, coverage = _coverage(thing, image_size)
    mask[window] = coverage >= HALF
    return mask


def _texture(thing: SceneObject, window: tuple[slice, slice], unit: float) -> np.ndarray | float:
    """How much of the second tone each pixel of the window shows, 0 … 1; soft at the edges."""
    if thing.texture == "plain":
        return 0.0
    y, x = (np.arange(side.start, side.stop, dtype=np.float32) + 0.5 for side in window)
    period = TEXTURE_PERIOD * unit
    cosine, sine = math.cos(thing.grain) * 2 * math.pi / period, math.sin(thing.grain) * 2 * math.pi / period
    x, y = (x - thing.x)[None], (y - thing.y)[:, None]
    across, along = np.cos(x * cosine + y * sine), np.cos(y * cosine - x * sine)
    field = {"striped": across, "dotted": across + along - 0.6}[thing.texture]
    return np.clip(field * (1.6 * unit) + 0.5, 0, 1)  # (h, w)


def _second_tone(rgb: np.ndarray) -> np.ndarray:
    """Lighter for dark colours, darker for light ones, far enough to be seen and near enough to keep the name."""
    luminance = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    if luminance < 40:
        return rgb + 85
    return rgb * 0.45 if luminance > 140 else rgb + (255 - rgb) * 0.62


def _background(rng: random.Random, image_size: int) -> np.ndarray:
    """A dim, slightly coloured picture: a gradient, blotches or grain, with stripes, checks or neither.
    (3, S, S) float32."""
    noise = np.random.default_rng(rng.getrandbits(64))
    grey = rng.uniform(90, 160)
    base = np.array([grey + rng.uniform(-22, 22) for _ in range(3)], np.float32)
    cells = rng.choice((2, 2, 5, 8, 24))
    grid = base + noise.uniform(-1, 1, (cells, cells, 3)).astype(np.float32) * (20 if cells < 20 else 12)
    picture = cv2.resize(grid, (image_size, image_size), interpolation=cv2.INTER_LINEAR)
    picture = np.ascontiguousarray(picture.transpose(2, 0, 1))
    pattern = rng.choice(("none", "stripes", "checks"))
    if pattern != "none":
        turn, frequency = rng.uniform(0, math.pi), 2 * math.pi / (rng.uniform(0.07, 0.3) * image_size)
        side = np.arange(image_size, dtype=np.float32) * frequency
        wave = np.sin(side * math.cos(turn) + side[:, None] * math.sin(turn))
        if pattern == "checks":
            wave *= np.sin(side[:, None] * math.cos(turn) - side * math.sin(turn))
        for plane in picture:
            plane += wave * rng.uniform(4, 13)
    return picture


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene: the image (S, S, 3) uint8 RGB, and labels (S, S) uint8, 0 for background and `i + 1` where object
    `i` shows."""
    rng = random.Random(f"{scene.key}/pixels")
    size, unit = scene.image_size, scene.image_size / REFERENCE_SIZE
    picture = _background(rng, size)  # (3, S, S): arithmetic with (S, S) is several times faster than channels last
    labels = np.zeros((size, size), np.uint8)
    softness = 2 * round(1.5 * unit) + 1
    for index, thing in enumerate(scene.objects):
        window, coverage = _coverage(thing, size)
        labels[window][coverage >= HALF] = index + 1
        alpha = coverage * np.float32(1 / 255)  # (h, w)
        shadow = cv2.blur(alpha, (softness, softness)) * 0.5
        rgb = np.array(thing.rgb, np.float32)
        first, second = rgb[:, None, None], _second_tone(rgb)[:, None, None]
        paint = first + (second - first) * _texture(thing, window, unit)
        patch = picture[:, *window] * (1 - shadow)
        picture[:, *window] = patch + (paint - patch) * alpha
    slope = np.linspace(-1, 1, size, dtype=np.float32)
    picture *= rng.uniform(0.88, 1.04) + slope[:, None] * rng.uniform(-0.1, 0.1) + slope * rng.uniform(-0.1, 0.1)
    speckle = np.frombuffer(rng.randbytes(size * size), np.uint8).reshape(size, size)
    picture += speckle * np.float32(rng.uniform(2, 7) / 255)
    return np.ascontiguousarray(picture.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)), labels


# --- scenes -----------------------------------------------------------------------------------------------------


def _draw_object(
    rng: random.Random, image_size: int, object_scale: float, earlier: list[SceneObject], held_out: bool
) -> SceneObject:
    unit = image_size / REFERENCE_SIZE
    # Shared attributes are what makes phrases need more than a noun.
    model = rng.choice(earlier) if earlier else None
    shape = model.shape if model and rng.random() < 0.4 else rng.choice(SHAPES)
    color = model.color if model and rng.random() < 0.25 else rng.choice(tuple(COLORS))
    if held_out:
        color, shape = rng.choice(sorted(HELD_OUT))
    texture = rng.choice(TEXTURES) if rng.random() < 0.7 else "plain"
    size = rng.choices(tuple(RADII), (0.32, 0.28, 0.4))[0]
    radius = rng.uniform(*RADII[size]) * unit * object_scale
    tilt = MAX_TILT.get(shape, 0.3)
    hue, saturation, value = COLORS[color]
    rgb = colorsys.hsv_to_rgb(
        (hue + rng.uniform(-5, 5)) / 360 % 1,
        min(1, saturation * rng.uniform(0.92, 1.08)),
        min(1, value * rng.uniform(0.93, 1.05)),
    )
    margin = radius * REACH[shape] + 1
    x, y = (rng.uniform(margin, image_size - margin) for _ in range(2))
    if earlier and rng.random() < 0.4:  # beside another one, so that they overlap
        beside, turn = rng.choice(earlier), rng.uniform(0, 2 * math.pi)
        distance = (radius + beside.radius) * rng.uniform(0.6, 0.95)
        x = min(max(beside.x + distance * math.cos(turn), margin), image_size - margin)
        y = min(max(beside.y + distance * math.sin(turn), margin), image_size - margin)
    return SceneObject(
        shape=shape,
        color=color,
        texture=texture,
        size=size,
        x=x,
        y=y,
        radius=radius,
        angle=rng.uniform(-tilt, tilt),
        grain=rng.uniform(0, math.pi),
        rgb=tuple(255 * channel for channel in rgb),
    )


def _compose(
    rng: random.Random, key: str, split: str, image_size: int, max_objects: int, object_scale: float
) -> Scene:
    """Place objects from back to front, keeping of each what `MIN_VISIBLE_SHARE` asks."""
    counts = range(MIN_OBJECTS, max_objects + 1)
    count = rng.choices(counts, OBJECT_COUNT_WEIGHTS[: len(counts)])[0]
    held_out = set(rng.sample(range(count), min(count, rng.choice((1, 1, 2))))) if split == "unseen" else set()
    objects: list[SceneObject] = []
    whole: list[np.ndarray] = []  # silhouettes, (S, S) bool
    shown: list[np.ndarray] = []  # what the ones in front leave of them
    for index in range(count):
        for _ in range(20):
            thing = _draw_object(rng, image_size, object_scale, objects, index in held_out)
            if split != "unseen" and (thing.color, thing.shape) in HELD_OUT:
                continue
            silhouette = _silhouette(thing, image_size)
            left = [mask & ~silhouette for mask in shown]
            if all(np.count_nonzero(m) >= MIN_VISIBLE_SHARE * np.count_nonzero(w) for m, w in zip(left, whole)):
                objects.append(thing)
                whole.append(silhouette)
                shown = left + [silhouette]
                break
    covers = tuple(
        tuple(np.count_nonzero(front & full) if i > j else 0 for j, full in enumerate(whole))
        for i, front in enumerate(shown)
    )
    objects = [replace(thing, visible_area=np.count_nonzero(mask)) for thing, mask in zip(objects, shown)]
    return Scene(key, image_size, tuple(objects), covers)


def _check(split: str, image_size: int, max_objects: int, object_scale: float, count: int = 0) -> None:
    if split not in DEFAULT_SIZES:
        raise ValueError(f"there is no split {split!r} in the synthetic set; choose from {', '.join(DEFAULT_SIZES)}")
    if count < 0:
        raise ValueError(f"the size of split {split!r} is {count}; give a number of images, 0 or more")
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size is {image_size}; give {MIN_IMAGE_SIZE} or more, or shapes cannot be told apart")
    if not MIN_OBJECTS <= max_objects <= MAX_OBJECTS:
        raise ValueError(f"max_objects is {max_objects}; give {MIN_OBJECTS} to {MAX_OBJECTS}")
    if not 0 < object_scale <= MAX_OBJECT_SCALE:
        raise ValueError(f"object_scale is {object_scale}; give more than 0 and at most {MAX_OBJECT_SCALE}")


def draw_scene(
    seed: int,
    split: str,
    index: int,
    image_size: int = REFERENCE_SIZE,
    max_objects: int = MAX_OBJECTS,
    object_scale: float = 1.0,
) -> Scene:
    """The scene of one image with its phrases (at least one). The same arguments always give the same scene, however
    many others are drawn.

    Args:
        seed: Another seed, another set.
        split: Decides which families of phrases and which colour and shape pairs there are.
        index: Counts the split's images.
        image_size: Side of the image in pixels; the scene scales with it.
        max_objects: A scene has two to so many objects.
        object_scale: Factor on the objects' size in the image.

    Raises:
        ValueError: for an unknown split or a number out of range.
    """
    _check(split, image_size, max_objects, object_scale)
    key = f"{seed}/{split}/{index}"
    rng = random.Random(key)
    while True:
        scene = _compose(rng, key, split, image_size, max_objects, object_scale)
        phrases = tuple(_draw_phrases(rng, scene, i, split) for i in range(len(scene.objects)))
        if any(phrases):
            return replace(scene, phrases=phrases)


# --- what phrases mean ------------------------------------------------------------------------------------------

_LOW, _HIGH, _MIDDLE, _ANY = (-math.inf, 0.4), (0.6, math.inf), (0.35, 0.65), (-math.inf, math.inf)
PLACES = {  # where the centre is, across and down, as shares of the side
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
DIRECTIONS = {"left": (1, 0), "right": (-1, 0), "top": (0, 1), "bottom": (0, -1)}  # the way one counts from there
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
RELATIONS = (*SIDES, "in front of", "behind", "closest to")
EXTREMES = {"leftmost": "left", "rightmost": "right", "topmost": "top", "bottommost": "bottom"}
SUPERLATIVES = ("largest", "smallest", *EXTREMES)


def _within(value: float, low: float, high: float) -> bool | None:
    """Whether `value` lies in the interval; `None` within the margin of a border."""
    if low + BORDER_MARGIN <= value <= high - BORDER_MARGIN:
        return True
    return False if value < low - BORDER_MARGIN or value > high + BORDER_MARGIN else None


def _placed(word: str, thing: SceneObject, image_size: int) -> bool | None:
    """Whether an object stands where a word of `PLACES` says; `None` when that is open to dispute."""
    across, down = PLACES[word]
    verdicts = _within(thing.x / image_size, *across), _within(thing.y / image_size, *down)
    return False if False in verdicts else None if None in verdicts else True


def _related(word: str, index: int, anchor: int, scene: Scene) -> bool | None:
    """Whether object `index` stands to the anchor as a word says; `None` when that is open to dispute."""
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


def _order(word: str, thing: SceneObject) -> float:
    """What grows along the way from a side of the image."""
    across, down = DIRECTIONS[word]
    return across * thing.x + down * thing.y


def _ranked(values: dict[int, float], rank: int, gap: float) -> list[int]:
    """The object whose value is the `rank`-th smallest, if it is apart from its neighbours by `gap`."""
    order = sorted(values, key=values.get)
    neighbours = zip(order[max(0, rank - 2) : rank], order[max(0, rank - 2) + 1 : rank + 1])
    if rank > len(order) or any(values[after] - values[before] < gap for before, after in neighbours):
        return []
    return [order[rank - 1]]


def referents(expression: Expression, scene: Scene) -> list[int]:
    """Indices of the objects that the expression describes; empty too when a margin is not met."""
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
            verdicts = [_placed(word, things[i], scene.image_size) for i in fitting]
        else:
            verdicts = [_related(word, i, anchor, scene) for i in fitting]
        return [] if None in verdicts else [i for i, verdict in zip(fitting, verdicts) if verdict]
    if len(fitting) < 2:  # what is left compares objects with each other
        return []
    if family == "relation":
        there = things[anchor].x, things[anchor].y
        distances = {i: math.log(math.dist((things[i].x, things[i].y), there) + 1e-6) for i in fitting}
        return _ranked(distances, 1, math.log(DISTANCE_RATIO))
    if word in ("largest", "smallest"):
        sign = -1 if word == "largest" else 1
        by_area = _ranked({i: sign * math.log(things[i].visible_area) for i in fitting}, 1, math.log(AREA_RATIO))
        by_radius = _ranked({i: sign * math.log(things[i].radius) for i in fitting}, 1, math.log(RADIUS_RATIO))
        return by_area if by_area == by_radius else []
    places = {i: _order(EXTREMES.get(word, word), things[i]) for i in fitting}
    return _ranked(places, expression.rank or 1, ORDER_GAP * scene.image_size)


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


def _word_description(rng: random.Random, description: Description, tails: bool = False) -> str:
    """Such as "small striped red star" or, where tails are allowed, now and then "small red star with stripes"."""
    tail = TEXTURE_TAILS.get(description.texture) if tails and rng.random() < 0.4 else None
    words = [
        rng.choice(SYNONYMS.get(attribute, (attribute,)))
        for attribute in (description.size, None if tail else description.texture, description.color)
        if attribute
    ]
    words.append(description.shape or rng.choice(NOUNS))
    return " ".join(words + ([tail] if tail else []))


def _word(rng: random.Random, expression: Expression) -> str:
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


# Chances that shape, colour, texture and size are said, by family.
_SAID = {
    "attribute": (0.85, 0.6, 0.3, 0.35),
    "position": (0.75, 0.35, 0.1, 0.1),
    "relation": (0.7, 0.25, 0.1, 0.1),
    "superlative": (0.55, 0.25, 0.1, 0.0),
    "ordinal": (0.5, 0.2, 0.1, 0.05),
    "anchor": (0.8, 0.7, 0.1, 0.1),
}


def _describe(rng: random.Random, thing: SceneObject, role: str) -> Description:
    """Some true attributes of an object, as many as the role (a family, or "anchor") usually has."""
    shape, color, texture, size = (rng.random() < chance for chance in _SAID[role])
    return Description(
        thing.shape if shape else None,
        thing.color if color else None,
        thing.texture if texture else None,
        thing.size if size and thing.size != "medium" else None,
    )


def _propose(rng: random.Random, scene: Scene, index: int, family: str) -> Iterator[Expression]:
    """Expressions of the family that may fit object `index`, in random order: one target, and each word for it."""
    thing, size = scene.objects[index], scene.image_size
    target = _describe(rng, thing, family)
    alike = [other for other in scene.objects if target.fits(other)]
    if family == "attribute":
        if target != Description():
            yield Expression(family, target)
    elif family == "position":
        places = [place for place in PLACES if _placed(place, thing, size)]
        yield from (Expression(family, target, place) for place in rng.sample(places, len(places)))
    elif family == "relation":
        other = rng.choice([i for i in range(len(scene.objects)) if i != index])
        anchor = _describe(rng, scene.objects[other], "anchor")
        needed = len(alike) > 1 + target.fits(scene.objects[other])  # the target's attributes do not suffice
        if anchor != Description() and (needed or rng.random() < 0.5):
            words = [word for word in RELATIONS if word == "closest to" or _related(word, index, other, scene)]
            yield from (Expression(family, target, word, anchor) for word in rng.sample(words, len(words)))
    elif len(alike) > 1 and family == "superlative":
        yield from (Expression(family, target, word) for word in rng.sample(SUPERLATIVES, len(SUPERLATIVES)))
    elif len(alike) > 1:
        for word in rng.sample(tuple(DIRECTIONS), len(DIRECTIONS)):
            rank = 1 + sum(_order(word, other) < _order(word, thing) for other in alike)
            if rank in RANK_WORDS:
                yield Expression(family, target, word, rank=rank)


def _draw_phrases(rng: random.Random, scene: Scene, index: int, split: str) -> tuple[Phrase, ...]:
    """One to three phrases that name object `index` and nothing else, or none."""
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
            proposals = _propose(rng, scene, index, family)
            expression = next((e for e in proposals if referents(e, scene) == [index]), None)
            if expression:
                text = _word(rng, expression)
                if len(text.split()) <= MAX_WORDS:
                    phrases.setdefault(text.removeprefix("the "), Phrase(text, expression))
                break
    return tuple(phrases.values())


# --- rows -------------------------------------------------------------------------------------------------------


def generate_rows(
    seed: int,
    split: str,
    count: int,
    image_size: int = REFERENCE_SIZE,
    max_objects: int = MAX_OBJECTS,
    object_scale: float = 1.0,
) -> Iterator[dict]:
    """Rows of the schema of `data/refer.py` for the split's first `count` images, one for each object referred to.

    `image` is a PIL image, one object for all rows of an image; `mask` (S, S) uint8 of 0 and 1; `category` the shape;
    `image_id`, `ann_id` and `ref_id` are unique over the splits and do not depend on `count`.
    """
    _check(split, image_size, max_objects, object_scale, count)
    offset = list(DEFAULT_SIZES).index(split) * MAX_IMAGES
    for image_index in range(count):
        scene = draw_scene(seed, split, image_index, image_size, max_objects, object_scale)
        pixels, labels = render(scene)
        image = Image.fromarray(pixels)
        for index, phrases in enumerate(scene.phrases):
            if not phrases:
                continue
            mask = (labels == index + 1).astype(np.uint8)
            image_id = offset + image_index
            ann_id = image_id * ID_STRIDE + index
            yield {
                "image": image,
                "mask": mask,
                "sentences": [phrase.text for phrase in phrases],
                "ref_id": ann_id,
                "ann_id": ann_id,
                "image_id": image_id,
                "category": scene.objects[index].shape,
                "bbox": [float(side) for side in cv2.boundingRect(mask)],
            }


def _png(image: Image.Image) -> bytes:
    return cv2.imencode(".png", np.asarray(image)[..., ::-1])[1].tobytes()


def load_shapes(
    seed: int = 0,
    sizes: dict[str, int] | None = None,
    image_size: int = REFERENCE_SIZE,
    max_objects: int = MAX_OBJECTS,
    object_scale: float = 1.0,
) -> datasets.DatasetDict:
    """Draw the synthetic set in memory: splits train, val, testA (attributes and positions), testB (relations,
    superlatives and ordinals) and unseen (`HELD_OUT` pairs), a row for each object referred to, as `data/refer.py`
    has them.

    Args:
        seed: Another seed, another set.
        sizes: Images a split, for the splits that shall differ from `DEFAULT_SIZES`.
        image_size: Side of the square images in pixels; the scenes scale with it.
        max_objects: A scene has two to so many objects.
        object_scale: Factor on the objects' size in the image.

    Raises:
        ValueError: for an unknown split, a negative size or a number out of range.
    """
    sizes = DEFAULT_SIZES | (sizes or {})
    for split, count in sizes.items():
        _check(split, image_size, max_objects, object_scale, count)
    splits = {}
    for split, count in sizes.items():
        tables = [FEATURES.arrow_schema.empty_table()]
        images = generate_rows(seed, split, count, image_size, max_objects, object_scale)
        for _, group in groupby(images, key=lambda row: row["image_id"]):
            rows = list(group)
            image = {"bytes": _png(rows[0]["image"]), "path": None}
            rows = [FEATURES.encode_example(row | {"image": image}) for row in rows]
            tables.append(pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema))
        # With a fingerprint given, `datasets` does not pickle all pictures to compute one.
        fingerprint = Hasher.hash(("shapes", seed, split, count, image_size, max_objects, object_scale))
        splits[split] = datasets.Dataset(pa.concat_tables(tables), fingerprint=fingerprint)
    return datasets.DatasetDict(splits)


# --- a picture of it --------------------------------------------------------------------------------------------


def contact_sheet(seed: int = 0, columns: int = 4, scale: int = 3) -> Image.Image:
    """One row of scenes a split: each scene bare, and with its masks tinted and its phrases beneath in the tint."""
    tints = ((255, 60, 90), (40, 190, 255), (255, 200, 0), (90, 220, 90), (210, 110, 255))
    side, font = REFERENCE_SIZE * scale, ImageFont.load_default(13)
    width, height = 2 * side + 24, side + 8 * 17 + 32
    sheet = Image.new("RGB", (width * columns, height * len(DEFAULT_SIZES)), (24, 24, 28))
    draw = ImageDraw.Draw(sheet)
    for row, split in enumerate(DEFAULT_SIZES):
        for column in range(columns):
            scene = draw_scene(seed, split, column)
            pixels, labels = render(scene)
            left, top = column * width + 8, row * height + 24
            draw.text((left, top - 18), f"{split} {column}", (230, 230, 230), font)
            large = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_NEAREST)
            large_labels = cv2.resize(labels, (side, side), interpolation=cv2.INTER_NEAREST)
            overlay, line = large // 2, 0
            for index, phrases in enumerate(scene.phrases):
                if not phrases:
                    continue
                mask = large_labels == index + 1
                overlay[mask] = large[mask] // 3 + np.array(tints[index], np.uint8) // 3 * 2
                for phrase in phrases:
                    place = (left + line % 2 * (side + 8), top + side + 6 + line // 2 * 17)
                    draw.text(place, phrase.text, tints[index], font)
                    line += 1
            sheet.paste(Image.fromarray(large), (left, top))
            sheet.paste(Image.fromarray(overlay), (left + side + 8, top))
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw a contact sheet of the synthetic referring set.")
    parser.add_argument("--output", default="shapes.png")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    contact_sheet(arguments.seed).save(arguments.output)
