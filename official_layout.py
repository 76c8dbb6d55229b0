"""Every tensor of an official DETRIS checkpoint by its name there and by ours, what happens to it on the way, and the
sizes that tensors tell."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from transformers import CLIPTextConfig, Dinov2Config, Dinov2WithRegistersConfig

from configuration_detris import DetrisConfig

WEIGHT_AND_BIAS = ("weight", "bias")
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# The official neck numbers its feature maps like a pyramid's levels; the third one's 1x1 convolution is transposed.
NECK_LEVELS = (3, 4, 5)
# A tensor without an effect on what the model computes; the way back writes a 0.
IGNORED = "txt_backbone.logit_scale"
# Attention heads leave no trace in a checkpoint. Those of all released DINOv2 and CLIP are so wide.
HEAD_WIDTH = 64
MAX_LAYERS = 256  # of a backbone or decoder; DINOv2's largest has 40, and each takes milliseconds to build


def _tensors(official: str, ours: str, leaves: tuple[str, ...] = WEIGHT_AND_BIAS) -> Iterator[tuple]:
    for leaf in leaves:
        yield f"{official}.{leaf}", [f"{ours}.{leaf}"], "same"


def _attention(official: str, ours: str) -> Iterator[tuple]:
    for leaf in ("in_proj_weight", "in_proj_bias"):
        yield f"{official}.{leaf}", [f"{ours}.{leaf}"], "same"
    yield from _tensors(f"{official}.out_proj", f"{ours}.out_proj")


def _split_attention(official_weight: str, official_bias: str, ours: str) -> Iterator[tuple]:
    for official, leaf in ((official_weight, "weight"), (official_bias, "bias")):
        yield official, [f"{ours}.{part}_proj.{leaf}" for part in "qkv"], "thirds"


def _conv_norm(official_conv: str, official_norm: str, ours: str, bias: bool = False) -> Iterator[tuple]:
    yield from _tensors(official_conv, f"{ours}.conv", WEIGHT_AND_BIAS if bias else ("weight",))
    yield from _tensors(official_norm, f"{ours}.norm", BATCH_NORM)


def _adapter(official: str, ours: str) -> Iterator[tuple]:
    yield from _tensors(f"{official}.D_fc1", f"{ours}.down")
    yield from _tensors(f"{official}.D_fc2", f"{ours}.up")
    for branch in ("1", "2.0", "2.1", "3.0", "3.1"):
        theirs, mine = f"{official}.dense_branch{branch}", f"{ours}.dense.branch{branch}"
        yield from _conv_norm(f"{theirs}.conv", f"{theirs}.bn", mine, bias=True)


def text_backbone_table(depth: int, adapter_layers: Iterable[int] = ()) -> Iterator[tuple]:
    """CLIP's text tower, with text adapters in some layers; rows as in [`name_table`]."""
    yield "txt_backbone.token_embedding.weight", ["text_model.embeddings.token_embedding.weight"], "same"
    yield "txt_backbone.positional_embedding", ["text_model.embeddings.position_embedding.weight"], "same"
    yield "txt_backbone.text_projection", ["text_projection.weight"], "transposed"
    yield from _tensors("txt_backbone.ln_final", "text_model.final_layer_norm")
    for index in range(depth):
        official, ours = f"txt_backbone.transformer.resblocks.{index}", f"text_model.encoder.layers.{index}"
        if index in adapter_layers:
            yield from _adapter(f"{official}.adapter", f"{ours}.detris_adapter.default")
            ours = f"{ours}.base_layer"
        attention = f"{official}.attn"
        yield from _split_attention(f"{attention}.in_proj_weight", f"{attention}.in_proj_bias", f"{ours}.self_attn")
        yield from _tensors(f"{attention}.out_proj", f"{ours}.self_attn.out_proj")
        yield from _tensors(f"{official}.ln_1", f"{ours}.layer_norm1")
        yield from _tensors(f"{official}.ln_2", f"{ours}.layer_norm2")
        yield from _tensors(f"{official}.mlp.c_fc", f"{ours}.mlp.fc1")
        yield from _tensors(f"{official}.mlp.c_proj", f"{ours}.mlp.fc2")


def vision_backbone_table(depth: int, registers: bool, adapter_layers: Iterable[int] = ()) -> Iterator[tuple]:
    """DINOv2, with dense aligners in some layers; rows as in [`name_table`]."""
    embeddings = "vision_model.embeddings"
    yield "dinov2.cls_token", [f"{embeddings}.cls_token"], "same"
    yield "dinov2.mask_token", [f"{embeddings}.mask_token"], "same"
    yield "dinov2.pos_embed", [f"{embeddings}.position_embeddings"], "same"
    if registers:
        yield "dinov2.register_tokens", [f"{embeddings}.register_tokens"], "same"
    yield from _tensors("dinov2.patch_embed.proj", f"{embeddings}.patch_embeddings.projection")
    yield from _tensors("dinov2.norm", "vision_model.layernorm")
    for index in range(depth):
        official, ours = f"dinov2.blocks.{index}", f"vision_model.encoder.layer.{index}"
        if index in adapter_layers:
            adapter, aligner = f"{official}.adapter", f"{ours}.detris_adapter.default"
            yield from _adapter(adapter, aligner)
            yield from _attention(f"{adapter}.cross.multihead_attn", f"{aligner}.word_attention.attention")
            yield from _tensors(f"{adapter}.cross.image_proj", f"{aligner}.word_attention.patch_projection")
            yield from _tensors(f"{adapter}.cross.text_proj", f"{aligner}.word_attention.word_projection")
            yield from _tensors(f"{adapter}.cross.back_proj", f"{aligner}.word_attention.output_projection")
            ours = f"{ours}.base_layer"
        yield from _split_attention(f"{official}.attn.qkv.weight", f"{official}.attn.qkv.bias", f"{ours}.attention")
        yield from _tensors(f"{official}.attn.proj", f"{ours}.attention.o_proj")
        yield from _tensors(f"{official}.norm1", f"{ours}.norm1")
        yield from _tensors(f"{official}.norm2", f"{ours}.norm2")
        yield from _tensors(f"{official}.mlp.fc1", f"{ours}.mlp.fc1")
        yield from _tensors(f"{official}.mlp.fc2", f"{ours}.mlp.fc2")
        yield f"{official}.ls1.gamma", [f"{ours}.layer_scale1.lambda1"], "same"
        yield f"{official}.ls2.gamma", [f"{ours}.layer_scale2.lambda1"], "same"


def _head(config: DetrisConfig) -> Iterator[tuple]:
    yield from _tensors("neck.txt_proj", "neck.sentence_projection")
    for index, level in enumerate(NECK_LEVELS):
        projection, ours = f"neck.f{level}_proj", f"neck.map_projections.{index}"
        kind = "transposed" if level == NECK_LEVELS[-1] else "same"
        yield f"{projection}.0.weight", [f"{ours}.conv.weight"], kind
        yield from _tensors(f"{projection}.1", f"{ours}.norm", BATCH_NORM)
        fusion, gate = f"neck.fusion{level}.multihead_attn", f"neck.gates.{index}"
        yield f"{fusion}.in_proj_weight", [f"{gate}.value.weight"], "last third"
        yield f"{fusion}.in_proj_bias", [f"{gate}.value.bias"], "last third"
        yield from _tensors(f"{fusion}.out_proj", f"{gate}.output")
    yield from _conv_norm("neck.aggr.0", "neck.aggr.1", "neck.aggregation")
    for official, ours in (("0.conv1", "0"), ("1", "1")):
        official, ours = f"neck.coordconv.{official}", f"neck.coordinate_convolutions.{ours}"
        yield from _conv_norm(f"{official}.0", f"{official}.1", ours)
    for index in range(config.decoder_layers):
        official = ours = f"decoder.layers.{index}"
        yield from _attention(f"{official}.self_attn", f"{ours}.self_attention")
        yield from _attention(f"{official}.multihead_attn", f"{ours}.word_attention")
        for theirs, mine in (
            ("norm1", "self_attention_norm"),
            ("self_attn_norm", "self_attention_output_norm"),
            ("norm2", "word_attention_norm"),
            ("cross_attn_norm", "word_attention_output_norm"),
            ("norm3", "feed_forward_norm"),
            ("ffn.0", "feed_forward.0"),
            ("ffn.3", "feed_forward.3"),
            ("ffn.4", "feed_forward.4"),
        ):
            yield from _tensors(f"{official}.{theirs}", f"{ours}.{mine}")
    yield from _tensors("decoder.norm", "decoder.norm")
    yield from _conv_norm("proj.vis.1.0", "proj.vis.1.1", "mask_head.convolutions.1")
    yield from _conv_norm("proj.vis.3.0", "proj.vis.3.1", "mask_head.convolutions.3")
    yield from _tensors("proj.vis.4", "mask_head.output_projection")
    yield from _tensors("proj.txt", "mask_head.kernel_projection")


# How an official tensor becomes ours, which may be several, and how ours become the official one.
KINDS = {
    "same": (lambda tensor: [tensor], lambda ours: ours[0]),
    "transposed": (  # in the first two axes
        lambda tensor: [tensor.transpose(0, 1).contiguous()],
        lambda ours: ours[0].transpose(0, 1).contiguous(),
    ),
    "thirds": (lambda tensor: tensor.chunk(3), torch.cat),  # query, key and value
    "last third": (  # the value alone: query and key have no effect
        lambda tensor: tensor.chunk(3)[2:],
        lambda ours: torch.cat([torch.zeros_like(ours[0]), torch.zeros_like(ours[0]), ours[0]]),
    ),
}


def name_table(config: DetrisConfig) -> list[tuple[str, list[str], str]]:
    """List every tensor of an official checkpoint as `(official name, our names, kind)`; `KINDS` has the kinds."""
    registers = config.vision_config.model_type == "dinov2_with_registers"
    return [
        *text_backbone_table(config.text_config.num_hidden_layers, config.text_adapter_layers),
        *vision_backbone_table(config.vision_config.num_hidden_layers, registers, config.vision_adapter_layers),
        *_head(config),
    ]


def tensors_to_ours(official: Mapping[str, torch.Tensor], table: Iterable[tuple]) -> dict[str, torch.Tensor]:
    """Ours by name; views of the official tensors where possible."""
    return {
        our_name: ours
        for name, our_names, kind in table
        for our_name, ours in zip(our_names, KINDS[kind][0](official[name]), strict=True)
    }


def tensors_to_official(ours: Mapping[str, torch.Tensor], table: Iterable[tuple]) -> dict[str, torch.Tensor]:
    """The official ones by name, from all of ours."""
    return {name: KINDS[kind][1]([ours[our_name] for our_name in our_names]) for name, our_names, kind in table}


# --- sizes --------------------------------------------------------------------------------------------------------


def numbers_in(names: Iterable[str], pattern: str) -> set[str]:
    """The numbers that `pattern` finds in `names`, as they are written there."""
    return {match[1] for match in map(re.compile(pattern).match, names) if match}


def depth_of(names: Iterable[str], modules: str) -> int:
    """How many modules there are, numbered from 0 as in a `ModuleList`; a number costs nothing, but a layer does."""
    numbers = numbers_in(names, rf"{re.escape(modules)}\.(\d+)\.")
    if len(numbers) > MAX_LAYERS:
        raise ValueError(f"There are {len(numbers)} {modules}, but at most {MAX_LAYERS} in any model.")
    if numbers != {str(index) for index in range(len(numbers))}:
        raise ValueError(f"The {len(numbers)} {modules} are not numbered from 0 to {len(numbers) - 1}.")
    return len(numbers)


def shape_of(tensors: Mapping[str, torch.Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read from."""
    if name not in tensors:
        raise ValueError(f"There is no tensor {name!r}.")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions:
        raise ValueError(f"{name} has the shape {shape}, which tells no sizes.")
    return shape


def read_vision_config(tensors: Mapping[str, torch.Tensor]) -> Dinov2Config | Dinov2WithRegistersConfig:
    """DINOv2's configuration from the tensors of an official DETRIS; ValueError if they tell none."""
    width, _, patch_size, _ = shape_of(tensors, "dinov2.patch_embed.proj.weight", 4)
    positions = shape_of(tensors, "dinov2.pos_embed", 3)[1]
    grid_size = math.isqrt(positions - 1)
    if not 0 < grid_size**2 == positions - 1:
        raise ValueError(f"dinov2.pos_embed has {positions} positions, not one and those of a square.")
    fields = {
        "hidden_size": width,
        "num_hidden_layers": depth_of(tensors, "dinov2.blocks"),
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "mlp_ratio": shape_of(tensors, "dinov2.blocks.0.mlp.fc1.weight", 2)[0] // width,
        "image_size": grid_size * patch_size,
        "patch_size": patch_size,
    }
    if "dinov2.register_tokens" not in tensors:
        return Dinov2Config(**fields)
    return Dinov2WithRegistersConfig(**fields, num_register_tokens=shape_of(tensors, "dinov2.register_tokens", 3)[1])


def read_text_config(tensors: Mapping[str, torch.Tensor]) -> CLIPTextConfig:
    """The configuration of CLIP's text tower, likewise."""
    vocabulary_size, width = shape_of(tensors, "txt_backbone.token_embedding.weight", 2)
    layers = "txt_backbone.transformer.resblocks"
    return CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=width,
        num_hidden_layers=depth_of(tensors, layers),
        intermediate_size=shape_of(tensors, f"{layers}.0.mlp.c_fc.weight", 2)[0],
        projection_dim=shape_of(tensors, "txt_backbone.text_projection", 2)[1],
        num_attention_heads=max(width // HEAD_WIDTH, 1),
        max_position_embeddings=shape_of(tensors, "txt_backbone.positional_embedding", 2)[0],
        bos_token_id=vocabulary_size - 2,
        eos_token_id=vocabulary_size - 1,
    )
