"""Rows of the schema: images stay where they are, masks are small, and both are the same when loaded again."""

import datasets
import numpy as np
import pyarrow.parquet
from helpers.refer_folder import HEIGHT, MASKS, WIDTH, same_rows
from pycocotools import mask as coco_mask

from data.masks import RleMask
from data.records import skipped_notice


def test_images_stay_where_they_are_and_masks_are_small(refer):
    rows = refer.load()["train"]
    stored = rows.cast_column("image", datasets.Image(decode=False)).cast_column("mask", RleMask(decode=False))
    assert stored[0]["image"] == {"bytes": None, "path": str(refer.images / "first.jpg")}
    assert stored[0]["mask"]["size"] == [HEIGHT, WIDTH] and len(stored[0]["mask"]["counts"]) < 50


def test_arrow_gives_the_same_rows(refer, tmp_path):
    loaded = refer.load()
    loaded.save_to_disk(tmp_path / "arrow")
    back = datasets.load_from_disk(tmp_path / "arrow")
    assert list(back) == list(loaded)
    for split in loaded:
        same_rows(back[split], loaded[split])


def test_parquet_gives_the_same_rows(refer, tmp_path):
    rows = refer.load()["train"]
    rows.to_parquet(tmp_path / "rows.parquet")
    same_rows(datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache")), rows)
    stored = pyarrow.parquet.read_table(tmp_path / "rows.parquet")["mask"].to_pylist()  # what others see
    np.testing.assert_array_equal(coco_mask.decode(stored[1]), MASKS[11][1])


def test_one_object_is_one():
    assert skipped_notice(1) == "1 object has no phrases and is skipped, as in the official loader."
    assert skipped_notice(2) == "2 objects have no phrases and are skipped, as in the official loader."
