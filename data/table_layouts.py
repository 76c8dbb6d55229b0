"""What the columns of published tables with pixels mean: one class for each schema, and masks in whatever form.

A table is a `datasets.Dataset`. The classes say where in it the objects are, and turn the cells of one object into
the parts of a row. They know nothing of files, of the Hub or of images: `tables.py` reads those. No cell makes anybody
open a file or an address.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
from pycocotools import mask as coco_mask

from configuration_detris import short_repr

from .coco_names import COCO_CATEGORIES, without_object_number
from .images import read_png_mask
from .masks import MAX_OUTLINE, RUN_LONGEST, RleMask
from .records import NO_TARGET

IDS = ("ref_id", "ann_id", "image_id")
OPTIONAL = (*IDS, "category", "bbox", "split", "file_name")  # what a row can do without
WHOLE_NUMBER = re.compile(r"-?\d{1,18}", re.ASCII)
FILE_NAME = re.compile(r"\w[\w. +-]{0,199}")  # without folders and addresses
LIST_AS_TEXT = re.compile(r"""\[\s*(?:(["']).*\1\s*)?\]""", re.DOTALL)  # ["a", "b"], as JSON and Python write it
OWN_COLUMNS = "name the columns of your own table: --columns image=… mask=… text=…"


class Place(NamedTuple):
    """Where in a table one object is."""

    row: int  # its first row
    rows: int = 1  # how many adjacent rows are of this object
    position: int = 0  # which of the objects of the row it is


class TableLayout:
    """How to read one schema of tables.

    Attributes:
        name: what the command line calls it.
        image: the column of images.
        needed: the columns without which nothing can be read, that of images included.
        own: whether it is for tables that somebody made for themselves.
    """

    name: str
    image: str = "image"
    own: bool = False
    needed: tuple[str, ...]

    def places(self, table: datasets.Dataset) -> list[Place]:
        """Where the objects are.

        Args:
            table: a split, without the column of images.

        Raises:
            ValueError: a column that tells how many objects there are is of another type.
        """
        return [Place(row) for row in range(len(table))]

    def read(self, rows: list[dict], position: int, size: tuple[int, int]) -> dict:
        """Read one object.

        Args:
            rows: the cells of its rows, without the image.
            position: as in its `Place`.
            size: (height, width) of the image in pixels.

        Returns:
            Arguments of `records.make_row`: always `mask` and `sentences`, and of `OPTIONAL` what the table has.
            `file_name` is the name that COCO has given the image.

        Raises:
            ValueError: a cell that is needed is missing or not what it should be, or two cells contradict each other.
        """
        raise NotImplementedError


class RefcocoBenchmark(TableLayout):
    """`jxu124/refcoco-benchmark`: a row is an image, with REFER's annotations of all objects in it."""

    name, needed = "refcoco_benchmark", ("image", "ref_list")

    def places(self, table: datasets.Dataset) -> list[Place]:
        return _places_in_lists(table, "ref_list")

    def read(self, rows: list[dict], position: int, size: tuple[int, int]) -> dict:
        entry = _entry(rows[0], "ref_list", position)
        annotation, ref = _struct(entry, "ann_info"), _struct(entry, "ref_info")
        image = rows[0].get("image_info")
        image = image if isinstance(image, dict) else {}
        for side, name in zip(size, ("height", "width")):
            if number_in(image.get(name)) not in (None, side):
                raise ValueError(f"image_info says {name} {short_repr(image[name])}, but the image has {side} pixels.")
        mask = mask_of(annotation.get("segmentation"), size)
        if mask is None:
            raise ValueError(
                "segmentation is null or empty, as it is for crowds, whose RLE this table cannot hold; leave the "
                "object out, or read it from REFER's files."
            )
        sentences = ref.get("sentences")
        if not isinstance(sentences, list) or not all(isinstance(sentence, dict) for sentence in sentences):
            raise ValueError(f"sentences is {short_repr(sentences)}; give a list of objects with the field sent.")
        ids = {
            "ref_id": number_in(ref.get("ref_id")),
            "ann_id": _agreed("ann_id", annotation.get("id"), ref.get("ann_id")),
            "image_id": _agreed("image_id", annotation.get("image_id"), ref.get("image_id")),
        }
        category_id = _agreed("category_id", annotation.get("category_id"), ref.get("category_id"))
        if category_id is not None and (type(category_id) is not int or category_id not in COCO_CATEGORIES):
            raise ValueError(f"category_id is {short_repr(category_id)}; give the id of one of COCO's 80 categories.")
        return _given(
            mask=mask,
            sentences=[sentence.get("sent") for sentence in sentences],
            category=COCO_CATEGORIES.get(category_id),
            bbox=annotation.get("bbox"),
            file_name=_image_name(image.get("file_name") or ref.get("file_name")),
            **ids,
        )


class RefcocoM(TableLayout):
    """`moondream/refcoco-m`: a row is an image, with new masks of objects in it."""

    name, needed = "refcoco_m", ("image", "samples")

    def places(self, table: datasets.Dataset) -> list[Place]:
        return _places_in_lists(table, "samples")

    def read(self, rows: list[dict], position: int, size: tuple[int, int]) -> dict:
        sample = _entry(rows[0], "samples", position)
        return _given(
            mask=_rles([sample.get("mask")], "mask", size),
            sentences=_phrases(sample.get("sentences"), "sentences"),
            ref_id=number_in(sample.get("id")),
            image_id=_agreed("image_id", rows[0].get("image_id"), sample.get("image_id")),
            category=sample.get("category"),
            bbox=self._in_pixels(sample.get("bbox"), size),
            file_name=_image_name(rows[0].get("file_name")),
        )

    @staticmethod
    def _in_pixels(bbox: Any, size: tuple[int, int]) -> Any:
        """Readers of this table expect boxes in pixels and in fractions of the image; no object is one pixel large."""
        if isinstance(bbox, list) and len(bbox) == 4 and all(type(side) is float and 0 <= side <= 1 for side in bbox):
            return [side * pixels for side, pixels in zip(bbox, (size[1], size[0]) * 2)]
        return bbox


class PBench(TableLayout):
    """`tiiuae/PBench`: a row is a phrase, with the masks of all objects that it names, which may be none."""

    name, needed = "pbench", ("image", "expression", "masks")

    def read(self, rows: list[dict], position: int, size: tuple[int, int]) -> dict:
        masks, count = rows[0]["masks"], number_in(rows[0].get("count"))
        masks = [] if masks is None else masks
        if not isinstance(masks, list):
            raise ValueError(f"masks is {short_repr(masks)}; give a list of RLEs, empty if the phrase names nothing.")
        if count is not None and count != len(masks):
            raise ValueError(f"count is {short_repr(count)}, but there are {len(masks)} masks; correct one of them.")
        return _given(
            mask=_rles(masks, "masks", size),
            sentences=_phrases(rows[0]["expression"], "expression"),
            ann_id=NO_TARGET if len(masks) > 1 else None,
        )


class BoolMasks(TableLayout):
    """`Ricky06662/refcoco_testA`, `daehyeonchoi/ReasonSeg_val` and their kind: a row is a phrase and a mask of truth
    values. Adjacent rows of the same object are read as one, with all their phrases."""

    name, needed = "bool_masks", ("image", "text", "mask")

    def places(self, table: datasets.Dataset) -> list[Place]:
        if not {"image_id", "ann_id"} <= set(table.column_names) or not len(table):
            return super().places(table)
        ids = table.select_columns(["image_id", "ann_id"])[:]
        objects = list(zip(ids["image_id"], ids["ann_id"]))
        masks = table.select_columns(["mask"]).with_format("arrow")
        starts = [0]
        for row in range(1, len(objects)):
            # Masks are large, and so are compared as Arrow holds them, and only where the numbers are equal.
            same = None not in objects[row] and objects[row] == objects[row - 1]
            if not same or masks[row - 1 : row]["mask"] != masks[row : row + 1]["mask"]:
                starts.append(row)
        return [Place(start, end - start) for start, end in zip(starts, [*starts[1:], len(objects)])]

    def read(self, rows: list[dict], position: int, size: tuple[int, int]) -> dict:
        mask = _plain(rows[0]["mask"])
        if mask and isinstance(mask, list):
            if not isinstance(mask[0], list) or not _holds_truth(mask[0]):
                raise ValueError(
                    f"mask is {short_repr(mask)}; give nested lists (height, width) of truth values. If it is a mask "
                    f"in another form, {OWN_COLUMNS}."
                )
            mask = _encoded(_grid(mask, size, "mask"))
        else:
            mask = mask_of(mask, size)
        ann_id, bbox = rows[0].get("ann_id"), rows[0].get("bbox")
        several = len(ann_id) > 1 if isinstance(ann_id, list) else isinstance(ann_id, str) and "_" in ann_id
        if isinstance(ann_id, list):
            ann_id = ann_id[0] if len(ann_id) == 1 else None
        if isinstance(bbox, list) and len(bbox) == 4 and all(type(side) in (int, float) for side in bbox):
            left, top, right, bottom = bbox
            bbox = [left, top, right - left, bottom - top]
        return _given(
            mask=mask,
            sentences=[phrase for row in rows for phrase in _phrases(row["text"], "text")],
            ann_id=NO_TARGET if several else _number_if_text(ann_id),
            image_id=_number_if_text(rows[0].get("image_id")),
            bbox=bbox if bbox != [] else None,  # [] is the box of an empty mask
            file_name=_image_name(rows[0].get("file_name")),
        )


class Lmms(TableLayout):
    """`lmms-lab/RefCOCO`, `RefCOCOplus` and `RefCOCOg`: a row is an object, with one polygon of it."""

    name, needed = "lmms", ("image", "answer", "segmentation")

    def read(self, rows: list[dict], position: int, size: tuple[int, int]) -> dict:
        row = rows[0]
        if row.get("iscrowd"):
            raise ValueError("iscrowd is 1, and the mask of a crowd is no polygon; leave the object out.")
        segmentation = row["segmentation"]
        if not isinstance(segmentation, list) or not segmentation or isinstance(segmentation[0], list | dict):
            raise ValueError(f"segmentation is {short_repr(segmentation)}; give one polygon x1, y1, x2, y2, …")
        return _given(
            mask=mask_of(segmentation, size),
            sentences=_phrases(row["answer"], "answer"),
            bbox=row.get("bbox"),
            file_name=_image_name(row.get("file_name")),
        )


class ColumnsLayout(TableLayout):
    """Any table with an image, a phrase or list of phrases, and a mask in a row, whose columns the user has named.

    Args:
        columns: the table's name of each column, by `image`, `mask`, `text`, or one of `OPTIONAL`.

    Raises:
        ValueError: one of the first three is missing, or there is no such part of a row.
    """

    name, own = "columns", True

    def __init__(self, columns: dict[str, str]) -> None:
        needed = ("image", "mask", "text")
        missing = [part for part in needed if part not in columns]
        unknown = [part for part in columns if part not in (*needed, *OPTIONAL)]
        if missing or unknown:
            wrong = [f"the column of {', '.join(missing)} is not named"] * bool(missing)
            wrong += [f"nothing is called {', '.join(unknown)}"] * bool(unknown)
            raise ValueError(
                f"{', and '.join(wrong)}: {OWN_COLUMNS}, and if the table has them, of {', '.join(OPTIONAL)}, in this "
                "form."
            )
        self.columns, self.image, self.needed = dict(columns), columns["image"], tuple(columns.values())

    def read(self, rows: list[dict], position: int, size: tuple[int, int]) -> dict:
        cells = {part: rows[0][column] for part, column in self.columns.items() if part != "image"}
        mask, text = cells.pop("mask"), cells.pop("text")
        if isinstance(text, str) and LIST_AS_TEXT.fullmatch(text.strip()):
            raise ValueError(
                f"{self.columns['text']} is a list that is written as text, {short_repr(text)}; give a list of "
                "phrases itself."
            )
        return _given(
            mask=mask_of(mask, size),
            sentences=_phrases(text, self.columns["text"]),
            file_name=_image_name(cells.pop("file_name", None)),
            **{part: number_in(cell) if part in IDS else cell for part, cell in cells.items()},
        )


TABLE_LAYOUTS: dict[str, TableLayout] = {
    layout.name: layout for layout in (RefcocoBenchmark(), RefcocoM(), PBench(), BoolMasks(), Lmms())
}


def recognised(columns: Iterable[str]) -> TableLayout:
    """The layout whose columns a table has.

    Raises:
        ValueError: it lacks columns of each layout; the message says which.
    """
    columns = set(columns)
    missing = {name: [part for part in layout.needed if part not in columns] for name, layout in TABLE_LAYOUTS.items()}
    for name, layout in TABLE_LAYOUTS.items():
        if not missing[name]:
            return layout
    lacking = ", ".join(f"for {name} {' and '.join(parts)}" for name, parts in missing.items())
    raise ValueError(
        f"the columns {short_repr(sorted(columns))} are of no known layout; missing are {lacking}. Else {OWN_COLUMNS}."
    )


# --- masks --------------------------------------------------------------------------------------------------------


def mask_of(value: Any, size: tuple[int, int]) -> dict | list | None:
    """A mask in any of the forms that tables hold: an image, RLE, polygons, or a pixel's value in nested lists.

    Nested lists of the image's (height, width) are a mask of values, 0 and 1, and other lists of numbers are polygons.
    Only for an image of one row do the values themselves decide. RLEs and lists may be JSON text.

    Args:
        value: the bytes of a PNG, alone or as `{"bytes": …}`; an RLE or a list of them; polygons, or one flat polygon;
            nested lists (height, width) of truth values or of 0 and 1; null or an empty list if there is no object.
        size: (height, width) of the image in pixels.

    Returns:
        COCO's polygons and RLEs as `masks.union_of_parts` takes them, or None if the phrases name nothing.

    Raises:
        ValueError: it is nothing of that, or not of the image's size.
        OSError: an image is no PNG, or cut short.
    """
    if isinstance(value, str):
        value = _from_json(value)
    value = _plain(value)
    if isinstance(value, dict) and "bytes" in value:
        if value["bytes"] is None and value.get("path") is not None:
            raise ValueError(
                f"the mask is only a path, {short_repr(value['path'])}, which is not opened; embed its bytes."
            )
        value = value["bytes"]
    if value is None or value == []:
        return None
    if isinstance(value, bytes):
        return _unless_empty(read_png_mask(value, size, ""))
    if isinstance(value, dict):
        return _rles([value], "the mask", size)
    if not isinstance(value, list):
        raise ValueError(f"the mask is {short_repr(value)}; give a PNG's bytes, RLE, polygons or nested lists.")
    if all(isinstance(part, dict | str) for part in value):
        return _rles(value, "the mask", size)
    if not isinstance(value[0], list):
        return _polygons([value])
    is_grid = _has_size(value, size) and (size[0] > 1 or _holds_truth(value[0]))
    if is_grid or type(next(iter(value[0]), None)) is bool:
        return _encoded(_grid(value, size, "the mask"))
    return _polygons(value)


def _plain(value: Any) -> Any:
    """An array as nested lists, which is what `datasets` stores one as; other values as they are."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(
            f"the mask is the text {short_repr(text)}, which is no JSON; no file of that name is opened. Give a PNG's "
            "bytes, RLE, polygons or nested lists."
        ) from None


def _rles(parts: list, name: str, size: tuple[int, int]) -> list[dict] | None:
    """RLEs whose lengths are checked before anybody decodes them; `union_of_parts` checks the rest."""
    rles = [_from_json(part) if isinstance(part, str) else part for part in parts]
    pixels = size[0] * size[1]
    for rle in rles:
        counts = rle.get("counts") if isinstance(rle, dict) else None
        if not isinstance(counts, str | bytes | list) or not isinstance(rle.get("size"), list | tuple):
            raise ValueError(f"{name} holds {short_repr(rle)}; give COCO's RLE, an object with size and counts.")
        if tuple(rle["size"]) != size:
            raise ValueError(
                f"{name} holds an RLE of {short_repr(rle['size'])}, but its image is {list(size)} (height, width)."
            )
        if len(counts) > (pixels + 2) * (1 if isinstance(counts, list) else RUN_LONGEST):
            raise ValueError(f"{name} holds an RLE of {len(counts):,} counts for {pixels:,} pixels; write it anew.")
    return [{"size": list(size), "counts": rle["counts"]} for rle in rles] or None


def _polygons(parts: list) -> list[list]:
    """Polygons of numbers, of which there are not too many; `union_of_parts` checks the rest."""
    for part in parts:
        if not isinstance(part, list) or not set(map(type, part)) <= {int, float}:
            raise ValueError(f"the mask holds {short_repr(part)}; give polygons of numbers x1, y1, x2, y2, …")
    if (numbers := sum(map(len, parts))) > MAX_OUTLINE:
        raise ValueError(f"the mask's polygons have {numbers:,} numbers, over {MAX_OUTLINE:,}; make them simpler.")
    return parts


def _has_size(value: list, size: tuple[int, int]) -> bool:
    """Whether nested lists have as many rows and columns as an image of `size` (height, width)."""
    return len(value) == size[0] and all(isinstance(row, list) and len(row) == size[1] for row in value)


def _holds_truth(row: list) -> bool:
    """Whether a list holds only truth values, or 0 and 1."""
    return set(map(type, row)) <= {bool, int, float} and set(row) <= {0, 1}


def _grid(value: Any, size: tuple[int, int], name: str) -> np.ndarray:
    """Nested lists (height, width) of truth values, or of 0 and 1, as an array of uint8; else a ValueError."""
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise ValueError(f"{name} is {short_repr(value)}; give nested lists (height, width) of truth values.")
    if not _has_size(value, size):
        widths = sorted({len(row) for row in value})
        if len(widths) > 1:
            raise ValueError(f"{name} has rows of {widths[0]} to {widths[-1]} values; give all the image's {size[1]}.")
        found = f"{len(value)} x {widths[0]} values (height x width)"
        raise ValueError(f"{name} is {found}, but its image is {size[0]} x {size[1]}.")
    for row in value:
        if not _holds_truth(row):
            raise ValueError(f"{name} has the row {short_repr(row)}; give truth values, or 0 outside and 1 inside.")
    return np.array(value, dtype=np.uint8)


def _encoded(pixels: np.ndarray) -> dict | None:
    """An array of 0 and 1 as compressed RLE; None if there is no 1."""
    return _unless_empty(RleMask().encode_example(pixels))


def _unless_empty(rle: dict) -> dict | None:
    return rle if coco_mask.area(rle) else None


# --- cells --------------------------------------------------------------------------------------------------------


def _places_in_lists(table: datasets.Dataset, column: str) -> list[Place]:
    """A place for each entry of a column of lists, and one for each cell without entries, which `read` refuses."""
    cells = table.select_columns([column]).with_format("arrow")[:][column]
    try:
        lengths = pa.compute.list_value_length(cells).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"the column {column} holds {cells.type}; it should hold lists of objects.") from error
    return [Place(row, position=index) for row, length in enumerate(lengths) for index in range(length or 1)]


def _entry(row: dict, column: str, position: int) -> dict:
    """The object at a position of a cell that holds a list."""
    cell = row[column]
    if not isinstance(cell, list) or len(cell) <= position:
        raise ValueError(f"{column} is {short_repr(cell)}; give a list of the objects in the image.")
    return _struct({f"{column}[{position}]": cell[position]}, f"{column}[{position}]")


def _struct(parent: dict, name: str) -> dict:
    """A part of a cell that is itself made of named parts."""
    value = parent.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {short_repr(value)}; give an object with its fields.")
    return value


def _phrases(cell: Any, name: str) -> list:
    """The phrases of a cell that holds one or a list of them; `make_row` checks each."""
    if not isinstance(cell, str | list):
        raise ValueError(f"{name} is {short_repr(cell)}; give a phrase or a list of phrases.")
    return [cell] if isinstance(cell, str) else cell


def number_in(cell: Any) -> Any:
    """A whole number that is written as text or as a float, as whole number; NaN as None; others as they are."""
    if isinstance(cell, str) and WHOLE_NUMBER.fullmatch(cell):
        return int(cell)
    if isinstance(cell, float) and cell.is_integer():
        return int(cell)
    return None if cell != cell else cell


def _number_if_text(cell: Any) -> Any:
    """As `_number`, but None for text that is no number, such as the name of an image."""
    number = number_in(cell)
    return None if isinstance(number, str) else number


def _agreed(name: str, first: Any, second: Any) -> Any:
    """A number that stands at two places of a table, or only at one."""
    first, second = number_in(first), number_in(second)
    if first is not None and second is not None and first != second:
        raise ValueError(f"{name} is {short_repr(first)} and also {short_repr(second)}; correct one of them.")
    return second if first is None else first


def _image_name(cell: Any) -> str | None:
    """The name of an image's file, if it is no more than a name."""
    if not isinstance(cell, str) or not FILE_NAME.fullmatch(cell):
        return None
    return without_object_number(cell)


def _given(mask: dict | list | None, sentences: list, **optional: Any) -> dict:
    """Arguments of `make_row` without the optional ones that are None."""
    given = {name: value for name, value in optional.items() if value is not None}
    return {"mask": mask, "sentences": sentences} | given
