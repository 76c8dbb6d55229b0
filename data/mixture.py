"""Training rows of several data sets together, without the images that any of the sets is tested on.

In the official mixed training, RefCOCOg's training rows show images that RefCOCO is tested on, and so on. Here such
rows are left out.
"""

import os
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.compute

from .coco_names import PUBLISHED_BY_COCO

SEPARATOR = " + "  # between the data sets of a mixture; with spaces, because 'refcoco+' ends in a plus
MEMBER = re.compile(r"(?:(?P<weight>\d*\.?\d+)\*)?(?P<name>[^*]+?)(?::(?P<split>\w+))?")
# RefCOCOg's two divisions are of the same images, and google's has images that are both in train and in val.
INCOMPATIBLE = {"refcocog/google", "refcocog/umd"}


class Member(NamedTuple):
    """A data set of a mixture."""

    weight: float  # how often each of its rows is seen in an epoch
    name: str
    split: str  # to train on


class Leak(NamedTuple):
    """How many training rows of a data set show images that are tested on."""

    name: str  # the data set's name
    objects: int  # such rows
    phrases: int  # in these rows
    total_objects: int  # all training rows


@dataclass(frozen=True)
class Mixture:
    """Rows of several data sets to train on, and what is known of images among them that are tested on.

    A single data set is a mixture, too, if it has a weight, or if splits of other data sets are tested on.

    Attributes:
        rows: the rows of all data sets. The column `repetition` numbers the copies of a row that a weight above 1
            repeats.
        leaks: for each data set, how many of its rows show an image that is in a split tested on.
        leaks_stay: whether `rows` has those rows all the same.
    """

    rows: datasets.Dataset
    leaks: list[Leak]
    leaks_stay: bool

    def __len__(self) -> int:
        return len(self.rows)

    def describe_leaks(self) -> str:
        """A sentence for each data set with leaks, for the log and the model card."""
        what = "STAY in training, although" if self.leaks_stay else "leave training, because"
        return (
            " ".join(
                f"{public_name(leak.name)}: {leak.objects} of {leak.total_objects} objects ({leak.phrases} phrases) "
                f"{what} their images are in a split that is tested on."
                for leak in self.leaks
                if leak.objects
            )
            or "No image was found, by its file or its number in COCO, in a split that is tested on."
        )


def public_name(dataset: str) -> str:
    """A data set's name without the path of a folder on this machine, for logs and model cards."""
    return Path(dataset).name if Path(dataset).is_dir() else dataset


def parse_mixture(mixture: str, train_split: str) -> list[Member]:
    """Read the members of a mixture such as `refcoco/unc + 0.5*refcoco+/unc:train`.

    Args:
        mixture: as above; or a folder of whatever name, which is then the only member.
        train_split: the split of members that name none.

    Raises:
        ValueError: a member cannot be read, is named twice, or does not go together with another.
    """
    if os.path.isdir(mixture):
        return [Member(1, mixture, train_split)]
    members = []
    for part in mixture.split(SEPARATOR):
        match = MEMBER.fullmatch(part.strip())
        if match is None or float(match["weight"] or 1) == 0:
            raise ValueError(
                f"The mixture {mixture!r} has the member {part!r}: give weight*name:split with a weight above 0, such "
                "as 'refcoco/unc + 0.5*refcoco+/unc:train'."
            )
        members.append(Member(float(match["weight"] or 1), match["name"], match["split"] or train_split))
    names = [member.name for member in members]
    if len(set(names)) < len(names):
        raise ValueError(f"The mixture {mixture!r} names a data set twice: give it a weight instead.")
    if INCOMPATIBLE <= set(names):
        raise ValueError(
            f"The mixture {mixture!r} has both splits of RefCOCOg, which divide the same images in two ways, google's "
            "with images in both train and val: take refcocog/umd alone."
        )
    return members


def mix(
    members: list[Member],
    splits: dict[str, datasets.DatasetDict],
    tested: Iterable[tuple[str, datasets.Dataset]] = (),
    keep_leaks: bool = False,
) -> Mixture:
    """Mix the training rows of several data sets.

    Rows are left out if their image is in another split of any member, or in `tested`. Two rows show the same image if
    it is the same file, if its file's name has the same number of COCO's, or if it has the same `image_id` in the same
    data set.

    A weight above 1 repeats rows: with 1.5 all rows are there once, and half of them, always the same, a second time.
    A column `repetition` counts the repetitions of a row, from 0.

    Args:
        members: the data sets to mix.
        splits: all splits of each member, by its name.
        tested: further rows that are tested on, each with the name of its data set.
        keep_leaks: whether the rows that would be left out stay.

    Returns:
        The rows, and for each member how many rows were left out, or would have been without `keep_leaks`.

    Raises:
        ValueError: a member has no split of that name, or no rows are left of it.
    """
    held_out = {key for name, rows in tested for keys in _image_keys(name, rows) for key in keys}
    for member in members:
        if member.split not in splits[member.name]:
            raise ValueError(f"{member.name} has no split {member.split!r}: it has {list(splits[member.name])}.")
        for split, rows in splits[member.name].items():
            if split != member.split:
                held_out.update(key for keys in _image_keys(member.name, rows) for key in keys)
    training, leaks = [], []
    for member in members:
        rows = splits[member.name][member.split]
        if not len(rows):
            raise ValueError(f"{member.name}, split {member.split!r}, has no rows to train on.")
        leaking = [not held_out.isdisjoint(keys) for keys in _image_keys(member.name, rows)]
        phrases = sum(len(sentences) for sentences, is_leaking in zip(rows["sentences"], leaking) if is_leaking)
        leaks.append(Leak(member.name, sum(leaking), phrases, len(rows)))
        kept = [index for index, is_leaking in enumerate(leaking) if keep_leaks or not is_leaking]
        whole = int(member.weight)
        rest = random.Random(member.name).sample(kept, round((member.weight - whole) * len(kept)))
        chosen = kept * whole + sorted(rest)
        if not chosen:
            raise ValueError(
                f"No row of {member.name}, split {member.split!r}, is left to train on: {len(kept)} of {len(rows)} "
                f"rows remain after removing test images (keep_leaks keeps those too), and the weight is "
                f"{member.weight:g}."
            )
        repetition = [index // len(kept) for index in range(len(chosen))]
        training.append(rows.select(chosen).add_column("repetition", repetition))
    return Mixture(datasets.concatenate_datasets(training), leaks, keep_leaks)


def _image_keys(name: str, rows: datasets.Dataset) -> list[list[tuple]]:
    """For each row the keys of its image: its image_id in this data set, its file, and its number among COCO's images.

    Other numbers and names say nothing about another data set: everybody numbers images from 0.
    """
    table = rows.select_columns(["image_id", "image"]).with_format("arrow")[:]
    found = []
    for image_id, path in zip(
        table["image_id"].to_pylist(), pa.compute.struct_field(table["image"], "path").to_pylist()
    ):
        keys = [(name, image_id)]
        if path and os.path.isabs(path):
            keys.append(("file", path))
        if match := PUBLISHED_BY_COCO.fullmatch(os.path.basename(path or "")):
            keys.append(("COCO", int(match[1])))
        found.append(keys)
    return found
