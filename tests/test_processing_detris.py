"""The processor against the official code's figures, brute force, and Pillow.

`fixtures/tokens.json` and `fixtures/postprocess.npz` are the official implementation's own output.
`fixtures/warp_opencv_4_8_1.npz` holds synthetic images, warped along the official affine map by the OpenCV it pins.
"""

import io
import json
import math
import os
import pickle
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import cv2
import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from datasets.fingerprint import Hasher
from helpers.tokenizers import build_clip_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import PaddingStrategy

from data import refer
from processing_detris import MAX_SIDE, MAX_SQUARE, BoxedMask, DetrisImageProcessor, DetrisProcessor

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(__file__).parents[2] / "shared"
SIDE = 56
MEAN, STD = np.array(OPENAI_CLIP_MEAN), np.array(OPENAI_CLIP_STD)


@pytest.fixture
def processor(tiny_tokenizer) -> DetrisProcessor:
    return DetrisProcessor(
        image_processor=DetrisImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer=tiny_tokenizer
    )


@pytest.fixture
def image_processor() -> DetrisImageProcessor:
    return DetrisImageProcessor(size={"height": SIDE, "width": SIDE})


def picture(height=30, width=44, seed=0) -> np.ndarray:
    """Smooth colours with some noise, (height, width, 3)."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.clip(smooth + random.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


def grey_levels(pixel_values) -> np.ndarray:
    """Normalised (3, S, S) back to (S, S, 3) from 0 to 255."""
    return (np.asarray(pixel_values).transpose(1, 2, 0) * STD + MEAN) * 255


def cubic_sample(image, y, x, border):
    """Brute force: the sixteen neighbours of one place, each with the weight of the cubic kernel, a = -0.75."""

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


# Images


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


def test_array_layouts_give_one_result(image_processor):
    image = picture()
    layouts = [
        Image.fromarray(image),
        image,
        image.transpose(2, 0, 1),
        image.astype(np.float32) / 255,
        image.astype(np.float64) / 255,
        image.astype(np.int64),
        image.astype(np.uint16) * 257,
        np.dstack([image, np.full(image.shape[:2], 9, np.uint8)]),
        torch.from_numpy(image).permute(2, 0, 1),
        torch.from_numpy(image).permute(2, 0, 1).float() / 255,
    ]
    out = image_processor(layouts)
    assert out.original_sizes.tolist() == [[30, 44]] * len(layouts)
    for pixel_values in out.pixel_values[1:]:
        np.testing.assert_array_equal(pixel_values, out.pixel_values[0])
    batch = image_processor(torch.from_numpy(np.stack([image] * 2)).permute(0, 3, 1, 2), return_tensors="pt")
    assert isinstance(batch.pixel_values, torch.Tensor) and batch.pixel_values.shape == (2, 3, SIDE, SIDE)
    np.testing.assert_array_equal(batch.pixel_values[1], out.pixel_values[0])


def palette(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image).quantize(200)


def transparent_palette(image: np.ndarray) -> Image.Image:
    quantized = palette(image)
    quantized.info["transparency"] = 3
    return quantized


def cmyk(image: np.ndarray) -> Image.Image:
    """Ink is what white paper lacks of a colour, without black."""
    return Image.merge("CMYK", [*Image.fromarray(255 - image).split(), Image.new("L", image.shape[1::-1], 0)])


COLOURS = {  # a picture in another mode, and the (height, width, 3) that a person sees
    "grey": (lambda rgb: Image.fromarray(rgb[..., 0]), lambda rgb: rgb[..., [0, 0, 0]]),
    "grey array": (lambda rgb: rgb[..., 0], lambda rgb: rgb[..., [0, 0, 0]]),
    "grey and alpha": (lambda rgb: Image.fromarray(rgb[..., 0]).convert("LA"), lambda rgb: rgb[..., [0, 0, 0]]),
    "grey and alpha array": (lambda rgb: rgb[..., :2], lambda rgb: rgb[..., [0, 0, 0]]),
    "16-bit grey": (lambda rgb: Image.fromarray(rgb[..., 0] * np.uint16(257)), lambda rgb: rgb[..., [0, 0, 0]]),
    "bilevel": (
        lambda rgb: Image.fromarray(rgb[..., 0] > 127),
        lambda rgb: (rgb[..., [0, 0, 0]] > 127) * np.uint8(255),
    ),
    "palette": (palette, lambda rgb: np.asarray(palette(rgb).getpalette())[: 3 * 200].reshape(-1, 3)[palette(rgb)]),
    "transparent palette": (
        transparent_palette,
        lambda rgb: np.asarray(palette(rgb).getpalette())[: 3 * 200].reshape(-1, 3)[palette(rgb)],
    ),
    "RGBA": (lambda rgb: Image.fromarray(np.dstack([rgb, rgb[..., 0]])), lambda rgb: rgb),
    "CMYK": (cmyk, lambda rgb: rgb),
}


@pytest.mark.parametrize("colours", COLOURS)
def test_colour_modes(image_processor, colours, tmp_path):
    make, see = COLOURS[colours]
    rgb = picture()
    image = make(rgb)
    seen = image_processor(see(rgb).astype(np.uint8)).pixel_values
    np.testing.assert_array_equal(image_processor(image).pixel_values, seen)
    if isinstance(image, Image.Image):  # and as it comes from a file
        image.save(tmp_path / "image.tif")
        np.testing.assert_array_equal(image_processor(Image.open(tmp_path / "image.tif")).pixel_values, seen)


@pytest.mark.parametrize(
    "orientation, stored_from_upright",
    [
        (2, lambda image: image[:, ::-1]),
        (3, lambda image: image[::-1, ::-1]),
        (6, lambda image: np.rot90(image, 1)),
        (8, lambda image: np.rot90(image, -1)),
    ],
)
def test_exif_rotation(image_processor, orientation, stored_from_upright):
    upright, file = picture(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored_from_upright(upright))).save(file, "PNG", exif=exif)
    out = image_processor(Image.open(file), segmentation_maps=upright[..., 0] > 127)
    expected = image_processor(upright, segmentation_maps=upright[..., 0] > 127)
    assert out.original_sizes.tolist() == [[30, 44]]
    np.testing.assert_array_equal(out.pixel_values, expected.pixel_values)
    np.testing.assert_array_equal(out.labels, expected.labels)


@pytest.mark.parametrize("height", [1, 3])
def test_thin_images_keep_their_axes(image_processor, height):
    image = Image.fromarray(picture(height, 90)[..., 0])
    out = image_processor([image, np.asarray(image), image.convert("RGB")])
    assert out.original_sizes.tolist() == [[height, 90]] * 3
    np.testing.assert_array_equal(out.pixel_values[0], out.pixel_values[1])
    np.testing.assert_array_equal(out.pixel_values[0], out.pixel_values[2])


def test_truncated_file_is_named(image_processor, tmp_path):
    Image.fromarray(picture(200, 200)).save(tmp_path / "cat.jpg")
    (tmp_path / "cat.jpg").write_bytes((tmp_path / "cat.jpg").read_bytes()[:2000])
    with pytest.raises(OSError, match=r"images\[1\] \(.*cat\.jpg\) cannot be decoded: .*truncated"):
        image_processor([picture(), Image.open(tmp_path / "cat.jpg")])


@pytest.mark.parametrize(
    "image, error, message",
    [
        ("cat.jpg", TypeError, r"images\[0\] is of type str"),
        (np.zeros((5, 6, 7)), ValueError, r"images\[0\] has shape \(5, 6, 7\)"),
        (np.zeros((0, 6, 3)), ValueError, r"images\[0\] has shape \(0, 6, 3\)"),
        (np.full((5, 6, 3), 200.0), ValueError, r"images\[0\] holds float64 values from 200.0"),
        (np.full((5, 6, 3), np.nan), ValueError, r"images\[0\] holds float64 values from nan"),
        (np.full((5, 6, 3), -1), ValueError, r"images\[0\] holds int64 values from -1"),
        (np.zeros((5, 6, 3), complex), ValueError, r"images\[0\] holds complex128"),
        ([], ValueError, "images is empty"),
        (b"\xff\xd8\xff", TypeError, r"images\[0\] is of type bytes: give a PIL image, which PIL.Image.open makes"),
        (np.array([["a", "b"]]), ValueError, r"images\[0\] holds <U1 values: give uint8"),
        (np.array([[None, 1]]), ValueError, r"images\[0\] holds object values: give uint8"),
        (torch.eye(4).to_sparse(), TypeError, r"images\[0\] is a tensor of torch.sparse_coo"),
        (torch.empty(4, 4, device="meta"), TypeError, r"images\[0\] is a meta tensor"),
        (
            torch.full((3, 5, 6), torch.nan, dtype=torch.bfloat16),
            ValueError,
            r"images\[0\] holds float32 values from nan",
        ),
        (torch.tensor([[0.5, torch.nan], [0, 1]]), ValueError, r"images\[0\] holds float32 values from nan"),
        (
            Image.fromarray(np.float32([[0.5, np.inf]])),
            ValueError,
            r"images\[0\] holds float32 values from 0.5 to inf",
        ),
        (np.zeros((4, 32_767), np.uint8), ValueError, r"images\[0\] is 4 x 32767 pixels .*at most 32,766: cut it"),
        (np.zeros((3, 32_767, 4), np.uint8), ValueError, r"images\[0\] is 32767 x 4 pixels"),
        (Image.new("L", (32_767, 4)), ValueError, r"images\[0\] is 4 x 32767 pixels"),
    ],
)
def test_bad_images_are_refused(image_processor, image, error, message):
    with pytest.raises(error, match=message):
        image_processor(image)


@pytest.mark.parametrize(
    "size", [{"height": 56, "width": 57}, {"shortest_edge": 56}, 0, {"height": 5.5, "width": 5.5}]
)
def test_size_is_a_square(size):
    with pytest.raises(ValueError, match="size is"):
        DetrisImageProcessor(size=size)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"size": MAX_SQUARE + 1}, "size is 4097, .* at most 4,096"),
        ({"size": 10**9}, "size is 1000000000"),
        ({"size": {"height": 10**9, "width": 10**9}}, "size is {'height': 1000000000"),
        ({"size": -56}, "size is -56"),
        ({"size": True}, "size is True"),
        ({"size": "56"}, "size is '56'"),
        ({"size": [56, 56]}, r"size is \[56, 56\]"),
        ({"size": {"height": 56, "width": 56, "shortest_edge": 7}}, "size is {'height'"),
        ({"size": math.nan}, "size is nan"),
        *(
            ({name: values}, f"{name} is .*give three numbers")
            for name in ("image_mean", "image_std")
            for values in (
                [],
                [0.5],
                [0.5] * 4,
                0.5,
                [0.5, math.nan, 0.5],
                [0.5, -0.1, 0.5],
                [0.5, 1.5, 0.5],
                ["a"] * 3,
            )
        ),
        ({"image_mean": [0.5, math.inf, 0.5]}, "image_mean is"),
        ({"image_mean": [True] * 3}, "image_mean is"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std is .*from 0.00392 to 1"),
        ({"image_std": [0.5, 1e-40, 0.5]}, "image_std is"),
    ],
)
def test_numbers_that_are_none_are_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DetrisImageProcessor(**fields)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        DetrisImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields, message",
    [
        *(
            ({"mask_threshold": value}, "mask_threshold is")
            for value in (-1, 2, math.nan, math.inf, "0.35", None, True)
        ),
        *(
            ({"max_text_length": value}, "max_text_length is")
            for value in (0, -1, 1025, 10**9, 17.0, "17", None, True)
        ),
    ],
)
def test_fields_that_cannot_be_are_refused_when_made_and_when_loaded(processor, fields, message, tmp_path):
    parts = processor.image_processor, processor.tokenizer
    with pytest.raises(ValueError, match=message):
        DetrisProcessor(*parts, **fields)
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)


def test_the_longest_side_is_read(image_processor):
    assert MAX_SIDE == refer.MAX_SIDE
    for shape in ((8, MAX_SIDE), (MAX_SIDE, 8)):
        out = image_processor(np.full((*shape, 3), 255, np.uint8), segmentation_maps=np.ones(shape, bool))
        assert out.original_sizes.tolist() == [list(shape)] and np.isfinite(out.pixel_values).all()
        with pytest.raises(ValueError, match=r"segmentation_maps\[0\] is .* x .* pixels"):
            image_processor(np.zeros(shape), segmentation_maps=np.ones([side + 1 for side in shape], bool))


SETTLED = {  # arguments of other processors that say what is done here anyway
    "padding": ["max_length", PaddingStrategy.MAX_LENGTH, True, None],
    "truncation": [True, None],
    "max_length": [17, np.int64(17), None],
    "add_special_tokens": [True],
    "return_attention_mask": [True],
    "return_tensors": ["pt"],
    "padding_side": ["right"],
    "do_resize": [True],
    "do_rescale": [True],
    "do_normalize": [True],
    "size": [SIDE, {"height": SIDE, "width": SIDE}],
    "image_mean": [OPENAI_CLIP_MEAN, tuple(OPENAI_CLIP_MEAN)],
}
CONTRADICTIONS = {
    "padding": ["longest", False, PaddingStrategy.LONGEST],
    "truncation": [False, 1],
    "max_length": [77, 16],
    "add_special_tokens": [False],
    "return_attention_mask": [False],
    "do_resize": [False],
    "do_rescale": [False],
    "do_normalize": [False],
    "size": [224, {"shortest_edge": SIDE}],
    "image_mean": [[0.5, 0.5, 0.5], np.zeros(3)],
    "text_kwargs": [{}],
}


@pytest.mark.parametrize("name", SETTLED)
def test_keywords_that_agree_with_the_checkpoint_change_nothing(processor, name):
    expected = processor(images=picture(), text="a cat", return_tensors="pt")
    for value in SETTLED[name]:
        out = processor(images=picture(), text="a cat", **{"return_tensors": "pt", name: value})
        assert set(out) == set(expected) and all(torch.equal(out[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_keywords_that_contradict_the_checkpoint_are_refused_by_name(processor, name):
    for value in CONTRADICTIONS[name]:
        with pytest.raises(TypeError, match=f"^({name} is |There is no argument '{name}').*leave it out"):
            processor(images=picture(), text="a cat", **{name: value})


def test_unknown_keywords_are_refused(processor):
    with pytest.raises(TypeError, match="paddding"):
        processor(text="cat", paddding=True)
    with pytest.raises(TypeError, match="do_resize"):
        processor.image_processor(picture(), do_resize=False)


# Masks to train on


def test_an_axis_of_one_channel_is_no_matter(processor):
    mask = picture()[..., 0] > 127
    both = np.stack([mask, ~mask])
    expected = processor(images=picture(), text=["cat", "dog"], segmentation_maps=both).labels
    for maps in (
        both[:, None],
        torch.from_numpy(both)[:, None],
        both[..., None],
        list(both[:, None]),
        [mask[..., None], ~mask],
    ):
        np.testing.assert_array_equal(
            processor(images=picture(), text=["cat", "dog"], segmentation_maps=maps).labels, expected
        )
    thin = np.ones((2, 1, 9, 1), bool)  # 9 x 1 pixels, or 1 x 9
    with pytest.raises(ValueError, match=r"segmentation_maps\[0\] has shape \(1, 9, 1\)"):
        processor(images=np.zeros((9, 1)), text=["cat", "dog"], segmentation_maps=thin)


def test_bfloat16_is_read_as_what_it_holds(image_processor):
    image = torch.from_numpy(picture()).permute(2, 0, 1) / 255
    for dtype in (torch.bfloat16, torch.float16):
        out = image_processor(image.to(dtype), segmentation_maps=(image[0] > 0.5).to(dtype))
        same = image_processor(image.to(dtype).float(), segmentation_maps=image[0] > 0.5)
        np.testing.assert_array_equal(out.pixel_values, same.pixel_values)
        np.testing.assert_array_equal(out.labels, same.labels)


def test_mask_types_give_one_result(image_processor):
    mask = picture()[..., 0] > 127
    masks = [mask, mask.astype(int), mask.astype(np.uint8) * 255, mask.astype(np.float32), Image.fromarray(mask)]
    masks += [torch.from_numpy(mask), mask * np.uint16(255), Image.fromarray(mask.astype(np.uint8))]
    labels = [image_processor(picture(), segmentation_maps=m).labels for m in masks]
    assert labels[0].dtype == np.float32 and labels[0].shape == (1, SIDE, SIDE)
    assert labels[0].min() == 0 and labels[0].max() == 1
    assert ((labels[0] > 0) & (labels[0] < 1)).any()  # edges are soft
    for other in labels[1:]:
        np.testing.assert_array_equal(other, labels[0])


def test_maps_belong_to_phrases_or_images(processor):
    images = [picture(30, 44), picture(20, 10)]
    maps = [np.ones((30, 44), bool), np.zeros((20, 10), bool)]
    shared = processor(images=images, text=[["cat", "dog"], ["cat"]], segmentation_maps=maps)
    assert shared.labels.max(axis=(1, 2)).tolist() == [1, 1, 0]
    own = processor(images=images, text=[["cat", "dog"], ["cat"]], segmentation_maps=[maps[0], ~maps[0], ~maps[1]])
    assert own.labels.max(axis=(1, 2)).tolist() == [1, 0, 1]
    one_image = processor(images=images[0], text=["cat", "dog"], segmentation_maps=np.stack([maps[0], ~maps[0]]))
    assert one_image.labels.max(axis=(1, 2)).tolist() == [1, 0]


@pytest.mark.parametrize(
    "maps, message",
    [
        (np.ones((29, 44)), r"segmentation_maps\[0\] has \(height, width\) \(29, 44\).*images\[0\], has \(30, 44\)"),
        ([np.ones((30, 44))] * 3, "3 segmentation_maps for 2 phrases of 1 images"),
        (np.full((30, 44), 2), "segmentation_maps.* integers from 2 to 2"),
        (np.full((30, 44), -1), "segmentation_maps.* integers from -1"),
        (np.full((30, 44), 1.5), "segmentation_maps.* from 1.5"),
        ([], "segmentation_maps is empty"),
        ([np.ones((30, 44, 3))], r"segmentation_maps\[0\] has shape"),
    ],
)
def test_bad_maps_are_refused(processor, maps, message):
    with pytest.raises(ValueError, match=message):
        processor(images=picture(), text=["cat", "dog"], segmentation_maps=maps)


def test_maps_need_images(processor):
    with pytest.raises(ValueError, match="images is missing"):
        processor(text="cat", segmentation_maps=np.ones((3, 3)))


# Phrases


@pytest.mark.parametrize("length, table", [(17, "word_len"), (22, "word_len"), (77, "word_len"), (17, "text_repair")])
def test_tokens_equal_official(clip_tokenizer, image_processor, length, table):
    expected = json.loads((FIXTURES / "tokens.json").read_text())[table]
    expected = expected if table == "text_repair" else expected[str(length)]
    processor = DetrisProcessor(image_processor, clip_tokenizer, max_text_length=length)
    out = processor(text=list(expected), return_tensors="pt")
    assert out.input_ids.tolist() == list(expected.values())
    assert torch.equal(out.attention_mask, (out.input_ids != 0).long())


def test_another_vocabulary(processor):
    a, d, g_end, s_end, start, end = 64, 67, 256 + 70, 256 + 82, 515, 516
    out = processor(text=["CAT", "dogs &amp;amp; a <"])  # before "<" ftfy leaves entities alone
    assert out.input_ids[0].tolist() == [start, 513, end] + [0] * 14
    assert out.input_ids[1].tolist() == [start, 514, 70, s_end, 256 + 5, 256 + a, 256 + 27, end] + [0] * 9
    assert processor(text="adg").input_ids[0, :6].tolist() == [start, a, d, g_end, end, 0]


def test_long_phrases_are_cut_with_one_warning(processor, caplog):
    exact, long = processor(text=[" ".join("c" * 15), " ".join("c" * 16)]).input_ids
    processor(text=" ".join("d" * 40))
    assert exact.tolist() == long.tolist() == [515] + [256 + 66] * 15 + [516]
    (record,) = caplog.records
    for part in ("'c c c", "18 tokens", "max_text_length=17", "shorten"):
        assert part in record.getMessage()


@pytest.mark.parametrize("phrase", ["", " \t\n", "&nbsp;"])
@pytest.mark.parametrize("wrap", [lambda phrase: ["cat", phrase], lambda phrase: [["cat", phrase]]])
def test_empty_phrases_are_refused(processor, phrase, wrap):
    with pytest.raises(ValueError, match="phrase 1 of text is .*no words"):
        processor(text=wrap(phrase))


def test_any_container_of_phrases_is_a_list(processor):
    phrases, nested = ["cat", "a dog"], [["cat", "a dog"], ["dog"]]
    rows = datasets.Dataset.from_dict({"phrase": phrases, "phrases": nested})
    images = [picture()] * 2
    expected = processor(images=images, text=phrases)
    for text in (
        np.array(phrases),
        np.array(phrases, object),
        rows["phrase"],
        pd.Series(phrases),
        (p for p in phrases),
    ):
        out = processor(images=images, text=text)
        assert all(np.array_equal(out[key], expected[key]) for key in expected)
    expected = processor(images=images, text=nested)
    for text in (rows["phrases"], [np.array(group) for group in nested], [pd.Series(group) for group in nested]):
        out = processor(images=images, text=text)
        assert all(np.array_equal(out[key], expected[key]) for key in expected)
    np.testing.assert_array_equal(processor(text=np.array("cat")).input_ids, processor(text="cat").input_ids)
    table = np.array([["cat", "dog"], ["dog", "a"]])
    assert processor(images=images, text=table).image_index.tolist() == [0, 0, 1, 1]


def test_start_and_end_need_room(tiny_tokenizer, image_processor):
    with pytest.raises(ValueError, match="max_text_length is 2"):
        DetrisProcessor(image_processor, tiny_tokenizer, max_text_length=2)


def test_a_tokenizer_whose_file_is_missing_is_refused(tiny_tokenizer, image_processor, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="its tokenizer.json is missing"):
        DetrisProcessor(image_processor, CLIPTokenizer.from_pretrained(tmp_path))


# Images and phrases together


@pytest.mark.parametrize(
    "image_count, text, image_index",
    [
        (1, "cat", [0]),
        (1, ["cat", "dog", "a"], [0, 0, 0]),
        (1, [["cat", "dog"]], [0, 0]),
        (2, ["cat", "dog"], [0, 1]),
        (2, ("cat", "dog"), [0, 1]),
        (3, [["cat"], ["dog", "a", "b"], ("cat", "dog")], [0, 1, 1, 1, 2, 2]),
    ],
)
def test_phrases_find_their_images(processor, image_count, text, image_index):
    images = [picture(30 + i, 44, seed=i) for i in range(image_count)]
    out = processor(images=images, text=text, return_tensors="pt")
    assert out.image_index.tolist() == image_index and out.image_index.dtype == torch.int64
    assert out.input_ids.shape == out.attention_mask.shape == (len(image_index), 17)
    assert out.pixel_values.shape == (image_count, 3, SIDE, SIDE)
    assert out.original_sizes.tolist() == [[30 + i, 44] for i in range(image_count)]
    assert out.original_sizes.dtype == out.input_ids.dtype == torch.int64


def test_either_alone(processor):
    assert set(processor(images=picture())) == {"pixel_values", "original_sizes"}
    assert set(processor(text=[["cat"], ["dog"]])) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    "images, text, error, message",
    [
        (None, None, ValueError, "images is missing"),
        ([], "cat", ValueError, "images is empty"),
        (None, [], ValueError, "text is empty"),
        ([picture()], [[]], ValueError, r"text\[0\] is empty"),
        ([picture()] * 2, "cat", ValueError, "1 texts for 2 images.*one phrase for each image"),
        ([picture()] * 2, ["cat"] * 3, ValueError, "3 texts for 2 images"),
        ([picture()] * 2, [["cat"]] * 3, ValueError, "3 texts for 2 images"),
        ([picture()], ["cat", 7], TypeError, "phrase 1 of text is 7, of type int"),
        ([picture()], [["cat", None]], TypeError, "phrase 1 of text is None"),
        ("a cat", picture(), TypeError, "images holds text and text does not: they are swapped"),
        (["a cat"], [Image.new("RGB", (9, 9))], TypeError, "they are swapped"),
        ([["a cat"]], torch.zeros(3, 9, 9), TypeError, "they are swapped"),
        ("a cat", None, TypeError, r"images\[0\] is of type str"),
        ("a.jpg", "a cat", TypeError, r"images\[0\] is of type str: give a PIL image, which PIL.Image.open makes"),
        (None, picture(), TypeError, "text is of type ndarray"),
        (None, Image.new("RGB", (9, 9)), TypeError, "text is of type Image: give a phrase"),
        (picture(), b"a cat", TypeError, "text is of type bytes"),
        (picture(), [b"a cat"], TypeError, r"text\[0\] is of type bytes"),
        (picture(), ["cat", b"a dog"], TypeError, "phrase 1 of text is b'a dog', of type bytes"),
        (picture(), {"cat": 1}, TypeError, "text is of type dict"),
        (picture(), {"cat", "dog"}, TypeError, "text is of type set"),
        (picture(), 7, TypeError, "text is of type int"),
    ],
)
def test_unclear_batches_are_refused(processor, images, text, error, message):
    with pytest.raises(error, match=message):
        processor(images=images, text=text)


# Masks back


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


def test_a_mask_survives_the_way_there_and_back(processor):
    mask = cv2.circle(np.zeros((90, 120), np.uint8), (70, 40), 25, 1, -1).astype(bool)
    labels = processor.image_processor(picture(90, 120), segmentation_maps=mask, return_tensors="pt").labels
    (back,) = processor.post_process_referring_segmentation(
        SimpleNamespace(logits=torch.logit(labels, eps=1e-4)), [(90, 120)], threshold=0.5
    )
    assert (back.numpy() & mask).sum() / (back.numpy() | mask).sum() > 0.97


def test_sizes_of_images_and_phrases(processor):
    logits = torch.randn(3, 16, 16, generator=torch.manual_seed(1))
    sizes = torch.tensor([[30, 44], [20, 10]])

    def post_process(logits, sizes, **options):
        return processor.post_process_referring_segmentation(SimpleNamespace(logits=logits), sizes, **options)

    alone = [post_process(logits[n : n + 1], [size])[0] for n, size in enumerate([(20, 10), (30, 44), (20, 10)])]
    for index in (torch.tensor([1, 0, 1]), [1, 0, 1], np.array([1, 0, 1])):
        masks = post_process(logits, sizes, image_index=index)
        assert all(torch.equal(mask, other) for mask, other in zip(masks, alone, strict=True))
    by_phrase = post_process(logits, [(20, 10), (30, 44), (20, 10)])
    assert all(torch.equal(mask, other) for mask, other in zip(by_phrase, alone, strict=True))
    assert [mask.shape for mask in post_process(logits, [(20, 10)])] == [(20, 10)] * 3
    assert post_process(logits[:0], sizes, image_index=[]) == []


def test_default_threshold_is_a_field(processor):
    outputs = SimpleNamespace(logits=torch.randn(1, 16, 16, generator=torch.manual_seed(2)))
    (default,) = processor.post_process_referring_segmentation(outputs, [(30, 44)])
    (same,) = processor.post_process_referring_segmentation(outputs, [(30, 44)], threshold=0.35)
    processor.mask_threshold = 0.6
    (other,) = processor.post_process_referring_segmentation(outputs, [(30, 44)])
    assert torch.equal(default, same) and other.sum() < same.sum()


def test_masks_do_not_depend_on_autocast_or_gradients(processor):
    logits = torch.randn(1, 16, 16, generator=torch.manual_seed(3), requires_grad=True)
    (expected,) = processor.post_process_referring_segmentation(SimpleNamespace(logits=logits.detach()), [(90, 120)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (mask,) = processor.post_process_referring_segmentation(SimpleNamespace(logits=logits), [(90, 120)])
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(
    "sizes, image_index, message",
    [
        ([(30, 44)] * 2, None, r"\(3, 16, 16\) do not fit the sizes of 2 phrases"),
        ([(30, 44)] * 2, [0, 1], r"do not fit the sizes of 2 phrases"),
        ([(30, 44)] * 2, [0, 1, 2], r"image_index is \[0, 1, 2\], but original_sizes has 2 images"),
        ([(30, 44)] * 2, [0, 1, -1], "image_index"),
        ((30, 44), None, r"original_sizes is \(30, 44\)"),
        ([(0, 44)], None, "original_sizes"),
        ([(30.5, 44)], None, "original_sizes"),
        ([(30, 10**9)], None, "original_sizes .* at most 32,766"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(processor, sizes, image_index, message):
    outputs = SimpleNamespace(logits=torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=message):
        processor.post_process_referring_segmentation(outputs, sizes, image_index=image_index)


@pytest.mark.parametrize("threshold", [-1, 2, math.nan, math.inf, "0.5", True, [0.5]])
def test_thresholds_that_are_no_probability_are_refused(processor, threshold):
    outputs = SimpleNamespace(logits=torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match="threshold is .*give a number from 0 to 1"):
        processor.post_process_referring_segmentation(outputs, [(30, 44)], threshold=threshold)
    processor.mask_threshold = threshold
    with pytest.raises(ValueError, match="threshold is .*give a number from 0 to 1"):
        processor.post_process_referring_segmentation(outputs, [(30, 44)])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_not_finite_give_no_mask(processor, value, dtype):
    logits = torch.zeros(3, 8, 8, dtype=dtype)
    logits[1, 7, 0] = value
    with pytest.raises(ValueError, match="logits of phrase 1 are not finite"):
        processor.post_process_referring_segmentation(SimpleNamespace(logits=logits), [(30, 44)])


# Saving and loading


def test_use_leaves_no_trace_in_fingerprints(processor, tmp_path):
    """`datasets` maps a set anew if the fingerprint of what is mapped changes."""

    rows = datasets.Dataset.from_dict({"text": ["a cat", "cat " * 50]})

    def prints():
        functions = processor, processor.__call__, processor.post_process_referring_segmentation
        mapped = rows.map(lambda row: {"input_ids": processor(text=row["text"]).input_ids[0]})
        return [mapped._fingerprint, *(Hasher.hash(function) for function in functions)]

    before = prints()
    copied = pickle.dumps(processor)
    processor(images=picture(), text="cat " * 50, segmentation_maps=np.ones((30, 44)))  # and warns that it cuts
    processor.tokenizer("cat " * 50, padding="max_length", truncation=True, max_length=9)
    processor.tokenizer.pad({"input_ids": [[1, 2], [3]]})
    processor.batch_decode([[64]])
    logits = SimpleNamespace(logits=torch.zeros(1, 8, 8))
    processor.post_process_referring_segmentation(logits, [(30, 44)])
    assert prints() == before
    processor.save_pretrained(tmp_path / "saved")
    assert prints() == before
    loaded = [AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True) for _ in range(2)]
    assert Hasher.hash(loaded[0]) == Hasher.hash(loaded[1])
    loaded[0].save_pretrained(tmp_path / "again")
    assert Hasher.hash(loaded[0]) == Hasher.hash(loaded[1])

    other = pickle.loads(copied)
    expected = processor(images=picture(), text="a cat")
    for name, values in other(images=picture(), text="a cat").items():
        np.testing.assert_array_equal(values, expected[name])
    other.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other/processor_config.json").read_text() == (
        tmp_path / "saved/processor_config.json"
    ).read_text()


@pytest.mark.parametrize("change", [{"mask_threshold": 0.5}, {"max_text_length": 9}, {"image_mean": [0.5, 0.5, 0.5]}])
def test_what_changes_results_changes_the_fingerprint(processor, change):
    before = Hasher.hash(processor.__call__)
    for name, value in change.items():
        setattr(processor.image_processor if name.startswith("image") else processor, name, value)
    assert Hasher.hash(processor.__call__) != before


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**10), 10**10)
    | st.sampled_from([0, -1, 1, 17, 56, 10**9, 2**63, -(2**31)])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["56", "x" * 10**5, "../../etc", "__class__"]),
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=8), part, max_size=3),
    max_leaves=6,
)
SIZES = ODD | st.fixed_dictionaries({"height": ODD, "width": ODD}) | st.integers(1, 300)
SOUND = {"size": {"height": SIDE, "width": SIDE}, "image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
KEYS = st.sampled_from(
    ["do_resize", "preprocess", "_letterbox_maps", "_fixed_arguments", "save_pretrained", "to_dict", "auto_map", "__class__"]
)
IMAGE_FIELDS = st.fixed_dictionaries(
    {},
    optional={"size": SIZES, "image_mean": ODD | st.lists(st.floats(0, 1), min_size=3, max_size=3), "image_std": ODD},
)
FIELDS = st.fixed_dictionaries({}, optional={"max_text_length": ODD, "mask_threshold": ODD, "tokenizer": ODD})
DEEP = "[" * 10**5
TINY_TOKENIZER = build_clip_tokenizer([("d", "o")])


@contextmanager
def a_gibibyte():
    """At most so much is taken inside, on top of the most that this process ever had."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@settings(max_examples=300, deadline=5000, database=None, derandomize=True)
@given(
    IMAGE_FIELDS.map(lambda fields: SOUND | fields) | ODD,
    st.dictionaries(KEYS | st.text(max_size=8), ODD, max_size=1),
    FIELDS | ODD,
    st.sampled_from(["preprocessor_config.json", "processor_config.json"]),
)
def test_hostile_files_give_one_sentence_or_a_processor_that_works(tmp_path_factory, images, more, own, file):
    folder = tmp_path_factory.mktemp("hostile")
    images = images | more if isinstance(images, dict) else images
    own = own if file == "processor_config.json" else {}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps(own))
    if file == "processor_config.json" and isinstance(own, dict):
        (folder / file).write_text(json.dumps(own | {"image_processor": images}))
    with a_gibibyte():
        assert_refused_or_works(folder)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    "content", ["", "{", DEEP, '{"size": ' + DEEP, "\xff", '{"size": ' + "9" * 10**5 + "}", "null"]
)
def test_files_that_are_no_json_give_one_sentence(tmp_path, file, content):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / file).write_bytes(content.encode("latin1"))
    with a_gibibyte(), pytest.raises((ValueError, TypeError, OSError)) as error:
        load_both(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def load_both(folder):
    image_processor = DetrisImageProcessor.from_pretrained(folder)
    fields, _ = DetrisProcessor.get_processor_dict(folder)
    return DetrisProcessor.from_args_and_dict([image_processor, TINY_TOKENIZER], fields)


def assert_refused_or_works(folder):
    try:
        processor = load_both(folder)
    except (ValueError, TypeError, OSError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, str(error)[:2000]
        return
    out = processor(images=picture(), text="cat", segmentation_maps=np.ones((30, 44)), return_tensors="pt")
    side = processor.image_processor.size["height"]
    assert out.pixel_values.shape == (1, 3, side, side) and out.pixel_values.isfinite().all()
    (mask,) = processor.post_process_referring_segmentation(SimpleNamespace(logits=torch.ones(1, 8, 8)), [(30, 44)])
    assert mask.shape == (30, 44)
    processor.to_json_string()


def test_saved_folder_loads_without_the_repository(processor, tmp_path):
    processor.max_text_length, processor.mask_threshold = 9, 0.4
    processor.save_pretrained(tmp_path / "saved")
    np.save(tmp_path / "image.npy", picture())
    script = """
import sys
import numpy as np
from transformers import AutoImageProcessor, AutoProcessor

image, texts = np.load("../image.npy"), ["cat", "a dog"]
processor = AutoProcessor.from_pretrained("../saved", trust_remote_code=True)
processor.save_pretrained("../again")
again = AutoProcessor.from_pretrained("../again", trust_remote_code=True)
for folder, loaded in (("../saved", processor), ("../again", again)):
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded).__module__
    out = loaded(images=image, text=texts)
    alone = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    assert np.array_equal(alone(image).pixel_values, out.pixel_values)
    np.savez(f"{folder}.npz", threshold=loaded.mask_threshold, **out)
alone.save_pretrained("../images_only")
AutoImageProcessor.from_pretrained("../images_only", trust_remote_code=True)
"""
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path / "empty", env=environment, check=True, timeout=300
    )
    expected = processor(images=picture(), text=["cat", "a dog"])
    assert expected.input_ids.shape == (2, 9)
    for file in ("saved.npz", "again.npz"):
        loaded = np.load(tmp_path / file)
        assert set(loaded) == {*expected, "threshold"} and loaded["threshold"] == 0.4
        for key, value in expected.items():
            np.testing.assert_array_equal(loaded[key], value)


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
