"""`make quickstart`: train DETRIS on the synthetic set, train it once more without adapters, and compare.

    python quickstart.py [--methods detris lora dora detris+lora none] [--num_train_epochs 2 ...]

All runs follow `configs/quickstart.yaml`. Arguments of `train_hf.py` may be given, too, and hold for all runs.
Afterwards `runs/quickstart/` holds the model and the predictions of the first run, a folder for each further run, the
metrics of all runs in `metrics.json`, and `gallery.png`.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import HfArgumentParser

from data.shapes import FAMILIES, ID_STRIDE, MAX_IMAGES, draw_scene, render
from gallery import Sample, draw_gallery
from train_hf import main as train
from training.arguments import parse_arguments

CONFIG = "configs/quickstart.yaml"
METHODS = {
    "detris": {"peft_method": "detris"},
    "lora": {"peft_method": "lora"},
    "dora": {"peft_method": "lora", "lora_use_dora": True},
    "detris+lora": {"peft_method": "detris+lora"},
    "none": {"peft_method": "none"},
}
GALLERY_SPLIT, SAMPLES_PER_FAMILY = "val", 6  # what the gallery shows


@dataclass
class QuickstartArguments:
    """What to compare."""

    methods: list[str] = field(
        default_factory=lambda: ["detris", "none"],
        metadata={"choices": list(METHODS), "help": "What to train inside the backbones, besides the head."},
    )


def print_table(runs: dict[str, dict[str, float]], splits: list[str]) -> None:
    """Print a row for each run: its mean IoU on all splits, two more metrics of val, and how much was trained.

    Args:
        runs: the metrics of each run, by its name.
    """
    columns = {f"mIoU {split}": (f"{split}_mean_iou", ".3f") for split in splits} | {
        "oIoU val": ("val_overall_iou", ".3f"),
        "Pr@0.5 val": ("val_precision@0.5", ".3f"),
        "trained parameters": ("trained_parameters", ",d"),
    }
    print("".join(["\n", " " * 14, *(f"  {column}" for column in columns)]))
    for name, metrics in runs.items():
        print(
            f"{name:14}" + "".join(f"  {metrics[key]:>{len(column)}{form}}" for column, (key, form) in columns.items())
        )


def family_samples(predictions: Path, split: str, shapes_config: dict) -> dict[str, list[Sample]]:
    """Pick the first samples of a split for each family of phrases, good or bad, each of another image.

    Args:
        predictions: folder in which a run has left `<split>/results.jsonl` and masks.
        shapes_config: the options with which the synthetic set was drawn.
    """
    scene_options = {"seed": 0} | {name: value for name, value in shapes_config.items() if name != "sizes"}
    families = {family: {} for family in FAMILIES}  # image_id -> sample
    for line in (predictions / split / "results.jsonl").read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        scene = draw_scene(split=split, index=result["image_id"] % MAX_IMAGES, **scene_options)
        target = result["ref_id"] % ID_STRIDE
        (family,) = (phrase.expression.family for phrase in scene.phrases[target] if phrase.text == result["sentence"])
        if len(families[family]) < SAMPLES_PER_FAMILY and result["image_id"] not in families[family]:
            pixels, labels = render(scene)
            prediction = np.asarray(Image.open(predictions / split / result["mask"]))
            image, truth = Image.fromarray(pixels), labels == target + 1
            sample = Sample(image, result["sentence"], truth, prediction, result["iou"])
            families[family][result["image_id"]] = sample
        if all(len(samples) == SAMPLES_PER_FAMILY for samples in families.values()):
            break
    return {family: list(samples.values()) for family, samples in families.items() if samples}


def main(argv: list[str]) -> None:
    """Train each method in turn; write `metrics.json` and `gallery.png`, and print the table.

    Args:
        argv: arguments of `QuickstartArguments` and of `train_hf.py`.
    """
    parser = HfArgumentParser(QuickstartArguments, description=__doc__, allow_abbrev=False)
    args, argv = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    model_args, data_args, training_args = parse_arguments([CONFIG, *argv])
    output_dir = Path(training_args.output_dir)
    own_folder = parse_arguments([CONFIG])[2].output_dir
    # What an earlier quickstart left in its own folder may go, but nothing elsewhere.
    overwrite = ["--overwrite_output_dir"] if training_args.output_dir == own_folder else []
    runs = {}
    for method in args.methods:
        model_config = json.dumps(model_args.model_config | METHODS[method])
        folder = output_dir / method if runs else output_dir
        changes = ["--model_config", model_config, "--output_dir", str(folder)]
        runs[method] = train([CONFIG, *overwrite, *argv, *changes])
    (output_dir / "metrics.json").write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
    sections = family_samples(output_dir / "predictions", GALLERY_SPLIT, data_args.shapes_config)
    draw_gallery(sections).save(output_dir / "gallery.png")
    print_table(runs, data_args.test_splits)
    print(f"\nThe model, its predictions, metrics.json and gallery.png are in {output_dir}.")


if __name__ == "__main__":
    main(sys.argv[1:])
