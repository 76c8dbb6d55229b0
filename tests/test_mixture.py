"""Mixing data sets: exactly the rows of images that are tested on leave, from each, and weights repeat the rest."""

from collections import Counter

import datasets
import numpy as np
import pytest

from data.check import PUBLISHED
from data.mixture import Member, mix, parse_mixture, public_name, public_names
from data.records import FEATURES


def make_rows(image_ids: list[int], first_ref_id: int = 0, folder: str = "/images") -> datasets.Dataset:
    """Two phrases an object, three where its ref_id is divisible by 3; only ids matter to a mixture."""
    count = len(image_ids)
    columns = {
        "image_id": list(map(int, image_ids)),
        "image": [{"path": f"{folder}/{image_id}.jpg", "bytes": None} for image_id in image_ids],
        "ref_id": list(range(first_ref_id, first_ref_id + count)),
        "sentences": [["one", "two", "three"][: 3 if ref_id % 3 == 0 else 2] for ref_id in range(count)],
    }
    features = datasets.Features({name: FEATURES[name] for name in columns} | {"image": datasets.Image(decode=False)})
    return datasets.Dataset.from_dict(columns, features=features)


def test_of_750_test_images_exactly_the_283_that_are_trained_on_leave():
    draw = np.random.default_rng(0)
    images = draw.permutation(5000)
    tested, leaking, clean = images[:750], images[:283], images[750:]
    # The one set trains on all 283, each with one to three objects; the other on some of them, and is not tested.
    first_train = draw.permutation(np.concatenate([np.repeat(leaking, draw.integers(1, 4, 283)), clean[:2000]]))
    second_train = draw.permutation(np.concatenate([leaking[:100], clean[1500:2500]]))
    splits = {
        "one": datasets.DatasetDict(train=make_rows(first_train)),
        "other": datasets.DatasetDict(train=make_rows(second_train, 10_000), val=make_rows(clean[-200:], 20_000)),
    }
    members = parse_mixture("one + other", "train")
    mixture = mix(members, splits, tested=[("third", make_rows(tested, 30_000))])

    expected = [image for image in first_train if image not in set(tested)]
    expected += [image for image in second_train if image not in set(tested)]
    assert list(mixture.rows["image_id"]) == expected and not mixture.leaks_stay
    assert len(set(first_train) & set(tested)) == 283
    for leak, train in zip(mixture.leaks, (first_train, second_train), strict=True):
        gone = [index for index, image in enumerate(train) if image in set(tested)]
        assert (leak.objects, leak.total_objects) == (len(gone), len(train))
        assert leak.phrases == sum(3 if index % 3 == 0 else 2 for index in gone)
    kept = mix(members, splits, tested=[("third", make_rows(tested, 30_000))], keep_leaks=True)
    assert list(kept.rows["image_id"]) == [*first_train, *second_train]
    assert kept.leaks == mixture.leaks and kept.leaks_stay


@pytest.mark.slow
def test_with_the_published_splits_the_counts_add_up():
    """Images as numbers: RefCOCO+ has those of RefCOCO, RefCOCOg (umd) trains on some that RefCOCO tests on."""
    splits, shared, next_image = {}, {}, 0
    for name in ("refcoco/unc", "refcoco+/unc", "refcocog/umd"):
        parts = {}
        for split, counts in PUBLISHED[name].items():
            images = range(next_image, next_image + counts.images)
            if name == "refcoco+/unc":  # of the same images as RefCOCO
                images = shared[split][: counts.images]
            elif name == "refcocog/umd" and split == "train":
                images = [*shared["testA"][:283], *shared["train"][:9000], *images][: counts.images]
            next_image = max(next_image, max(images) + 1)
            shared.setdefault(split, images)
            parts[split] = make_rows([images[index % len(images)] for index in range(counts.objects)])
        splits[name] = datasets.DatasetDict(parts)
    mixture = mix(parse_mixture("refcoco/unc + refcoco+/unc + refcocog/umd", "train"), splits)
    assert len(mixture) == sum(leak.total_objects - leak.objects for leak in mixture.leaks)
    assert [leak.total_objects for leak in mixture.leaks] == [42404, 42278, 42226]
    objects = Counter(splits["refcocog/umd"]["train"]["image_id"])
    assert [leak.objects for leak in mixture.leaks] == [0, 0, sum(objects[image] for image in shared["testA"][:283])]
    tested = {i for parts in splits.values() for split in parts if split != "train" for i in parts[split]["image_id"]}
    assert not tested & set(mixture.rows["image_id"])


def renamed(rows: datasets.Dataset, name: str) -> datasets.Dataset:
    return rows.map(lambda row: {"image": {"path": name.format(row["image_id"]), "bytes": None}})


def test_images_are_told_by_file_by_coco_number_or_within_a_set_by_number():
    """Everybody's own images are numbered from 0, and cameras name them alike."""
    ours = datasets.DatasetDict(train=make_rows(range(10), folder="/ours"), val=make_rows([20, 4], folder="/ours"))
    splits = {"ours": ours, "theirs": datasets.DatasetDict(train=make_rows([50]), val=make_rows(range(10)))}
    members = parse_mixture("ours + theirs", "train")

    def leaking(*tested: tuple[str, datasets.Dataset]) -> list[int]:
        return [leak.objects for leak in mix(members, splits, tested).leaks]

    assert leaking() == [1, 0]  # of image 4, which is in val too
    same_file = renamed(make_rows([77]), "/ours/5.jpg")
    assert leaking(("other", same_file)) == [2, 0]
    assert leaking(("other", renamed(make_rows(range(10)), "{}.jpg"))) == [1, 0]  # embedded: the name alone is known
    assert leaking(("ours", renamed(make_rows([7]), "anywhere.jpg"))) == [2, 0]
    ours["train"] = renamed(ours["train"], "/copies/COCO_train2014_{:012d}.jpg")
    assert leaking(("other", renamed(make_rows([8, 9]), "{:012d}.jpg"))) == [3, 0]
    assert leaking(("other", renamed(make_rows([8, 9]), "{:06d}.jpg"))) == [1, 0]


def test_images_without_numbers_of_cocos_beside_others_are_told_of():
    ours, theirs = make_rows([1, 2]), renamed(make_rows([3]), "COCO_train2014_{:012d}.jpg")
    members = parse_mixture("hub:some/ours", "train")

    def told(train: datasets.Dataset, *tested: tuple[str, datasets.Dataset]) -> str:
        return mix(members, {"hub:some/ours": datasets.DatasetDict(train=train)}, tested).describe_leaks()

    what = "have no numbers of COCO's in their names: those that the other data sets have, too, are not noticed."
    assert told(ours, ("theirs", theirs)).endswith(f"tested on. The images of some/ours {what}")
    assert told(theirs, ("one", ours), ("other", ours)).endswith(f"The images of one, other {what}")
    assert what not in told(ours, ("other", make_rows([3], folder="/theirs")))
    assert what not in told(theirs, ("other", renamed(make_rows([4]), "{:012d}.jpg")))


def test_rows_are_chosen_without_copying_their_images(tmp_path, monkeypatch):
    splits = {
        name: datasets.DatasetDict(train=make_rows(range(start, start + 9))) for name, start in (("a", 0), ("b", 9))
    }
    monkeypatch.setattr(datasets.Dataset, "flatten_indices", None)
    rows = mix(parse_mixture("2.5*a + b", "train"), splits, [("c", renamed(make_rows([4]), "/images/4.jpg"))]).rows
    assert Counter(rows["repetition"]) == {0: 8 + 9, 1: 8, 2: 4}


def test_weights_repeat_rows():
    splits = {
        name: datasets.DatasetDict(train=make_rows(range(start, start + 10), start))
        for name, start in (("one", 0), ("other", 100))
    }
    members = parse_mixture("2.5*one + 0.3*other:train", "train")
    assert members == [Member(2.5, "one", "train"), Member(0.3, "other", "train")]
    counts = Counter(mix(members, splits).rows["ref_id"])
    assert sum(counts.values()) == 25 + 3
    assert Counter(counts[ref_id] for ref_id in range(10)) == {2: 5, 3: 5}
    assert sum(counts[ref_id] for ref_id in range(100, 110)) == 3
    again = mix(members, splits).rows
    assert Counter(again["ref_id"]) == counts
    for ref_id in range(10):
        repetitions = [row["repetition"] for row in again if row["ref_id"] == ref_id]
        assert repetitions == list(range(counts[ref_id]))


@pytest.mark.parametrize(
    "mixture, members",
    [
        ("hub:someone/x", [(1, "hub:someone/x", "train")]),
        ("hub:someone/x:val", [(1, "hub:someone/x", "val")]),
        (
            "0.5*hub:someone/x.y-z_1:val + refcoco+/unc",
            [(0.5, "hub:someone/x.y-z_1", "val"), (1, "refcoco+/unc", "train")],
        ),
        ("path/to/table.parquet:val", [(1, "path/to/table.parquet", "val")]),
        ("hub:x", [(1, "hub:x", "train")]),  # which no set is called; it is refused when it is opened
    ],
)
def test_members_of_the_hub_are_told_from_splits(mixture, members):
    assert parse_mixture(mixture, "train") == members


def test_sets_with_the_same_last_folder_are_told_apart(tmp_path):
    for folder in ("p/bench", "t/bench", "t/other"):
        (tmp_path / folder).mkdir(parents=True)
    names = [str(tmp_path / "p/bench"), str(tmp_path / "t/bench"), str(tmp_path / "t/other"), "hub:someone/bench"]
    assert list(public_names(names).values()) == ["p/bench", "t/bench", "other", "someone/bench"]
    twice = [names[0], f"{names[0]}/../bench"]
    assert list(public_names(twice).values()) == ["bench", "bench"]


def test_public_names_tell_no_path_of_this_machine(tmp_path):
    (tmp_path / "table.parquet").touch()
    assert public_name(str(tmp_path)) == tmp_path.name
    assert public_name(str(tmp_path / "table.parquet")) == "table.parquet"
    assert public_name("hub:someone/x") == "someone/x"
    assert public_name("refcoco/unc") == "refcoco/unc"


@pytest.mark.parametrize(
    "mixture, message",
    [
        ("refcoco/unc + ", "has the member"),
        ("0*refcoco/unc", "a weight above 0"),
        ("-1*refcoco/unc", "has the member"),
        ("refcoco/unc:a:b*c", "has the member"),
        ("refcoco/unc + 2*refcoco/unc:train", "names a data set twice: give it a weight"),
        ("refcocog/google + refcoco/unc + refcocog/umd", "both splits of RefCOCOg.*take refcocog/umd alone"),
    ],
)
def test_what_is_no_mixture_is_refused(mixture, message):
    with pytest.raises(ValueError, match=message):
        parse_mixture(mixture, "train")


def test_a_member_without_rows_to_train_on_is_refused():
    splits = {"one": datasets.DatasetDict(train=make_rows([1, 2]), val=make_rows([1, 2]))}
    with pytest.raises(ValueError, match="one has no split 'training': it has"):
        mix(parse_mixture("one:training", "train"), splits)
    with pytest.raises(ValueError, match="No row of one, split 'train', is left to train on: 0 of 2"):
        mix(parse_mixture("one", "train"), splits)
    splits = {"one": datasets.DatasetDict(train=make_rows([1, 2]).select([]), val=make_rows([3]))}
    with pytest.raises(ValueError, match="^one, split 'train', has no rows to train on.$"):
        mix(parse_mixture("one", "train"), splits)
    splits = {"one": datasets.DatasetDict(train=make_rows([1, 2]), val=make_rows([3]))}
    with pytest.raises(ValueError, match="No row of one, .*: 2 of 2 .* weight is 0.1"):
        mix(parse_mixture("0.1*one", "train"), splits)
