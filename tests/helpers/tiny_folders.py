"""Folders of models of a few thousand parameters, with their processors, as people share them."""

from pathlib import Path

import torch
from transformers import CLIPTokenizer

from helpers.runs import MODEL_CONFIG
from modeling_detris import DetrisForReferringSegmentation
from processing_detris import DetrisProcessor

SEEDS = {"whole": 12, "adapter": 4}  # with these, masks at 0.5 have some pixels and lack others


def save_tiny_folders(backbones: Path, folder: Path) -> Path:
    """Save a whole model as `folder/whole`, adapters that differ from its own as `folder/adapter`; return `folder`.

    Args:
        backbones: holds those of both, as `vision` and `text`, such as the fixture `tiny_backbones`.
    """
    vision, text = str(backbones / "vision"), str(backbones / "text")
    fields = MODEL_CONFIG | {"image_size": 32, "max_text_length": 24, "mask_threshold": 0.5}
    for name, seed in SEEDS.items():
        torch.manual_seed(seed)
        model = DetrisForReferringSegmentation.from_backbones(vision, text, **fields)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.ndim > 1:
                    parameter.normal_(std=1 / parameter[0].numel() ** 0.5)
        save = model.save_pretrained if name == "whole" else model.save_adapter
        save(folder / name)
        DetrisProcessor.from_config(model.config, CLIPTokenizer.from_pretrained(text)).save_pretrained(folder / name)
    return folder
