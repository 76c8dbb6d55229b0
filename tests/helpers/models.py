"""Models and inputs small enough for a test.

`fixtures/official_tiny.json` and `.safetensors` hold what a tiny model of the official implementation
(jiaqihuang01/DETRIS, commit c94b1e1) computed from the weights and inputs that `official_weights` and
`official_inputs` draw, without dropout: names and shapes of its checkpoint; logits, and the stages before them at the
positions of `OFFICIAL_STAGES`; loss, logits and gradient norms of a training step; the losses of 8 steps of Adam at a
learning rate of 1e-5, and the logits after them.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Dinov2Model,
    Dinov2WithRegistersModel,
)

from configuration_detris import DetrisConfig
from modeling_detris import DetrisForReferringSegmentation

FIXTURES = Path(__file__).parents[1] / "fixtures"
PATCH_SIZE = 14
OFFICIAL_INPUT_SEED = 1
OFFICIAL_STEP_SEEDS = range(100, 108)
EVERY_SECOND = slice(None, None, 2)
OFFICIAL_STAGES = {
    "sentence": (),
    "words": (..., slice(None, None, 4)),
    "visual_0": (slice(None), EVERY_SECOND, EVERY_SECOND, EVERY_SECOND),
    "visual_1": (slice(None), EVERY_SECOND, EVERY_SECOND, EVERY_SECOND),
    "visual_2": (slice(None), EVERY_SECOND, EVERY_SECOND, EVERY_SECOND),
    "neck": (slice(None), slice(None, None, 8), EVERY_SECOND, EVERY_SECOND),
    "decoder": (slice(None), slice(None, None, 8), EVERY_SECOND, EVERY_SECOND),
}


def official_figures() -> tuple[dict, dict[str, torch.Tensor]]:
    """What the official implementation computed for its tiny model: numbers by name, and tensors by name."""
    return json.loads((FIXTURES / "official_tiny.json").read_text()), load_file(FIXTURES / "official_tiny.safetensors")


def official_config() -> DetrisConfig:
    return DetrisConfig(
        vision_config={
            "model_type": "dinov2_with_registers",
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 518,
            "patch_size": PATCH_SIZE,
        },
        text_config={
            "model_type": "clip_text_model",
            "vocab_size": 512,
            "num_hidden_layers": 3,
            "bos_token_id": 510,
            "eos_token_id": 511,
        },
        vision_adapter_layers=[1, 3],
        vision_adapter_dim=32,
        text_adapter_layers=[0, 2],
        text_adapter_dim=32,
        aligner_dropout=0.0,
        feature_layers=[1, 2],
        decoder_layers=2,
        decoder_ffn_dim=96,
        decoder_dropout=0.0,
        image_size=112,
        max_text_length=9,
    )


def official_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """An official checkpoint of these names and shapes: noise, seeded by name and scaled by the role of the tensor."""
    weights = {}
    for name, shape in shapes.items():
        module, leaf = ("", *name.split("."))[-2:]
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        if leaf == "num_batches_tracked":
            values = np.int64(0)
        elif leaf == "running_var":
            values = 0.3 * np.tanh(noise) + 1
        elif leaf == "running_mean" or leaf.endswith("bias"):
            values = 0.05 * noise
        elif leaf == "gamma":
            values = 0.1 * noise + 0.5
        elif leaf == "logit_scale":
            values = np.float32(2.6592)
        elif len(shape) == 1:
            values = 0.1 * noise + 1
        elif "token" in leaf or "embed" in leaf or "embed" in module:
            values = 0.2 * noise
        else:
            values = noise / np.sqrt(np.prod(shape[1:]))
            if name == "proj.txt.weight":  # the mask head's kernels, so that logits are near 1
                values = values / 48
        weights[name] = torch.as_tensor(values, dtype=torch.long if leaf == "num_batches_tracked" else torch.float32)
    return weights


def official_inputs(seed: int = OFFICIAL_INPUT_SEED) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four official inputs: `pixel_values` (4, 3, 112, 112), `input_ids` (4, 9) and `labels` (4, 112, 112)."""
    count, size, length, vocabulary, stream = 4, 112, 9, 512, np.random.RandomState(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.from_numpy(stream.standard_normal((count, *shape)).astype(np.float32))

    coarse = F.interpolate(noise(3, size // PATCH_SIZE, size // PATCH_SIZE), size=(size, size), mode="bilinear")
    pixel_values = coarse + 0.1 * noise(3, size, size)
    input_ids = torch.zeros(count, length, dtype=torch.long)
    for phrase, words in zip(input_ids, (3, 7, 6, 1)):
        phrase[0], phrase[words + 1] = vocabulary - 2, vocabulary - 1
        phrase[1 : words + 1] = torch.from_numpy(stream.randint(1, vocabulary - 3, words))
    labels = F.interpolate(noise(1, 4, 4), size=(size, size), mode="bicubic")[:, 0] > 0.3
    return pixel_values, input_ids, labels.float()


def small_config(registers: bool = True, vision: dict | None = None, **fields) -> DetrisConfig:
    """A configuration whose widths differ from each other as far as possible; `vision` and `fields` change it."""
    vision_config = {
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 70,  # the size of the pretraining
        "patch_size": PATCH_SIZE,
    }
    text_config = {
        "model_type": "clip_text_model",
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "projection_dim": 20,
        "bos_token_id": 62,
        "eos_token_id": 63,
    }
    defaults = {
        "vision_config": vision_config | (vision or {}),
        "text_config": text_config,
        "vision_adapter_layers": [1, 3],
        "vision_adapter_dim": 32,
        "text_adapter_layers": [0, 2],
        "text_adapter_dim": 16,
        "aligner_attention_dim": 16,
        "aligner_attention_heads": 4,
        "aligner_dropout": 0.0,
        "feature_layers": [1, 2],
        "decoder_dim": 32,
        "decoder_layers": 1,
        "decoder_heads": 4,
        "decoder_ffn_dim": 28,
        "decoder_dropout": 0.0,
        "image_size": 56,
        "max_text_length": 7,
    }
    return DetrisConfig(**defaults | fields)


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic of `module` a random value, so that it has an effect on the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()], key=lambda pair: pair[0]):
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif tensor.ndim > 1:
                tensor.copy_(noise / max(tensor[0].numel(), 1) ** 0.5)
            else:
                tensor.copy_(0.3 * noise + (0.0 if name.endswith(("bias", "running_mean")) else 1.0))
    return module


def small_model(config: DetrisConfig | None = None, seed: int = 0) -> DetrisForReferringSegmentation:
    return randomize(DetrisForReferringSegmentation(config or small_config()), seed).eval()


def small_inputs(phrases: int = 2, images: int | None = None, size: int = 56) -> dict[str, torch.Tensor]:
    """`pixel_values` and `input_ids` for a `small_model`: phrases of 1, 2 … 5 words, padded with 0."""
    generator = torch.Generator().manual_seed(phrases)
    pixel_values = torch.randn(images or phrases, 3, size, size, generator=generator)
    input_ids = torch.zeros(phrases, 7, dtype=torch.long)
    for index, phrase in enumerate(input_ids):
        words = 1 + index % 5
        phrase[: words + 2] = torch.tensor([62, *torch.randint(1, 62, (words,), generator=generator), 63])
    return {"pixel_values": pixel_values, "input_ids": input_ids}


def logits_of(model: nn.Module, **inputs) -> torch.Tensor:
    """The logits of a small model, in its present mode, for `small_inputs()`, which `inputs` add to or replace."""
    with torch.no_grad():
        return model(**small_inputs() | inputs).logits


BACKBONE_FIELDS = {
    name: getattr(small_config(), name)
    for name in DetrisConfig.__annotations__
    if name not in ("vision_config", "text_config")
}


def save_backbones(folder, registers=True, text="projection", dtype=torch.float32, config=None):
    """Save small backbones whose position table is 5x5 as `folder/vision` and `folder/text`; return their weights."""
    config = config or small_config(registers)
    vision = (Dinov2WithRegistersModel if registers else Dinov2Model)(config.vision_config)
    if text == "projection":
        text_model = CLIPTextModelWithProjection(config.text_config)
    elif text == "no projection":
        text_model = CLIPTextModel(config.text_config)
    else:
        vision_tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text_tower = config.text_config.to_dict()
        text_model = CLIPModel(CLIPConfig(text_config=text_tower, vision_config=vision_tower, projection_dim=20))
    for model, name in ((vision, "vision"), (text_model, "text")):
        randomize(model).to(dtype).save_pretrained(folder / name)
    return vision.state_dict(), text_model.state_dict()


def trainable(model: nn.Module) -> set[str]:
    """The names of the parameters that are trained."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_backbone(name: str) -> bool:
    """Whether a parameter of a model belongs to its backbones, and not to a dense adapter inside them."""
    return name.startswith(("vision_model.", "text_model.", "text_projection.")) and ".detris_adapter." not in name


def assert_starts_as_the_paper_says(model: nn.Module) -> None:
    """Check that aligners have Kaiming normal weights and zero biases, text adapters and head PyTorch's defaults."""
    checked = 0
    for name, module in model.named_modules():
        if is_backbone(f"{name}.weight"):
            continue
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(module, nn.MultiheadAttention):
            weights = [module.in_proj_weight] if module.in_proj_weight is not None else []
            for weight in weights:
                assert weight.abs().max() <= math.sqrt(6 / sum(weight.shape)), name
            assert not module.in_proj_bias.any() and not module.out_proj.bias.any(), name
        elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            fan_in, count = weight[0].numel(), weight.numel()
            aligner = name.startswith("vision_model.")
            gate = ".gates." in name  # in the official code, value and output of an `nn.MultiheadAttention`
            expected = math.sqrt((2 if aligner else 1 / 3) / fan_in)
            if name.endswith(".value"):
                attention = nn.MultiheadAttention(fan_in, 1)
                expected = attention.in_proj_weight.std().item()
            assert weight.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * count)), name
            if aligner or gate:
                assert not bias.any(), name
            else:
                bound = 1 / math.sqrt(fan_in) + 1e-6
                assert weight.abs().max() <= bound, name
                if bias is not None and not name.endswith("out_proj"):
                    assert bias.any() and bias.abs().max() <= bound, name
            if aligner and count > 1000:
                assert weight.abs().max() > 2.5 * expected, name  # normal, not uniform
            checked += 1
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)):
            assert (weight == 1).all() and not bias.any(), name
            if not isinstance(module, nn.LayerNorm):
                assert (module.running_var == 1).all() and not module.running_mean.any(), name
                assert module.num_batches_tracked == 0, name
    assert checked > 50
