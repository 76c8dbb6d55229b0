"""The way into the square and back against the official code's figures and against brute force.

The official implementation printed what is in `fixtures/postprocess.npz`. For `fixtures/warp_opencv_4_8_1.npz` the
OpenCV that it pins warped synthetic images along its affine map.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.pictures import SIDE, picture
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from letterbox_detris import MAX_SIDE, BoxedMask
from processing_detris import DetrisImageProcessor, DetrisProcessor

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).parents[2] / "shared"
MEAN, STD = np.array(OPENAI_CLIP_MEAN), np.array(OPENAI_CLIP_STD)


def grey_levels(pixel_values) -> np.ndarray:
    """Turn normalised values (3, S, S) back into (S, S, 3) from 0 to 255."""
    return (np.asarray(pixel_values).transpose(1, 2, 0) * STD + MEAN) * 255


def cubic_sample(image, y, x, border):
    """Sum up the sixteen neighbours of one place, each times its weight in the cubic kernel (a = -0.75)."""

    def weight(distance):
        a, d = -0.75, abs(distance)
        return (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a

    top, left, total = math.floor(y) - 1, math.floor(x) - 1, 0
    for i in range(top, top + 4):
        for j in range(left, left + 4):
            inside = 0 <= i < image.shape[0] and 0 <= j < image.shape[1]
            total = total + weight(y - i) * weight(x - j) * (image[i, j].astype(float) if inside else border)
    return total


def rounded_place(value):
    """OpenCV 4 samples at the nearest 1/32 of a pixel."""
    return math.floor(value * 32 + 0.5) / 32


@pytest.mark.parametrize("case", range(3), ids=["landscape", "portrait", "enlarged"])
def test_warp_equals_official_opencv(image_processor, case):
    figures = np.load(FIXTURES / "warp_opencv_4_8_1.npz")
    out = image_processor(figures[f"image_{case}"], segmentation_maps=figures[f"mask_{case}"])
    difference = np.abs(grey_levels(out.pixel_values[0]) - figures[f"image_square_{case}"])
    assert difference.max() < 1.01 and difference.mean() < 0.01
    np.testing.assert_array_equal(np.rint(out.labels[0] * 255), figures[f"mask_square_{case}"])


@pytest.mark.parametrize("height, width", [(30, 44), (61, 29), (3, 90)])
def test_warp_equals_brute_force(image_processor, height, width):
    image = picture(height, width)
    out = grey_levels(image_processor(Image.fromarray(image)).pixel_values[0])
    scale = min(SIDE / height, SIDE / width)
    bias_y, bias_x = (SIDE - height * scale) / 2, (SIDE - width * scale) / 2
    border = np.rint(MEAN * 255)
    for y, x in np.random.default_rng(1).integers(0, SIDE, (150, 2)):
        expected = cubic_sample(
            image, rounded_place((y - bias_y) / scale), rounded_place((x - bias_x) / scale), border
        )
        assert np.abs(out[y, x] - np.clip(expected, 0, 255)).max() < 1.01


def test_warp_of_photographs_equals_official(tiny_tokenizer):
    expected_file = SHARED / "conformance/expected/warp_224.safetensors"
    if not expected_file.exists():
        pytest.skip("the official figures for photographs are not beside the repository (shared/conformance)")
    from pycocotools import mask as coco_mask
    from safetensors.numpy import load_file

    expected = load_file(expected_file)
    splits = json.loads((SHARED / "conformance/expected/refer_mini.json").read_text())["refcoco/unc"]
    refs = [ref for refs in splits.values() for ref in refs if f"image_{ref['ref_id']}" in expected]
    assert refs
    image_processor = DetrisImageProcessor(size={"height": 224, "width": 224})
    for ref in refs:
        mask = coco_mask.decode(ref["mask_rle"])
        image = Image.open(SHARED / "refer_mini/images/train2014" / ref["image"])
        out = image_processor(image, segmentation_maps=mask)
        difference = np.abs(grey_levels(out.pixel_values[0]) - expected[f"image_{ref['ref_id']}"])
        assert difference.max() < 1.01 and difference.mean() < 0.01
        np.testing.assert_array_equal(np.rint(out.labels[0] * 255), expected[f"mask_{ref['ref_id']}"])


def test_outside_is_the_mean_colour(image_processor):
    pixel_values = image_processor(picture(20, 40)).pixel_values[0]
    # The official border is rounded to whole grey levels, which leaves up to half a level of 1/255.
    assert np.abs(pixel_values[:, :12]).max() < 0.5 / 255 / STD.min()
    assert pixel_values.dtype == np.float32


def test_the_longest_side_is_read(image_processor):
    for shape in ((8, MAX_SIDE), (MAX_SIDE, 8)):
        out = image_processor(np.full((*shape, 3), 255, np.uint8), segmentation_maps=np.ones(shape, bool))
        assert out.original_sizes.tolist() == [list(shape)] and np.isfinite(out.pixel_values).all()
        with pytest.raises(ValueError, match=r"segmentation_maps\[0\] is .* x .* pixels"):
            image_processor(np.zeros(shape), segmentation_maps=np.ones([side + 1 for side in shape], bool))


@pytest.mark.parametrize("size", [(30, 44), (57, 31), (700, 500)])
def test_a_mask_in_its_box_is_warped_like_the_whole_one(image_processor, size):
    random = np.random.default_rng(0)
    image, whole, boxed = np.zeros((*size, 3), np.uint8), [], []
    for height, width in [(1, 1), (2, 5), (9, 4), (size[0], 3), size]:
        top, left = random.integers(0, size[0] - height + 1), random.integers(0, size[1] - width + 1)
        values = random.integers(0, 2, (height, width), dtype=np.uint8)
        mask = np.zeros(size, np.uint8)
        mask[top : top + height, left : left + width] = values
        whole.append(mask)
        boxed.append(BoxedMask(values, top, left, size))
    scale = SIDE / max(size)
    y, x = (
        np.floor(((np.arange(SIDE) - (SIDE - side * scale) / 2) / scale) * 32 + 0.5).astype(np.float32) / 32
        for side in size
    )
    expected = [cv2.remap(mask * 255, *np.meshgrid(x, y), cv2.INTER_LINEAR) / np.float32(255) for mask in whole]
    images = [image] * len(whole)
    assert np.array_equal(image_processor(images, segmentation_maps=boxed)["labels"], expected)
    assert np.array_equal(image_processor(images, segmentation_maps=whole)["labels"], expected)
    with pytest.raises(ValueError, match=r"\(5, 5\)"):
        image_processor(image, segmentation_maps=boxed[0]._replace(size=(5, 5)))


def test_masks_equal_official(tiny_tokenizer):
    figures = np.load(FIXTURES / "postprocess.npz")
    processor = DetrisProcessor(DetrisImageProcessor(size={"height": 224, "width": 224}), tiny_tokenizer)
    for case in range(3):
        height, width = figures[f"size_{case}"]
        expected = np.unpackbits(figures[f"mask_{case}"], count=height * width).reshape(height, width).astype(bool)
        outputs = SimpleNamespace(logits=torch.from_numpy(figures[f"logits_{case}"]))
        (mask,) = processor.post_process_referring_segmentation(outputs, original_sizes=[(height, width)])
        assert 0.001 < expected.mean() < 0.999
        assert (mask.numpy() != expected).mean() <= 1e-5


@pytest.mark.parametrize("height, width", [(30, 44), (41, 19), (90, 120)])
def test_masks_equal_brute_force(processor, height, width):
    logits = F.interpolate(torch.randn(1, 1, 4, 4, generator=torch.manual_seed(0)), 16, mode="bicubic")[0]
    square = F.interpolate(logits[None].sigmoid(), (SIDE, SIDE), mode="bicubic", align_corners=True)[0, 0].numpy()
    scale = min(SIDE / height, SIDE / width)
    bias_y, bias_x = (SIDE - height * scale) / 2, (SIDE - width * scale) / 2
    places = np.random.default_rng(2).integers(0, (height, width), (300, 2))
    expected = np.array(
        [
            cubic_sample(square, rounded_place(scale * y + bias_y), rounded_place(scale * x + bias_x), 0)
            for y, x in places
        ]
    )
    for threshold in np.quantile(expected, np.linspace(0, 1, 30)):
        (mask,) = processor.post_process_referring_segmentation(
            SimpleNamespace(logits=logits), [(height, width)], threshold=threshold
        )
        assert mask.shape == (height, width) and mask.dtype == torch.bool
        clear = np.abs(expected - threshold) > 1e-5  # nearer than that, rounding decides
        assert clear.sum() > 250
        np.testing.assert_array_equal(mask.numpy()[tuple(places.T)][clear], (expected > threshold)[clear])
    (details,) = processor.post_process_referring_segmentation(
        SimpleNamespace(logits=logits), [(height, width)], output_details=True
    )
    np.testing.assert_allclose(details["probabilities"].numpy()[tuple(places.T)], expected.clip(0, 1), atol=1e-5)


def test_another_size_of_images_costs_no_new_enlargement(processor, monkeypatch):
    interpolate, enlarged = F.interpolate, []
    monkeypatch.setattr(F, "interpolate", lambda *args, **kwargs: enlarged.append(1) or interpolate(*args, **kwargs))
    outputs = SimpleNamespace(logits=torch.zeros(1, 13, 13))  # of a size that no other test has
    for size in [(30, 41), (31, 42), (57, 43)]:
        processor.post_process_referring_segmentation(outputs, [size])
    assert len(enlarged) == 1


def test_a_mask_survives_the_way_there_and_back(processor):
    mask = cv2.circle(np.zeros((90, 120), np.uint8), (70, 40), 25, 1, -1).astype(bool)
    labels = processor.image_processor(picture(90, 120), segmentation_maps=mask, return_tensors="pt").labels
    (back,) = processor.post_process_referring_segmentation(
        SimpleNamespace(logits=torch.logit(labels, eps=1e-4)), [(90, 120)], threshold=0.5
    )
    assert (back.numpy() & mask).sum() / (back.numpy() | mask).sum() > 0.97
