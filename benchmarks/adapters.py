"""Measure what each method of adapting the backbones adds to the head, on the synthetic set.

    python -m benchmarks.adapters --output_dir runs/adapters
    python -m benchmarks.adapters --output_dir runs/adapters --seeds 1     # goes on with a second seed

1. It makes two backbones that were trained apart, by `backbones.pretrain` with `--unaligned`.
2. It trains the head alone with a constant learning rate until `--patience` evaluations in a row have brought no
   better mean IoU on val. The steps that this took are the steps of all further runs.
3. It trains every method for so many steps, with a learning rate that falls to zero.

All other arguments of `train_hf.py` come from `configs/adapters.yaml`, or from the file that `--config` names.
Afterwards the output folder holds `adapters.md`, a table of the mean IoU that the last weights reach; `adapters.png`,
val's mean IoU against steps; and a folder for each run. The same command goes on where an earlier one was stopped.

When the steps are found, two commands can share the work, such as one for each seed, with `OMP_NUM_THREADS=1` each.
Table and picture show every run of the folder that has ended, whichever command trained it.
"""

import argparse
import json
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import transformers

import train_hf
from data.untrusted import load_yaml
from pages import COLORS, new_figure, write_whole
from training.arguments import parse_arguments
from training.checkpoints import LAST, checkpoints_in
from training.run_folder import locked

from .model import device_name

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "adapters.yaml"
HEAD = "head only"
METHODS = {  # fields of DetrisConfig
    HEAD: {"peft_method": "none"},
    "larger head": {"peft_method": "none", "decoder_dim": 80},  # has as many parameters as head and adapters of DETRIS
    "detris": {"peft_method": "detris"},
    "lora": {"peft_method": "lora"},
    "detris+lora": {"peft_method": "detris+lora"},
}
SEARCH_SEED = 0  # of the run that finds the steps, whatever --seeds says
LINES = ("-", "--", "-.", (0, (1, 1)))  # of the seeds
RECORD = "run.json"  # what a run is trained with, and where it was, if it has ended


@dataclass
class Run:
    """A training that has ended.

    Attributes:
        metrics: what `train_hf.py` reported.
        curve: steps, and val's mean IoU after them.
        steps: those that were trained.
        machine: where, and by which versions.
    """

    metrics: dict[str, float]
    curve: list[tuple[int, float]]
    steps: int
    machine: str


def folder_name(method: str, seed: int | str) -> str:
    """Name the folder of a run, or those of all seeds where the seed is `*`."""
    return f"{method.replace(' ', '_')}_{seed}"


def describe_machine() -> str:
    """Name the processor, its threads if it is no GPU, and the versions of the libraries that compute."""
    processor = f"{device_name('cpu')} ({torch.get_num_threads()} threads for a run)"
    device = device_name("cuda") if torch.cuda.is_available() else processor
    return f"{device}, torch {torch.__version__}, transformers {transformers.__version__}"


@dataclass
class Benchmark:
    """The runs of one folder.

    Attributes:
        output_dir: the folder.
        config: a file of arguments of `train_hf.py`.
        pretraining_steps: those in which the backbones are made.
        patience: evaluations without a better mean IoU after which the head alone is done.
        most_steps: those after which it is done in any case.
    """

    output_dir: Path
    config: Path
    pretraining_steps: int
    patience: int
    most_steps: int

    @property
    def backbones(self) -> Path:
        """The folder of the two backbones."""
        return self.output_dir / f"backbones_{self.pretraining_steps}"

    def make_backbones(self) -> None:
        """Pretrain the two backbones if they are not there.

        Raises:
            SystemExit: another command makes them.
        """
        if self.backbones.exists():
            return
        scratch = self.backbones.with_name(f"{self.backbones.name}.partial")
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(scratch))
            except (ValueError, OSError) as error:
                raise SystemExit(str(error)) from error
            command = ["-m", "backbones.pretrain", "--unaligned", "--output_dir", scratch / "pair"]
            command += ["--max_steps", self.pretraining_steps]
            subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)
            (scratch / "pair").rename(self.backbones)
        shutil.rmtree(scratch)

    def settings(self, method: str, steps: int, seed: int, **others: Any) -> dict[str, Any]:
        """Return what a run is trained with. Its folder keeps these settings, and `read_run` refuses others.

        Args:
            others: further arguments of `train_hf.py`.
        """
        values = load_yaml(self.config)
        fields = json.dumps((values.get("model_config") or {}) | METHODS[method])
        given = {"model_config": fields, "max_steps": steps, "seed": seed} | others
        return {"config": values, "backbones": self.backbones.name, "given": given}

    def read_run(self, name: str, settings: dict[str, Any]) -> Run | None:
        """Read what a run has left in the folder of this name, if it has ended.

        Raises:
            SystemExit: the folder holds a run with other settings, or files that cannot be read.
        """
        folder = self.output_dir / name
        if not (folder / RECORD).exists():
            return None
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            if record["settings"] != settings:
                raise SystemExit(f"{folder} was begun with other settings: name another --output_dir, or delete it.")
            if "machine" not in record:
                return None
            metrics = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            curve = [(log["step"], log["eval_mean_iou"]) for log in state["log_history"] if "eval_mean_iou" in log]
            return Run(metrics, curve, state["global_step"], record["machine"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{folder} is damaged ({error!r}): delete it to train that run again.") from error

    def train(self, name: str, settings: dict[str, Any]) -> None:
        """Train in the folder of this name, or go on there, unless that run has ended.

        Raises:
            SystemExit: the folder holds a run with other settings, or another command is at work in it, or
                `train_hf.py` refuses the settings, or a signal has stopped the run.
        """
        if self.read_run(name, settings):
            return
        self.make_backbones()
        folder = self.output_dir / name
        record = {"settings": settings}
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RECORD, json.dumps(record, indent=2) + "\n")
        towers = {f"{tower}_backbone": self.backbones / tower for tower in ("vision", "text")}
        goes_on = f"--resume_from_checkpoint={LAST}" if checkpoints_in(folder) else "--overwrite_output_dir"
        arguments = [f"--{key}={value}" for key, value in (settings["given"] | towers).items()]
        with ExitStack() as stack:
            try:
                prepared = train_hf.prepare([str(self.config), *arguments, f"--output_dir={folder}", goes_on], stack)
            except (ValueError, OSError) as error:
                raise SystemExit(str(error)) from error
            try:
                train_hf.run(prepared)
            except SystemExit:
                print("The benchmark goes on from there by its own command.", file=sys.stderr)
                raise
        record["machine"] = describe_machine()
        write_whole(folder / RECORD, json.dumps(record, indent=2) + "\n")
        for checkpoint in checkpoints_in(folder):
            shutil.rmtree(checkpoint)

    def find_steps(self) -> Run:
        """Train the head alone with a constant learning rate until it no longer improves."""
        settings = self.settings(
            HEAD,
            self.most_steps,
            SEARCH_SEED,
            lr_scheduler_type="constant_with_warmup",
            early_stopping_patience=self.patience,
            load_best_model_at_end=True,
            do_predict=False,
        )
        self.train("search", settings)
        return self.read_run("search", settings)

    def finished_runs(self, steps: int) -> dict[str, dict[int, Run]]:
        """Read all runs of the folder that have ended: those of each method, by seed.

        Raises:
            SystemExit: one of them has other settings.
        """
        runs = {}
        for method in METHODS:
            folders = self.output_dir.glob(folder_name(method, "*"))
            seeds = [folder.name.rpartition("_")[2] for folder in folders]
            for seed in sorted(int(seed) for seed in seeds if seed.isdecimal()):
                if run := self.read_run(folder_name(method, seed), self.settings(method, steps, seed)):
                    runs.setdefault(method, {})[seed] = run
        return runs

    def run(self, methods: list[str], seeds: list[int]) -> None:
        """Make what is missing, and write table and picture after each run."""
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"--output_dir {self.output_dir} cannot be made ({error}): name another.") from error
        search = self.find_steps()
        self.finished_runs(search.steps)  # refuses runs with other settings before hours have gone by
        for seed in seeds:
            for method in methods:
                self.train(folder_name(method, seed), self.settings(method, search.steps, seed))
                runs = self.finished_runs(search.steps)
                write_whole(self.output_dir / "adapters.md", self.make_table(runs, search))
                draw_curves(self.output_dir / "adapters.png", runs, search)
        print((self.output_dir / "adapters.md").read_text(encoding="utf-8"))

    def make_table(self, runs: dict[str, dict[int, Run]], search: Run) -> str:
        """Make a Markdown table with a row for each method, and a caption.

        Args:
            runs: those of each method, by seed.
            search: the run of the head alone that found the number of steps.
        """
        _, data_args, args = parse_with_shipped_backbones(self.config, SEARCH_SEED)
        splits, warmup = data_args.test_splits, args.get_warmup_steps(search.steps)
        best_step, best = max(search.curve, key=lambda point: point[1])
        ended = f"the next {self.patience} evaluations, one every {args.eval_steps} steps, were not better"
        if search.steps >= self.most_steps:
            ended = "the run ended at the limit that was given"
        machines = [search.machine, *(run.machine for of_method in runs.values() for run in of_method.values())]
        lines = [
            f"Each method was trained for {search.steps:,} steps of {args.train_batch_size} objects, with a learning "
            f"rate that rises to {args.learning_rate:g} in {warmup} steps and falls to zero. The number of "
            f"steps comes from a run of the head alone with a constant rate: it was best after {best_step:,} steps, "
            f"with {best:.3f} on val, and {ended}. Machine: {' and '.join(dict.fromkeys(machines))}.",
            "",
            f"| method | seeds | {' | '.join(f'mIoU {split}' for split in splits)} | trained parameters |",
            f"|---|---|{'---:|' * (len(splits) + 1)}",
        ]
        for method, of_method in runs.items():
            metrics = [run.metrics for run in of_method.values()]
            cells = [" / ".join(map(str, of_method))]
            cells += [" / ".join(f"{of_run[f'{split}_mean_iou']:.3f}" for of_run in metrics) for split in splits]
            cells.append(f"{metrics[0]['trained_parameters']:,d}")
            lines.append(f"| {method} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def draw_curves(path: Path, runs: dict[str, dict[int, Run]], search: Run) -> None:
    """Draw val's mean IoU against steps: a colour for each method, a kind of line for each seed."""
    figure, axes = new_figure()
    figure.set_size_inches(8, 5)
    axes.plot(*zip(*search.curve), ":", color="black", linewidth=1, label=f"{HEAD}, constant learning rate")
    colors = dict(zip(METHODS, COLORS))
    lines = dict(zip(sorted({seed for of_method in runs.values() for seed in of_method}), cycle(LINES)))
    for method, of_method in runs.items():
        for seed, run in of_method.items():
            axes.plot(*zip(*run.curve), linestyle=lines[seed], color=colors[method], label=f"{method}, seed {seed}")
    axes.set_xlabel("steps")
    axes.set_ylabel("mean IoU on val")
    axes.legend(fontsize=8)
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    write_whole(path, file.getvalue())  # another command may write the same picture


def parse_with_shipped_backbones(config: Path, seed: int) -> tuple:
    """The arguments in a file that names no backbones.

    Raises:
        ValueError, OSError: the file cannot be read, or one of its arguments is wrong.
    """
    shipped = ROOT / "backbones"
    backbones = [f"--vision_backbone={shipped / 'vision'}", f"--text_backbone={shipped / 'text'}"]
    return parse_arguments([str(config), *backbones, f"--seed={seed}"])


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line, and check all that can be checked before hours have gone by."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adapters", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="of all runs; what is done there stays")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each method is trained once with each")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), help="what to train")
    parser.add_argument("--config", type=Path, default=CONFIG, help="file with all other arguments of train_hf.py")
    parser.add_argument("--pretraining_steps", type=int, default=3000, help="in which the backbones are made")
    parser.add_argument("--patience", type=int, default=4, help="evaluations without a better one that end the search")
    parser.add_argument("--most_steps", type=int, default=20_000, help="that end the search in any case")
    args = parser.parse_args(argv)
    for name in ("pretraining_steps", "patience", "most_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: give at least 1")
    for name in ("seeds", "methods"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            parser.error(f"--{name} is {getattr(args, name)}: give each one once")
    try:
        load_yaml(args.config)
        for seed in args.seeds:
            model_args, _, _ = parse_with_shipped_backbones(args.config, seed)
        for method in args.methods:
            train_hf.build_model(replace(model_args, model_config=model_args.model_config | METHODS[method]))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    options = vars(parse(sys.argv[1:] if argv is None else argv))
    methods, seeds = options.pop("methods"), options.pop("seeds")
    Benchmark(**options).run(methods, seeds)


if __name__ == "__main__":
    main()
