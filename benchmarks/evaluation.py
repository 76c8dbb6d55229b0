"""An evaluation as `train_hf.py` runs it, on a synthetic set of RefCOCO's shape: prepared, timed, counted."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import train_hf
from data.check import Counts
from modeling_detris import DetrisForReferringSegmentation
from processing_detris import DetrisProcessor
from training.trainer import DetrisTrainer

from .counting import Operations, PeakMemory
from .data import NAME, make_tokenizer, write_refer

SPLIT = "val"
PHRASES_OF_AN_OBJECT = 3
OBJECTS_PER_IMAGE = 3811 / 1500  # of RefCOCO's val


def prepare_set(root: Path, objects: int) -> Path:
    """Write a set with so many objects if it is not there."""
    if not root.exists():
        images = max(round(objects / OBJECTS_PER_IMAGE), 1)
        write_refer(root, splits={SPLIT: Counts(objects, PHRASES_OF_AN_OBJECT * objects, images)}, annotated=0)
    return root


def prepare_model(folder: Path, make: Callable[[], DetrisForReferringSegmentation]) -> Path:
    """Save a model and a processor that fits it if they are not there."""
    if not folder.exists():
        model, scratch = make(), folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        model.save_pretrained(scratch)
        DetrisProcessor.from_config(model.config, make_tokenizer()).save_pretrained(scratch)
        scratch.rename(folder)
    return folder


def arguments_of(model: Path, root: Path, output: Path, **others: Any) -> list[str]:
    """The arguments of `train_hf.py`; the output folder of an earlier run is deleted."""
    shutil.rmtree(output, ignore_errors=True)
    values = {
        "model_name_or_path": model,
        "data_root": root,
        "dataset": NAME,
        "output_dir": output,
        "do_predict": True,
    }
    values |= {"test_splits": SPLIT, "report_to": "none"} | others
    return [f"--{name}={value}" for name, value in values.items()]


def count_batch(trainer: DetrisTrainer, batch: datasets.Dataset) -> dict[str, float]:
    """Count GFLOP, launches and host reads while one batch of objects is predicted."""
    operations = Operations([*trainer.model.parameters(), *trainer.model.buffers()])
    step = trainer.prediction_step

    def step_on_device(model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        operations.put_on_device(inputs)  # where the loader has put all tensors
        return step(model, inputs, *args, **kwargs)

    trainer.prediction_step = step_on_device
    try:
        with FlopCounterMode(display=False) as flops, operations:
            trainer.predict(batch)
    finally:
        del trainer.prediction_step
    return {"gflop": flops.get_total_flops() / 1e9, "launches": operations.launches, "reads": len(operations.reads)}


def time_run(prepared: train_hf.PreparedRun, device: str) -> dict[str, float]:
    """Time what `train_hf.py` does once model and rows are there: segment, count, write, report.

    Returns:
        `seconds`; the share of them inside the model; the `bytes` that the run took besides what lay in memory.
    """
    model_time = ModelTime(prepared.trainer.model, device)
    with PeakMemory(device) as memory:
        start = time.perf_counter()
        train_hf.run(prepared)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "share_in_model": model_time.seconds() / seconds, "bytes": memory.bytes}


class ModelTime:
    """Adds up the time inside the forward passes of a model.

    On a GPU that is the time between the first and the last of what a pass has launched.
    """

    def __init__(self, model: nn.Module, device: str):
        self.device, self._passes = device, []
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def _now(self) -> float | torch.cuda.Event:
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, *_: Any) -> None:
        self._start = self._now()

    def _end(self, *_: Any) -> None:
        self._passes.append((self._start, self._now()))

    def seconds(self) -> float:
        if self.device == "cpu":
            return sum(end - start for start, end in self._passes)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self._passes) / 1000
