"""Compare a download of the REFER data sets with what was published, and name everything that is missing.

    python -m data.check path/to/refer                          # every data set of PUBLISHED
    python -m data.check path/to/refer refcoco/unc grefcoco/unc
    python -m data.check path/to/refer ref-zom/final rrefcoco/unc
    python -m data.check path/to/refer mine/unc --images path/to/photographs

The status is 0 if all is complete, and 1 if anything is missing, broken or differs in number. Numbers are compared
where they are known.
"""

import argparse
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from datasets.utils import tqdm

from .images import check_image
from .records import require_exists, require_unique_ref_ids, skipped_notice
from .refer import REFER_LAYOUT, read_instances, read_refs, read_row, refer_files

NAMES_SHOWN = 5  # of missing images; thousands can be missing
PROBLEMS_SHOWN = 100  # in annotations of another release, every record can be broken


class Counts(NamedTuple):
    """How many objects, phrases and images a split holds."""

    objects: int
    phrases: int
    images: int


# What the published files hold. docs/data.md has the same table and says where each number is from.
PUBLISHED = {
    "refcoco/unc": {
        "train": Counts(42404, 120624, 16994),
        "val": Counts(3811, 10834, 1500),
        "testA": Counts(1975, 5657, 750),
        "testB": Counts(1810, 5095, 750),
    },
    "refcoco+/unc": {
        "train": Counts(42278, 120191, 16992),
        "val": Counts(3805, 10758, 1500),
        "testA": Counts(1975, 5726, 750),
        "testB": Counts(1798, 4889, 750),
    },
    "refcocog/umd": {
        "train": Counts(42226, 80512, 21899),
        "val": Counts(2573, 4896, 1300),
        "test": Counts(5023, 9602, 2600),
    },
    "refcocog/google": {  # nobody has counted its phrases: docs/data.md says how they follow from other numbers
        "train": Counts(44822, 85474, 24698),
        "val": Counts(5000, 9536, 4650),
    },
}


def check(
    root: str | os.PathLike, name: str, images: str | os.PathLike | None = None
) -> tuple[dict[str, Counts], list[str], int]:
    """Read all of a data set, and go on where `load_refer` would stop.

    Args:
        root: folder in the REFER layout.
        name: dataset and split_by, such as `refcoco/unc`.
        images: folder of the images, as in `load_refer`.

    Returns:
        The counts of each split's sound rows, even of those whose images are missing; a sentence for each problem; and
        how many objects of gRefCOCO were skipped because they have no phrases.

    Raises:
        ValueError: it is not known where the data set's files belong.
    """
    files = refer_files(root, *name.partition("/")[::2], images)
    problems = []

    def attempt(function: Callable, *arguments: Any) -> Any:
        """What the function returns; None if it raises, which is then a problem."""
        try:
            return function(*arguments)
        except (OSError, ValueError) as error:
            problems.append(str(error))

    for path in files:
        attempt(require_exists, path, REFER_LAYOUT, root)
    found = attempt(read_refs, files.refs) if files.refs.exists() else None
    instances = attempt(read_instances, files.instances) if files.instances.exists() else None
    if found is None or instances is None:
        return {}, problems, 0
    refs, without_phrases = found

    splits = defaultdict(list)
    sizes = set()
    for ref in tqdm(refs, desc=f"{name}: annotations", unit="ref"):
        if found := attempt(read_row, files, ref, instances):
            split, row = found
            splits[split].append(row)
            sizes.add((row["image"], tuple(row["mask"]["size"])))
    attempt(require_unique_ref_ids, files.refs, [row["ref_id"] for rows in splits.values() for row in rows])

    missing = []
    for path, size in tqdm(sorted(sizes), desc=f"{name}: images", unit="image"):
        if Path(path).exists():
            attempt(check_image, path, size, REFER_LAYOUT)
        else:
            missing.append(os.path.relpath(path, files.images))
    if missing:
        names = ", ".join(missing[:NAMES_SHOWN]) + (" …" if len(missing) > NAMES_SHOWN else "")
        problems.append(f"{len(missing)} of {len(sizes)} images are missing in {files.images}: {names}")
    counts = {
        split: Counts(len(rows), sum(len(row["sentences"]) for row in rows), len({row["image"] for row in rows}))
        for split, rows in splits.items()
    }
    if not refs:
        problems.append(f"{files.refs} has no records.")
    return counts, problems, without_phrases


def report(root: str | os.PathLike, name: str, images: str | os.PathLike | None = None) -> bool:
    """Print what `check` finds beside the published counts, where they are known.

    Returns:
        Whether there are no problems and the counts agree.
    """
    found, problems, without_phrases = check(root, name, images)
    for problem in problems[:PROBLEMS_SHOWN]:
        print(f"- {problem}")
    if len(problems) > PROBLEMS_SHOWN:
        print(f"… and {len(problems) - PROBLEMS_SHOWN} more problems")
    if without_phrases:
        print(skipped_notice(without_phrases))
    published = PUBLISHED.get(name)
    what = "found, published counts unknown" if published is None else "found / published"
    print(f"{f'{name} ({what})':<30}" + "".join(f"{field:>20}" for field in Counts._fields))
    complete = not problems
    for split in (published or {}) | found:
        ours, theirs = found.get(split, Counts(0, 0, 0)), (published or found).get(split, Counts(0, 0, 0))
        complete &= ours == theirs
        pairs = [f"{one:,}" if published is None else f"{one:,} / {other:,}" for one, other in zip(ours, theirs)]
        print(f"{split:<30}{''.join(f'{pair:>20}' for pair in pairs)}" + ("" if ours == theirs else "   differs"))
    print(f"{name}: {'ok' if complete else 'incomplete'}\n")
    return complete


def main(arguments: list[str] | None = None) -> int:
    """Check the data sets that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Check REFER data sets against what was published.", prog="python -m data.check"
    )
    parser.add_argument("root", help="folder that holds images/ and a folder for each data set")
    parser.add_argument(
        "names",
        nargs="*",
        help=f"such as grefcoco/unc; by default those whose counts are known: {', '.join(PUBLISHED)}",
    )
    parser.add_argument("--images", help="folder of the image files, for other sets than the published ones")
    options = parser.parse_args(arguments)
    names = options.names or PUBLISHED
    if not Path(options.root).is_dir():
        parser.error(f"{options.root} is no folder: name the one that holds images/ and a folder for each data set.")
    try:
        for name in names:
            refer_files(options.root, *name.partition("/")[::2], options.images)
    except ValueError as error:
        parser.error(str(error))
    return 0 if all([report(options.root, name, options.images) for name in names]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
