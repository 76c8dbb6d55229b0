"""Shapes and pixels: the outline of each shape, which pixels an object covers, and the picture of a scene."""

import math
import random

import cv2
import numpy as np

from .scenes import REFERENCE_SIZE, Scene, SceneObject

TEXTURE_PERIOD = 6.5  # pixels, in an image of side 96
SUPERSAMPLING = 4  # points along each side of a pixel that are drawn and averaged
SUBPIXEL_BITS = 4  # binary places of the corners that OpenCV is given
HALF_COVERED = 128  # of 255: a pixel belongs to an object that covers half of it


def _polygon(corners: int, inner: float = 1.0) -> np.ndarray:
    """A regular polygon (corners, 2) around 0 with a corner above it; every second corner is at the radius `inner`."""
    turns = np.arange(corners) / corners * 2 * np.pi - np.pi / 2
    return np.stack([np.cos(turns), np.sin(turns)], 1) * np.where(np.arange(corners) % 2, inner, 1.0)[:, None]


def _outlines() -> dict[str, list[np.ndarray]]:
    """The closed polygons (corners, 2) of each shape. The outer one has the area 0.75 π; its bounding box is
    centred on 0."""
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


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene. The same scene always gives the same pixels.

    Returns:
        The image (S, S, 3) uint8 RGB, and labels (S, S) uint8: 0 for the background, `i + 1` where object `i` is seen.
    """
    rng = random.Random(f"{scene.key}/pixels")
    size, unit = scene.image_size, scene.image_size / REFERENCE_SIZE
    picture = _background(rng, size)  # (3, S, S): arithmetic with (S, S) is several times faster than channels last
    labels = np.zeros((size, size), np.uint8)
    softness = 2 * round(1.5 * unit) + 1
    for index, thing in enumerate(scene.objects):
        window, coverage = _coverage(thing, size)
        labels[window][coverage >= HALF_COVERED] = index + 1
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


def _background(rng: random.Random, image_size: int) -> np.ndarray:
    """A dim, slightly coloured picture (3, S, S) float32: a gradient, blotches or grain, with stripes, checks or
    neither."""
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


def _coverage(thing: SceneObject, image_size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """A window of the image around the object and its shadow, and how much of each pixel in it (h, w) uint8 the object
    covers, 255 being all."""
    reach = thing.radius * REACH[thing.shape] + image_size / 24
    left, top = max(0, int(thing.x - reach)), max(0, int(thing.y - reach))
    right, bottom = min(image_size, int(thing.x + reach) + 1), min(image_size, int(thing.y + reach) + 1)
    cosine, sine = math.cos(thing.angle) * thing.radius, math.sin(thing.angle) * thing.radius
    turn = np.array([[cosine, sine], [-sine, cosine]])
    origin = np.array([thing.x - left, thing.y - top])
    # OpenCV's coordinates start in the middle of the first pixel.
    polygons = [
        np.rint((((points @ turn + origin) * SUPERSAMPLING) - 0.5) * 2**SUBPIXEL_BITS).astype(np.int32)
        for points in OUTLINES[thing.shape]
    ]
    canvas = np.zeros(((bottom - top) * SUPERSAMPLING, (right - left) * SUPERSAMPLING), np.uint8)
    cv2.fillPoly(canvas, polygons, 255, shift=SUBPIXEL_BITS)
    cv2.polylines(canvas, polygons, True, 127, shift=SUBPIXEL_BITS)  # else the outline would be filled on both sides
    coverage = cv2.resize(canvas, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
    return (slice(top, bottom), slice(left, right)), coverage


def silhouette_of(thing: SceneObject, image_size: int) -> np.ndarray:
    """The pixels (S, S) bool that the object covers by half or more, whether others hide them or not."""
    mask = np.zeros((image_size, image_size), bool)
    window, coverage = _coverage(thing, image_size)
    mask[window] = coverage >= HALF_COVERED
    return mask


def _texture(thing: SceneObject, window: tuple[slice, slice], unit: float) -> np.ndarray | float:
    """How much of the second tone each pixel of the window (h, w) shows, from 0 to 1, with soft edges."""
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
    """The second tone of a texture: lighter than a dark colour, darker than a light one, and so near that the colour
    keeps its name."""
    luminance = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    if luminance < 40:
        return rgb + 85
    return rgb * 0.45 if luminance > 140 else rgb + (255 - rgb) * 0.62
