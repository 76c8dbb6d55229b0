"""The frozen backbones, DINOv2 and CLIP's text tower: from the Hub, a folder, a whole DETRIS, or an original file."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import find_adapter_config_file
from transformers.utils.hub import resolve_revision
from transformers.utils.quantization_config import QuantizationConfigMixin

try:
    from .checkpoint_files import (
        WEIGHT_FILES,
        check_finite,
        copy_out_of_file,
        read_tensors,
        refuse_pipes,
        require_plain_tensors,
        saved_shapes,
        shapes_of,
        skeleton,
    )
    from .configuration_detris import DetrisConfig, as_value_error, check_count, check_values, errors_begin_with
    from .official_layout import (
        Row,
        official_to_ours,
        read_text_config,
        read_vision_config,
        text_backbone_table,
        vision_backbone_table,
    )
    from .peft_detris import remove_adapters
except ImportError:
    if __package__:
        raise
    from checkpoint_files import (
        WEIGHT_FILES,
        check_finite,
        copy_out_of_file,
        read_tensors,
        refuse_pipes,
        require_plain_tensors,
        saved_shapes,
        shapes_of,
        skeleton,
    )
    from configuration_detris import DetrisConfig, as_value_error, check_count, check_values, errors_begin_with
    from official_layout import (
        Row,
        official_to_ours,
        read_text_config,
        read_vision_config,
        text_backbone_table,
        vision_backbone_table,
    )
    from peft_detris import remove_adapters


class TextTower(CLIPTextModelWithProjection):
    """CLIP's text tower. Loaded from a whole CLIP, it reports no unexpected tensors of the image tower."""

    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^visual_projection\.", "^logit_scale$"]


# By part and model type: the classes of a backbone's configuration and model.
BACKBONE_CLASSES = {
    "vision": {
        "dinov2": (Dinov2Config, Dinov2Model),
        "dinov2_with_registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
    },
    "text": {"clip": (CLIPTextConfig, TextTower), "clip_text_model": (CLIPTextConfig, TextTower)},
}


class FromBackbones:
    """Builds a model around pretrained backbones: a mixin of [`DetrisForReferringSegmentation`]."""

    @classmethod
    def from_backbones(
        cls,
        vision: str,
        text: str,
        vision_revision: str | None = None,
        text_revision: str | None = None,
        quantization_config: QuantizationConfigMixin | None = None,
        attn_implementation: str | dict[str, str] | None = None,
        **config_fields,
    ) -> Self:
        """
        Build a fresh DETRIS: pretrained backbones, untrained adapters and head.

        Args:
            vision (`str`):
                Hub id or folder of a DINOv2 model, with or without registers, or of a whole DETRIS, or an original
                `.pth` file.
            text (`str`):
                Hub id or folder of a CLIP model, whose text tower is taken, or of a whole DETRIS, or OpenAI's original
                file.
            vision_revision, text_revision (`str`, *optional*):
                Branch, tag or commit on the Hub.
            quantization_config (*optional*):
                Loads the frozen backbones quantised, such as `transformers.BitsAndBytesConfig`.
            attn_implementation (`str` or `dict`, *optional*):
                The attention of both backbones, or of each, as for [`set_attn_implementation`].
            **config_fields: further fields of [`DetrisConfig`].

        Returns:
            `DetrisForReferringSegmentation` in evaluation mode.

        Raises:
            OSError: if a file, folder or Hub id cannot be read.
            ValueError: if a backbone is of another kind, its weights do not fit its configuration or hold NaN or
                infinity, the backbones and fields do not fit together, or the attention cannot be used.
        """
        check_attention(attn_implementation)
        DetrisConfig.refuse_unknown(config_fields)
        vision_model, text_model = cls._read_backbones(
            vision, text, vision_revision, text_revision, quantization_config
        )
        config_fields |= {
            **cls._backbone_configs(vision_model, text_model),
            "vision_backbone": absolute_if_local(vision),
            "vision_backbone_revision": commit_of(vision, vision_revision),
            "text_backbone": absolute_if_local(text),
            "text_backbone_revision": commit_of(text, text_revision),
        }
        config = DetrisConfig(**config_fields)
        model = cls(config, vision_model, text_model).eval()
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        return model

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], allow_all_kernels: bool = False
    ) -> None:
        """
        Let the backbones compute attention in another way. The attentions of aligners and decoder stay PyTorch's.

        Args:
            attn_implementation (`str` or `dict`):
                `"eager"`, `"sdpa"`, `"flash_attention_2"`, `"flex_attention"` or another name that transformers knows,
                for both backbones; or a `dict` with a name for `"vision_config"`, for `"text_config"` or for both.
            allow_all_kernels (`bool`, *optional*, defaults to `False`):
                Whether attention may be a kernel from any repository of the Hub.

        Raises:
            ValueError: if there is no such attention, or it cannot be used on this machine.
        """
        check_attention(attn_implementation)
        with as_value_error(f"attn_implementation {attn_implementation!r} cannot be used"):
            super().set_attn_implementation(attn_implementation, allow_all_kernels)

    @staticmethod
    def _backbone_configs(vision_model: PreTrainedModel, text_model: PreTrainedModel) -> dict[str, dict]:
        """Copy the backbones' configurations as fields of [`DetrisConfig`].

        The backbones forget where they were read from, because the model saves their configurations as its own.
        """
        for backbone in (vision_model, text_model):
            backbone.config._name_or_path = ""
        return {"vision_config": vision_model.config.to_dict(), "text_config": text_model.config.to_dict()}

    @classmethod
    def _read_backbones(
        cls, vision: str, text: str, vision_revision=None, text_revision=None, quantization_config=None, **hub_kwargs
    ) -> tuple[PreTrainedModel, CLIPTextModelWithProjection]:
        """Read both backbones; arguments as for [`from_backbones`], and `hub_kwargs` such as `token`."""
        return (
            cls._read_backbone(vision, "vision", quantization_config, revision=vision_revision, **hub_kwargs),
            cls._read_backbone(text, "text", quantization_config, revision=text_revision, **hub_kwargs),
        )

    @classmethod
    def _read_backbone(cls, source: str, part: str, quantization_config=None, **hub_kwargs) -> PreTrainedModel:
        """Read one backbone, which is the `part` "vision" or "text", and refuse weights that are NaN or infinite."""
        if os.path.exists(source) and not os.path.isdir(source):
            model = copy_out_of_file(read_dinov2(source) if part == "vision" else read_clip_text(source))
        else:
            refuse_file(source)
            config = DetrisConfig.get_config_dict(source, **hub_kwargs)[0]
            if config.get("model_type") == DetrisConfig.model_type:
                return cls._backbone_of_whole(source, part, hub_kwargs)
            model = _read_saved_backbone(source, part, config, quantization_config, hub_kwargs)
        with errors_begin_with(source):
            check_finite(model.state_dict())
        return model

    @classmethod
    def _backbone_of_whole(cls, source: str, part: str, hub_kwargs: dict) -> PreTrainedModel:
        """Take a backbone out of a saved DETRIS, without its adapters."""
        if find_adapter_config_file(source, **hub_kwargs) is not None:
            raise ValueError(f"{source} holds adapters without backbones: name the backbones that they stand in.")
        whole = cls.from_pretrained(source, **hub_kwargs)
        remove_adapters(whole)
        if part == "vision":
            return whole.vision_model
        with torch.device("meta"):
            tower = TextTower(whole.config.text_config)
        tower.text_model, tower.text_projection = whole.text_model, whole.text_projection
        return tower


def _read_saved_backbone(
    source: str,
    part: str,
    config: dict[str, Any],
    quantization_config: QuantizationConfigMixin | None,
    hub_kwargs: dict,
) -> PreTrainedModel:
    """Read a backbone that Hugging Face's classes saved, in a folder or on the Hub; `config` is its config.json."""
    classes = BACKBONE_CLASSES[part]
    if config.get("model_type") not in classes:
        raise ValueError(
            f"{source} has the model_type {config.get('model_type')!r}: give a DINOv2 model for vision and a CLIP "
            "model for text."
        )
    config_class, model_class = classes[config["model_type"]]
    with as_value_error(f"The config.json of {source} cannot be used"):
        check_values(config)
        backbone_config = config_class.from_pretrained(source, **hub_kwargs)
    # Compared before memory is taken for what the configuration says. This is no check of names and shapes, because
    # tensors may have the names of older versions of transformers, which only transformers can translate.
    shapes = saved_shapes(source, WEIGHT_FILES, **hub_kwargs)
    if shapes:  # otherwise transformers says which file is missing
        with errors_begin_with(source):
            check_count("num_hidden_layers", backbone_config.num_hidden_layers, len(shapes))
            asked = sum(map(math.prod, shapes_of(skeleton(model_class, backbone_config).state_dict()).values()))
            held = sum(map(math.prod, shapes.values()))
            if asked > 2 * held:  # smaller gaps are reported by name after loading
                raise ValueError(
                    f"its configuration asks for {asked:,} numbers, but {held:,} are saved: download it again."
                )
    quantized = {} if quantization_config is None else {"quantization_config": quantization_config}
    # In float32, whatever type they are stored in, because adapters and head are trained in it.
    model, info = model_class.from_pretrained(
        source, config=backbone_config, dtype=torch.float32, output_loading_info=True, **hub_kwargs, **quantized
    )
    missing = info["missing_keys"]  # transformers has filled these tensors with noise
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} tensors of its backbone, such as {min(missing)}: give a DINOv2 model for "
            "vision and a CLIP model for text."
        )
    return model if quantized else copy_out_of_file(model)


# --- original files ------------------------------------------------------------------------------------------------


def read_dinov2(path: str | os.PathLike) -> Dinov2Model | Dinov2WithRegistersModel:
    """
    Read a file of the DINOv2 release, such as `dinov2_vitb14_reg4_pretrain.pth`, in float32; nothing in it is run.

    Raises:
        OSError: if the file is missing, no regular file or damaged.
        ValueError: if it is no such file, or a number is NaN or infinite.
    """
    tensors = {f"dinov2.{name}": tensor for name, tensor in read_tensors(path).items()}
    error_prefix = f"{path} is no DINOv2 of size small, base or large"
    return _build_from_original(tensors, "vision", read_vision_config, vision_backbone_table, error_prefix)


def read_clip_text(path: str | os.PathLike) -> CLIPTextModelWithProjection:
    """
    Read the text tower of a CLIP by OpenAI, such as `ViT-B-16.pt`, in float32: TorchScript as published, or a state
    dict. Nothing in it is run.

    Raises:
        OSError: if the file is missing, no regular file or damaged.
        ValueError: if it is no such file, or a number is NaN or infinite.
    """
    others = ("visual.", "input_resolution", "context_length", "vocab_size")  # the image tower, and sizes
    tensors = {
        f"txt_backbone.{name}": tensor for name, tensor in read_tensors(path).items() if not name.startswith(others)
    }
    error_prefix = f"{path} is no CLIP by OpenAI"
    return _build_from_original(tensors, "text", read_text_config, text_backbone_table, error_prefix)


def _build_from_original(
    tensors: dict[str, torch.Tensor],
    part: str,
    read_config: Callable[[Mapping[str, torch.Tensor]], PreTrainedConfig],
    make_table: Callable[[PreTrainedConfig], Iterator[Row]],
    error_prefix: str,
) -> PreTrainedModel:
    """
    Build a backbone from the tensors of its original release.

    Args:
        tensors: by the names that they have in an official DETRIS.
        part: "vision" or "text".
        read_config: reads the configuration off the tensors.
        make_table: lists the backbone's tensors in an official DETRIS.
        error_prefix: how an error begins.
    """
    remedy = "Give the file as its authors published it."
    try:
        require_plain_tensors(tensors)
        config = read_config(tensors)
    except ValueError as error:
        raise ValueError(f"{error_prefix}: {error} {remedy}") from None
    # Not `TextTower`, because a backbone that is saved names its class, which transformers must know.
    model_class = CLIPTextModelWithProjection if part == "text" else BACKBONE_CLASSES[part][config.model_type][1]
    table = [  # with our names as they are in a backbone that stands alone
        (name, [our_name.removeprefix("vision_model.") for our_name in our_names], kind)
        for name, our_names, kind in make_table(config)
    ]
    weights = official_to_ours(tensors, model_class, config, table, error_prefix, remedy)
    return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)


# --- attention -----------------------------------------------------------------------------------------------------


def check_attention(attn_implementation: Any) -> None:
    """Raise ValueError if this is neither a name nor names by the model's parts; None passes.

    transformers would pass over the name of a part that the model does not have.
    """
    names = attn_implementation if isinstance(attn_implementation, dict) else {"": attn_implementation or ""}
    if not (
        {*names} <= {"", "vision_config", "text_config"} and all(isinstance(name, str) for name in names.values())
    ):
        raise ValueError(
            f"attn_implementation is {attn_implementation!r}: give a name such as 'sdpa', or a dict of names for "
            "'vision_config', 'text_config' or both."
        )


# --- places --------------------------------------------------------------------------------------------------------


def commit_of(source: str, revision: str | None) -> str | None:
    """Ask the Hub which commit `revision` of a Hub id is at the moment; None for a file or folder."""
    if os.path.exists(source):
        return None
    return getattr(resolve_revision(source, revision), "resolved", revision)


def absolute_if_local(source: str | os.PathLike) -> str:
    """Return the absolute path of a file or folder, so that it is found from any working folder; a Hub id as it is."""
    return os.path.abspath(source) if os.path.exists(source) else os.fspath(source)


def refuse_file(source: str | os.PathLike | None) -> None:
    """Refuse a file with a ValueError, and a folder that holds pipes or devices with an OSError.

    None and what does not exist pass, because it may be a Hub id.
    """
    if source is None or not os.path.exists(source):
        return
    if not os.path.isdir(source):
        raise ValueError(
            f"{source} is a file: give a folder or a Hub id. A checkpoint of the official code is converted first, by "
            f"`python convert_detris_checkpoint.py {source} <folder>`."
        )
    refuse_pipes(source, broken_links=True)
