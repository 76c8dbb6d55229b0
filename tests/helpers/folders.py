"""Folders of a saved model and of its adapters, and changes of files."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.models import BACKBONE_FIELDS, save_backbones
from modeling_detris import DetrisForReferringSegmentation


def build(folder: Path, **fields) -> DetrisForReferringSegmentation:
    """A new model around the backbones `folder/vision` and `folder/text`; `fields` change its configuration."""
    vision, text = str(folder / "vision"), str(folder / "text")
    return DetrisForReferringSegmentation.from_backbones(vision, text, **BACKBONE_FIELDS | fields)


def save_whole_and_adapter(folder: Path) -> None:
    """Save backbones as `vision` and `text`, adapters in them as `adapter`, and all together as `whole`."""
    save_backbones(folder)
    model = build(folder)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_adapter(folder / "adapter")
    model.save_pretrained(folder / "whole")


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Apply `change` to the dictionary of tensors in a file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def saved_fields(folder: Path) -> dict:
    """The fields in the config.json of a saved model or adapter."""
    return json.loads((folder / "config.json").read_text())


def put_odd_file(path, kind):
    """Put a `pipe`, a `device`, or a link to nothing in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/nowhere")
