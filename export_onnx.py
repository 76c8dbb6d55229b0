"""Exports a saved DETRIS to ONNX, for runtimes without PyTorch.

    python export_onnx.py runs/quickstart detris.onnx
    python export_onnx.py someone/detris-refcoco detris.onnx --revision main

The first argument is the folder or Hub id of a model; nothing that lies beside it is run. The exported model takes
what DetrisProcessor returns, for any number of images and phrases, and gives `logits`. Weights beyond 1.5 GiB lie in a
second file, detris.onnx.data. What onnxruntime computes is compared with PyTorch before a file gets its name.
docs/export.md shows how to use it.
"""

import argparse
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.export import Dim

from configuration_detris import one_line
from load_detris import load_pipeline
from modeling_detris import DetrisForReferringSegmentation
from processing_detris import DetrisProcessor

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUTS = ("pixel_values", "input_ids", "attention_mask", "image_index")
EXPORTED = (2, 3)  # images and phrases that the model is exported with
COMPARED = ((1, 1), (1, 4), (4, 4))  # and those that it is compared with
TOLERANCE = 1e-4  # of the largest logit


class LogitsOnly(nn.Module):
    """A model whose inputs and output are tensors only, as those of ONNX are."""

    def __init__(self, model: DetrisForReferringSegmentation):
        super().__init__()
        self.model = model

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_index: torch.Tensor,
    ) -> torch.Tensor:
        return self.model(pixel_values, input_ids, attention_mask, image_index).logits


def export_onnx(model: DetrisForReferringSegmentation, processor: DetrisProcessor, output: str | os.PathLike) -> float:
    """
    Write a model as an ONNX file, if onnxruntime computes from it what PyTorch computes.

    Args:
        model: in float32 and on the CPU; it is put into evaluation mode.
        processor: makes inputs to compare with.
        output: the file to write. Large weights are written beside it, into a file with `.data` at its end.

    Returns:
        `float`: the largest difference between a logit of onnxruntime and of PyTorch.

    Raises:
        ImportError: if a package that is needed is not installed.
        OSError: if one of the files exists or cannot be written.
        ValueError: if weights are not in float32 or not on the CPU, or the logits differ by more than rounding.
    """
    require_packages()
    output = Path(output)
    if not output.parent.is_dir():
        raise OSError(f"{output.parent} is no folder: name a file in a folder that exists.")
    for path in files_of(output):
        if path.exists():
            raise OSError(f"{path} exists: name a new file, or remove it.")
    if model.device.type != "cpu":
        raise ValueError(f"The model is on {model.device}, but only the CPU exports it: move it by model.cpu().")
    types = {parameter.dtype for parameter in model.parameters()}
    if types != {torch.float32}:
        raise ValueError(
            f"The weights are of type {', '.join(sorted(map(str, types)))}, but only float32 is exported: load the "
            "model in float32, with backbones that are not quantised."
        )
    with tempfile.TemporaryDirectory(prefix=".export_onnx_", dir=output.parent) as scratch:
        written = Path(scratch, output.name)
        with _quiet():
            images, phrases = Dim("images"), Dim("phrases")
            program = torch.onnx.export(
                LogitsOnly(model).eval(),
                kwargs=_example(processor, *EXPORTED),
                dynamic_shapes={name: {0: images if name == "pixel_values" else phrases} for name in INPUTS},
                input_names=list(INPUTS),
                output_names=["logits"],
                dynamo=True,
                verbose=False,
            )
            program.save(written)
        del program
        difference = compare(model, processor, written)
        # The file itself comes last: where it is, its weights are.
        for path in sorted(Path(scratch).iterdir(), key=lambda path: path == written):
            os.replace(path, output.parent / path.name)
    return difference


def files_of(output: str | os.PathLike) -> tuple[Path, Path]:
    """The file that is written, and the one that PyTorch puts beside it for large weights."""
    return Path(output), Path(f"{os.fspath(output)}.data")


def require_packages() -> None:
    """Raise ImportError if packages are missing that an export needs."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"An export to ONNX needs {', '.join(missing)}: install what is missing by `pip install -r "
            "requirements-onnx.txt`."
        )


def compare(model: DetrisForReferringSegmentation, processor: DetrisProcessor, path: str | os.PathLike) -> float:
    """
    Compare the logits that onnxruntime computes from a file with the model's.

    Returns:
        `float`: the largest difference.

    Raises:
        ValueError: if it is more than rounding explains.
    """
    import onnxruntime  # here, because it is not installed where nothing is exported

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    for counts in COMPARED:
        inputs = _example(processor, *counts)
        with torch.inference_mode():
            expected = model(**inputs).logits.numpy()
        (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
        difference, limit = np.abs(logits - expected).max(), TOLERANCE * np.abs(expected).max()
        if not difference <= limit:
            raise ValueError(
                f"onnxruntime's logits differ from PyTorch's by {difference:.1e}, more than {limit:.1e}, so nothing "
                "is written: try other versions of PyTorch and onnxruntime."
            )
        largest = max(largest, float(difference))
    return largest


def _example(processor: DetrisProcessor, images: int, phrases: int) -> dict[str, torch.Tensor]:
    """Inputs of so many noisy images and phrases."""
    stream = np.random.default_rng(images)
    pictures = list(stream.integers(0, 256, (images, 64, 96, 3), dtype=np.uint8))
    texts = [[f"the cat {n}" for n in range(image, phrases, images)] for image in range(images)]
    inputs = processor(images=pictures, text=texts, return_tensors="pt")
    return {name: inputs[name] for name in INPUTS}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the terminal what the exporter says of its own steps."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a whole DETRIS, or of adapters")
    parser.add_argument("output", help="the file to write, such as detris.onnx")
    parser.add_argument("--revision", help="branch, tag or commit of the model's repository on the Hub")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Export what the command line asks for."""
    options = parse_arguments(arguments)
    require_packages()
    pipe = load_pipeline(options.model, device="cpu", dtype="float32", revision=options.revision)
    difference = export_onnx(pipe.model, pipe.processor, options.output)
    written = [path for path in files_of(options.output) if path.exists()]
    sizes = " and ".join(f"{path} ({path.stat().st_size / 2**20:,.1f} MiB)" for path in written)
    print(f"Wrote {sizes}; the largest difference of a logit from PyTorch's is {difference:.1e}.")


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(one_line(f"export_onnx.py: {error}"))
