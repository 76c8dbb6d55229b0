"""The frozen backbones, DINOv2 and CLIP's text tower: from the Hub, a folder, a whole DETRIS, or an original file."""

import math
import os
from typing import Any, Self

import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
)
from transformers.utils import (
    find_adapter_config_file,
)
from transformers.utils.hub import resolve_revision
from transformers.utils.quantization_config import QuantizationConfigMixin

try:
    from .checkpoint_files import WEIGHT_FILES, check_finite, saved_shapes, shapes_of, skeleton
    from .configuration_detris import DetrisConfig, as_value_error, check_count, check_values, errors_begin_with
    from .peft_detris import remove_adapters
except ImportError:
    if __package__:
        raise
    from checkpoint_files import WEIGHT_FILES, check_finite, saved_shapes, shapes_of, skeleton
    from configuration_detris import DetrisConfig, as_value_error, check_count, check_values, errors_begin_with
    from peft_detris import remove_adapters


def align(model: nn.Module) -> nn.Module:
    # Loaded tensors lie where they lie in the file, unaligned, so that matrix products round otherwise than with those
    # of the model that was saved.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def commit_of(source: str, revision: str | None) -> str | None:
    """The commit that a Hub id stands for at the moment."""
    if os.path.exists(source):
        return None
    return getattr(resolve_revision(source, revision), "resolved", revision)


def place_of(source: str | os.PathLike) -> str:
    return os.path.abspath(source) if os.path.exists(source) else os.fspath(source)


def require_folder(source: str | os.PathLike | None) -> None:
    """Refuse a file with a ValueError, and a folder with pipes or devices, which would be waited for, with OSError."""
    if source is None or not os.path.exists(source):
        return  # None, or a Hub id
    if not os.path.isdir(source):
        raise ValueError(
            f"{source} is a file: give a folder or a Hub id. A checkpoint of the official code is converted first, by "
            f"`python convert_detris_checkpoint.py {source} <folder>`."
        )
    for entry in os.scandir(source):
        if not (entry.is_file() or entry.is_dir()):
            raise OSError(f"{entry.path} is neither a file nor a folder: save or download {source} again.")


class TextTower(CLIPTextModelWithProjection):
    """CLIP's text half, read from a whole CLIP without a list of all that is left there."""

    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^visual_projection\.", "^logit_scale$"]


# By model type: the classes of a backbone's configuration and model.
BACKBONE_CLASSES = {
    "vision": {
        "dinov2": (Dinov2Config, Dinov2Model),
        "dinov2_with_registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
    },
    "text": {"clip": (CLIPTextConfig, TextTower), "clip_text_model": (CLIPTextConfig, TextTower)},
}


class FromBackbones:
    """Builds a model around pretrained backbones."""

    @staticmethod
    def _backbone_configs(vision_model: PreTrainedModel, text_model: PreTrainedModel) -> dict[str, dict]:
        """Copies of the backbones' configurations, which have settled which attention they use."""
        return {
            "vision_config": vision_model.config.to_dict() | {"_name_or_path": ""},
            "text_config": text_model.config.to_dict() | {"_name_or_path": ""},
        }

    @classmethod
    def from_backbones(
        cls,
        vision: str,
        text: str,
        vision_revision: str | None = None,
        text_revision: str | None = None,
        quantization_config: QuantizationConfigMixin | None = None,
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
            **config_fields: further fields of [`DetrisConfig`].

        Returns:
            `DetrisForReferringSegmentation` in evaluation mode.

        Raises:
            OSError: if a folder or Hub id cannot be read.
            ValueError: if the backbones or fields do not fit together.
        """
        DetrisConfig.refuse_unknown(config_fields)
        vision_model, text_model = cls._read_backbones(
            vision, text, vision_revision, text_revision, quantization_config
        )
        config_fields |= {
            **cls._backbone_configs(vision_model, text_model),
            "vision_backbone": place_of(vision),
            "vision_backbone_revision": commit_of(vision, vision_revision),
            "text_backbone": place_of(text),
            "text_backbone_revision": commit_of(text, text_revision),
        }
        config = DetrisConfig(**config_fields)
        return cls(config, vision_model, text_model).eval()

    @classmethod
    def _read_backbones(
        cls, vision: str, text: str, vision_revision=None, text_revision=None, quantization_config=None, **hub_kwargs
    ) -> tuple[PreTrainedModel, CLIPTextModelWithProjection]:
        return (
            cls._read_backbone(vision, "vision", quantization_config, revision=vision_revision, **hub_kwargs),
            cls._read_backbone(text, "text", quantization_config, revision=text_revision, **hub_kwargs),
        )

    @classmethod
    def _read_backbone(cls, source: str, part: str, quantization_config=None, **hub_kwargs) -> PreTrainedModel:
        if os.path.exists(source) and not os.path.isdir(source):
            model = cls._read_original_backbone(source, part)
        else:
            require_folder(source)
            config = DetrisConfig.get_config_dict(source, **hub_kwargs)[0]
            if config.get("model_type") == DetrisConfig.model_type:
                return cls._backbone_of_whole(source, part, hub_kwargs)
            model = cls._read_saved_backbone(source, part, config, quantization_config, hub_kwargs)
        with errors_begin_with(source):
            check_finite(model.state_dict())
        return model

    @staticmethod
    def _read_original_backbone(source: str, part: str) -> PreTrainedModel:
        try:  # only those who build a new DETRIS need this, and have the repository
            from convert_detris_checkpoint import read_clip_text, read_dinov2
        except ModuleNotFoundError as error:
            if error.name != "convert_detris_checkpoint":
                raise
            raise ValueError(
                f"{source} is a file: give a folder or a Hub id, or work in this project's repository, which has "
                "convert_detris_checkpoint.py to read it."
            ) from None
        return align((read_clip_text if part == "text" else read_dinov2)(source))

    @classmethod
    def _backbone_of_whole(cls, source: str, part: str, hub_kwargs: dict) -> PreTrainedModel:
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

    @staticmethod
    def _read_saved_backbone(
        source: str, part: str, config: dict[str, Any], quantization_config, hub_kwargs: dict
    ) -> PreTrainedModel:
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
        # Before memory is taken for what the configuration says. Names may be those of older versions: transformers
        # knows them, so only the numbers are compared here.
        shapes = saved_shapes(source, WEIGHT_FILES, **hub_kwargs)
        if shapes:
            with errors_begin_with(source):
                check_count("num_hidden_layers", backbone_config.num_hidden_layers, len(shapes))
                asked = sum(map(math.prod, shapes_of(skeleton(model_class, backbone_config).state_dict()).values()))
                held = sum(map(math.prod, shapes.values()))
                if asked > 2 * held:  # what is a little too much, or missing, transformers tells by name
                    raise ValueError(
                        f"its configuration asks for {asked:,} numbers, but {held:,} are saved: download it again."
                    )
        quantized = {} if quantization_config is None else {"quantization_config": quantization_config}
        # In float32, whatever they are stored in: adapters and head are trained in it.
        model, info = model_class.from_pretrained(
            source, config=backbone_config, dtype=torch.float32, output_loading_info=True, **hub_kwargs, **quantized
        )
        if info["missing_keys"]:
            raise ValueError(
                f"{source} lacks {len(info['missing_keys'])} tensors of its backbone, such as "
                f"{min(info['missing_keys'])}: give a DINOv2 model for vision and a CLIP model for text."
            )
        return model if quantized else align(model)
