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
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
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
from modeling_detris import DetrisForReferringSegmentation
from processing_detris import DetrisImageProcessor, DetrisProcessor

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
TOKENIZER = "openai/clip-vit-base-patch16"  # every CLIP model has this one; backbones' original files come without


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
    for theirs, mine in (
        ("dense_branch1", "branch1"),
        ("dense_branch2.0", "branch2.0"),
        ("dense_branch2.1", "branch2.1"),
        ("dense_branch3.0", "branch3.0"),
        ("dense_branch3.1", "branch3.1"),
    ):
        yield from _conv_norm(
            f"{official}.{theirs}.conv", f"{official}.{theirs}.bn", f"{ours}.dense.{mine}", bias=True
        )


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


def name_table(config: DetrisConfig) -> list[tuple[str, list[str], str]]:
    """
    List every tensor of an official checkpoint as `(official name, our names, kind)`.

    The kind says how the official tensor becomes ours: `same`; `transposed` in its first two axes; `thirds` along the
    first axis, for query, key and value; `last third`, the value alone, since the rest has no effect.
    """
    registers = config.vision_config.model_type == "dinov2_with_registers"
    return [
        *_text_backbone(config.text_config.num_hidden_layers, config.text_adapter_layers),
        *_vision_backbone(config.vision_config.num_hidden_layers, registers, config.vision_adapter_layers),
        *_head(config),
    ]


def _to_ours(official: Mapping[str, torch.Tensor], table: Iterable[tuple]) -> dict[str, torch.Tensor]:
    """Ours by name; views of the official tensors where possible."""
    converted = {}
    for name, ours, kind in table:
        tensor = official[name]
        if kind == "transposed":
            tensors = [tensor.transpose(0, 1).contiguous()]
        elif kind == "thirds":
            tensors = tensor.chunk(3)
        elif kind == "last third":
            tensors = tensor.chunk(3)[2:]
        else:
            tensors = [tensor]
        converted.update(zip(ours, tensors, strict=True))
    return converted


def _check_names(names: Iterable[str], table: Iterable[tuple], what: str, remedy: str) -> None:
    expected = {name for name, _, _ in table}
    missing, unexpected = sorted(expected - set(names)), sorted(set(names) - expected - {IGNORED})
    if missing or unexpected:
        raise ValueError(
            f"{what}: {len(missing)} tensors are missing ({', '.join(missing[:3]) or 'none'}) and {len(unexpected)} "
            f"are too many ({', '.join(unexpected[:3]) or 'none'}). {remedy}"
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
        ValueError: if tensors are missing or too many for `config`; the message names them.
    """
    official, table = _state_dict_of(official), name_table(config)
    _check_names(
        official,
        table,
        "The official checkpoint does not fit the configuration",
        "Give the configuration that it was trained with.",
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
    official = {IGNORED: torch.tensor(0.0)}
    for name, ours, kind in name_table(config):
        tensors = [state_dict[our_name] for our_name in ours]
        if kind == "transposed":
            official[name] = tensors[0].transpose(0, 1).contiguous()
        elif kind == "thirds":
            official[name] = torch.cat(tensors)
        elif kind == "last third":
            official[name] = torch.cat([torch.zeros_like(tensors[0]), torch.zeros_like(tensors[0]), tensors[0]])
        else:
            official[name] = tensors[0]
    return official


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
        ValueError: if a tensor is missing that the configuration is read from.
    """
    official = _state_dict_of(official)
    vision_adapter, text_adapter = r"dinov2\.blocks\.(\d+)\.adapter\.", r"txt_backbone\..*\.(\d+)\.adapter\."
    try:
        backbones = {"vision_config": _vision_config(official), "text_config": _text_config(official)}
        depth = backbones["vision_config"].num_hidden_layers
        recognized = {
            "vision_adapter_layers": _layers(official, vision_adapter),
            "text_adapter_layers": _layers(official, text_adapter),
            "feature_layers": [depth // 3, 2 * depth // 3],  # as in all official recipes
            "decoder_dim": official["neck.txt_proj.weight"].shape[0],
            "decoder_layers": len(_layers(official, r"decoder\.layers\.(\d+)\.")),
            "decoder_ffn_dim": official["decoder.layers.0.ffn.0.weight"].shape[0],
        }
        for name in recognized["vision_adapter_layers"][:1]:
            adapter = f"dinov2.blocks.{name}.adapter"
            recognized["vision_adapter_dim"] = official[f"{adapter}.D_fc1.weight"].shape[0]
            recognized["aligner_attention_dim"] = official[f"{adapter}.cross.image_proj.weight"].shape[0]
        for name in recognized["text_adapter_layers"][:1]:
            adapter = f"txt_backbone.transformer.resblocks.{name}.adapter"
            recognized["text_adapter_dim"] = official[f"{adapter}.D_fc1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(
            f"The checkpoint has no tensor {error}, so it is no whole official DETRIS: get the file again."
        ) from None
    for name, config in backbones.items():
        backbones[name] = type(config).from_dict(config.to_dict() | fields.pop(name, {}))
    return DetrisConfig(**backbones, **recognized | fields)


# --- files --------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """
    Read a PyTorch checkpoint from strangers: tensors, numbers, strings and plain containers, nothing that could run.

    Tensors stay in the file until they are used.

    Raises:
        OSError: if the file is missing or damaged.
        ValueError: if it is no PyTorch checkpoint or holds what could run.
    """
    path = Path(path)
    whole = zipfile.is_zipfile(path)  # older checkpoints are no archives, and cannot be mapped
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: give the path of a checkpoint.") from None
    except Exception as error:  # whatever a broken part of the file means
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise ValueError(
                f"{path} asks for {asked[1]}, which is neither a tensor nor a plain container; nothing in it was run: "
                "get the file from those who published it."
            ) from None
        with open(path, "rb") as file:
            archive = file.read(2) == b"PK"
        if archive:
            raise OSError(f"{path} is cut short or damaged: copy or download it again.") from None
        raise ValueError(f"{path} is no PyTorch checkpoint: give a .pth file that torch.save wrote.") from None
    tensors = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(
            f"{path} holds no state dict, neither by itself nor as 'state_dict': give a model's checkpoint."
        )
    return checkpoint


def _skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Mapping, what: str):
    """A model without weights, which `tensors` fit by name and shape; or the first that does not is named."""
    with torch.device("meta"):
        model = model_class(config)
    for name, expected in model.state_dict().items():
        if name not in tensors:
            raise ValueError(f"{what}: {name} is missing. Get the file again.")
        if tensors[name].shape != expected.shape:
            raise ValueError(
                f"{what}: {name} has shape {tuple(tensors[name].shape)}, expected is {tuple(expected.shape)}. "
                "Get the file again, or name the recipe that it was trained with."
            )
    return model


def read_dinov2(path: str | os.PathLike) -> Dinov2Model | Dinov2WithRegistersModel:
    """
    Read a file of the DINOv2 release, such as `dinov2_vitb14_reg4_pretrain.pth`.

    Raises:
        OSError: if the file is missing or damaged.
        ValueError: if it is no such file.
    """
    tensors = {f"dinov2.{name}": tensor for name, tensor in _state_dict_of(read_checkpoint(path)).items()}
    what = f"{path} is no DINOv2 of a known kind"
    try:
        config = _vision_config(tensors)
    except KeyError as error:
        raise ValueError(f"{what}: it has no {error.args[0].removeprefix('dinov2.')}.") from None
    registers = isinstance(config, Dinov2WithRegistersConfig)
    table = list(_vision_backbone(config.num_hidden_layers, registers))
    _check_names(
        tensors, table, what, "Give a *_pretrain.pth with or without registers, of size small, base or large."
    )
    return _build(
        Dinov2WithRegistersModel if registers else Dinov2Model, config, tensors, table, "vision_model.", what
    )


def read_clip_text(path: str | os.PathLike) -> CLIPTextModelWithProjection:
    """
    Read the text tower of a CLIP by OpenAI, such as `ViT-B-16.pt`: TorchScript as published, or a state dict.

    Raises:
        OSError: if the file is missing or damaged.
        ValueError: if it is no such file.
    """
    what = f"{path} is no CLIP of a known kind"
    if zipfile.is_zipfile(path) and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        with warnings.catch_warnings():  # TorchScript is deprecated, but it is what was published
            warnings.simplefilter("ignore", DeprecationWarning)
            tensors = torch.jit.load(path, map_location="cpu").state_dict()
    else:
        tensors = _state_dict_of(read_checkpoint(path))
    others = ("visual.", "input_resolution", "context_length", "vocab_size")  # the image tower and loose numbers
    tensors = {
        f"txt_backbone.{name}": tensor.float() for name, tensor in tensors.items() if not name.startswith(others)
    }
    try:
        config = _text_config(tensors)
    except KeyError as error:
        raise ValueError(f"{what}: it has no {error.args[0].removeprefix('txt_backbone.')}.") from None
    table = list(_text_backbone(config.num_hidden_layers))
    _check_names(tensors, table, what, "Give a file such as ViT-B-16.pt.")
    return _build(CLIPTextModelWithProjection, config, tensors, table, "", what)


def _build(model_class, config, tensors, table, prefix: str, what: str) -> PreTrainedModel:
    ours = {name.removeprefix(prefix): tensor for name, tensor in _to_ours(tensors, table).items()}
    _skeleton(model_class, config, ours, what)
    return model_class.from_pretrained(None, config=config, state_dict=ours, dtype=torch.float32)


MODEL_CARD = """---
{card_data}
---

# DETRIS for referring image segmentation

An image and a phrase go in, the mask of what the phrase names comes out (Huang et al., AAAI 2025,
[arXiv 2501.08580](https://arxiv.org/abs/2501.08580)). Converted from an official checkpoint, `{source}`: the weights
are its authors', unchanged.

| | |
|---|---|
| vision backbone | {vision.num_hidden_layers} layers of width {vision.hidden_size} |
| vision adapters | in layers {config.vision_adapter_layers}, of width {config.vision_adapter_dim} |
| text backbone | {text.num_hidden_layers} layers of width {text.hidden_size} |
| text adapters | in layers {config.text_adapter_layers}, of width {config.text_adapter_dim} |
| image | {config.image_size} x {config.image_size} |
| phrase | {config.max_text_length} tokens |
| dataset | {dataset} |

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("<this repository>", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("<this repository>", trust_remote_code=True)
```

## Licences

The official code, and with it the checkpoint as far as its authors say, is under the MIT licence
([jiaqihuang01/DETRIS](https://github.com/jiaqihuang01/DETRIS)). It contains DINOv2 (Apache 2.0) and CLIP (MIT). It was
trained on photographs of COCO, which have licences of their own.
"""


def from_official(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    tokenizer: str = TOKENIZER,
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
    config = recognize_config(official, **fields)
    tensors = convert_state_dict(official, config)
    model = _skeleton(DetrisForReferringSegmentation, config, tensors, str(checkpoint))
    model.load_state_dict(tensors, assign=True)
    processor = DetrisProcessor(
        image_processor=DetrisImageProcessor(size={"height": config.image_size, "width": config.image_size}),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
        max_text_length=config.max_text_length,
        mask_threshold=config.mask_threshold,
    )
    card_data = ModelCardData(
        license="mit",
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["detris", "referring-image-segmentation"],
    )
    card = MODEL_CARD.format(
        card_data=card_data.to_yaml(),
        source=Path(checkpoint).name,
        config=config,
        vision=config.vision_config,
        text=config.text_config,
        dataset=dataset or "not said",
    )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        ModelCard(card).save(folder / "README.md")
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
    if config.vision_config.model_type != "dinov2_with_registers" or len(config.feature_layers) + 1 != len(
        NECK_LEVELS
    ):
        raise ValueError(
            f"{folder} has a backbone of type {config.vision_config.model_type} and {len(config.feature_layers)} "
            f"feature_layers: the official code has registers and {len(NECK_LEVELS) - 1} feature layers only."
        )
    tensors = load_file(Path(folder) / SAFE_WEIGHTS_NAME)  # which maps the file: a model would copy it
    _skeleton(DetrisForReferringSegmentation, config, tensors, str(folder))
    official = convert_to_official(tensors, config)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=f".{checkpoint.name}-") as scratch:
        # Its names are those of DataParallel, under which the official code trains and tests.
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in official.items()}}, f"{scratch}/model")
        os.rename(f"{scratch}/model", checkpoint)


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
    parser.add_argument("--tokenizer", default=TOKENIZER, help="Hub id or folder of CLIP's tokenizer")
    arguments = parser.parse_args(argv)
    if arguments.to_official:
        to_official(arguments.source, arguments.output)
        return
    recipe = yaml.safe_load(Path(arguments.recipe).read_text(encoding="utf-8")) if arguments.recipe else {}
    dataset = arguments.dataset or recipe.get("dataset")
    sizes = {
        "image_size": arguments.image_size or recipe.get("image_size"),
        "max_text_length": arguments.max_text_length or recipe.get("max_text_length") or TEXT_LENGTHS.get(dataset),
    }
    if sizes["max_text_length"] is None:
        raise ValueError(
            f"A checkpoint does not tell how long phrases are, and dataset is {dataset!r}: give --dataset as one of "
            f"{', '.join(TEXT_LENGTHS)}, or --max_text_length."
        )
    fields = recipe.get("model_config", {}) | {name: size for name, size in sizes.items() if size is not None}
    from_official(arguments.source, arguments.output, arguments.tokenizer, dataset or "", **fields)


if __name__ == "__main__":
    main()
