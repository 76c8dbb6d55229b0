"""The official checkpoint's layout: every tensor by its official name and by ours, and how one becomes the other.

Source: the official implementation (jiaqihuang01/DETRIS, commit c94b1e1). It names the backbones' tensors as
their own releases do, with `dinov2.` or `txt_backbone.` in front. Sizes are read off the tensors, because an official
checkpoint has no configuration.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from transformers import (
    CLIPTextConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

try:
    from .checkpoint_files import check_names, skeleton, tensors_for_model
    from .configuration_detris import DetrisConfig
except ImportError:
    if __package__:
        raise
    from checkpoint_files import check_names, skeleton, tensors_for_model
    from configuration_detris import DetrisConfig

WEIGHT_AND_BIAS = ("weight", "bias")
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# The official neck numbers its feature maps like the levels of a pyramid. It projects the third one by a transposed
# 1x1 convolution.
NECK_LEVELS = (3, 4, 5)
# CLIP's temperature has no effect on what DETRIS computes. Official checkpoints may hold it; ours do not.
UNUSED_TENSOR = "txt_backbone.logit_scale"
# A checkpoint does not tell how many attention heads there are. In all released DINOv2 and CLIP a head has this width.
HEAD_WIDTH = 64
MAX_LAYERS = 256  # of a backbone or decoder; DINOv2's largest has 40, and building one takes milliseconds

Row = tuple[str, list[str], str]  # a tensor's official name, its name or names here, and its kind, a key of `KINDS`


def name_table(config: DetrisConfig) -> list[Row]:
    """List all tensors of an official checkpoint that has this configuration, a [`Row`] each."""
    return [
        *text_backbone_table(config.text_config, config.text_adapter_layers),
        *vision_backbone_table(config.vision_config, config.vision_adapter_layers),
        *_head(config),
    ]


def text_backbone_table(config: CLIPTextConfig, adapter_layers: Iterable[int] = ()) -> Iterator[Row]:
    """List the tensors of CLIP's text tower, with text adapters in some layers."""
    yield "txt_backbone.token_embedding.weight", ["text_model.embeddings.token_embedding.weight"], "same"
    yield "txt_backbone.positional_embedding", ["text_model.embeddings.position_embedding.weight"], "same"
    yield "txt_backbone.text_projection", ["text_projection.weight"], "transposed"
    yield from _same("txt_backbone.ln_final", "text_model.final_layer_norm")
    for index in range(config.num_hidden_layers):
        official, ours = f"txt_backbone.transformer.resblocks.{index}", f"text_model.encoder.layers.{index}"
        if index in adapter_layers:
            yield from _adapter(f"{official}.adapter", f"{ours}.detris_adapter.default")
            ours = f"{ours}.base_layer"
        attention = f"{official}.attn"
        yield from _split_attention(f"{attention}.in_proj_weight", f"{attention}.in_proj_bias", f"{ours}.self_attn")
        yield from _same(f"{attention}.out_proj", f"{ours}.self_attn.out_proj")
        yield from _same(f"{official}.ln_1", f"{ours}.layer_norm1")
        yield from _same(f"{official}.ln_2", f"{ours}.layer_norm2")
        yield from _same(f"{official}.mlp.c_fc", f"{ours}.mlp.fc1")
        yield from _same(f"{official}.mlp.c_proj", f"{ours}.mlp.fc2")


def vision_backbone_table(
    config: Dinov2Config | Dinov2WithRegistersConfig, adapter_layers: Iterable[int] = ()
) -> Iterator[Row]:
    """List the tensors of DINOv2, with dense aligners in some layers."""
    embeddings = "vision_model.embeddings"
    yield "dinov2.cls_token", [f"{embeddings}.cls_token"], "same"
    yield "dinov2.mask_token", [f"{embeddings}.mask_token"], "same"
    yield "dinov2.pos_embed", [f"{embeddings}.position_embeddings"], "same"
    if config.model_type == "dinov2_with_registers":
        yield "dinov2.register_tokens", [f"{embeddings}.register_tokens"], "same"
    yield from _same("dinov2.patch_embed.proj", f"{embeddings}.patch_embeddings.projection")
    yield from _same("dinov2.norm", "vision_model.layernorm")
    for index in range(config.num_hidden_layers):
        official, ours = f"dinov2.blocks.{index}", f"vision_model.encoder.layer.{index}"
        if index in adapter_layers:
            adapter, aligner = f"{official}.adapter", f"{ours}.detris_adapter.default"
            yield from _adapter(adapter, aligner)
            yield from _attention(f"{adapter}.cross.multihead_attn", f"{aligner}.word_attention.attention")
            yield from _same(f"{adapter}.cross.image_proj", f"{aligner}.word_attention.patch_projection")
            yield from _same(f"{adapter}.cross.text_proj", f"{aligner}.word_attention.word_projection")
            yield from _same(f"{adapter}.cross.back_proj", f"{aligner}.word_attention.output_projection")
            ours = f"{ours}.base_layer"
        yield from _split_attention(f"{official}.attn.qkv.weight", f"{official}.attn.qkv.bias", f"{ours}.attention")
        yield from _same(f"{official}.attn.proj", f"{ours}.attention.o_proj")
        yield from _same(f"{official}.norm1", f"{ours}.norm1")
        yield from _same(f"{official}.norm2", f"{ours}.norm2")
        yield from _same(f"{official}.mlp.fc1", f"{ours}.mlp.fc1")
        yield from _same(f"{official}.mlp.fc2", f"{ours}.mlp.fc2")
        yield f"{official}.ls1.gamma", [f"{ours}.layer_scale1.lambda1"], "same"
        yield f"{official}.ls2.gamma", [f"{ours}.layer_scale2.lambda1"], "same"


def _head(config: DetrisConfig) -> Iterator[Row]:
    yield from _same("neck.txt_proj", "neck.sentence_projection")
    for index, level in enumerate(NECK_LEVELS):
        projection, ours = f"neck.f{level}_proj", f"neck.map_projections.{index}"
        kind = "transposed" if level == NECK_LEVELS[-1] else "same"
        yield f"{projection}.0.weight", [f"{ours}.conv.weight"], kind
        yield from _same(f"{projection}.1", f"{ours}.norm", BATCH_NORM)
        fusion, gate = f"neck.fusion{level}.multihead_attn", f"neck.gates.{index}"
        yield f"{fusion}.in_proj_weight", [f"{gate}.value.weight"], "last third"
        yield f"{fusion}.in_proj_bias", [f"{gate}.value.bias"], "last third"
        yield from _same(f"{fusion}.out_proj", f"{gate}.output")
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
            yield from _same(f"{official}.{theirs}", f"{ours}.{mine}")
    yield from _same("decoder.norm", "decoder.norm")
    yield from _conv_norm("proj.vis.1.0", "proj.vis.1.1", "mask_head.convolutions.1")
    yield from _conv_norm("proj.vis.3.0", "proj.vis.3.1", "mask_head.convolutions.3")
    yield from _same("proj.vis.4", "mask_head.output_projection")
    yield from _same("proj.txt", "mask_head.kernel_projection")


def _same(official: str, ours: str, leaves: tuple[str, ...] = WEIGHT_AND_BIAS) -> Iterator[Row]:
    """Tensors of a module that are equal in both layouts."""
    for leaf in leaves:
        yield f"{official}.{leaf}", [f"{ours}.{leaf}"], "same"


def _attention(official: str, ours: str) -> Iterator[Row]:
    for leaf in ("in_proj_weight", "in_proj_bias"):
        yield f"{official}.{leaf}", [f"{ours}.{leaf}"], "same"
    yield from _same(f"{official}.out_proj", f"{ours}.out_proj")


def _split_attention(official_weight: str, official_bias: str, ours: str) -> Iterator[Row]:
    for official, leaf in ((official_weight, "weight"), (official_bias, "bias")):
        yield official, [f"{ours}.{part}_proj.{leaf}" for part in "qkv"], "thirds"


def _conv_norm(official_conv: str, official_norm: str, ours: str, bias: bool = False) -> Iterator[Row]:
    yield from _same(official_conv, f"{ours}.conv", WEIGHT_AND_BIAS if bias else ("weight",))
    yield from _same(official_norm, f"{ours}.norm", BATCH_NORM)


def _adapter(official: str, ours: str) -> Iterator[Row]:
    yield from _same(f"{official}.D_fc1", f"{ours}.down")
    yield from _same(f"{official}.D_fc2", f"{ours}.up")
    for branch in ("1", "2.0", "2.1", "3.0", "3.1"):
        theirs, mine = f"{official}.dense_branch{branch}", f"{ours}.dense.branch{branch}"
        yield from _conv_norm(f"{theirs}.conv", f"{theirs}.bn", mine, bias=True)


# --- conversion ----------------------------------------------------------------------------------------------------

# By kind: how an official tensor becomes ours, which may be several, and how ours become the official one.
KINDS = {
    "same": (lambda tensor: [tensor], lambda ours: ours[0]),
    "transposed": (  # in the first two axes
        lambda tensor: [tensor.transpose(0, 1).contiguous()],
        lambda ours: ours[0].transpose(0, 1).contiguous(),
    ),
    "thirds": (lambda tensor: tensor.chunk(3), torch.cat),  # query, key and value
    "last third": (  # the value alone: attention to a single key does not depend on query and key
        lambda tensor: tensor.chunk(3)[2:],
        lambda ours: torch.cat([torch.zeros_like(ours[0]), torch.zeros_like(ours[0]), ours[0]]),
    ),
}


def tensors_to_ours(official: Mapping[str, torch.Tensor], table: Iterable[Row]) -> dict[str, torch.Tensor]:
    """Convert tensors by their official names to tensors by our names, which are views of them where possible."""
    return {
        our_name: ours
        for name, our_names, kind in table
        for our_name, ours in zip(our_names, KINDS[kind][0](official[name]), strict=True)
    }


def tensors_to_official(ours: Mapping[str, torch.Tensor], table: Iterable[Row]) -> dict[str, torch.Tensor]:
    """Convert tensors by our names to tensors by their official names."""
    return {name: KINDS[kind][1]([ours[our_name] for our_name in our_names]) for name, our_names, kind in table}


def expected_tensors(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, table: list[Row]
) -> dict[str, torch.Tensor]:
    """
    Build the tensors, by our names and without numbers, that a model of this configuration has.

    Raises:
        ValueError: if no model can be built, or its tensors are not those that the official code has, as in `table`.
    """
    tensors = skeleton(model_class, config).state_dict()
    other = tensors.keys() ^ {our_name for _, our_names, _ in table for our_name in our_names}
    if other:
        raise ValueError(f"The official code has no model of this configuration: {min(other)} does not fit.")
    return tensors


def official_to_ours(
    official: Mapping[str, torch.Tensor],
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    table: list[Row],
    what: str,
    remedy: str,
) -> dict[str, torch.Tensor]:
    """
    Check official tensors against a model of ours, and convert them to its names and types.

    Args:
        official: by their official names.
        table: the rows of all tensors that the model has.
        what: how an error about the tensors begins.
        remedy: the last sentence of an error about the tensors.

    Returns:
        `dict[str, torch.Tensor]` by our names, all of the model's tensors. They are views of the official tensors
        where possible.

    Raises:
        ValueError: as [`expected_tensors`] and [`tensors_for_model`].
    """
    official = {name: tensor for name, tensor in official.items() if name != UNUSED_TENSOR}
    check_names(official, [name for name, _, _ in table], remedy, what)  # building the model below takes time
    expected = tensors_to_official(expected_tensors(model_class, config, table), table)
    return tensors_to_ours(tensors_for_model(official, expected, remedy, what), table)


# --- sizes --------------------------------------------------------------------------------------------------------


def numbers_in(names: Iterable[str], pattern: str) -> set[str]:
    """Collect what the first group of `pattern` matches at the beginnings of `names`: numbers, as they are written."""
    return {match[1] for match in map(re.compile(pattern).match, names) if match}


def depth_of(names: Iterable[str], modules: str) -> int:
    """
    Count the modules of a `ModuleList` by their numbers in the names of tensors.

    Raises:
        ValueError: if there are more than `MAX_LAYERS`, which would take long to build, or they are not numbered from
            0 on.
    """
    numbers = numbers_in(names, rf"{re.escape(modules)}\.(\d+)\.")
    if len(numbers) > MAX_LAYERS:
        raise ValueError(f"There are {len(numbers)} {modules}, but at most {MAX_LAYERS} in any model.")
    if numbers != {str(index) for index in range(len(numbers))}:
        raise ValueError(f"The {len(numbers)} {modules} are not numbered from 0 to {len(numbers) - 1}.")
    return len(numbers)


def shape_of(tensors: Mapping[str, torch.Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """Return the shape of a tensor; raises ValueError if it is missing or has not so many `dimensions`."""
    if name not in tensors:
        raise ValueError(f"There is no tensor {name!r}.")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions:
        raise ValueError(f"{name} has the shape {shape}, which tells no sizes.")
    return shape


def read_vision_config(tensors: Mapping[str, torch.Tensor]) -> Dinov2Config | Dinov2WithRegistersConfig:
    """
    Read DINOv2's configuration off the tensors of an official DETRIS.

    Raises:
        ValueError: if a tensor that tells a size is missing or has an impossible shape.
    """
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
    """
    Read the configuration of CLIP's text tower off the tensors of an official DETRIS.

    Raises:
        ValueError: if a tensor that tells a size is missing or has an impossible shape.
    """
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
