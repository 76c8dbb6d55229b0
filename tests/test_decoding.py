"""A stored row's image, mask and phrases, decoded; what is broken in them is named with its row."""

import os

import numpy as np
import pytest
from helpers.refer_folder import HEIC, HOSTILE_RLES, not_waiting
from helpers.rows import OUT_OF_MEMORY, make_row
from PIL import ExifTags, Image, ImageOps

from data import decoding
from data.decoding import read_image, read_mask, read_phrases, read_thumbnail, read_whole_mask
from data.images import check_image
from data.masks import RleMask

# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["broken.png", "broken.jpg"])
@pytest.mark.parametrize("content", [None, b"no image", b"", "truncated"])
def test_a_missing_or_broken_image_is_named_with_its_row(tmp_path, name, content):
    path = tmp_path / name
    if content == "truncated":
        Image.effect_noise((60, 50), 90).save(path)
        content = path.read_bytes()[:-300]
        path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OSError, match=rf"{name}.*ref_id 17"):
        read_image({"image": {"path": str(path), "bytes": None}, "mask": np.zeros((50, 60)), "ref_id": 17})


def test_an_image_of_another_size_than_its_mask_is_named(tmp_path):
    for name in ("other.jpg", "other.png"):
        Image.new("RGB", (60, 50)).save(tmp_path / name)
        row = {"image": {"path": str(tmp_path / name), "bytes": None}, "ref_id": 17}
        for mask in (np.zeros((60, 50)), {"size": [50, 61], "counts": ""}):
            with pytest.raises(OSError, match=rf"{name}.*ref_id 17.*50 x 60 pixels, .* but its mask"):
                read_image(row | {"mask": mask})


JPEGS = {
    "4:2:0": ("RGB", {}),
    "4:2:2": ("RGB", {"subsampling": "4:2:2"}),
    "4:4:4, best": ("RGB", {"subsampling": "4:4:4", "quality": 100}),
    "poor": ("RGB", {"quality": 5}),
    "progressive": ("RGB", {"progressive": True}),
    "as RGB": ("RGB", {"keep_rgb": True}),
    "grey": ("L", {}),
    "CMYK": ("CMYK", {}),
    "turned": ("RGB", {"exif": 6}),
    "not turned": ("RGB", {"exif": 1}),
}


@pytest.mark.parametrize("size", [(61, 47), (1, 9), (3, 200), (64, 64)])
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("kind", JPEGS)
def test_jpegs_are_read_as_pillow_reads_them(tmp_path, kind, embedded, size):
    mode, options = JPEGS[kind]
    if "exif" in options:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = options["exif"]
        options = {"exif": exif}
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((size[0] * 3, size[1] * 3), Image.Resampling.BICUBIC)
    path = tmp_path / "image.jpg"
    smooth.convert(mode).save(path, **options)
    image = {"path": None if embedded else str(path), "bytes": path.read_bytes() if embedded else None}
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    read = read_image({"image": image, "mask": np.zeros(expected.shape[:2]), "ref_id": 0})
    assert np.array_equal(read if isinstance(read, np.ndarray) else np.asarray(read.convert("RGB")), expected)
    assert isinstance(read, np.ndarray) == (kind not in ("CMYK", "turned") and min(smooth.size) > 4)


def test_a_turned_tiff_has_the_size_that_it_is_checked_for(tmp_path):
    """Pillow turns a TIFF while it reads it, so that the orientation must not turn it again."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "turned.tiff", exif=exif)
    image = {"path": str(tmp_path / "turned.tiff"), "bytes": None}
    check_image(image["path"], (64, 48))
    assert read_image({"image": image, "mask": np.zeros((64, 48)), "ref_id": 0}).size == (48, 64)


def test_a_size_that_is_not_the_masks_is_no_broken_file(tmp_path):
    for name, exif in (("a.png", None), ("a.jpg", None), ("turned.jpg", 6)):
        kept = Image.Exif()
        if exif:
            kept[ExifTags.Base.Orientation] = exif
        Image.new("RGB", (40, 30) if exif else (30, 40)).save(tmp_path / name, exif=kept)
        with pytest.raises(OSError) as error:
            read_image(make_row(7, image={"path": str(tmp_path / name), "bytes": None}))
        assert str(error.value) == (
            f"Image {tmp_path / name} of the row with ref_id 7 is 40 x 30 pixels, height x width, but its mask 6 x 8: "
            "take the image that was annotated, or leave the row out."
        )


@pytest.mark.parametrize("embedded", [False, True])
def test_a_format_that_is_not_read_is_to_be_converted(tmp_path, embedded):
    (tmp_path / "a.jpg").write_bytes(HEIC)
    image = {"path": str(tmp_path / "a.jpg"), "bytes": HEIC if embedded else None}
    with pytest.raises(
        OSError, match=r"a.jpg of the row with ref_id 7 cannot be read \(it is HEIC or AVIF\); convert it"
    ):
        read_image(make_row(7, image=image))


def test_a_pipe_for_an_image_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with (
        not_waiting(),
        pytest.raises(OSError, match="a.jpg of the row with ref_id 7 cannot be read .it is no regular file"),
    ):
        read_image(make_row(7, image={"path": str(tmp_path / "a.jpg"), "bytes": None}))


@pytest.mark.parametrize("exif", [1, 3, 6, 8])
@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.tiff"])
def test_thumbnails_are_the_upright_image_made_smaller(tmp_path, name, exif):
    """Four colours in the corners tell how an image is turned; Pillow is asked for the truth."""
    pixels = np.zeros((90, 160, 3), np.uint8)
    pixels[:45, :80], pixels[:45, 80:], pixels[45:, :80] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    options = Image.Exif()
    options[ExifTags.Base.Orientation] = exif
    Image.fromarray(pixels).save(tmp_path / name, exif=options)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / name))
    row = {"image": {"path": str(tmp_path / name), "bytes": None}, "ref_id": 17, "mask": np.zeros(upright.size[::-1])}
    found = read_thumbnail(row, 40)
    assert max(found.size) == 40 and found.mode == "RGB" and (found.width > found.height) == (exif in (1, 3))
    for across in (0.25, 0.75):
        for down in (0.25, 0.75):
            expected = upright.getpixel((int(upright.width * across), int(upright.height * down)))
            colour = found.getpixel((int(found.width * across), int(found.height * down)))
            assert np.abs(np.subtract(colour, expected)).max() < 40
    with pytest.raises(OSError, match="ref_id 17 is .* pixels, height x width, but its mask 90 x 161"):
        read_thumbnail(row | {"mask": np.zeros((90, 161))}, 40)
    assert read_thumbnail(row, 1000).size == upright.size  # it is not made larger


def test_a_huge_jpeg_is_made_smaller_while_it_is_decoded(tmp_path, monkeypatch):
    Image.new("L", (8_000, 4_000)).save(tmp_path / "huge.jpg")
    decoded, transpose = [], ImageOps.exif_transpose
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image: decoded.append(image.size) or transpose(image))
    row = {"image": {"path": str(tmp_path / "huge.jpg"), "bytes": None}, "ref_id": 17}
    row["mask"] = {"size": [4_000, 8_000], "counts": ""}
    assert read_thumbnail(row, 400).size == (400, 200)
    assert decoded == [(1_000, 500)]


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [[20, 0], [5, 0, 15], [0, 0, 20], [0, 5, 0, 0, 15], [3, 0, 1, 2, 0, 4, 10, 0]])
def test_runs_of_no_length_are_read(runs):
    rle = {"size": [4, 5], "counts": runs}
    boxed = read_mask({"mask": RleMask().encode_example(rle)})
    pasted = np.zeros(boxed.size, np.uint8)
    height, width = boxed.values.shape
    pasted[boxed.top : boxed.top + height, boxed.left : boxed.left + width] = boxed.values
    assert np.array_equal(pasted, np.repeat(np.arange(len(runs)) % 2, runs).reshape(5, 4).T)


@pytest.mark.parametrize("kind", ["empty", "full", "one", "noise", "disc"])
def test_masks_are_decoded_in_their_boxes(kind):
    mask = np.zeros((40, 50), np.uint8)
    if kind == "full":
        mask[:] = 1
    elif kind == "one":
        mask[39, 49] = 1
    elif kind == "noise":
        mask[3:38, 5:48] = np.random.default_rng(0).integers(0, 2, (35, 43))  # more runs than a byte counts
    elif kind == "disc":
        mask[(np.arange(40)[:, None] - 20) ** 2 + (np.arange(50) - 30) ** 2 < 90] = 1
    boxed = read_mask({"mask": RleMask().encode_example(mask)})
    pasted = np.zeros(boxed.size, np.uint8)
    height, width = boxed.values.shape
    pasted[boxed.top : boxed.top + height, boxed.left : boxed.left + width] = boxed.values
    assert np.array_equal(pasted, mask)
    assert height * width <= (1 if kind in ("empty", "one") else mask.size)
    assert read_mask({"mask": mask}) is mask


@pytest.mark.parametrize("mask, message", HOSTILE_RLES)
def test_stored_masks_of_strangers_are_checked_before_their_boxes_are_read(mask, message):
    with pytest.raises(ValueError, match=f"ref_id 7 cannot be read .*{message}"):
        read_mask({"mask": mask, "ref_id": 7})


# --- whole rows -----------------------------------------------------------------------------------------------------


def test_null_parts_of_a_row_are_named():
    for read in (read_image, read_mask, read_whole_mask):
        with pytest.raises(ValueError, match="row with ref_id 7 cannot be read .the mask is null; give an empty mask"):
            read(make_row(7, mask=None))
    for image in (None, {"path": None, "bytes": None}):
        with pytest.raises(
            OSError, match="embedded in the data set of the row with ref_id 7 cannot be read .it is null"
        ):
            read_image(make_row(7, image=image))


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_want_of_memory_is_not_told_as_a_broken_row(monkeypatch, error):
    def fail(*_, **__):
        raise error

    row = make_row(1)
    for target, name, attempt in (
        (decoding.Image, "open", lambda: read_image(row)),
        (decoding, "decode_in_box", lambda: read_mask(row)),
        (decoding.RleMask, "decode_example", lambda: read_whole_mask(row)),
        (decoding, "is_int64", lambda: read_phrases(row)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises(type(error)) as caught:
                attempt()
            assert caught.value is error
