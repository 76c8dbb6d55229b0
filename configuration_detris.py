"""The configuration of a DETRIS model; below it, how all files of this project refuse wrong input.

A DETRIS has two frozen backbones, adapters inside them and a head behind them. Source: arXiv 2501.08580.
"""

import math
import numbers
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

# A dense block splits its width d into branches as narrow as d / 16 (official `model/adapter.py`).
ADAPTER_DIM_DIVISOR = 16
MODEL_TYPES = {
    "vision_config": ("dinov2", "dinov2_with_registers"),
    "text_config": ("clip_text_model",),
}
PEFT_METHODS = ("detris", "lora", "detris+lora", "none")
MAX_IMAGE_SIZE = 4096  # pixels; the cost of DINOv2's attention grows with its fourth power
MAX_LORA_ALPHA = 1_000_000
TASK = "referring-image-segmentation"  # what `transformers.pipeline` calls what DETRIS does
# What people may take for it; the first is what a model's card says, because the Hub does not know ours.
SIMILAR_TASKS = ("image-segmentation", "mask-generation", "object-detection", "zero-shot-object-detection")


@strict
class DetrisConfig(PreTrainedConfig):
    r"""
    Configuration of a [`DetrisForReferringSegmentation`]. The defaults are the paper's base recipe on RefCOCO.

    Layers are counted from 0, as in the official configuration files.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the vision backbone, of type `dinov2_with_registers` (default) or `dinov2`. Its
            `image_size` is the size that it was pretrained at, which sets the size of its position table.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the CLIP text backbone (`clip_text_model`). Its `projection_dim` is the width of the
            sentence embedding.
        vision_adapter_layers (`list[int]`, *optional*, defaults to `[1, 3, 5, 7, 9, 11]`):
            Layers of the vision backbone that hold a dense aligner.
        vision_adapter_dim (`int`, *optional*, defaults to 128):
            Width of the dense aligners, divisible by 16.
        text_adapter_layers (`list[int]`, *optional*, defaults to `[1, 3, 5, 7, 9, 11]`):
            Layers of the text backbone that hold a text adapter.
        text_adapter_dim (`int`, *optional*, defaults to 64):
            Width of the text adapters, divisible by 16.
        adapter_scale (`float`, *optional*, defaults to 0.2):
            Factor by which a layer multiplies what its adapter adds.
        peft_method (`str`, *optional*, defaults to `"detris"`):
            What is trained inside the backbones: `detris` (the adapters above), `lora` (PEFT's low-rank adapters),
            `detris+lora` (both) or `none`.
        lora_rank (`int`, *optional*, defaults to 8):
            Rank of the low-rank adapters, which every layer of both backbones holds.
        lora_alpha (`int`, *optional*, defaults to 16):
            Low-rank adapters are scaled by `lora_alpha / lora_rank`.
        lora_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the input of low-rank adapters.
        lora_target_modules (`list[str]`, *optional*, defaults to `["q_proj", "v_proj"]`):
            Linear modules of a backbone layer that hold a low-rank adapter, by the last part of their name.
        lora_use_dora (`bool`, *optional*, defaults to `False`):
            Whether to use DoRA, which learns the magnitude of the weights apart from their direction.
        aligner_attention_dim (`int`, *optional*, defaults to 128):
            Width of the aligners' attention from image patches to words.
        aligner_attention_heads (`int`, *optional*, defaults to 8):
            Heads of the aligners' attention.
        aligner_dropout (`float`, *optional*, defaults to 0.1):
            Dropout on the weights of the aligners' attention.
        feature_layers (`list[int]`, *optional*, defaults to `[4, 8]`):
            Layers of the vision backbone whose output, not normalised, is a feature map for the head. The last
            feature map is always the backbone's final output, normalised.
        decoder_dim (`int`, *optional*, defaults to 512):
            Width of neck and decoder, divisible by 4 and by `decoder_heads`; the mask head ends at half of it.
        decoder_layers (`int`, *optional*, defaults to 3):
            Number of decoder layers.
        decoder_heads (`int`, *optional*, defaults to 8):
            Attention heads of a decoder layer.
        decoder_ffn_dim (`int`, *optional*, defaults to 512):
            Inner width of a decoder layer's feed-forward network.
        decoder_dropout (`float`, *optional*, defaults to 0.1):
            Dropout in the decoder.
        image_size (`int`, *optional*, defaults to 448):
            Side of the square input in pixels, divisible by the vision backbone's patch size.
        max_text_length (`int`, *optional*, defaults to 17):
            Tokens of a phrase, including the start and the end token. 17 for RefCOCO, RefCOCO+ and G-Ref (google),
            22 for G-Ref (umd).
        mask_threshold (`float`, *optional*, defaults to 0.35):
            Probability above which a pixel belongs to the mask.
        freeze_backbones (`bool`, *optional*, defaults to `True`):
            Whether to train adapters and head only.
        vision_backbone (`str`, *optional*):
            Hub id, folder or file that the frozen vision backbone came from. Adapters that are saved without backbones
            are loaded into it. `from_backbones` fills it in, and the three below.
        vision_backbone_revision (`str`, *optional*):
            Commit of the vision backbone on the Hub.
        text_backbone (`str`, *optional*):
            Hub id, folder or file that the frozen text backbone came from.
        text_backbone_revision (`str`, *optional*):
            Commit of the text backbone on the Hub.

    Raises:
        ValueError: if a field has a value that cannot work; the message names field, value and remedy.
    """

    model_type = "detris"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="dinov2_with_registers",
            init_kwargs={"image_size": 518, "patch_size": 14},
        ),
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_text_model",
            init_kwargs={"bos_token_id": 49406, "eos_token_id": 49407},
        ),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    vision_adapter_layers: list[int] | tuple[int, ...] = (1, 3, 5, 7, 9, 11)
    vision_adapter_dim: int = 128
    text_adapter_layers: list[int] | tuple[int, ...] = (1, 3, 5, 7, 9, 11)
    text_adapter_dim: int = 64
    adapter_scale: float | int = 0.2
    peft_method: str = "detris"
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float | int = 0.0
    lora_target_modules: list[str] | tuple[str, ...] = ("q_proj", "v_proj")
    lora_use_dora: bool = False
    aligner_attention_dim: int = 128
    aligner_attention_heads: int = 8
    aligner_dropout: float | int = 0.1
    feature_layers: list[int] | tuple[int, ...] = (4, 8)
    decoder_dim: int = 512
    decoder_layers: int = 3
    decoder_heads: int = 8
    decoder_ffn_dim: int = 512
    decoder_dropout: float | int = 0.1
    image_size: int = 448
    max_text_length: int = 17
    mask_threshold: float | int = 0.35
    freeze_backbones: bool = True
    vision_backbone: str | None = None
    vision_backbone_revision: str | None = None
    text_backbone: str | None = None
    text_backbone_revision: str | None = None

    def __post_init__(self, **kwargs):
        for name in ("vision_config", "text_config"):
            values = getattr(self, name)
            check_values(values, name)
            if isinstance(values, dict) and "model_type" in values:
                self._check_model_type(name, values["model_type"])
        check_values(kwargs)
        _check_custom_pipelines(kwargs.get("custom_pipelines", {}))
        super().__post_init__(**kwargs)
        self.check_fields()

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read `config.json` as `PreTrainedConfig` does.

        Raises:
            ValueError: if it holds no configuration, or is read by `transformers.pipeline` for another task.
        """
        task = kwargs.get("_from_pipeline")
        if task in SIMILAR_TASKS:
            raise ValueError(
                f'The task is "{task}", but DETRIS segments what phrases name: use pipeline("{TASK}", '
                f'model="{pretrained_model_name_or_path}", trust_remote_code=True) and give it an image and phrases.'
            )
        with as_value_error(f"The config.json of {pretrained_model_name_or_path} cannot be read"):
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image, `g`."""
        return self.image_size // self.vision_config.patch_size

    @property
    def prefix_length(self) -> int:
        """Tokens of the vision backbone in front of the patches: the class token and the registers."""
        return 1 + getattr(self.vision_config, "num_register_tokens", 0)

    @classmethod
    def refuse_unknown(cls, names: Iterable[str]) -> None:
        """Raise ValueError if one of the `names` is no field; transformers would keep it and say nothing."""
        unknown = set(names) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"{sorted(unknown)} are no fields of DetrisConfig.")

    def check_fields(self) -> None:
        """Raise ValueError if a field has a value that cannot work.

        A model calls this again, because fields may have been changed since the configuration was made.
        """
        vision, text = self.vision_config, self.text_config
        check_values({field.name: getattr(self, field.name) for field in fields(self)})
        self._check_model_type("vision_config", vision.model_type)
        self._check_model_type("text_config", text.model_type)
        for field, depth in (
            ("vision_adapter_layers", vision.num_hidden_layers),
            ("text_adapter_layers", text.num_hidden_layers),
            ("feature_layers", vision.num_hidden_layers),
        ):
            if "adapter" in field and "detris" not in self.peft_method:
                continue
            layers = getattr(self, field)
            wrong = [layer for layer in layers if not 0 <= layer < depth]
            if wrong:
                raise ValueError(
                    f"{field} names layers {wrong}, which do not exist: the backbone has layers 0 to {depth - 1}."
                )
            if sorted(set(layers)) != list(layers):
                raise ValueError(f"{field} is {list(layers)}: give each layer once, in ascending order.")
        if self.peft_method not in PEFT_METHODS:
            raise ValueError(f"peft_method is {self.peft_method!r}: give one of {', '.join(PEFT_METHODS)}.")
        if "lora" in self.peft_method and not self.lora_target_modules:
            raise ValueError(
                "lora_target_modules is empty: name modules such as 'q_proj', or give another peft_method."
            )
        for field in (
            "lora_rank",
            "lora_alpha",
            "aligner_attention_heads",
            "decoder_heads",
            "decoder_layers",
            "decoder_ffn_dim",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}: it must be at least 1.")
        for field, divisor in (
            ("vision_adapter_dim", ADAPTER_DIM_DIVISOR),
            ("text_adapter_dim", ADAPTER_DIM_DIVISOR),
            ("image_size", vision.patch_size),
            ("aligner_attention_dim", self.aligner_attention_heads),
            ("decoder_dim", self.decoder_heads),
            # Sine and cosine of column and row each take a quarter of the decoder's channels.
            ("decoder_dim", 4),
        ):
            value = getattr(self, field)
            if value <= 0 or value % divisor:
                raise ValueError(f"{field} is {value}: it must be a positive multiple of {divisor}.")
        for field in ("aligner_dropout", "decoder_dropout", "lora_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}: it is a probability, at least 0 and below 1.")
        # The processor needs room for the start token, the end token and a word.
        if not 3 <= self.max_text_length <= text.max_position_embeddings:
            raise ValueError(
                f"max_text_length is {self.max_text_length}: it must lie between 3 and the "
                f"{text.max_position_embeddings} positions of the text backbone."
            )
        if not 0 < self.mask_threshold < 1:
            raise ValueError(f"mask_threshold is {self.mask_threshold}: it is a probability between 0 and 1.")
        if self.image_size > MAX_IMAGE_SIZE:
            raise ValueError(f"image_size is {self.image_size}: it must be at most {MAX_IMAGE_SIZE} pixels.")
        if self.lora_alpha > MAX_LORA_ALPHA:
            raise ValueError(f"lora_alpha is {self.lora_alpha}: it must be at most {MAX_LORA_ALPHA}.")

    @staticmethod
    def _check_model_type(name: str, model_type: Any) -> None:
        if model_type not in MODEL_TYPES[name]:
            types = " or ".join(map(repr, MODEL_TYPES[name]))
            raise ValueError(f"{name}.model_type is {model_type!r}: give a config of {types}.")

    @property
    def depths(self) -> dict[str, int]:
        """The numbers of layers of the backbones and the decoder, by the names of their fields."""
        return {
            "vision_config.num_hidden_layers": self.vision_config.num_hidden_layers,
            "text_config.num_hidden_layers": self.text_config.num_hidden_layers,
            "decoder_layers": self.decoder_layers,
        }

    def check_depths(self, tensors: int) -> None:
        """Raise ValueError if there are more layers than saved `tensors`, before a model with so many is built."""
        for name, depth in self.depths.items():
            check_count(name, depth, tensors)


def _check_custom_pipelines(tasks: Any) -> None:
    """Raise ValueError if `custom_pipelines` of a saved configuration is not what `transformers.pipeline` reads."""
    entries = tasks.values() if isinstance(tasks, dict) else [None]
    for entry in entries:
        names = entry.get("pt", ()) if isinstance(entry, dict) else None
        named = isinstance(names, (list, tuple)) and all(str(name).startswith("AutoModel") for name in names)
        if not named or not re.fullmatch(r"([\w./-]+--)?\w+\.\w+", str(entry.get("impl"))):
            raise ValueError(
                f"custom_pipelines is {short_repr(tasks)}: for each task it must name its class under impl, as "
                '"file.Class", and auto classes under pt, so leave it out or save the model again.'
            )


# --- How all files refuse wrong input ------------------------------------------------------------------------------

MAX_TEXT = 1000  # characters of a name or path in a configuration
MAX_LABELS = 1000  # transformers builds a dictionary with a name for each label; DETRIS has no labels
MAX_MESSAGE = 1_000  # characters of an error's message
MAX_REASON = 300  # characters of another library's message inside ours


@contextmanager
def as_value_error(what: str) -> Iterator[None]:
    """Turn whatever libraries raise inside, because an input is broken, into one ValueError that begins with `what`.

    OSError and plain ValueError pass through, because their messages are meant for the user, and so does lack of
    memory, because it says nothing about the input.
    """
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise_if_out_of_memory(error)
        if type(error) is ValueError:
            raise
        reason = one_line(error, MAX_REASON) or type(error).__name__
        raise ValueError(f"{what}: {reason}") from error


@contextmanager
def errors_begin_with(prefix: str | os.PathLike | None) -> Iterator[None]:
    """Put `prefix` and a colon in front of the message of a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from error


def raise_if_out_of_memory(error: BaseException | None) -> None:
    """Raise `error`, or one that caused it, if it is a MemoryError or torch.OutOfMemoryError.

    Every broad `except` begins with this call, so that lack of memory is not reported as a broken file.
    """
    kinds = (MemoryError, getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError))
    while error is not None:
        if isinstance(error, kinds):
            raise error
        error = error.__cause__


def check_values(values: Any, name: str = "") -> None:
    """Raise ValueError, naming the field, if a configuration holds a value that no configuration can have.

    Args:
        values: content of a JSON file; mappings and lists are searched.
        name: the field that holds `values`.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            if callable(getattr(PreTrainedConfig, str(key), None)):  # the value would replace a method
                raise ValueError(f"{key} is no field of a configuration: leave it out.")
            check_values(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, (list, tuple)):
        for value in values:
            check_values(value, name)
    elif isinstance(values, float) and not math.isfinite(values):
        raise ValueError(f"{name} is {values}: give a finite number.")
    elif isinstance(values, str) and len(values) > MAX_TEXT:
        raise ValueError(f"{name} has {len(values)} characters: give at most {MAX_TEXT}.")
    elif isinstance(values, int) and abs(values) >= 2**63:
        raise ValueError(f"{name} is a number of over 64 bits: give a smaller one.")
    elif name.rpartition(".")[2] == "num_labels" and isinstance(values, int) and values > MAX_LABELS:
        raise ValueError(f"{name} is {values}: DETRIS has no labels, so leave it out.")


def check_count(name: str, count: int, tensors: int) -> None:
    """Raise ValueError if the `count` of layers called `name` is larger than the number of saved `tensors`."""
    if count > tensors:
        raise ValueError(f"{name} is {count}, but only {tensors} tensors are saved: get the files again.")


def checked_threshold(threshold: Any, name: str) -> float:
    """Return a threshold of probabilities; refuse anything else with a ValueError."""
    if not isinstance(threshold, numbers.Real) or isinstance(threshold, bool) or not 0 <= threshold <= 1:
        raise ValueError(f"{name} is {short_repr(threshold)}: it is a probability, give a number from 0 to 1.")
    return threshold


def short_repr(value: Any) -> str:
    """A `repr` that fits into a message: a value from a stranger's file can be 10 MB long or contain itself."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to print a number with thousands of digits
        return "a number too long to print"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def one_line(message: Any, limit: int = MAX_MESSAGE) -> str:
    """The first `limit` characters of a message, without line breaks and control characters."""
    message = str(message)
    line = " ".join(message[:limit].split()).encode("utf-8", "backslashreplace").decode()
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda control: repr(control[0])[1:-1], line)
    return line if max(len(message), len(line)) <= limit else line[:limit] + " …"


def require_regular(path: str | os.PathLike) -> None:
    """Raise ValueError for a pipe, device or folder: reading a pipe could wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is no regular file.")


def read_regular(path: str | os.PathLike) -> bytes:
    """The bytes of a file. Raises ValueError if it is no regular file, OSError if it cannot be read."""
    require_regular(path)
    return Path(path).read_bytes()


def _with_value_errors(init: Callable) -> Callable:
    """Let `__init__` raise ValueError, as users expect, if a field has a value of a wrong type."""

    @wraps(init)
    def __init__(self, *args, **kwargs):
        with as_value_error("The configuration cannot be used"):
            init(self, *args, **kwargs)

    return __init__


DetrisConfig.__init__ = _with_value_errors(DetrisConfig.__init__)
DetrisConfig.register_for_auto_class()

__all__ = ["DetrisConfig"]
