"""Official checkpoints to this project's layout and back.

    python convert_detris_checkpoint.py best_model.pth detris-base-refcoco --dataset refcoco/unc
    python convert_detris_checkpoint.py detris-base-refcoco best_model.pth --to-official

The first writes a folder that `AutoModel` and `AutoProcessor` load; widths, depths and adapter layers are read off the
checkpoint. The second writes a checkpoint that the official code (jiaqihuang01/DETRIS) loads. Original files of the
backbones, DINOv2's `.pth` and OpenAI's CLIP, are read here too, for `DetrisForReferringSegmentation.from_backbones`.
"""

import argparse
import os
import re
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from configuration_detris import DetrisConfig
from model_card import make_model_card
from modeling_detris import DetrisForReferringSegmentation
from processing_detris import CLIP_TOKENIZER, DetrisProcessor

WEIGHT_AND_BIAS = ("weight", "bias")
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# The official neck numbers its feature maps like a pyramid's levels; the third one's 1x1 convolution is transposed.
NECK_LEVELS = (3, 4, 5)
# A tensor without an effect on what the model computes; the way back writes a 0.
IGNORED = "txt_backbone.logit_scale"
# Attention heads leave no trace in a checkpoint. Those of all released DINOv2 and CLIP are so wide.
HEAD_WIDTH = 64
# Nor do the tokens of a phrase (official `config/<dataset>/*.yaml`, `word_len`).
TEXT_LENGTHS = {"refcoco/unc": 17, "refcoco+/unc": 17, "refcocog/umd": 22, "refcocog/google": 17}
BACKBONES = {
    Dinov2Config: Dinov2Model,
    Dinov2WithRegistersConfig: Dinov2WithRegistersModel,
    CLIPTextConfig: CLIPTextModelWithProjection,
}


# --- names --------------------------------------------------------------------------------------------------------


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


def _text_backbone(depth: int, adapter_layers: Iterable[int] = ()) -> Iterator[tuple]:
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


def _vision_backbone(depth: int, registers: bool, adapter_layers: Iterable[int] = ()) -> Iterator[tuple]:
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
        *_text_backbone(config.text_config.num_hidden_layers, config.text_adapter_layers),
        *_vision_backbone(config.vision_config.num_hidden_layers, registers, config.vision_adapter_layers),
        *_head(config),
    ]


def _to_ours(official: Mapping[str, torch.Tensor], table: Iterable[tuple]) -> dict[str, torch.Tensor]:
    """Ours by name; views of the official tensors where possible."""
    return {
        our_name: ours
        for name, our_names, kind in table
        for our_name, ours in zip(our_names, KINDS[kind][0](official[name]), strict=True)
    }


def _to_official(ours: Mapping[str, torch.Tensor], table: Iterable[tuple]) -> dict[str, torch.Tensor]:
    return {name: KINDS[kind][1]([ours[our_name] for our_name in our_names]) for name, our_names, kind in table}


def _skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose tensors have names and shapes, and take no memory."""
    with torch.device("meta"):
        return model_class(config)


def _check(official: Mapping[str, Any], expected: Mapping[str, torch.Tensor], what: str, remedy: str) -> None:
    """Refuse tensors whose names or shapes are not those expected."""
    missing, unexpected = sorted(expected.keys() - official.keys()), sorted(official.keys() - expected.keys())
    unexpected = [name for name in unexpected if name != IGNORED]
    if missing or unexpected:
        raise ValueError(
            f"{what}: {len(missing)} tensors are missing ({', '.join(missing[:3]) or 'none'}) and {len(unexpected)} "
            f"are too many ({', '.join(map(str, unexpected[:3])) or 'none'}). {remedy}"
        )
    wrong = [name for name, tensor in expected.items() if official[name].shape != tensor.shape]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{what}: {len(wrong)} tensors have another shape than expected, such as {name} with "
            f"{tuple(official[name].shape)} instead of {tuple(expected[name].shape)}. {remedy}"
        )


def _state_dict_of(official: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The bare state dict of a training checkpoint, without the `module.` of (Distributed)DataParallel."""
    return {name.removeprefix("module."): tensor for name, tensor in official.get("state_dict", official).items()}


def convert_state_dict(official: Mapping[str, Any], config: DetrisConfig) -> dict[str, torch.Tensor]:
    """
    Convert an official state dict to one that `DetrisForReferringSegmentation(config)` loads with `strict=True`.

    Args:
        official: the official state dict, or a training checkpoint that holds it under `"state_dict"`; names may carry
            `module.` in front.
        config: the configuration of the model to load.

    Returns:
        `dict[str, torch.Tensor]` by our names. Tensors are views of the official ones where possible.

    Raises:
        ValueError: if tensors are missing, too many or of another shape than in `config`; the message names them.
    """
    if len(config.feature_layers) + 1 != len(NECK_LEVELS):
        raise ValueError(f"feature_layers is {config.feature_layers}: an official DETRIS has {len(NECK_LEVELS) - 1}.")
    official, table = _state_dict_of(official), name_table(config)
    expected = _to_official(_skeleton(DetrisForReferringSegmentation, config).state_dict(), table)
    _check(
        official,
        expected,
        "The official checkpoint does not fit the configuration",
        "Get the file again, or give the configuration (--recipe) that it was trained with.",
    )
    return _to_ours(official, table)


def convert_to_official(state_dict: Mapping[str, torch.Tensor], config: DetrisConfig) -> dict[str, torch.Tensor]:
    """
    Convert our state dict to an official one, which the official model loads with `strict=True`.

    What has no effect is written as zeros: the neck's query and key weights, and CLIP's logit scale.

    Args:
        state_dict: of a `DetrisForReferringSegmentation(config)`.
        config: its configuration.

    Returns:
        `dict[str, torch.Tensor]` by official names, without `module.` in front.
    """
    return _to_official(state_dict, name_table(config)) | {IGNORED: torch.tensor(0.0)}


# --- recognition --------------------------------------------------------------------------------------------------


def _layers(names: Iterable[str], pattern: str) -> list[int]:
    """The numbers that `pattern` finds in `names`, each once, in order."""
    return sorted({int(match[1]) for match in map(re.compile(pattern).match, names) if match})


def _vision_config(tensors: Mapping[str, torch.Tensor]) -> Dinov2Config | Dinov2WithRegistersConfig:
    width, _, patch_size, _ = tensors["dinov2.patch_embed.proj.weight"].shape
    grid_size = round((tensors["dinov2.pos_embed"].shape[1] - 1) ** 0.5)
    fields = {
        "hidden_size": width,
        "num_hidden_layers": len(_layers(tensors, r"dinov2\.blocks\.(\d+)\.")),
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "mlp_ratio": tensors["dinov2.blocks.0.mlp.fc1.weight"].shape[0] // width,
        "image_size": grid_size * patch_size,
        "patch_size": patch_size,
    }
    registers = tensors.get("dinov2.register_tokens")
    if registers is None:
        return Dinov2Config(**fields)
    return Dinov2WithRegistersConfig(**fields, num_register_tokens=registers.shape[1])


def _text_config(tensors: Mapping[str, torch.Tensor]) -> CLIPTextConfig:
    vocabulary_size, width = tensors["txt_backbone.token_embedding.weight"].shape
    return CLIPTextConfig(
        vocab_size=vocabulary_size,
        hidden_size=width,
        intermediate_size=tensors["txt_backbone.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        projection_dim=tensors["txt_backbone.text_projection"].shape[1],
        num_hidden_layers=len(_layers(tensors, r"txt_backbone\.transformer\.resblocks\.(\d+)\.")),
        num_attention_heads=max(width // HEAD_WIDTH, 1),
        max_position_embeddings=tensors["txt_backbone.positional_embedding"].shape[0],
        bos_token_id=vocabulary_size - 2,
        eos_token_id=vocabulary_size - 1,
    )


def recognize_config(official: Mapping[str, Any], **fields) -> DetrisConfig:
    """
    Read a configuration off an official state dict.

    Args:
        official: as for [`convert_state_dict`].
        **fields: fields of [`DetrisConfig`] that leave no trace in the tensors or shall be others; `vision_config` and
            `text_config` as mappings of the fields that differ.

    Raises:
        ValueError: if a tensor is missing or misshapen that the configuration is read from, or its sizes cannot be.
    """
    DetrisConfig.refuse_unknown(fields)
    official = _state_dict_of(official)
    vision_layer, text_layer = r"dinov2\.blocks\.(\d+)\.", r"txt_backbone\.transformer\.resblocks\.(\d+)\."
    try:
        backbones = {"vision_config": _vision_config(official), "text_config": _text_config(official)}
        depth = backbones["vision_config"].num_hidden_layers
        recognized = {
            "vision_adapter_layers": _layers(official, vision_layer + "adapter"),
            "text_adapter_layers": _layers(official, text_layer + "adapter"),
            "feature_layers": [depth // 3, 2 * depth // 3],  # as in all official recipes
            "decoder_dim": official["neck.txt_proj.weight"].shape[0],
            "decoder_layers": len(_layers(official, r"decoder\.layers\.(\d+)\.")),
            "decoder_ffn_dim": official["decoder.layers.0.ffn.0.weight"].shape[0],
        }
        if recognized["vision_adapter_layers"]:
            adapter = f"dinov2.blocks.{recognized['vision_adapter_layers'][0]}.adapter"
            recognized["vision_adapter_dim"] = official[f"{adapter}.D_fc1.weight"].shape[0]
            recognized["aligner_attention_dim"] = official[f"{adapter}.cross.image_proj.weight"].shape[0]
        if recognized["text_adapter_layers"]:
            adapter = f"txt_backbone.transformer.resblocks.{recognized['text_adapter_layers'][0]}.adapter"
            recognized["text_adapter_dim"] = official[f"{adapter}.D_fc1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"There is no tensor {error}: it is no whole official DETRIS, get the file again.") from None
    except (ValueError, IndexError):  # a shape has too few or too many sides to take sizes from
        raise ValueError(
            "Tensors that tell the sizes have no shape of an official DETRIS: get the file again."
        ) from None
    for name, config in backbones.items():
        backbones[name] = type(config).from_dict(config.to_dict() | fields.pop(name, {}))
    return DetrisConfig(**backbones, **recognized | fields)


# --- files --------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    Read a PyTorch checkpoint from strangers: tensors, numbers, strings and plain containers, nothing that could run.

    Returns:
        The state dict, also out of a training checkpoint; tensors stay in the file until they are used.

    Raises:
        OSError: if the file is missing or damaged.
        ValueError: if it is no PyTorch checkpoint or holds what could run.
    """
    path = Path(path)
    whole = zipfile.is_zipfile(path)  # older checkpoints are no archives, and cannot be mapped
    if whole:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch does not look at the checksums of what it maps
                raise OSError(f"{path} is damaged: copy or download it again.")
        if _is_torchscript(path):
            raise ValueError(f"{path} is TorchScript, such as CLIP's original file, and no checkpoint of a DETRIS.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: give the path of a checkpoint.") from None
    except Exception as error:  # whatever a broken part of the file means
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise ValueError(
                f"{path} asks for {asked[1]}, which is neither a tensor nor a plain container; nothing in it was run: "
                "get the file from those who published it, or save its state_dict alone."
            ) from None
        with open(path, "rb") as file:
            archive = file.read(2) == b"PK"
        if archive:
            raise OSError(f"{path} is cut short or damaged: copy or download it again.") from None
        raise ValueError(f"{path} is no PyTorch checkpoint: give a .pth file that torch.save wrote.") from None
    tensors = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(
            f"{path} holds no state dict, neither by itself nor as 'state_dict': give a model's checkpoint."
        )
    return _state_dict_of(tensors)


def read_dinov2(path: str | os.PathLike) -> Dinov2Model | Dinov2WithRegistersModel:
    """
    Read a file of the DINOv2 release, such as `dinov2_vitb14_reg4_pretrain.pth`.

    Raises:
        OSError: if the file is missing or damaged.
        ValueError: if it is no such file.
    """

    def table(config):
        return _vision_backbone(config.num_hidden_layers, isinstance(config, Dinov2WithRegistersConfig))

    tensors = {f"dinov2.{name}": tensor for name, tensor in read_checkpoint(path).items()}
    return _build(tensors, _vision_config, table, f"{path} is no DINOv2 of size small, base or large")


def read_clip_text(path: str | os.PathLike) -> CLIPTextModelWithProjection:
    """
    Read the text tower of a CLIP by OpenAI, such as `ViT-B-16.pt`: TorchScript as published, or a state dict.

    TorchScript may run code of its own when it is loaded: take such a file from OpenAI, not from strangers.

    Raises:
        OSError: if the file is missing or damaged.
        ValueError: if it is no such file.
    """

    def table(config):
        return _text_backbone(config.num_hidden_layers)

    tensors = _read_torchscript(path) if _is_torchscript(path) else read_checkpoint(path)
    others = ("visual.", "input_resolution", "context_length", "vocab_size")  # the image tower and loose numbers
    tensors = {
        f"txt_backbone.{name}": tensor.float() for name, tensor in tensors.items() if not name.startswith(others)
    }
    return _build(tensors, _text_config, table, f"{path} is no CLIP by OpenAI")


def _is_torchscript(path: str | os.PathLike) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():  # TorchScript is deprecated, but it is what was published
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return torch.jit.load(path, map_location="cpu").state_dict()
        except RuntimeError:
            raise OSError(f"{path} is damaged: copy or download it again.") from None


def _build(
    official: dict[str, torch.Tensor], make_config: Callable, make_table: Callable, what: str
) -> PreTrainedModel:
    """A backbone from tensors by their names in an official DETRIS."""
    remedy = "Give the file as its authors published it."
    try:
        config = make_config(official)
    except (KeyError, ValueError, IndexError):
        raise ValueError(f"{what}: tensors that tell its sizes are missing or misshapen. {remedy}") from None
    model_class = BACKBONES[type(config)]
    table = [
        (name, [our_name.removeprefix("vision_model.") for our_name in our_names], kind)
        for name, our_names, kind in make_table(config)
    ]
    _check(official, _to_official(_skeleton(model_class, config).state_dict(), table), what, remedy)
    return model_class.from_pretrained(None, config=config, state_dict=_to_ours(official, table), dtype=torch.float32)


def from_official(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    tokenizer: str = CLIP_TOKENIZER,
    dataset: str = "",
    **fields,
) -> None:
    """
    Write an official checkpoint as a folder of model, processor and model card; the folder appears when it is whole.

    Args:
        checkpoint: official `.pth`, a training checkpoint or a bare state dict.
        output_dir: folder to make.
        tokenizer: Hub id or folder of CLIP's tokenizer.
        dataset: what it was trained on, for the model card.
        **fields: as for [`recognize_config`].

    Raises:
        OSError: if a file or folder is missing, damaged or in the way.
        ValueError: if the checkpoint is not a whole official DETRIS.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} exists: name a folder that does not.")
    official = read_checkpoint(checkpoint)
    try:
        config = recognize_config(official, **fields)
        tensors = convert_state_dict(official, config)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    model = _skeleton(DetrisForReferringSegmentation, config)
    model.load_state_dict(tensors, assign=True)
    processor = DetrisProcessor.from_config(config, CLIPTokenizer.from_pretrained(tokenizer))
    origin = f"Converted from `{Path(checkpoint).name}`, a checkpoint in the official layout; no number was changed."
    card = make_model_card(config, output_dir.name, origin, dataset)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        card.save(folder / "README.md")
        folder.rename(output_dir)


def to_official(folder: str | os.PathLike, checkpoint: str | os.PathLike) -> None:
    """
    Write a saved DETRIS as a checkpoint that the official test script loads; the file appears when it is whole.

    Raises:
        OSError: if the folder cannot be read, or the file is there already.
        ValueError: if the model is of a kind that the official code does not have.
    """
    checkpoint = Path(checkpoint)
    if checkpoint.exists():
        raise FileExistsError(f"{checkpoint} exists: name a file that does not.")
    config = DetrisConfig.from_pretrained(folder)
    if "lora" in config.peft_method:
        raise ValueError(
            f"{folder} has low-rank adapters (peft_method is {config.peft_method}): the official code has none."
        )
    if config.vision_config.model_type != "dinov2_with_registers" or len(config.feature_layers) + 1 != len(
        NECK_LEVELS
    ):
        raise ValueError(
            f"{folder} has a backbone of type {config.vision_config.model_type} and {len(config.feature_layers)} "
            f"feature_layers: the official code has registers and {len(NECK_LEVELS) - 1} feature layers only."
        )
    tensors = load_file(Path(folder) / SAFE_WEIGHTS_NAME)  # which maps the file: a model would copy it
    expected = _skeleton(DetrisForReferringSegmentation, config).state_dict()
    _check(tensors, expected, f"{folder} does not fit its config.json", "Save or download it again.")
    official = convert_to_official(tensors, config)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=f".{checkpoint.name}-") as scratch:
        # Its names are those of DataParallel, under which the official code trains and tests.
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in official.items()}}, f"{scratch}/model")
        os.rename(f"{scratch}/model", checkpoint)


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        recipe = None
    if not isinstance(recipe, dict) or not isinstance(recipe.get("model_config", {}), dict):
        raise ValueError(f"{path} is no recipe: give a file such as those in configs/.")
    return recipe


def main(argv: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="official checkpoint; with --to-official a saved DETRIS")
    parser.add_argument("output", help="folder to make; with --to-official the checkpoint to write")
    parser.add_argument("--to-official", action="store_true", help="write an official checkpoint")
    parser.add_argument(
        "--dataset", help=f"what it was trained on, which says the phrase length: {', '.join(TEXT_LENGTHS)}"
    )
    parser.add_argument("--max_text_length", type=int, help="tokens of a phrase, instead")
    parser.add_argument("--recipe", help="file in configs/ whose model_config and sizes are taken, instead")
    parser.add_argument("--image_size", type=int, help="side of the square input; 448 in all official recipes")
    parser.add_argument("--tokenizer", default=CLIP_TOKENIZER, help="Hub id or folder of CLIP's tokenizer")
    arguments = parser.parse_args(argv)
    if arguments.to_official:
        to_official(arguments.source, arguments.output)
        return
    recipe = _read_recipe(Path(arguments.recipe)) if arguments.recipe else {}
    dataset = arguments.dataset or recipe.get("dataset")
    recipe["max_text_length"] = (
        arguments.max_text_length or TEXT_LENGTHS.get(arguments.dataset) or recipe.get("max_text_length")
    )
    if recipe["max_text_length"] is None and not arguments.recipe:  # a recipe that says nothing has the default
        raise ValueError(
            f"A checkpoint does not tell how long phrases are, and dataset is {dataset!r}: give --dataset as one of "
            f"{', '.join(TEXT_LENGTHS)}, or --max_text_length, or --recipe."
        )
    recipe["image_size"] = arguments.image_size or recipe.get("image_size")
    sizes = {name: recipe[name] for name in ("image_size", "max_text_length") if recipe[name] is not None}
    fields = recipe.get("model_config", {}) | sizes
    from_official(arguments.source, arguments.output, arguments.tokenizer, dataset or "", **fields)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(str(error))
