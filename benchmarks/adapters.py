"""Measure what each method of adapting the backbones adds to the head, on the synthetic set.

    python -m benchmarks.adapters --output_dir runs/adapters
    python -m benchmarks.adapters --output_dir runs/adapters --seeds 0 1     # goes on with a second seed

1. It makes two backbones that have never met: `python -m backbones.pretrain --unaligned`.
2. It trains the head alone with each of `--learning_rates`, which stays constant, until `--patience` evaluations in a
   row have brought no better mean IoU on val. The run with the best one sets the learning rate and the number of steps
   of all further runs.
3. It trains every method for so many steps, with a learning rate that falls to zero. All arguments but those in
   `METHODS` are those of `configs/adapters.yaml`, or of `train_hf.py` on the command line.

Afterwards the folder holds `adapters.md`, a table of the last weights' mean IoU; `adapters.png`, val's mean IoU
against steps; and a folder for each run. The same command goes on where an earlier one was stopped. Seeds can be
trained side by side by a command each, with `OMP_NUM_THREADS=1`, once the steps are found; a last one names them all.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import cycle
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
    "detris": {"peft_method": "detris"},
    "lora": {"peft_method": "lora"},
    "detris+lora": {"peft_method": "detris+lora"},
}
OWN = ("model_name_or_path", "vision_backbone", "text_backbone", "peft_method", "max_steps", "learning_rate", "seed")
CURVE = "mean_iou"
SEARCH_SEED = 0  # whichever seeds follow
LINES = ("-", "--", ":")  # of the seeds


@dataclass
class BenchmarkArguments:
    """What to measure."""

    output_dir: str = field(metadata={"help": "Folder of all runs; what is finished there is not done again."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Each is a run of every method."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"choices": list(METHODS)})
    pretraining_steps: int = field(default=3000, metadata={"help": "Steps in which the backbones are made."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 3e-3], metadata={"help": "Among which the head alone chooses."}
    )
    patience: int = field(
        default=4, metadata={"help": "Evaluations without a better mean IoU after which the head alone is done."}
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
        machine: where, and by which versions.
    """

    metrics: dict[str, float]
    curve: list[tuple[int, float]]
    steps: int
    arguments: list[str]
    machine: str

    @property
    def best(self) -> tuple[int, float]:
        """The point of the curve with the highest mean IoU."""
        return max(self.curve, key=lambda point: point[1])


def describe_machine() -> str:
    """Name the processor, its threads if it is no GPU, and the versions of the libraries that compute."""
    threads = f"{cpu_name()} ({torch.get_num_threads()} threads for a run)"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else threads
    return f"{device}, torch {torch.__version__}, transformers {transformers.__version__}"


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
    run = Run(metrics, curve, state["global_step"], arguments, describe_machine())
    write_whole(path, json.dumps(vars(run), indent=2) + "\n")
    for checkpoint in checkpoints_in(folder):
        shutil.rmtree(checkpoint)
    return run


def make_table(runs: dict[str, list[Run]], seeds: list[int], searches: dict[float, Run], chosen: float) -> str:
    """Make a Markdown table with a row for each method, and a caption.

    Args:
        runs: those of each method, one for each seed.
        searches: the runs of the head alone, by their constant learning rates.
        chosen: the learning rate of all methods.
    """
    search = searches[chosen]
    _, data_args, args = parse_arguments([CONFIG, *search.arguments])
    splits = data_args.test_splits
    machines = " and ".join(dict.fromkeys(run.machine for of_seeds in runs.values() for run in of_seeds))
    found = ", ".join(f"{run.best[1]:.3f} at {rate:g} ({run.best[0]:,} steps)" for rate, run in searches.items())
    lines = [
        f"Each method was trained for {search.steps:,} steps of {args.per_device_train_batch_size} objects, "
        f"with a learning rate that falls from {chosen:g} to zero. The head alone had taken so many at this rate, "
        f"kept constant, until {args.early_stopping_patience} evaluations, each {args.eval_steps} steps "
        f"apart, brought nothing better on val. Its best on val at each constant rate: {found}. Seeds "
        f"{', '.join(map(str, seeds))}; float32, {machines}.",
        "",
        f"| method | {' | '.join(f'mIoU {split}' for split in splits)} | trained parameters |",
        f"|---|{'---:|' * (len(splits) + 1)}",
    ]
    for method, of_seeds in runs.items():
        cells = [" / ".join(f"{run.metrics[f'{split}_mean_iou']:.3f}" for run in of_seeds) for split in splits]
        cells.append(f"{of_seeds[0].metrics['trained_parameters']:,d}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_curves(path: Path, runs: dict[str, list[Run]], seeds: list[int], searches: dict[float, Run]) -> None:
    """Draw val's mean IoU against steps: a colour for each method, a kind of line for each seed."""
    figure, axes = new_figure()
    figure.set_size_inches(8, 5)
    for (rate, run), color in zip(searches.items(), cycle(("black", "0.6"))):
        axes.plot(*zip(*run.curve), ":", color=color, linewidth=1, label=f"{HEAD}, constant rate {rate:g}")
    for (method, of_seeds), color in zip(runs.items(), cycle(COLORS)):
        for run, seed, line in zip(of_seeds, seeds, cycle(LINES)):
            axes.plot(*zip(*run.curve), line, color=color, label=f"{method}, seed {seed}")
    axes.set_xlabel("steps")
    axes.set_ylabel("mean IoU on val")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


class Benchmark:
    """The runs of one folder.

    Args:
        shared: arguments of `train_hf.py` that hold for all of them.

    Raises:
        ValueError: one of these is unknown or invalid, or differs between the runs.
    """

    def __init__(self, args: BenchmarkArguments, shared: list[str]):
        for argument in shared:
            if argument.partition("=")[0].removeprefix("--") in OWN:
                raise ValueError(f"{argument} is given, but the benchmark sets it for each of its runs: leave it out.")
        self.args = args
        self.folder = Path(args.output_dir)
        self.model_config = parse_arguments([CONFIG, *shared])[0].model_config
        self.backbones = self.folder / f"backbones_{args.pretraining_steps}"
        self.shared = [*shared, "--vision_backbone", str(self.backbones / "vision")]
        self.shared += ["--text_backbone", str(self.backbones / "text")]

    def train(self, name: str, method: str, steps: int, rate: float, seed: int, *others: str) -> Run:
        """Train a method in a folder of this name."""
        values = {
            "model_config": json.dumps(self.model_config | METHODS[method]),
            "max_steps": steps,
            "learning_rate": rate,
            "seed": seed,
        }
        named = [f"--{key}={value}" for key, value in values.items()]
        return train_once(self.folder / name, [*self.shared, *named, *others])

    def search(self, rate: float) -> Run:
        """Train the head alone with a constant learning rate until it no longer improves."""
        others = ["--lr_scheduler_type=constant_with_warmup", f"--early_stopping_patience={self.args.patience}"]
        others += ["--load_best_model_at_end=true", "--do_predict=false"]
        return self.train(f"search_{rate:g}", HEAD, self.args.most_steps, rate, SEARCH_SEED, *others)

    def run(self) -> None:
        """Make what is missing, and write table and picture after each run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        make_backbones(self.backbones, self.args.pretraining_steps)
        searches = {rate: self.search(rate) for rate in self.args.learning_rates}
        chosen = max(searches, key=lambda rate: searches[rate].best[1])
        runs = {method: [] for method in self.args.methods}
        for seed in self.args.seeds:
            for method, of_seeds in runs.items():
                name = f"{method.replace(' ', '_')}_{seed}"
                of_seeds.append(self.train(name, method, searches[chosen].steps, chosen, seed))
                finished = {method: done for method, done in runs.items() if done}
                table = make_table(finished, self.args.seeds, searches, chosen)
                write_whole(self.folder / "adapters.md", table)
                draw_curves(self.folder / "adapters.png", finished, self.args.seeds, searches)
        print(table)


def main(argv: list[str]) -> None:
    """Run the benchmark.

    Args:
        argv: arguments of `BenchmarkArguments`, and of `train_hf.py`.
    """
    parser = HfArgumentParser(BenchmarkArguments, description=__doc__, allow_abbrev=False)
    args, shared = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    Benchmark(args, shared).run()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(one_line(error))
