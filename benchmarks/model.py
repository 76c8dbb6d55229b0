"""Measure how fast the model segments, trains and is evaluated, and what it asks of the device, beside its backbone.

    python -m benchmarks.model --output scratch --size base
    python -m benchmarks.model --output scratch --size base --stage pair      # one of the measurements, anew
    python -m benchmarks.model --output scratch --size base --against module:function

The bare backbone is Hugging Face's `Dinov2WithRegistersModel` of the same size. All that a stage compares runs in
turn, round after round, and each ratio is the median over the rounds. Weights are random. Each stage runs in a process
of its own, which enters its figures into `<output>/model_<device>_<size>.json` and the table beside it; stages that
are there already are not run again. The function of another implementation takes a `DetrisConfig` and returns a
callable from `pixel_values` (N, 3, H, W) and `input_ids` (N, L) to logits (N, …); its modules are made on the device.
"""

import argparse
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets.utils import tqdm
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2WithRegistersModel

import train_hf
from configuration_detris import DetrisConfig, one_line
from data.untrusted import load_yaml
from modeling_detris import DetrisForReferringSegmentation
from pages import write_whole
from training.arguments import DetrisTrainingArguments
from training.trainer import adam_arguments

from .counting import Operations, PeakMemory
from .data import MEBIBYTE
from .evaluation import PHRASES_OF_AN_OBJECT, arguments_of, count_batch, prepare_model, prepare_set, time_run

CONFIGS = Path(__file__).parents[1] / "configs"
VISION = {"model_type": "dinov2_with_registers", "image_size": 518, "patch_size": 14}
TEXT = {"model_type": "clip_text_model", "bos_token_id": 49406, "eos_token_id": 49407}
# Base is DetrisConfig's own default; "small" is base around DINOv2's small model.
SIZES = {
    "tiny": {
        "vision_config": VISION | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        "text_config": TEXT | {"vocab_size": 514, "num_hidden_layers": 1, "bos_token_id": 512, "eos_token_id": 513},
        "vision_adapter_layers": [1],
        "text_adapter_layers": [0],
        "feature_layers": [0],
        "decoder_dim": 64,
        "decoder_layers": 1,
        "image_size": 112,
    },
    "small": {"vision_config": VISION | {"hidden_size": 384, "num_attention_heads": 6}},
    "base": {},
    "large": {
        "vision_config": VISION | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
        **load_yaml(CONFIGS / "large_refcoco.yaml")["model_config"],
    },
}
PHRASES = 8
WORDS = 5  # of a random phrase
BATCHES = {"cpu": [1, 4], "cuda": [8, 32]}  # of a training step
REPEATS = {"cpu": 1, "cuda": 10}  # calls that are timed together, so that a GPU need not run dry between them
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows and columns of the product whose speed stands for the device's peak
WORKERS = {"cpu": 0, "cuda": 4}  # that load the images to evaluate on
BACKBONE, MATRICES, OURS = "bare backbone", "product of matrices", "DETRIS"
# What a compiler or a device that is too small raises; the row says so, and the run goes on.
FAILURES = (
    torch._dynamo.exc.TorchDynamoException,
    torch._dynamo.exc.FailOnRecompileLimitHit,
    torch.OutOfMemoryError,
)


# --- what is compared ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    output: Path
    device: str
    size: str
    rounds: int
    batches: list[int]
    bf16: bool
    objects: int
    workers: int
    backend: str
    against: str | None

    @property
    def config(self) -> DetrisConfig:
        return DetrisConfig(**SIZES[self.size])

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)


@dataclass
class Contestant:
    """A computation that is timed in turn with others.

    Attributes:
        name: stands in its row.
        run: does it once.
        forward: its forward pass, whose graphs are counted; None if they are not.
        tensors: its weights and inputs, which lie on the device.
        counted: does the same without being compiled, so that GFLOP can be counted; None if `run` is not compiled.
        weights: bytes of its parameters and buffers.
    """

    name: str
    run: Callable[[], Any]
    forward: Callable[[], Any] | None = None
    tensors: list[torch.Tensor] = field(default_factory=list)
    counted: Callable[[], Any] | None = None
    weights: int = 0


def make_model(settings: Settings) -> DetrisForReferringSegmentation:
    torch.manual_seed(0)
    with torch.device(settings.device):
        return DetrisForReferringSegmentation(settings.config)


def make_inputs(config: DetrisConfig, device: str, images: int, phrases: int) -> dict[str, torch.Tensor]:
    """Draw images and phrases for the model; of several phrases for fewer images, all are for the first one."""
    text = config.text_config
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(images, 3, config.image_size, config.image_size, generator=generator)
    input_ids = torch.zeros(phrases, config.max_text_length, dtype=torch.long)
    input_ids[:, 0], input_ids[:, WORDS + 1] = text.bos_token_id, text.eos_token_id
    input_ids[:, 1 : WORDS + 1] = torch.randint(1, text.bos_token_id, (phrases, WORDS), generator=generator)
    inputs = {"pixel_values": pixel_values, "input_ids": input_ids}
    if phrases != images:
        inputs["image_index"] = torch.zeros(phrases, dtype=torch.long)
    return {name: value.to(device) for name, value in inputs.items()}


def backbone_and_matrices(settings: Settings, images: int) -> list[Contestant]:
    """What all figures of a stage are shares of: the bare backbone's forward pass, and the device's speed."""
    config = settings.config
    with torch.device(settings.device):
        backbone = Dinov2WithRegistersModel(config.vision_config).eval()
        dtype, side = torch.bfloat16 if settings.bf16 else torch.float32, MATRIX[settings.device]
        matrices = torch.randn(2, side, side).to(dtype)
    pixel_values = make_inputs(config, settings.device, images, images)["pixel_values"]
    encode = evaluating(settings, lambda: backbone(pixel_values))
    multiply = evaluating(settings, lambda: matrices[0] @ matrices[1])
    name = BACKBONE if images == 1 else f"{BACKBONE}, {images} images"
    return [
        Contestant(name, encode, encode, [*tensors_of(backbone), pixel_values], weights=size_of(backbone)),
        Contestant(MATRICES, multiply, tensors=[matrices]),
    ]


def evaluating(settings: Settings, compute: Callable[[], Any]) -> Callable[[], Any]:
    """Let it compute without gradients, and in bfloat16 where that is asked for."""

    def run() -> Any:
        with torch.no_grad(), settings.autocast():
            return compute()

    return run


def tensors_of(module: Any) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []


def size_of(module: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(module))


def make_segmenting(settings: Settings, images: int, phrases: int) -> Iterator[Contestant]:
    """Our model, and the other implementation if there is one, each with phrases for images."""
    config, model = settings.config, make_model(settings).eval()
    inputs = make_inputs(config, settings.device, images, phrases)
    segment = evaluating(settings, lambda: model(**inputs))
    yield Contestant(OURS, segment, segment, [*tensors_of(model), *inputs.values()], weights=size_of(model))
    if settings.against is None:
        return
    with torch.device(settings.device):
        other = load_function(settings.against)(config)
    pixel_values = inputs["pixel_values"]
    if phrases != images:
        pixel_values = pixel_values[inputs["image_index"]]
    segment = evaluating(settings, lambda: other(pixel_values, inputs["input_ids"]))
    found = segment()
    if not isinstance(found, torch.Tensor) or len(found) != phrases:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"{settings.against} computed {shape}: it must give logits, a map for each phrase.")
    tensors = [*tensors_of(other), pixel_values, inputs["input_ids"]]
    yield Contestant(settings.against, segment, segment, tensors, weights=size_of(other))


def load_function(name: str) -> Callable[[DetrisConfig], Callable]:
    """Import `module:function`. Raises ValueError if there is none."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--against {name} cannot be imported ({error}): give module:function.") from error


def make_training(settings: Settings, batch: int, compiled: bool, checkpointed: bool) -> Contestant:
    """A step of training: forward, backward, and the fused Adam that `train_hf.py` uses."""
    model = make_model(settings).train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    inputs = make_inputs(settings.config, settings.device, batch, batch)
    side = settings.config.image_size
    inputs["labels"] = (torch.rand(batch, side, side, device=settings.device) > 0.5).float()
    arguments = DetrisTrainingArguments(output_dir=str(settings.output), use_cpu=settings.device == "cpu")
    optimizer = torch.optim.Adam(**adam_arguments(model, arguments))

    def step(called: Callable) -> None:
        with settings.autocast():
            loss = called(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def forward() -> torch.Tensor:
        with settings.autocast():
            return model(**inputs).loss

    contestant = Contestant(
        f"{OURS}, {batch} image{'s' if batch > 1 else ''}",
        partial(step, model),
        forward,
        [*tensors_of(model), *inputs.values()],
        weights=size_of(model),
    )
    if compiled:
        torch._dynamo.reset()
        called = torch.compile(model, fullgraph=True, backend=settings.backend)
        contestant = replace(contestant, run=partial(step, called), forward=None, counted=contestant.run)
    return contestant


# --- how it is measured -------------------------------------------------------------------------------------------


def measure(settings: Settings, contestants: list[Contestant]) -> list[dict[str, Any]]:
    """Count what each contestant asks for, time all in turn, and return a row of figures for each.

    The first contestant is the bare backbone, to which times are compared, the second tells the device's peak.
    """
    rows, running = {contestant.name: {"name": contestant.name} for contestant in contestants}, []
    for contestant in tqdm(contestants, desc="counting"):
        row = rows[contestant.name]
        for look in (weigh, count_operations, count_graphs):
            try:
                row |= look(contestant, settings.device)
            except FAILURES as error:
                message = one_line(str(error).strip().partition("\n")[0])
                row.setdefault("error", f"{type(error).__name__}: {message}")
        if "error" not in row:
            running.append(contestant)
    seconds = take_turns(settings, running)
    backbone, matrices = (seconds[contestant.name] for contestant in contestants[:2])
    peak = [rows[MATRICES]["gflop"] / taken for taken in matrices]  # GFLOP/s in each round
    for name, taken in seconds.items():
        rows[name] |= figures_of(taken, rows[name]["gflop"], backbone, peak)
    return list(rows.values())


def take_turns(settings: Settings, contestants: list[Contestant]) -> dict[str, list[float]]:
    """Time all contestants, round after round, and return the seconds of each by its name."""
    seconds = {contestant.name: [] for contestant in contestants}
    for _ in tqdm(range(settings.rounds), desc="rounds"):
        for contestant in contestants:
            seconds[contestant.name].append(clock(contestant.run, settings.device))
    return seconds


def figures_of(seconds: list[float], gflop: float, backbone: list[float], peak: list[float]) -> dict[str, float]:
    """Compare the seconds of each round with the backbone's and with the device's peak of the same round."""
    return {
        "seconds": statistics.median(seconds),
        "ratio": statistics.median(own / bare for own, bare in zip(seconds, backbone)),
        "gflop_per_second": statistics.median(gflop / own for own in seconds),
        "share_of_peak": statistics.median(gflop / own / fastest for own, fastest in zip(seconds, peak)),
    }


def weigh(contestant: Contestant, device: str) -> dict[str, float]:
    """Measure the memory of its first run, which is the only one that finds no memory left over from another."""
    with PeakMemory(device) as memory:
        contestant.run()
    return {"memory_mib": (contestant.weights + memory.bytes) / MEBIBYTE}


def count_operations(contestant: Contestant, device: str) -> dict[str, float]:
    """Count GFLOP, and launches and host reads unless it is compiled: what is compiled dispatches no operations."""
    with FlopCounterMode(display=False) as flops, Operations(contestant.tensors) as operations:
        (contestant.counted or contestant.run)()
    figures = {"gflop": flops.get_total_flops() / 1e9}
    if contestant.counted is None:
        figures |= {"launches": operations.launches, "reads": len(operations.reads)}
    return figures


def count_graphs(contestant: Contestant, device: str) -> dict[str, float]:
    """Count the graphs that `torch.compile` makes of its forward pass."""
    if contestant.forward is None:
        return {}
    torch._dynamo.reset()
    backend = CompileCounter()
    torch.compile(contestant.forward, backend=backend)()
    return {"graphs": backend.frame_count}


def clock(run: Callable[[], Any], device: str) -> float:
    """Return the seconds of a call."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(REPEATS[device]):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / REPEATS[device]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- stages -------------------------------------------------------------------------------------------------------


def measure_segmenting(settings: Settings, images: int, phrases: int) -> list[dict[str, Any]]:
    """Measure a forward pass without gradients. The bare backbone encodes as many images as there are phrases."""
    return measure(settings, [*backbone_and_matrices(settings, phrases), *make_segmenting(settings, images, phrases)])


def measure_training(settings: Settings, compiled: bool = False, checkpointed: bool = False) -> list[dict[str, Any]]:
    """Measure a step of training for each size of batch."""
    rows = []
    for batch in settings.batches:
        contestants = [*backbone_and_matrices(settings, batch), make_training(settings, batch, compiled, checkpointed)]
        rows += measure(settings, contestants)
    return rows


def measure_evaluation(settings: Settings, pictures: bool) -> list[dict[str, Any]]:
    """Measure an evaluation end to end. The bare backbone runs before and after it, on batches of images as large."""
    name = f"{settings.device}_{settings.size}"
    arguments = arguments_of(
        prepare_model(
            settings.output / f"weights_{settings.size}", lambda: make_model(replace(settings, device="cpu"))
        ),
        prepare_set(settings.output / f"refer_{settings.objects}", settings.objects),
        settings.output / f"evaluation_{name}",
        save_masks=pictures,
        dataloader_num_workers=settings.workers,
        bf16=settings.bf16,
        use_cpu=settings.device == "cpu",
    )
    with ExitStack() as stack:
        prepared = train_hf.prepare(arguments, stack)
        trainer, (rows,) = prepared.trainer, prepared.test_rows.values()
        batch = rows.take(min(trainer.args.eval_batch_size, len(rows)))
        phrases, phrases_of_batch = (sum(map(len, part["sentences"])) for part in (rows, batch))
        counts = count_batch(trainer, batch)
        compared = backbone_and_matrices(settings, trainer.args.eval_batch_size)
        others = measure(settings, compared)
        timed = time_run(prepared, settings.device)
    after = take_turns(settings, compared)
    backbone, matrices = (
        statistics.mean((before["seconds"], statistics.median(after[before["name"]]))) for before in others
    )
    bare = backbone / trainer.args.eval_batch_size * phrases  # for as many images as there are phrases
    row = {"name": f"{OURS}, {phrases} phrases", "share_in_model": timed["share_in_model"]} | counts
    row["gflop"] *= phrases / phrases_of_batch
    row["memory_mib"] = (size_of(trainer.model) + timed["bytes"]) / MEBIBYTE
    row |= figures_of([timed["seconds"]], row["gflop"], [bare], [others[1]["gflop"] / matrices])
    return [*others, row]


STAGES = {
    "pair": ("one image, one phrase", partial(measure_segmenting, images=1, phrases=1)),
    "phrases": (f"one image, {PHRASES} phrases", partial(measure_segmenting, images=1, phrases=PHRASES)),
    "step": ("training step", measure_training),
    "step_compiled": ("training step, compiled", partial(measure_training, compiled=True)),
    "step_checkpointed": ("training step, checkpointed", partial(measure_training, checkpointed=True)),
    "evaluation": ("evaluation", partial(measure_evaluation, pictures=False)),
    "evaluation_pictures": ("evaluation, pictures written", partial(measure_evaluation, pictures=True)),
}


# --- results ------------------------------------------------------------------------------------------------------

COLUMNS = {  # what a row holds -> the column's head, and digits behind the point
    "seconds": ("seconds", 4),
    "ratio": ("to the bare backbone", 2),
    "gflop": ("GFLOP", 1),
    "gflop_per_second": ("GFLOP/s", 0),
    "share_of_peak": ("of the peak", 2),
    "share_in_model": ("in the model", 2),
    "memory_mib": ("memory, MiB", 0),
    "graphs": ("graphs", 0),
    "launches": ("launches", 0),
    "reads": ("host reads", 0),
}


def describe(settings: Settings) -> dict[str, Any]:
    """What the figures of one file have in common: machine, versions and settings."""
    return {
        "device": device_name(settings.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "size": settings.size,
        "dtype": "bfloat16 (autocast)" if settings.bf16 else "float32",
        "rounds": settings.rounds,
        "batches": settings.batches,
        "objects": settings.objects,
        "workers": settings.workers,
        "backend": settings.backend,
        "against": settings.against,
    }


def device_name(device: str) -> str:
    """Return the name of the GPU, or the processor's as Linux gives it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def read_results(path: Path, settings: Settings) -> dict[str, Any]:
    """Read what was measured so far.

    Raises:
        ValueError: it was measured with other settings, or on another machine.
    """
    described = describe(settings)
    if not path.exists():
        return described | {"stages": {}}
    results = json.loads(path.read_text(encoding="utf-8"))
    for name, value in described.items():
        if results.get(name) != value:
            raise ValueError(
                f"{path} was measured with {name} {results.get(name)}, not {value}: "
                "give another --output, or delete it."
            )
    return results


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the figures, and their table beside them."""
    write_whole(path, json.dumps(results, indent=2) + "\n")
    write_whole(path.with_suffix(".md"), make_table(results))


def make_table(results: dict[str, Any]) -> str:
    """Make a Markdown table of all stages, with a caption."""
    lines = [
        f"Size {results['size']}, {results['dtype']}, on {results['device']}; {results['threads']} threads, torch "
        f"{results['torch']}, transformers {results['transformers']}; medians of {results['rounds']} rounds. The peak "
        "is the speed of one large product of matrices of the same type in the same rounds. Memory is a model's "
        "weights and what one run takes besides, on a CPU a compiler's own included. Launches are operations other "
        "than views. The evaluation is of "
        f"{results['objects']} objects: its ratio is a phrase's to an image's, its launches and host reads are those "
        "of one batch.",
        "",
        f"| what | {' | '.join(head for head, _ in COLUMNS.values())} |",
        f"|---|{'---:|' * len(COLUMNS)}",
    ]
    for stage, rows in results["stages"].items():
        for row in (row for row in rows if row["name"] != MATRICES):
            cells = [f"{row[key]:,.{digits}f}" if key in row else "–" for key, (_, digits) in COLUMNS.items()]
            if "error" in row:
                cells[0] = row["error"].replace("|", "\\|")
            lines.append(f"| {STAGES[stage][0]}: {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# --- the program --------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> tuple[Settings, str | None]:
    """Read the settings, and the one stage that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="scratch folder; figures are written into it")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="base", help="of the model")
    parser.add_argument("--stage", choices=STAGES, help="run only this measurement, in this process and anew")
    parser.add_argument("--rounds", type=int, default=5, help="in which all that is compared runs in turn")
    parser.add_argument("--batches", type=int, nargs="+", help="images of a training step")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument(
        "--objects", type=int, default=200, help=f"to evaluate on, {PHRASES_OF_AN_OBJECT} phrases each"
    )
    parser.add_argument("--workers", type=int, help="processes that load images for the evaluation")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument(
        "--against", metavar="MODULE:FUNCTION", help="another implementation, timed in pair and phrases"
    )
    options = vars(parser.parse_args(argv))
    stage = options.pop("stage")
    options["output"] = options["output"].absolute()
    options["batches"] = options["batches"] or BATCHES[options["device"]]
    options["workers"] = WORKERS[options["device"]] if options["workers"] is None else options["workers"]
    for name in ("rounds", "objects"):
        if options[name] < 1:
            parser.error(f"--{name} is {options[name]}: give at least 1")
    if min(options["batches"]) < 1:
        parser.error(f"--batches has {min(options['batches'])}: give at least 1")
    if options["device"] == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but PyTorch finds none")
    return Settings(**options), stage


def main(argv: list[str] | None = None) -> None:
    """Run one stage here, or each that is missing in a process of its own."""
    argv = sys.argv[1:] if argv is None else argv
    settings, stage = parse(argv)
    settings.output.mkdir(parents=True, exist_ok=True)
    path = settings.output / f"model_{settings.device}_{settings.size}.json"
    try:
        results = read_results(path, settings)
        if settings.against is not None:
            load_function(settings.against)
        if stage is not None:
            results["stages"][stage] = STAGES[stage][1](settings)
            results["stages"] = {name: results["stages"][name] for name in STAGES if name in results["stages"]}
            write_results(path, results)
            return
    except ValueError as error:
        sys.exit(str(error))
    for name in STAGES:
        if name not in results["stages"]:
            print(f"--- {name}", flush=True)
            ended = subprocess.run([sys.executable, "-m", "benchmarks.model", *argv, "--stage", name])
            if ended.returncode:
                sys.exit(
                    f"The stage {name} ended with status {ended.returncode}: the same command goes on from there."
                )
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
