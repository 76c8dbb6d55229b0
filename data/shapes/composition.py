"""Scenes drawn from a seed: objects are placed at random, then phrases are drawn for them."""

import colorsys
import math
import random
from dataclasses import replace

import numpy as np

from .drawing import REACH, SHAPES, silhouette_of
from .phrases import draw_phrases
from .scenes import (
    COLORS,
    DEFAULT_SIZES,
    HELD_OUT,
    MAX_OBJECT_SCALE,
    MAX_OBJECTS,
    MIN_IMAGE_SIZE,
    MIN_OBJECTS,
    OBJECT_COUNT_WEIGHTS,
    RADII,
    REFERENCE_SIZE,
    TEXTURES,
    Scene,
    SceneObject,
)

MIN_VISIBLE_SHARE = 0.6  # of the pixels that an object would show if nothing stood in front of it
MAX_TILT = {"circle": 0.0, "ring": 0.0, "star": 0.6, "square": 0.2}  # radians; other shapes are turned by up to 0.3


def draw_scene(
    seed: int,
    split: str,
    index: int,
    image_size: int = REFERENCE_SIZE,
    max_objects: int = MAX_OBJECTS,
    object_scale: float = 1.0,
) -> Scene:
    """Draw the scene of one image, with at least one phrase. The same arguments always give the same scene.

    Args:
        seed: each seed gives another set.
        split: decides which families of phrases and which pairs of colour and shape there are.
        index: number of the image in its split.
        image_size: side of the image in pixels; the scene scales with it.
        max_objects: the largest number of objects in a scene; the smallest is two.
        object_scale: factor on the objects' size in the image.

    Raises:
        ValueError: the split is unknown, or a number is out of range.
    """
    check_arguments(split, image_size, max_objects, object_scale)
    key = f"{seed}/{split}/{index}"
    rng = random.Random(key)
    while True:
        scene = _place_objects(rng, key, split, image_size, max_objects, object_scale)
        phrases = tuple(draw_phrases(rng, scene, i, split) for i in range(len(scene.objects)))
        if any(phrases):
            return replace(scene, phrases=phrases)


def _place_objects(
    rng: random.Random, key: str, split: str, image_size: int, max_objects: int, object_scale: float
) -> Scene:
    """Place objects from back to front, so that `MIN_VISIBLE_SHARE` of each stays visible. An object that would hide
    too much is drawn anew, at most 20 times, and then left out."""
    counts = range(MIN_OBJECTS, max_objects + 1)
    count = rng.choices(counts, OBJECT_COUNT_WEIGHTS[: len(counts)])[0]
    held_out = set(rng.sample(range(count), min(count, rng.choice((1, 1, 2))))) if split == "unseen" else set()
    objects: list[SceneObject] = []
    whole: list[np.ndarray] = []  # silhouettes, (S, S) bool
    shown: list[np.ndarray] = []  # what the objects in front leave of them
    for index in range(count):
        for _ in range(20):
            thing = _draw_object(rng, image_size, object_scale, objects, index in held_out)
            if split != "unseen" and (thing.color, thing.shape) in HELD_OUT:
                continue
            silhouette = silhouette_of(thing, image_size)
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


def _draw_object(
    rng: random.Random, image_size: int, object_scale: float, earlier: list[SceneObject], held_out: bool
) -> SceneObject:
    """Draw an object's attributes and place; `earlier` are the objects behind it."""
    unit = image_size / REFERENCE_SIZE
    # Where objects share attributes, phrases need more than a noun.
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


def check_arguments(split: str, image_size: int, max_objects: int, object_scale: float, count: int = 0) -> None:
    """Refuse an unknown split and numbers out of range with a ValueError."""
    for name, number in (("image_size", image_size), ("max_objects", max_objects), (f"The size of {split!r}", count)):
        if type(number) is not int:
            raise ValueError(f"{name} is {number!r}; give a whole number.")
    if split not in DEFAULT_SIZES:
        raise ValueError(f"There is no split {split!r} in the synthetic set; choose from {', '.join(DEFAULT_SIZES)}.")
    if count < 0:
        raise ValueError(f"The size of split {split!r} is {count}; give a number of images, 0 or more.")
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(
            f"image_size is {image_size}; give {MIN_IMAGE_SIZE} or more: shapes of smaller images look alike."
        )
    if not MIN_OBJECTS <= max_objects <= MAX_OBJECTS:
        raise ValueError(f"max_objects is {max_objects}; give {MIN_OBJECTS} to {MAX_OBJECTS}.")
    if type(object_scale) not in (int, float) or not 0 < object_scale <= MAX_OBJECT_SCALE:
        raise ValueError(f"object_scale is {object_scale!r}; give more than 0 and at most {MAX_OBJECT_SCALE}.")
