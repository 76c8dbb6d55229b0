"""A model of a few thousand parameters with two adapters in one pair of backbones, as a pipeline."""

from pathlib import Path

from helpers.tiny_folders import save_tiny_model
from load_detris import load_pipeline
from pipeline_detris import ReferringImageSegmentationPipeline

THRESHOLD = 0.35


def pipeline_with_two_adapters(backbones: Path, folder: Path) -> ReferringImageSegmentationPipeline:
    """A pipeline whose adapters `default` and `other` give each picture and phrase another mask.

    Args:
        backbones: folder with `vision` and `text`, such as the fixture `tiny_backbones`.
        folder: where the adapters are saved, as `default` and `other`.
    """
    for seed, name in enumerate(("default", "other")):
        save_tiny_model(backbones, folder / name, seed, whole=False, image_size=64, mask_threshold=THRESHOLD)
    return load_pipeline(folder / "default", {"other": folder / "other"}, device="cpu")
