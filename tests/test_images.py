"""Image files: what is broken, of another size or format is named with its row; and masks as PNG."""

import io
import pickle
import struct
import zlib

import numpy as np
import PIL.features
import PIL.Image
import pytest
from helpers.refer_folder import HEIC, HEIGHT, WIDTH, A, by_annotation, pixels, truncate
from pycocotools import mask as coco_mask

from data.images import check_image, image_size, read_png_mask


@pytest.mark.parametrize(
    ("break_image", "error", "message"),
    [
        (lambda path: path.unlink(), FileNotFoundError, "does not exist; the REFER layout"),
        (lambda path: truncate(path, -200), OSError, r"cannot be read \(.*truncated.*\); copy or download it again"),
        (lambda path: truncate(path, 300), OSError, "cannot be read"),
        (lambda path: truncate(path, 0), OSError, "cannot be read"),
        (lambda path: path.write_text("404: not found"), OSError, r"cannot be read \(it is no JPEG or PNG"),
        (
            lambda path: PIL.Image.new("RGB", (HEIGHT, WIDTH)).save(path),
            ValueError,
            f"is {WIDTH} x {HEIGHT} pixels .height x width., but its record says {HEIGHT} x {WIDTH}: take the image",
        ),
    ],
)
@pytest.mark.parametrize(("name", "ref_id"), [("first.jpg", 110), ("second.png", 111)])
def test_bad_images_are_named_with_the_row(refer, break_image, error, message, name, ref_id):
    break_image(refer.images / name)
    with pytest.raises(error, match=rf"refs\(unc\)\.p, ref_id {ref_id}: image .*{name} {message}"):
        refer.load()


def test_images_with_odd_files_are_read(refer):
    """Bytes after the end are no fault, and a photograph on its side counts with the size it is seen in."""
    photograph = refer.images / "first.jpg"
    photograph.write_bytes(photograph.read_bytes() + b"trailing bytes")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (HEIGHT, WIDTH)).save(refer.images / "turned.jpg", exif=exif)
    refer.instances["images"][1]["file_name"] = "turned.jpg"
    rows = by_annotation(refer.load())
    assert rows[11]["image"].size == rows[10]["image"].size == (WIDTH, HEIGHT)


def test_exif_is_mentioned_only_where_there_is_one(refer):
    for orientation, mentioned in ((None, False), (1, False), (3, False), (6, True)):
        exif = PIL.Image.Exif()
        if orientation:
            exif[0x0112] = orientation
        size = (WIDTH, HEIGHT) if mentioned else (HEIGHT, WIDTH)
        PIL.Image.new("RGB", size).save(refer.images / "first.jpg", exif=exif)
        with pytest.raises(ValueError, match=f"is {WIDTH} x {HEIGHT} pixels .*its record says {HEIGHT} x") as error:
            refer.load()
        assert ("EXIF" in str(error.value)) == ("upright" in str(error.value)) == mentioned


@pytest.mark.parametrize(
    "content, name",
    [
        (HEIC, "HEIC or AVIF"),
        (HEIC.replace(b"heic", b"avif"), "HEIC or AVIF"),
        (HEIC.replace(b"heic", b"mif1"), "HEIC or AVIF"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(200), "JPEG XL"),
        (b"\xff\x0a" + bytes(200), "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(200), "JPEG 2000"),
    ],
)
def test_formats_that_are_not_read_are_to_be_converted(refer, content, name):
    (refer.images / "first.jpg").write_bytes(content)
    with pytest.raises(OSError, match=rf"first.jpg cannot be read \(it is {name}\); convert it to JPEG or PNG"):
        refer.load()


def test_avif_as_pillow_writes_it_is_to_be_converted(refer):
    if not PIL.features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(refer.images / "first.jpg", "AVIF")
    with pytest.raises(OSError, match=r"first.jpg cannot be read \(it is HEIC or AVIF\); convert it"):
        refer.load()


def test_pixels_of_32_bits_are_no_broken_file(refer):
    PIL.Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)).save(refer.images / "first.jpg", "TIFF")
    with pytest.raises(ValueError, match=r"first.jpg has pixels of 32 bits \(mode F\); write 8 bits a channel.$"):
        refer.load()


# Embedded images: all bytes of a file in the place of its path


def encoded(pixels, format="PNG", **options):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


NOISE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def bomb(side=2**15):
    """A PNG of some 60 bytes whose header tells of a billion pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_embedded_images_are_read(format):
    content = encoded(NOISE, format)
    assert image_size(content) == (HEIGHT, WIDTH)
    check_image(content, (HEIGHT, WIDTH))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    if format in ("JPEG", "PNG", "WEBP"):
        assert image_size(encoded(NOISE, format, exif=exif)) == (WIDTH, HEIGHT)
    with pytest.raises(ValueError, match=f"^the embedded image is {HEIGHT} x {WIDTH} pixels .*record says 7 x 8: "):
        check_image(content, (7, 8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"cannot be read \(it is no JPEG or PNG"),
        (b"\x89PNG", r"cannot be read \(it is no JPEG or PNG"),
        (b"/etc/passwd", r"cannot be read \(it is no JPEG or PNG"),
        (pickle.dumps([1]), r"cannot be read \(it is no JPEG or PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"cannot be read \(it is no JPEG or PNG"),
        (HEIC, r"cannot be read \(it is HEIC or AVIF\); convert it"),
        (bomb(), r"has too many pixels \(.*\); make it smaller"),
        (encoded(NOISE, "JPEG")[:-200], r"cannot be read \(.*truncated.*\); copy or download it again"),
        (encoded(NOISE)[:-200], r"cannot be read \(.*truncated.*\); copy or download it again"),
    ],
)
def test_hostile_embedded_images_are_refused(content, message):
    with pytest.raises(OSError, match=f"^the embedded image {message}"):
        check_image(content, (HEIGHT, WIDTH))
    with pytest.raises(
        (OSError, ValueError), match="^the embedded mask (cannot be read|has too many pixels|has the mode)"
    ):
        read_png_mask(content, (HEIGHT, WIDTH), "")


def test_embedded_masks_are_read():
    mask = pixels(A)
    np.testing.assert_array_equal(coco_mask.decode(read_png_mask(encoded(mask * 255), mask.shape, "")), mask)
    with pytest.raises(OSError, match=r"^the embedded mask cannot be read \(.*truncated"):
        read_png_mask(encoded(NOISE[..., 0])[:-200], mask.shape, "")
    with pytest.raises(ValueError, match=r"^the embedded mask holds the values \[7\]"):
        read_png_mask(encoded(mask * 7), mask.shape, "")


# PNG masks


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1], None),
        ([0, 255], None),
        ([0, 1, 255], r"holds the values \[1, 255\]"),
        ([0, 7], r"holds the values \[7\]; write 0 outside"),
        ([0, 254], r"holds the values \[254\]"),
    ],
)
def test_values_of_a_mask(tmp_path, values, message):
    mask = np.resize(np.array(values, dtype=np.uint8), (HEIGHT, WIDTH))
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    if message is None:
        np.testing.assert_array_equal(coco_mask.decode(read_png_mask(tmp_path / "mask.png", mask.shape, "")), mask > 0)
    else:
        with pytest.raises(ValueError, match=message):
            read_png_mask(tmp_path / "mask.png", mask.shape, "")


@pytest.mark.parametrize("mode", ["1", "P", "RGB", "RGBA", "LA", "I;16"])
def test_modes_of_a_mask(tmp_path, mode):
    mask = pixels(A)
    image = PIL.Image.fromarray(mask).convert(mode) if mode != "P" else PIL.Image.fromarray(mask)
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 200, 9])
    elif mode == "1":
        image = PIL.Image.fromarray(mask > 0)
    image.save(tmp_path / "mask.png")
    if mode in ("1", "P"):
        np.testing.assert_array_equal(coco_mask.decode(read_png_mask(tmp_path / "mask.png", mask.shape, "")), mask)
    else:
        with pytest.raises(ValueError, match=f"has the mode {mode}; write one channel"):
            read_png_mask(tmp_path / "mask.png", mask.shape, "")


def test_masks_that_are_none(tmp_path):
    path, size = tmp_path / "mask.png", (HEIGHT, WIDTH)
    PIL.Image.fromarray(pixels(A).T.copy()).save(path)
    with pytest.raises(ValueError, match="is 40 x 30 pixels .* but its image is 30 x 40"):
        read_png_mask(path, size, "")
    whole = path.read_bytes()
    header = whole.index(b"IHDR") + 4
    for broken in (
        whole[:60],
        b"",
        pickle.dumps([1]),
        whole[:header] + (2**31 - 1).to_bytes(4, "big") * 2 + whole[header + 8 :],
    ):
        path.write_bytes(broken)
        with pytest.raises((OSError, ValueError), match="mask .*(cannot be read|pixels)"):
            read_png_mask(path, (WIDTH, HEIGHT), "")


def test_masks_of_other_formats_are_to_be_converted(tmp_path):
    mask = PIL.Image.fromarray(pixels(A) * np.uint8(255))
    for name in ("JPEG", "BMP", "GIF", "TIFF", "WEBP"):
        mask.save(tmp_path / "mask.png", name)
        with pytest.raises(OSError, match=rf"mask .*mask.png cannot be read \(it is {name}\); convert it to PNG.$"):
            read_png_mask(tmp_path / "mask.png", (HEIGHT, WIDTH), "")
    (tmp_path / "mask.png").write_bytes(HEIC)
    with pytest.raises(OSError, match=r"cannot be read \(it is HEIC or AVIF\); convert it to PNG.$"):
        read_png_mask(tmp_path / "mask.png", (HEIGHT, WIDTH), "")
