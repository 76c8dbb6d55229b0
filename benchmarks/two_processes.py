"""Check that runs of two processes end as they should: many in a row, each of two steps and an evaluation on CPUs.

    python -m benchmarks.two_processes --runs 40

Each run trains on a few synthetic images around the shipped backbones. The program prints each run's exit status, and
the end of a failed run's output. It ends with status 1 if a run failed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIZES = {"train": 4, "val": 4, "testA": 0, "testB": 0, "unseen": 0}
ARGUMENTS = {
    "shapes_config": json.dumps({"image_size": 48, "sizes": SIZES}),
    "image_size": "48",
    "max_steps": "2",
    "eval_strategy": "steps",
    "eval_steps": "2",
    "save_strategy": "steps",
    "save_steps": "2",
    "load_best_model_at_end": "true",
    "max_eval_samples": "5",
    "per_device_train_batch_size": "2",
    "disable_tqdm": "true",
    "report_to": "none",
    "test_splits": "val",
}
SHOWN = 3000  # last characters of a failed run's output


def run(folder: Path) -> subprocess.CompletedProcess:
    """Train, evaluate and predict with two processes."""
    # Without --multi_gpu accelerate starts a single process where it finds no GPUs.
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--multi_gpu",
        "train_hf.py",
    ]
    command += ["configs/quickstart.yaml", "--use_cpu", "--output_dir", str(folder / "run")]
    command += [f"--{name}={value}" for name, value in ARGUMENTS.items()]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args(argv)
    failed = 0
    for number in range(1, args.runs + 1):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            ended = run(Path(folder))
        failed += ended.returncode != 0
        seconds = time.perf_counter() - start
        print(f"run {number} of {args.runs}: status {ended.returncode}, {seconds:.0f} s", flush=True)
        if ended.returncode:
            print(ended.stdout[-SHOWN:], flush=True)
    print(f"{failed} of {args.runs} runs failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
