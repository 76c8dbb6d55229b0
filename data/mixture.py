"""Training rows of several data sets together, without the images that any of the sets is tested on.

In the official mixed training, RefCOCOg's training rows show images that RefCOCO is tested on, and so on. Here such
rows are left out.
"""

import os
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.compute

from configuration_detris import one_line

from .coco_names import PUBLISHED_BY_COCO
from .tables import HUB

SEPARATOR = " + "  # between the data sets of a mixture; with spaces, because 'refcoco+' ends in a plus
MEMBER = re.compile(rf"(?:(?P<weight>\d*\.?\d+)\*)?(?P<name>(?:{HUB})?[^*]+?)(?::(?P<split>\w+))?")
COCO_NUMBER = "COCO"  # the kind of key that such a number is
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
        unnumbered: the data sets without a number of COCO's in their images' names, where others have them.
    """

    rows: datasets.Dataset
    leaks: list[Leak]
    leaks_stay: bool
    unnumbered: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def describe_leaks(self) -> str:
        """A sentence for each data set with leaks, or that could hide some, for the log and the model card."""
        what = "STAY in training, although" if self.leaks_stay else "leave training, because"
        sentences = [
            f"{public_name(leak.name)}: {leak.objects} of {leak.total_objects} objects ({leak.phrases} phrases) "
            f"{what} their images are in a split that is tested on."
            for leak in self.leaks
            if leak.objects
        ] or ["No image was found, by its file or its number in COCO, in a split that is tested on."]
        if self.unnumbered:
            sentences.append(
                f"The images of {', '.join(map(public_name, self.unnumbered))} have no numbers of COCO's in their "
                "names: those that the other data sets have, too, are not noticed."
            )
        return " ".join(sentences)


def public_name(dataset: str) -> str:
    """A data set's name for logs and model cards: of what lies on this machine without its path, on the Hub the id."""
    return one_line(
        os.path.basename(os.path.abspath(dataset)) if os.path.exists(dataset) else dataset.removeprefix(HUB)
    )


def public_names(names: Iterable[str]) -> dict[str, str]:
    """The `public_name` of each data set; of those that would be called alike, with folders that lie above them."""
    paths = {name: os.path.abspath(name) if os.path.exists(name) else name for name in names}
    public = {name: public_name(name) for name in paths}
    for depth in range(2, max((path.count("/") for path in paths.values()), default=0) + 1):
        used = Counter(public[name] for path, name in {path: name for name, path in paths.items()}.items())
        for name, path in paths.items():
            if used[public[name]] > 1 and os.path.isabs(path):
                public[name] = one_line("/".join(path.split("/")[-depth:]))
    return public


def parse_mixture(mixture: str, train_split: str) -> list[Member]:
    """Read the members of a mixture such as `refcoco/unc + 0.5*refcoco+/unc:train + hub:someone/mine`.

    Args:
        mixture: as above; or a file or folder of whatever name, which is then the only member.
        train_split: the split of members that name none.

    Raises:
        ValueError: a member cannot be read, is named twice, or does not go together with another.
    """
    if os.path.exists(mixture):
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
    held_out, numbered = set(), {}  # for each data set whether its images have numbers of COCO's
    for member in members:
        if member.split not in splits[member.name]:
            raise ValueError(f"{member.name} has no split {member.split!r}: it has {list(splits[member.name])}.")
        others = [(member.name, rows) for split, rows in splits[member.name].items() if split != member.split]
        tested = [*tested, *others]
    for name, rows in tested:
        keys = {key for keys in _image_keys(name, rows) for key in keys}
        held_out |= keys
        numbered[name] = numbered.get(name, False) or _has_number(keys)
    training, leaks = [], []
    for member in members:
        rows = splits[member.name][member.split]
        if not len(rows):
            raise ValueError(f"{member.name}, split {member.split!r}, has no rows to train on.")
        keys_of_rows = _image_keys(member.name, rows)
        numbered[member.name] = numbered.get(member.name, False) or any(map(_has_number, keys_of_rows))
        leaking = [not held_out.isdisjoint(keys) for keys in keys_of_rows]
        phrases = sum(len(sentences) for sentences, is_leaking in zip(rows["sentences"], leaking) if is_leaking)
        leaks.append(Leak(member.name, sum(leaking), phrases, len(rows)))
        kept = [index for index, is_leaking in enumerate(leaking) if keep_leaks or not is_leaking]
        whole = int(member.weight)
        rest = random.Random(member.name).sample(kept, round((member.weight - whole) * len(kept)))
        if not (kept and whole or rest):
            raise ValueError(
                f"No row of {member.name}, split {member.split!r}, is left to train on: {len(kept)} of {len(rows)} "
                f"rows remain after removing test images (keep_leaks keeps those too), and the weight is "
                f"{member.weight:g}."
            )
        for repetition, chosen in enumerate([kept] * whole + [sorted(rest)] * bool(rest)):
            # `add_column` would copy rows that are chosen before it, with their images.
            training.append(rows.add_column("repetition", [repetition] * len(rows)).select(chosen))
    unnumbered = [name for name in numbered if not numbered[name]]
    unnumbered = unnumbered if len(unnumbered) < len(numbered) else []
    return Mixture(datasets.concatenate_datasets(training), leaks, keep_leaks, unnumbered)


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
            keys.append((COCO_NUMBER, int(match[1])))
        found.append(keys)
    return found


def _has_number(keys: Iterable[tuple]) -> bool:
    """Whether one of the keys of images is a number of COCO's."""
    return any(kind == COCO_NUMBER for kind, _ in keys)
