"""A model of a few thousand parameters with two adapters in one pair of backbones, as a pipeline."""

from pathlib import Path

import torch
from transformers import CLIPTokenizer

from helpers.runs import MODEL_CONFIG
from load_detris import load_pipeline
from modeling_detris import DetrisForReferringSegmentation
from pipeline_detris import ReferringImageSegmentationPipeline
from processing_detris import DetrisProcessor

THRESHOLD = 0.35


def pipeline_with_two_adapters(backbones: Path, folder: Path) -> ReferringImageSegmentationPipeline:
    """A pipeline whose adapters `default` and `other` give each picture and phrase another mask.

    Args:
        backbones: folder with `vision` and `text`, such as the fixture `tiny_backbones`.
        folder: where the adapters are saved, as `default` and `other`.
    """
    vision, text = str(backbones / "vision"), str(backbones / "text")
    fields = MODEL_CONFIG | {"image_size": 64, "max_text_length": 24, "mask_threshold": THRESHOLD}
    for seed, name in enumerate(("default", "other")):
        torch.manual_seed(seed)
        model = DetrisForReferringSegmentation.from_backbones(vision, text, **fields)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.ndim > 1:
                    parameter.normal_(std=1 / parameter[0].numel() ** 0.5)
        model.save_adapter(folder / name)
        DetrisProcessor.from_config(model.config, CLIPTokenizer.from_pretrained(text)).save_pretrained(folder / name)
    return load_pipeline(folder / "default", {"other": folder / "other"}, device="cpu")
