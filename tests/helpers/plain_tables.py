"""Tables with pixels of no published layout, written as Parquet."""

import io

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from data.sources import open_records

from .refer_folder import HEIGHT, WIDTH, A, rectangle
from .table_writers import COLUMNS, columns, write

NAMED = {"image": "image", "mask": "mask", "text": "text"}  # the columns of `plain`


def noise(seed, format="PNG"):
    file = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    PIL.Image.fromarray(values).save(file, format)
    return file.getvalue()


def plain(*images, **cells):
    """Rows of a table of no published layout: an image each, by default of a rectangle that is called a thing."""
    row = {"mask": [rectangle(*A)], "text": "a thing"} | cells
    return [row | {"image": {"bytes": image, "path": None} if isinstance(image, bytes) else image} for image in images]


def write_plain(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def open_plain(path, rows, **options):
    write_plain(path, rows)
    return open_records("table", path, columns=NAMED, **options)


def written(refer_set, folder, form, prefix=""):
    """The small set as `columns` tables, which keep all that REFER has; the arguments to open it with."""
    schema = columns("rle")
    rows = {f"{prefix}{split}": split_rows for split, split_rows in schema.rows(refer_set).items()}
    return {"kind": "table", "path": write(schema, rows, folder, form), "columns": COLUMNS}


def stored_images(rows):
    return rows.cast_column("image", datasets.Image(decode=False))["image"][:]
