"""What a scene consists of: objects, and phrases with what each means; and the numbers that all of them follow."""

from dataclasses import dataclass
from typing import NamedTuple

DEFAULT_SIZES = {"train": 4000, "val": 250, "testA": 200, "testB": 200, "unseen": 150}  # images
FAMILIES = ("attribute", "position", "relation", "superlative", "ordinal")
# How often each family is tried. Some fit a scene more rarely than others: the phrases drawn are about 45, 25, 12, 10
# and 8 % of each, near RefCOCO's shares.
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
RADII = {"small": (13.0, 15.0), "medium": (18.0, 20.5), "large": (25.0, 27.5)}  # pixels, in an image of side 96
HELD_OUT = {
    ("red", "star"),
    ("yellow", "ring"),
    ("green", "triangle"),
    ("blue", "cross"),
    ("white", "square"),
    ("black", "circle"),
}

MIN_IMAGE_SIZE = 48  # pixels, of a side
MAX_IMAGES, ID_STRIDE = 10**7, 10  # ids that are kept free for the images of a split, for the objects of an image
REFERENCE_SIZE = 96  # side of the image, in pixels, for which radii and textures are given
MIN_OBJECTS, OBJECT_COUNT_WEIGHTS = 2, (0.35, 0.40, 0.25)  # how often a scene has two objects, three, four
MAX_OBJECTS = MIN_OBJECTS + len(OBJECT_COUNT_WEIGHTS) - 1
MAX_OBJECT_SCALE = 1.25  # the largest star just fits into the image


class Description(NamedTuple):
    """Attributes that an object must have; one that is `None` may be anything."""

    shape: str | None = None
    color: str | None = None
    texture: str | None = None
    size: str | None = None

    def fits(self, thing: "SceneObject") -> bool:
        """Whether the object has all of these attributes."""
        return (
            self.shape in (None, thing.shape)
            and self.color in (None, thing.color)
            and self.texture in (None, thing.texture)
            and self.size in (None, thing.size)
        )


class Expression(NamedTuple):
    """What a phrase means: the target's attributes and, in all families but "attribute", how it stands among others.

    Attributes:
        family: one of `FAMILIES`.
        target: the object that is named.
        word: a key of `PLACES`, `RELATIONS`, `SUPERLATIVES` or `DIRECTIONS`, depending on the family.
        anchor: the other object of a relation.
        rank: the place in the order of an ordinal, from 1.
    """

    family: str
    target: Description
    word: str = ""
    anchor: Description | None = None
    rank: int = 0


class Phrase(NamedTuple):
    """The words that name an object, and what they mean."""

    text: str
    expression: Expression


@dataclass(frozen=True)
class SceneObject:
    """One shape.

    Attributes:
        shape, color, texture, size: names, as phrases use them.
        x, y: its centre, in pixels.
        radius: sets its size, in pixels: inside the outer outline of every shape lie 0.75 π radius² pixels.
        angle, grain: how far its outline and its texture are turned, in radians.
        rgb: its colour, each channel from 0 to 255.
        visible_area: how many pixels show it.
    """

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
    """Objects from back to front, and the phrases that name them.

    Attributes:
        key: seeds the picture's background, light and noise.
        image_size: side of the image, in pixels.
        covers: `covers[i][j]` counts the pixels where object `i` is seen and hides object `j`.
        phrases: `phrases[i]` name object `i`; there are none if it is not referred to.
    """

    key: str
    image_size: int
    objects: tuple[SceneObject, ...]
    covers: tuple[tuple[int, ...], ...]
    phrases: tuple[tuple[Phrase, ...], ...] = ()
