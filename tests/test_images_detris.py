"""What is made of images and masks of every kind, and what is refused."""

import io

import numpy as np
import pytest
import torch
from helpers.pictures import SIDE, picture
from PIL import Image

# Images


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
    """Separate a picture into inks: what white paper lacks of each colour, and no black."""
    return Image.merge("CMYK", [*Image.fromarray(255 - image).split(), Image.new("L", image.shape[1::-1], 0)])


COLOURS = {  # name -> function to another mode, function to the (height, width, 3) that a person then sees
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


# Masks


def test_an_axis_of_one_channel_changes_nothing(processor):
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
