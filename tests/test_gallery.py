"""Pictures: what is tinted, what is dimmed, and that nothing is lost on a sheet."""

import numpy as np
from PIL import Image

from gallery import PREDICTION_COLOR, Sample, draw_gallery, draw_sample, overlay


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
