"""Pictures: what is tinted, what is dimmed, that nothing is lost on a sheet, and that colors can be told apart."""

import cv2
import numpy as np
import pytest
from PIL import Image

from gallery import (
    FILL,
    PALETTE,
    PREDICTION_COLOR,
    Card,
    Sample,
    draw_cards,
    draw_gallery,
    draw_masks,
    draw_sample,
    fit_mask,
    overlay,
)

# How linear red, green and blue look to people without one kind of cones (Machado, Oliveira and Fernandes, 2009).
COLOR_VISION = {
    "all cones": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def sample(width: int = 60, height: int = 40, sentence: str = "grey box", iou: float = 0.25) -> Sample:
    mask = np.zeros((height, width), np.uint8)
    mask[10:30, 10:30] = 1
    return Sample(Image.new("RGB", (width, height), (100, 100, 100)), sentence, mask, mask, iou)


def has_color(picture: Image.Image, color: tuple[int, int, int]) -> bool:
    distance = np.abs(np.asarray(picture).astype(int) - color).sum(-1)
    return bool((distance < 30).any())


def test_overlay_tints_the_object_and_dims_the_rest():
    picture = np.asarray(overlay(sample().image, sample().truth)).astype(int)
    assert picture.shape == (40, 60, 3)
    inside, outside = picture[20, 20], picture[35, 50]
    assert (outside < 100).all() and len(set(outside)) == 1  # darker, still grey
    assert np.argmax(inside) == np.argmax(PREDICTION_COLOR) and inside.max() > 100
    assert has_color(overlay(sample().image, sample().truth), PREDICTION_COLOR)  # its outline


def test_overlay_of_an_empty_mask_only_dims():
    picture = np.asarray(overlay(sample().image, np.zeros((40, 60))))
    assert (picture == picture[0, 0]).all() and (picture < 100).all()


def test_sample_is_enlarged_and_a_long_phrase_takes_more_lines():
    short, long = draw_sample(sample()), draw_sample(sample(sentence="the grey box " * 20))
    assert short.width >= 400 and long.width == short.width
    assert long.height > short.height > 400 * 40 // 60
    assert draw_sample(sample(sentence="the grey box " * 1000)).height < 2 * long.height


def test_gallery_has_room_for_every_sample():
    one = draw_gallery({"attribute": [sample()]})
    four = draw_gallery({"attribute": [sample()] * 4, "position": [sample(height=90)]})
    assert four.width == one.width and four.height > 2 * one.height
    assert not has_color(draw_gallery({}), PREDICTION_COLOR)


@pytest.mark.parametrize("vision", COLOR_VISION)
def test_the_palettes_colors_can_be_told_apart(vision):
    assert len(PALETTE) >= 10
    values = np.float64(PALETTE) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(COLOR_VISION[vision]), 0, 1)
    seen = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = cv2.cvtColor(seen[None].astype(np.float32), cv2.COLOR_RGB2Lab)[0]
    distances = np.linalg.norm(lab[:, None] - lab, axis=-1)[np.triu_indices(len(lab), 1)]
    assert distances.min() > (35 if vision == "all cones" else 15)  # people notice 2.3


def box(top: int, left: int, bottom: int, right: int, size: tuple[int, int] = (300, 400)) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def test_masks_are_filled_and_outlined_in_their_colors_and_the_rest_stays():
    image = Image.new("RGB", (400, 300), (100, 100, 100))
    masks = [box(50, 50, 150, 150), Image.fromarray(box(100, 100, 200, 200)), box(0, 0, 0, 0) > 0]
    picture = draw_masks(image, masks, ["a", "b", "nothing"], legend=False)
    assert picture.size == image.size and picture.mode == "RGB"
    pixels, (first, second) = np.asarray(picture).astype(float), np.float64(PALETTE[:2])
    tinted = (1 - FILL) * 100 + FILL * first
    np.testing.assert_allclose(pixels[75, 75], tinted, atol=1)
    np.testing.assert_allclose(pixels[175, 175], (1 - FILL) * 100 + FILL * second, atol=1)
    np.testing.assert_allclose(pixels[125, 125], (1 - FILL) * tinted + FILL * second, atol=2)  # the later lies above
    assert (pixels[25, 25] == 100).all() and (pixels[250:, :] == 100).all()
    np.testing.assert_array_equal(pixels[75, 50], first)
    assert pixels[75, 47:50].sum(-1).min() < 200  # the rim, darker than ground and color
    assert np.asarray(image).max() == 100  # the caller's image is as before


def test_legend_has_colors_phrases_and_scores():
    image, masks = Image.new("RGB", (400, 300), (100, 100, 100)), [box(50, 50, 60, 60)] * 2
    bare = draw_masks(image, masks, ["", ""], [(255, 0, 0), (0, 0, 255)])
    assert bare.width == 400 and bare.height > 300
    legend = bare.crop((0, 300, 400, bare.height))
    assert has_color(legend, (255, 0, 0)) and has_color(legend, (0, 0, 255))

    def ink(labels: list[str], scores: list[float | None] | None = None) -> float:
        picture = draw_masks(image, masks, labels, [(255, 0, 0), (0, 0, 255)], scores)
        assert picture.size == bare.size
        return np.abs(np.asarray(picture).astype(int) - np.asarray(bare)).sum()

    assert 0 < ink(["left cat", ""]) < ink(["left cat", "left cat"])
    assert 0 < ink(["", ""], [0.5, None]) < ink(["", ""], [0.5, 0.5])


def test_colors_are_used_again():
    masks = [box(10 * n, 0, 10 * n + 8, 9, (400, 9)) for n in range(len(PALETTE) + 1)]
    pixels = np.asarray(draw_masks(Image.new("RGB", (9, 400)), masks, [""] * len(masks), legend=False))
    np.testing.assert_array_equal(pixels[10 * len(PALETTE) + 4], pixels[4])
    only_red = np.asarray(draw_masks(Image.new("RGB", (9, 400)), masks, [""] * len(masks), [(9, 0, 0)], legend=False))
    assert only_red[..., 0].any() and not only_red[..., 1:].any()


LABELS = {
    "long": "the grey box " * 20,
    "one long word": "x" * 250,
    "right to left": "החתול השמאלי " * 9,
    "without spaces": "左边的猫" * 30,
    "lines and controls": "a\n\n\tb\0\x1b[1m",
    "half a character": "\ud83d",
    "faces": "👩‍👩‍👧 é e\u0301",
    "blank": "  ",
}


@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("size", [(1, 1), (300, 2), (2, 3000), (3000, 4000)], ids=str)
def test_any_phrase_and_size_can_be_drawn(label, size):
    picture = draw_masks(Image.new("L", size[::-1]), [np.ones(size)], [label], scores=[1.0])
    assert picture.width == max(size[1], 360) and picture.height > size[0]
    margin = np.asarray(picture)[size[0] :, -8:]
    assert (margin == 255).all()  # no phrase runs out of the sheet


def test_long_phrases_take_more_lines_but_not_without_end():
    def height(label: str, count: int = 1) -> int:
        return draw_masks(Image.new("RGB", (360, 1)), [np.ones((1, 360))] * count, [label] * count).height

    assert height("box") < height("the grey box " * 10) < height("the grey box " * 20) < 300
    assert height("x" * 100) > height("x")
    assert height("the grey box " * 100_000) < 1.2 * height("the grey box " * 24)
    assert height("box", 1000) == height("box", 61) > height("box", 60) > 50 * 20


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
def test_images_of_all_modes(mode):
    assert draw_masks(Image.new(mode, (30, 20)), [np.ones((20, 30))], ["a"], legend=False).size == (30, 20)


def test_photographs_are_turned_upright():
    image = Image.new("RGB", (30, 20))
    image.getexif()[274] = 6
    assert draw_masks(image, [np.ones((30, 20))], ["a"], legend=False).size == (20, 30)


def test_no_masks_leave_the_image_alone():
    image = sample().image
    assert draw_masks(image, [], []).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"labels": []}, "0 labels for 1 masks"),
        ({"scores": [0.5, 0.5]}, "1 labels and 2 scores for 1 masks"),
        ({"masks": [np.ones((60, 40))]}, r"masks\[0\] has shape \(60, 40\), but its image has \(40, 60\)"),
        ({"colors": []}, "colors is empty"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    given = {"image": sample().image, "masks": [np.ones((40, 60))], "labels": ["a"]} | arguments
    with pytest.raises(ValueError, match=message):
        draw_masks(**given)


def test_cards_stand_in_columns_and_none_covers_another():
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    cards = [Card(Image.new("RGB", (100, 40 + 20 * place), color), []) for place, color in enumerate(colors)]
    sheet = np.asarray(draw_cards("title", {"three": cards[:3], "one": cards[3:]}, 260)).astype(int)
    for place, color in enumerate(colors):
        assert (sheet == color).all(-1).sum() == 100 * (40 + 20 * place)
    lefts = [np.flatnonzero((sheet == color).all(-1).any(0)).min() for color in colors]
    assert lefts[0] == lefts[2] == lefts[3] < lefts[1]  # two columns have room


def test_a_card_has_its_texts_in_their_colors_but_no_end_of_lines():
    card = Card(Image.new("RGB", (100, 40)), [("few words", (255, 0, 0)), ("x" * 50, (0, 0, 255))])
    sheet = draw_cards("", {"": [card]}, 200)
    assert has_color(sheet, (255, 0, 0)) and has_color(sheet, (0, 0, 255))
    long = draw_cards("", {"": [Card(card.picture, [("word " * 5_000, (255, 0, 0))])]}, 200)
    assert sheet.height < long.height < sheet.height + 1_200


@pytest.mark.parametrize("size", [(9, 5), (30, 60), (180, 20)])
def test_a_single_pixel_of_a_mask_stays_where_it_is(size):
    mask = np.zeros((40, 90))
    mask[31, 20] = 1
    fitted = fit_mask(mask, size)
    assert fitted.shape == size[::-1] and fitted.any()
    assert fitted[31 * size[1] // 40, 20 * size[0] // 90]
