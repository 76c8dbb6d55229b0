"""A synthetic referring set drawn from a seed, which needs no download: the project's default. Look at it with

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

from .composition import draw_scene
from .drawing import SHAPES, render
from .phrases import referents
from .rows import generate_rows, load_shapes
from .scenes import (
    COLORS,
    DEFAULT_SIZES,
    FAMILIES,
    HELD_OUT,
    ID_STRIDE,
    MAX_IMAGES,
    RADII,
    TEXTURES,
    Description,
    Expression,
    Phrase,
    Scene,
    SceneObject,
)

__all__ = [
    "COLORS",
    "DEFAULT_SIZES",
    "FAMILIES",
    "HELD_OUT",
    "ID_STRIDE",
    "MAX_IMAGES",
    "RADII",
    "SHAPES",
    "TEXTURES",
    "Description",
    "Expression",
    "Phrase",
    "Scene",
    "SceneObject",
    "draw_scene",
    "generate_rows",
    "load_shapes",
    "referents",
    "render",
]
