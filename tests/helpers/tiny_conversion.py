"""What the converter needs beside the tiny official checkpoint: a recipe and a tokenizer."""

from pathlib import Path

import yaml
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

TINY_RECIPE = {  # what a checkpoint does not tell and is not as in released ones
    "image_size": 112,
    "max_text_length": 9,
    "model_config": {
        "vision_config": {"num_attention_heads": 4},
        "feature_layers": [1, 2],
        "aligner_dropout": 0.0,
        "decoder_dropout": 0.0,
    },
}


def write_tiny_conversion(folder: Path) -> list[str]:
    """Write `recipe.yaml` and `tokenizer` into `folder`, and return the converter's arguments that name them."""
    letters = list(bytes_to_unicode().values())
    symbols = letters + [f"{letter}</w>" for letter in letters[:254]] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[])
    assert len(tokenizer) == 512  # as many as the tiny model reads
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(TINY_RECIPE))
    return ["--recipe", str(folder / "recipe.yaml"), "--tokenizer", str(folder / "tokenizer")]
