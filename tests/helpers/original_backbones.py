"""Random backbones, saved as Hugging Face saves them and in the files of their original releases."""

import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)


def original_dinov2(model):
    """The state dict of a Hugging Face DINOv2 by the names of DINOv2's own release."""
    weights, original = model.state_dict(), {}
    for name, tensor in weights.items():
        name = name.removeprefix("embeddings.").replace("encoder.layer.", "blocks.").replace("layernorm.", "norm.")
        name = name.replace("position_embeddings", "pos_embed").replace(
            "patch_embeddings.projection", "patch_embed.proj"
        )
        name = name.replace("layer_scale1.lambda1", "ls1.gamma").replace("layer_scale2.lambda1", "ls2.gamma")
        name = name.replace("attention.o_proj", "attn.proj")
        if "q_proj" in name:
            block, leaf = name.split(".attention.")[0], name.rsplit(".", 1)[1]
            layer = block.replace("blocks.", "encoder.layer.")
            parts = [weights[f"{layer}.attention.{part}_proj.{leaf}"] for part in "qkv"]
            original[f"{block}.attn.qkv.{leaf}"] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            original[name] = tensor
    return original


def original_clip(model):
    """The text half of a Hugging Face CLIP by the names of OpenAI's release, and a little of the image half."""
    weights = model.state_dict()
    original = {
        "token_embedding.weight": weights["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": weights["text_model.embeddings.position_embedding.weight"],
        "text_projection": weights["text_projection.weight"].T,
        "ln_final.weight": weights["text_model.final_layer_norm.weight"],
        "ln_final.bias": weights["text_model.final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
        "visual.proj": torch.ones(2, 2),
    }
    for layer in range(model.config.text_config.num_hidden_layers):
        theirs, ours = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
        for leaf in ("weight", "bias"):
            parts = [weights[f"{ours}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            original[f"{theirs}.attn.in_proj_{leaf}"] = torch.cat(parts)
            for name, our_name in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                original[f"{theirs}.{name}.{leaf}"] = weights[f"{ours}.{our_name}.{leaf}"]
    return original


class Holder(nn.Module):
    """Modules within modules that hold the tensors of a state dict, for TorchScript."""

    def __init__(self, tensors):
        super().__init__()
        for first in dict.fromkeys(name.split(".")[0] for name in tensors):
            inner = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.split(".")[0] == first}
            if "" in inner:
                self.register_parameter(first, nn.Parameter(inner[""].contiguous(), requires_grad=False))
            else:
                self.add_module(first, Holder(inner))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value


def save_originals(folder, width, depth, text_width, text_depth, registers=True):
    """Random backbones: Hugging Face folders `vision` and `clip`, and the same in their original files."""
    heads = {"num_attention_heads": width // 64, "num_hidden_layers": depth, "hidden_size": width}
    vision_config = {"image_size": 518, "patch_size": 14, **heads}
    text = {"num_attention_heads": text_width // 64, "num_hidden_layers": text_depth, "hidden_size": text_width}
    text |= {"intermediate_size": 4 * text_width, "projection_dim": text_width, "hidden_act": "quick_gelu"}
    image_tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    vision = (
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**vision_config))
        if registers
        else Dinov2Model(Dinov2Config(**vision_config))
    )
    text_config = CLIPTextConfig(**text, bos_token_id=49406, eos_token_id=49407)
    clip = CLIPModel(
        CLIPConfig(
            text_config=text_config.to_dict(),
            vision_config=CLIPVisionConfig(**image_tower).to_dict(),
            projection_dim=text_width,
        )
    )
    with torch.no_grad():  # new backbones have biases of zero
        for parameter in (*vision.parameters(), *clip.parameters()):
            if parameter.ndim < 2:
                parameter.normal_(1, 0.1)
    vision.save_pretrained(folder / "vision")
    clip.save_pretrained(folder / "clip")
    torch.save(original_dinov2(vision), folder / "dinov2_pretrain.pth")
    torch.save(original_clip(clip), folder / "clip.pth")
    torch.jit.script(Holder(original_clip(clip))).save(folder / "ViT-B-16.pt")
