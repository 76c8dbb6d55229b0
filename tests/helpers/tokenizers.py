"""CLIP tokenizers without a network."""


def build_clip_tokenizer(merges: list[tuple[str, str]]):
    """CLIP's vocabulary follows from its merges: 256 bytes, the same ending a word, the merges, start and end."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    symbols = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=merges)
