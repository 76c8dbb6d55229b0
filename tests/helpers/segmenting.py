"""What tests of segment.py share: a model, pictures, and what a run has left."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from processing_detris import DetrisProcessor

from .models import small_config, small_model
from .pictures import picture
from .tokenizers import build_clip_tokenizer

PHRASES = ["the bed", "left cat"]


def save_segment_model(folder: Path) -> None:
    """Save a model whose masks differ from picture to picture. It finds no left cat anywhere."""
    tokenizer = build_clip_tokenizer([("a", "t</w>"), ("c", "at</w>"), ("d", "o")])
    text = small_config().text_config.to_dict()
    text |= {"vocab_size": len(tokenizer), "bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1}
    config = small_config(text_config=text, max_text_length=16)
    small_model(config).save_pretrained(folder)
    DetrisProcessor.from_config(config, tokenizer).save_pretrained(folder)


def save_picture(path: Path, seed: int = 0, size: tuple[int, int] = (60, 80)) -> np.ndarray:
    """Save a picture of this (height, width), and return its pixels."""
    pixels = picture(*size, seed)
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(pixels).save(path)
    return pixels


def make_folder(folder: Path, count: int = 5) -> None:
    """Save so many pictures: 00.png, 01.png …"""
    for seed in range(count):
        save_picture(folder / f"{seed:02}.png", seed)


def results_in(output: str | Path) -> dict:
    return json.loads(Path(output, "results.json").read_text(encoding="utf-8"))


def tree(folder: Path) -> dict[str, object]:
    """The content of all files below a folder, except for times."""
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {
        name: _without_times(json.loads(content)) if name.endswith(".json") else content
        for name, content in contents.items()
    }


def _without_times(value):
    if isinstance(value, dict):
        return {name: _without_times(content) for name, content in value.items() if name != "seconds"}
    return [_without_times(entry) for entry in value] if isinstance(value, list) else value
