"""A synthetic referring set drawn from a seed, which needs no download: the project's default. To look at it:

    python -m data.shapes --output shapes.png

A scene holds two to four textured shapes, some of them partly hidden, and phrases that name one object each. An
`Expression` is what a phrase means; `referents` says which objects of a scene fit it, and a phrase is used only when
exactly one object does. Every border has a margin, and a phrase is dropped when an object that it could mean stands
within the margin, so that all reasonable readings agree. With S the side of the image, in pixels:

* attribute ("small striped star"): the only object with these attributes. Middle sizes are neither small nor large.
* position ("circle on the left"): the only circle whose centre lies in the left 40 % of the image (right, top and
  bottom alike; a corner is two of them at once; the middle is the square from 0.35 S to 0.65 S), while no circle's
  centre lies within 0.03 S of that border. The circle on the left is therefore the leftmost circle too.
* relation ("star left of the green circle"): the only star whose centre lies left of the anchor's by 0.1 S or more,
  within 45° of that direction. In front of and behind: the one object hides a part of the other that is at least
  0.4 % of the image. Closest to: the centres of all others are at least 1.3 times as far away.
* superlative ("largest circle", "leftmost object"): the largest has 1.3 times the visible area and 1.12 times the
  radius of the next one; the centre of the leftmost is 0.06 S away from the next one's.
* ordinal ("second circle from the left"): its centre is 0.06 S away from those before and after it in that order.

The pairs of colour and shape in `HELD_OUT` appear only in the split `unseen`, whose phrases name no other objects.
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
