"""What a scene consists of: objects, and phrases with what each means; and the numbers that all of them follow."""

from dataclasses import dataclass
from typing import NamedTuple

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
