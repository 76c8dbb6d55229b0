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
    for name, seed in SEEDS.items():
        save_tiny_model(backbones, folder / name, seed, whole=name == "whole", image_size=32, mask_threshold=0.5)
    return folder


def save_tiny_model(backbones: Path, folder: Path, seed: int, whole: bool, **fields) -> None:
    """Save a model whose weights are random, or its adapters, and a processor of 24 tokens.

    Args:
        backbones: as for `save_tiny_folders`.
        fields: of its configuration, besides those of `MODEL_CONFIG`.
    """
    vision, text = str(backbones / "vision"), str(backbones / "text")
    torch.manual_seed(seed)
    fields = MODEL_CONFIG | {"max_text_length": 24} | fields
    model = DetrisForReferringSegmentation.from_backbones(vision, text, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.normal_(std=1 / parameter[0].numel() ** 0.5)
    save = model.save_pretrained if whole else model.save_adapter
    save(folder)
    DetrisProcessor.from_config(model.config, CLIPTokenizer.from_pretrained(text)).save_pretrained(folder)
