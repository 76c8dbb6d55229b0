"""COCO's names: of the categories by their ids, and of the image files, which hold the image's id."""

import re
from pathlib import Path

CATEGORY_NAMES = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter "
    "bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee "
    "skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass "
    "cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch "
    "potted_plant bed dining_table toilet tv laptop mouse remote keyboard cell_phone microwave oven toaster sink "
    "refrigerator book clock vase scissors teddy_bear hair_drier toothbrush"
)
UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # ids between 1 and 90 that no category has
COCO_CATEGORIES = dict(
    zip(
        (number for number in range(1, 91) if number not in UNUSED_IDS),
        (name.replace("_", " ") for name in CATEGORY_NAMES.split()),
        strict=True,
    )
)
IMAGE_STEM = re.compile(r"(?:COCO_(?:train|val)\d{4}_)?(\d{1,18})")  # a file name's stem that holds an image's id
# Exactly twelve digits, as other images may have names of six. In all of COCO's releases an image has the same number.
PUBLISHED_BY_COCO = re.compile(r"(?:COCO_(?:train|val)\d{4}_)?(\d{12})\.jpg")
OBJECT_FILE = re.compile(r"(COCO_(?:train|val)\d{4}_\d{12})_\d{1,18}(\.\w{1,9})")


def coco_image_id(file_name: str) -> int:
    """The image_id at the end of a COCO file's name; for other names 0, which is no image's id in COCO."""
    match = IMAGE_STEM.fullmatch(Path(file_name).stem)
    return int(match[1]) if match else 0


def without_object_number(file_name: str) -> str:
    """The name of the image's file, without the number of the object that REFER's `file_name` has at its end."""
    return OBJECT_FILE.sub(r"\1\2", file_name) if OBJECT_FILE.fullmatch(file_name) else file_name
