"""The checkpoints that the authors released: what `shared/conformance` knows of them, and how they were configured."""

from pathlib import Path

CONFORMANCE = Path(__file__).parents[3] / "shared" / "conformance"
RELEASED = CONFORMANCE / "checkpoints"  # names, shapes and types of their tensors
LARGE = {
    "vision_config": {
        "model_type": "dinov2_with_registers",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 518,
        "patch_size": 14,
    },
    "feature_layers": [8, 16],
}
RELEASED_RECIPES = {
    "base": {},
    "large": LARGE | {"vision_adapter_layers": [2, 6, 10, 14, 18, 22]},
    "large_mixed": LARGE
    | {
        "vision_adapter_layers": list(range(1, 24)),
        "vision_adapter_dim": 384,
        "text_adapter_layers": list(range(1, 12)),
        "text_adapter_dim": 384,
    },
}
