"""What several test files need: no network, and CLIP tokenizers without it."""

import gzip
import importlib.metadata
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before a test imports any Hugging Face library, so transformers comes late below


def build_clip_tokenizer(merges: list[tuple[str, str]]):
    """CLIP's vocabulary follows from its merges: 256 bytes, the same ending a word, the merges, start and end."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    symbols = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=merges)


@pytest.fixture(scope="session")
def clip_tokenizer():
    """The tokenizer of every CLIP model, from the merges that `open-clip-torch` (requirements-dev.txt) ships."""
    files = importlib.metadata.files("open-clip-torch")
    (vocabulary,) = [file for file in files if file.name == "bpe_simple_vocab_16e6.txt.gz"]
    lines = gzip.decompress(vocabulary.read_binary()).decode().split("\n")
    return build_clip_tokenizer([tuple(line.split()) for line in lines[1:48895]])


@pytest.fixture
def tiny_tokenizer():
    """A CLIP tokenizer of 517 symbols: bytes, three merges (512 … 514), start (515) and end (516)."""
    return build_clip_tokenizer([("a", "t</w>"), ("c", "at</w>"), ("d", "o")])
