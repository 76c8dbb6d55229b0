"""The synthetic set against an independent truth: phrases are read again from their words alone, by the small grammar
below, and shapes are drawn again from their geometry, pixel by pixel."""

import math
import re
from functools import cache

import numpy as np
import pytest

from data.records import FEATURES
from data.shapes import (
    COLORS,
    DEFAULT_SIZES,
    FAMILIES,
    HELD_OUT,
    SHAPES,
    Description,
    Expression,
    Scene,
    SceneObject,
    draw_scene,
    generate_rows,
    load_shapes,
    referents,
    render,
)
from data.shapes.__main__ import contact_sheet

SCENES = {"train": 450, "val": 120, "testA": 150, "testB": 200, "unseen": 200}


@cache
def scenes_of(split: str) -> list[Scene]:
    return [draw_scene(7, split, index) for index in range(SCENES[split])]


# --- brute-force geometry -----------------------------------------------------------------------------------------


def inside_polygon(x: np.ndarray, y: np.ndarray, corners: list[tuple[float, float]]) -> np.ndarray:
    """Even-odd rule: a ray to the right crosses the outline an odd number of times."""
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def covers_point(thing: SceneObject, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points lie on the whole shape, each shape by a formula of its own."""
    cosine, sine = math.cos(thing.angle), math.sin(thing.angle)
    x, y = x - thing.x, y - thing.y
    x, y = x * cosine + y * sine, y * cosine - x * sine
    area = 0.75 * math.pi * thing.radius**2
    if thing.shape in ("circle", "ring"):
        radius = thing.radius * math.sqrt(0.75)
        distance = np.hypot(x, y)
        return (distance <= radius) & (distance >= (0.52 * radius if thing.shape == "ring" else 0))
    if thing.shape == "square":
        return np.maximum(abs(x), abs(y)) <= math.sqrt(area) / 2
    if thing.shape == "cross":
        half = math.sqrt(area / (8 * 0.36 - 4 * 0.36**2))
        across, down = abs(x) / half, abs(y) / half
        return ((across <= 1) & (down <= 0.36)) | ((across <= 0.36) & (down <= 1))
    if thing.shape == "triangle":
        side = math.sqrt(area * 4 / math.sqrt(3))
        height = side * math.sqrt(3) / 2
        return (y <= height / 2) & (y + height / 2 >= abs(x) * math.sqrt(3))
    assert thing.shape == "star"
    outer = math.sqrt(area / (5 * 0.45 * math.sin(math.pi / 5)))
    turns = [(math.pi * k / 5, outer * (0.45 if k % 2 else 1)) for k in range(10)]
    corners = [(r * math.sin(t), -r * math.cos(t)) for t, r in turns]
    middle = (max(y0 for _, y0 in corners) + min(y0 for _, y0 in corners)) / 2
    return inside_polygon(x, y, [(x0, y0 - middle) for x0, y0 in corners])


@cache
def brute_force(scene: Scene, samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """What shows at each pixel (0 or the object's index + 1), and the share of it that each whole shape covers
    (objects, S, S), by `samples`² points a pixel."""
    y, x = (np.mgrid[: scene.image_size * samples, : scene.image_size * samples] + 0.5) / samples
    points = np.stack([covers_point(thing, x, y) for thing in scene.objects])
    whole = points.reshape(len(points), scene.image_size, samples, scene.image_size, samples).mean((2, 4))
    labels = np.zeros((scene.image_size,) * 2, int)
    for index, share in enumerate(whole):
        labels[share > 0.5] = index + 1
    return labels, whole


# --- reading phrases ----------------------------------------------------------------------------------------------

WORDS = {
    **{word: ("size", "large") for word in ("large", "big")},
    **{word: ("size", "small") for word in ("small", "little")},
    **{word: ("texture", word) for word in ("plain", "striped", "dotted")},
    "spotted": ("texture", "dotted"),
    **{word: ("color", word) for word in COLORS},
}
TAILS = {"stripes": "striped", "dots": "dotted"}
RELATION = (
    r"(?P<target>.+?) (?P<word>(?:to the )?left of|(?:to the )?right of|above|below|in front of|covering|"
    r"(?:partly )?behind|(?:closest|nearest) to) (?:the )?(?P<anchor>.+)"
)
ORDINAL = r"(?P<rank>first|second|third) (?P<target>.+) from (?:the )?(?P<word>left|right|top|bottom)"
EXTREME = {
    "largest": "largest",
    "biggest": "largest",
    "smallest": "smallest",
    "leftmost": "left",
    "rightmost": "right",
    "topmost": "top",
    "highest": "top",
    "bottommost": "bottom",
    "lowest": "bottom",
}
SUPERLATIVE = rf"(?P<word>{'|'.join(EXTREME)}) (?P<target>.+)"
FAR = r"(?P<target>.+) (?:farthest|furthest)(?: to the)? (?P<word>left|right)"
PLACE = r"(?:upper|top|lower|bottom) (?:left|right)|left|right|top|bottom|center"
POSITIONS = (
    r"(?P<target>.+) in the (?P<word>middle) of the image",
    rf"(?P<target>.+) (?:on|at|in)(?: the)? (?P<word>{PLACE})(?: side| corner)?",
    rf"(?P<word>{PLACE}) (?P<target>.+)",
    r"(?P<target>.+) (?P<word>(?:upper|lower|top|bottom) (?:left|right))",
)


def read_description(text: str) -> dict[str, str]:
    """Attributes that the words ask for; every word must be understood."""
    text, _, tail = text.partition(" with ")
    *adjectives, noun = text.split()
    wanted = [WORDS[word] for word in adjectives]
    if tail:
        wanted.append(("texture", TAILS[tail]))
    if noun in SHAPES:
        wanted.append(("shape", noun))
    else:
        assert noun in ("object", "one", "shape", "thing"), noun
    assert len(dict(wanted)) == len(wanted), text
    return dict(wanted)


def fitting(scene: Scene, text: str) -> set[int]:
    wanted = read_description(text)
    return {i for i, thing in enumerate(scene.objects) if all(getattr(thing, k) == v for k, v in wanted.items())}


def read(text: str) -> tuple[str, dict[str, str]]:
    """Family and parts of a phrase."""
    text = text.removeprefix("the ")
    patterns = [("ordinal", ORDINAL), ("relation", RELATION), ("superlative", SUPERLATIVE), ("superlative", FAR)]
    for family, pattern in patterns + [("position", pattern) for pattern in POSITIONS]:
        if match := re.fullmatch(pattern, text):
            return family, match.groupdict()
    return "attribute", {"target": text}


def first_along(scene: Scene, indices: set[int], side: str) -> list[int]:
    """Objects in the order they are met from one side of the image."""
    sign = 1 if side in ("left", "top") else -1
    return sorted(
        indices, key=lambda i: sign * (scene.objects[i].x if side in ("left", "right") else scene.objects[i].y)
    )


def readings(scene: Scene, text: str) -> list[set[int]]:
    """What a phrase names, by every reading a person may have of it."""
    family, parts = read(text)
    things, size = scene.objects, scene.image_size
    fit = fitting(scene, parts["target"])
    word = parts.get("word", "")
    if family == "attribute":
        return [fit]
    if family == "ordinal":
        rank = ("first", "second", "third").index(parts["rank"])
        assert len(fit) > max(rank, 1)
        return [{first_along(scene, fit, word)[rank]}]
    if family == "superlative":
        assert len(fit) > 1
        word = EXTREME.get(word, word)
        if word in ("left", "right", "top", "bottom"):
            return [{first_along(scene, fit, word)[0]}]
        choose = max if word == "largest" else min
        labels = brute_force(scene)[0]
        by_sight = choose(fit, key=lambda i: np.count_nonzero(labels == i + 1))
        return [{choose(fit, key=lambda i: things[i].radius)}, {by_sight}]
    if family == "position":
        if word in ("middle", "center"):
            inside = {i for i in fit if max(abs(things[i].x / size - 0.5), abs(things[i].y / size - 0.5)) < 0.15}
            return [inside, {min(fit, key=lambda i: max(abs(things[i].x - size / 2), abs(things[i].y - size / 2)))}]
        sides = word.replace("upper", "top").replace("lower", "bottom").split()
        near = {
            "left": lambda t: t.x,
            "right": lambda t: size - t.x,
            "top": lambda t: t.y,
            "bottom": lambda t: size - t.y,
        }
        by_share = [
            {i for i in fit if all(near[s](things[i]) < share * size for s in sides)} for share in (0.39, 0.42)
        ]
        return by_share + ([{first_along(scene, fit, sides[0])[0]}] if len(sides) == 1 else [])
    anchors = fitting(scene, parts["anchor"])
    assert len(anchors) == 1, f"{text!r} has {len(anchors)} anchors"
    (anchor,) = anchors
    fit = fit - anchors
    apart = {i: (things[i].x - things[anchor].x, things[i].y - things[anchor].y) for i in fit}
    if word in ("closest to", "nearest to"):
        assert len(fit) > 1
        nearest = sorted(fit, key=lambda i: math.hypot(*apart[i]))
        assert math.hypot(*apart[nearest[1]]) > 1.29 * math.hypot(*apart[nearest[0]])
        return [{nearest[0]}]
    if word in ("in front of", "covering", "behind", "partly behind"):
        labels, whole = brute_force(scene)
        found = []
        for least in (0.001, 0.0035):  # of the image: a touch, and what nobody overlooks
            hides = {
                i: np.count_nonzero((labels == front + 1) & (whole[back] > 0.5)) >= least * size**2 and front > back
                for i in fit
                for front, back in [(anchor, i) if "behind" in word else (i, anchor)]
            }
            found.append({i for i, hidden in hides.items() if hidden})
        return found
    x, y = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}[
        re.findall("left|right|above|below", word)[0]
    ]
    half_plane = {i for i, (dx, dy) in apart.items() if dx * x + dy * y > 0}
    quadrant = {i for i, (dx, dy) in apart.items() if dx * x + dy * y >= abs(dx * y) + abs(dy * x)}
    return [half_plane, quadrant]


# --- phrases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SCENES)
def test_every_phrase_names_exactly_one_object(split):
    for scene in scenes_of(split):
        for index, phrases in enumerate(scene.phrases):
            assert len({phrase.text.removeprefix("the ") for phrase in phrases}) == len(phrases) <= 3
            for phrase in phrases:
                assert read(phrase.text)[0] == phrase.expression.family, phrase
                assert len(phrase.text.split()) <= 10
                for reading in readings(scene, phrase.text):
                    assert reading == {index}, f"{phrase.text!r} of object {index} in {scene.key}: {reading}"


def test_thousands_of_phrases_were_checked():
    assert sum(len(phrases) for split in SCENES for scene in scenes_of(split) for phrases in scene.phrases) >= 5000


@pytest.mark.parametrize("image_size", [64, 224])
def test_phrases_hold_at_other_image_sizes(image_size):
    for index in range(40):
        scene = draw_scene(3, "val", index, image_size)
        for i, phrases in enumerate(scene.phrases):
            assert all(reading == {i} for phrase in phrases for reading in readings(scene, phrase.text))


def test_fewer_and_larger_objects():
    """As in the quickstart: no scene is crowded, objects stay whole, and phrases stay unambiguous."""
    scenes = [draw_scene(3, "train", index, 96, max_objects=3, object_scale=1.25) for index in range(150)]
    assert {len(scene.objects) for scene in scenes} == {2, 3}
    usual = [thing.radius for scene in scenes_of("train") for thing in scene.objects]
    radii = [thing.radius for scene in scenes for thing in scene.objects]
    assert max(radii) > max(usual) and min(radii) > 1.2 * min(usual)
    for scene in scenes:
        whole = brute_force(scene)[1]
        for thing, share in zip(scene.objects, whole):
            # No part lies beyond the border: the pixels found are all of the outer area, 0.75 π r², or the ring's.
            ring = 1 - 0.52**2 if thing.shape == "ring" else 1
            assert share.sum() == pytest.approx(0.75 * math.pi * thing.radius**2 * ring, rel=0.06)
        for i, phrases in enumerate(scene.phrases):
            assert all(reading == {i} for phrase in phrases for reading in readings(scene, phrase.text))


def test_the_checker_refuses_what_is_wrong():
    """A phrase of one scene read in another one, where most fit nothing or several."""
    scenes = scenes_of("testA")
    wrong = total = 0
    for scene, other in zip(scenes, scenes[1:]):
        for index, phrases in enumerate(scene.phrases[: len(other.objects)]):
            for phrase in phrases:
                total += 1
                try:
                    wrong += any(reading != {index} for reading in readings(other, phrase.text))
                except (AssertionError, IndexError, ValueError):  # no such object, or nothing to compare
                    wrong += 1
    assert wrong > 0.8 * total
    with pytest.raises(KeyError):
        read_description("shiny star")


@pytest.mark.parametrize(
    "split, shares",
    [
        ("train", (0.45, 0.25, 0.12, 0.10, 0.08)),
        ("testA", (0.62, 0.38, 0, 0, 0)),
        ("testB", (0, 0, 0.41, 0.35, 0.24)),
    ],
)
def test_families_of_a_split(split, shares):
    families = [read(p.text)[0] for scene in scenes_of(split) for phrases in scene.phrases for p in phrases]
    for family, share in zip(FAMILIES, shares):
        found = families.count(family) / len(families)
        assert found == 0 if share == 0 else abs(found - share) < 0.06, f"{family}: {found:.3f}"


def test_val_and_unseen_have_all_families():
    for split in ("val", "unseen"):
        texts = [p.text for scene in scenes_of(split) for phrases in scene.phrases for p in phrases]
        assert {read(text)[0] for text in texts} == set(FAMILIES)


# --- meaning, on scenes made by hand ------------------------------------------------------------------------------


def scene_by_hand(*things: tuple) -> Scene:
    """Things (shape, color, x, y[, radius[, visible area]]) of an image of side 100 that hide nothing."""
    objects = []
    for shape, color, x, y, *rest in things:
        radius = rest[0] if rest else 10.0
        area = rest[1] if len(rest) > 1 else int(2.3 * radius**2)
        objects.append(SceneObject(shape, color, "plain", "medium", x, y, radius, 0.0, 0.0, (0.0, 0.0, 0.0), area))
    return Scene("by hand", 100, tuple(objects), tuple((0,) * len(objects) for _ in objects))


CIRCLE, ANY, SQUARE = Description(shape="circle"), Description(), Description(shape="square")


@pytest.mark.parametrize(
    "things, expression, expected",
    [
        ([("circle", "red", 20, 50), ("circle", "blue", 80, 50)], Expression("attribute", CIRCLE), [0, 1]),
        ([("circle", "red", 20, 50), ("square", "red", 80, 50)], Expression("attribute", CIRCLE), [0]),
        # The border is at 40, its margin 3 on both sides; other shapes do not matter.
        ([("circle", "red", 36, 50), ("circle", "blue", 44, 50)], Expression("position", CIRCLE, "left"), [0]),
        ([("circle", "red", 36, 50), ("circle", "blue", 42, 50)], Expression("position", CIRCLE, "left"), []),
        ([("circle", "red", 36, 50), ("square", "blue", 42, 50)], Expression("position", CIRCLE, "left"), [0]),
        ([("circle", "red", 38, 50), ("circle", "blue", 80, 50)], Expression("position", CIRCLE, "left"), []),
        ([("circle", "red", 36, 90), ("circle", "blue", 36, 20)], Expression("position", CIRCLE, "top left"), [1]),
        ([("circle", "red", 50, 61), ("circle", "blue", 36, 20)], Expression("position", CIRCLE, "middle"), [0]),
        ([("circle", "red", 50, 63), ("circle", "blue", 36, 20)], Expression("position", CIRCLE, "middle"), []),
        # Left of: 10 at least, and within 45 degrees.
        (
            [("circle", "red", 30, 55), ("square", "blue", 50, 50)],
            Expression("relation", CIRCLE, "left of", SQUARE),
            [0],
        ),
        (
            [("circle", "red", 42, 50), ("square", "blue", 50, 50)],
            Expression("relation", CIRCLE, "left of", SQUARE),
            [],
        ),
        (
            [("circle", "red", 30, 75), ("square", "blue", 50, 50)],
            Expression("relation", CIRCLE, "left of", SQUARE),
            [],
        ),
        (
            [("circle", "red", 30, 50), ("square", "blue", 50, 50), ("square", "red", 80, 50)],
            Expression("relation", CIRCLE, "left of", SQUARE),
            [],  # which square?
        ),
        (  # the anchor is not its own target
            [("circle", "red", 30, 50), ("circle", "blue", 60, 50)],
            Expression("relation", CIRCLE, "right of", Description("circle", "red")),
            [1],
        ),
        (
            [("square", "blue", 50, 50), ("circle", "red", 60, 50), ("circle", "blue", 36, 50)],
            Expression("relation", CIRCLE, "closest to", SQUARE),
            [1],
        ),
        (
            [("square", "blue", 50, 50), ("circle", "red", 60, 50), ("circle", "blue", 38, 50)],
            Expression("relation", CIRCLE, "closest to", SQUARE),
            [],
        ),
        (
            [("circle", "red", 20, 50, 20.0), ("circle", "red", 80, 50, 15.0)],
            Expression("superlative", ANY, "largest"),
            [0],
        ),
        (
            [("circle", "red", 20, 50, 16.0), ("circle", "red", 80, 50, 15.0)],
            Expression("superlative", ANY, "largest"),
            [],
        ),
        # The larger one is mostly hidden.
        (
            [("circle", "red", 20, 50, 20.0, 500), ("circle", "red", 80, 50, 15.0, 510)],
            Expression("superlative", ANY, "largest"),
            [],
        ),
        ([("circle", "red", 20, 50)], Expression("superlative", ANY, "largest"), []),
        ([("circle", "red", 20, 50), ("circle", "red", 27, 50)], Expression("superlative", ANY, "leftmost"), [0]),
        ([("circle", "red", 20, 50), ("circle", "red", 25, 50)], Expression("superlative", ANY, "leftmost"), []),
        (
            [("circle", "red", 80, 10), ("square", "red", 50, 20), ("circle", "red", 20, 30)],
            Expression("ordinal", ANY, "right", rank=2),
            [1],
        ),
        (
            [("circle", "red", 80, 10), ("square", "red", 50, 20), ("circle", "red", 20, 30)],
            Expression("ordinal", CIRCLE, "right", rank=2),
            [2],
        ),
        ([("circle", "red", 80, 10), ("circle", "red", 50, 20)], Expression("ordinal", ANY, "top", rank=3), []),
        (
            [("circle", "red", 80, 10), ("circle", "red", 50, 20), ("circle", "red", 20, 24)],
            Expression("ordinal", ANY, "top", rank=2),
            [],
        ),
    ],
)
def test_meaning(things, expression, expected):
    assert referents(expression, scene_by_hand(*things)) == expected


@pytest.mark.parametrize("hidden, front, back", [(60, [1], [0]), (20, [], []), (3, [], [])])
def test_meaning_of_front_and_behind(hidden, front, back):
    scene = scene_by_hand(("circle", "red", 40, 50), ("square", "blue", 55, 50))
    scene = Scene(scene.key, 100, scene.objects, ((0, 0), (hidden, 0)))
    assert referents(Expression("relation", SQUARE, "in front of", CIRCLE), scene) == front
    assert referents(Expression("relation", CIRCLE, "behind", SQUARE), scene) == back
    assert referents(Expression("relation", CIRCLE, "in front of", SQUARE), scene) == []


# --- pixels -------------------------------------------------------------------------------------------------------


def test_labels_agree_with_brute_force_visibility():
    """The masks are the pixels that an object covers by half or more and no one in front of it does."""
    shapes = set()
    # Pixels in dispute lie along outlines: the bound is for objects of this size.
    for scene in (draw_scene(7, "train", index, object_scale=0.8) for index in range(40)):
        labels, (expected, whole) = render(scene)[1], brute_force(scene, samples=3)
        y, x = np.nonzero(labels != expected)
        assert len(y) < 0.005 * labels.size
        # Where they differ, one of the two objects covers close to half of the pixel.
        shares = np.concatenate([np.zeros_like(whole[:1]), whole])
        disputed = np.stack([shares[labels[y, x], y, x], shares[expected[y, x], y, x]])
        assert (abs(disputed - 0.5) < 0.3).any(0).all()
        shapes |= {thing.shape for thing in scene.objects}
    assert shapes == set(SHAPES)


def test_visible_areas_and_covers():
    for scene in scenes_of("val"):
        labels, whole = brute_force(scene)
        drawn = render(scene)[1]
        for i, thing in enumerate(scene.objects):
            assert thing.visible_area == np.count_nonzero(drawn == i + 1)
            assert thing.visible_area >= 0.57 * whole[i].sum()  # 60 %, by other pixels
            assert 0 < thing.x < scene.image_size and 0 < thing.y < scene.image_size
            if scene.phrases[i]:
                assert thing.visible_area >= 0.012 * scene.image_size**2
            for j in range(len(scene.objects)):
                expected = np.count_nonzero((labels == i + 1) & (whole[j] > 0.5)) if i > j else 0
                assert abs(scene.covers[i][j] - expected) <= 0.0025 * scene.image_size**2


def test_colours_are_what_their_names_say():
    """Plain objects: the mean colour of an object is nearest, by far in hue, to its own name's."""
    for scene in scenes_of("train")[:150]:
        image, labels = render(scene)
        for index, thing in enumerate(scene.objects):
            if thing.texture != "plain":
                continue
            red, green, blue = np.median(image[labels == index + 1], 0) / 255
            high, low = max(red, green, blue), min(red, green, blue)
            if thing.color in ("white", "black"):
                assert high - low < 0.1 and (low > 0.7 if thing.color == "white" else high < 0.3)
                continue
            assert high - low > 0.3
            hue = {red: (green - blue), green: 2 * (high - low) + blue - red, blue: 4 * (high - low) + red - green}[
                high
            ]
            hue = hue / (high - low) * 60
            hues = {name: value[0] for name, value in COLORS.items() if value[1]}
            assert min(hues, key=lambda name: abs((hue - hues[name] + 180) % 360 - 180)) == thing.color


def test_sizes_leave_gaps():
    radii = {"small": [], "medium": [], "large": []}
    for scene in scenes_of("train"):
        for thing in scene.objects:
            radii[thing.size].append(thing.radius)
    assert min(radii["small"]) >= 13 and max(radii["large"]) <= 27.5
    assert min(radii["medium"]) > 1.15 * max(radii["small"]) and min(radii["large"]) > 1.15 * max(radii["medium"])


# --- seeds and splits ---------------------------------------------------------------------------------------------


def test_drawn_from_the_seed():
    first, again, other = (draw_scene(seed, "train", 5) for seed in (0, 0, 1))
    assert first == again != other
    assert np.array_equal(render(first)[0], render(again)[0])
    assert not np.array_equal(render(first)[0], render(other)[0])
    assert draw_scene(0, "val", 5).objects != first.objects != draw_scene(0, "train", 6).objects


def test_unseen_pairs_appear_in_unseen_only():
    assert sorted(color for color, _ in HELD_OUT) == sorted(COLORS)
    assert sorted(shape for _, shape in HELD_OUT) == sorted(SHAPES)
    for split in SCENES:
        for scene in scenes_of(split):
            for thing, phrases in zip(scene.objects, scene.phrases):
                held_out = (thing.color, thing.shape) in HELD_OUT
                assert (held_out or not phrases) if split == "unseen" else not held_out
    shown = {(t.color, t.shape) for scene in scenes_of("train") for t, p in zip(scene.objects, scene.phrases) if p}
    assert len(shown) == len(COLORS) * len(SHAPES) - len(HELD_OUT)  # everything else does occur
    tested = {(t.color, t.shape) for scene in scenes_of("unseen") for t, p in zip(scene.objects, scene.phrases) if p}
    assert tested == HELD_OUT


# --- rows ---------------------------------------------------------------------------------------------------------

FEW = {"train": 4, "val": 3, "testA": 3, "testB": 3, "unseen": 3}


@pytest.fixture(scope="module")
def shapes():
    return load_shapes(seed=2, sizes=FEW)


def test_rows_show_their_scene(shapes):
    assert list(shapes) == list(DEFAULT_SIZES)
    for split, dataset in shapes.items():
        assert dataset.features == FEATURES
        expected = []
        for index in range(FEW[split]):
            scene = draw_scene(2, split, index)
            image, labels = render(scene)
            for i, phrases in enumerate(scene.phrases):
                if phrases:
                    expected.append((image, labels == i + 1, [p.text for p in phrases], scene.objects[i].shape))
        assert len(dataset) == len(expected)
        assert len(set(dataset["image_id"])) == FEW[split]
        for row, (image, mask, sentences, shape) in zip(dataset, expected):
            assert np.array_equal(np.asarray(row["image"].convert("RGB")), image)
            assert row["mask"].dtype == np.uint8 and np.array_equal(row["mask"], mask)
            assert row["sentences"] == sentences and row["category"] == shape
            rows, columns = np.nonzero(mask)
            left, top, width, height = row["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)


def test_ids_are_unique_and_do_not_depend_on_sizes(shapes):
    for column in ("ann_id", "ref_id"):
        ids = [identity for dataset in shapes.values() for identity in dataset[column]]
        assert len(set(ids)) == len(ids)
    images = [set(dataset["image_id"]) for dataset in shapes.values()]
    assert len(set.union(*images)) == sum(FEW.values())
    fewer = load_shapes(seed=2, sizes=FEW | {"train": 2, "val": 0})
    assert fewer["val"].features == FEATURES and len(fewer["val"]) == 0
    for split in ("train", "testB"):
        for row, same in zip(fewer[split], shapes[split]):
            assert row["ref_id"] == same["ref_id"] and row["sentences"] == same["sentences"]
            assert np.array_equal(row["mask"], same["mask"])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'testC'.*train, val, testA, testB, unseen"):
        load_shapes(sizes={"testC": 3})
    with pytest.raises(ValueError, match="'val' is -1"):
        load_shapes(sizes={"val": -1})
    with pytest.raises(ValueError, match="image_size is 20"):
        load_shapes(image_size=20)
    with pytest.raises(ValueError, match="max_objects is 5; give 2 to 4"):
        load_shapes(max_objects=5)
    with pytest.raises(ValueError, match="object_scale is 1.5; .* at most 1.25"):
        load_shapes(object_scale=1.5)
    with pytest.raises(ValueError, match="'dev'"):
        draw_scene(0, "dev", 0)
    with pytest.raises(ValueError, match="'dev'"):
        next(generate_rows(0, "dev", 1))


def test_contact_sheet_shows_scenes():
    sheet = np.asarray(contact_sheet(seed=4, columns=1))
    bare = np.repeat(np.repeat(render(draw_scene(4, "train", 0))[0], 3, 0), 3, 1)
    assert np.array_equal(sheet[24 : 24 + bare.shape[0], 8 : 8 + bare.shape[1]], bare)
