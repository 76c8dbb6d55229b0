"""What a split is made of, against figures counted by hand or one by one; which rows are chosen to be looked at."""

from collections import Counter

import datasets
import numpy as np
import pytest
from helpers.refer_folder import HOSTILE_RLES
from helpers.rows import make_row, make_rows

from data import survey as survey_module
from data.masks import RleMask
from data.survey import AT_RANDOM, BROKEN, GRID, MAX_BROKEN, choose_rows, format_plots, plot_surveys, survey

SIZE = (24, 48)  # height, width


def stored(*rows: dict) -> datasets.Dataset:
    return make_rows(*rows).cast_column("image", datasets.Image(decode=False))


def masked(ref_id: int, top: int, left: int, bottom: int, right: int, **changes) -> dict:
    mask = np.zeros(SIZE)
    mask[top:bottom, left:right] = 1
    return make_row(ref_id, mask=RleMask().encode_example(mask), **changes)


def many(count: int, seed: int = 0) -> datasets.Dataset:
    """Rows with all kinds of masks, phrases and images."""
    random, rows = np.random.default_rng(seed), []
    for ref_id in range(count):
        height, width = random.integers(0, 24), random.integers(0, 48)
        sentences = ["word " * random.integers(1, 15) for _ in range(random.integers(1, 12))]
        rows.append(
            masked(ref_id, 0, 0, height, width, sentences=sentences, image_id=int(random.integers(0, count // 2)))
        )
    return stored(*rows)


def percentages(values: list[str]) -> dict[str, str]:
    return {name: f"{100 * count / len(values):.1f} %" for name, count in Counter(values).items()}


def number(value: int) -> str:
    """The bin of a number, told without the bounds of the code."""
    return str(value) if value <= 4 else "5 to 6" if value <= 6 else "7 to 9" if value <= 9 else "10 or more"


def size(mask: np.ndarray) -> str:
    percent, names = 100 * mask.sum() / mask.size, ["under 1 %", "1 to 3 %", "3 to 10 %", "10 to 30 %", "30 % or more"]
    return names[sum(percent >= bound for bound in (1, 3, 10, 30))] if percent else "no target"


def test_plots_have_the_figures_that_are_counted_one_by_one():
    splits = {"train": many(40), "val": many(25, seed=1)}
    plots = {plot.title: plot for plot in plot_surveys([survey(name, rows) for name, rows in splits.items()])}
    for place, (name, rows) in enumerate(splits.items()):
        expected = {
            "Words of a phrase": [number(len(text.split())) for row in rows["sentences"] for text in row],
            "Mask's share of the image": [size(RleMask().decode_example(mask)) for mask in rows["mask"]],
            "Phrases of an object": [number(len(row)) for row in rows["sentences"]],
            "Objects of an image": [number(count) for count in Counter(rows["image_id"]).values()],
        }
        for title, values in expected.items():
            split, cells = plots[title].numbers[place]
            found = {label: value for label, (value, count) in zip(plots[title].bins, cells, strict=True) if count}
            assert split == name and found == percentages(values), title
            assert sum(count for _, count in cells) == len(values)
    text = format_plots(list(plots.values()))
    assert all(title in text for title in plots) and len(plots) == 5


def test_the_figures_of_a_split_are_those_of_its_sound_rows():
    rows = stored(
        masked(0, 0, 0, 12, 24, sentences=["a b", "c"], image_id=5),
        masked(1, 0, 0, 0, 0, sentences=["d e f g"], image_id=5),
        masked(2, 0, 0, 24, 48, sentences=["h"], image_id=6),
        masked(3, 0, 0, 24, 48, sentences=[" "], image_id=7),
    )
    found = survey("val", rows)
    assert found.figures == {
        "objects": 3,
        "phrases": 4,
        "images": 2,
        "words_mean": 2.0,
        "words_max": 4,
        "mask_area_mean": pytest.approx(1.25 / 3),
        "empty_masks": 1,
        "object_phrases_max": 2,
        "image_objects_max": 2,
        "broken_rows": 1,
    }
    assert found.shares.tolist() == [0.25, 0, 1] and found.longest.tolist() == [3, 7, 1]
    assert list(found.problems) == [3] and "ref_id 3" in found.problems[3]


def test_the_mean_mask_lies_where_the_masks_lie():
    """One mask fills the left half, one the upper half, and one is empty, which does not count."""
    rows = stored(masked(0, 0, 0, 24, 24), masked(1, 0, 0, 12, 48), masked(2, 0, 0, 0, 0))
    found, half = survey("val", rows), GRID // 2
    expected = np.zeros((GRID, GRID))
    expected[:, :half] += 0.5
    expected[:half] += 0.5
    assert found.masks == 2
    np.testing.assert_allclose(found.mean_mask, expected)
    *_, plot = plot_surveys([found])
    cells = dict(zip(plot.bins, (float(value.split(" ")[0]) for value, _ in plot.numbers[0][1])))
    # In ninths of the square, all by half: 2 + 1.5 + 1 above, 1.5 + 1 + 0.5 in the middle, and 1 + 0.5 + 0 below.
    assert cells["top left"] == pytest.approx(100 * 2 / 9, abs=0.1) and cells["bottom right"] == 0
    assert cells["middle centre"] == pytest.approx(100 / 9, abs=0.1)
    assert "its centre is at 38 % of the width and 38 % of the height" in plot.alt


def test_of_many_or_huge_masks_the_mean_is_that_of_some(monkeypatch):
    monkeypatch.setattr(survey_module, "MAX_MASKS", 7)
    assert survey("val", many(40)).masks == 7
    monkeypatch.setattr(survey_module, "MAX_PIXELS_OF_MASKS", 3 * SIZE[0] * SIZE[1])
    assert survey("val", many(40)).masks == 3


def test_broken_rows_are_named_and_left_out(tmp_path):
    gone = {"path": str(tmp_path / "gone.jpg"), "bytes": None}
    rows = [make_row(0), make_row(1, sentences=[]), make_row(2) | {"image": None}, make_row(3)]
    rows += [make_row(4 + place, mask=mask) for place, (mask, _) in enumerate(HOSTILE_RLES)]
    (tmp_path / "gone.jpg").touch()
    rows = stored(*rows, make_row(99) | {"image": gone})
    (tmp_path / "gone.jpg").unlink()
    found = survey("val", rows)
    assert found.sound.tolist() == [0, 3]
    assert sorted(found.problems) == [index for index in range(len(rows)) if index not in (0, 3)]
    for index, reason in found.problems.items():
        assert f"ref_id {rows['ref_id'][index]}" in reason
    assert "gone.jpg" in found.problems[len(rows) - 1] and "it is null" in found.problems[2]
    nothing = survey("val", rows.select([1]))
    assert nothing.figures == {"broken_rows": 1} and plot_surveys([nothing]) == []
    assert choose_rows([nothing], 24) == {BROKEN: [(0, 0)]}
    assert len(choose_rows([found], 24)[BROKEN]) == MAX_BROKEN


def test_masks_that_name_nothing_alone_have_no_mean():
    found = survey("val", stored(masked(0, 0, 0, 0, 0)))
    assert not found.masks and "Where masks lie" not in [plot.title for plot in plot_surveys([found])]


# --- rows to look at ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 8, 24, 60, 200])
def test_as_many_rows_are_chosen_as_asked_for_each_once(count):
    surveys = [survey("train", many(60)), survey("val", many(20, seed=1))]
    chosen = choose_rows(surveys, count)
    places = [place for kind in chosen.values() for place in kind]
    assert len(places) == len(set(places)) == min(count, 80)
    assert sum(map(len, chosen.values())) - len(chosen[AT_RANDOM]) <= count // 2


def test_special_rows_are_the_extremes():
    surveys = [survey("train", many(60)), survey("val", many(20, seed=1))]
    chosen = choose_rows(surveys, 24)
    masks = {
        (place, row): RleMask().decode_example(mask).mean()
        for place, split in enumerate(surveys)
        for row, mask in enumerate(split.rows["mask"])
    }
    by_size = sorted((share, place) for place, share in masks.items() if share)
    assert [masks[place] for place in chosen["Smallest masks"]] == [share for share, _ in by_size[:3]]
    assert [masks[place] for place in chosen["Largest masks"]] == [share for share, _ in by_size[:-4:-1]]
    empty = [place for place, share in masks.items() if not share]
    assert len(chosen["Phrases that name nothing"]) == min(3, len(empty)) > 0
    assert set(chosen["Phrases that name nothing"]) <= set(empty)
    longest = max(
        (max(map(len, row)), place)
        for place, row in zip(masks, [row for split in surveys for row in split.rows["sentences"]])
        if place not in chosen["Smallest masks"] + chosen["Largest masks"] + chosen["Phrases that name nothing"]
    )
    lengths = [max(map(len, surveys[split].rows[row]["sentences"])) for split, row in chosen["Longest phrases"]]
    assert lengths[0] == longest[0] and lengths == sorted(lengths, reverse=True)


def test_random_rows_come_from_all_splits_and_from_the_seed():
    surveys = [survey("train", many(60)), survey("val", many(20, seed=1))]
    first, again, other = (choose_rows(surveys, 24, seed)[AT_RANDOM] for seed in (0, 0, 1))
    assert first == again != other
    assert [split for split, _ in first] == [0] * 6 + [1] * 6
