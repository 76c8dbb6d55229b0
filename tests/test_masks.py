"""Masks: the feature type through Arrow, Parquet and `map`, and run lengths of COCO and of strangers."""

import importlib.util
import warnings

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets.features.features import register_feature
from helpers.refer_folder import HEIGHT, HOSTILE_RLES, MASKS, WIDTH, runs, same_rows
from pycocotools import mask as coco_mask

from data.masks import RleMask, run_lengths


def test_map_and_selection_keep_masks(refer):
    rows = refer.load()["train"]
    counted = rows.map(lambda row: {"area": int(row["mask"].sum())})
    assert counted["area"][:] == [int(MASKS[ann_id][1].sum()) for ann_id in (10, 11, 14, 16)]
    same_rows(counted.remove_columns("area"), rows)
    same_rows(
        rows.select([3, 2, 1, 0]).filter(lambda row: row["mask"].any()).select([2, 1, 0]), rows.select([0, 1, 2])
    )
    np.testing.assert_array_equal(rows[:]["mask"][1], MASKS[11][1])


def test_masks_as_a_plain_struct_and_back(refer):
    rows = refer.load()["train"]
    plain = {"size": datasets.List(datasets.Value("int32")), "counts": datasets.Value("string")}
    shared = rows.cast_column("mask", plain)
    np.testing.assert_array_equal(coco_mask.decode(shared[1]["mask"]), MASKS[11][1])
    same_rows(shared.cast_column("mask", RleMask()), rows)


def test_rows_can_be_made_from_arrays():
    masks = [np.eye(3), np.ones((2, 5), dtype=bool), [[0, 255], [0, 0]], None]
    rows = datasets.Dataset.from_dict({"mask": masks}, features=datasets.Features({"mask": RleMask()}))
    for mask, row in zip(masks[:3], rows, strict=False):
        np.testing.assert_array_equal(row["mask"], np.asarray(mask) != 0)
    assert rows[3]["mask"] is None


def test_compressed_runs_are_read_as_cocos_own():
    """Random masks, from noise to a few long runs, through COCO's own compression and counted pixel by pixel."""
    random = np.random.default_rng(0)
    for _ in range(200):
        height, width = random.integers(1, 400), random.integers(1, 50)
        mask = (np.cumsum(random.random(height * width) < random.random() ** 3) % 2).reshape(width, height).T
        compressed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        assert run_lengths({"size": [int(height), int(width)], "counts": compressed["counts"]}).tolist() == runs(mask)


@pytest.mark.parametrize("size, start", [((1, 1), []), ((HEIGHT, WIDTH), [0, 5])])
def test_runs_of_no_length_do_not_reach_cocos_merge(refer, size, start):
    """There they would be written behind the memory for one run a pixel."""
    height, width = size
    PIL.Image.new("RGB", (width, height)).save(refer.images / "first.jpg")
    refer.instances["images"][0].update(height=height, width=width)
    counts = [*start, *[0] * 5000, height * width - sum(start)]
    parts = [{"size": [height, width], "counts": counts}, {"size": [height, width], "counts": [height * width]}]
    refer.instances["annotations"][0].update(segmentation=parts, bbox=[0, 0, 1, 1])
    refer.refs = refer.refs[:1]
    (row,) = refer.load()["train"]
    ones = np.arange(len(counts)) % 2
    np.testing.assert_array_equal(row["mask"], np.repeat(ones, counts).reshape(width, height).T)


@pytest.mark.parametrize("mask, message", HOSTILE_RLES)
def test_stored_masks_of_strangers_are_checked_before_they_are_decoded(mask, message):
    plain = {"size": datasets.List(datasets.Value("int32")), "counts": datasets.Value("string")}
    rows = datasets.Dataset.from_list([{"mask": mask}], datasets.Features({"mask": plain}))
    rows = rows.cast(datasets.Features({"mask": RleMask()}))
    with pytest.raises(ValueError, match=message):
        rows[0]


def test_importing_warns_of_nothing():
    for name in ("data.masks", "data.refer"):
        spec = importlib.util.find_spec(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
    with warnings.catch_warnings(action="ignore"):
        register_feature(RleMask, "RleMask")  # the copy that ran has put its own class there
