"""Measure what each method of adapting the backbones adds to the head, on the synthetic set.

    python -m benchmarks.adapters --output_dir runs/adapters
    python -m benchmarks.adapters --output_dir runs/adapters --seeds 0 1     # goes on with a second seed

1. It makes two backbones that have never met: `python -m backbones.pretrain --unaligned`.
2. It trains the head alone at a constant learning rate until `--patience` evaluations in a row have brought no better
   mean IoU on val. The steps that this took are the steps of all further runs.
3. It trains every method for so many steps, with a learning rate that falls to zero. All arguments but those in
   `METHODS` are those of `configs/adapters.yaml`, or of `train_hf.py` on the command line.

Afterwards the folder holds `adapters.md`, a table of the last weights' mean IoU; `adapters.png`, val's mean IoU
against steps; and a folder for each run. The same command goes on where an earlier one was stopped.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser

import train_hf
from configuration_detris import one_line
from pages import COLORS, new_figure, write_whole
from training.arguments import parse_arguments
from training.checkpoints import LAST, checkpoints_in

from .model import cpu_name

CONFIG = str(Path(__file__).parents[1] / "configs" / "adapters.yaml")
HEAD = "head only"
METHODS = {  # fields of DetrisConfig
    HEAD: {"peft_method": "none"},
    "larger head": {"peft_method": "none", "decoder_dim": 80},  # has as many parameters as head and adapters of DETRIS
    "lora": {"peft_method": "lora"},
    "detris": {"peft_method": "detris"},
    "detris+lora": {"peft_method": "detris+lora"},
}
CURVE = "mean_iou"
LINES = ("-", "--", ":")  # of the seeds


@dataclass
class BenchmarkArguments:
    """What to measure."""

    output_dir: str = field(metadata={"help": "Folder of all runs; what is finished there is not done again."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Each is a run of every method."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"choices": list(METHODS)})
    pretraining_steps: int = field(default=3000, metadata={"help": "Steps in which the backbones are made."})
    patience: int = field(
        default=6, metadata={"help": "Evaluations without a better mean IoU after which the head alone is done."}
    )
    most_steps: int = field(default=20_000, metadata={"help": "Steps after which it is done in any case."})


@dataclass
class Run:
    """A training that has ended.

    Attributes:
        metrics: what `train_hf.py` returned.
        curve: steps, and val's mean IoU after them.
        steps: those that were trained.
        arguments: what it was trained with.
    """

    metrics: dict[str, float]
    curve: list[tuple[int, float]]
    steps: int
    arguments: list[str]


def make_backbones(folder: Path, steps: int) -> None:
    """Pretrain the two backbones if the folder is not there."""
    if folder.exists():
        return
    scratch = folder.with_name(f"{folder.name}.partial")
    command = ["-m", "backbones.pretrain", "--unaligned", "--output_dir", scratch, "--max_steps", steps]
    subprocess.run([sys.executable, *map(str, command)], check=True)
    scratch.rename(folder)


def train_once(folder: Path, arguments: list[str]) -> Run:
    """Train with these arguments of `train_hf.py`, or go on, or read what an earlier call has left.

    Raises:
        ValueError: the folder holds a run with other arguments.
    """
    path = folder / "run.json"
    if path.exists():
        run = Run(**json.loads(path.read_text(encoding="utf-8")))
        if run.arguments != arguments:
            raise ValueError(f"{folder} was trained with other arguments: give another --output_dir, or delete it.")
        return run
    goes_on = ["--resume_from_checkpoint", LAST] if checkpoints_in(folder) else ["--overwrite_output_dir"]
    metrics = train_hf.main([CONFIG, *arguments, "--output_dir", str(folder), *goes_on])
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    curve = [(entry["step"], entry[f"eval_{CURVE}"]) for entry in state["log_history"] if f"eval_{CURVE}" in entry]
    run = Run(metrics, curve, state["global_step"], arguments)
    write_whole(path, json.dumps(vars(run), indent=2) + "\n")
    for checkpoint in checkpoints_in(folder):
        shutil.rmtree(checkpoint)
    return run


def make_table(runs: dict[str, list[Run]], seeds: list[int], search: Run, patience: int) -> str:
    """Make a Markdown table with a row for each method, and a caption.

    Args:
        runs: those of each method, one for each seed.
        search: the run that found the number of steps.
    """
    _, data_args, training_args = parse_arguments([CONFIG, *search.arguments])
    splits = data_args.test_splits
    best_step, best = max(search.curve, key=lambda point: point[1])
    lines = [
        f"Each method was trained for {search.steps:,} steps of {training_args.per_device_train_batch_size} objects. "
        f"The head alone had taken so many at a constant learning rate until {patience} evaluations, each "
        f"{training_args.eval_steps} steps apart, brought nothing better than its {best:.3f} on val after "
        f"{best_step:,} steps. Seeds {', '.join(map(str, seeds))}; float32, {cpu_name()}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}, transformers {transformers.__version__}.",
        "",
        f"| method | {' | '.join(f'mIoU {split}' for split in splits)} | trained parameters |",
        f"|---|{'---:|' * (len(splits) + 1)}",
    ]
    for method, of_seeds in runs.items():
        cells = [" / ".join(f"{run.metrics[f'{split}_mean_iou']:.3f}" for run in of_seeds) for split in splits]
        cells.append(f"{of_seeds[0].metrics['trained_parameters']:,d}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_curves(path: Path, runs: dict[str, list[Run]], seeds: list[int], search: Run) -> None:
    """Draw val's mean IoU against steps: a colour for each method, a kind of line for each seed."""
    figure, axes = new_figure()
    figure.set_size_inches(8, 5)
    axes.plot(*zip(*search.curve), ":", color="black", linewidth=1, label=f"{HEAD}, constant learning rate")
    for (method, of_seeds), color in zip(runs.items(), COLORS):
        for run, seed, line in zip(of_seeds, seeds, LINES):
            label = f"{method}, seed {seed}" if len(seeds) > 1 else method
            axes.plot(*zip(*run.curve), line, color=color, label=label)
    axes.set_xlabel("steps")
    axes.set_ylabel("mean IoU on val")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    """Make what is missing, and write table and picture after each run.

    Args:
        argv: arguments of `BenchmarkArguments`, and of `train_hf.py`.
    """
    parser = HfArgumentParser(BenchmarkArguments, prog="python -m benchmarks.adapters", description=__doc__)
    args, shared = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    model_config = parse_arguments([CONFIG, *shared])[0].model_config
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    backbones = output_dir / "backbones"
    make_backbones(backbones, args.pretraining_steps)
    shared += ["--vision_backbone", str(backbones / "vision"), "--text_backbone", str(backbones / "text")]

    def arguments(method: str, steps: int, seed: int) -> list[str]:
        fields = json.dumps(model_config | METHODS[method])
        return [*shared, "--model_config", fields, "--max_steps", str(steps), "--seed", str(seed)]

    rate = ["--lr_scheduler_type", "constant_with_warmup", "--early_stopping_patience", str(args.patience)]
    rate += ["--load_best_model_at_end", "true", "--do_predict", "false"]
    search = train_once(output_dir / "search", [*arguments(HEAD, args.most_steps, args.seeds[0]), *rate])
    runs = {method: [] for method in args.methods}
    for seed in args.seeds:
        for method, of_seeds in runs.items():
            folder = output_dir / f"{method.replace(' ', '_')}_{seed}"
            of_seeds.append(train_once(folder, arguments(method, search.steps, seed)))
            finished = {name: done for name, done in runs.items() if done}
            write_whole(output_dir / "adapters.md", make_table(finished, args.seeds, search, args.patience))
            draw_curves(output_dir / "adapters.png", finished, args.seeds, search)
    print((output_dir / "adapters.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(one_line(error))
