"""`make quickstart`: train DETRIS on the synthetic set, test it, and show what it can be used for.

    python quickstart.py [--num_train_epochs 2 …]
    python quickstart.py --methods detris lora dora detris+lora none --output_dir runs/methods

Several methods are trained one after the other and compared. All runs follow `configs/quickstart.yaml`; arguments of
`train_hf.py` may be given, too, and hold for all runs. Afterwards `runs/quickstart/` holds the model and the
predictions of the first run, a folder for each further run, the metrics of all runs in `metrics.json`, `gallery.png`,
and in `examples/` a few pictures with phrases and masks, laid out as a data set of one's own can be.
"""

import json
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import HfArgumentParser

from data.shapes import FAMILIES, ID_STRIDE, MAX_IMAGES, draw_scene, generate_rows, render
from data.sources import METADATA
from gallery import Sample, draw_gallery
from train_hf import main as train
from training.arguments import parse_arguments

CONFIG, OWN_FOLDER = "configs/quickstart.yaml", "runs/quickstart"
METHODS = {
    "detris": {"peft_method": "detris"},
    "lora": {"peft_method": "lora"},
    "dora": {"peft_method": "lora", "lora_use_dora": True},
    "detris+lora": {"peft_method": "detris+lora"},
    "none": {"peft_method": "none"},
}
GALLERY_SPLIT, SAMPLES_PER_FAMILY = "val", 6  # what the gallery shows
EXAMPLES, EXAMPLE_IMAGES = "examples", 8


@dataclass
class QuickstartArguments:
    """What to train."""

    methods: list[str] = field(
        default_factory=lambda: ["detris"],
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


def options_of_scenes(shapes_config: dict) -> dict:
    """The options with which single scenes of the synthetic set are drawn as `shapes_config` draws all of them."""
    return {"seed": 0} | {name: value for name, value in shapes_config.items() if name != "sizes"}


def family_samples(predictions: Path, split: str, shapes_config: dict) -> dict[str, list[Sample]]:
    """Pick the first samples of a split for each family of phrases, good or bad, each of another image.

    Args:
        predictions: folder in which a run has left `<split>/results.jsonl` and masks.
        shapes_config: the options with which the synthetic set was drawn.
    """
    scene_options = options_of_scenes(shapes_config)
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


def write_examples(folder: Path, shapes_config: dict) -> list[dict]:
    """Write the first scenes of the gallery's split as a folder that `train_hf.py` and `data.prepare` read.

    Args:
        folder: where to write them; what it holds is deleted first.
        shapes_config: the options with which the synthetic set was drawn.

    Returns:
        The lines of its `metadata.jsonl`, one for each object.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = []
    for row in generate_rows(split=GALLERY_SPLIT, count=EXAMPLE_IMAGES, **options_of_scenes(shapes_config)):
        scene = f"scene_{row['image_id'] % MAX_IMAGES}"
        line = {"file_name": f"{scene}.png", "sentences": row["sentences"], "mask": f"{scene}_mask_{len(lines)}.png"}
        row["image"].save(folder / line["file_name"])
        Image.fromarray(row["mask"] * 255).save(folder / line["mask"])
        lines.append(line)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / METADATA).write_text(text, encoding="utf-8")
    return lines


def print_next_steps(output_dir: Path, examples: list[dict]) -> None:
    """Print commands that work as they stand: segment a picture, open the page, train on a folder of one's own."""
    folder = output_dir / EXAMPLES
    file_name = examples[0]["file_name"]
    phrases = [line["sentences"][0] for line in examples if line["file_name"] == file_name]
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    segment = [python, "segment.py", folder / file_name, *phrases, "--model", output_dir]
    page = (
        ["make", "app"]
        if str(output_dir) == OWN_FOLDER
        else ["make", "app", f"ARGS=--model {shlex.quote(str(output_dir))}"]
    )
    own_data = [python, "train_hf.py", "configs/own_data.yaml", "--model_name_or_path", output_dir]
    own_data += ["--dataset", folder, "--image_size", 96, "--num_train_epochs", 5, "--output_dir", "runs/own"]
    for what, command in (
        ("Segment a picture:", segment),
        ("Open the page in a browser:", page),
        (f"Train on pictures and phrases of your own, laid out as in {folder}:", own_data),
    ):
        print(f"\n{what}\n    {shlex.join(map(str, command))}")


def main(argv: list[str]) -> None:
    """Train each method in turn; write metrics, gallery and examples; print the table and what to do next.

    Args:
        argv: arguments of `QuickstartArguments` and of `train_hf.py`.
    """
    parser = HfArgumentParser(QuickstartArguments, description=__doc__, allow_abbrev=False)
    args, argv = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    model_args, data_args, training_args = parse_arguments([CONFIG, *argv])
    output_dir = Path(training_args.output_dir)
    # What an earlier quickstart left in its own folder may go, but nothing elsewhere.
    overwrite = ["--overwrite_output_dir"] if training_args.output_dir == OWN_FOLDER else []
    examples_folder = output_dir / EXAMPLES
    if examples_folder.exists() and not (overwrite or training_args.overwrite_output_dir):
        raise FileExistsError(
            f"{examples_folder} exists, and the quickstart would replace it: name another --output_dir, or allow it "
            "by --overwrite_output_dir."
        )
    runs = {}
    for method in args.methods:
        model_config = json.dumps(model_args.model_config | METHODS[method])
        folder = output_dir / method if runs else output_dir
        changes = ["--model_config", model_config, "--output_dir", str(folder)]
        runs[method] = train([CONFIG, *overwrite, *argv, *changes])
    (output_dir / "metrics.json").write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
    sections = family_samples(output_dir / "predictions", GALLERY_SPLIT, data_args.shapes_config)
    draw_gallery(sections).save(output_dir / "gallery.png")
    examples = write_examples(examples_folder, data_args.shapes_config)
    print_table(runs, data_args.test_splits)
    print(f"\nThe model, its predictions, metrics.json, gallery.png, report.html and examples are in {output_dir}.")
    print_next_steps(output_dir, examples)


if __name__ == "__main__":
    main(sys.argv[1:])
